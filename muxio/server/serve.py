"""The whole program around a server: signals, what it tells on the way, and a summary."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

from muxio.server.connection import AnyProtocol
from muxio.server.limits import Limits, Timeouts
from muxio.server.protocol import EchoProtocol
from muxio.server.report import ConnectionReport, format_address
from muxio.server.server import Server
from muxio.server.sockets import Address
from muxio.server.threaded import ThreadedServer

#: How many seconds a first signal leaves connections to come to their end.
DRAIN = 5.0


class Summary(NamedTuple):
    """What a server did. ``str()`` of it is one line for people."""

    connections: int
    bytes_in: int
    bytes_out: int
    seconds: float
    drained: int = 0
    """Connections that stood at the stop, and ended before the time to drain was over."""
    cut: int = 0
    """Connections that were reset when it was."""

    def __str__(self) -> str:
        connections = "1 connection" if self.connections == 1 else f"{self.connections:,} connections"
        line = f"{connections}, {self.bytes_in:,} B in, {self.bytes_out:,} B out, {self.seconds:,.1f} s"
        return f"{line}; {self.drained:,} drained, {self.cut:,} cut" if self.drained or self.cut else line


def serve(
    address: Address,
    factory: Callable[[], AnyProtocol] = EchoProtocol,
    *,
    backend: str | None = None,
    threads: bool = False,
    quiet: bool = False,
    drain: float = DRAIN,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    say: Callable[[str], object] | None = None,
) -> Summary:
    """Serve until SIGINT (Ctrl-C) or SIGTERM, and return what was done.

    address, factory, backend, timeouts, limits: as `Server` takes them.
    threads: serve with `ThreadedServer` and its echo instead; it has an address, and nothing else of these.
    quiet: no line for each connection.
    drain: after the first signal, how many seconds connections get to come to their end (`Server.shutdown`). A second
    signal ends that at once.
    say: called with each line for people; prints it by default.

    OSError: the address cannot be listened on. ValueError: no such backend, or one for threads.

    The signals are handled only if this is the main thread, and their handlers are put back afterwards. In another
    thread nothing but the end of the process stops it: use `Server` there.
    """
    if threads and (factory is not EchoProtocol or backend or timeouts or limits):
        raise ValueError(
            "threads serve a blocking echo: they have no backend, time-outs or limits, and run no protocol"
        )
    say = say or _print
    tally = _Tally(None if quiet else say)
    began = time.monotonic()
    server: Server | ThreadedServer
    if threads:
        server = ThreadedServer(address, report=tally.add)
    else:
        server = Server(address, factory, backend=backend, timeouts=timeouts, limits=limits, report=tally.add)
    with server, _stop_signals(server, drain, say):
        means = "a thread per connection" if isinstance(server, ThreadedServer) else server.backend
        say(f"listening on {format_address(server.server_address)} ({means}); Ctrl-C stops")
        server.serve_forever()
    seconds = time.monotonic() - began
    summary = Summary(tally.connections, tally.bytes_in, tally.bytes_out, seconds)
    if isinstance(server, Server):
        stats = server.stats()
        summary = summary._replace(drained=stats.drained, cut=stats.cut)
    say(str(summary))
    return summary


def _print(line: str) -> None:
    print(line, flush=True)


class _Tally:
    """Adds reports up, from whatever thread they come."""

    def __init__(self, say: Callable[[str], object] | None) -> None:
        self._say = say
        self._lock = threading.Lock()
        self.connections = self.bytes_in = self.bytes_out = 0

    def add(self, report: ConnectionReport) -> None:
        with self._lock:
            self.connections += 1
            self.bytes_in += report.bytes_in
            self.bytes_out += report.bytes_out
            if self._say is not None:
                self._say(str(report))


@contextlib.contextmanager
def _stop_signals(server: Server | ThreadedServer, drain: float, say: Callable[[str], object]) -> Iterator[None]:
    """Let SIGINT and SIGTERM shut the server down: with time to drain, and without the second time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    patience = [drain]

    def stop(number: int, frame: FrameType | None) -> None:
        if isinstance(server, ThreadedServer):
            server.shutdown()
        elif patience:
            # By the loop: this may have come in the middle of another line.
            server.loop.call_soon_threadsafe(tell)
            server.shutdown(patience.pop())
        else:
            server.shutdown()

    def tell() -> None:
        if isinstance(server, Server) and (standing := server.stats().connections):
            patient = "as long as they take" if drain == math.inf else f"{drain:g} s"
            say(f"stopping: {standing:,} connected, who get {patient}; again, and they are cut at once")

    wakeup_fd = signal.set_wakeup_fd(server.wakeup_fd(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
        signal.set_wakeup_fd(wakeup_fd)
