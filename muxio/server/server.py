"""The server: a listener, and a connection with a protocol for each peer that comes."""

from __future__ import annotations

import logging
import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, final

from muxio.server.connection import AnyProtocol, Connection, State
from muxio.server.group import Group
from muxio.server.limits import Limits, Timeouts
from muxio.server.listener import Listener
from muxio.server.loop import Loop
from muxio.server.offload import Offload
from muxio.server.report import ConnectionReport, format_address
from muxio.server.sockets import Address, file_of, listen, remove_file, reset_on_close

logger = logging.getLogger("muxio.server")

#: How many peers may wait to be accepted.
BACKLOG = 1024

#: How often `stats` looks again when connections end in the middle of it.
_LOOKS = 10


class Stats(NamedTuple):
    """What a server has done so far, and what it is at."""

    connections: int
    """Connections now."""
    accepted: int
    """Connections so far, those that were refused included."""
    refused: int
    """Connections that were reset at once: over the limit of their peer, or no descriptor was left."""
    timed_out: int
    """Connections that ended at one of the `Timeouts` or at a deadline of the protocol's."""
    reset: int
    """Connections that the peer reset or left in the middle."""
    failed: int
    """Connections that ended with another error: an exception of the protocol's, the network's."""
    drained: int
    """Connections that stood when the server was shut down, and ended before they were cut."""
    cut: int
    """Connections that were reset because the time to drain was over."""
    bytes_in: int
    """Bytes received."""
    bytes_out: int
    """Bytes handed to the kernel."""
    received: int
    """How often bytes were received: the messages, where each comes in one piece and alone; echoes, of an echo."""
    buffered: int
    """Bytes queued now, for all peers."""
    jobs: int
    """What was offloaded and is not answered yet."""
    lag: float
    """The most seconds that the loop was late at a timer lately: about how long one turn of it holds up the others."""

    @classmethod
    def total(cls, of: Iterable[Stats]) -> Stats:
        """Those of several servers together: the sums, and the worst lag."""
        each = [*of]
        sums = [sum(column) for column in zip(*each, strict=True)] or [0] * len(cls._fields)
        return cls(*sums)._replace(lag=max((stats.lag for stats in each), default=0.0))


