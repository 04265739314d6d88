"""The conformance suite over every backend of this machine; MUXIO_BACKEND leaves one of them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import muxio
import muxio.testing
from muxio import ERROR, HANGUP, READ_CLOSED
from muxio.testing import PollerConformance

FORCED = os.environ.get("MUXIO_BACKEND")
ALL = ERROR | HANGUP | READ_CLOSED

# Each poller that is tested here, and how to make it

#: The hints that a facility gives whenever they are true. What others say of them differs from case to case.
TELLS = {"epoll": ALL, "poll": ALL} if sys.platform == "linux" else {}

POLLERS: dict[str, Callable[[], Any]] = {name: partial(muxio.Poller, name) for name in muxio.backends()}

if sys.platform == "linux":
    from muxio.backends.kqueue import Backend

    kqueue_double: Any = importlib.import_module("kqueue_double")

    def over_the_double(system: str) -> muxio.Poller[Any]:
        """A poller over a kqueue of another system."""
        own = kqueue_double.FLAVOUR
        kqueue_double.FLAVOUR = getattr(kqueue_double, system.upper())
        try:
            return muxio.Poller(Backend(kqueue_double, system))
        finally:
            kqueue_double.FLAVOUR = own

    POLLERS["kqueue of freebsd"] = partial(over_the_double, "freebsd")
    POLLERS["kqueue of darwin"] = partial(over_the_double, "darwin")

if FORCED:
    POLLERS = {name: make for name, make in POLLERS.items() if name.split()[0] == FORCED}
    if not POLLERS:
        pytest.skip(f"MUXIO_BACKEND is {FORCED}, which does not work here", allow_module_level=True)

for name, make in POLLERS.items():
    title = "Test" + name.title().replace(" ", "")
    globals()[title] = type(
        title, (PollerConformance,), {"make_poller": staticmethod(make), "tells": TELLS.get(name, 0)}
    )


def test_without_pytest_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "muxio.testing.conformance")
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match="pip install pytest"):
        muxio.testing.PollerConformance  # noqa: B018


def test_without_hypothesis_one_test_is_skipped_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "muxio.testing.model", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(pytest.skip.Exception, match="pip install 'muxio\\[testing]'"):
        PollerConformance().test_any_order_of_operations(watchdog=lambda: None)
