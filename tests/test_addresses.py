"""Where servers listen: TCP, IPv6, Unix sockets and inherited listeners, for every way to serve."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import serving as serving_in_a_thread
from programs import TIMEOUT, WAYS, connect, echo, every_way, muxio_command, run, serving

from muxio.server import EchoProtocol, Server
from muxio.server.sockets import file_of, listen, remove_file

if sys.platform == "win32":
    pytest.skip("Windows hands over no descriptors, and Python has no Unix sockets there", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has abstract names for Unix sockets")


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
