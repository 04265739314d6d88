"""poll(2), on every system but Windows."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("Windows has no poll()")

import math
import select

from muxio.backends.facility import Facility, refuse_files, take_turns
from muxio.backends.waker import Waker
from muxio.events import INTEREST, ONESHOT, READ, READ_CLOSED, combinations

#: POLLRDHUP comes with READ; it is Linux's, and PyPy's select module does not name it.
_READ = READ | (READ_CLOSED if sys.platform == "linux" else 0)
_MASKS = {events: events & INTEREST | (_READ if events & READ else 0) for events in combinations(INTEREST | ONESHOT)}


class Backend(Facility):
    name = "poll"
    masks = _MASKS
    sees_changes = False

    __slots__ = ("_poll", "_turn", "_waker", "wake_fd")

    def __init__(self) -> None:
        self._poll = select.poll()
        self._turn = 0
        self._waker = Waker()
        self.wake_fd = self._waker.fd
        self._poll.register(self.wake_fd, READ)

    def add(self, fd: int, mask: int) -> None:
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        refuse_files(fd)
        self._poll.register(fd, mask)

    def remove(self, fd: int) -> None:
        try:
            self._poll.unregister(fd)
        except KeyError:
            pass  # disarmed

    def disarm(self, fd: int, mask: int) -> None:
        self.remove(fd)  # an empty interest would not do: ERR, HUP and NVAL are reported all the same

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        ready = self._poll.poll(None if timeout is None else math.ceil(timeout * 1000))
        if len(ready) <= max_events:
            return ready
        self._turn += 1
        woken = [(fd, events) for fd, events in ready if fd == self.wake_fd]
        return woken + take_turns([pair for pair in ready if pair not in woken], self._turn, max_events)

    def wake(self) -> None:
        self._waker.wake()

    def drain(self) -> None:
        self._waker.drain()

    def close(self) -> None:
        self._waker.close()
