"""The command line as people use it: real processes, real signals, real peers."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import BACKENDS, wait_until
from programs import INTERRUPT, STOP, TIMEOUT, echo, run, serving

import muxio
from muxio import READ, WRITE

#: The arguments of every way to serve on this machine.
WAYS = [["--backend", name] for name in BACKENDS] + [["--threads"]]

every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way[-1].lstrip("-"))


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process to talk with, which does not outlive a failure."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        found = hashlib.sha256()
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "127.0.0.1:65536"], "port"),
        (["serve", "127.0.0.1:http"], "port"),
        (["serve", "127.0.0.1:-1"], "port"),
        (["serve", "::1:80"], "brackets"),
        (["serve", "no-such-host.invalid:80"], "no-such-host.invalid:80"),
        (["serve", "--backend", "abacus"], "abacus"),
        (["serve", "--backend", "select", "--threads"], "--threads"),
        (["serve", "--frobnicate"], "--frobnicate"),
        (["sevre"], "sevre"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_on_stderr_and_status_2(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_port_in_use_is_one_line_on_stderr_and_status_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for way in WAYS:
            result = run("serve", f"127.0.0.1:{taken.getsockname()[1]}", *way)
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
            assert "in use" in result.stderr or sys.platform == "win32"


def test_an_unknown_backend_in_the_environment_is_named_as_such() -> None:
    result = run("serve", "127.0.0.1:0", MUXIO_BACKEND="abacus")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "MUXIO_BACKEND" in result.stderr


def test_help_teaches_each_command() -> None:
    assert "serve" in run("--help").stdout
    for option in ("--backend", "--threads", "--quiet", "HOST:PORT"):
        assert option in run("serve", "--help").stdout
    assert run("--version").stdout == f"muxio {muxio.__version__}\n"


# info


def test_info_tells_what_works_what_does_not_and_why() -> None:
    result = run("info", MUXIO_BACKEND="")
    assert (result.returncode, result.stderr) == (0, "")
    assert muxio.__version__ in result.stdout
    assert "open files" in result.stdout
    assert "backlog" in result.stdout
    for name in ("epoll", "kqueue", "poll", "select", "afd"):
        (line,) = (line for line in result.stdout.splitlines() if re.search(rf"\b{name} ", line))
        assert ("works" in line) == (name in muxio.backends())
        assert ("chosen" in line) == (name == muxio.backends()[0])
        assert ("no: " in line) == (name not in muxio.backends())


def test_info_tells_who_forced_the_backend() -> None:
    assert "select  works, and is chosen by MUXIO_BACKEND" in run("info", MUXIO_BACKEND="select").stdout
    assert "'abacus'" in run("info", MUXIO_BACKEND="abacus").stdout


# serve


@every_way
@pytest.mark.parametrize("number", sorted({INTERRUPT, STOP}), ids=lambda number: signal.Signals(number).name)
def test_a_signal_ends_it_in_order_while_clients_are_connected(way: list[str], number: int) -> None:
    with serving(*way) as served, socket.create_connection(served.address, TIMEOUT) as client:
        client.sendall(b"hello")
        received = b""
        while len(received) < 5:
            received += client.recv(5)
        lines = served.stop(number, [client])
    drained = ""
    if "--threads" not in way:
        assert lines.pop(0) == "stopping: 1 connected, who get 5 s; again, and they are cut at once"
        drained = "; 1 drained, 0 cut"
    peer = "{}:{}".format(*client_address(lines[0]))
    assert re.fullmatch(rf"{peer}  5 B in, 5 B out, \d+\.\d\d s", lines[0])
    assert re.fullmatch(rf"1 connection, 5 B in, 5 B out, \d+\.\d s{drained}", lines[1])
    assert len(lines) == 2


@pytest.mark.parametrize("more", [[], ["--worker-threads"]], ids=["processes", "threads"])
def test_a_signal_ends_workers_in_order_while_clients_are_connected(more: list[str]) -> None:
    with serving("--workers", "2", *more, "--quiet") as served, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(served.address, TIMEOUT)) for _ in range(10)]
        for client in clients:
            client.sendall(b"hello")
            assert client.recv(5, socket.MSG_WAITALL) == b"hello"
        lines = served.stop(STOP, clients)
    assert re.fullmatch(r"10 connections, 50 B in, 50 B out, \d+\.\d s; 10 drained, 0 cut", lines[-1])


def client_address(line: str) -> tuple[str, int]:
    host, port = line.split()[0].rsplit(":", 1)
    return host, int(port)


@every_way
def test_quiet_leaves_the_lines_of_connections_out(way: list[str]) -> None:
    with serving(*way, "--quiet") as served:
        for _ in range(3):
            socket.create_connection(served.address, TIMEOUT).close()
        echo(served.address)
        lines = served.stop()
        assert re.fullmatch(r"4 connections, 2 B in, 2 B out, \d+\.\d s(; \d drained, 0 cut)?", lines[-1])
        assert not any(line.startswith("127.0.0.1") for line in lines)


@pytest.fixture(scope="session")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB in which no block is like another."""
    path = tmp_path_factory.mktemp("large") / "sent"
    source = random.Random(7)
    with path.open("wb") as stream:
        for _ in range(200):
            stream.write(source.randbytes(1_000_000))
    return path


