"""kqueue(2), the BSDs and macOS."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

from muxio.backends.facility import INVALID, Facility, refuse_files
from muxio.backends.waker import Waker
from muxio.events import EDGE, ERROR, HANGUP, ONESHOT, PRIORITY, READ, READ_CLOSED, WRITE, combinations

#: <sys/event.h> has them on all these systems, the select module does not name them.
_EV_RECEIPT = 0x40
_EV_DISPATCH = 0x80

#: EVFILT_EXCEPT and its NOTE_OOB, from each system's <sys/event.h>. FreeBSD and NetBSD have no such filter.
_EXCEPT = {"darwin": (-15, 0x2), "dragonfly": (-8, 0x2), "openbsd": (-9, 0x4)}


#: EV_EOF is about one direction. Within `wait` a number carries this bit for the other one; both make a hang-up.
_WRITE_CLOSED = 1 << 32
_ENDED = READ_CLOSED | _WRITE_CLOSED


class Kevent(Protocol):
    """select.kevent, as far as it is used here."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int


class Kqueue(Protocol):
    """select.kqueue, as far as it is used here."""

    def control(
        self, changelist: Sequence[Kevent] | None, max_events: int, timeout: float | None = None, /
    ) -> list[Kevent]: ...
    def close(self) -> None: ...
    def fileno(self) -> int: ...


class KqueueModule(Protocol):
    """The select module of a system with kqueue, as far as it is used here; the tests have a double of it."""

    KQ_FILTER_READ: int
    KQ_FILTER_WRITE: int
    KQ_EV_ADD: int
    KQ_EV_DELETE: int
    KQ_EV_ENABLE: int
    KQ_EV_CLEAR: int
    KQ_EV_EOF: int
    KQ_EV_ERROR: int

    def kqueue(self) -> Kqueue: ...
    def kevent(self, ident: int, filter: int, flags: int, fflags: int, /) -> Kevent: ...


def _native() -> KqueueModule:
    import select

    if not hasattr(select, "kqueue"):
        raise ImportError("kqueue is a facility of the BSDs and macOS")
    module: KqueueModule = select  # type: ignore[assignment, unused-ignore]
    return module


class Backend(Facility):
    """Each bit of interest is a filter of its own, and so an event of its own: `wait` makes one of them.

    ONESHOT is `disarm` here: EV_ONESHOT and EV_DISPATCH would disarm one filter of a descriptor and not the other.
    """

    name = "kqueue"
    sees_changes = True

    __slots__ = ("_filters", "_fired", "_interest", "_kqueue", "_module", "_oob", "_pid", "_waker", "masks", "wake_fd")

    def __init__(self, module: KqueueModule | None = None, system: str = sys.platform) -> None:
        self._module = module or _native()
        #: (bit, filter, fflags) for each bit of interest that this system has a filter for.
        self._interest = [(READ, self._module.KQ_FILTER_READ, 0), (WRITE, self._module.KQ_FILTER_WRITE, 0)]
        self._oob = 0
        urgent = _EXCEPT.get(system.rstrip("0123456789"))
        if urgent is not None:
            self._oob = urgent[1]
            self._interest.append((PRIORITY, *urgent))
        self.masks = combinations(EDGE | ONESHOT | sum(bit for bit, _, _ in self._interest))
        #: Filters that reported PRIORITY and rest until the next `wait`. They are the only ones with EV_DISPATCH:
        #: EVFILT_EXCEPT fires at the end of input as well, for as long as that lasts, and nobody asked for that.
        self._fired: list[tuple[int, int, int]] = []
        #: Number -> the filters that are in the kernel for it.
        self._filters: dict[int, list[int]] = {}
        self._pid = os.getpid()
        self._kqueue = self._module.kqueue()
        try:
            self._waker = Waker()
        except OSError:
            self._kqueue.close()
            raise
        self.wake_fd = self._waker.fd
        self.modify(self.wake_fd, READ)

    def add(self, fd: int, mask: int) -> None:
        refuse_files(fd)
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        self.disarm(fd, mask)  # EV_ADD does not change the mode of a filter that is there (FreeBSD kern_event.c)
        add = self._module.KQ_EV_ADD | self._module.KQ_EV_ENABLE
        changes = []
        for bit, number, note in self._interest:
            if mask & bit:
                mode = self._module.KQ_EV_CLEAR if mask & EDGE else _EV_DISPATCH if bit == PRIORITY else 0
                changes.append(self._module.kevent(fd, number, add | mode, note))
        self._filters[fd] = [change.filter for change in changes]
        trouble = self._change(changes)
        if trouble:
            self.disarm(fd, mask)
            raise OSError(trouble, os.strerror(trouble))

    def remove(self, fd: int) -> None:
        self.disarm(fd, 0)

    def disarm(self, fd: int, mask: int) -> None:
        # A filter may be gone already, with its descriptor: ENOENT or EBADF, the systems differ. Both are fine.
        flags = self._module.KQ_EV_DELETE
        self._change(self._module.kevent(fd, number, flags, 0) for number in self._filters.pop(fd, ()))

    def wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        if self._fired:
            enable = self._module.KQ_EV_ENABLE
            self._change(self._module.kevent(fd, number, enable, note) for fd, number, note in self._fired)
            self._fired.clear()
        found: dict[int, int] = {}
        for event in self._kqueue.control(None, max_events, timeout):
            found[event.ident] = found.get(event.ident, 0) | self._bits(event)
        for fd, bits in found.items():
            if bits & _ENDED == _ENDED:
                found[fd] |= HANGUP
        return [(fd, bits & ~_WRITE_CLOSED) for fd, bits in found.items() if bits]

    def wake(self) -> None:
        self._waker.wake()

    def drain(self) -> None:
        self._waker.drain()

    def close(self) -> None:
        if os.getpid() == self._pid:
            self._kqueue.close()
        else:
            # A kqueue is not inherited over fork(2): its number may be somebody else's in the child. Keep the object,
            # so that not even its destructor closes that.
            _not_ours.append(self._kqueue)
        self._waker.close()

    def fileno(self) -> int:
        return self._kqueue.fileno()

    def _change(self, changes: Iterable[Kevent]) -> int:
        """Apply changes; returns the errno of the last that failed, or 0.

        With EV_RECEIPT each change answers with an entry of its own, and there is room for just these: so no failure
        cuts the others off, and no event is taken out of the kqueue by the way (polling#64, mio#911).
        """
        receipts = list(changes)
        for change in receipts:
            change.flags |= _EV_RECEIPT
        answers = self._kqueue.control(receipts, len(receipts), 0) if receipts else ()
        return next((answer.data for answer in reversed(answers) if answer.data), 0)

    def _bits(self, event: Kevent) -> int:
        if event.flags & self._module.KQ_EV_ERROR:
            return INVALID
        ended = event.flags & self._module.KQ_EV_EOF
        bits = ERROR if ended and event.fflags else 0  # with EV_EOF, fflags is the socket's error
        if event.filter == self._module.KQ_FILTER_READ:
            bits |= READ
            if ended:
                bits |= HANGUP if _is_pipe(event.ident) else READ_CLOSED
        elif event.filter == self._module.KQ_FILTER_WRITE:
            bits |= WRITE
            if ended:  # on a socket it may be our own SHUT_WR (FreeBSD filt_sowrite)
                bits |= ERROR if _is_pipe(event.ident) else _WRITE_CLOSED
        elif not ended and event.fflags & self._oob:
            bits |= PRIORITY
            self._fired.append((event.ident, event.filter, self._oob))
        return bits


_not_ours: list[Kqueue] = []


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False  # closed by another thread meanwhile
