"""The poller: registrations, keys, batches, wake-ups and deadlines over one kernel facility."""

from __future__ import annotations

import errno
import io
import os
from collections import namedtuple
from time import monotonic

from muxio.backends import NAMES, open_backend, probe
from muxio.backends.facility import INVALID, Facility
from muxio.events import (
    EDGE,
    ERROR,
    EXCLUSIVE,
    HANGUP,
    HINTS,
    ONESHOT,
    READ,
    READ_CLOSED,
    WRITE,
    describe,
    objection,
)

#: How many events a `poll` returns unless told otherwise.
MAX_EVENTS = 1024

#: The longest single wait in seconds; a longer one is a loop of them. Every facility takes it.
_LONGEST_WAIT = 86_400.0

TYPE_CHECKING = False  # importing typing would cost more than all of muxio
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Generic, Protocol, TypeVar

    class HasFileno(Protocol):
        """A socket, a pipe, a subprocess stream: anything that has a descriptor."""

        def fileno(self) -> int: ...

    Source = int | HasFileno
    Key = TypeVar("Key")
else:

    class Generic:
        """As much of typing.Generic as there is at run time: ``Poller[str]`` is `Poller`."""

        def __class_getitem__(cls, key: object) -> type:
            return cls

    Source = Key = object


class Registration(namedtuple("Registration", ["source", "fd", "events", "key"])):  # noqa: PYI024 - see above
    """One entry of `Poller.registrations`; events are the bits that were asked for, modes included."""

    __slots__ = ()


#: No key was given. (None is a key like any other.)
_SAME: Any = object()

#: (source, events, key, fd) of a registration.
_Entry = tuple["Source", int, "Any", int]

#: Events that say more than a handler has asked for, or of a source that is closed.
_CARE = ERROR | HANGUP | INVALID


