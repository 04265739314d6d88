"""Several workers at one address: real processes, killed, replaced and drained while clients are there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from churn import churning
from helpers import wait_until
from programs import TIMEOUT, Served, connect, echo, ended, run, running, serving

if sys.platform == "win32":
    pytest.skip("Windows has no signals for one process", allow_module_level=True)

TWO = ("--workers", "2", "--quiet")

#: A listener each where ports balance; one for all of a Unix socket.
ADDRESSES = ("127.0.0.1:0", "unix:{directory}/echo")

every_address = pytest.mark.parametrize("address", ADDRESSES, ids=("own listeners", "one listener"))


def clients_of_each(served: Served) -> dict[int, socket.socket]:
    """Connect until each worker has a client; who serves one is seen by whose sockets it is among."""
    found: dict[int, socket.socket] = {}
    spare: list[socket.socket] = []
    while len(found) < len(served.pids):
        client = connect(served.address)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        pid = next(pid for pid in served.pids if serves(pid, client))
        if pid in found:
            spare.append(client)
        else:
            found[pid] = client
    for client in spare:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the worker counts it no more
        client.close()
    return found


def serves(pid: int, client: socket.socket) -> bool:
    """Whether a process has the other end of a TCP connection."""
    here, there = (f"{address[0]}:{address[1]}" for address in (client.getsockname(), client.getpeername()))
    inodes = {os.readlink(link) for link in descriptors(pid)}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, *rest = line.split()
        if (readable(local), readable(remote)) == (there, here):
            return f"socket:[{rest[6]}]" in inodes
    return False


def readable(address: str) -> str:
    host, port = address.split(":")
    return f"{socket.inet_ntoa(bytes.fromhex(host)[::-1])}:{int(port, 16)}"


def descriptors(pid: int) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from Path(f"/proc/{pid}/fd").iterdir()


needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp to see whose a socket is")


# Replacing


@every_address
def test_ten_reloads_under_500_clients_refuse_reset_and_lose_nothing(address: str, tmp_path: Path) -> None:
    with serving(*TWO, address=address.format(directory=tmp_path)) as served:
        generations = [served.pids]
        with churning(served.address, 500) as churn:
            for reload in range(1, 11):
                served.process.send_signal(signal.SIGHUP)
                served.wait_for("reloaded: 2 workers: .*", reload)
                generations.append(served.pids)
                churn.wait_for(500)
        assert churn.failures == []
        assert len({pid for pids in generations for pid in pids}) == 22
        lines = served.stop()
        assert re.match(
            f"{churn.served:,} connections, {300 * churn.served:,} B in, {300 * churn.served:,} B out", lines[-1]
        )
    assert all(ended(pid) for pids in generations for pid in pids)


@needs_proc
def test_a_reload_leaves_who_is_connected_alone_until_he_leaves() -> None:
    with serving(*TWO) as served:
        old = served.pids
        clients = clients_of_each(served)
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reloaded: .*")
        assert not set(old) & set(served.pids)
        for client in clients.values():
            client.sendall(b"still here")
            assert client.recv(10, socket.MSG_WAITALL) == b"still here"
            client.close()
        wait_until(lambda: all(ended(pid) for pid in old), TIMEOUT)
        echo(served.address)
        served.stop()


@needs_proc
def test_who_does_not_leave_after_a_reload_gets_eof_in_the_end() -> None:
    with serving(*TWO, "--retire", "10ms") as served:
        clients = clients_of_each(served)
        served.process.send_signal(signal.SIGHUP)
        for client in clients.values():
            assert client.recv(1) == b""
            client.close()
        served.wait_for("reloaded: .*")
        served.stop()


def test_a_reload_during_a_reload_is_done_after_it() -> None:
    with serving(*TWO) as served:
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reload: .*")
        for _ in range(3):
            served.process.send_signal(signal.SIGHUP)
        served.wait_for("reloaded: .*", 2)
        echo(served.address)
        lines = served.stop()
        assert sum(line.startswith("reload:") for line in lines) == 2


@needs_proc
def test_a_killed_worker_is_replaced_and_the_other_ones_clients_notice_nothing() -> None:
    with serving(*TWO) as served:
        victim, other = served.pids
        clients = clients_of_each(served)
        os.kill(victim, signal.SIGKILL)
        served.wait_for(rf"worker 1 \(pid {victim}\) was killed by SIGKILL")
        served.wait_for(r"worker 1 \(pid \d+\) serves")
        with contextlib.suppress(ConnectionResetError):
            assert clients[victim].recv(1) == b""
        clients[other].sendall(b"unharmed")
        assert clients[other].recv(8, socket.MSG_WAITALL) == b"unharmed"
        for client in clients.values():
            client.close()
        assert not ended(other)
        for _ in range(20):
            echo(served.address)
        served.stop()


@every_address
def test_who_waits_while_no_worker_lives_is_served_by_the_successors(address: str, tmp_path: Path) -> None:
    with serving(*TWO, address=address.format(directory=tmp_path)) as served:
        for pid in served.pids:
            os.kill(pid, signal.SIGSTOP)
        waiting = [connect(served.address) for _ in range(50)]
        for number, client in enumerate(waiting):
            client.sendall(b"%02d" % number)
        for pid in served.pids:
            os.kill(pid, signal.SIGKILL)
        for number, client in enumerate(waiting):
            assert client.recv(2, socket.MSG_WAITALL) == b"%02d" % number
            client.close()
        served.stop()


def test_a_worker_that_is_told_to_stop_drains_and_is_replaced() -> None:
    with serving(*TWO) as served, connect(served.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        old = served.pids
        for pid in old:
            os.kill(pid, signal.SIGTERM)
        assert client.recv(1) == b""
        client.close()
        served.wait_for(r"worker . \(pid \d+\) serves", 2)
        wait_until(lambda: all(ended(pid) for pid in old), TIMEOUT)
        echo(served.address)
        served.stop()


#: Serves a protocol of its own, which it has from a file that may change.
SCRIPT = """
    import sys
    from pathlib import Path
    from muxio.server import Protocol, serve

    exec(Path(sys.argv[1]).read_text())

    if __name__ == "__main__":
        serve(("127.0.0.1", 0), Answer, workers=int(sys.argv[2]), quiet=True)
