"""Readiness I/O for Python on every system: one poller over epoll, kqueue, AFD, poll and select."""

from muxio.backends import backends
from muxio.events import (
    EDGE,
    ERROR,
    EXCLUSIVE,
    HANGUP,
    ONESHOT,
    PRIORITY,
    READ,
    READ_CLOSED,
    WRITE,
    describe,
)
from muxio.poller import Poller, Registration, Source
from muxio.selector import Selector

__version__ = "0.1.0"

__all__ = [
    "EDGE",
    "ERROR",
    "EXCLUSIVE",
    "HANGUP",
    "ONESHOT",
    "PRIORITY",
    "READ",
    "READ_CLOSED",
    "WRITE",
    "Poller",
    "Registration",
    "Selector",
    "Source",
    "backends",
    "describe",
]
