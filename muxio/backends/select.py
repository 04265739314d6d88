"""select(2), on every system."""

from __future__ import annotations

import errno
import io
import os
import select
import sys

from muxio.backends.facility import INVALID, Facility, refuse_files, take_turns
from muxio.backends.waker import Waker
from muxio.events import ERROR, INTEREST, ONESHOT, PRIORITY, READ, WRITE, combinations

#: How many descriptors a set holds. Elsewhere it is the highest number plus one; on Windows, where a set is a list,
#: it is what CPython was compiled with (selectmodule.c).
_FD_SETSIZE = 512 if sys.platform == "win32" else 1024


class Backend(Facility):
    name = "select"
    masks = combinations(INTEREST | ONESHOT)
    sees_changes = False

    __slots__ = ("_priority", "_read", "_turn", "_waker", "_write", "wake_fd")

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._write: set[int] = set()
        self._priority: set[int] = set()
        self._turn = 0
        self._waker = Waker()
        self.wake_fd = self._waker.fd
        self._read.add(self.wake_fd)

    def add(self, fd: int, mask: int) -> None:
        if sys.platform == "win32":
            full = len(self._read | self._write | self._priority) >= _FD_SETSIZE
        else:
            full = fd >= _FD_SETSIZE
        if full:
            raise io.UnsupportedOperation(f"select() cannot watch descriptor {fd}: its limit is {_FD_SETSIZE}")
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        if sys.platform == "win32":
            select.select([fd], [], [], 0)  # fails for what is closed or no socket
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
            urgent += writers  # Winsock reports a refused connect in the except set only
        try:
            readable, writable, exceptional = select.select(readers, writers, urgent, timeout)
        except OSError as error:
            if error.errno not in (errno.EBADF, getattr(errno, "WSAENOTSOCK", errno.EBADF)):
                raise
            return [(fd, INVALID) for fd in {*readers, *writers, *urgent} if _is_closed(fd)][:max_events]
        ready = dict.fromkeys(readable, READ)
        for fd in writable:
            ready[fd] = ready.get(fd, 0) | WRITE
        for fd in exceptional:
            refused = sys.platform == "win32" and fd not in self._priority
            ready[fd] = ready.get(fd, 0) | (WRITE | ERROR if refused else PRIORITY)
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
