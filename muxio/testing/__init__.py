"""Helps for testing readiness I/O and servers; what is here is imported by name, a module at a time."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muxio.testing.conformance import PollerConformance
    from muxio.testing.faults import FaultPlan, FaultProxy

__all__ = ["FaultPlan", "FaultProxy", "PollerConformance"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing else: the conformance suite needs pytest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "conformance" if name == "PollerConformance" else "faults"
    pytest = sys.modules.get("pytest")
    if pytest is not None and module == "conformance":  # so that a failing assert shows its values
        pytest.register_assert_rewrite(f"{__name__}.conformance", f"{__name__}.model")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
