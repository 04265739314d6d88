"""What ``muxio bench echo`` measures: echo servers under load.

Each sample has a new server in a process of its own, on a core of its own where that can be had, and a load generator
on another (see `muxio.bench.load`). What counts is the server's CPU time an echo, user and system, which the kernel
tells to the nanosecond; throughput depends on the generator as well.

The contestants are muxio's `Server` and `ThreadedServer` as ``python -m muxio serve`` runs them, an echo server in C as
the limit of what the machine can do, and what `muxio.bench.servers` has.
"""

from __future__ import annotations

import importlib.util
import select
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import muxio
from muxio.bench.load import PERCENTILES, Found, Load, put
from muxio.bench.measure import Bar, Failure, Results, Row, Sampler, Scenario
from muxio.bench.processes import (
    Cores,
    build,
    can_tell_memory,
    compiler,
    cores,
    cpu_clock,
    machine_time,
    module,
)
from muxio.bench.report import open_files
from muxio.cores import core_count

CONTESTANTS = ("muxio", "c", "epoll", "selectors", "asyncio", "uvloop", "gevent", "threads")
PEERS = ("muxio", "asyncio", "uvloop")  #: who takes part by default in what is not the plain load

LOADS = ((64, 100), (64, 1000), (16_384, 100))  #: size in bytes, connections
CALM_RATE = 5000.0  #: messages a second beside hostile peers: far from what keeps a server busy

QUICK_ROUNDS = 3
QUICK_DURATION, QUICK_WARMUP = 0.2, 0.1  # seconds
SIEGE_WARMUP = 1.0  #: seconds until hostile peers have filled the buffers that they fill
SPARE_FILES = 100  # open files beside the connections

IDLE, CROWD = 9_000, 19_000  #: idle connections

MANY_WORKERS = 2  #: what is compared with one
WORKERS_GAIN = 1.7  #: times as many echoes as of one

SATURATED = 90.0  #: percent of its core: who is less busy than that is not what held the echoes up
REACHED = 99.0  #: percent of the rate asked for: who answers less is too slow for it

BARS = [
    Bar("64 B x 100: server CPU", "muxio", "uvloop", "at most", 1.10),
    Bar("64 B x 100: server CPU", "muxio", "c", "at most", 1.35),
    Bar("64 B x 100: server CPU", "muxio", "asyncio", "at most", 0.9),
    Bar("64 B x 1,000: server CPU", "muxio", "uvloop", "at most", 1.10),
    Bar("64 B x 1,000: server CPU", "muxio", "asyncio", "at most", 0.75),
    Bar("16 KiB x 100: server CPU", "muxio", "uvloop", "at most", 1.05),
    Bar("16 KiB x 100: server CPU", "muxio", "c", "at most", 1.3),
    Bar("9,000 idle: private memory", "muxio", None, "at most", 750),
    Bar("100 busy, 19,000 idle: throughput", "muxio, idle beside", "muxio", "at least", 0.9),
    Bar("1,000 at once: last first echo", "muxio", None, "at most", 500),
    Bar("64 B x 100, workers: throughput", f"{MANY_WORKERS} workers", "1 worker", "at least", WORKERS_GAIN),
    Bar("100 honest, 1,500 hostile: longest wait", "muxio, hostile beside", None, "at most", 1000),
]

Scenarios = Generator[Scenario, None, None]
Findings = dict[str, list[Found]]  # a line of the report -> what was found, one a round


@dataclass(frozen=True)
class Settings:
    """What is asked for. None: what each scenario has by default."""

    scenarios: Sequence[str] = ("load",)
    only: Sequence[str] | None = None  #: contestants
    connections: int | None = None  #: busy ones
    size: int | None = None  #: of a message, bytes
    rate: float | None = None  #: messages a second of all together (open loop); None: a closed loop
    duration: float = 1.0  #: seconds that a sample measures
    rounds: int = 7
    idle: int | None = None  #: silent connections
    hostile: int = 500  #: peers of each kind
    backend: str | None = None
    quick: bool = False

    def load(self, connections: int, size: int = 64, **others: Any) -> Load:
        """A load with so many connections and such messages, unless something else was asked for."""
        asked = Load(self.connections or connections, self.size or size, self.rate or 0.0, duration=self.duration)
        if self.quick:
            others["warmup"] = QUICK_WARMUP
        return replace(asked, **others)


