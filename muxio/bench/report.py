"""Conducting a benchmark, and telling what came out: tables for people, JSON for programs.

The JSON is one object, and this is schema 1. Later versions add to it, or raise the number:

- ``schema`` (1), ``bench`` (its name), ``complete`` (false: interrupted or failed), ``error`` (null, or which of these)
- ``machine``: ``muxio``, ``python``, ``system``, ``cpu`` (texts), ``cores``, ``load`` (of the last minute, before the
  run; null if unknown), ``open_files`` (the limit; null if there is none)
- ``settings``: what was asked for; ``warnings``: what may spoil the results; ``remarks``: what was left out, or found
- ``reference``: the contestant that the others are compared with
- ``rows``: a list of ``name``, ``unit``, ``baseline``, ``table`` and ``column`` (null, or which rows people see side
  by side) and ``results``, which is a list of ``contestant``, ``median``, ``min``, ``max``, ``samples`` (one a round;
  less the median of the contestant named by ``baseline``, unless that is null), and ``ratio`` to the reference (null
  where it makes no sense): the ``median`` of the ratios within each round, ``low`` and ``high`` (their quartiles), and
  ``rounds``
- ``bars``: a list of ``row``, ``numerator``, ``denominator`` (null: the numerator's own values are judged, and stand
  in the place of ratios), ``denominator_row`` (null, or the denominator's row, if it is another), ``relation``
  (``at most``, ``at least``), ``limit``, ``ratio`` (as above) and ``verdict`` (``met``, ``missed``, ``within noise``,
  ``not judged``)
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import muxio
from muxio.bench.measure import FEWEST_ROUNDS, Failure, Results, Scenario, measure

NEEDS_RICH = "muxio bench needs rich: python -m pip install 'muxio[bench]'"

COLOURS = {"met": "green", "missed": "red", "within noise": "yellow"}


def conduct(results: Results, scenarios: Generator[Scenario, None, None], file: str | None) -> int:
    """Measure and report: in tables, or as JSON if there is a file (or ``-``) to write it to.

    Returns the exit status: 0, 1 if a contestant failed, 2 if there is no way to report, 130 if interrupted. But for 2,
    what was measured until then is reported.
    """
    with contextlib.ExitStack() as stack:
        try:
            if file is None:
                import rich  # noqa: F401 - better now than after the run
            stream = sys.stdout if file in (None, "-") else stack.enter_context(open(str(file), "w", encoding="utf-8"))
        except ImportError:
            return _complain(NEEDS_RICH, 2)
        except OSError as error:
            return _complain(f"muxio bench: cannot write {file}: {error.strerror}", 2)
        facts = machine()
        warnings = spoilers(facts, results.open_files)
        for warning in warnings:
            _complain(f"muxio bench: {warning}", 0)
        status, troubles = 0, results.failures
        try:
            with interruptible(), contextlib.closing(scenarios), _progress(file is None) as progress:
                measure(scenarios, results, progress)
        except KeyboardInterrupt:
            status = 130
            troubles.append("interrupted")
        except (Failure, OSError, subprocess.CalledProcessError) as error:
            troubles.append(str(error))
        trouble = "; ".join(troubles) or None
        document = as_dict(results, facts, warnings, trouble)
        if file is None:
            _print_tables(document)
        else:
            json.dump(document, stream, indent=1)
            stream.write("\n")
        return _complain(f"muxio bench: {trouble}, the results are partial", status or 1) if trouble else 0


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt in the block, as Ctrl-C is, so that it ends what a benchmark has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(line: str, status: int) -> int:
    print(line, file=sys.stderr)
    return status


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "muxio": muxio.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "load": _load(),
        "open_files": open_files(),
    }


def spoilers(facts: dict[str, Any], open_files: int) -> list[str]:
    """What will spoil a run on this machine as it is now."""
    load, cores, allowed = facts["load"], facts["cores"], facts["open_files"]
    found = []
    if load is not None and load > cores / 2:
        found.append(f"the machine is busy (load {load:.1f}, {cores} cores): expect noise")
    if allowed is not None and allowed < open_files:
        found.append(f"{open_files:,} open files are needed, {allowed:,} are allowed (ulimit -n): expect gaps")
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _load() -> float | None:
    if sys.platform == "win32":
        return None
    return os.getloadavg()[0]


def open_files() -> int | None:
    """How many files a process may have open; None if there is no limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else limit


