"""Where servers listen: TCP, IPv6, Unix sockets and inherited listeners, for every way to serve."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, wait_until
from helpers import serving as serving_in_a_thread
from programs import TIMEOUT, connect, echo, muxio_command, run, serving

from muxio.server import EchoProtocol, Limits, Server, ThreadedServer, serve
from muxio.server.listener import ACCEPT_BATCH
from muxio.server.sockets import file_of, listen, remove_file, resolve

if sys.platform == "win32":
    pytest.skip("Windows hands over no descriptors, and Python has no Unix sockets there", allow_module_level=True)

WAYS = {
    "alone": (),
    "threads": ("--threads",),
    "workers": ("--workers", "2"),
    "worker threads": ("--workers", "2", "--worker-threads"),
}

every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names for Unix sockets")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listener that somebody else has made."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@every_way
def test_ipv6(way: tuple[str, ...]) -> None:
    with serving(*way, "-q", address="[::1]:0") as served:
        assert served.address[0] == "::1"
        for _ in range(4):
            echo(served.address)
        served.stop()


@every_way
def test_a_unix_socket(way: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "echo"
    leave_behind(path)
    with serving(*way, "-q", address=f"unix:{path}") as served:
        for _ in range(4):
            echo(str(path))
        served.stop()
    assert not path.exists()


def leave_behind(path: Path) -> None:
    """The file of a Unix socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


@linux
@every_way
def test_an_abstract_name(way: tuple[str, ...], tmp_path: Path) -> None:
    name = f"muxio-test-{os.getpid()}"
    with serving(*way, "-q", address=f"unix:@{name}") as served:
        assert served.first.startswith(f"listening on @{name} ")
        echo(f"\0{name}")
        again = run("serve", f"unix:@{name}", *way)
        assert (again.returncode, again.stderr.count("\n")) == (2, 1)
        assert again.stderr.startswith(f"muxio serve: cannot serve at @{name}: ")
        served.stop()


@every_way
def test_an_inherited_listener_and_who_waits_at_it_already(way: tuple[str, ...], listener: socket.socket) -> None:
    fd = listener.fileno()
    with (
        connect(listener.getsockname()) as waiting,
        serving(*way, "-q", address=f"fd:{fd}", pass_fds=[fd]) as served,
    ):
        assert served.address == listener.getsockname()
        waiting.sendall(b"x")
        assert waiting.recv(1) == b"x"
        waiting.close()
        for _ in range(4):
            echo(served.address)
        served.stop()
    with connect(listener.getsockname()):  # it is whose it was, and still listens
        listener.accept()[0].close()


@pytest.mark.parametrize("make", [Server, ThreadedServer], ids=["Server", "ThreadedServer"])
def test_a_server_takes_a_socket_over(make: Any, listener: socket.socket) -> None:
    ours = listener.dup()
    server = make(ours, EchoProtocol) if make is Server else make(ours)
    with serving_in_a_thread(server) as address:
        assert address == listener.getsockname()
        echo(address)
    assert ours.fileno() == -1


def test_a_socket_that_is_only_bound_is_made_to_listen() -> None:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    with serving_in_a_thread(Server(sock, EchoProtocol)) as address:
        echo(address)


def test_a_socket_that_is_no_stream_is_refused_and_stays_whose_it_is() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with pytest.raises(ValueError, match="stream"):
            Server(sock, EchoProtocol)
        assert sock.fileno() >= 0


def test_a_socket_is_nothing_to_connect_to(listener: socket.socket) -> None:
    with pytest.raises(TypeError, match="connect"):
        resolve(listener)


# The file of a Unix socket


def test_a_file_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    leave_behind(path)
    with serving_in_a_thread(Server(str(path), EchoProtocol)):
        echo(str(path))
    assert not path.exists()


def test_a_socket_that_somebody_listens_on_is_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "echo")
    with serving_in_a_thread(Server(path, EchoProtocol)):
        with pytest.raises(OSError, match=r"[Ii]n use"):
            Server(path, EchoProtocol)
        echo(path)