#: One thing that is measured, and how it follows from what was found.
Metric = tuple[Row, Callable[[Found], float]]


@dataclass
class Arena:
    """Who takes part, how a load is put on them, and what comes out."""

    settings: Settings
    results: Results
    commands: Mapping[str, Sequence[str]]
    generator: Sequence[str]
    cores: Cores

    def scenario(
        self, title: str, metrics: Sequence[Metric], loads: Mapping[str, tuple[str, Load]]
    ) -> tuple[Scenario, Findings]:
        """A scenario, and where to read what is found in it; its bars are noted.

        loads: for each line of the report whose server it is about, and the load to put on that.
        """
        rows = [row for row, _ in metrics]
        if self.settings.backend in (None, muxio.backends()[0]):
            names = {row.name for row in rows}
            self.results.bars += [
                bar for bar in BARS if bar.row in names and {bar.numerator, bar.denominator} <= {*loads, None}
            ]
        findings: Findings = {}

        def sample(line: str) -> list[float]:
            who, load = loads[line]
            try:
                found = put(load, self.commands[who], self.generator, self.cores)
                if load.duration and not found.echoes:
                    raise Failure("not one echo in the time measured")
            except Failure as failure:
                raise Failure(f"{title}: {line}: {failure}") from None
            findings.setdefault(line, []).append(found)
            return [value(found) for _, value in metrics]

        samplers: dict[str, Sampler] = {line: partial(sample, line) for line in loads}
        return Scenario(rows, samplers, self.settings.rounds), findings

    def remark(self, text: str) -> None:
        self.results.remarks.append(text)


def bench(settings: Settings) -> tuple[Results, Scenarios]:
    """What to measure, for `report.conduct`.

    ValueError or OSError: there is no such scenario, contestant or backend, or not here.
    """
    _check("scenario", settings.scenarios, (*SCENARIOS, "all"))
    _check("contestant", settings.only or (), CONTESTANTS)
    if settings.backend:
        muxio.Poller(settings.backend).close()
    if settings.quick:
        settings = replace(settings, rounds=QUICK_ROUNDS, duration=QUICK_DURATION)
    chosen = {name: kind for name, kind in SCENARIOS.items() if {name, "all"} & {*settings.scenarios}}
    wanted = settings.only or (CONTESTANTS if "load" in chosen else PEERS)
    missing = {name: reason for name in wanted if (reason := _why_not(name))}
    told = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
    if len(missing) == len(wanted):
        raise ValueError(f"nothing to measure without {told}")
    needs = {name: kind.connections(settings) + SPARE_FILES for name, kind in chosen.items()}
    results = Results("echo", asdict(settings), "muxio", [], max(needs.values()))
    if missing:
        results.remarks.append(f"without {told}")

    def scenarios() -> Scenarios:
        with tempfile.TemporaryDirectory(prefix="muxio-bench-") as directory:
            arena = _arena([name for name in wanted if name not in missing], directory, settings, results)
            for name, kind in chosen.items():
                allowed = open_files()
                if allowed is not None and allowed < needs[name]:
                    arena.remark(f"{name}: left out, it takes {needs[name]:,} open files (ulimit -n)")
                else:
                    names = arena.commands if settings.only or name == "load" else PEERS
                    yield from kind.measure(arena, [name for name in names if name in arena.commands])

    return results, scenarios()


def _check(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}: there are {', '.join(known)}")


def _why_not(name: str) -> str | None:
    """What a contestant misses here."""
    if name == "c" and compiler() is None:
        return "no C compiler, or no epoll"
    if name == "epoll" and not hasattr(select, "epoll"):
        return "not on this system"
    if name in ("uvloop", "gevent") and importlib.util.find_spec(name) is None:
        return "not installed"
    return None


