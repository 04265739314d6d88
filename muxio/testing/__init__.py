"""Helps for testing readiness I/O and servers; what is here is imported by name, a module at a time."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muxio.testing.conformance import PollerConformance

__all__ = ["PollerConformance"]


def __getattr__(name: str) -> Any:
    """Import the conformance suite when it is asked for: it needs pytest, which nothing else here does."""
    if name != "PollerConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pytest = sys.modules.get("pytest")
    if pytest is not None:  # so that a failing assert shows its values
        pytest.register_assert_rewrite(f"{__name__}.conformance")
    return importlib.import_module(f"{__name__}.conformance").PollerConformance
