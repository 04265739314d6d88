"""What a poller needs of a kernel facility: the contract that every backend file fulfils."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys

TYPE_CHECKING = False  # importing collections.abc or typing is not for free
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Reported by a facility for a descriptor that is no longer open; poll(2)'s POLLNVAL. Never leaves the poller.
INVALID = 0x20


class Facility:
    """One kernel facility, opened.

    The poller calls `wait` from one thread at a time, and everything else under its lock; all of that may come while
    `wait` blocks in another thread.
    """

    name: str
    #: Every combination of interest and modes that can be registered -> what `add` and `modify` are told for it. The
    #: poller looks it up, and refuses what is not in here.
    masks: dict[int, int]
    #: Whether a wait that is under way notices changes made by another thread. If not, the poller interrupts it.
    sees_changes: bool
    #: Whether the kernel may go on reporting a number after its descriptor was closed (then `verify` and `renew`).
    outlives_close = False
    #: Whether `wait` may be called to look, with no time, while another thread is in it.
    lets_look = True
    #: Whether a finite wait is better begun with a look, a wait of no time: it costs less than to ask what time it is.
    looks_first = False
    #: How many seconds late `wait` may be. Where that is more than 0, `wait_finely` is better.
    coarseness = 0.0
    #: The number under which `wait` reports a wake-up.
    wake_fd: int

    __slots__ = ()

    def add(self, fd: int, mask: int) -> None:
        """Watch `fd`. OSError: EBADF, EPERM (files, directories), EEXIST where the kernel watches this very file."""
        raise NotImplementedError

    def modify(self, fd: int, mask: int) -> None:
        """Change what is watched, and arm it again. OSError where the kernel has lost the descriptor."""
        raise NotImplementedError

    def remove(self, fd: int) -> None:
        """Watch `fd` no more. OSError where the kernel has lost the descriptor."""
        raise NotImplementedError

    def disarm(self, fd: int, mask: int) -> None:
        """Report `fd`, registered with `mask`, no more until `modify`. It may be closed already."""
        raise NotImplementedError

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        """Wait for events: (number, bits) pairs, each number once, at most `max_events` and one for the wake-up.

        timeout: seconds, at most a day; None for ever. It may come back empty before the time is over.
        """
        raise NotImplementedError

    def wait_finely(self, timeout: float, max_events: int) -> list[tuple[int, int]]:
        """`wait`, with the best resolution there is, for a short time (at most `coarseness`)."""
        return self.wait(timeout, max_events)

    def wake(self) -> None:
        """Make the current or the next `wait` report `wake_fd`. Never blocks."""
        raise NotImplementedError

    def drain(self) -> None:
        """Take back all wake-ups so far."""
        raise NotImplementedError

    def verify(self, fd: int, events: int) -> int:
        """Which of the bits reported for a number hold for the file that has the number now."""
        return events

    def renew(self, watched: Iterable[tuple[int, int]]) -> None:
        """Get rid of everything that outlived its descriptor: begin anew with these (number, mask) pairs."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the descriptors back."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A descriptor that polls readable while something is ready."""
        raise io.UnsupportedOperation(f"the {self.name} backend has no descriptor of its own")


def refuse_files(fd: int) -> None:
    """Raise for what is always ready, as epoll_ctl(2) does: EPERM for regular files and directories, EBADF."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        raise PermissionError(errno.EPERM, "a regular file or a directory cannot be polled", fd)


def take_turns(ready: list[tuple[int, int]], turn: int, max_events: int) -> list[tuple[int, int]]:
    """A different `max_events` of the ready ones each turn, where the kernel returns all and rotates nothing."""
    start = turn * max_events % len(ready)
    return (ready[start:] + ready[:start])[:max_events]


#: How many seconds Windows' facilities wait at a time in the main thread.
SIGNALS_WAIT = 0.1


def until_signals(timeout: float | None) -> float | None:
    """How long a wait may last, so that CPython can run the handlers of signals: on Windows, no more than SIGNALS_WAIT.

    A signal interrupts no wait there: Ctrl-C and Ctrl-Break are noted by a thread of the system's own, and the handler,
    the one that raises KeyboardInterrupt too, runs when the main thread is back in Python. So that it is soon, the main
    thread waits in slices. This needs nothing that there is one of in a process, as signal.set_wakeup_fd() would, and
    works for every signal, with a console or without one.
    """
    if sys.platform == "win32" and (timeout is None or timeout > SIGNALS_WAIT):
        import threading

        if threading.get_ident() == threading.main_thread().ident:
            return SIGNALS_WAIT
    return timeout