@every_way
@pytest.mark.parametrize(
    "peer", [["nc", "-N", "{host}", "{port}"], ["socat", "-t60", "-", "TCP:{host}:{port}"]], ids=["nc", "socat"]
)
def test_a_large_file_comes_back_whole(way: list[str], peer: list[str], large_file: Path, tmp_path: Path) -> None:
    if shutil.which(peer[0]) is None:
        pytest.skip(f"{peer[0]} is not installed")
    received = tmp_path / "received"
    with serving(*way) as served:
        command = [word.format(host=served.address[0], port=served.address[1]) for word in peer]
        with large_file.open("rb") as source, received.open("wb") as sink:
            subprocess.run(command, stdin=source, stdout=sink, check=True, timeout=TIMEOUT)
        assert digest(received) == digest(large_file)
        received.unlink()
        assert "1 connection, 200,000,000 B in, 200,000,000 B out" in served.stop()[-1]


@every_way
def test_1000_connections_at_once_are_served(way: list[str]) -> None:
    count = 1000
    if sys.platform != "win32":
        import resource

        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1100:
            pytest.skip("the limit of open files is below 1,100 (ulimit -n)")
    elif "select" in way:
        count = 500  # of 512 sockets
    with serving(*way, "--quiet") as served, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(served.address, TIMEOUT)) for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(b"%04d" % number)
        for number, client in enumerate(clients):
            assert client.recv(4, socket.MSG_WAITALL) == b"%04d" % number
        assert f"{count:,} connections, {4 * count:,} B in, {4 * count:,} B out" in served.stop(clients=clients)[-1]


CLIENT_THAT_DOES_NOT_READ = """
import hashlib, random, socket, sys, threading
data = random.Random(3).randbytes(1_000_000) * 100
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
sock.setblocking(False)
sent = 0
while True:
    try:
        sent += sock.send(memoryview(data)[sent:])
    except BlockingIOError:
        print("full", flush=True)  # the kernel takes no more; for a moment at least
        if sys.stdin.readline() == "read\\n":
            break
sock.setblocking(True)
sender = threading.Thread(target=lambda: (sock.sendall(memoryview(data)[sent:]), sock.shutdown(socket.SHUT_WR)))
sender.start()
received = hashlib.sha256()
while block := sock.recv(1 << 20):
    received.update(block)
sender.join()
print("same" if received.digest() == hashlib.sha256(data).digest() else "different", flush=True)
"""


def private_memory(pid: int) -> int:
    """Bytes that only this process has."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(found) for found in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE))


@every_way
def test_a_stopped_client_that_reads_nothing_costs_little_memory_and_gets_everything(way: list[str]) -> None:
    if sys.platform == "win32" or not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no /proc to read a process's memory from")
    with serving(*way) as served:
        echo(served.address)
        before = private_memory(served.process.pid)
        host, port = served.address
        command = [sys.executable, "-c", CLIENT_THAT_DOES_NOT_READ, host, str(port)]
        with started(command) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            # Fill up until nothing moves: all buffers between the two are full, and the server has stopped reading.
            assert client.stdout.readline() == "full\n"
            client.send_signal(signal.SIGSTOP)
            wait_until(lambda: queues_at_rest(served.address), TIMEOUT)
            client.send_signal(signal.SIGCONT)
            client.stdin.write("more\n")
            client.stdin.flush()
            assert client.stdout.readline() == "full\n"
            client.send_signal(signal.SIGSTOP)
            wait_until(lambda: queues_at_rest(served.address), TIMEOUT)
            assert private_memory(served.process.pid) - before < 1 << 20
            echo(served.address)
            client.send_signal(signal.SIGCONT)
            client.stdin.write("read\n")
            client.stdin.flush()
            assert client.stdout.readline() == "same\n"
        served.stop()


def queues_at_rest(address: tuple[str, int]) -> bool:
    """Whether what waits in the kernel for the server's sockets is the same as it was a few looks ago."""
    looks = [Path("/proc/net/tcp").read_text().splitlines() for _ in range(20)]
    local = f":{address[1]:04X} "
    queues = [[line.split()[4] for line in look if local in line] for look in looks]
    return all(queue == queues[0] for queue in queues)


def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read() -> None:
    """The first one would wait 5 seconds for it."""
    with serving(*WAYS[0]) as served, socket.create_connection(served.address, TIMEOUT) as client:
        fill(client)
        served.send(STOP)
        wait_until(lambda: not accepts(served.address), TIMEOUT)
        lines = served.stop(STOP, status=3)
        assert re.search(r", (\d+\.\d) s; \d+ drained, 1 cut$", lines[-1])
        assert float(lines[-1].split(" s;")[0].split()[-1]) < 5.0


def fill(client: socket.socket) -> None:
    """Send until nothing more is taken, so that the server has bytes queued for a client that does not read."""
    client.setblocking(False)
    poller: muxio.Poller[None] = muxio.Poller()
    with poller:
        poller.register(client, WRITE, key=None)
        while poller.poll(0.5):
            try:
                client.send(bytes(1 << 20))
            except BlockingIOError:
                continue
        poller.modify(client, READ)
        assert poller.poll(TIMEOUT)


def accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, TIMEOUT).close()
    except OSError:
        return False
    return True
