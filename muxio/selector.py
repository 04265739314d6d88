"""A `selectors.BaseSelector` over a poller, so that the standard library runs on it, asyncio first of all."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, SelectorKey

from muxio.backends.facility import Facility
from muxio.events import ERROR, HANGUP, READ, READ_CLOSED, WRITE
from muxio.poller import Poller, Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What a selector can be asked for -> what the poller is then asked for.
_INTEREST = {EVENT_READ: READ, EVENT_WRITE: WRITE, EVENT_READ | EVENT_WRITE: READ | WRITE}

#: What the poller reports, at its plainest -> what a selector does.
_PLAIN = {
    READ: EVENT_READ,
    WRITE: EVENT_WRITE,
    READ | WRITE: EVENT_READ | EVENT_WRITE,
    READ | READ_CLOSED: EVENT_READ,
    READ | WRITE | READ_CLOSED: EVENT_READ | EVENT_WRITE,
}

#: The same with hang-ups and errors. `poll` has added the READ and WRITE that were asked for, so they can be left out.
_FOLDED = {bits | hints: events for bits, events in _PLAIN.items() for hints in (0, ERROR, HANGUP, ERROR | HANGUP)}


class Selector(BaseSelector):
    """A selector like those of the `selectors` module, over a `Poller`: ``asyncio.SelectorEventLoop(Selector())``.

    backend: a name out of `muxio.backends()`; without one `Poller` chooses.

    ValueError: no backend has that name. io.UnsupportedOperation: it does not work on this system.

    Where CPython's selectors differ from each other, this one does the same on every backend:

    - a closed descriptor, a regular file or a directory is refused by `register` (OSError), not found out later;
    - a descriptor that was closed while registered is reported once at most, and stays in the map until `unregister`,
      or until `modify` for the file that has its number now;
    - what another thread registers, modifies or unregisters is noticed by a `select` under way;
    - time-outs are never early and as fine as the poller's, and infinity is for ever.

    As in a poller, one thread at a time waits. In a forked child the selector forgets what is unregistered, can be
    closed, and refuses all else (RuntimeError): make a new one there.
    """

    def __init__(self, backend: str | Facility | None = None) -> None:
        #: What it stands on: ``selector.poller.wake()`` ends a `select`. Leave its registrations to the selector.
        self.poller: Poller[SelectorKey] = Poller(backend)
        self._poll = self.poller.poll
        self._look = self.poller._look if self.poller._facility.lets_look else _leave_to_poll
        self._keys: dict[int, SelectorKey] = {}
        self._map: _Map | None = _Map(self._keys)
        try:
            self.poller.fileno()
        except io.UnsupportedOperation:
            pass
        else:
            #: Gives a descriptor that is readable while something is ready. As with CPython's selectors, it is there
            #: only where the facility has one: on epoll and kqueue.
            self.fileno = self.poller.fileno

    def register(self, fileobj: Source, events: int, data: Any = None) -> SelectorKey:
        """Watch a file object, and return its key.

        fileobj: a descriptor, or an object with ``fileno()``.
        events: EVENT_READ, EVENT_WRITE or both.
        data: any object, for the key.

        ValueError: the events or the file object make no sense. KeyError: its descriptor is registered already.
        OSError: it is closed (EBADF), or nothing that can be watched. RuntimeError: the selector is closed.
        """
        interest = _INTEREST.get(events)
        if interest is None:
            raise ValueError(f"Invalid events: {events!r}")
        keys = self._keys
        fd = _number(fileobj, keys)
        if fd in keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        keys[fd] = key = SelectorKey(fileobj, fd, events, data)
        try:
            self.poller.register(fd, interest, key)
        except BaseException:
            del keys[fd]
            raise
        return key

    def unregister(self, fileobj: Source) -> SelectorKey:
        """Watch a file object no more, also after it was closed, and return the key it had.

        KeyError: it is not registered. ValueError: nor is it a file object, or an open one.
        """
        key = self._keys.pop(_number(fileobj, self._keys), None)
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        try:
            self.poller.unregister(key.fd)
        except RuntimeError:
            pass  # a forked child: what the kernel watches belongs to the parent
        return key

    def modify(self, fileobj: Source, events: int, data: Any = None) -> SelectorKey:
        """Change for what a registered file object is watched, and its data; return the new key.

        KeyError: it is not registered. ValueError: the events or the file object make no sense.
        OSError: it was closed since (EBADF), and is registered no more.
        """
        interest = _INTEREST.get(events)
        if interest is None:
            raise ValueError(f"Invalid events: {events!r}")
        old = self._keys.get(_number(fileobj, self._keys))
        if old is None:
            raise KeyError(f"{fileobj!r} is not registered")
        key = SelectorKey(old.fileobj, old.fd, events, data)
        try:
            # Also where only the data change: the number may have changed hands, and a new owner is to be watched.
            self.poller.modify(old.fd, interest, key)
        except OSError as closed:
            self.unregister(old.fd)
            try:
                return self.register(fileobj, events, data)  # the new owner
            except ValueError:
                raise closed from None
        self._keys[old.fd] = key
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Wait until a file object is ready, or the time is over.

        timeout: seconds; None for ever, 0 or less for a look.

        Returns a list of (key, events), the events being EVENT_READ, EVENT_WRITE or both, and only those asked for. A
        hang-up or an error is reported as all that was asked for. The list is empty after the time-out, and may be
        after ``poller.wake()``.

        RuntimeError: another thread waits in `select` already, or the selector is closed.
        """
        room = len(self._keys) + 1  # for all that is registered, and the poller's own wake-up
        # A look comes first, and nearly always settles it: under load something is ready, and asyncio asks for no more
        # than a look before most callbacks. A whole `poll` costs half as much again; a look in vain, 4 % of a wait that
        # sleeps. All is level-triggered here, so what needs the poller's care will be seen again by `poll`.
        batch = self._look(room)
        if not batch:
            if timeout is not None and timeout <= 0:
                if batch is not None:
                    return []
                timeout = 0
            batch = self._poll(timeout, room)
        # A plain READ is a plain EVENT_READ. Without events: another thread has unregistered it meanwhile.
        return [pair if pair[1] == READ else (pair[0], _FOLDED[pair[1]]) for pair in batch if pair[1]]

    def close(self) -> None:
        """Forget all file objects, which stay open, and give the poller's facility back. Closing again does nothing."""
        self.poller.close()
        self._keys.clear()
        self._map = None

    def get_key(self, fileobj: Source) -> SelectorKey:
        """The key of a registered file object.

        KeyError: it is not registered. ValueError: nor is it a file object. RuntimeError: the selector is closed.
        """
        if self._map is None:
            raise RuntimeError("Selector is closed")
        return self._map[fileobj]

    def get_map(self) -> Mapping[Source, SelectorKey]:
        """A read-only mapping of descriptors to keys that follows all changes; file objects can be looked up as well.

        None after `close`, as with CPython's selectors.
        """
        return self._map  # type: ignore[return-value]  # typeshed, too, leaves the None out


def _leave_to_poll(max_events: int) -> None:
    """Look where only one thread may be in the facility, which `poll` sees to."""


class _Map(Mapping[Source, SelectorKey]):
    __slots__ = ("_keys",)

    def __init__(self, keys: dict[int, SelectorKey]) -> None:
        self._keys = keys

    def __getitem__(self, fileobj: Source) -> SelectorKey:
        key = self._keys.get(_number(fileobj, self._keys))
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        return key

    def get(self, fileobj: Source, default: Any = None) -> Any:
        # Mapping.get would raise a KeyError first; asyncio asks before every registration.
        return self._keys.get(_number(fileobj, self._keys), default)

    def __iter__(self) -> Iterator[Source]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _number(fileobj: Source, keys: dict[int, SelectorKey]) -> int:
    """The descriptor of a file object, or the one under which a closed one is registered. ValueError without one."""
    if isinstance(fileobj, int):
        fd = fileobj
    else:
        try:
            fd = int(fileobj.fileno())
        except (AttributeError, TypeError, ValueError):
            fd = -1
    if fd < 0:
        for key in list(keys.values()):
            if key.fileobj is fileobj:
                return key.fd
        raise ValueError(f"Invalid file object: {fileobj!r}")
    return fd
