"""Listeners: for every way to serve, given as sockets, shared by several servers, and left by those that retire."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest
from helpers import BACKENDS, wait_until
from helpers import serving as serving_in_a_thread
from programs import TIMEOUT, connect, echo, every_way, serving

from muxio.server import EchoProtocol, Limits, Server, ThreadedServer, serve
from muxio.server.listener import ACCEPT_BATCH
from muxio.server.sockets import resolve


@every_way
def test_ipv6(way: tuple[str, ...]) -> None:
    with serving(*way, "-q", address="[::1]:0") as served:
        assert served.address[0] == "::1"
        for _ in range(4):
            echo(served.address)
        served.stop()


@pytest.mark.parametrize("make", [Server, ThreadedServer], ids=["Server", "ThreadedServer"])
def test_a_server_takes_a_socket_over(make: Any, listener: socket.socket) -> None:
    ours = listener.dup()
    server = make(ours, EchoProtocol) if make is Server else make(ours)
    with serving_in_a_thread(server) as address:
        assert address == listener.getsockname()
        echo(address)
    assert ours.fileno() == -1


def test_a_socket_that_is_only_bound_is_made_to_listen() -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    with serving_in_a_thread(Server(sock, EchoProtocol)) as address:
        echo(address)


def test_a_socket_that_is_no_stream_is_refused_and_stays_whose_it_is() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with pytest.raises(ValueError, match="stream"):
            Server(sock, EchoProtocol)
        assert sock.fileno() >= 0


def test_a_socket_is_nothing_to_connect_to(listener: socket.socket) -> None:
    with pytest.raises(TypeError, match="connect"):
        resolve(listener)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_servers_that_share_a_listener_serve_everybody_and_rest_when_they_are_full(
    backend: str, listener: socket.socket
) -> None:
    servers = [
        Server(listener.dup(), EchoProtocol, backend=backend, shared=True, limits=Limits(connections=2))
        for _ in range(2)
    ]
    address = listener.getsockname()
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(serving_in_a_thread(server))
        clients = [stack.enter_context(connect(address)) for _ in range(6)]
        for client in clients:
            client.sendall(b"x")
        for client in clients[:4]:
            assert client.recv(1) == b"x"
        wait_until(lambda: [server.stats().connections for server in servers] == [2, 2])
        for client in clients[:2]:
            client.close()
        for client in clients[4:]:
            assert client.recv(1) == b"x"  # there is room, so whoever rested goes on


def test_who_is_full_leaves_peers_to_those_who_are_not(backend: str, listener: socket.socket) -> None:
    """Full after exactly one batch: while it is watching all the same, EXCLUSIVE may wake it and nobody else."""
    full, other = (
        Server(listener.dup(), EchoProtocol, backend=backend, shared=True, limits=Limits(connections=ACCEPT_BATCH))
        for _ in range(2)
    )
    with other, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(listener.getsockname())) for _ in range(ACCEPT_BATCH)]
        stack.enter_context(serving_in_a_thread(full))
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        stack.enter_context(serving_in_a_thread(other))
        looked = threading.Event()
        other.loop.call_soon_threadsafe(looked.set)
        assert looked.wait(TIMEOUT)  # those 64 were news to it until then
        time.sleep(0.05)  # while it is not asleep yet, it looks in any case, and this test sees nothing
        late = stack.enter_context(connect(listener.getsockname()))
        late.sendall(b"x")
        assert late.recv(1) == b"x"
        assert (full.stats().connections, other.stats().connections) == (ACCEPT_BATCH, 1)


def test_a_retiring_server_leaves_who_waits_to_the_others(backend: str, listener: socket.socket) -> None:
    old = Server(listener.dup(), EchoProtocol, backend=backend, shared=True)
    thread = threading.Thread(target=old.serve_forever)
    thread.start()
    address = listener.getsockname()
    with old, connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        old.retire(3600)
        old.retire(3600)
        wait_until(lambda: len(old.loop.poller) == 1)  # the client's connection
        with connect(address) as waiting:
            waiting.sendall(b"y")
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            assert old.stats().accepted == 1
            with serving_in_a_thread(Server(listener.dup(), EchoProtocol, backend=backend, shared=True)):
                assert waiting.recv(1) == b"y"
        client.close()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        assert (old.stats().drained, old.stats().cut) == (0, 0)


def test_a_retiring_server_drains_when_its_patience_is_over(backend: str) -> None:
    server = Server(("127.0.0.1", 0), EchoProtocol, backend=backend)
    with serving_in_a_thread(server) as address, connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        server.retire(0.01, drain=3600)
        assert client.recv(1) == b""
        client.close()
        wait_until(lambda: server.stats().drained == 1)


def test_a_retiring_server_without_clients_is_through(backend: str) -> None:
    server = Server(("127.0.0.1", 0), EchoProtocol, backend=backend)
    server.retire(3600)
    server.serve_forever()
    server.close()


def test_serve_takes_a_socket(listener: socket.socket) -> None:
    """Until its thread's end: a listener that is shut down stops nobody, so this one is stopped by an error."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(listener.dup(), say=say)
    assert lines[0].startswith(f"listening on 127.0.0.1:{listener.getsockname()[1]}")