def as_dict(results: Results, facts: dict[str, Any], warnings: list[str], trouble: str | None) -> dict[str, Any]:
    """What the JSON says, and the tables show."""
    rows: list[dict[str, Any]] = []
    for row in results.rows.values():
        facts_of_row = {"name": row.name, "unit": row.unit, "baseline": row.baseline}
        rows.append({**facts_of_row, "table": row.table, "column": row.column, "results": []})
        for contestant in row.samples:
            median, low, high, _ = row.summary(contestant)
            ratio = row.ratio(contestant, results.reference) if row.compared else None
            figures = {"median": median, "min": low, "max": high, "ratio": ratio and ratio._asdict()}
            rows[-1]["results"].append({"contestant": contestant, **figures, "samples": row.values(contestant)})
    bars = []
    for bar in results.bars:
        ratio = results.ratio(bar)
        bars.append({**bar._asdict(), "ratio": ratio and ratio._asdict(), "verdict": bar.judge(ratio)})
    return {
        "schema": 1,
        "bench": results.bench,
        "complete": trouble is None,
        "error": trouble,
        "machine": facts,
        "settings": results.settings,
        "warnings": warnings,
        "remarks": results.remarks,
        "reference": results.reference,
        "rows": rows,
        "bars": bars,
    }


@contextlib.contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A line on a terminal. No thread refreshes it: that would take its share of what is measured."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda what, done, rounds: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("")
        yield lambda what, done, rounds: progress.update(
            task, description=what, completed=done, total=rounds, refresh=True
        )


def _print_tables(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    facts = document["machine"]
    load = "unknown" if facts["load"] is None else f"{facts['load']:.2f}"
    console.print(f"muxio {facts['muxio']}, {facts['python']}, {facts['system']}")
    console.print(f"{facts['cpu']}, {facts['cores']} cores, load before the run {load}")
    for title, group in groupby(document["rows"], key=lambda row: row["table"] or f"{row['name']}, {row['unit']}"):
        rows = list(group)
        columns, lines = _medians(rows) if rows[0]["table"] else _spread(rows[0], document["reference"])
        table = Table(box=None, pad_edge=False)
        table.add_column(min_width=20, no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", min_width=8)
        for name, line in lines.items():
            table.add_row(name, *line)
        console.print(f"\n{title}", style="bold")
        console.print(table)
    console.print()
    for remark in document["remarks"]:
        console.print(remark)
    if document["bars"]:
        console.print("\nNumbers to hold", style="bold")
    for bar in document["bars"]:
        found = "{} ({})".format(*_ratio(bar["ratio"])) if bar["ratio"] else "not measured"
        what = f"{bar['row']} / {bar['denominator_row']}" if bar["denominator_row"] else bar["row"]
        alone = bar["denominator"] in (None, bar["numerator"])
        contest = bar["numerator"] if alone else f"{bar['numerator']} / {bar['denominator']}"
        console.print(
            f"{bar['verdict']:13}{what}: {contest} {found}, {bar['relation']} {bar['limit']:,}",
            style=COLOURS.get(bar["verdict"]),
        )
    console.print(
        "Ratios are taken within each round; shown are their median and quartiles. Met: three rounds in four keep it.\n"
        f"Missed: three in four do not. With fewer than {FEWEST_ROUNDS} rounds nothing is judged. Garbage is collected "
        "before each sample,\nnot during it.",
        style="dim",
    )


def _spread(row: dict[str, Any], reference: str) -> tuple[list[str], dict[str, list[str]]]:
    """The columns and lines of a row's own table: medians, extremes and ratios."""
    columns = ["median", "min", "max"]
    if any(result["ratio"] for result in row["results"]):
        columns += [f"x {reference}", "quartiles"]
    lines = {
        result["contestant"]: [*(_figure(result[name]) for name in columns[:3]), *_ratio(result["ratio"])]
        for result in row["results"]
    }
    return columns, lines


def _medians(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """The columns and lines of a table that several rows share: medians."""
    lines: dict[str, list[str]] = {}
    for place, row in enumerate(rows):
        for result in row["results"]:
            line = lines.setdefault(result["contestant"], [""] * len(rows))
            line[place] = _figure(result["median"])
    return [row["column"] for row in rows], lines


def _figure(value: float) -> str:
    """With three digits at least."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(ratio: dict[str, Any] | None) -> tuple[str, ...]:
    if not ratio:
        return ()
    median, low, high = (f"{ratio[name]:,.2f}" for name in ("median", "low", "high"))
    return median, f"{low}-{high}"