def _arena(names: Sequence[str], directory: str, settings: Settings, results: Results) -> Arena:
    """Make ready what is needed, and tell of it. Failure: the C compiler does not compile."""
    found = compiler()
    generator = [build(found, "client.c", directory)] if found else module("muxio.bench.client")
    serve = [*module("muxio"), "serve", "127.0.0.1:0", "-q"]
    commands = {name: [*module("muxio.bench.servers"), name] for name in names}
    if "c" in commands and found:
        commands["c"] = [build(found, "server.c", directory)]
    if "muxio" in commands:
        commands["muxio"] = [*serve, "--backend", settings.backend] if settings.backend else serve
    if "threads" in commands:
        commands["threads"] = [*serve, "--threads"]
    arena = Arena(settings, results, commands, generator, cores())
    where = "each on a core of its own" if arena.cores.server is not None else "on whatever core they get"
    slow = "" if found else " (no C compiler: it is slower than some servers, which it keeps from their best)"
    arena.remark(
        f"load generator in {'C' if found else 'Python'}{slow}; it and the server {where}; new processes a sample"
    )
    return arena


# The scenarios


def _loading(arena: Arena, names: Sequence[str]) -> Scenarios:
    settings = arena.settings
    for size, connections in LOADS if settings.size is settings.connections is None else LOADS[:1]:
        load = settings.load(connections, size)
        title = f"{_bytes(load.size)} x {load.busy:,}" + (f", open loop {load.rate:,.0f}/s" if load.rate else "")
        metrics = [*_speed(title), *_latencies(title, load), *_shares(title)]
        scenario, findings = arena.scenario(title, metrics, _everybody(names, load))
        try:
            yield scenario
        finally:
            _withhold_throughput(arena, title, findings)
            _tell_who_was_slow(arena, title, load, findings)


def _speed(title: str) -> list[Metric]:
    metrics: list[Metric] = [(Row(f"{title}: throughput", "echoes/s"), _throughput)]
    if cpu_clock():
        metrics.insert(0, (Row(f"{title}: server CPU", "µs an echo"), _cpu_an_echo))
    return metrics


def _cpu_an_echo(found: Found) -> float:
    return (found.server_cpu or 0.0) / found.echoes * 1e6


def _throughput(found: Found) -> float:
    return found.echoes / found.seconds


def _latencies(title: str, load: Load) -> list[Metric]:
    def latency(name: str, found: Found) -> float:
        return (found.latency or {})[name]

    def lateness(found: Found) -> float:
        return found.lateness["p99"] if found.lateness else 0.0

    table = f"{title}: latency, µs" + (", from when a message was to be sent" if load.rate else "")
    metrics: list[Metric] = [
        (Row(f"{title}: latency {name}", "µs", compared=False, table=table, column=name), partial(latency, name))
        for name in PERCENTILES
    ]
    if load.rate:
        late = Row(f"{title}: sent late, p99", "µs", compared=False, table=table, column="sent late p99")
        metrics.append((late, lateness))
    return metrics


def _shares(title: str) -> list[Metric]:
    """How fair a server was, and who had reached the limit of a core."""
    shares: dict[str, Callable[[Found], float]] = {
        "slowest connection / mean": lambda found: found.slowest * found.connections / found.echoes * 100,
        "generator of a core": _own_share,
    }
    if cpu_clock():
        shares["server of a core"] = _server_share
    table = f"{title}: shares, %"
    return [
        (Row(f"{title}: {name}", "%", compared=False, table=table, column=name), value)
        for name, value in shares.items()
    ]


def _server_share(found: Found) -> float:
    return (found.server_cpu or 0.0) / found.seconds * 100


def _own_share(found: Found) -> float:
    return found.own_cpu / found.seconds * 100


def _withhold_throughput(arena: Arena, title: str, findings: Findings) -> None:
    """A server that leaves some connections without any echo is not fast."""
    for name, found in findings.items():
        if starved := max(each.starved for each in found):
            arena.results.rows[f"{title}: throughput"].samples.pop(name, None)
            arena.remark(f"{title}: no throughput of {name}, {starved:,} connections had no echo in a whole round")


