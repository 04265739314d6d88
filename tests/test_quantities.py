"""Numbers with units on the command line."""

from __future__ import annotations

import argparse

import pytest

from muxio.quantities import count, or_none, seconds


def test_times_have_units() -> None:
    texts = ("2", "1.5s", "500ms", "5m", "24H", "1e3")
    assert [seconds(text) for text in texts] == [2.0, 1.5, 0.5, 300.0, 86_400.0, 1000.0]


@pytest.mark.parametrize("text", ["", "s", "0", "-1", "x", "5d", "nan", "inf", "1e400"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a time above 0"):
        seconds(text)


def test_counts_have_units() -> None:
    assert [count(text) for text in ("64", "16k", "1M", "1.5k", "2g")] == [64, 16_384, 1_048_576, 1536, 2_147_483_648]


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5", "x", "nan", "inf", "1e400"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a number from 1 on"):
        count(text)


def test_none_is_a_limit_that_is_not_there() -> None:
    assert or_none(count)("none") is None
    assert or_none(seconds)("3") == 3.0
