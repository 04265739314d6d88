"""``muxio bench hold`` and ``muxio bench offload``: they measure what they say, and tell when it is not so."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_until
from programs import ended
from test_bench import only_warnings, run
from test_bench_echo import ANYWHERE, SERVE

from muxio.bench import computing, hold, offload, processes
from muxio.bench.load import Load, put
from muxio.bench.measure import Failure

if sys.platform == "win32":
    pytest.skip("Windows has no signals for one process", allow_module_level=True)


def test_all_are_held_and_echo_by_several_workers_and_client_processes() -> None:
    done = run("bench", "hold", "-c", "300", "--workers", "3", "--clients", "2", "--json", "-")
    assert (done.returncode, only_warnings(done.stderr)) == (0, True), done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["bench"], found["complete"], found["error"]) == (1, "hold", True, None)
    assert (found["connections"], found["connected"], found["echoed"], found["errors"]) == (300, 300, 300, {})
    assert (len(found["per_worker"]), sum(found["per_worker"])) == (3, 300)
    if os.path.exists("/proc/self/smaps_rollup"):
        assert found["user_memory"] > 0


def test_the_report_is_for_people() -> None:
    done = run("bench", "hold", "--connections", "200")
    assert (done.returncode, only_warnings(done.stderr)) == (0, True), done.stderr
    assert "200 of 200, every byte compared" in done.stdout
    assert "held         200 at once: 200\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "before", "says"),
    [
        (["--workers", "1"], "(256, 256)", "--workers 8, or a hard limit of more than 256 open files (ulimit -Hn"),
        (["--workers", "1"], "(256, 512)", "--workers 8, or more open files (ulimit -n 512)"),
        (["--workers", "6"], "(256, 512)", "out by a hash: --workers 8"),
        (["--clients", "2"], "(256, 512)", "--clients 7"),
        ([], "(100, 512)", "a process may have 100 open files"),
    ],
)
def test_too_few_open_files_are_told_before_anything_begins(arguments: list[str], before: str, says: str) -> None:
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {before})"
    done = run("bench", "hold", "-c", "1000", *arguments, before=limit)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr


def test_few_ports_are_shared_by_more_addresses_and_too_few_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(hold, "_PORTS", ports)
    ports.write_text("32768\t60999\n", encoding="ascii")
    assert hold.plan(hold.Settings(1000)).per_source == 10_000
    ports.write_text("40000\t40019\n", encoding="ascii")
    assert hold.plan(hold.Settings(1000)).per_source == 10
    with pytest.raises(ValueError, match=r"254 addresses of 20 ports .* raise net.ipv4.ip_local_port_range"):
        hold.plan(hold.Settings(2541))
    ports.unlink()
    assert hold.plan(hold.Settings(2541)).per_source == 10_000


def test_a_file_that_cannot_be_written_is_told_before_anything_begins() -> None:
    done = run("bench", "hold", "-c", "20", "--json", "/no/such/place")
    assert done.returncode == 2
    assert "/no/such/place" in done.stderr


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_reports_what_is_there_and_leaves_nobody_behind(signal: str) -> None:
    """It comes when all are connected, before the last echoes."""
    before = (
        "import signal\n"
        "from muxio.bench import hold\n"
        "real = hold.where\n"
        "def where(server):\n"
        "    found = real(server)\n"
        "    print('serving:', server.pid, *found[1], file=sys.stderr)\n"
        "    return found\n"
        "hold.where = where\n"
        f"hold._per_worker = lambda server: signal.raise_signal(signal.{signal})"
    )
    done = run("bench", "hold", "-c", "60", "--workers", "2", before=before)
    assert done.returncode == 130, done.stderr
    assert "connected    60 in " in done.stdout
    assert "echoed       at least 0\n" in done.stdout
    assert done.stderr.endswith("muxio bench: interrupted, the results are partial\n")
    (serving,) = (line for line in done.stderr.splitlines() if line.startswith("serving: "))
    pids = [int(pid) for pid in serving.split()[1:]]
    assert len(pids) == 3
    wait_until(lambda: all(map(ended, pids)))


@pytest.fixture
def careless_server() -> Iterator[int]:
    """Changes a byte of what it sends back at the end, to the first client; cuts the second; serves the others well."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket, number: int) -> None:
        with sock:
            sock.sendall(sock.recv(hold.SIZE, socket.MSG_WAITALL))
            last = sock.recv(hold.SIZE, socket.MSG_WAITALL)
            if number != 1:
                sock.sendall(bytes(hold.SIZE) if number == 0 else last)
                sock.recv(1)

    def accept() -> None:
        for number in range(5):
            threads.append(threading.Thread(target=serve, args=(listener.accept()[0], number)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield listener.getsockname()[1]
    accepting.join()
    for thread in threads:
        thread.join()
    listener.close()


def test_what_is_no_echo_is_told_by_cause(careless_server: int) -> None:
    clients = hold._Clients(careless_server, 0, 5)
    with clients.poller:
        clients.connect()
        assert ([peer.through(1) for peer in clients.peers], clients.errors) == ([True] * 5, {})
        clients.echo()
        assert [peer.through(2) for peer in clients.peers].count(True) == 3
        assert sorted(clients.errors.values()) == [1, 1]
        assert {error.split(":")[0] for error in clients.errors} == {"ValueError", "ConnectionAbortedError"}
        for peer in clients.peers:
            peer.sock.close()


def test_no_ports_left_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    class Portless(socket.socket):
        def connect_ex(self, _address: object) -> int:
            return errno.EADDRNOTAVAIL

    monkeypatch.setattr(socket, "socket", Portless)
    clients = hold._Clients(1, 0, 3)
    with clients.poller:
        clients.connect()
    (error,) = clients.errors
    assert (clients.errors[error], os.strerror(errno.EADDRNOTAVAIL) in error) == (3, True)


# Light clients beside a heavy one


def test_offload_measures_every_way() -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    done = run("bench", "offload", "--quick", "--rate", "300", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (p99,) = (row for row in found["rows"] if row["name"].endswith(": p99"))
    assert {result["contestant"] for result in p99["results"]} == {offload.NOBODY, "inline", "threads", "processes"}
    assert all(len(result["samples"]) == 3 for result in p99["results"])
    (heavy,) = (row for row in found["rows"] if row["name"].endswith(": heavy requests"))
    for result in heavy["results"]:
        if result["contestant"] == offload.NOBODY:
            assert result["max"] == 0
        else:  # each was really computed, which takes so long
            assert 0 < result["min"] <= result["max"] <= 1 / computing.BURN
    assert found["settings"]["rate"] == 300


def test_a_heavy_client_that_is_not_answered_is_a_failure() -> None:
    """For without a heavy client the latencies of the light ones mean nothing."""
    ask = [*processes.module("muxio.bench.computing"), "ask"]
    load = Load(busy=2, rate=100, warmup=0.02, duration=0.2)
    hangs_up = [sys.executable, "-c", HANGS_UP]
    with pytest.raises(Failure, match="beside has ended too early"):
        put(load, hangs_up, processes.module("muxio.bench.client"), ANYWHERE, ask)
    with pytest.raises(Failure, match="beside has ended too early"):
        put(load, SERVE, processes.module("muxio.bench.client"), ANYWHERE, [sys.executable, "-c", ""])


HANGS_UP = """
from muxio.bench.computing import HEAVY
from muxio.server import Protocol, serve

class HangsUp(Protocol):
    def data_received(self, data):
        if data == HEAVY:
            self.transport.abort()
        else:
            self.transport.write(data)

serve(("127.0.0.1", 0), HangsUp, quiet=True)
"""