@final
class Server:
    """Serves a protocol to everybody who connects.

    address: (host, port), IPv4 or IPv6, port 0 for any; the path of a Unix socket, whose file goes when the server is
    closed; or a stream socket that is bound or listens, which belongs to the server from now on.
    factory: makes a protocol for each connection, a `Protocol` class for example.
    backend: the poller's backend; the best one by default.
    backlog: how many peers may wait to be accepted; the kernel may cut it down (net.core.somaxconn).
    timeouts: how long peers may take for what; see `Timeouts`.
    limits: how much the server takes on; see `Limits`.
    offload: where CPU-bound work goes (`Transport.offload`): threads, unless this `Offload` says processes.
    report: called with a `ConnectionReport` when a connection has ended.
    shared: other servers accept on the same socket, and one peer need not wake all of them (EXCLUSIVE, if there is it).

    OSError: the address is taken or does not exist. ValueError: there is no such backend.

    Listens from the beginning; serves in `serve_forever`. A context manager: leaving it closes everything.
    """

    def __init__(
        self,
        address: Address,
        factory: Callable[[], AnyProtocol],
        *,
        backend: str | None = None,
        backlog: int = BACKLOG,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        offload: Offload | None = None,
        report: Callable[[ConnectionReport], object] | None = None,
        shared: bool = False,
    ) -> None:
        self._limits = limits or Limits()
        self.loop = Loop(backend, offload=offload)
        self._group = Group(self.loop, timeouts, self._limits.buffered, self._ended)
        try:
            sock = listen(address, backlog)
            try:
                self._listener = Listener(self.loop, sock, self._welcome, self._is_full, shared)
            except BaseException:
                sock.close()
                raise
        except BaseException:
            self.loop.close()
            raise
        self.server_address: Any = sock.getsockname()
        self._file = file_of(address)
        self._factory = factory
        self._report = report
        self._backlog = backlog
        self._per_peer: Counter[str] = Counter()  # connections by host, if there is a limit to that
        self._last_host: str | None = None
        self._accepted = self._refused = 0
        self._ended_in_drain = self._cut = 0
        self._retiring = False
        self._stopping = False
        self._closed = False
        self._serving = threading.RLock()  # held while serve_forever() runs; its own thread never waits for it
        self._thread: int | None = None

    def __repr__(self) -> str:
        return f"<Server at {format_address(self.server_address)}, {self.backend}, {len(self._group)} connected>"

    @property
    def backend(self) -> str:
        """The name of the poller's backend."""
        return self.loop.poller.backend

    def stats(self) -> Stats:
        """What was done so far. From any thread; it costs some tenths of a microsecond for each connection.

        From another thread than the serving one, the bytes of connections that end just now may be missing.
        """
        group = self._group
        for _ in range(_LOOKS):
            leaving, bytes_in, bytes_out = group.leaving, group.bytes_in, group.bytes_out
            for connection in group:
                bytes_in += connection.bytes_in
                bytes_out += connection.bytes_out
            if leaving == group.leaving and not leaving % 2:  # else somebody may be in none of these
                break
        turned_away = self._listener.turned_away
        return Stats(
            connections=len(group),
            accepted=self._accepted + turned_away,
            refused=self._refused + turned_away,
            timed_out=group.timed_out,
            reset=group.reset,
            failed=group.failed,
            drained=max(0, self._ended_in_drain - self._cut),
            cut=self._cut,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            received=group.received,
            buffered=group.buffered,
            jobs=self.loop.jobs.jobs,
            lag=self.loop.lag,
        )

    def serve_forever(self) -> None:
        """Accept and serve until `shutdown`, which may come before. Touches no signals.

        RuntimeError: it runs already, or the server was shut down.
        """
        if self._thread == threading.get_ident() or not self._serving.acquire(blocking=False):
            raise RuntimeError("serve_forever() runs already")
        try:
            if self._stopping:
                raise RuntimeError("the server was shut down: make a new one")
            self._thread = threading.get_ident()
            self.loop.run()
        finally:
            self._thread = None
            self._serving.release()

    def retire(self, patience: float, drain: float = 0.0) -> None:
        """Accept no more, leave the others alone until they have left by themselves, and let `serve_forever` return.

        For a server whose `shared` socket others go on accepting on: who waits to be accepted is left to them.

        patience: after how many seconds a `shutdown` with so much time to `drain` follows; infinity for never.

        From any thread; it does not wait.
        """
        self.loop.call_soon_threadsafe(self._retire, patience, drain)

    def shutdown(self, drain: float = 0.0, wait: bool = True) -> None:
        """Stop accepting, let every connection come to its end, and let `serve_forever` return.

        drain: how many seconds that may take. Peers that wait to be accepted are accepted first, since the kernel
        would reset them. Each protocol is asked by ``draining()``; by default what was received is answered, the
        peer gets EOF, and what it still sends is thrown away until its own EOF. What is left when the time is over is
        reset, and with 0 everything is, at once. This time counts instead of the time-outs ``close`` and ``linger``.
        Called again, a shorter time counts.

        wait: until `serve_forever` has returned, if this is another thread. In the serving thread, a signal handler of
        it included, it returns at once in any case.

        From any thread.
        """
        if self._closed:
            return
        self.loop.call_soon_threadsafe(self._stop, drain)
        if wait:
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
        with self._serving:
            if not self._closed:
                self._closed = True
                self._stop(0.0)
                self.loop.end_clients()
                # Every protocol hears of its end: those of `Loop.connect`, and all if serve_forever() raised.
                self.loop.run_once()
                while len(self._group) or len(self.loop.clients):
                    self.loop.run_once()
                self.loop.close()
                remove_file(self._file)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _is_full(self) -> bool:
        most, group = self._limits.connections, self._group
        return (most is not None and len(group) >= most) or group.buffered > group.most_buffered

    def _welcome(self, sock: socket.socket, peername: Any) -> None:
        self._accepted += 1
        host = _host(peername)
        if self._limits.per_peer is not None and self._per_peer[host] >= self._limits.per_peer:
            self._refused += 1
            logger.debug("refused: %s has as many connections as it may", host)
            reset_on_close(sock)
            sock.close()
            return
        if host == self._last_host:
            peername = (self._last_host, *peername[1:])  # one string for all that come from one proxy: 64 bytes each
        elif host:
            self._last_host = host
        connection = Connection(self._group, sock, peername, self._factory())
        if self._limits.per_peer is not None:
            self._per_peer[host] += 1
        connection.start()

    def _ended(self, connection: Connection, error: Exception | None) -> None:
        if self._limits.per_peer is not None:
            host = _host(connection.peername)
            self._per_peer[host] -= 1
            if self._per_peer[host] == 0:
                del self._per_peer[host]
        self._listener.resume()
        if self._report is not None:
            seconds = max(0.0, self.loop.peer_time() - connection.began)
            report = ConnectionReport(connection.peername, connection.bytes_in, connection.bytes_out, seconds, error)
            try:
                self._report(report)
            except Exception:
                logger.exception("the report about %r failed", connection)
        if self._stopping:
            self._ended_in_drain += 1
        if (self._stopping or self._retiring) and not len(self._group):
            self.loop.stop()

    def _retire(self, patience: float, drain: float) -> None:
        if not (self._stopping or self._retiring):
            self._retiring = True
            self._listener.close(0)
            if patience < math.inf:
                self.loop.call_later(patience, self._stop, drain)
            if not len(self._group):
                self.loop.stop()

    def _stop(self, drain: float) -> None:
        if drain > 0:
            self.loop.call_later(drain, self._cut_off)
        if not self._stopping:
            self._stopping = True
            self._listener.close(self._backlog if drain > 0 else 0)
            if drain > 0:
                self._group.close = self._group.linger = math.inf  # what counts now is the time to drain
                for connection in list(self._group):
                    connection.drain()
        if drain <= 0:
            self._cut_off()
        if not len(self._group):
            self.loop.stop()

    def _cut_off(self) -> None:
        """The time to drain is over."""
        for connection in self._group:
            if connection.state is not State.CLOSED:
                self._cut += 1
                connection.abort()


def _host(peername: Any) -> str:
    """Who a peer is for the limit by peer; all that come through a Unix socket are one."""
    return peername[0] if isinstance(peername, tuple) else ""
