"""Measuring in turn: each contestant once a round, in an order that rotates; medians, and ratios within the rounds.

What disturbs the machine for a while disturbs neighbours in a round alike, so a ratio is taken within each round, and
the median of these is what counts. As in `timeit`, garbage is collected before a sample and not during it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Literal, NamedTuple

#: With fewer rounds than this nothing is said to be met or missed.
FEWEST_ROUNDS = 7

#: One turn of a contestant: a value for each row of its scenario.
Sampler = Callable[[], Sequence[float]]

Verdict = Literal["met", "missed", "within noise", "not judged"]


class Failure(Exception):
    """A contestant did not do what is measured, so its time means nothing."""


class Summary(NamedTuple):
    median: float
    low: float  #: the minimum; of ratios, the lower quartile
    high: float  #: the maximum; of ratios, the upper quartile
    rounds: int


@dataclass
class Row:
    """One thing that is measured, of all contestants."""

    name: str
    unit: str
    baseline: str | None = None  #: the contestant whose median is subtracted from what the others took
    compared: bool = True  #: whether ratios make sense
    table: str | None = None  #: the title of a table with one row a contestant, if its median is to stand there
    column: str | None = None  #: and above which column of that
    samples: dict[str, list[float]] = field(default_factory=dict)  #: contestant -> a value for each round

    def values(self, contestant: str) -> list[float]:
        values = self.samples.get(contestant, [])
        if self.baseline is None or self.baseline == contestant or self.baseline not in self.samples:
            return values
        excess = median(self.samples[self.baseline])
        return [value - excess for value in values]

    def summary(self, contestant: str) -> Summary:
        values = self.values(contestant)
        return Summary(median(values), min(values), max(values), len(values))

    def ratio(self, numerator: str, denominator: str | None, below: Row | None = None) -> Summary | None:
        """The median and the quartiles of the ratios within each round, or None if there are none.

        Without a denominator those of the values themselves. below: the denominator's row, if it is another one of the
        same scenario.
        """
        above = self.values(numerator)
        below_values = (below or self).values(denominator) if denominator else [1.0] * len(above)
        pairs = list(zip(above, below_values, strict=False))  # the last may be cut short
        if len(pairs) < 2 or min(under for _, under in pairs) <= 0:
            return None
        low, middle, high = quantiles([over / under for over, under in pairs], method="inclusive")
        return Summary(middle, low, high, len(pairs))


class Bar(NamedTuple):
    """What the ratio of two contestants, or of two rows, has to keep to, or what one contestant takes by itself."""

    row: str
    numerator: str
    denominator: str | None
    relation: Literal["at most", "at least"]
    limit: float
    denominator_row: str | None = None  #: the denominator's row, if it is another one of the same scenario

    def judge(self, ratio: Summary | None) -> Verdict:
        """Met if three rounds in four keep it, missed if three in four do not, else within noise."""
        if ratio is None or ratio.rounds < FEWEST_ROUNDS:
            return "not judged"
        best, worst = (ratio.low, ratio.high) if self.relation == "at most" else (-ratio.high, -ratio.low)
        limit = self.limit if self.relation == "at most" else -self.limit
        return "met" if worst <= limit else "missed" if best > limit else "within noise"


@dataclass
class Scenario:
    """What is measured together, and by whom."""

    rows: list[Row]
    contestants: dict[str, Sampler]
    rounds: int


@dataclass
class Results:
    bench: str
    settings: dict[str, Any]
    reference: str  #: the contestant that the others are compared with
    bars: list[Bar]
    open_files: int  #: how many are needed to measure everything
    rows: dict[str, Row] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)  #: what was left out and why, and what else was found
    failures: list[str] = field(default_factory=list)  #: which contestants failed, and how

    def ratio(self, bar: Bar) -> Summary | None:
        """What a bar is about, or None if it was not measured."""
        row, below = self.rows.get(bar.row), self.rows.get(bar.denominator_row or bar.row)
        return row.ratio(bar.numerator, bar.denominator, below) if row and below else None


def measure(scenarios: Iterable[Scenario], results: Results, progress: Callable[[str, int, int], None]) -> None:
    """Run the scenarios one after the other, and fill in the results while they come.

    A contestant that fails is out of its scenario, with all that was measured of it there; the others go on.
    """
    for scenario in scenarios:
        results.rows.update((row.name, row) for row in scenario.rows)
        names = list(scenario.contestants)
        for done in range(scenario.rounds):
            progress(scenario.rows[-1].name, done, scenario.rounds)
            first = done % len(names)
            for name in names[first:] + names[:first]:
                if name not in scenario.contestants:
                    continue
                try:
                    values = _take(scenario.contestants[name])
                except Failure as failure:
                    results.failures.append(str(failure))
                    del scenario.contestants[name]
                    for row in scenario.rows:
                        row.samples.pop(name, None)
                    continue
                for row, value in zip(scenario.rows, values, strict=True):
                    row.samples.setdefault(name, []).append(value)


def _take(sampler: Sampler) -> Sequence[float]:
    gc.collect()
    gc.disable()
    try:
        return sampler()
    finally:
        gc.enable()


def calibrate(run: Callable[[int], object], seconds: float) -> int:
    """How many times to run something for it to take so long; this warms it up, too."""
    count = 1
    while min(_clock(run, count) for _ in range(3)) < seconds:
        count *= 2
    return count


def _clock(run: Callable[[int], object], count: int) -> float:
    start = perf_counter()
    run(count)
    return perf_counter() - start
