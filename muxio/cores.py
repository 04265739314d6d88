"""How many cores there are for this process."""

from __future__ import annotations

import os
import sys


def core_count() -> int:
    """How many cores this process may use; elsewhere than on Linux, how many there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
