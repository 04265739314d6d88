"""The wheel: never early, late by no more than a slot, and bounded in what it does at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxio.server.wheel import TICK, Wheel


class Member:
    """Has a deadline, and writes down when it was asked after that."""

    def __init__(self, deadline: float) -> None:
        self.slot: Any = None
        self.deadline = deadline
        self.expired: list[float] = []

    def check(self, now: float) -> float:
        if self.deadline <= now:
            self.expired.append(now)
            self.deadline = math.inf
        return self.deadline


times = st.floats(0.0, 20.0) | st.integers(0, 80).map(lambda slots: slots * TICK)


@given(st.lists(times), st.lists(times))
def test_a_deadline_is_never_early_and_at_most_a_slot_late(deadlines: list[float], looks: list[float]) -> None:
    wheel: Wheel[Member] = Wheel()
    members = [Member(deadline) for deadline in deadlines]
    for member in members:
        wheel.add(member, member.deadline)
    for now in sorted(looks):
        assert not wheel.turn(now, 1000)
        for member, deadline in zip(members, deadlines, strict=True):
            assert all(deadline <= expired for expired in member.expired)
            if deadline + TICK <= now:
                assert member.expired
    assert len(wheel) == len(members)
    assert set(wheel) == set(members)


@given(times, times, st.booleans())
def test_a_deadline_that_comes_nearer_is_kept(first: float, second: float, told: bool) -> None:
    """One that moves away need not be told: the member says so when it is asked."""
    wheel: Wheel[Member] = Wheel()
    member = Member(first)
    wheel.add(member, first)
    member.deadline = second
    if told or second < first:
        wheel.hasten(member, second)
    for slot in range(90):
        now = slot * TICK
        wheel.turn(now, 1000)
        assert bool(member.expired) == (second <= now)


def test_without_a_deadline_nobody_is_asked() -> None:
    wheel: Wheel[Member] = Wheel()
    member = Member(math.inf)
    wheel.add(member, math.inf)
    assert not wheel.turn(1e9, 1)
    wheel.hasten(member, 5.0)
    member.deadline = 5.0
    wheel.turn(5.0, 1)
    assert member.expired == [5.0]


def test_who_has_left_is_not_asked() -> None:
    wheel: Wheel[Member] = Wheel()
    member = Member(1.0)
    wheel.add(member, 1.0)
    wheel.remove(member)
    assert (len(wheel), list(wheel)) == (0, [])
    wheel.turn(10.0, 10)
    assert member.expired == []


def test_no_more_are_asked_at_once_than_allowed() -> None:
    wheel: Wheel[Member] = Wheel()
    members = [Member(1.0) for _ in range(10)]
    for member in members:
        wheel.add(member, 1.0)
    turns = 0
    while wheel.turn(2.0, 3):
        turns += 1
        assert sum(len(member.expired) for member in members) == 3 * turns
    assert [member.expired for member in members] == [[2.0]] * 10


def test_a_check_that_raises_leaves_all_members_where_they_are_asked_again() -> None:
    wheel: Wheel[Member] = Wheel()

    class Broken(Member):
        def check(self, now: float) -> float:
            if now < 2.0:
                raise RuntimeError("not now")
            return super().check(now)

    broken = Broken(1.0)
    wheel.add(broken, 1.0)
    with pytest.raises(RuntimeError):
        wheel.turn(1.0, 10)
    assert list(wheel) == [broken]
    wheel.turn(5.0, 10)
    assert broken.expired == [5.0]


@pytest.mark.parametrize("change", [Wheel.remove, lambda wheel, member: wheel.hasten(member, 7.0)])
def test_members_may_leave_and_move_while_they_are_asked(change: Callable[[Wheel[Member], Member], object]) -> None:
    wheel: Wheel[Member] = Wheel()

    class Meddler(Member):
        def check(self, now: float) -> float:
            change(wheel, other)
            return super().check(now)

    other, meddler = Member(9.0), Meddler(1.0)
    wheel.add(other, 9.0)
    wheel.add(meddler, 1.0)
    wheel.turn(2.0, 10)
    assert meddler.expired == [2.0]
    wheel.turn(8.0, 10)
    wheel.turn(10.0, 10)
    assert other.expired == ([] if len(wheel) == 1 else [10.0])
