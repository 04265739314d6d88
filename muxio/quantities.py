"""Numbers with units, as people type them on a command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_COUNTS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def seconds(text: str) -> float:
    """``90``, ``1.5``, ``500ms``, ``30s``, ``5m`` or ``24h``, in seconds. ArgumentTypeError: not a time above 0."""
    try:
        return _scaled(text, _SECONDS)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time above 0, such as 90, 500ms, 30s, 5m or 24h") from None


def count(text: str) -> int:
    """``500``, ``64k``, ``256m`` or ``1g`` (powers of 1,024). ArgumentTypeError: not a whole number from 1 on."""
    try:
        number = _scaled(text, _COUNTS)
    except ValueError:
        number = 0.5
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on, such as 500, 64k, 256m or 1g")
    return int(number)


def or_none(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    """What `parse` takes, and ``none``."""
    return lambda text: None if text == "none" else parse(text)


def _scaled(text: str, units: dict[str, float] | dict[str, int]) -> float:
    lowered = text.lower()
    unit = max((unit for unit in units if lowered.endswith(unit)), key=len, default="")
    number = float(lowered.removesuffix(unit)) * units.get(unit, 1)
    if not 0 < number < math.inf:
        raise ValueError
    return number
