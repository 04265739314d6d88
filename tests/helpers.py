"""What several test modules use."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import muxio
from muxio.server import Loop, Protocol, Server, ThreadedServer, Transport

T = TypeVar("T")

#: The backends to test: all that work here, or the one that MUXIO_BACKEND names.
BACKENDS = [os.environ["MUXIO_BACKEND"]] if os.environ.get("MUXIO_BACKEND") else muxio.backends()

FIRST_PAUSE = 0.0005  # seconds; doubled after each look,
LONGEST_PAUSE = 0.02  # up to this


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Wait until *condition* returns something true, and return that.

    *timeout* is in seconds. *what* says in the error what was waited for; without it, the condition's place does.

    Raises `AssertionError` when the time is over and the condition is still false.
    """
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while not (result := condition()):
        left = deadline - time.monotonic()
        if left <= 0:
            raise AssertionError(f"timed out after {timeout:g} s: {what or _place_of(condition)} is still {result!r}")
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)
    return result


def _place_of(condition: Callable[[], object]) -> str:
    code = getattr(condition, "__code__", None)
    if code is None:
        return repr(condition)
    return f"{condition.__qualname__} at {code.co_filename}:{code.co_firstlineno}"


def open_descriptors() -> int:
    """How many descriptors this process has open; 0 where there is no list of them. (Wine lists Linux's.)"""
    return len(os.listdir("/dev/fd")) if sys.platform != "win32" and os.path.isdir("/dev/fd") else 0


def open_handles() -> int:
    """The same; on Windows, how many handles of any kind."""
    if sys.platform != "win32":
        return open_descriptors()
    import ctypes

    # Each number is asked for: Wine's GetProcessHandleCount always says 0.
    flags = ctypes.c_ulong()
    is_open = ctypes.WinDLL("kernel32").GetHandleInformation
    return sum(bool(is_open(ctypes.c_void_p(number), ctypes.byref(flags))) for number in range(4, 4 * 10_000, 4))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a TCP connection over loopback: one as a server gets it, non-blocking, and the peer's.

    Both have small buffers (some tens of kilobytes), so that the peer's not reading is soon felt.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        listener.listen()
        peer = socket.socket()
        peer.settimeout(10)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        peer.connect(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    return ours, peer


def on_wine() -> bool:
    """As the conformance suite has it. That is imported late: it needs pytest, and programs use this module as well."""
    from muxio.testing import conformance

    return conformance.on_wine()


def receive_reset(sock: socket.socket) -> None:
    """Receive until the connection has ended. ConnectionResetError: by a reset.

    Wine 8.0 receives ``b""`` then, as at an orderly end; but it sends nothing more, not even nothing.
    """
    while sock.recv(65_536):
        pass
    if on_wine():
        try:
            sock.send(b"")
        except BrokenPipeError as error:  # our own write side is shut: there is no telling
            raise ConnectionResetError from error


def needs_resets() -> None:
    """Skip what follows where nobody is told of a reset by receiving."""
    if on_wine():
        import pytest

        pytest.skip("Wine 8.0 receives b'' where Windows raises ConnectionResetError")


def run_until(loop: Loop, condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Run the loop until *condition*, looked at each millisecond, is true; `AssertionError` after *timeout* seconds.

    What the condition raises comes out of here.
    """
    done = False
    raised: list[Exception] = []

    def look() -> None:
        nonlocal done
        try:
            done = bool(condition())
        except Exception as error:
            raised.append(error)
        if done or raised:
            loop.stop()
        else:
            loop.call_later(0.001, look)

    alarm = loop.call_later(timeout, loop.stop)
    loop.call_soon(look)
    loop.run()
    alarm.cancel()
    if raised:
        raise raised[0]
    assert done, f"timed out after {timeout:g} s: {_place_of(condition)} is still false"


def run_turns(loop: Loop, turns: int = 10) -> None:
    """Let the loop look for events so many times without waiting: time enough for what must not happen."""

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        else:
            loop.stop()

    turn(turns)
    loop.run()


class Recorder(Protocol):
    """Writes down what it is told: the callbacks' names in order, the bytes, and with what it was lost."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.received = bytearray()
        self.errors: list[Exception | None] = []

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self.calls.append("connection_made")

    def data_received(self, data: bytes) -> None:
        self.calls.append("data_received")
        self.received += data

    def eof_received(self) -> bool | None:
        self.calls.append("eof_received")
        return None

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    def connection_lost(self, error: Exception | None) -> None:
        self.calls.append("connection_lost")
        self.errors.append(error)


@contextlib.contextmanager
def serving(server: Server | ThreadedServer) -> Iterator[Any]:
    """Serve in a thread, and end with the block. Gives the address."""
    with server:
        thread = threading.Thread(target=server.serve_forever, name="server under test")
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join()
