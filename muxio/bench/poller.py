"""What ``muxio bench poller`` measures: polls, changes of registrations, the import, and how late timeouts are.

The contestants are muxio on each backend, `muxio.Selector`, `selectors.DefaultSelector`, and, as the limit of what
Python can do, the bare facilities of `select` with a dictionary look-up. Each has a facility of its own over the same
sockets. A poll goes through what it returned, as a program would, up to the object that was registered.
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any

import muxio
from muxio import READ, WRITE
from muxio.bench.measure import Bar, Failure, Results, Row, Sampler, Scenario, calibrate
from muxio.poller import MAX_EVENTS

FEW, MANY = "poll, 10 ready of 100", "poll, 10 ready of 5,000"
POLLS: tuple[tuple[int, float | None, dict[str, int]], ...] = (  # ready, timeout, row -> registered
    (1, None, {"poll, 1 ready": 1}),
    (1, 10.0, {"poll, 1 ready, finite timeout": 1}),
    (100, None, {"poll, 100 ready": 100}),
    (5000, None, {"poll, 5,000 ready": 5000}),
    (10, None, {FEW: 100, MANY: 5000}),
)
CHANGES = "register + modify + unregister"
CHANGES_IN_USE = f"{CHANGES}, each after a poll"
IMPORT = "import"
BARE_START = "interpreter start"
TIMEOUTS = (0.0001, 0.0021, 0.01)  # seconds

QUICK_ROUNDS = 3
IMPORT_ROUNDS = 15  # at least: processes are noisy
TIMEOUTS_A_ROUND = 5
SAMPLE_SECONDS = 0.004  # short, so that most samples are not interrupted
QUICK_SAMPLE_SECONDS = 0.0002
SPARE_FILES = 100  # open files beside the sockets

#: Facilities whose polls cost as much as is ready, not as is registered.
SCALING = ("epoll", "kqueue", "afd")

Sources = Sequence[socket.socket]
Scenarios = Generator[Scenario, None, None]


def bench(runs: int, quick: bool, backend: str | None) -> tuple[Results, Scenarios]:
    """What to measure, for `report.conduct`. ValueError or OSError: the backend does not exist, or does not work."""
    if backend:
        muxio.Poller(backend).close()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SAMPLE_SECONDS) if quick else (runs, SAMPLE_SECONDS)
    settings = {"rounds": rounds, "quick": quick, "backend": backend}
    most = max(registered for _, _, rows in POLLS for registered in rows.values())
    results = Results("poller", settings, "selectors", bars(backend), most + SPARE_FILES)

    def scenarios() -> Scenarios:
        for ready, timeout, rows in POLLS:
            yield from _polling(rows, ready, timeout, backend, rounds, seconds, results.remarks)
        for polled in (False, True):
            yield from _changing(polled, backend, rounds, seconds)
        yield from _importing(rounds if quick else max(rounds, IMPORT_ROUNDS))
        yield from _timing_out(backend, rounds if quick else rounds * TIMEOUTS_A_ROUND, results.remarks)

    return results, scenarios()


def bars(backend: str | None) -> list[Bar]:
    """What muxio has to keep to: each backend that scales, and the best one here, if it takes part."""
    best = muxio.backends()[0]
    imported = Bar(IMPORT, "muxio", "selectors", "at most", 1.5)
    scaling = [
        Bar(MANY, f"muxio {name}", f"muxio {name}", "at most", 1.5, FEW)
        for name in ([backend] if backend else muxio.backends())
        if name in SCALING
    ]
    if backend not in (None, best):
        return [*scaling, imported]
    bare = Bar("poll, 100 ready", f"muxio {best}", f"bare {best}", "at most", 1.25)
    return [
        *([bare] if bare.denominator in line_up(best) else []),
        Bar("poll, 100 ready", "selectors", f"muxio {best}", "at least", 1.45),
        Bar("poll, 1 ready", f"muxio {best}", "selectors", "at most", 1.05),
        *scaling,
        Bar(CHANGES, "selectors", f"muxio {best}", "at least", 1.5),
        imported,
    ]


# The contestants. Each has loops of its own: a call in between would cost as much as what is measured.


class Muxio:
    both = READ | WRITE

    def __init__(self, make: Callable[[], Any]) -> None:
        self.facility = make()

    def register(self, sources: Sources) -> None:
        register = self.facility.register
        for source in sources:
            register(source, READ, source)

    def modify(self, sources: Sources) -> None:
        modify, both = self.facility.modify, self.both
        for source in sources:
            modify(source, both, source)

    def unregister(self, sources: Sources) -> None:
        unregister = self.facility.unregister
        for source in sources:
            unregister(source)

    def poll(self, polls: int, timeout: float | None) -> int:
        """Poll so many times, look at each event, and return how many there were."""
        poll, seen = self.facility.poll, 0
        for _ in range(polls):
            ready = poll(timeout)
            for _key, _events in ready:
                pass
            seen += len(ready)
        return seen

    def look(self, timeout: float | None) -> list[socket.socket]:
        """Poll once, and return what is ready."""
        return [key for key, _ in self.facility.poll(timeout)]

    def close(self) -> None:
        self.facility.close()

    def __str__(self) -> str:
        return f"{self.facility!r}"


class Selector(Muxio):
    both = selectors.EVENT_READ | selectors.EVENT_WRITE

    def poll(self, polls: int, timeout: float | None) -> int:
        poll, seen = self.facility.select, 0
        for _ in range(polls):
            ready = poll(timeout)
            for key, _events in ready:
                _data = key.data
            seen += len(ready)
        return seen

    def look(self, timeout: float | None) -> list[socket.socket]:
        return [key.data for key, _ in self.facility.select(timeout)]


class Bare(Muxio):
    """`select.epoll` or `select.poll`, whose bits are both poll(2)'s, like muxio's."""

    def __init__(self, make: Callable[[], Any], unit: int) -> None:
        super().__init__(make)
        self.unit = unit  # how many units of its timeouts make a second
        self.table: dict[int, socket.socket] = {}

    def register(self, sources: Sources) -> None:
        register, table = self.facility.register, self.table
        for source in sources:
            fd = source.fileno()
            register(fd, READ)
            table[fd] = source

    def modify(self, sources: Sources) -> None:
        modify, both = self.facility.modify, self.both
        for source in sources:
            modify(source, both)

    def unregister(self, sources: Sources) -> None:
        unregister, table = self.facility.unregister, self.table
        for source in sources:
            fd = source.fileno()
            unregister(fd)
            del table[fd]

    def poll(self, polls: int, timeout: float | None) -> int:
        poll, table, seen = self.facility.poll, self.table, 0
        wait = -1 if timeout is None else timeout * self.unit  # PyPy's epoll does not take None
        for _ in range(polls):
            ready = poll(wait)
            for fd, _events in ready:
                _key = table[fd]
            seen += len(ready)
        return seen

    def look(self, timeout: float | None) -> list[socket.socket]:
        return [self.table[fd] for fd, _ in self.facility.poll(-1 if timeout is None else timeout * self.unit)]

    def close(self) -> None:
        if hasattr(self.facility, "close"):  # a select.poll has nothing to close
            self.facility.close()


class BareKqueue(Bare):
    """`select.kqueue`; its constants are looked up by name, since other systems' type checkers do not know them."""

    def register(self, sources: Sources) -> None:
        self.control(sources, "KQ_EV_ADD", "KQ_FILTER_READ")
        self.table.update((source.fileno(), source) for source in sources)

    def modify(self, sources: Sources) -> None:
        self.control(sources, "KQ_EV_ADD", "KQ_FILTER_WRITE")

    def unregister(self, sources: Sources) -> None:
        self.control(sources, "KQ_EV_DELETE", "KQ_FILTER_READ", "KQ_FILTER_WRITE")
        self.table.clear()

    def control(self, sources: Sources, action: str, *filters: str) -> None:
        control, event, act = self.facility.control, self.named("kevent"), self.named(action)
        codes = [self.named(name) for name in filters]
        for source in sources:
            control([event(source, code, act) for code in codes], 0)

    def poll(self, polls: int, timeout: float | None) -> int:
        control, table, seen = self.facility.control, self.table, 0
        for _ in range(polls):
            ready = control(None, MAX_EVENTS, timeout)
            for event in ready:
                _key = table[event.ident]
            seen += len(ready)
        return seen

    def look(self, timeout: float | None) -> list[socket.socket]:
        return [self.table[event.ident] for event in self.facility.control(None, MAX_EVENTS, timeout)]

    @staticmethod
    def named(name: str) -> Any:
        return getattr(select, name)


