"""`muxio bench echo`: that it measures what it says, finds what is wrong, and tells it. No speed is asserted."""

from __future__ import annotations

import importlib.util
import json
import select
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_bench import only_warnings, run

from muxio.bench import echo, processes, servers
from muxio.bench.client import percentiles
from muxio.bench.echo import Arena, Settings
from muxio.bench.load import PERCENTILES, Found, Load, _busy, put
from muxio.bench.measure import Failure, Results, Row

QUICK = ["bench", "echo", "--quick", "--json", "-"]
SLOWLY = "from muxio.bench import echo; echo.QUICK_DURATION = 0.5"  # somebody has to be echoed on a busy machine, too
ONCE = f"{SLOWLY}; echo.QUICK_ROUNDS = 1"

ANYWHERE = processes.Cores(None, None)
SERVE = [*processes.module("muxio"), "serve", "127.0.0.1:0", "-q"]
SHORT = Load(busy=3, warmup=0.02, duration=0.5)

COMPILER = processes.compiler()

#: Servers that are no echo: what is told of them, and what they do with what they received.
WRONG = {
    "wrong bytes": "sock.sendall(bytes(byte ^ (place == 63) for place, byte in enumerate(data)))",
    "more bytes came back than were sent": "sock.sendall(data + b'x')",
    "closed by the server": "sock.shutdown(2)",
    "not served within": "pass",
}

WRONG_SERVER = """
import socket, threading
listener = socket.create_server(("127.0.0.1", 0))
print(f"listening on 127.0.0.1:{{listener.getsockname()[1]}}", flush=True)

def serve(sock):
    received = 0
    while data := sock.recv(65536):
        received += len(data)
        {deed}

while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""


@pytest.fixture(scope="module", params=["C", "Python"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The load generators."""
    if request.param == "Python":
        return processes.module("muxio.bench.client")
    if COMPILER is None:
        pytest.skip("no C compiler, or no epoll")
    return [processes.build(COMPILER, "client.c", str(tmp_path_factory.mktemp("bench")))]


def wrong(deed: str) -> list[str]:
    return [sys.executable, "-c", WRONG_SERVER.format(deed=deed)]


# The load generators


def test_a_load_is_put_on_a_server_and_every_echo_is_timed(generator: list[str]) -> None:
    found = put(SHORT, SERVE, generator, ANYWHERE)
    assert (found.connections, found.starved, found.cuts, found.lateness) == (3, 0, 0, None)
    assert found.echoes >= found.slowest * 3 > 0
    assert (found.seconds >= 0.5, found.setup > 0, found.own_cpu > 0) == (True, True, True)
    assert (found.server_cpu is not None) == bool(processes.cpu_clock())
    assert (found.memory is not None) == (found.memory_before is not None) == processes.can_tell_memory()
    assert found.latency is not None
    assert tuple(found.latency) == PERCENTILES
    assert [*found.latency.values()] == sorted(found.latency.values())
    assert found.latency["p50"] > 0


def test_an_open_loop_sends_at_its_rate_and_counts_from_when_it_ought_to_have_sent(generator: list[str]) -> None:
    start = time.monotonic()
    found = put(Load(busy=3, rate=200, warmup=0.05), SERVE, generator, ANYWHERE)
    assert 0 < found.echoes <= 200 * (time.monotonic() - start)
    assert found.latency
    assert found.lateness

    hopeless = put(Load(busy=1, size=1 << 20, rate=100_000, duration=0.3), SERVE, generator, ANYWHERE)
    assert hopeless.latency
    assert hopeless.latency["max"] > 100_000  # µs: what was due at the window's begin and never sent has its age


def test_everybody_is_served_beside_idle_and_hostile_peers(generator: list[str]) -> None:
    load = Load(busy=4, size=100_000, idle=5, drip=5, deaf=5, reset=5, window=3, warmup=0.6, duration=0.6)
    assert put(load, SERVE, generator, ANYWHERE).connections == 4


def test_without_a_duration_it_only_connects(generator: list[str]) -> None:
    found = put(Load(busy=20, idle=20, window=40, duration=0), SERVE, generator, ANYWHERE)
    assert (found.echoes, found.latency) == (0, None)
    assert found.setup > 0


@pytest.mark.parametrize("says", WRONG)
def test_what_is_no_echo_is_told_by_cause(generator: list[str], says: str) -> None:
    with pytest.raises(Failure, match=says):
        put(Load(busy=2, patience=0.5 if "within" in says else 30), wrong(WRONG[says]), generator, ANYWHERE)


def test_an_echo_that_never_comes_is_a_failure(generator: list[str]) -> None:
    tires = wrong("sock.sendall(data if received <= 2000 else b'')")
    with pytest.raises(Failure, match="2 echoes did not come within 2 s"):
        put(Load(busy=2, patience=2, duration=0.1), tires, generator, ANYWHERE)


