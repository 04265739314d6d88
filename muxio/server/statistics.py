"""What servers did, told to people and machines: in all, and in the second since the last look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from muxio.server.notices import Notice
from muxio.server.server import Stats


class WorkerStats(NamedTuple):
    """One server among those that serve together."""

    worker: str
    """Its name: the number of its place, from 1 on."""
    pid: int
    state: str
    """``serving``; ``retiring``, which is accepting no more; or ``ending``, which it did since it was asked."""
    stats: Stats


class Figures(NamedTuple):
    """What one of them is at, or all together: figures of now, rates since the last look, and sums since the start."""

    worker: str
    """``all`` in the line for all."""
    pid: int | None
    state: str
    seconds: float
    """The time that the rates are of."""
    connections: int
    accepts: float
    """A second, as all rates."""
    echoes: float
    bytes_in: float
    bytes_out: float
    buffered: int
    lag: float
    """Seconds."""
    timed_out: int
    errors: int
    """Connections that were refused, reset by the peer, or ended with another error."""


class Watch:
    """Makes figures of what servers have counted, look after look.

    began: when they began to count, by the clock that `look` is told the time of.
    """

    def __init__(self, began: float) -> None:
        self._time = began
        self._last: dict[tuple[str, int], Stats] = {}
        self._last_of_all = _NOTHING

    def look(self, now: float, workers: Sequence[WorkerStats], gone: Stats) -> list[Figures]:
        """One line a worker, and one for all.

        gone: what those counted that are no more; it is in the line for all.
        """
        passed = max(now - self._time, 1e-9)
        figures = [
            _figures(name, pid, state, stats, self._last.get((name, pid), _NOTHING), passed)
            for name, pid, state, stats in workers
        ]
        of_all = Stats.total([gone, *(worker.stats for worker in workers)])
        figures.append(_figures("all", None, "", of_all, self._last_of_all, passed))
        self._time = now
        self._last = {(name, pid): stats for name, pid, _, stats in workers}
        self._last_of_all = of_all
        return figures


_NOTHING = Stats.total([])


def _figures(worker: str, pid: int | None, state: str, stats: Stats, before: Stats, passed: float) -> Figures:
    return Figures(
        worker,
        pid,
        state,
        passed,
        stats.connections,
        (stats.accepted - before.accepted) / passed,
        (stats.received - before.received) / passed,
        (stats.bytes_in - before.bytes_in) / passed,
        (stats.bytes_out - before.bytes_out) / passed,
        stats.buffered,
        stats.lag,
        stats.timed_out,
        stats.refused + stats.reset + stats.failed,
    )


def statistics(figures: Sequence[Figures], since_the_start: bool = False) -> Notice:
    """All of it in one line, of all together; every worker's figures are among the fields."""
    everybody = figures[-1]
    workers = "" if len(figures) == 2 else f"{len(figures) - 1} workers, "
    line = (
        f"{workers}{everybody.connections:,} connected, {everybody.accepts:,.0f} accepts/s, "
        f"{everybody.echoes:,.0f} echoes/s, "
        f"{of_bytes(everybody.bytes_in)}/s in, {of_bytes(everybody.bytes_out)}/s out, "
        f"{of_bytes(everybody.buffered)} buffered, lag {everybody.lag * 1000:,.1f} ms, "
        f"{everybody.timed_out:,} timed out, {everybody.errors:,} errors"
    )
    if since_the_start:
        line += f"; rates since the start, {everybody.seconds:,.1f} s"
    return Notice(line, "statistics", **_fields(everybody), workers=[_fields(each) for each in figures[:-1]])


def of_bytes(number: float) -> str:
    """A number of bytes for people, in powers of 1,000: ``5.2 MB``."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while number >= 999.5 and unit != "TB":
        number, unit = number / 1000, next(units)
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.95 else f"{number:.1f} {unit}"


def _fields(figures: Figures) -> dict[str, Any]:
    return {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in figures._asdict().items()
        if value not in (None, "")
    }