def line_up(backend: str | None, bare: bool = True) -> dict[str, Callable[[], Muxio]]:
    """The contestants' names, and how each is made."""
    backends = [backend] if backend else muxio.backends()
    found: dict[str, Callable[[], Muxio]] = {
        f"muxio {name}": partial(Muxio, partial(muxio.Poller[Any], name)) for name in backends
    }
    found["muxio.Selector"] = partial(Selector, partial(muxio.Selector, backends[0]))
    found["selectors"] = partial(Selector, selectors.DefaultSelector)
    for name, kind, unit in (("epoll", Bare, 1), ("kqueue", BareKqueue, 1), ("poll", Bare, 1000)):
        make = getattr(select, name, None)
        if bare and make:
            found[f"bare {name}"] = partial(kind, make, unit)
    return found


# What they do


def _sockets(stack: ExitStack, number: int, ready: bool = True) -> Sources:
    """UDP sockets, of which one descriptor each is enough to make them ready: they write to themselves."""
    sockets = []
    for _ in range(number):
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind(("127.0.0.1", 0))
        if ready:
            sock.sendto(b"x", sock.getsockname())
            sock.recv(1, socket.MSG_PEEK)  # waits until it has arrived
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


def _polling(
    rows: dict[str, int],
    ready: int,
    timeout: float | None,
    backend: str | None,
    rounds: int,
    seconds: float,
    remarks: list[str],
) -> Scenarios:
    """Each row is a facility of its own, with so many sockets registered, of which the first ones are ready.

    All facilities are open all the time. So where the system keeps one list of what anybody waits for, as Wine's server
    does, each row pays for that alike, and what two rows differ by is what the number of its own sockets costs a poll.
    """
    what = " and ".join(rows)
    with ExitStack() as stack:
        try:
            sockets = [*_sockets(stack, ready), *_sockets(stack, max(rows.values()) - ready, ready=False)]
        except OSError as error:
            remarks.append(f"{what}: left out, {error.strerror} (if it is the limit of open files: ulimit -n)")
            return
        samplers: dict[str, Sampler] = {}
        for who, make in line_up(backend).items():
            samples = []
            try:
                for registered in rows.values():
                    contestant = make()
                    stack.callback(contestant.close)
                    contestant.register(sockets[:registered])
                    batch = _batch_size(contestant, sockets[:ready])
                    polls = calibrate(partial(contestant.poll, timeout=timeout), seconds)
                    samples.append(partial(_poll, contestant, polls, timeout, batch))
            except (OSError, ValueError) as error:
                remarks.append(f"{what}: without {who}, {error}")
                continue
            samplers[who] = partial(_take_each, samples)
        if samplers:
            yield Scenario([Row(name, "ns an event") for name in rows], samplers, rounds)


