"""What a server tells: figures for people, and lines."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from typing import Any, cast

import pytest
from programs import run

from muxio.server.notices import LogFormat, Notice, writer
from muxio.server.server import Stats
from muxio.server.statistics import Watch, WorkerStats, of_bytes, statistics

NOTHING = Stats.total([])


def worker(name: str, pid: int = 1, **counts: Any) -> WorkerStats:
    return WorkerStats(name, pid, "serving", NOTHING._replace(**counts))


def test_rates_are_those_since_the_last_look() -> None:
    watch = Watch(began=100.0)
    one, everybody = watch.look(102.0, [worker("1", accepted=4, received=10, bytes_in=200, bytes_out=100)], NOTHING)
    assert (one.accepts, one.echoes, one.bytes_in, one.bytes_out) == (2.0, 5.0, 100.0, 50.0)
    one, everybody = watch.look(102.5, [worker("1", accepted=4, received=20, bytes_in=200, bytes_out=100)], NOTHING)
    assert (one.accepts, one.echoes, one.bytes_in, everybody.echoes) == (0.0, 20.0, 0.0, 20.0)


def test_all_together_are_the_sums_and_the_worst_lag() -> None:
    one = worker("1", 7, connections=3, buffered=10, lag=0.5, reset=1)
    other = worker("2", 8, connections=4, lag=0.1, failed=2)
    gone = NOTHING._replace(timed_out=5, refused=1, accepted=99)
    *_, everybody = Watch(0.0).look(1.0, [one, other], gone)
    assert (everybody.worker, everybody.pid, everybody.connections, everybody.buffered) == ("all", None, 7, 10)
    assert (everybody.lag, everybody.timed_out, everybody.errors) == (0.5, 5, 4)


def test_a_successor_begins_at_nothing_and_not_at_what_its_predecessor_had() -> None:
    watch = Watch(0.0)
    before = worker("1", 7, received=1000)
    watch.look(1.0, [before], NOTHING)
    one, everybody = watch.look(2.0, [worker("1", 8, received=10)], before.stats)
    assert (one.echoes, everybody.echoes) == (10.0, 10.0)


def test_what_a_worker_did_before_it_ended_counts_for_all() -> None:
    watch = Watch(0.0)
    before = worker("1", 7, received=1000, bytes_out=10)
    watch.look(1.0, [before], NOTHING)
    gone = before.stats._replace(received=1500, bytes_out=30)
    one, everybody = watch.look(3.0, [worker("1", 8, received=10)], gone)
    assert (one.echoes, everybody.echoes, everybody.bytes_out, everybody.seconds) == (5.0, 255.0, 10.0, 2.0)
    *_, everybody = watch.look(4.0, [worker("1", 8, received=10)], gone)
    assert everybody.echoes == 0.0


def test_without_workers_there_is_a_line_for_all() -> None:
    (everybody,) = Watch(0.0).look(1.0, [], NOTHING)
    assert (everybody.worker, everybody.connections, everybody.lag) == ("all", 0, 0.0)
    assert statistics([everybody]).startswith("0 workers, 0 connected")


def test_totals_of_stats_are_sums_and_the_worst_lag() -> None:
    total = Stats.total([NOTHING._replace(connections=1, lag=0.25), NOTHING._replace(connections=2, lag=0.5)])
    assert total == NOTHING._replace(connections=3, lag=0.5)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (5_240_000, "5.2 MB"),
        (7e9, "7.0 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_for_people(number: float, text: str) -> None:
    assert of_bytes(number) == text


def test_an_exception_that_is_logged_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from muxio.server.notices import log_as_json

    handler = log_as_json()
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logging.getLogger("muxio.server").exception("it failed: %s", "badly")
    finally:
        logging.getLogger("muxio").removeHandler(handler)
    found = json.loads(capsys.readouterr().err)
    assert (found["message"], found["level"]) == ("it failed: badly", "error")
    assert "ZeroDivisionError" in found["exception"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_is_one_write_even_if_python_does_not_buffer(
    log_format: LogFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers write to one pipe, and no line may stand in the middle of another; python -u is usual in containers."""
    writes: list[bytes] = []

    class Pipe(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            writes.append(bytes(data))
            return len(data)

    with io.TextIOWrapper(cast(Any, Pipe()), write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        writer(log_format)(Notice("a line", "connection", worker="1"))
    assert len(writes) == 1
    assert writes[0].endswith(b"\n")


needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")


@needs_rich
def test_the_table_fits_a_narrow_terminal() -> None:
    from rich.console import Console

    from muxio.server.live import table

    figures = Watch(0.0).look(1.0, [worker("1", 12345, received=123_456, bytes_in=10**8), worker("2")], NOTHING)
    for width, names in ((80, False), (130, True)):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(table("title", figures, width))
            lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert "123,456" in "".join(lines)
        assert "…" not in "".join(lines)
        assert ("buffered" in "".join(lines)) == names


def test_help_names_the_exit_statuses() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for option in ("--workers N", "--worker-threads", "--live", "--log-format", "--retire", "fd:N", "unix:PATH"):
        assert option in text
    assert "exit status: 0 all clients came to their end 1 the workers did not start 2 bad input 3 some clients" in text