def _tell_who_was_slow(arena: Arena, title: str, load: Load, findings: Findings) -> None:
    idlers = []
    for name, found in findings.items():
        if load.rate:
            reached = median(map(_throughput, found)) / load.rate * 100
            if reached < REACHED:
                arena.remark(f"{title}: {name} had only {reached:.0f} % of the messages echoed in time")
        elif cpu_clock() and (share := median(map(_server_share, found))) < SATURATED:
            idlers.append(f"{name} {share:.0f} %")
    if idlers:
        arena.remark(f"{title}: not held up by themselves, but by the generator or the machine: {', '.join(idlers)}")


def _memory(arena: Arena, names: Sequence[str]) -> Scenarios:
    """What an idle connection takes. Each had an echo of a kilobyte before."""
    if not can_tell_memory():
        arena.remark("memory: left out, this system does not tell it (/proc/PID/smaps_rollup)")
        return
    idle = arena.settings.idle or IDLE
    load = arena.settings.load(0, busy=0, idle=idle, duration=0.0)

    def each(found: Found) -> float:
        return _grown(found) / idle

    title = f"{idle:,} idle"
    metrics = [(Row(f"{title}: private memory", "B a connection"), each)]
    yield arena.scenario(title, metrics, _everybody(names, load))[0]


def _grown(found: Found) -> int:
    """By how many bytes the server has grown."""
    return (found.memory or 0) - (found.memory_before or 0)


def _everybody(names: Sequence[str], load: Load) -> dict[str, tuple[str, Load]]:
    return {name: (name, load) for name in names}


def _beside(names: Sequence[str], alone: Load, what: str, crowd: Load) -> dict[str, tuple[str, Load]]:
    """Everybody twice: alone, and with something beside."""
    return {
        line: entry for name in names for line, entry in ((name, (name, alone)), (f"{name}, {what}", (name, crowd)))
    }


def _crowd(arena: Arena, names: Sequence[str]) -> Scenarios:
    """Busy connections, alone and beside many that are silent."""
    idle = arena.settings.idle or CROWD
    alone = arena.settings.load(100)
    title = f"{alone.busy:,} busy, {idle:,} idle"
    metrics = [*_speed(title), *_latencies(title, alone)]
    scenario, findings = arena.scenario(title, metrics, _beside(names, alone, "idle beside", replace(alone, idle=idle)))
    try:
        yield scenario
    finally:
        _withhold_throughput(arena, title, findings)
        _tell_who_was_slow(arena, title, alone, findings)


def _storm(arena: Arena, names: Sequence[str]) -> Scenarios:
    """Clients that connect all at once."""
    load = arena.settings.load(1000, duration=0.0)
    load = replace(load, window=load.busy)

    def setup(found: Found) -> float:
        return found.setup * 1e3

    title = f"{load.busy:,} at once"
    yield arena.scenario(title, [(Row(f"{title}: last first echo", "ms"), setup)], _everybody(names, load))[0]


def _hostile(arena: Arena, names: Sequence[str]) -> Scenarios:
    """Honest connections at a calm rate, alone and beside peers that drip, never read, and reset."""
    each = arena.settings.hostile
    alone = arena.settings.load(100, rate=arena.settings.rate or CALM_RATE, warmup=SIEGE_WARMUP)
    title = f"{alone.busy:,} honest, {3 * each:,} hostile"

    def longest(found: Found) -> float:
        return (found.latency or {})["max"] / 1e3

    metrics: list[Metric] = [
        (Row(f"{title}: p99", "µs"), lambda found: (found.latency or {})["p99"]),
        (Row(f"{title}: longest wait", "ms", compared=False), longest),
        *_latencies(title, alone),
    ]
    if can_tell_memory():
        grown = Row(f"{title}: the server's memory has grown by", "KiB", compared=False)
        metrics.append((grown, lambda found: _grown(found) / 1024))
    crowd = replace(alone, drip=each, deaf=each, reset=each)
    scenario, findings = arena.scenario(title, metrics, _beside(names, alone, "hostile beside", crowd))
    try:
        yield scenario
    finally:
        _tell_who_was_slow(arena, title, alone, findings)
        for name, found in findings.items():
            if cuts := sum(one.cuts for one in found):
                arena.remark(f"{title}: {name} ended {cuts:,} hostile connections")