def test_a_server_that_does_not_start_is_a_failure_with_its_last_words(generator: list[str]) -> None:
    with pytest.raises(Failure, match=r"did not start \(ZeroDivisionError"):
        put(SHORT, [sys.executable, "-c", "1 / 0"], generator, ANYWHERE)


def test_percentiles_are_of_the_values_themselves() -> None:
    found = percentiles([(1000 - number) / 1e6 for number in range(1000)])
    assert found == pytest.approx({"p50": 501, "p75": 751, "p90": 901, "p99": 991, "p99.9": 1000, "max": 1000})
    assert percentiles([]) is None


# The servers


@pytest.mark.parametrize("name", ["c", *servers.SERVERS])
def test_a_contestant_echoes_messages_that_no_buffer_holds(name: str, tmp_path: Path) -> None:
    command = [*processes.module("muxio.bench.servers"), name]
    if name == "c":
        if COMPILER is None:
            pytest.skip("no C compiler, or no epoll")
        command = [processes.build(COMPILER, "server.c", str(tmp_path))]
    if name == "epoll" and not hasattr(select, "epoll"):
        pytest.skip("no epoll")
    if name in ("uvloop", "gevent") and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    load = Load(busy=2, size=5_000_000, deaf=2, reset=2, warmup=0.05, duration=0.5)
    assert put(load, command, processes.module("muxio.bench.client"), ANYWHERE).connections == 2  # and all were right


def test_the_clock_of_a_process_counts_its_cpu_time() -> None:
    if sys.platform == "win32" or not processes.cpu_clock():
        pytest.skip("no CPU clock of another process")
    before = time.clock_gettime(processes.cpu_clock())
    while time.process_time() < before + 0.01:
        pass
    assert time.clock_gettime(processes.cpu_clock()) >= before + 0.01


def test_the_time_of_the_machine_is_all_of_its_cores() -> None:
    before = processes.machine_time()
    if before is None:
        pytest.skip("the system does not tell")
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass
    after = processes.machine_time()
    assert after is not None
    assert after[0] > before[0]
    assert _busy(before, after) == pytest.approx((after[0] - before[0]) / (sum(after) - sum(before)))
    assert (_busy(None, after), _busy(after, after)) == (None, None)


# The run


def test_a_quick_run_measures_every_row_of_every_contestant() -> None:
    result = run(
        *QUICK, "--only", "muxio,asyncio", "-c", "3", "--size", "1k", before=f"{SLOWLY}; sys.modules['rich'] = None"
    )
    assert (result.returncode, only_warnings(result.stderr)) == (0, True), result.stderr
    document = json.loads(result.stdout)
    assert (document["schema"], document["bench"], document["complete"], document["error"]) == (1, "echo", True, None)
    settings = document["settings"]
    assert (settings["only"], settings["connections"], settings["size"]) == (["muxio", "asyncio"], 3, 1024)
    rows = {row["name"]: row for row in document["rows"]}
    expected = {"throughput", *(f"latency {name}" for name in PERCENTILES), "slowest connection / mean"}
    if processes.cpu_clock():
        expected |= {"server CPU", "server of a core"}
    assert set(rows) >= {f"1 KiB x 3: {name}" for name in expected}
    for name in expected:
        results = rows[f"1 KiB x 3: {name}"]["results"]
        assert [entry["contestant"] for entry in results] == ["muxio", "asyncio"]
        assert all(len(entry["samples"]) == 3 for entry in results)
    assert document["bars"] == []  # none is about 1 KiB over 3 connections


def test_every_scenario_has_its_rows_and_the_numbers_to_hold_are_those_of_its_size() -> None:
    small = ["-c", "2", "--idle", "10", "--hostile", "2", "--only", "muxio"]
    before = f"{ONCE}\necho.BARS.append(echo.Bar('2 at once: last first echo', 'muxio', None, 'at most', 9))"
    result = run("bench", "echo", "--quick", "--scenario", "all", *small, before=before)
    assert (result.returncode, only_warnings(result.stderr)) == (0, True), result.stderr
    titles = [
        "64 B x 2: latency, µs",
        "2 busy, 10 idle: throughput",
        "2 at once: last first echo",
        "muxio, idle beside",
        "64 B x 2, workers: throughput",
        "1 worker",
        "2 workers",
    ]
    if processes.can_tell_memory():
        titles += ["10 idle: private memory, B a connection", "the server's memory has grown"]
    if processes.cpu_clock():
        titles.append("there were taken by 1 worker: ")
    if processes.machine_time():
        titles.append("others and the kernel for the network")
    for text in (*titles, "2 honest, 6 hostile: p99", "muxio, hostile beside", "load generator in"):
        assert text in result.stdout
    assert "Numbers to hold\nnot judged   2 at once: last first echo: muxio" in result.stdout
    assert "1,000 at once" not in result.stdout


