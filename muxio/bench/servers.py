"""The echo servers that muxio's is measured beside: ``python -m muxio.bench.servers NAME``.

Each listens on a free port of 127.0.0.1, tells it in its first line as ``muxio serve`` does, and serves until it is
killed. All are right for big data and for peers that do not read: what the kernel does not take is kept, and nothing is
received meanwhile. All set TCP_NODELAY.
"""

from __future__ import annotations

import asyncio
import importlib
import select
import selectors
import socket
import sys
from collections.abc import Callable
from typing import Any

BACKLOG = 1024
RECEIVE_SIZE = 65_536


def bare_epoll(listener: socket.socket) -> None:
    """What Python can do at most: `select.epoll`, dictionaries, ``recv`` and ``send``."""
    if sys.platform != "linux":
        raise NotImplementedError
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN)
    sockets: dict[int, socket.socket] = {}
    kept: dict[int, bytes] = {}
    while True:
        for fd, events in poller.poll():
            if fd not in sockets:
                for sock in accept(listener):
                    sockets[sock.fileno()] = sock
                    poller.register(sock, select.EPOLLIN)
                continue
            sock = sockets[fd]
            try:
                data = kept.pop(fd) if events & select.EPOLLOUT else sock.recv(RECEIVE_SIZE)
                if not data:
                    raise ConnectionAbortedError
                try:
                    sent = sock.send(data)
                except BlockingIOError:
                    sent = 0
                if sent != len(data):
                    kept[fd] = data[sent:]
                    poller.modify(fd, select.EPOLLOUT)
                elif events & select.EPOLLOUT:
                    poller.modify(fd, select.EPOLLIN)
            except BlockingIOError:
                continue
            except OSError:
                kept.pop(fd, None)
                sockets.pop(fd).close()


class Connection:
    """A connection of the server over `selectors`, which is registered with it."""

    __slots__ = ("kept", "selector", "sock")

    def __init__(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        self.selector = selector
        self.sock = sock
        self.kept = b""
        selector.register(sock, selectors.EVENT_READ, self)

    def ready(self) -> None:
        try:
            data = self.kept or self.sock.recv(RECEIVE_SIZE)
            if not data:
                raise ConnectionAbortedError
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent != len(data) or self.kept:
                self.kept = data[sent:]
                self.selector.modify(self.sock, selectors.EVENT_WRITE if self.kept else selectors.EVENT_READ, self)
        except BlockingIOError:
            return
        except OSError:
            self.selector.unregister(self.sock)
            self.sock.close()


def over_selectors(listener: socket.socket) -> None:
    """The standard library's selector, and an object a connection."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is not None:
                key.data.ready()
                continue
            for sock in accept(listener):
                Connection(selector, sock)


def accept(listener: socket.socket) -> list[socket.socket]:
    """Everybody who waits, at most a backlog of them."""
    accepted: list[socket.socket] = []
    while len(accepted) < BACKLOG:
        try:
            sock, _ = listener.accept()
        except OSError:
            break
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted.append(sock)
    return accepted


class Echo(asyncio.Protocol):
    """The echo for asyncio's loops, which set TCP_NODELAY themselves."""

    transport: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


def in_loop(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
    loop.run_until_complete(loop.create_server(Echo, sock=listener, backlog=BACKLOG))
    loop.run_forever()


def in_asyncio(listener: socket.socket) -> None:
    in_loop(asyncio.new_event_loop(), listener)


def in_uvloop(listener: socket.socket) -> None:
    in_loop(importlib.import_module("uvloop").new_event_loop(), listener)


def in_gevent(listener: socket.socket) -> None:
    """A greenlet a connection."""
    server = importlib.import_module("gevent.server")
    plain = importlib.import_module("gevent.socket")

    def serve(sock: Any, _address: object) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while data := sock.recv(RECEIVE_SIZE):
                sock.sendall(data)
        except OSError:
            pass

    server.StreamServer(plain.socket(fileno=listener.detach()), serve).serve_forever()


SERVERS: dict[str, Callable[[socket.socket], None]] = {
    "epoll": bare_epoll,
    "selectors": over_selectors,
    "asyncio": in_asyncio,
    "uvloop": in_uvloop,
    "gevent": in_gevent,
}


def main() -> None:
    name = sys.argv[1]
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listener.setblocking(False)
    print(f"listening on 127.0.0.1:{listener.getsockname()[1]} ({name})", flush=True)
    SERVERS[name](listener)


if __name__ == "__main__":
    main()