def _workers(arena: Arena, names: Sequence[str]) -> Scenarios:
    """muxio's server in one process, and by workers, under the same load.

    Nothing is pinned: all workers and the generator have all cores, and share them with whatever else runs. So beside
    the echoes stands how much of the machine both took, and how busy it was in all: that says whether more workers
    could have had more.
    """
    if "muxio" not in arena.commands:
        arena.remark("workers: left out, they are muxio's")
        return
    several = f"{MANY_WORKERS} workers"
    lines = {"alone": "", "1 worker": "1", several: str(MANY_WORKERS)}
    commands = {
        line: [*arena.commands["muxio"], *(["--workers", count] if count else [])] for line, count in lines.items()
    }
    arena = replace(arena, commands=commands, cores=Cores(None, None))
    load = arena.settings.load(100)
    title = f"{_bytes(load.size)} x {load.busy:,}, workers"
    metrics = [*_speed(title), *_latencies(title, load), *_shares(title)]
    if cpu_clock():
        column = "both of the machine"
        row = Row(f"{title}: {column}", "%", compared=False, table=f"{title}: shares, %", column=column)
        metrics.append((row, lambda found: _both_shares(found) / core_count()))
    if machine_time():
        column = "machine busy"
        row = Row(f"{title}: {column}", "%", compared=False, table=f"{title}: shares, %", column=column)
        metrics.append((row, lambda found: (found.machine or 0.0) * 100))
    scenario, findings = arena.scenario(title, metrics, _everybody(list(lines), load))
    try:
        yield scenario
    finally:
        _withhold_throughput(arena, title, findings)
        if cpu_clock() and {"1 worker", several} <= {*findings}:
            _tell_what_was_full(arena, title, findings["1 worker"], several, findings[several])


def _both_shares(found: Found) -> float:
    return _server_share(found) + _own_share(found)


def _tell_what_was_full(arena: Arena, title: str, one: Sequence[Found], name: str, several: Sequence[Found]) -> None:
    there = core_count() * 100

    def shares(line: str, founds: Sequence[Found]) -> str:
        server, generator = (median(share(found) for found in founds) for share in (_server_share, _own_share))
        told = f"{line}: {server:.0f} %, and the generator {generator:.0f} %"
        busy = [found.machine for found in founds if found.machine is not None]
        if busy:
            others = max(0.0, median(busy) * there - server - generator)
            told += f", others and the kernel for the network {others:.0f} %"
        return told

    line = f"{title}: here nothing is pinned; of {there} % there were taken by {shares('1 worker', one)}; by "
    line += shares(name, several)
    needed = WORKERS_GAIN * median(map(_both_shares, one))
    if needed > there:
        line += f"; {WORKERS_GAIN} x the echoes of one worker, at its CPU an echo, would take {needed:.0f} %"
    arena.remark(line)


@dataclass(frozen=True)
class Kind:
    """A scenario by its name."""

    measure: Callable[[Arena, Sequence[str]], Scenarios]
    connections: Callable[[Settings], int]  #: the most that are open at a time


SCENARIOS = {
    "load": Kind(_loading, lambda settings: settings.connections or max(connections for _, connections in LOADS)),
    "memory": Kind(_memory, lambda settings: settings.idle or IDLE),
    "crowd": Kind(_crowd, lambda settings: (settings.connections or 100) + (settings.idle or CROWD)),
    "storm": Kind(_storm, lambda settings: settings.connections or 1000),
    "workers": Kind(_workers, lambda settings: settings.connections or 100),
    "hostile": Kind(_hostile, lambda settings: (settings.connections or 100) + 3 * settings.hostile),
}


def _bytes(number: int) -> str:
    return f"{number // 1024:,} KiB" if number >= 1024 and number % 1024 == 0 else f"{number:,} B"
