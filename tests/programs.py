"""``muxio serve`` as people run it: a process of its own, with real signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import on_wine, wait_until

TIMEOUT = 60.0  # seconds after which a test that waits has failed

LISTENING = re.compile(r"listening on (.+) \((.+)\); Ctrl-C stops")

#: The ways to serve, as arguments.
WAYS = {
    "alone": (),
    "threads": ("--threads",),
    "workers": ("--workers", "2"),
    "worker threads": ("--workers", "2", "--worker-threads"),
}

every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)

#: What asks a program to stop, as a service manager does; Windows has Ctrl-Break for that.
STOP: int = getattr(signal, "SIGBREAK", signal.SIGTERM)

#: What Ctrl-C sends; on Windows that cannot be sent to one program, and Ctrl-Break does the same.
INTERRUPT: int = getattr(signal, "SIGBREAK", signal.SIGINT)

#: ``python -m muxio`` that raises the signals whose numbers it reads.
RAISES_SIGNALS = """
import os, runpy, signal, threading

def listen():
    while number := os.read(0, 1):
        signal.raise_signal(number[0])

threading.Thread(target=listen, daemon=True).start()
runpy.run_module("muxio", run_name="__main__", alter_sys=True)
"""


def muxio_command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "muxio", *arguments]


class Served:
    """A running ``muxio serve`` and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, name="what muxio says")
        self._reader.start()
        #: The first line, which says where it listens and by what means.
        self.first = self.wait_for(".*")[0]
        found = LISTENING.fullmatch(self.first)
        assert found, self.first
        self.means = found[2]
        host, colon, port = found[1].rpartition(":")
        #: (host, port), or the path of a Unix socket.
        self.address: Any = (host.strip("[]"), int(port)) if colon else found[1]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def pids(self) -> list[int]:
        """The workers, as the last line about them all says."""
        says = [line for line in self.lines if re.search(r"\d workers?: ", line)]
        return [int(pid) for pid in re.findall(r"\d+", says[-1].rpartition("worker")[2])]

    def wait_for(self, pattern: str, count: int = 1, timeout: float = TIMEOUT) -> list[str]:
        """Wait until so many lines match a pattern; returns those that do."""

        def matching() -> list[str]:
            return [line for line in self.lines if re.fullmatch(pattern, line)]

        wait_until(lambda: len(matching()) >= count or not self._reader.is_alive(), timeout, f"{pattern!r} in output")
        assert len(matching()) >= count, f"{pattern!r} is not in {self.lines!r}"
        return matching()

    def send(self, number: int) -> None:
        """Send a signal. Windows knows Ctrl-Break only, to a group of processes; Wine 8.0 not even that."""
        if sys.platform != "win32":
            self.process.send_signal(number)
        elif not on_wine():
            self.process.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            assert self.process.stdin is not None
            self.process.stdin.write(chr(number))
            self.process.stdin.flush()

    def stop(
        self, number: int = INTERRUPT, clients: Sequence[socket.socket] = (), status: int = 0, says: str = ""
    ) -> list[str]:
        """Send a signal and return the lines that came since the first, until the end, which has to be in order.

        These clients are connected; they see EOF, and leave.
        """
        self.send(number)
        for client in clients:
            assert client.recv(1) == b""
            client.close()
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        assert (self.process.wait(TIMEOUT), errors) == (status, says)
        self._reader.join()
        return self.lines[1:]


@contextlib.contextmanager
def serving(*arguments: str, address: str = "127.0.0.1:0", **how: Any) -> Iterator[Served]:
    """Run ``muxio serve``. With `how` as subprocess.Popen takes it."""
    command = muxio_command("serve", *([address] if address else []), *arguments)
    if sys.platform == "win32":
        how["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
        if on_wine():
            place = command.index("-m")
            command[place : place + 2] = ["-c", RAISES_SIGNALS]
            how["stdin"] = subprocess.PIPE
    with running(command, **how) as served:
        yield served


@contextlib.contextmanager
def running(command: Sequence[str], **how: Any) -> Iterator[Served]:
    """Run a program that serves as ``muxio serve`` does."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how) as process:
        try:
            yield Served(process)
        finally:
            if process.poll() is None:
                process.kill()


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of muxio's until it ends."""
    return subprocess.run(
        muxio_command(*arguments),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def echo(address: Any, data: bytes = b"hi") -> None:
    """Be served once, in order."""
    with connect(address) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as stream:
            assert stream.read() == data


def connect(address: Any) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address, TIMEOUT)
    if sys.platform == "win32":
        raise NotImplementedError("Python has no Unix sockets on Windows")
    client = socket.socket(socket.AF_UNIX)
    try:
        client.settimeout(TIMEOUT)
        client.connect(address)
    except OSError:
        client.close()
        raise
    return client


def ended(pid: int) -> bool:
    """Whether a process that is no child of ours has ended; whoever it was left to may not have noticed yet."""
    if sys.platform == "win32":  # where kill(pid, 0) is Ctrl-C
        return _ended(pid)
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # no /proc here, or gone just now
        return Path("/proc/self").exists()


if sys.platform == "win32":
    import ctypes

    def _ended(pid: int) -> bool:
        kernel32 = ctypes.WinDLL("kernel32")
        kernel32.OpenProcess.restype = ctypes.c_void_p
        kernel32.WaitForSingleObject.argtypes = (ctypes.c_void_p, ctypes.c_ulong)
        kernel32.CloseHandle.argtypes = (ctypes.c_void_p,)
        synchronize = 0x00100000
        process = kernel32.OpenProcess(synchronize, False, pid)
        if not process:
            return True
        try:
            return bool(kernel32.WaitForSingleObject(process, 0) == 0)  # WAIT_OBJECT_0: it has ended
        finally:
            kernel32.CloseHandle(process)
