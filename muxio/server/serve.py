"""The whole program around a server: signals, workers, what it tells on the way, and a summary."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from typing import Protocol as Interface

from muxio.server.connection import AnyProtocol
from muxio.server.limits import Limits, Timeouts
from muxio.server.live import INTERVAL, open_view
from muxio.server.loop import Loop
from muxio.server.notices import LogFormat, Notice, Say, listening, log_as_json, of_connection, writer
from muxio.server.offload import Offload
from muxio.server.protocol import EchoProtocol
from muxio.server.report import ConnectionReport
from muxio.server.server import BACKLOG, Stats
from muxio.server.signals import RELOAD, STATISTICS, STOP, handled
from muxio.server.sockets import Address, file_of, listen, remove_file
from muxio.server.statistics import Watch, WorkerStats, statistics
from muxio.server.systemd import Notifier
from muxio.server.threaded import ThreadedServer
from muxio.server.worker import Order
from muxio.server.worker_threads import WorkerThreads

#: How many seconds a first signal leaves connections to come to their end.
DRAIN = 5.0

#: How many seconds workers that were replaced go on with the connections that they have.
RETIRE = 60.0


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
    workers: int | None = None,
    worker_threads: bool = False,
    quiet: bool = False,
    live: bool = False,
    drain: float = DRAIN,
    retire: float = RETIRE,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    offload: Offload | None = None,
    log_format: LogFormat = "text",
    say: Say | None = None,
) -> Summary:
    """Serve until SIGINT (Ctrl-C) or SIGTERM, and return what was done.

    address, factory, backend, timeouts, limits, offload: as `Server` takes them; limits and pool are each worker's own.
    threads: serve with `ThreadedServer` and its echo instead; it has an address, and nothing else of these.
    workers: serve with so many processes, which share the port. They are started anew, not forked, so `factory` must be
    importable (a class or a function of a module), and a script that calls this does so under ``if __name__ ==
    "__main__"``. One that dies is replaced. SIGHUP replaces all, one after the other, by processes that import
    the code of that day; nobody is refused or reset meanwhile.
    worker_threads: let workers be threads of this process, for a Python without a GIL. SIGHUP ends the process, as it
    does with one server.
    quiet: no line for each connection.
    live: show once a second what goes on: a table on a terminal (with ``muxio[live]``), else a line. It is quiet, too.
    drain: after the first signal, how many seconds connections get to come to their end (`Server.shutdown`). A second
    signal ends that at once.
    retire: how many seconds a worker that was replaced leaves its connections alone, before it drains.
    log_format: how lines are written, and what is logged as well: for people, or as a JSON object each.
    say: called with each line (a `Notice`, which is a str); writes it to standard output by default. Workers that are
    processes write theirs about connections themselves.

    SIGUSR1 tells the statistics once. A service manager is told what sd_notify(3) describes.

    OSError: the address cannot be listened on. ValueError: no such backend, or options that exclude each other.
    TypeError: the factory cannot be handed to a process. ChildProcessError: a worker did not come to serve.

    The signals are handled only if this is the main thread, and their handlers are put back afterwards. In another
    thread nothing but the end of the process stops it: use `Server` there.
    """
    if threads and (factory is not EchoProtocol or backend or timeouts or limits or offload or workers or live):
        raise ValueError(
            "threads serve a blocking echo: they have no backend, time-outs, limits, workers or live view, "
            "and run no protocol"
        )
    if workers is not None and workers < 1:
        raise ValueError(f"workers are 1 or more, not {workers!r}")
    if worker_threads and workers is None:
        raise ValueError("worker_threads says what workers are, so it needs a number of workers")
    say = say or writer(log_format)
    notifier = Notifier()

    def tell(notice: Notice) -> None:
        say(notice)
        if notice.event in ("listening", "reloaded"):
            notifier.ready(notice)
        elif notice.event == "reload":
            notifier.reloading()

    with _logging(log_format):
        if threads:
            summary = _serve_by_threads(address, None if quiet else tell, tell, notifier)
        else:
            order = Order(
                factory, backend, timeouts, limits, offload, drain, None if quiet or live else say, log_format
            )
            summary = _serve_by_loops(
                _crew(address, order, workers, worker_threads, retire, tell), drain, live, log_format, tell, notifier
            )
        tell(Notice(str(summary), "stopped", **summary._asdict()))
    return summary


class _Crew(Interface):
    """Those who serve: one server, threads or processes; and the loop of the program's main thread."""

    loop: Loop
    #: What those of them had counted who were no more at the last `look`.
    gone: Stats

    def serve_forever(self) -> None: ...

    def stop(self, drain: float) -> None: ...

    def look(self, then: Callable[[Sequence[WorkerStats]], object]) -> None: ...

    def total(self) -> Stats: ...

    def close(self) -> None: ...


