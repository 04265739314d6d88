"""`muxio bench`: that it measures what it says, and tells it. No speed is asserted."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import muxio
from muxio.bench import poller
from muxio.bench.measure import Bar, Failure, Results, Row, Scenario, Summary, measure

TIMEOUT = 100.0  # seconds after which a test that waits has failed

QUICK = ["bench", "poller", "--quick"]


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command, after a line of Python."""
    program = f"import sys\n{before}\nfrom muxio.cli import main\nsys.exit(main({list(arguments)!r}))"
    command = [sys.executable, "-W", "error", "-c", program]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT, check=False
    )


def only_warnings(stderr: str) -> bool:
    """Whether there is nothing but what depends on the machine: a load, or a limit of open files."""
    return all(line.startswith("muxio bench: ") and ": expect " in line for line in stderr.splitlines())


# The run


def test_a_quick_run_measures_every_row_of_every_contestant() -> None:
    result = run(*QUICK, "--json", "-", before="sys.modules['rich'] = None")
    assert (result.returncode, only_warnings(result.stderr)) == (0, True), result.stderr
    document = json.loads(result.stdout)
    assert (document["schema"], document["bench"], document["complete"], document["error"]) == (1, "poller", True, None)
    assert document["settings"] == {"rounds": 3, "quick": True, "backend": None}
    assert document["machine"]["muxio"] == muxio.__version__

    everyone = {f"muxio {name}" for name in muxio.backends()} | {"muxio.Selector", "selectors"}
    bare = set(poller.line_up(None)) - everyone
    assert bare >= {f"bare {name}" for name in {"epoll", "kqueue"} & set(muxio.backends())}
    rows = {row["name"]: row for row in document["rows"]}
    left_out = {remark.split(":")[0] for remark in document["remarks"]}
    polls = {name for _, _, rows in poller.POLLS for name in rows}
    for name in polls | {"register", "modify", "unregister", poller.CHANGES}:
        if not any(name in remark for remark in left_out):
            assert {entry["contestant"] for entry in rows[name]["results"]} == everyone | bare
    for timeout in ("0.1", "2.1", "10"):
        assert {entry["contestant"] for entry in rows[f"lateness after {timeout} ms"]["results"]} == everyone
    assert len(rows[poller.IMPORT]["results"]) == 3
    assert any(remark.startswith("timeouts: ") for remark in document["remarks"])

    for row in rows.values():
        for entry in row["results"]:
            samples = entry["samples"]
            assert len(samples) == 3
            assert entry["median"] == pytest.approx(statistics.median(samples))
            assert (entry["min"], entry["max"]) == (min(samples), max(samples))
            assert entry["min"] > 0 or row["name"] == poller.IMPORT or row["unit"] == "µs"
    assert {bar["verdict"] for bar in document["bars"]} == {"not judged"}
    scaling = {bar["numerator"] for bar in document["bars"] if bar["row"] == poller.MANY and bar["ratio"]}
    assert scaling == {f"muxio {name}" for name in {"epoll", "kqueue", "afd"} & set(muxio.backends())}


def test_tables_tell_the_machine_the_rows_and_the_numbers_to_hold() -> None:
    pytest.importorskip("rich")
    result = run(*QUICK, "--backend", "select")
    assert (result.returncode, only_warnings(result.stderr)) == (0, True), result.stderr
    for text in (muxio.__version__, "poll, 100 ready, ns an event", "muxio select", "x selectors", "Numbers to hold"):
        assert text in result.stdout
    assert ("muxio poll" in result.stdout, "\x1b" in result.stdout) == (False, False)


def test_without_rich_one_line_says_how_to_get_it() -> None:
    result = run(*QUICK, before="sys.modules['rich'] = None")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "muxio bench needs rich: python -m pip install 'muxio[bench]'\n"


