"""``muxio bench hold`` and ``muxio bench offload``: they measure what they say, and tell when it is not so."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from programs import run

from muxio.bench import hold

if sys.platform == "win32":
    pytest.skip("Windows has no signals for one process", allow_module_level=True)


def test_all_are_held_and_echo_by_several_workers_and_client_processes() -> None:
    done = run("bench", "hold", "-c", "300", "--workers", "3", "--clients", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["connections"], found["echoed"], found["errors"]) == (300, 300, {})
    assert (len(found["per_worker"]), sum(found["per_worker"])) == (3, 300)
    if os.path.exists("/proc/self/smaps_rollup"):
        assert found["user_memory"] > 0


def test_the_report_is_for_people() -> None:
    done = run("bench", "hold", "-c", "20")
    assert done.returncode == 0
    assert "20 of 20, every byte compared" in done.stdout


def test_a_limit_that_is_too_low_is_told_before_anything_begins() -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = run("bench", "hold", "-c", str(2 * limits[0]), "--workers", "1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "ulimit -n" in done.stderr


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
        assert (clients.held(), clients.errors) == (5, {})
        clients.echo()
        assert clients.held() == 3
        assert sorted(clients.errors.values()) == [1, 1]
        assert {error.split(":")[0] for error in clients.errors} == {"ValueError", "ConnectionAbortedError"}
        for peer in clients.peers:
            peer.sock.close()


def test_offload_measures_every_way() -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    done = run("bench", "offload", "--quick", "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (p99,) = (row for row in found["rows"] if row["name"].endswith(": p99"))
    assert {result["contestant"] for result in p99["results"]} == {"inline", "threads", "processes"}
    assert all(len(result["samples"]) == 3 for result in p99["results"])