class _Alone:
    """One server, in the main thread."""

    gone = Stats.total([])

    def __init__(self, address: Address, order: Order, tell: Say) -> None:
        self._server = order.server(address)
        self._tell = tell
        self.loop = self._server.loop

    def serve_forever(self) -> None:
        self._tell(listening(self._server.server_address, self._server.backend))
        self._server.serve_forever()

    def stop(self, drain: float) -> None:
        self._server.shutdown(drain)

    def look(self, then: Callable[[Sequence[WorkerStats]], object]) -> None:
        then([WorkerStats("1", os.getpid(), "serving", self._server.stats())])

    def total(self) -> Stats:
        return self._server.stats()

    def close(self) -> None:
        self._server.close()


def _crew(address: Address, order: Order, workers: int | None, worker_threads: bool, retire: float, tell: Say) -> _Crew:
    if workers is None:
        return _Alone(address, order, tell)
    if worker_threads:
        return WorkerThreads(address, workers, order, tell)
    from muxio.server.workers import Workers  # here: multiprocessing costs as much as all the rest

    # What a caller wants to be told with can hardly be handed to a process.
    says = None if order.say is None else writer(order.log_format)
    return Workers(address, workers, replace(order, say=says), retire, tell)


def _serve_by_loops(
    crew: _Crew, drain: float, live: bool, log_format: LogFormat, tell: Say, notifier: Notifier
) -> Summary:
    began = time.monotonic()
    with contextlib.closing(crew):
        watch = Watch(began)
        drains = [drain]

        def stop() -> None:
            again = not drains
            if not again:
                notifier.stopping()
                crew.look(tell_stopping)
            crew.stop(0.0 if again else drains.pop())

        def tell_stopping(workers: Sequence[WorkerStats]) -> None:
            if standing := sum(worker.stats.connections for worker in workers):
                patient = "as long as they take" if drain == math.inf else f"{drain:g} s"
                line = f"stopping: {standing:,} connected, who get {patient}; again, and they are cut at once"
                tell(Notice(line, "stopping", connections=standing, drain=drain))

        def tell_statistics(workers: Sequence[WorkerStats]) -> None:
            tell(statistics(Watch(began).look(time.monotonic(), workers, crew.gone), since_the_start=True))

        def soon(call: Callable[..., object], *arguments: Any) -> Callable[[], object]:
            """By the loop: a signal may come in the middle of another line."""
            return partial(crew.loop.call_soon_threadsafe, call, *arguments)

        handlers: dict[int | None, Callable[[], object] | None] = dict.fromkeys(STOP, soon(stop))
        handlers[STATISTICS] = soon(crew.look, tell_statistics)
        if reload := getattr(crew, "reload", None):
            handlers[RELOAD] = soon(reload)
        with handled(handlers, crew.loop.wakeup_fd()), _view(crew, watch, live, log_format, tell):
            crew.serve_forever()
    done = crew.total()
    connections = done.accepted - done.refused
    seconds = time.monotonic() - began
    return Summary(connections, done.bytes_in, done.bytes_out, seconds, done.drained, done.cut)


@contextlib.contextmanager
def _view(crew: _Crew, watch: Watch, live: bool, log_format: LogFormat, tell: Say) -> Iterator[None]:
    """Show once a second what goes on, if that is wanted."""
    if not live:
        yield
        return
    view = open_view(f"muxio serve, pid {os.getpid()}; Ctrl-C stops", tell, log_format == "json")

    def look() -> None:
        crew.loop.call_later(INTERVAL, look)
        crew.look(show)

    def show(workers: Sequence[WorkerStats]) -> None:
        view.show(watch.look(time.monotonic(), workers, crew.gone))

    crew.loop.call_later(INTERVAL, look)
    try:
        yield
    finally:
        view.close()


@contextlib.contextmanager
def _logging(log_format: LogFormat) -> Iterator[None]:
    if log_format == "text":
        yield  # as the program has it; by default, warnings and worse go to standard error
        return
    handler = log_as_json()
    try:
        yield
    finally:
        logging.getLogger("muxio").removeHandler(handler)


def _serve_by_threads(address: Address, say: Say | None, tell: Say, notifier: Notifier) -> Summary:
    tally = _Tally(say)
    began = time.monotonic()
    listener = listen(address, BACKLOG)  # as the others do: ThreadedServer leaves the files of Unix sockets as they are
    file = file_of(address)
    server = ThreadedServer(listener, report=tally.add)

    def stop() -> None:
        notifier.stopping()
        server.shutdown()

    try:
        with server, handled(dict.fromkeys(STOP, stop), server.wakeup_fd()):
            tell(listening(server.server_address, "a thread per connection"))
            server.serve_forever()
    finally:
        remove_file(file)
    return Summary(tally.connections, tally.bytes_in, tally.bytes_out, time.monotonic() - began)


class _Tally:
    """Adds reports up, from whatever thread they come."""

    def __init__(self, say: Say | None) -> None:
        self._say = say
        self._lock = threading.Lock()
        self.connections = self.bytes_in = self.bytes_out = 0

    def add(self, report: ConnectionReport) -> None:
        with self._lock:
            self.connections += 1
            self.bytes_in += report.bytes_in
            self.bytes_out += report.bytes_out
            if self._say is not None:
                self._say(of_connection(report))
