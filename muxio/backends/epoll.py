"""epoll(7), Linux."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError("epoll is a facility of Linux")

import os
import select
import time
from collections.abc import Iterable

from muxio.backends.facility import INVALID, Facility
from muxio.backends.waker import Waker
from muxio.events import EDGE, EXCLUSIVE, INTEREST, MODES, ONESHOT, READ, READ_CLOSED, combinations

#: select() takes descriptors below FD_SETSIZE only, 1024 in glibc and musl.
_SELECTABLE = 1024


def _mask(events: int) -> int:
    """What epoll_ctl(2) is told: the bits are the same but for two of the kernel's habits.

    EPOLLRDHUP comes with READ, but not beside EPOLLEXCLUSIVE (EINVAL, epoll_ctl(2)). ERR and HUP are reported at
    every call even with an empty interest [measured, Linux 6.18]; with EPOLLET they come once.
    """
    if events & READ and not events & EXCLUSIVE:
        events |= READ_CLOSED
    return events if events & INTEREST else events | EDGE


_MASKS = {events: _mask(events) for events in combinations(INTEREST | MODES)}

#: Whether epoll.poll() understands None as for ever; PyPy's wants -1.
_TAKES_NONE = sys.implementation.name == "cpython"


class Backend(Facility):
    name = "epoll"
    masks = _MASKS
    sees_changes = True
    outlives_close = True
    looks_first = True  # a finite epoll.poll() asks for the time as well
    coarseness = 0.001  # epoll_wait(2) counts milliseconds, and CPython rounds up to them

    __slots__ = ("_epoll", "_waker", "add", "modify", "remove", "wait", "wake_fd")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # These are epoll's own, unwrapped: a call through Python would cost a tenth of registering a socket, and a
        # tenth of a poll with one event.
        self.add = self._epoll.register  # type: ignore[method-assign, assignment, unused-ignore]
        self.modify = self._epoll.modify  # type: ignore[method-assign, assignment, unused-ignore]
        self.remove = self._epoll.unregister  # type: ignore[method-assign, unused-ignore]
        self.wait = self._epoll.poll if _TAKES_NONE else self._wait  # type: ignore[method-assign, assignment, unused-ignore]
        try:
            self._waker = Waker()
        except OSError:
            self._epoll.close()
            raise
        self.wake_fd = self._waker.fd
        self._epoll.register(self.wake_fd, READ)

    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        return self._epoll.poll(-1 if timeout is None else timeout, max_events)

    def disarm(self, fd: int, mask: int) -> None:
        if mask & ONESHOT:
            return  # the kernel has done it
        try:
            self._epoll.modify(fd, EDGE)
        except OSError:
            pass  # closed, and dropped by the kernel

    def wait_finely(self, timeout: float, max_events: int) -> list[tuple[int, int]]:
        fd = self._epoll.fileno()
        if fd < _SELECTABLE:
            # An epoll is readable while it has events, and select() counts microseconds.
            select.select([fd], [], [], timeout)
            return self._epoll.poll(0, max_events)
        if sys.version_info >= (3, 13) and timeout > 0:
            return self._wait_with_timer(timeout, max_events)
        return self._epoll.poll(timeout, max_events)

    if sys.version_info >= (3, 13):

        def _wait_with_timer(self, timeout: float, max_events: int) -> list[tuple[int, int]]:
            """The epoll watches a timer of nanoseconds as well (timerfd_create(2)), for this once."""
            timer = os.timerfd_create(time.CLOCK_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)
            try:
                os.timerfd_settime(timer, initial=timeout)
                self._epoll.register(timer, READ)
                return [(fd, events) for fd, events in self._epoll.poll(-1, max_events) if fd != timer]
            finally:
                os.close(timer)

    def wake(self) -> None:
        self._waker.wake()

    def drain(self) -> None:
        self._waker.drain()

    def verify(self, fd: int, events: int) -> int:
        """poll(2) asks the file that has the number; epoll may speak of an older one that a dup keeps alive.

        Closing a descriptor removes it from an epoll only when it was the last one of its open file (epoll(7), Q6).
        """
        probe = select.poll()
        probe.register(fd, events)
        found = dict(probe.poll(0)).get(fd, 0)
        return 0 if found & INVALID else events & found

    def renew(self, watched: Iterable[tuple[int, int]]) -> None:
        """A new epoll under the old one's number. Another epoll that watched the old one does not see it."""
        fresh = select.epoll()
        try:
            fresh.register(self.wake_fd, READ)
            for fd, mask in watched:
                try:
                    fresh.register(fd, mask)
                except OSError:
                    pass  # closed meanwhile; it stays listed until it is unregistered
            os.dup2(fresh.fileno(), self._epoll.fileno(), inheritable=False)
        finally:
            fresh.close()

    def close(self) -> None:
        self._epoll.close()
        self._waker.close()

    def fileno(self) -> int:
        return self._epoll.fileno()
