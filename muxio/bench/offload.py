"""What ``muxio bench offload`` measures: light clients beside one that lets the server compute.

The server computes for 200 ms of CPU time at a time, without pause: in its loop, on threads, on processes. Beside these
stands what the same clients see when nobody asks for that: so much is due to the machine and what else runs on it. The
light clients send at a calm rate, and their latencies are counted from when a message was to be sent. All processes
have all cores: what a machine has too few of shows in the latencies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from muxio.bench.computing import BURN, WAYS
from muxio.bench.load import PERCENTILES, Found, Load, put
from muxio.bench.measure import Bar, Failure, Results, Row, Scenario
from muxio.bench.processes import Cores, build, compiler, machine_time, module
from muxio.cores import core_count

CONNECTIONS = 100
RATE = 100.0  #: messages a second of all light clients together: few, since threads that share a GIL take not many more
OPEN_FILES = 250

NOBODY = "nobody computes"  #: the contestant without a heavy client

QUICK_ROUNDS, QUICK_DURATION = 3, 0.5

TITLE = f"{CONNECTIONS} light clients, one heavy request of {BURN * 1000:.0f} ms after another"

BARS = [Bar(f"{TITLE}: p99", "processes", None, "at most", 10.0)]


@dataclass(frozen=True)
class Settings:
    duration: float = 5.0  #: seconds that a sample measures
    rounds: int = 7
    quick: bool = False
    rate: float = RATE


def bench(settings: Settings) -> tuple[Results, Generator[Scenario, None, None]]:
    """What to measure, for `report.conduct`."""
    duration = QUICK_DURATION if settings.quick else settings.duration
    rounds = QUICK_ROUNDS if settings.quick else settings.rounds
    results = Results("offload", asdict(settings), "processes", [*BARS], OPEN_FILES)
    results.remarks.append(
        f"{settings.rate:,.0f} messages of 64 B a second; server, pool, generator and the heavy client share "
        f"{core_count()} cores"
    )
    load = Load(CONNECTIONS, rate=settings.rate, duration=duration)
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
    others = [
        Row(f"{TITLE}: CPU of the server's own process", "% of a core", compared=False),
        Row(f"{TITLE}: heavy requests", "answered a second", compared=False),
    ]
    if machine_time():
        others.append(Row(f"{TITLE}: machine busy", "% of all cores", compared=False))

    def sample(generator: Sequence[str], way: str) -> list[float]:
        serve = [*module("muxio.bench.computing"), "serve", "inline" if way == NOBODY else way]
        ask = [] if way == NOBODY else [*module("muxio.bench.computing"), "ask"]
        try:
            found = put(load, serve, generator, Cores(None, None), ask)
        except Failure as failure:
            raise Failure(f"{way}: {failure}") from None
        values = [*((found.latency or {})[name] / 1e3 for name in PERCENTILES), _share(found), _heavy(found)]
        return values if len(others) == 2 else [*values, (found.machine or 0.0) * 100]

    def scenarios() -> Generator[Scenario, None, None]:
        with tempfile.TemporaryDirectory(prefix="muxio-bench-") as directory:
            found = compiler()
            generator = [build(found, "client.c", directory)] if found else module("muxio.bench.client")
            yield Scenario(
                [*metrics, *others], {way: partial(sample, generator, way) for way in (NOBODY, *WAYS)}, rounds
            )

    return results, scenarios()


def _share(found: Found) -> float:
    return (found.server_cpu or 0.0) / found.seconds * 100


def _heavy(found: Found) -> float:
    """Heavy requests a second: there is one after another."""
    took = [float(seconds) for seconds in found.beside.split()]
    return len(took) / sum(took) if took else 0.0
