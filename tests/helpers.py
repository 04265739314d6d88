"""What several test modules use."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

FIRST_PAUSE = 0.0005  # seconds; doubled after each look,
LONGEST_PAUSE = 0.02  # up to this


def wait_until(condition: Callable[[], T], timeout: float = 10.0, what: str = "") -> T:
    """Wait until *condition* returns something true, and return that.

    *timeout* is in seconds. *what* says in the error what was waited for; without it, the condition's place does.

    Raises `AssertionError` when the time is over and the condition is still false.
    """
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE
    while not (result := condition()):
        left = deadline - time.monotonic()
        if left <= 0:
            raise AssertionError(f"timed out after {timeout:g} s: {what or _place_of(condition)} is still {result!r}")
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)
    return result


def _place_of(condition: Callable[[], object]) -> str:
    code = getattr(condition, "__code__", None)
    if code is None:
        return repr(condition)
    return f"{condition.__qualname__} at {code.co_filename}:{code.co_firstlineno}"
