"""A service manager's side: sockets that are handed over, and what it is told; with the real one's tools, if here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import TIMEOUT, echo, muxio_command, run, running, serving

from muxio.server.systemd import Notifier, listen_fds

if sys.platform == "win32":
    pytest.skip("Windows has neither signals for one process nor descriptors to hand over", allow_module_level=True)

UNITS = Path(__file__).parent.parent / "examples" / "systemd"


# What is handed over


def test_descriptors_are_named_and_the_variables_go() -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "web:", "HOME": "/"}
    assert listen_fds(environment) == {3: "web", 4: ""}
    assert environment == {"HOME": "/"}
    assert listen_fds(environment) == {}


def test_what_is_meant_for_another_process_is_not_taken() -> None:
    assert listen_fds({"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}) == {}
    assert listen_fds({"LISTEN_FDS": "1"}) == {}


def test_nonsense_is_told() -> None:
    with pytest.raises(ValueError, match="LISTEN_FDS"):
        listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"})


def handing_over(count: int, *arguments: str) -> list[str]:
    """A command that hands the descriptors from 3 on over as systemd does; exec keeps the process and its number."""
    serve = " ".join(muxio_command("serve", *arguments))
    return ["sh", "-c", f"LISTEN_PID=$$ LISTEN_FDS={count} exec {serve}"]


@contextlib.contextmanager
def descriptor_3() -> Iterator[socket.socket]:
    """A listener that has the number 3 while the block lasts; what had it comes back."""
    kept = os.dup(3) if is_open(3) else None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            os.dup2(listener.fileno(), 3, inheritable=True)
            yield listener
        finally:
            os.close(3)
            if kept is not None:
                os.dup2(kept, 3)
                os.close(kept)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "way",
    [(), ("--threads",), ("--workers", "2"), ("--workers", "2", "--worker-threads")],
    ids=["alone", "threads", "workers", "worker threads"],
)
def test_a_socket_that_is_handed_over_is_served_without_being_named(way: tuple[str, ...]) -> None:
    with descriptor_3() as listener, running(handing_over(1, "-q", *way), pass_fds=[3]) as served:
        assert served.address == listener.getsockname()
        echo(served.address)
        served.stop()


def test_of_several_sockets_one_has_to_be_named() -> None:
    done = subprocess.run(handing_over(2), capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "fd:3" in done.stderr


# What the manager is told


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket of a service manager, and what NOTIFY_SOCKET says of it."""
    name = str(tmp_path / "notify")
    if request.param == "abstract":
        if sys.platform != "linux":
            pytest.skip("only Linux has abstract names for Unix sockets")
        name = f"@muxio-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0") if name.startswith("@") else name)
        sock.settimeout(TIMEOUT)
        yield sock, name


def told(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_the_manager_is_told_of_every_state(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    environment = {**os.environ, "NOTIFY_SOCKET": name}
    before = time.monotonic_ns() // 1000
    with serving("--workers", "2", "-q", env=environment) as served:
        ready = told(sock)
        assert (ready["READY"], ready["STATUS"]) == ("1", served.first)
        served.process.send_signal(signal.SIGHUP)
        reloading = told(sock)
        assert reloading["RELOADING"] == "1"
        assert before < int(reloading["MONOTONIC_USEC"]) < time.monotonic_ns() // 1000
        assert told(sock)["READY"] == "1"
        served.stop(signal.SIGTERM)
    assert told(sock) == {"STOPPING": "1"}
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):  # workers have said nothing
        sock.recv(1)


@pytest.mark.parametrize("way", [(), ("--threads",), ("--workers", "2", "--worker-threads")], ids=" ".join)
def test_every_way_to_serve_says_when_it_is_ready_and_stops(
    way: tuple[str, ...], manager: tuple[socket.socket, str]
) -> None:
    sock, name = manager
    with serving(*way, "-q", env={**os.environ, "NOTIFY_SOCKET": name}) as served:
        assert told(sock)["READY"] == "1"
        served.stop(signal.SIGTERM)
    assert told(sock) == {"STOPPING": "1"}


def test_a_manager_that_is_gone_is_no_trouble() -> None:
    environment = {"NOTIFY_SOCKET": "/no/such/socket"}
    notifier = Notifier(environment)
    notifier.ready("serving")
    assert environment == {}  # children do not speak for us


# The real thing


needs_activate = pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed"
)


@needs_activate
@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["alone", "workers"])
def test_socket_activation_by_systemd(workers: tuple[str, ...], tmp_path: Path) -> None:
    path = str(tmp_path / "echo")
    command = ["systemd-socket-activate", "-l", path, *muxio_command("serve", "-q", *workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening on" in process.stderr.readline()  # the file is there earlier, when nobody listens yet
            echo(path, b"the first one starts it")
            echo(path)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert os.path.exists(path)  # the manager's file, who may start the service again
    assert re.search(r"^2 connections, 25 B in, 25 B out", output, re.MULTILINE)


def test_the_units_are_sound(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = [str(UNITS / name) for name in ("muxio-echo.socket", "muxio-echo.service")]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "muxio" in line]
    assert ours == []


def test_the_units_options_exist() -> None:
    (command,) = re.findall(r"^ExecStart=\S+ -m muxio (.+)$", (UNITS / "muxio-echo.service").read_text(), re.MULTILINE)
    done = run(*command.split(), "no-such-address")
    assert "does not end in a port" in done.stderr  # and nothing else is wrong