def _batch_size(contestant: Muxio, sockets: Sources) -> int:
    """How many events a poll returns, after making sure that in as many polls as that takes all sockets come."""
    first = contestant.look(1.0)
    found = set(first)
    for _ in range(len(sockets) // len(first) if first else 0):
        found.update(contestant.look(1.0))
    if found != set(sockets):
        raise Failure(f"{contestant} found {len(found):,} of {len(sockets):,} sockets ready")
    return len(first)


def _take_each(samples: Sequence[Callable[[], float]]) -> list[float]:
    return [sample() for sample in samples]


def _poll(contestant: Muxio, polls: int, timeout: float | None, batch: int) -> float:
    start = perf_counter()
    seen = contestant.poll(polls, timeout)
    elapsed = perf_counter() - start
    if seen != polls * batch:
        raise Failure(f"{contestant} returned {seen:,} events in {polls:,} polls, not {batch:,} each")
    return elapsed / seen * 1e9


def _changing(polled: bool, backend: str | None, rounds: int, seconds: float) -> Scenarios:
    """Without polls in between, registrations stand alone. In a server the last poll's events may need correcting.

    One more socket, a silent one, stays registered: Windows' select() refuses to wait for nothing.
    """
    names = [CHANGES_IN_USE] if polled else ["register", "modify", "unregister", CHANGES]
    with ExitStack() as stack:
        sockets, silent = _sockets(stack, 100), _sockets(stack, 1, ready=False)
        samplers: dict[str, Sampler] = {}
        for name, make in line_up(backend).items():
            contestant = make()
            stack.callback(contestant.close)
            contestant.register(silent)
            change = partial(_change, contestant, sockets, polled)
            samplers[name] = partial(change, calibrate(change, seconds))
        yield Scenario([Row(name, "ns") for name in names], samplers, rounds)


def _change(contestant: Muxio, sockets: Sources, polled: bool, cycles: int) -> list[float]:
    steps = contestant.register, contestant.modify, contestant.unregister
    elapsed = [0.0, 0.0, 0.0]
    for _ in range(cycles):
        for place, step in enumerate(steps):
            start = perf_counter()
            step(sockets)
            elapsed[place] += perf_counter() - start
            if polled and len(set(contestant.look(0))) != (0 if place == 2 else len(sockets)):
                raise Failure(f"{contestant} missed or made up events after {step.__name__}")
    each = [seconds / cycles / len(sockets) * 1e9 for seconds in elapsed]
    return [sum(each)] if polled else [*each, sum(each)]


def _importing(rounds: int) -> Scenarios:
    """An import in a new interpreter, compiled before. What the bare one takes is subtracted."""
    contestants = {"muxio": "import muxio", "selectors": "import selectors", BARE_START: "pass"}
    with tempfile.TemporaryDirectory(prefix="muxio-bench-") as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        samplers: dict[str, Sampler] = {
            name: partial(_start, [sys.executable, "-c", code], environment) for name, code in contestants.items()
        }
        for sampler in samplers.values():
            sampler()
        unit = "µs" if sys.platform == "win32" else "µs of CPU"
        yield Scenario([Row(IMPORT, unit, baseline=BARE_START)], samplers, rounds)


def _start(command: list[str], environment: dict[str, str]) -> tuple[float]:
    start = _children_clock()
    subprocess.run(command, env=environment, check=True)
    return ((_children_clock() - start) * 1e6,)


def _children_clock() -> float:
    """CPU seconds of the children, which a busy machine does not stretch; on Windows the time of day."""
    if sys.platform == "win32":
        return perf_counter()
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _timing_out(backend: str | None, rounds: int, remarks: list[str]) -> Scenarios:
    rows = [Row(f"lateness after {timeout * 1e3:g} ms", "µs", compared=False) for timeout in TIMEOUTS]
    with ExitStack() as stack:
        sockets = _sockets(stack, 1, ready=False)
        samplers: dict[str, Sampler] = {}
        for name, make in line_up(backend, bare=False).items():
            contestant = make()
            stack.callback(contestant.close)
            contestant.register(sockets)
            samplers[name] = partial(_wait, contestant)
            samplers[name]()
        yield Scenario(rows, samplers, rounds)
        early = {name for row in rows for name, late in row.samples.items() if min(late) < 0}
        waits = sum(len(late) for row in rows for late in row.samples.values())
        remarks.append(
            f"timeouts: {waits:,} waits, " + (f"EARLY: {', '.join(sorted(early))}" if early else "none early")
        )


def _wait(contestant: Muxio) -> list[float]:
    late = []
    for timeout in TIMEOUTS:
        start = perf_counter()  # on Windows monotonic() is no finer than the timer's tick
        seen = contestant.poll(1, timeout)
        late.append((perf_counter() - start - timeout) * 1e6)
        if seen:
            raise Failure(f"{contestant} returned an event of a silent socket")
    return late
