"""select(2), on every system."""

from __future__ import annotations

import errno
import io
import os
import select
import sys

from muxio.backends.facility import INVALID, Facility, refuse_files, take_turns, until_signals
from muxio.backends.waker import Waker
from muxio.events import ERROR, INTEREST, ONESHOT, PRIORITY, READ, WRITE, combinations

#: How many descriptors a set holds. Elsewhere it is the highest number plus one; on Windows, where a set is a list,
#: it is what CPython was compiled with (selectmodule.c).
_FD_SETSIZE = 512 if sys.platform == "win32" else 1024


class Backend(Facility):
    name = "select"
    masks = combinations(INTEREST | ONESHOT)
    sees_changes = False

    __slots__ = ("_connecting", "_priority", "_read", "_turn", "_waker", "_write", "wake_fd")

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._write: set[int] = set()
        self._priority: set[int] = set()
        #: On Windows, those of `_write` that are not connected yet.
        self._connecting: set[int] = set()
        self._turn = 0
        self._waker = Waker()
        self.wake_fd = self._waker.fd
        self._read.add(self.wake_fd)

    def add(self, fd: int, mask: int) -> None:
        if sys.platform != "win32" and fd >= _FD_SETSIZE:
            raise io.UnsupportedOperation(f"select() cannot watch descriptor {fd}: its limit is {_FD_SETSIZE}")
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        if sys.platform == "win32":
            select.select([fd], [], [], 0)  # fails for what is closed or no socket
            if mask & INTEREST and len({fd}.union(self._read, self._write, self._priority)) > _FD_SETSIZE:
                raise io.UnsupportedOperation(f"select() watches {_FD_SETSIZE} sockets and no more; afd does")
        else:
            refuse_files(fd)
        self._watch(fd, mask)

    def remove(self, fd: int) -> None:
        self._watch(fd, 0)

    def disarm(self, fd: int, mask: int) -> None:
        self._watch(fd, 0)

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        # Copies: another thread may change the sets while select() walks them.
        readers, writers, urgent = list(self._read), list(self._write), list(self._priority)
        if sys.platform == "win32":
            urgent += self._connecting.difference(urgent)
            timeout = until_signals(timeout)
        try:
            readable, writable, exceptional = select.select(readers, writers, urgent, timeout)
        except OSError as error:
            if error.errno not in (errno.EBADF, getattr(errno, "WSAENOTSOCK", errno.EBADF)):
                raise
            return [(fd, INVALID) for fd in {*readers, *writers, *urgent} if _is_closed(fd)][:max_events]
        ready = dict.fromkeys(readable, READ)
        for fd in writable:
            ready[fd] = ready.get(fd, 0) | WRITE
        if self._connecting:
            self._connecting.difference_update(writable)
        for fd in exceptional:
            if sys.platform == "win32" and not _is_connected(fd):
                ready[fd] = ready.get(fd, 0) | WRITE | ERROR
            elif fd in self._priority:
                ready[fd] = ready.get(fd, 0) | PRIORITY
            else:
                self._connecting.discard(fd)  # urgent data, which nobody asked for
        if len(ready) <= max_events:
            return list(ready.items())
        self._turn += 1
        woken = ready.pop(self.wake_fd, 0)
        turn = take_turns(list(ready.items()), self._turn, max_events)
        return [(self.wake_fd, woken), *turn] if woken else turn

    def wake(self) -> None:
        self._waker.wake()

    def drain(self) -> None:
        self._waker.drain()

    def close(self) -> None:
        self._waker.close()

    def _watch(self, fd: int, events: int) -> None:
        for bit, watched in ((READ, self._read), (WRITE, self._write), (PRIORITY, self._priority)):
            if events & bit:
                watched.add(fd)
            else:
                watched.discard(fd)
        if sys.platform == "win32":
            # Winsock's select() tells of a refused connect in the except set only, as it does of urgent data.
            if events & WRITE and not _is_connected(fd):
                self._connecting.add(fd)
            else:
                self._connecting.discard(fd)


def _is_closed(fd: int) -> bool:
    """Whether `fd` is what made select() fail: one closed descriptor fails the whole call and is not named."""
    try:
        if sys.platform == "win32":
            select.select([fd], [], [], 0)
        else:
            os.fstat(fd)
    except OSError:
        return True
    return False


if sys.platform == "win32":
    import socket

    def _is_connected(fd: int) -> bool:
        """Whether a socket has a peer; or is closed, which select() will tell."""
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)  # the family does not matter here
        except OSError:
            return True
        try:
            sock.getpeername()
        except OSError as error:
            return error.winerror != 10057  # WSAENOTCONN
        finally:
            sock.detach()
        return True
