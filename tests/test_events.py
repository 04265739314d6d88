"""The bits, and which combinations of them make sense."""

from __future__ import annotations

import select

import pytest

import muxio
from muxio.events import INTEREST, MODES, combinations, describe, objection


def test_bits_have_the_values_of_poll() -> None:
    for name, bit in {"POLLIN": muxio.READ, "POLLPRI": muxio.PRIORITY, "POLLOUT": muxio.WRITE}.items():
        assert getattr(select, name, bit) == bit
    for name, bit in {"POLLERR": muxio.ERROR, "POLLHUP": muxio.HANGUP, "POLLRDHUP": muxio.READ_CLOSED}.items():
        assert getattr(select, name, bit) == bit


def test_modes_have_the_values_of_epoll() -> None:
    for name, bit in {"EPOLLET": muxio.EDGE, "EPOLLONESHOT": muxio.ONESHOT, "EPOLLEXCLUSIVE": muxio.EXCLUSIVE}.items():
        assert getattr(select, name, bit) == bit


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (0, "0"),
        (muxio.READ, "READ"),
        (muxio.WRITE | muxio.READ, "READ|WRITE"),
        (muxio.READ | muxio.HANGUP | muxio.READ_CLOSED, "READ|HANGUP|READ_CLOSED"),
        (muxio.READ | muxio.ONESHOT | muxio.EDGE, "READ|EDGE|ONESHOT"),
        (muxio.READ | 0x40, "READ|0x40"),
    ],
)
def test_describe_spells_the_bits(events: int, words: str) -> None:
    assert describe(events) == words


@pytest.mark.parametrize(
    "events",
    [
        muxio.ERROR,
        muxio.READ | muxio.HANGUP,
        muxio.READ_CLOSED,
        muxio.WRITE | muxio.READ_CLOSED,
        muxio.EXCLUSIVE | muxio.ONESHOT | muxio.READ,
        muxio.EXCLUSIVE | muxio.PRIORITY,
        muxio.EXCLUSIVE | muxio.READ | muxio.READ_CLOSED,
        0x40,
        -1,
        1 << 40,
    ],
)
def test_bits_that_make_no_sense_are_objected_to_and_never_accepted(events: int) -> None:
    assert objection(events)
    assert events not in combinations(INTEREST | MODES)


def test_every_combination_makes_sense_and_stays_within_what_a_backend_can() -> None:
    plain = combinations(INTEREST).keys()
    assert {0, muxio.READ, muxio.READ | muxio.WRITE | muxio.PRIORITY, muxio.READ | muxio.READ_CLOSED} <= plain
    assert not any(events & MODES for events in plain)
    assert all(objection(events) is None for events in combinations(INTEREST | MODES))