@every_way
def test_what_is_not_ours_is_left_alone(way: tuple[str, ...], tmp_path: Path) -> None:
    text, datagrams = tmp_path / "text", tmp_path / "datagrams"
    text.write_text("precious")
    with (
        serving_in_a_thread(Server(str(tmp_path / "live"), EchoProtocol)) as live,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind(str(datagrams))
        for path in (live, text, datagrams):
            done = run("serve", f"unix:{path}", *way)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
            assert "in use" in done.stderr
        echo(live)
        assert datagrams.exists()
    assert text.read_text() == "precious"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    with pytest.raises(OSError, match=r"[Ii]n use"):
        Server(str(path), EchoProtocol)
    assert path.read_text() == "precious"


def test_a_file_that_is_somebody_elses_by_now_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with Server(str(path), EchoProtocol):
        path.unlink()
        path.write_text("another")
    assert path.read_text() == "another"


def test_a_file_with_the_inode_of_ours_may_be_somebody_elses(tmp_path: Path) -> None:
    """A server that drains has closed its listener, and so freed the inode: who comes after it may get that."""
    path = str(tmp_path / "echo")
    with listen(path, 1):
        ours = file_of(path)
        os.utime(path, ns=(0, 0))
        remove_file(ours)
        assert os.path.exists(path)
        remove_file(file_of(path))
        assert not os.path.exists(path)
        assert file_of(path) is None
        remove_file(ours)  # gone, which is as well


# Bad input


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("fd:99", "fd:99"),
        ("fd:99999999999999999999", "Bad file descriptor"),
        ("fd:0", "fd:0"),
        ("fd:x", "fd:3"),
        ("unix:", "no path"),
        ("unix:@", "no path"),
        ("unix:/no/such/directory/echo", "/no/such/directory/echo"),
    ],
)
def test_bad_addresses_are_one_line_on_stderr_and_status_2(address: str, says: str) -> None:
    for way in WAYS.values():
        done = run("serve", address, *way)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert says in done.stderr


@every_way
@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["datagrams", "packets"])
def test_an_inherited_socket_that_is_no_stream_is_told(kind: int, way: tuple[str, ...]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        command = muxio_command("serve", f"fd:{theirs.fileno()}", *way)
        done = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "stream" in done.stderr


# A listener that several accept on


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_servers_that_share_a_listener_serve_everybody_and_rest_when_they_are_full(
    backend: str, listener: socket.socket
) -> None:
    servers = [
        Server(listener.dup(), EchoProtocol, backend=backend, shared=True, limits=Limits(connections=2))
        for _ in range(2)
    ]
    address = listener.getsockname()
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(serving_in_a_thread(server))
        clients = [stack.enter_context(connect(address)) for _ in range(6)]
        for client in clients:
            client.sendall(b"x")
        for client in clients[:4]:
            assert client.recv(1) == b"x"
        wait_until(lambda: [server.stats().connections for server in servers] == [2, 2])
        for client in clients[:2]:
            client.close()
        for client in clients[4:]:
            assert client.recv(1) == b"x"  # there is room, so whoever rested goes on


def test_who_is_full_leaves_peers_to_those_who_are_not(backend: str, listener: socket.socket) -> None:
    """Full after exactly one batch: while it is watching all the same, EXCLUSIVE may wake it and nobody else."""
    full, other = (
        Server(listener.dup(), EchoProtocol, backend=backend, shared=True, limits=Limits(connections=ACCEPT_BATCH))
        for _ in range(2)
    )
    with other, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(listener.getsockname())) for _ in range(ACCEPT_BATCH)]
        stack.enter_context(serving_in_a_thread(full))
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        stack.enter_context(serving_in_a_thread(other))
        looked = threading.Event()
        other.loop.call_soon_threadsafe(looked.set)
        assert looked.wait(TIMEOUT)  # those 64 were news to it until then
        time.sleep(0.05)  # while it is not asleep yet, it looks in any case, and this test sees nothing
        late = stack.enter_context(connect(listener.getsockname()))
        late.sendall(b"x")
        assert late.recv(1) == b"x"
        assert (full.stats().connections, other.stats().connections) == (ACCEPT_BATCH, 1)


def test_a_retiring_server_leaves_who_waits_to_the_others(backend: str, listener: socket.socket) -> None:
    old = Server(listener.dup(), EchoProtocol, backend=backend, shared=True)
    thread = threading.Thread(target=old.serve_forever)
    thread.start()
    address = listener.getsockname()
    with old, connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        old.retire(3600)
        old.retire(3600)
        wait_until(lambda: len(old.loop.poller) == 1)  # the client's connection
        with connect(address) as waiting:
            waiting.sendall(b"y")
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            assert old.stats().accepted == 1
            with serving_in_a_thread(Server(listener.dup(), EchoProtocol, backend=backend, shared=True)):
                assert waiting.recv(1) == b"y"
        client.close()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        assert (old.stats().drained, old.stats().cut) == (0, 0)


def test_a_retiring_server_drains_when_its_patience_is_over(backend: str) -> None:
    server = Server(("127.0.0.1", 0), EchoProtocol, backend=backend)
    with serving_in_a_thread(server) as address, connect(address) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        server.retire(0.01, drain=3600)
        assert client.recv(1) == b""
        client.close()
        wait_until(lambda: server.stats().drained == 1)


def test_a_retiring_server_without_clients_is_through(backend: str) -> None:
    server = Server(("127.0.0.1", 0), EchoProtocol, backend=backend)
    server.retire(3600)
    server.serve_forever()
    server.close()


def test_serve_takes_a_socket(listener: socket.socket) -> None:
    """Until its thread's end: a listener that is shut down stops nobody, so this one is stopped by an error."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(listener.dup(), say=say)
    assert lines[0].startswith(f"listening on 127.0.0.1:{listener.getsockname()[1]}")