"""

ANSWER = """
class Answer(Protocol):
    def data_received(self, data):
        self.transport.write({!r})
"""


@contextlib.contextmanager
def serving_answer(directory: Path, workers: int) -> Iterator[tuple[Served, Path]]:
    script, module = directory / "script.py", directory / "answer.py"
    script.write_text(textwrap.dedent(SCRIPT))
    module.write_text(ANSWER.format(b"old"))
    with running([sys.executable, "-W", "error", str(script), str(module), str(workers)]) as served:
        yield served, module


def ask(address: Any) -> bytes:
    with connect(address) as client:
        client.sendall(b"?")
        return client.recv(3, socket.MSG_WAITALL)


def test_a_reload_serves_the_code_of_its_day(tmp_path: Path) -> None:
    with serving_answer(tmp_path, 2) as (served, module):
        assert ask(served.address) == b"old"
        module.write_text(ANSWER.format(b"new"))
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reloaded: .*")
        assert [ask(served.address) for _ in range(10)] == [b"new"] * 10
        served.stop()


def test_a_reload_of_broken_code_leaves_the_old_workers_serving(tmp_path: Path) -> None:
    with serving_answer(tmp_path, 2) as (served, module):
        old = served.pids
        module.write_text("1/0")
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reload: given up.*")
        assert [ask(served.address) for _ in range(10)] == [b"old"] * 10
        assert not any(ended(pid) for pid in old)
        module.write_text(ANSWER.format(b"new"))
        served.process.send_signal(signal.SIGHUP)
        served.wait_for("reloaded: .*")
        assert ask(served.address) == b"new"
        served.process.send_signal(signal.SIGTERM)
        assert served.process.stderr is not None
        assert "ZeroDivisionError" in served.process.stderr.read()


def test_a_worker_that_dies_again_and_again_is_replaced_at_longer_and_longer_intervals() -> None:
    with serving("--workers", "1", "--quiet") as served:
        began = time.monotonic()
        for death in range(1, 5):
            os.kill(served.pids[0] if death == 1 else latest(served), signal.SIGKILL)
            served.wait_for(r"worker 1 \(pid \d+\) serves", death)
        assert time.monotonic() - began >= 0.1 + 0.2 + 0.4  # the pauses between; never less
        echo(served.address)
        served.stop()


def latest(served: Served) -> int:
    return int(re.findall(r"\(pid (\d+)\) serves", "\n".join(served.lines))[-1])


# Ending


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_drains_all_workers(number: int) -> None:
    with serving(*TWO) as served:
        pids = served.pids
        clients = list(clients_of_each(served).values())
        lines = served.stop(number, clients)
        assert lines[0] == "stopping: 2 connected, who get 5 s; again, and they are cut at once"
        assert re.fullmatch(r"\d+ connections, (\d+) B in, \1 B out, .* s; 2 drained, 0 cut", lines[-1])
    assert all(ended(pid) for pid in pids)


@needs_proc
def test_a_stop_counts_the_clients_of_a_worker_that_is_through_before_another_has_answered() -> None:
    with serving(*TWO, "--drain", "none") as served:
        quick, slow = served.pids
        clients = clients_of_each(served)
        os.kill(slow, signal.SIGSTOP)
        served.process.send_signal(signal.SIGTERM)
        assert clients[quick].recv(1) == b""
        clients[quick].close()
        wait_until(lambda: ended(quick), TIMEOUT)
        os.kill(slow, signal.SIGCONT)
        served.wait_for("stopping: 2 connected, .*")
        assert clients[slow].recv(1) == b""
        clients[slow].close()
        served.wait_for(".*; 2 drained, 0 cut")
        assert served.process.wait(TIMEOUT) == 0


@every_address
def test_ctrl_c_on_a_terminal_reaches_all_and_is_heard_once(address: str, tmp_path: Path) -> None:
    with serving(*TWO, address=address.format(directory=tmp_path), start_new_session=True) as served:
        with connect(served.address) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            os.killpg(served.process.pid, signal.SIGINT)
            assert client.recv(1) == b""
        assert served.process.stderr is not None
        assert (served.process.wait(TIMEOUT), served.process.stderr.read()) == (0, "")


def test_who_is_cut_when_the_time_to_drain_is_over_shows_in_the_status() -> None:
    with serving(*TWO, "--drain", "10ms") as served, connect(served.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        lines = served.stop(signal.SIGTERM, status=3)
        assert lines[-1].endswith("0 drained, 1 cut")


def test_a_second_signal_cuts_at_once() -> None:
    with serving(*TWO, "--drain", "none") as served, connect(served.address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        served.process.send_signal(signal.SIGTERM)
        served.wait_for("stopping: .*as long as they take.*")
        assert client.recv(1) == b""
        lines = served.stop(signal.SIGTERM, status=3)
        assert lines[-1].endswith("0 drained, 1 cut")


@every_address
def test_workers_whose_supervisor_was_killed_end_and_free_the_address(address: str, tmp_path: Path) -> None:
    with serving(*TWO, address=address.format(directory=tmp_path)) as served:
        pids = served.pids
        with connect(served.address) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            served.process.kill()
            served.process.wait()
            assert client.recv(1) == b""  # drained
        wait_until(lambda: all(ended(pid) for pid in pids), TIMEOUT)
        with pytest.raises(ConnectionRefusedError):
            connect(served.address)
        with serving(
            address=address.format(directory=tmp_path)
        ) as successor:  # a Unix socket's file was left: no matter
            echo(successor.address)
            successor.stop()


def test_a_stopped_worker_is_killed_when_it_does_not_drain() -> None:
    with serving(*TWO, "--drain", "10ms") as served:
        os.kill(served.pids[0], signal.SIGSTOP)
        lines = served.stop(signal.SIGTERM, status=3)
        assert any(re.fullmatch(r"worker 1 \(pid \d+\) does not end, and is killed", line) for line in lines)
        assert lines[-1].endswith("0 drained, 1 cut")  # that nobody was connected is not known


def test_a_port_that_other_workers_share_is_in_use_all_the_same() -> None:
    with serving(*TWO) as served:
        again = run("serve", "{}:{}".format(*served.address), *TWO)
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert "in use" in again.stderr
        served.stop()