def test_ctrl_c_reports_what_is_there_and_exits_with_130(tmp_path: Path) -> None:
    turn = "turns.append(sampler) or (len(turns) == 20 and signal.raise_signal(signal.SIGINT)) or take(sampler)"
    before = (
        "import signal; from muxio.bench import measure; "
        f"take, turns = measure._take, []; measure._take = lambda sampler: {turn}"
    )
    result = run("bench", "poller", "--runs", "1000000", "--json", str(tmp_path / "found"), before=before)
    assert (result.returncode, result.stdout) == (130, ""), result.stderr
    assert result.stderr.endswith("muxio bench: interrupted, the results are partial\n")
    document = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    assert (document["complete"], document["error"]) == (False, "interrupted")
    assert sum(len(entry["samples"]) for row in document["rows"] for entry in row["results"]) == 19
    assert {bar["verdict"] for bar in document["bars"]} <= {"not judged", "met", "missed", "within noise"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--backend", "abacus"], "abacus"), (["--runs", "6"], "7"), (["--json", "/no/such/place"], "cannot write")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_on_stderr_and_status_2(arguments: list[str], says: str) -> None:
    result = run("bench", "poller", *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert says in result.stderr


def test_a_contestant_that_loses_events_fails_the_run() -> None:
    cheat = "from muxio.bench.poller import Selector as S; real = S.poll; S.poll = lambda *a, **k: real(*a, **k) - 1"
    result = run(*QUICK, "--json", "-", before=cheat)
    assert result.returncode == 1
    assert "events" in json.loads(result.stdout)["error"]


def test_a_contestant_that_finds_the_same_socket_twice_fails() -> None:
    class Repeats(poller.Muxio):
        def look(self, timeout: float | None) -> list[Any]:
            return super().look(timeout)[:1] * 2

    with ExitStack() as stack:
        sockets = poller._sockets(stack, 2)
        contestant = Repeats(muxio.Poller)
        stack.callback(contestant.close)
        contestant.register(sockets)
        with pytest.raises(Failure):
            poller._batch_size(contestant, sockets)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of open files")
def test_a_limit_of_open_files_leaves_rows_out_and_says_so() -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    result = run(*QUICK, "--json", "-", before=before)
    assert result.returncode == 0
    assert "open files are needed, 256 are allowed" in result.stderr
    document = json.loads(result.stdout)
    assert {"poll, 5,000 ready", poller.FEW, poller.MANY}.isdisjoint(row["name"] for row in document["rows"])
    for what in ("poll, 5,000 ready", f"{poller.FEW} and {poller.MANY}"):
        assert any(remark.startswith(f"{what}: left out") for remark in document["remarks"])


# Measuring and judging


def test_turns_rotate_and_every_contestant_has_one_a_round() -> None:
    turns: list[str] = []

    def take(name: str) -> list[float]:
        turns.append(name)
        return [1.0]

    results = Results("test", {}, "a", [], 0)
    scenario = Scenario([Row("row", "ns")], {name: partial(take, name) for name in "abc"}, 4)
    measure([scenario], results, lambda what, done, rounds: None)
    assert ["".join(turns[first : first + 3]) for first in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert results.rows["row"].samples == {name: [1.0] * 4 for name in "abc"}


def test_ratios_are_taken_within_rounds_and_a_round_cut_short_does_not_count() -> None:
    row = Row("row", "ns", samples={"a": [2.0, 20.0, 200.0, 9.0], "b": [1.0, 10.0, 100.0]})
    assert row.ratio("a", "b") == Summary(2.0, 2.0, 2.0, 3)
    assert row.ratio("a", "nobody") is None


def test_a_bar_may_compare_two_rows_of_one_contestant() -> None:
    bar = Bar("many", "a", "a", "at most", 1.5, "few")
    results = Results("test", {}, "a", [bar], 0)
    assert results.ratio(bar) is None
    results.rows["many"] = Row("many", "ns", samples={"a": [2.0, 20.0, 200.0]})
    assert results.ratio(bar) is None
    results.rows["few"] = Row("few", "ns", samples={"a": [1.0, 10.0, 100.0]})
    assert results.ratio(bar) == Summary(2.0, 2.0, 2.0, 3)


def test_a_baseline_is_subtracted_from_all_but_itself() -> None:
    row = Row("row", "ns", baseline="bare", samples={"a": [13.0, 14.0], "bare": [9.0, 11.0]})
    assert (row.values("a"), row.values("bare")) == ([3.0, 4.0], [9.0, 11.0])


@pytest.mark.parametrize(
    ("low", "high", "rounds", "at_most", "at_least"),
    [
        (0.8, 0.9, 7, "met", "missed"),
        (0.9, 1.1, 7, "within noise", "within noise"),
        (1.1, 1.2, 7, "missed", "met"),
        (0.8, 0.9, 6, "not judged", "not judged"),
    ],
)
def test_a_verdict_needs_three_rounds_in_four(
    low: float, high: float, rounds: int, at_most: str, at_least: str
) -> None:
    ratio = Summary((low + high) / 2, low, high, rounds)
    assert Bar("row", "a", "b", "at most", 1.0).judge(ratio) == at_most
    assert Bar("row", "a", "b", "at least", 1.0).judge(ratio) == at_least
    assert Bar("row", "a", "b", "at most", 1.0).judge(None) == "not judged"
