"""A double of kqueue, for tests of its callers on a Linux that has none.

The names are those of CPython's `select` on FreeBSD and macOS. `FLAVOUR` says whose kernel the next `kqueue()` is, and
`Flavour` is the list of all that differs. The descriptors are real: one epoll a filter watches them, one more waits for
these and for a pipe that stands for EVFILT_USER.

What it does, and who says so ("man": kqueue(2) of FreeBSD and macOS; "FreeBSD": sys/kern/kern_event.c; "XNU":
bsd/kern/kern_event.c; "CPython": Modules/selectmodule.c):

- One knote an (ident, filter); adding it again replaces fflags, data and udata (man, DESCRIPTION and EV_ADD), but not
  EV_ONESHOT, EV_CLEAR and EV_DISPATCH, which stay as they were first added, and it does not enable what is disabled,
  whatever the man page says (FreeBSD kqueue_register, XNU kevent_register). Each touch looks at the condition again.
- EV_DELETE, EV_ENABLE, EV_DISABLE, EV_ONESHOT, EV_CLEAR, EV_DISPATCH, EV_RECEIPT, EV_EOF, EV_ERROR (man, flags).
- Changes come first; if they leave entries in the event list, no event is looked for and nothing waits. An error that
  finds no room for its entry ends the call, later changes are not made (man, RETURN VALUES; FreeBSD kqueue_kevent).
- Closing a descriptor removes its knotes, even while a dup keeps the file open: they belong to the number (FreeBSD and
  XNU knote_fdclose; the man page speaks of the last close).
- EVFILT_READ: the bytes to read in data, EV_EOF when the peer will send no more. EVFILT_WRITE: EV_EOF when nobody will
  read, or after an own shutdown (man, filters; FreeBSD uipc_socket.c filt_soread, filt_sowrite). EVFILT_EXCEPT with
  NOTE_OOB on Darwin. EVFILT_USER with NOTE_TRIGGER.
- max_events counts events, 0 never waits (man, DESCRIPTION). Argument errors and a closed kqueue are as in CPython.

What it does not do: any other filter, NOTE_LOWAT, NOTE_FFAND and its family, regular files (epoll refuses them), a
kqueue that is gone in a forked child, EINTR. data is 1 for a listener's backlog and for EVFILT_WRITE's free space. The
state of a socket is what Linux sees: a fresh TCP socket reads as hung up, while on BSD it is silent. A file is known by
st_dev and st_ino: a number that is reused for the other end of its pipe, or for a dup of its file, is taken for never
closed.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import socket
import stat
import sys
import termios
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

assert sys.platform == "linux"

KQ_FILTER_READ, KQ_FILTER_WRITE = -1, -2
KQ_EV_ADD, KQ_EV_DELETE, KQ_EV_ENABLE, KQ_EV_DISABLE = 0x1, 0x2, 0x4, 0x8
KQ_EV_ONESHOT, KQ_EV_CLEAR = 0x10, 0x20
KQ_EV_SYSFLAGS, KQ_EV_ERROR, KQ_EV_EOF = 0xF000, 0x4000, 0x8000

# <sys/event.h> has these, CPython does not.
_EV_RECEIPT, _EV_DISPATCH = 0x40, 0x80
_NOTE_TRIGGER, _NOTE_OOB = 0x01000000, 0x2

_CHANGE_ONLY = KQ_EV_ADD | KQ_EV_DELETE | KQ_EV_ENABLE | KQ_EV_DISABLE
_EPOLLRDHUP = 0x2000  # PyPy's select does not name it
_EOF = _EPOLLRDHUP | select.EPOLLHUP
_LONGEST_WAIT = 86400.0  # seconds; epoll counts milliseconds in an int


@dataclass(frozen=True)
class Flavour:
    """What differs between the kernels."""

    evfilt_user: int
    evfilt_except: int | None
    resolves_descriptor_first: bool  # so a change of a closed one is EBADF; else the knote is missed first: ENOENT
    refuses_enable_with_disable: bool  # EINVAL; else EV_DISABLE wins
    returns_change_flags: bool  # entries and events still carry EV_ADD and so on
    stops_at_homeless_receipt: bool  # a success without room for its entry: the other changes are silently not made
    triggers_at_add: bool  # NOTE_TRIGGER in the change that creates the knote; else it is lost
    clear_undoes_trigger: bool  # EV_CLEAR in a later change, the triggering one included: EVFILT_USER is quiet again


FREEBSD = Flavour(
    evfilt_user=-11,
    evfilt_except=None,
    resolves_descriptor_first=True,
    refuses_enable_with_disable=True,
    returns_change_flags=False,
    stops_at_homeless_receipt=True,
    triggers_at_add=False,
    clear_undoes_trigger=True,
)
DARWIN = Flavour(
    evfilt_user=-10,
    evfilt_except=-15,
    resolves_descriptor_first=False,
    refuses_enable_with_disable=False,
    returns_change_flags=True,
    stops_at_homeless_receipt=False,
    triggers_at_add=True,
    clear_undoes_trigger=False,
)
FLAVOUR = FREEBSD


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


@dataclass(init=False, order=True)
class kevent:
    """What select.kevent is: six numbers, compared in this order."""

    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int

    def __init__(
        self,
        ident: int | _HasFileno,
        filter: int = KQ_FILTER_READ,
        flags: int = KQ_EV_ADD,
        fflags: int = 0,
        data: int = 0,
        udata: int = 0,
    ) -> None:
        self.ident = ident if isinstance(ident, int) else ident.fileno()
        if self.ident < 0:
            raise OverflowError("can't convert negative value to size_t")
        self.filter, self.flags, self.fflags, self.data, self.udata = filter, flags, fflags, data, udata


@dataclass
class _Knote:
    ident: int
    filter: int
    flags: int
    fflags: int
    data: int
    udata: int
    file: tuple[int, int] | None  # what the number named when it was added; None for EVFILT_USER
    enabled: bool
    triggered: bool = False


class kqueue:
    """What select.kqueue is. Every method may be called from any thread while others wait in `control`.

    `close` ends the waits of other threads with EBADF, as XNU does; on FreeBSD they would go on for ever.
    """

    def __init__(self) -> None:
        self._flavour = FLAVOUR
        # Re-entrant, because a signal handler may call control() while its thread is in here.
        self._lock = threading.RLock()
        self._closed = False
        self._waiters = 0
        self._outer = select.epoll()
        self._bell, self._rope = os.pipe()
        self._rung = False
        self._outer.register(self._bell, select.EPOLLIN)
        filters = [KQ_FILTER_READ, KQ_FILTER_WRITE, self._flavour.evfilt_except]
        self._inner = {filter: select.epoll() for filter in filters if filter is not None}
        for inner in self._inner.values():
            self._outer.register(inner, select.EPOLLIN)
        self._turns = deque([*self._inner, self._flavour.evfilt_user])
        self._knotes: dict[int, dict[int, _Knote]] = {filter: {} for filter in self._turns}

    def fileno(self) -> int:
        self._check_open()
        return self._outer.fileno()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._ring()
                self._release()

    def control(
        self, changelist: Iterable[kevent] | None, max_events: int, timeout: float | None = None, /
    ) -> list[kevent]:
        if max_events < 0:
            raise ValueError(f"Length of eventlist must be 0 or positive, got {max_events}")
        deadline = _deadline(timeout)
        entries: list[kevent] = []
        with self._lock:
            self._check_open()
            for change in changelist or ():
                error = self._apply(change)
                if not error and not change.flags & _EV_RECEIPT:
                    continue
                if len(entries) < max_events:
                    entries.append(self._entry(change, error))
                elif error:
                    raise OSError(error, os.strerror(error))
                elif self._flavour.stops_at_homeless_receipt:
                    return []
        return entries if entries or not max_events else self._wait(max_events, deadline)

    # Changes. The lock is held.

    def _apply(self, change: kevent) -> int:
        """Make one change; the errno, or 0."""
        flavour, flags = self._flavour, change.flags & ~KQ_EV_SYSFLAGS
        knotes = self._knotes.get(change.filter)
        if knotes is None:
            return errno.EINVAL
        if flags & KQ_EV_ENABLE and flags & KQ_EV_DISABLE and flavour.refuses_enable_with_disable:
            return errno.EINVAL
        is_user = change.filter == flavour.evfilt_user
        file = None if is_user else _identity(change.ident)
        knote = knotes.get(change.ident)
        if knote is not None and knote.file != file:
            self._vanish(change.filter, change.ident)
            knote = None
        if file is None and not is_user and (flavour.resolves_descriptor_first or flags & KQ_EV_ADD):
            return errno.EBADF
        if knote is None and not flags & KQ_EV_ADD:
            return errno.ENOENT
        if flags & KQ_EV_DELETE:
            if knote is not None:
                self._drop(knote)
            return 0
        if knote is None:
            knote = knotes[change.ident] = _Knote(
                change.ident, change.filter, flags, change.fflags, change.data, change.udata, file, enabled=True
            )
            knote.triggered = is_user and flavour.triggers_at_add and bool(change.fflags & _NOTE_TRIGGER)
        else:
            self._touch(knote, change)
        if flags & KQ_EV_DISABLE:
            knote.enabled = False
        elif flags & KQ_EV_ENABLE:
            knote.enabled = True
        try:
            self._arm(knote)
        except OSError as error:  # EPERM: epoll does not watch such files
            self._drop(knote)
            return error.errno or errno.EINVAL
        return 0

    def _touch(self, knote: _Knote, change: kevent) -> None:
        knote.data, knote.udata = change.data, change.udata
        if knote.file is not None:
            knote.fflags = change.fflags
        elif change.flags & KQ_EV_CLEAR and self._flavour.clear_undoes_trigger:
            knote.triggered = False
        elif change.fflags & _NOTE_TRIGGER:
            knote.triggered = True

    def _arm(self, knote: _Knote) -> None:
        """Have epoll watch for *knote* as it is now. Touching an edge-triggered entry looks at the condition again."""
        if knote.file is None:
            self._ring()
            return
        inner = self._inner[knote.filter]
        if not knote.enabled:
            # Out of epoll altogether: even one without interest reports errors and hang-ups, at each call.
            with suppress(OSError):  # not in it, or closed by another thread
                inner.unregister(knote.ident)
            return
        if knote.filter == KQ_FILTER_READ:
            interest = select.EPOLLIN | _EPOLLRDHUP
        elif knote.filter == KQ_FILTER_WRITE:
            interest = select.EPOLLOUT
        else:
            interest = _EPOLLRDHUP | (select.EPOLLPRI if knote.fflags & _NOTE_OOB else 0)
        if knote.flags & KQ_EV_CLEAR:
            interest |= select.EPOLLET
        try:
            inner.modify(knote.ident, interest)
        except FileNotFoundError:
            inner.register(knote.ident, interest)

    def _drop(self, knote: _Knote) -> None:
        del self._knotes[knote.filter][knote.ident]
        if knote.file is None:
            self._ring()
        else:
            with suppress(OSError):
                self._inner[knote.filter].unregister(knote.ident)

    def _vanish(self, filter: int, ident: int) -> None:
        """Forget the knote of a descriptor that was closed.

        epoll holds the file, not the number: while a dup lives the old entry goes on reporting, and cannot be removed
        under a number that is closed. A new epoll in the place of the old one is the way out; it gets the old one's
        number, so that it takes none that a test means to use again.
        """
        knotes, inner = self._knotes[filter], self._inner[filter]
        knotes.pop(ident, None)
        with select.epoll() as fresh:
            os.dup2(fresh.fileno(), inner.fileno(), inheritable=False)
        self._outer.register(inner, select.EPOLLIN)
        for knote in list(knotes.values()):
            try:
                if _identity(knote.ident) == knote.file:
                    if knote.enabled:
                        self._arm(knote)
                    continue
            except OSError:  # another thread closed it just now
                pass
            del knotes[knote.ident]

    # Events. The lock is held, but for the wait itself.

    def _wait(self, room: int, deadline: float | None) -> list[kevent]:
        with self._lock:
            self._waiters += 1
        try:
            while True:
                with self._lock:
                    if self._closed:
                        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                    if events := self._harvest(room):
                        return events
                left = _LONGEST_WAIT if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return []
                self._outer.poll(min(left, _LONGEST_WAIT), 1)
        finally:
            with self._lock:
                self._waiters -= 1
                self._release()

    def _harvest(self, room: int) -> list[kevent]:
        events: list[kevent] = []
        self._turns.rotate(-1)  # so that a busy filter starves no other
        for filter in self._turns:
            if len(events) == room:
                break
            knotes, left = self._knotes[filter], room - len(events)
            if filter == self._flavour.evfilt_user:
                users = [knote for knote in knotes.values() if knote.triggered and knote.enabled]
                events += [self._deliver(knote, 0) for knote in users[:left]]
                continue
            found = self._inner[filter].poll(0, left)
            while gone := [ident for ident, _ in found if self._is_gone(filter, ident)]:
                for ident in gone:
                    self._vanish(filter, ident)
                found = self._inner[filter].poll(0, left)  # again: they have taken others' places
            events += [self._deliver(knotes[ident], ready) for ident, ready in found]
        return events

    def _is_gone(self, filter: int, ident: int) -> bool:
        knote = self._knotes[filter].get(ident)
        return knote is None or _identity(ident) != knote.file

    def _deliver(self, knote: _Knote, ready: int) -> kevent:
        flags = knote.flags if self._flavour.returns_change_flags else knote.flags & ~_CHANGE_ONLY
        event = kevent(knote.ident, knote.filter, flags, 0, 0, knote.udata)
        if knote.file is None:
            event.fflags, event.data = knote.fflags, knote.data
        elif knote.filter == KQ_FILTER_WRITE:
            event.data = 1
            eof = _write_side_is_over(knote.ident, ready)
        else:
            event.data = _readable(knote.ident)
            eof = bool(ready & _EOF)
            if ready & select.EPOLLPRI:
                event.fflags = _NOTE_OOB
        if knote.file is not None and eof:
            event.flags |= KQ_EV_EOF
            # The error is a guess: to ask for SO_ERROR is to take it from the caller, who has to find it there.
            event.fflags = errno.ECONNRESET if ready & select.EPOLLERR and _is_socket(knote.ident) else 0
        if knote.flags & KQ_EV_ONESHOT:
            self._drop(knote)
            return event
        if knote.flags & KQ_EV_CLEAR:
            knote.triggered = False
        if knote.flags & _EV_DISPATCH:
            knote.enabled = False
            self._arm(knote)
        elif knote.file is None:
            self._ring()
        return event

    def _entry(self, change: kevent, error: int) -> kevent:
        kept = change.flags & ~KQ_EV_SYSFLAGS if self._flavour.returns_change_flags else 0
        return kevent(change.ident, change.filter, kept | KQ_EV_ERROR, change.fflags, error, change.udata)

    # The kqueue itself.

    def _ring(self) -> None:
        """Keep the pipe readable for as long as a user event waits or waiters must leave."""
        users = self._knotes[self._flavour.evfilt_user].values()
        wanted = self._closed or any(knote.triggered and knote.enabled for knote in users)
        if wanted and not self._rung:
            os.write(self._rope, b"!")
        elif self._rung and not wanted:
            os.read(self._bell, 1)
        self._rung = wanted

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("I/O operation on closed kqueue object")

    def _release(self) -> None:
        """The last one out of a closed kqueue closes its descriptors."""
        if self._closed and not self._waiters and not self._outer.closed:
            for epoll in (self._outer, *self._inner.values()):
                epoll.close()
            os.close(self._bell)
            os.close(self._rope)

    def __del__(self) -> None:
        if hasattr(self, "_knotes"):
            self.close()


def _deadline(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if math.isnan(timeout):
        raise ValueError("Invalid value NaN (not a number)")
    if abs(timeout) >= 2**63 / 1e9:
        raise OverflowError("timestamp too large to convert to C _PyTime_t")
    if timeout < 0:
        raise ValueError("timeout must be positive or None")
    return time.monotonic() + timeout


def _identity(fd: int) -> tuple[int, int] | None:
    """Which open file the number names now; None if none."""
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError):
        return None
    return status.st_dev, status.st_ino


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:  # another thread closed it just now
        return False


def _readable(fd: int) -> int:
    """The bytes to read; 1 where Linux does not tell, as with listeners."""
    try:
        count: bytes = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    except OSError:
        return 1
    return int.from_bytes(count, sys.byteorder)


def _write_side_is_over(fd: int, ready: int) -> bool:
    if not _is_socket(fd) or ready & select.EPOLLHUP:
        return bool(ready & (select.EPOLLERR | select.EPOLLHUP))
    try:
        blocking = os.get_blocking(fd)
        sock = socket.socket(fileno=fd)
    except OSError:  # another thread closed it just now
        return True
    os.set_blocking(fd, blocking)  # PyPy's socket(fileno=...) makes it block
    try:
        # epoll does not tell an own shutdown, an empty send() does: EPIPE. Not after an error, which it would take
        # away, and only on streams: it sends nothing there.
        if sock.type == socket.SOCK_STREAM and not ready & select.EPOLLERR:
            sock.send(b"", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BrokenPipeError:
        return True
    except OSError:
        return False
    finally:
        sock.detach()
    return False
