"""The live view: a table on a terminal, drawn anew each second; elsewhere a line a second."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING
from typing import Protocol as Interface

from muxio.server.notices import Notice, Say
from muxio.server.statistics import Figures, of_bytes, statistics

if TYPE_CHECKING:
    from rich.table import Table

#: Seconds from one look to the next.
INTERVAL = 1.0


class View(Interface):
    """Shows figures, one set after the other."""

    def show(self, figures: Sequence[Figures]) -> None: ...

    def close(self) -> None: ...


def open_view(title: str, say: Say, wants_lines: bool) -> View:
    """A table on a terminal, and lines where there is none, or if they are wanted."""
    if wants_lines or not sys.stdout.isatty():
        return _Lines(say)
    try:
        return _Terminal(title)
    except ImportError:
        say(Notice("for a table instead of lines: python -m pip install 'muxio[live]'", "hint"))
        return _Lines(say)


class _Lines:
    def __init__(self, say: Say) -> None:
        self._say = say

    def show(self, figures: Sequence[Figures]) -> None:
        self._say(statistics(figures))

    def close(self) -> None:
        pass


class _Terminal:
    """What is printed meanwhile stands above the table, and the last one stays."""

    def __init__(self, title: str) -> None:
        from rich.live import Live

        self._title = title
        self._live = Live(auto_refresh=False)  # by the loop: no thread of its own
        self._live.start()

    def show(self, figures: Sequence[Figures]) -> None:
        self._live.update(table(self._title, figures, self._live.console.width), refresh=True)

    def close(self) -> None:
        self._live.stop()


def table(title: str, figures: Sequence[Figures], width: int) -> Table:
    """The table of rich: a row a worker, and one for all if they are several. A narrow one has fewer columns."""
    from rich.table import Table

    *workers, everybody = figures
    wide = width >= _WIDE
    shown = [name not in _FOR_WIDE or wide for name in _COLUMNS]
    found = Table(title=title, title_justify="left", show_footer=len(workers) != 1, padding=(0, 1) if wide else (0, 0))
    for name, footer in compress(zip(_COLUMNS, _cells(everybody), strict=True), shown):
        found.add_column(name, footer, justify="left" if name in _WORDS else "right", no_wrap=True)
    for each in workers:
        found.add_row(*compress(_cells(each), shown), style=None if each.state == "serving" else "dim")
    return found


#: What is left out on terminals of fewer columns than all of it takes; the rest fits into 80.
_FOR_WIDE = ("pid", "state", "buffered")
_WIDE = 130

_WORDS = ("worker", "state")
_COLUMNS = (
    *("worker", "pid", "state", "connections", "accepts/s", "echoes/s", "in/s", "out/s"),
    *("buffered", "lag", "time-outs", "errors"),
)


def _cells(figures: Figures) -> list[str]:
    return [
        figures.worker,
        "" if figures.pid is None else str(figures.pid),
        figures.state,
        f"{figures.connections:,}",
        f"{figures.accepts:,.0f}",
        f"{figures.echoes:,.0f}",
        of_bytes(figures.bytes_in),
        of_bytes(figures.bytes_out),
        of_bytes(figures.buffered),
        f"{figures.lag * 1000:,.1f} ms",
        f"{figures.timed_out:,}",
        f"{figures.errors:,}",
    ]