class _Unusable(Facility):
    """Stands where the facility was, so that no call has to ask first whether it is still there."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(object.__getattribute__(self, "_reason"))


class Poller(Generic[Key]):
    """Waits until sockets, pipes and other descriptors are ready, and says which.

    backend: a name out of `muxio.backends()`. Without one the environment variable ``MUXIO_BACKEND`` decides, and
    without that the best facility that works here: epoll on Linux, kqueue on the BSDs and macOS, AFD on Windows, then
    poll, select.

    A `Facility` that is open already does as well; the poller owns it then.

    ValueError: no backend has that name. io.UnsupportedOperation: it does not work on this system.

    Every method may be called from any thread, also while another thread waits in `poll`. In a signal handler only
    `wake` is promised. In a forked child the poller refuses everything but `close`: make a new one there.
    """

    # How threads are kept apart, with or without a GIL: see "Who may do what at the same time" in
    # docs/architecture.md.

    def __init__(self, backend: str | Facility | None = None) -> None:
        self._facility = backend if isinstance(backend, Facility) else _choose(backend)
        self._open: Facility | None = self._facility
        self._backend = self._facility.name
        self._closed = False
        self._start()
        from muxio.forks import disown_after_fork

        disown_after_fork(self)

    def _start(self) -> None:
        import threading  # here, so that importing muxio stays cheap

        #: Reentrant, so that a signal handler may `wake` whatever it interrupts. Acquired inside the `try` whose
        #: `finally` releases it: a handler that raises between the two would otherwise leave it locked for good.
        self._lock = threading.RLock()
        self._acquire = self._lock.acquire
        self._waiter: dict[None, object] = {}
        self._woken = False
        #: Number -> its registration.
        self._table: dict[int, _Entry] = {}
        #: Numbers of registrations that report nothing until `modify`.
        self._disarmed: set[int] = set()
        #: Numbers under which the kernel may report a file that is no longer theirs.
        self._suspect: set[int] = set()
        #: Numbers that were changed since the current wait began.
        self._touched: set[int] = set()
        #: Number -> the (key, READ) that a plain READ event becomes, filled in at the first event. One look-up and no
        #: new tuple are what an event costs then, and registering does not pay for it.
        self._ready: dict[int, tuple[Any, int]] = {}
        #: The list that `poll` returned last, until it is called again; and the events of the facility it was made of,
        #: stored before it.
        self._last: list[tuple[Any, int]] | None = None
        self._raw: list[tuple[int, int]] = []
        #: Events of the facility, and where in them each number stands: filled in when a list has to be corrected.
        self._places: tuple[list[tuple[int, int]], dict[int, int]] = self._raw, {}

    # Registrations

    def register(self, source: Source, events: int, key: Key = _SAME) -> None:
        """Watch a source for events.

        source: a descriptor, or an object with ``fileno()``; the poller keeps a reference to it.
        events: READ, WRITE, PRIORITY, any of them or 0, with modes (EDGE, ONESHOT, EXCLUSIVE) as `supports` allows.
        key: what `poll` returns for it, any object, None too; the source itself unless given.

        KeyError: the source is registered already, or its number is and the number's owner is not known to be gone.
        ValueError: the bits make no sense. io.UnsupportedOperation: this backend cannot do them.
        OSError: EBADF for a closed descriptor; on Windows, WSAENOTSOCK for a number that is no socket's.
        PermissionError: a regular file or a directory.
        """
        if key is _SAME:
            key = source  # type: ignore[assignment]
        try:
            fd = source if type(source) is int else source.fileno()  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            fd = -1
        if fd < 0:
            fd = _number(source)  # says what is wrong
        try:
            self._acquire()
            facility = self._facility
            try:
                mask = facility.masks[events]
            except (KeyError, TypeError):
                raise self._refusal(events) from None
            table = self._table
            if fd in table:
                self._take_over(fd, source, mask)
            else:
                try:
                    facility.add(fd, mask)
                except FileExistsError:  # left behind by a register() that an exception cut short
                    facility.modify(fd, mask)
            table[fd] = source, events, key, fd
            if self._waiter:
                self._interrupt(fd)
        finally:
            self._release()

    def modify(self, source: Source, events: int, key: Key = _SAME) -> None:
        """Change what a registered source is watched for, and arm a ONESHOT that has fired.

        key: replaces the old one if given. An event of the source that stands in the list returned last is cut down
        to what is still asked for, under the new key.

        KeyError: not registered. ValueError, io.UnsupportedOperation: as in `register`; besides, an EXCLUSIVE
        registration cannot be modified (EINVAL, epoll_ctl(2)). OSError: EBADF if the descriptor was closed.
        """
        try:
            fd = source if type(source) is int else source.fileno()  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            fd = -1
        try:
            self._acquire()
            facility = self._facility
            entry = self._table.get(fd)
            if entry is None or entry[0] is not source:
                fd, entry = self._find(source)
                if _is_gone(entry[0], fd):
                    raise OSError(errno.EBADF, f"closed while it was registered: {entry[0]!r}")
            owner, asked, old_key, fd = entry
            try:
                mask = facility.masks[events]
            except (KeyError, TypeError):
                raise self._refusal(events) from None
            if (events | asked) & EXCLUSIVE:
                raise io.UnsupportedOperation("EXCLUSIVE cannot be modified: unregister, then register")
            if key is _SAME:
                key = old_key
            self._table[fd] = owner, events, key, fd
            if key is not old_key or events >= ONESHOT:
                self._ready.pop(fd, None)  # before the kernel reports what this asks for: that is for the new key
            try:
                facility.modify(fd, mask)
            except BaseException as error:
                self._table[fd] = entry
                self._ready.pop(fd, None)
                self._arm(fd)
                if isinstance(error, FileNotFoundError):
                    raise OSError(errno.EBADF, f"closed while it was registered: {owner!r}") from None
                raise
            if self._disarmed:
                self._disarmed.discard(fd)
            if self._waiter:
                self._interrupt(fd)
            if self._last is not None:
                self._correct(fd, key, events | ERROR | HANGUP | (READ_CLOSED if events & READ else 0))
        finally:
            self._release()

    def unregister(self, source: Source) -> None:
        """Watch a source no more. It works for whatever is registered, also right after it was closed.

        An event of the source that stands in the list returned last becomes ``(key, 0)``. Unregister first and close
        then, where you have the choice: epoll cannot tell whether a dup keeps a closed descriptor's file alive, so
        events of a number that was closed first cost a check each.

        KeyError: not registered.
        """
        try:
            fd = source if type(source) is int else source.fileno()  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            fd = -1
        try:
            self._acquire()
            facility = self._facility
            entry = self._table.get(fd)
            if entry is None or entry[0] is not source:
                fd, entry = self._find(source)
            try:
                facility.remove(fd)
            except OSError:  # closed
                self._suspect_leftovers(fd)
            del self._table[fd]
            if fd in self._ready:
                self._ready.pop(fd, None)  # a poll that just filled it in may take it out itself
            if self._disarmed:
                self._disarmed.discard(fd)
            if self._waiter:
                self._interrupt(fd)
            if self._last is not None:
                self._correct(fd, entry[2], 0)
        finally:
            self._release()

    def registrations(self) -> list[Registration]:
        """All registrations, stale ones too, as named tuples (source, fd, events, key)."""
        return [Registration(source, fd, events, key) for source, events, key, fd in list(self._table.values())]

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, source: Source) -> bool:
        try:
            self._acquire()
            self._find(source)
        except KeyError:
            return False
        finally:
            self._release()
        return True

    # Waiting

    def poll(self, timeout: float | None = None, max_events: int = MAX_EVENTS) -> list[tuple[Key, int]]:
        """Wait until something is ready, the time is over or `wake` is called.

        timeout: seconds; None or infinity for ever, 0 for a look. Never early, by the clock `time.monotonic`. Late by
        what the facility resolves: microseconds on kqueue, select and epoll, a millisecond on poll, and the timer tick
        on Windows (15.6 ms, unless a program has asked for less).
        max_events: how many events to return at most. What else is ready comes with the next calls.

        Returns a list of (key, events), empty after the time-out and perhaps after a wake-up. The events are those
        asked for, and ERROR, HANGUP and READ_CLOSED as hints. Until the next `poll` the list follows the changes
        made through this poller (`modify`, `unregister`), so skip entries without events and do not reorder it.

        ValueError: a negative or NaN timeout, max_events below 1. RuntimeError: another thread waits in this
        poller, or the poller is closed, also by another thread during the wait.
        """
        if timeout and not timeout > 0:
            raise ValueError(f"timeout is seconds, 0 or more, or None for ever; not {timeout!r}")
        if max_events < 1:
            raise ValueError(f"max_events is 1 or more, not {max_events!r}")
        token: list[tuple[Any, int]] = []
        batch = token
        waiter = self._waiter
        try:
            if waiter.setdefault(None, token) is not token:
                raise RuntimeError("another thread waits in this poller already")
            self._last = None
            if self._touched:
                self._forget_touched()
            ready = self._ready
            facility = self._facility
            if not timeout:
                raw = facility.wait(timeout, max_events)
            elif facility.looks_first:
                raw = facility.wait(0, max_events)
            else:
                raw = []
            try:
                for fd, events in raw:  # a comprehension costs a call before CPython 3.12
                    batch.append(ready[fd] if events == READ else self._translate(fd, events))
                self._raw = raw
                self._last = batch
                if self._touched or not (batch or timeout == 0):
                    batch = self._take_care(facility, raw, timeout, max_events)
            except KeyError:  # the first event of a number, or one that needs care
                batch = self._take_care(facility, raw, timeout, max_events)
            del waiter[None]
            if self._closed:
                self._give_back()
            return batch
        except BaseException:
            if waiter.get(None) is token:
                del waiter[None]
                if self._closed:
                    self._give_back()
                else:
                    self._rearm()
            raise

    def wake(self) -> None:
        """End the current or else the next `poll`. From any thread, and from a signal handler. Wake-ups coalesce."""
        try:
            self._acquire()
            facility = self._facility
            self._woken = True  # before the channel: `poll` drains it first and looks here second, so none is lost
            facility.wake()
        finally:
            self._release()

    # What it is

    def supports(self, events: int) -> bool:
        """Whether these bits can be registered here: ``poller.supports(EDGE)``."""
        return events in self._facility.masks

    @property
    def backend(self) -> str:
        """The name of the backend."""
        return self._backend

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def fileno(self) -> int:
        """A descriptor that is readable while something is ready, so that pollers nest: on epoll and kqueue.

        io.UnsupportedOperation: the facility has none.
        """
        return self._facility.fileno()

    def close(self) -> None:
        """Forget all registrations and give the facility back; a `poll` under way raises RuntimeError.

        The registered sources stay open. Closing again does nothing.
        """
        try:
            self._acquire()
            if not self._closed:
                self._closed = True
                facility, self._facility = self._facility, _Unusable("the poller is closed")
                for state in (self._table, self._ready, self._disarmed, self._suspect):
                    state.clear()
                self._last = None
                if self._waiter:
                    self._touched.add(-1)  # sends the waiting thread the careful way, which notices
                    facility.wake()
                else:
                    self._give_back()
        finally:
            self._release()

    def __enter__(self) -> Poller[Key]:
        self.supports(READ)  # raises if it is closed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} registered" + (", waiting" if self._waiter else "")
        return f"<{type(self).__name__} {self._backend}: {state}>"

    def _release(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # a signal handler raised while this thread waited for the lock

    # Under the lock

    def _find(self, source: Source) -> tuple[int, _Entry]:
        """The number and the entry of a registered source: by number, and by the object once that is closed."""
        try:
            fd = source if isinstance(source, int) else source.fileno()
        except ValueError:
            fd = -1
        except AttributeError:
            fd = _number(source)  # says what is wrong
        entry = self._table.get(fd)
        if entry is not None and (entry[0] is source or fd is source or not _is_gone(entry[0], fd)):
            return fd, entry
        for fd, entry in self._table.items():
            if entry[0] is source:
                return fd, entry
        self._facility.name  # noqa: B018 - says so if the poller is closed
        raise KeyError(f"{source!r} is not registered")

    def _arm(self, fd: int) -> None:
        """Tell the kernel again what the table says, so that what holds now is reported anew."""
        facility = self._facility
        try:
            facility.modify(fd, facility.masks[0 if fd in self._disarmed else self._table[fd][1]])
        except OSError:
            pass  # closed: it stays listed until it is unregistered

    def _interrupt(self, fd: int) -> None:
        """Let a wait under way begin anew if it would not notice the change by itself."""
        self._touched.add(fd)
        if not self._facility.sees_changes:
            self._facility.wake()

    def _suspect_leftovers(self, fd: int) -> None:
        """The kernel could not remove a closed descriptor; a dup may keep its file alive."""
        if self._facility.outlives_close:
            self._suspect.add(fd)
            self._ready.pop(fd, None)

    def _correct(self, fd: int, key: Any, allowed: int) -> None:
        """Cut the event that the list returned last has for a number down to the allowed bits."""
        batch, raw = self._last, self._raw
        if batch is None or self._last is not batch:
            return  # the next poll has begun, and the two may not belong together
        if self._places[0] is not raw:
            self._places = raw, {number: place for place, (number, _) in enumerate(raw)}
        places = self._places[1]
        place = places.get(fd) if allowed else places.pop(fd, None)  # what is over is nobody's entry any more
        if place is not None and place < len(batch):
            batch[place] = key, batch[place][1] & allowed

    def _take_over(self, fd: int, source: Source, mask: int) -> None:
        """Register a number that is taken, if its owner is gone for sure; else KeyError."""
        entry = owner, _, key, _ = self._table[fd]
        gone = owner is not source and _is_gone(owner, fd)
        facility = self._facility
        del self._table[fd]  # a poll under way that meets the number waits for the lock, until it has its new owner
        self._ready.pop(fd, None)
        try:
            # epoll knows files, not only numbers: it refuses the number while it is still the same file's.
            try:
                if not gone and not facility.outlives_close:
                    raise FileExistsError
                facility.add(fd, mask)
            except FileExistsError:
                if not gone:
                    raise KeyError(f"descriptor {fd} is registered already, for {owner!r}") from None
                facility.modify(fd, mask)  # the file lives on under a new object
            else:
                self._suspect_leftovers(fd)
        except BaseException:
            self._table[fd] = entry
            raise
        self._disarmed.discard(fd)
        self._correct(fd, key, 0)

    def _refusal(self, events: int) -> Exception:
        trouble = objection(events)
        if trouble is not None:
            return ValueError(trouble)
        return io.UnsupportedOperation(f"the {self._backend} backend cannot do {describe(events)}")

    def _give_back(self) -> None:
        """Close the facility, unless somebody still waits in it; whoever comes out last does it then."""
        try:
            self._acquire()
            if not self._waiter and self._open is not None:
                facility, self._open = self._open, None
                facility.close()
        finally:
            self._release()

    # Events

    def _look(self, max_events: int) -> list[tuple[Any, int]] | None:
        """``poll(0)`` for one who watches levels alone and keeps no list: None if there is more to it, then `poll`."""
        raw = self._facility.wait(0, max_events)
        if not raw:
            return []
        ready = self._ready
        try:
            return [ready[fd] if events == READ and fd in ready else self._translate(fd, events) for fd, events in raw]
        except KeyError:
            return None

    def _translate(self, fd: int, events: int) -> tuple[Any, int]:
        """What an event becomes. KeyError if it needs care."""
        if events & _CARE:
            raise KeyError(fd)
        entry = self._table[fd]
        _, asked, key, number = entry  # the same, but no other int to keep: 32 bytes a registration
        if asked >= ONESHOT or events & ~(asked | HINTS) or fd in self._suspect or fd in self._disarmed:
            raise KeyError(fd)
        if events != READ:
            return key, events
        self._ready[number] = pair = key, READ
        if self._table.get(fd) is not entry:  # changed meanwhile: the next event finds out
            self._ready.pop(fd, None)
        return pair

    def _take_care(
        self, facility: Facility, raw: list[tuple[int, int]], timeout: float | None, max_events: int
    ) -> list[tuple[Any, int]]:
        """Finish a `poll` whose first batch was empty or not plain: translate carefully, and wait on if need be."""
        deadline = monotonic() + timeout if timeout else None
        while True:
            try:
                batch, woken = [self._translate(fd, events) for fd, events in raw], False
                self._raw = raw
                self._last = batch
                careful = bool(self._touched)
            except KeyError:
                careful = True
            if careful:
                batch, woken = self._translate_carefully(facility, raw)
            if batch or (woken and len(raw) < max_events):
                return batch
            if woken:
                timeout, deadline = 0, None  # the wake-up took the only place: look for what is ready
            elif timeout == 0 and len(raw) < max_events:  # else it was nobody's events that took all places
                return batch
            self._forget_touched()
            if deadline is None:
                raw = facility.wait(timeout, max_events)
            else:
                left = deadline - monotonic()
                if left <= 0:
                    return batch
                raw = _wait_for(facility, left, max_events)

    def _translate_carefully(
        self, facility: Facility, raw: list[tuple[int, int]]
    ) -> tuple[list[tuple[Any, int]], bool]:
        """Translate a batch in which not every event is plain. Returns it, and whether somebody called `wake`."""
        woken = haunted = False
        kept: list[tuple[int, int]] = []
        batch: list[tuple[Any, int]] = []
        try:
            self._acquire()
            if self._facility is not facility:
                raise RuntimeError("the poller was closed while this thread waited in it")
            self._raw = raw  # should an exception come between, all of them are armed anew
            self._last = batch
            for fd, events in raw:
                entry = self._table.get(fd)
                if fd == facility.wake_fd:
                    facility.drain()
                    woken, self._woken = self._woken, False
                elif fd in self._touched:
                    # The event may be older than the change, so it is dropped. What still holds comes again: level
                    # events by themselves, the others when they are armed anew.
                    if entry is not None and entry[1] & (EDGE | ONESHOT) and fd not in self._disarmed:
                        self._arm(fd)
                elif entry is None:
                    haunted |= not self._remove_leftover(fd)
                elif fd not in self._disarmed:
                    if fd in self._suspect and not events & INVALID:
                        # Twice in one batch: one of the two is the old file's.
                        twice = any(number == fd for number, _ in kept)
                        wanted = facility.masks[entry[1]] | ERROR | HANGUP
                        events = 0 if twice else facility.verify(fd, events & wanted)
                        haunted |= not events
                    events = self._report(fd, entry[1], events) if events else 0
                    if events:
                        kept.append((fd, events))
                        batch.append((entry[2], events))
            self._raw = kept
            if haunted:
                self._renew()
        finally:
            self._release()
        return batch, woken

    def _report(self, fd: int, asked: int, events: int) -> int:
        """What the user sees of an event; disarms what must not fire again by itself."""
        interest = asked & (READ | WRITE)
        stale = events & INVALID
        if stale:
            events |= ERROR
        if stale or asked & ONESHOT or (events & (ERROR | HANGUP) and not interest):
            self._facility.disarm(fd, self._facility.masks[asked])
            self._disarmed.add(fd)
            self._ready.pop(fd, None)
        if events & (ERROR | HANGUP):
            events |= interest
        return events & (asked | HINTS)

    def _remove_leftover(self, fd: int) -> bool:
        """Stop the kernel from reporting a number that nobody registered; False if it cannot be told to."""
        try:
            self._facility.remove(fd)
        except OSError:
            return False
        return True

    def _renew(self) -> None:
        """Begin anew, without the closed files that a dup keeps alive in an epoll and no call can remove."""
        self._suspect.clear()
        masks = self._facility.masks
        self._facility.renew(
            (fd, masks[0 if fd in self._disarmed else events])
            for owner, events, _, fd in self._table.values()
            if not _is_gone(owner, fd)
        )

    def _rearm(self) -> None:
        """After an exception out of a wait: events that fire once may have been taken from the kernel and lost."""
        try:
            self._acquire()
            lost = {fd for fd, _ in self._raw} if self._last is not None else ()
            for _, events, _, fd in self._table.values():
                if events & EDGE or (events & ONESHOT and (fd in lost or fd not in self._disarmed)):
                    self._disarmed.discard(fd)
                    self._arm(fd)
        finally:
            self._release()

    def _forget_touched(self) -> None:
        try:
            self._acquire()
            self._touched.clear()
        finally:
            self._release()

    def disown(self) -> None:
        """In a forked child: the facility, or its number, belongs to the parent."""
        if not self._closed:
            self._start()
            self._facility = _Unusable("this poller belongs to the parent process: make a new one after a fork")


def _choose(name: str | None) -> Facility:
    wanted = name or os.environ.get("MUXIO_BACKEND")
    if wanted is None or wanted == "":
        for candidate in NAMES:
            try:
                return open_backend(candidate)
            except (ImportError, OSError):
                continue
        raise OSError(f"no backend works on this system: {probe()}")
    if wanted not in NAMES:
        origin = "" if name else " (from the environment variable MUXIO_BACKEND)"
        raise ValueError(f"no backend is called {wanted!r}{origin}; muxio has {', '.join(NAMES)}")
    try:
        return open_backend(wanted)
    except ImportError as error:
        raise io.UnsupportedOperation(f"the {wanted} backend does not work here: {error}") from error


def _wait_for(facility: Facility, timeout: float, max_events: int) -> list[tuple[int, int]]:
    """One wait towards a deadline. It may come back empty before that, but late only by what the facility resolves."""
    if timeout <= facility.coarseness:
        return facility.wait_finely(timeout, max_events)
    return facility.wait(min(timeout - facility.coarseness, _LONGEST_WAIT), max_events)


def _number(source: Source) -> int:
    """The descriptor of a source. OSError (EBADF) if it is closed."""
    if isinstance(source, int):
        fd = source
    else:
        try:
            fd = source.fileno()
        except ValueError:  # how a closed file answers; a closed socket says -1
            fd = -1
        except AttributeError:
            raise TypeError(f"a source is a descriptor or has fileno(), which {source!r} is not") from None
    if fd < 0:
        raise OSError(errno.EBADF, f"closed descriptor: {source!r}")
    return fd


def _is_gone(owner: Source, fd: int) -> bool:
    """Whether the owner of a number has surely given it up. A plain number cannot tell."""
    try:
        return _number(owner) != fd
    except OSError:
        return True