def test_a_contestant_that_fails_is_left_out_and_told_with_status_1() -> None:
    before = (
        f"{ONCE}; real = echo._arena\n"
        "def arena(*arguments):\n"
        "    made = real(*arguments)\n"
        f"    made.commands['threads'] = {wrong(WRONG['wrong bytes'])!r}\n"
        "    return made\n"
        "echo._arena = arena"
    )
    result = run(*QUICK, "--only", "muxio,threads", "-c", "2", before=before)
    assert result.returncode == 1
    assert "64 B x 2: threads: " in result.stderr
    document = json.loads(result.stdout)
    assert (document["complete"], "wrong bytes" in document["error"]) == (False, True)
    assert [entry["contestant"] for entry in document["rows"][0]["results"]] == ["muxio"]
    assert len(document["rows"][0]["results"][0]["samples"]) == 1


def test_without_a_compiler_the_load_comes_from_python() -> None:
    before = f"{ONCE}; import os; os.environ['PATH'] = ''; os.environ.pop('CC', None)"
    result = run(*QUICK, "--only", "muxio,c", "-c", "2", before=before)
    assert (result.returncode, only_warnings(result.stderr)) == (0, True), result.stderr
    remarks = json.loads(result.stdout)["remarks"]
    assert "without c (no C compiler, or no epoll)" in remarks
    assert any(remark.startswith("load generator in Python (no C compiler") for remark in remarks)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler, or no epoll")
def test_a_compiler_that_refuses_is_told(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no licence >&2; exit 1\n", encoding="ascii")
    compiler.chmod(0o755)
    result = run(*QUICK, before=f"import os; os.environ['CC'] = {str(compiler)!r}")
    assert (result.returncode, "cannot compile client.c: no licence" in result.stderr) == (1, True)


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_reports_what_is_there_and_exits_with_130(signal: str) -> None:
    before = (
        f"import signal; {SLOWLY}; real = echo.put; taken = []\n"
        "def put(*arguments):\n"
        "    taken.append(1)\n"
        f"    if len(taken) == 3: signal.raise_signal(signal.{signal})\n"
        "    return real(*arguments)\n"
        "echo.put = put"
    )
    result = run(*QUICK, "--only", "muxio,asyncio", "-c", "2", before=before)
    assert result.returncode == 130, result.stderr
    assert result.stderr.endswith("muxio bench: interrupted, the results are partial\n")
    document = json.loads(result.stdout)
    assert (document["complete"], document["error"]) == (False, "interrupted")
    assert [len(entry["samples"]) for entry in document["rows"][0]["results"]] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scenario", "picnic"], "no scenario 'picnic'"),
        (["--only", "muxio,nginx"], "no contestant 'nginx'"),
        (["--backend", "abacus"], "abacus"),
        (["--size", "16q"], "'16q'"),
        (["--rate", "0"], "from 1 on"),
        (["-d", "1e9"], "from 10ms"),
        (["--rounds", "6"], "7"),
        (["--json", "/no/such/place"], "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_on_stderr_and_status_2(arguments: list[str], says: str) -> None:
    result = run("bench", "echo", *arguments)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert says in result.stderr


def test_nothing_to_measure_is_bad_input() -> None:
    before = "import os; os.environ['PATH'] = ''; os.environ.pop('CC', None)"
    result = run(*QUICK, "--only", "c", before=before)
    assert (result.returncode, "nothing to measure without c (no C compiler" in result.stderr) == (2, True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of open files")
def test_a_limit_of_open_files_leaves_a_scenario_out_and_says_so() -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    result = run(*QUICK, "--scenario", "memory", before=before)
    assert (result.returncode, "9,100 open files are needed" in result.stderr) == (0, True)
    assert json.loads(result.stdout)["remarks"][-1] == "memory: left out, it takes 9,100 open files (ulimit -n)"


def test_a_server_that_starves_connections_has_no_throughput() -> None:
    results = Results("echo", {}, "muxio", [], 0)
    results.rows["row: throughput"] = row = Row("row: throughput", "echoes/s", samples={"a": [9.0], "b": [5.0]})
    arena = Arena(Settings(), results, {}, [], ANYWHERE)
    facts: dict[str, Any] = dict.fromkeys(Found.__dataclass_fields__, 1)
    fair, unfair = Found(**{**facts, "starved": 0}), Found(**{**facts, "starved": 7})
    echo._withhold_throughput(arena, "row", {"a": [fair, unfair], "b": [fair]})
    assert row.samples == {"b": [5.0]}
    assert "no throughput of a, 7 connections" in results.remarks[0]
