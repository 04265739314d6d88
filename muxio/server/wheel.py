"""One shared timer for the deadlines of all connections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Generic, TypeVar
from typing import Protocol as Interface

#: Seconds that a slot of the wheel is wide: how late a deadline may be noticed.
TICK = 0.25

#: The number of the slot of what has no deadline.
_NEVER = 1 << 62


class Member(Interface):
    """What has deadlines."""

    #: Where the wheel keeps it.
    slot: Any

    def check(self, now: float) -> float:
        """Act on the deadlines that are over at `now`. Returns when the next one is: later than `now`, inf for none."""


M = TypeVar("M", bound=Member)


class Slot(dict[M, None]):
    """Those who are to be asked at one time: `number` times `TICK`. A dict takes half of the memory of a set."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Wheel(Generic[M]):
    """A set of members in slots by time. Putting, moving and removing cost the same for any number of them.

    A member is asked when its slot comes, not when a deadline moves away, as most do at every byte: it says then
    when the next one is. So only a deadline that comes nearer has to be told (`hasten`).
    """

    __slots__ = ("_size", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, Slot[M]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[M]:
        """All members, as of now: they may come and go meanwhile."""
        for slot in list(self._slots.values()):
            yield from slot.copy()  # in one go, which list() of a class of our own is not without a GIL

    def add(self, member: M, when: float) -> None:
        """Take in a member whose next deadline is at `when`."""
        self._put(member, when)
        self._size += 1

    def hasten(self, member: M, when: float) -> None:
        """A member has a deadline at `when` that may be earlier than all that it had.

        For one that has left, or that is being asked just now, it does nothing.
        """
        if member.slot is not None and when < member.slot.number * TICK:
            self._take(member)
            self._put(member, when)

    def remove(self, member: M) -> None:
        """Let a member go."""
        self._take(member)
        self._size -= 1

    def turn(self, now: float, most: int) -> bool:
        """Ask the members whose time has come, but no more than `most`. Whether others are still to be asked."""
        for number in sorted(number for number in self._slots if number * TICK <= now):
            while slot := self._slots.get(number):
                if most == 0:
                    return True
                most -= 1
                member, _ = slot.popitem()  # from the end: the way to the first one is over all holes, each time
                member.slot = None
                if not slot:
                    del self._slots[number]
                when = now + 1.0  # should the check raise: it is asked again, and nobody is forgotten
                try:
                    when = member.check(now)
                finally:
                    self._put(member, when)
        return False

    def _put(self, member: M, when: float) -> None:
        # Rounded up, so that no deadline is early.
        number = _NEVER if when == math.inf else math.ceil(when / TICK)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = Slot(number)
        slot[member] = None
        member.slot = slot

    def _take(self, member: M) -> None:
        slot = member.slot
        member.slot = None
        del slot[member]
        if not slot:
            del self._slots[slot.number]
