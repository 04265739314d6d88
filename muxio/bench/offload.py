"""What ``muxio bench offload`` measures: light clients beside one that lets the server compute.

The server computes for 200 ms of CPU time at a time, without pause: in its loop, on threads, on processes. The light
clients send at a calm rate, and their latencies are counted from when a message was to be sent. All processes have all
cores: what a machine has too few of shows in the latencies.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from muxio.bench.computing import BURN, WAYS
from muxio.bench.load import PERCENTILES, Found, Load, put
from muxio.bench.measure import Bar, Failure, Results, Row, Scenario
from muxio.bench.processes import Cores, build, compiler, module

CONNECTIONS = 100
RATE = 100.0  #: messages a second of all light clients together: few, since threads that share a GIL take not many more
OPEN_FILES = 250

QUICK_ROUNDS, QUICK_DURATION = 3, 0.5

TITLE = f"{CONNECTIONS} light clients, one heavy request of {BURN * 1000:.0f} ms after another"

BARS = [Bar(f"{TITLE}: p99", "processes", None, "at most", 10.0)]


@dataclass(frozen=True)
class Settings:
    duration: float = 5.0  #: seconds that a sample measures
    rounds: int = 7
    quick: bool = False


def bench(settings: Settings) -> tuple[Results, Generator[Scenario, None, None]]:
    """What to measure, for `report.conduct`."""
    duration = QUICK_DURATION if settings.quick else settings.duration
    rounds = QUICK_ROUNDS if settings.quick else settings.rounds
    results = Results("offload", asdict(settings), "processes", [*BARS], OPEN_FILES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results.remarks.append(
        f"{RATE:,.0f} messages of 64 B a second; server, pool, generator and the heavy client share {cores} cores"
    )
    load = Load(CONNECTIONS, rate=RATE, duration=duration)
    metrics = [
        Row(
            f"{TITLE}: {name}",
            "ms",
            compared=name == "p99",
            table=f"{TITLE}: latency, ms, from when a message was to be sent",
            column=name,
        )
        for name in PERCENTILES
    ]
    requests = Row(f"{TITLE}: server CPU", "% of a core", compared=False)

    def sample(generator: Sequence[str], way: str) -> list[float]:
        serve = [*module("muxio.bench.computing"), "serve", way]
        try:
            found = put(load, serve, generator, Cores(None, None), [*module("muxio.bench.computing"), "ask"])
        except Failure as failure:
            raise Failure(f"{way}: {failure}") from None
        return [*((found.latency or {})[name] / 1e3 for name in PERCENTILES), _share(found)]

    def scenarios() -> Generator[Scenario, None, None]:
        with tempfile.TemporaryDirectory(prefix="muxio-bench-") as directory:
            found = compiler()
            generator = [build(found, "client.c", directory)] if found else module("muxio.bench.client")
            yield Scenario([*metrics, requests], {way: partial(sample, generator, way) for way in WAYS}, rounds)

    return results, scenarios()


def _share(found: Found) -> float:
    return (found.server_cpu or 0.0) / found.seconds * 100
