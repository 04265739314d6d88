"""For every test: a line that says what is tested, and a check that nothing was left behind."""

from __future__ import annotations

import gc
import os
import platform
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import wait_until

pytest.register_assert_rewrite("muxio.testing.conformance", "muxio.testing.model")  # before a test module imports them

SETTLE_SECONDS = 2.0  # for what is just ending: a thread after its last line, a child that was told to stop

Identity = tuple[object, ...]


def pytest_report_header() -> str:
    backend = os.environ.get("MUXIO_BACKEND")
    forced = f"MUXIO_BACKEND={backend}" if backend else "MUXIO_BACKEND not set"
    return f"muxio: {platform.python_implementation()} {platform.python_version()} on {platform.platform()}, {forced}"


# Each of the three looks returns {identity: description}. An identity is more than a number, for numbers are used
# again: a test that closes a descriptor that was there before and leaves another under its number has leaked as well.


def open_descriptors() -> dict[Identity, str]:
    """The open file descriptors. Windows has no list of them: there only threads are checked."""
    if sys.platform == "win32":
        return {}
    found: dict[Identity, str] = {}
    for fd in _descriptor_numbers():
        try:
            status = os.fstat(fd)
        except OSError:  # closed by now: the one that listed the others, for example
            continue
        found["descriptor", fd, status.st_dev, status.st_ino] = f"descriptor {fd}: {_target_of(fd, status)}"
    return found


def _descriptor_numbers() -> list[int]:
    if sys.platform == "linux":
        return [int(name) for name in os.listdir("/proc/self/fd")]
    # /dev/fd lists all on macOS; on FreeBSD it knows only 0 to 2 as long as fdescfs is not mounted there.
    directory = os.open("/dev/fd", os.O_RDONLY)
    try:
        listed = [int(name) for name in os.listdir("/dev/fd") if name.isdecimal()]
    finally:
        os.close(directory)
    return listed if directory in listed else list(range(1024))


def _target_of(fd: int, status: os.stat_result) -> str:
    if sys.platform == "linux":
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}")
    return stat.filemode(status.st_mode)


def running_threads() -> dict[Identity, str]:
    return {("thread", thread): repr(thread) for thread in threading.enumerate()}


def child_processes() -> dict[Identity, str]:
    """The children that nobody has waited for, zombies included.

    Asking whether there are any is cheap and usually the end of it. Where that cannot be asked (Windows, macOS before
    Python 3.13), children are not checked.
    """
    if sys.platform == "win32" or not hasattr(os, "waitid"):
        return {}
    with suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return {("process", pid): f"process {pid}: {command}" for pid, command in _children()}
    return {}


def _children() -> Iterator[tuple[int, str]]:
    if sys.platform != "linux":
        every = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "args="]
        with subprocess.Popen(every, stdout=subprocess.PIPE, text=True) as ps:
            lines = ps.communicate()[0].splitlines()
        for pid, parent, *command in (line.split(maxsplit=2) for line in lines):
            if int(parent) == os.getpid() and int(pid) != ps.pid:
                yield int(pid), " ".join(command)
        return
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with suppress(OSError):  # it may end while we look
                name, _, rest = (directory / "stat").read_text().partition("(")[2].rpartition(")")
                state, parent = rest.split()[:2]
                if int(parent) == os.getpid():
                    arguments = (directory / "cmdline").read_text().replace("\0", " ").strip()
                    yield int(directory.name), "ended, but not waited for" if state == "Z" else arguments or name


def _kept_by_multiprocessing() -> set[int]:
    """Process ids and descriptors of the helpers that multiprocessing starts once and keeps for good."""
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    kept = (
        getattr(tracker, "_pid", None),
        getattr(tracker, "_fd", None),
        getattr(server, "_forkserver_pid", None),
        getattr(server, "_forkserver_alive_fd", None),
    )
    return {number for number in kept if number is not None}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listener that somebody else has made."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


LOOKS: tuple[Callable[[], dict[Identity, str]], ...] = (open_descriptors, running_threads, child_processes)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a thread or a child process behind."""
    before = {identity for look in LOOKS for identity in look()}
    yield

    def left() -> dict[Identity, str]:
        return {
            identity: description
            for look in LOOKS
            for identity, description in look().items()
            if identity not in before and identity[1] not in _kept_by_multiprocessing()
        }

    if not left():
        return
    gc.collect()  # what only a cycle still held is not a leak; ResourceWarnings tell whether it should have been closed
    with suppress(AssertionError):
        wait_until(lambda: not left(), timeout=SETTLE_SECONDS)
    if remaining := left():
        pytest.fail("the test left behind:\n" + "\n".join(f"  {text}" for text in remaining.values()), pytrace=False)
