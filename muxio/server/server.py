"""The server: a listener, and a connection with a protocol for each peer that comes."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from muxio.events import READ
from muxio.server.connection import AnyProtocol, Connection
from muxio.server.connector import Address, resolve
from muxio.server.loop import Loop
from muxio.server.report import ConnectionReport, format_address

logger = logging.getLogger("muxio.server")

#: How many peers one readiness of the listener accepts: one at a time starves clients in a connect storm, all of them
#: would starve the connections that stand.
ACCEPT_BATCH = 64

#: Out of descriptors or memory: this lasts, so accepting rests a while. Every other error is that one peer's.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
ACCEPT_REST = 0.1  #: seconds


@final
class Server:
    """Serves a protocol to everybody who connects.

    address: (host, port), IPv4 or IPv6, port 0 for any; or the path of a Unix socket.
    factory: makes a protocol for each connection, a `Protocol` class for example.
    backend: the poller's backend; the best one by default.
    backlog: how many peers may wait to be accepted; the kernel may cut it down (net.core.somaxconn).
    report: called with a `ConnectionReport` when a connection has ended.

    OSError: the address is taken or does not exist. ValueError: there is no such backend.

    Listens from the beginning; serves in `serve_forever`. A context manager: leaving it closes everything.
    """

    def __init__(
        self,
        address: Address,
        factory: Callable[[], AnyProtocol],
        *,
        backend: str | None = None,
        backlog: int = 1024,
        report: Callable[[ConnectionReport], object] | None = None,
    ) -> None:
        self.loop = Loop(backend)
        try:
            self._listener = listen(address, backlog)
        except BaseException:
            self.loop.close()
            raise
        self.server_address: Any = self._listener.getsockname()
        self._factory = factory
        self._report = report
        self._connections: dict[Connection, float] = {}  # and when each began
        self._stopping = False
        self._closed = False
        self._serving = threading.Lock()  # held while serve_forever() runs
        self._thread: int | None = None
        self.loop.poller.register(self._listener, READ, self)

    def __repr__(self) -> str:
        return f"<Server at {format_address(self.server_address)}, {self.backend}, {len(self._connections)} connected>"

    @property
    def backend(self) -> str:
        """The name of the poller's backend."""
        return self.loop.poller.backend

    def serve_forever(self) -> None:
        """Accept and serve until `shutdown`, which may come before. Touches no signals.

        RuntimeError: it runs already, or the server was shut down.
        """
        if not self._serving.acquire(blocking=False):
            raise RuntimeError("serve_forever() runs already")
        try:
            if self._stopping:
                raise RuntimeError("the server was shut down: make a new one")
            self._thread = threading.get_ident()
            self.loop.run()
        finally:
            self._thread = None
            self._serving.release()

    def shutdown(self, drain: float = 0.0) -> None:
        """Stop accepting, close every connection, and let `serve_forever` return.

        drain: how many seconds connections get to send what is queued for their peers; then they are reset. Called
        again, a shorter time counts.

        From any thread; from another than the serving one it waits until `serve_forever` has returned. In the serving
        thread, a signal handler of it included, it returns at once.
        """
        if self._closed:
            return
        self.loop.call_soon_threadsafe(self._stop, drain)
        if self._thread != threading.get_ident():
            with self._serving:
                pass

    def wakeup_fd(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd``; see `Loop.wakeup_fd`."""
        return self.loop.wakeup_fd()

    def close(self) -> None:
        """Shut down, and give everything back. Closing again does nothing.

        RuntimeError: called by the serving thread from inside `serve_forever`; there it is `shutdown` that you want.
        """
        if self._thread == threading.get_ident():
            raise RuntimeError("close() from inside serve_forever(): call shutdown()")
        self.shutdown()
        if not self._closed:
            self._closed = True
            self._stop(0.0)
            if self._connections:
                self.loop.run()  # serve_forever() ended by an exception: the protocols still hear of their end
            self.loop.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What the loop calls

    def ready(self, events: int) -> None:
        """Peers wait: accept some of them."""
        for _ in range(ACCEPT_BATCH):
            if self._stopping:
                return
            try:
                sock, peername = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    logger.warning("accepting rests for %s s: %s", ACCEPT_REST, error)
                    self.loop.poller.modify(self._listener, 0)
                    self.loop.call_later(ACCEPT_REST, self._accept_again)
                    return
                continue
            try:
                self._welcome(sock, peername)
            except Exception as error:
                sock.close()
                self.failed(error)

    def failed(self, error: Exception) -> None:
        """A peer could not be served; the others are."""
        logger.error("cannot serve a connection", exc_info=error)

    # Inside

    def _welcome(self, sock: socket.socket, peername: Any) -> None:
        sock.setblocking(False)
        connection = Connection(self.loop, sock, peername, self._factory(), self._ended)
        self._connections[connection] = self.loop.time()
        connection.start()

    def _accept_again(self) -> None:
        if not self._stopping:
            self.loop.poller.modify(self._listener, READ)

    def _ended(self, connection: Connection, error: Exception | None) -> None:
        began = self._connections.pop(connection)
        if self._report is not None:
            seconds = self.loop.time() - began
            report = ConnectionReport(connection.peername, connection.bytes_in, connection.bytes_out, seconds, error)
            try:
                self._report(report)
            except Exception:
                logger.exception("the report about %r failed", connection)
        if self._stopping and not self._connections:
            self.loop.stop()

    def _stop(self, drain: float) -> None:
        if not self._stopping:
            self._stopping = True
            self.loop.poller.unregister(self._listener)
            self._listener.close()
            for connection in list(self._connections):
                connection.close()
        if drain > 0:
            self.loop.call_later(drain, self._cut)
        else:
            self._cut()
        if not self._connections:
            self.loop.stop()

    def _cut(self) -> None:
        for connection in list(self._connections):
            connection.abort()


def listen(address: Address, backlog: int) -> socket.socket:
    """A non-blocking listener. OSError: the address is taken or does not exist. ValueError: there is no such port."""
    family, _, _, _, where = resolve(address, socket.AI_PASSIVE)[0]
    listener = socket.create_server(where, family=family, backlog=backlog)
    listener.setblocking(False)
    return listener
