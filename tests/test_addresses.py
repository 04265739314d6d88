"""Where servers listen: TCP, IPv6, Unix sockets and inherited listeners, for every way to serve."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, wait_until
from helpers import serving as serving_in_a_thread
from programs import TIMEOUT, connect, echo, muxio_command, run, serving

from muxio.server import EchoProtocol, Limits, Server, ThreadedServer, serve
from muxio.server.sockets import resolve

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
    with serving(*way, "-q", address=f"unix:{path}") as served:
        for _ in range(4):
            echo(str(path))
        served.stop()
    assert path.exists() == ("--threads" in way)  # the oracle leaves it, as socketserver does


@linux
@every_way
def test_an_abstract_name(way: tuple[str, ...], tmp_path: Path) -> None:
    name = f"muxio-test-{os.getpid()}"
    with serving(*way, "-q", address=f"unix:@{name}") as served:
        assert served.first.startswith(f"listening on @{name} ")
        echo(f"\0{name}")
        served.stop()


@every_way
def test_an_inherited_listener(way: tuple[str, ...], listener: socket.socket) -> None:
    fd = listener.fileno()
    with serving(*way, "-q", address=f"fd:{fd}", pass_fds=[fd]) as served:
        assert served.address == listener.getsockname()
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
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving_in_a_thread(Server(str(path), EchoProtocol)):
        echo(str(path))
    assert not path.exists()


def test_a_socket_that_somebody_listens_on_is_in_use(tmp_path: Path) -> None:
    path = str(tmp_path / "echo")
    with serving_in_a_thread(Server(path, EchoProtocol)):
        with pytest.raises(OSError, match=r"[Ii]n use"):
            Server(path, EchoProtocol)
        echo(path)


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


# Bad input


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("fd:99", "fd:99"),
        ("fd:0", "fd:0"),
        ("fd:x", "fd:3"),
        ("unix:", "no path"),
        ("unix:/no/such/directory/echo", "/no/such/directory/echo"),
    ],
)
def test_bad_addresses_are_one_line_on_stderr_and_status_2(address: str, says: str) -> None:
    for way in WAYS.values():
        done = run("serve", address, *way)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert says in done.stderr


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["datagrams", "packets"])
def test_an_inherited_socket_that_is_no_stream_is_told(kind: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        command = muxio_command("serve", f"fd:{theirs.fileno()}")
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
