"""One shared timer for the deadlines of all connections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Generic, TypeVar
from typing import Protocol as Interface

#: Seconds that a slot of the wheel is wide: how late a deadline may be noticed.
TICK = 0.25

#: The slot of what has no deadline.
_NEVER = 1 << 62


class Member(Interface):
    """What has deadlines."""

    #: Where the wheel keeps it.
    slot: int

    def check(self, now: float) -> float:
        """Act on the deadlines that are over at `now`. Returns when the next one is: later than `now`, inf for none."""


M = TypeVar("M", bound=Member)


class Wheel(Generic[M]):
    """A set of members in slots by time. Putting, moving and removing cost the same for any number of them.

    A member is asked when its slot comes, not when a deadline moves away, as most do at every byte: it says then
    when the next one is. So only a deadline that comes nearer has to be told (`hasten`).
    """

    __slots__ = ("_size", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, set[M]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[M]:
        """All members, as of now: they may come and go meanwhile."""
        for members in list(self._slots.values()):
            yield from list(members)

    def add(self, member: M, when: float) -> None:
        """Take in a member whose next deadline is at `when`."""
        self._put(member, when)
        self._size += 1

    def hasten(self, member: M, when: float) -> None:
        """A member has a deadline at `when` that may be earlier than all that it had.

        For one that has left, or that is being asked just now, it does nothing.
        """
        if when < member.slot * TICK and member in self._slots.get(member.slot, ()):
            self._take(member)
            self._put(member, when)

    def remove(self, member: M) -> None:
        """Let a member go."""
        self._take(member)
        self._size -= 1

    def turn(self, now: float, most: int) -> bool:
        """Ask the members whose time has come, but no more than `most`. Whether others are still to be asked."""
        for slot in sorted(slot for slot in self._slots if slot * TICK <= now):
            members = self._slots[slot]
            while members:
                if most == 0:
                    return True
                most -= 1
                member = members.pop()
                when = member.check(now)
                self._take(member)
                self._put(member, when)
        return False

    def _put(self, member: M, when: float) -> None:
        # Rounded up, so that no deadline is early.
        member.slot = _NEVER if when == math.inf else math.ceil(when / TICK)
        self._slots.setdefault(member.slot, set()).add(member)

    def _take(self, member: M) -> None:
        members = self._slots.get(member.slot)
        if members is not None:
            members.discard(member)
            if not members:
                del self._slots[member.slot]
