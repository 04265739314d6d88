"""How long a server waits for its peers, and how much of everything it takes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["Limits", "Timeouts"]


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a peer has waited, or has let us wait, long enough. None: for ever.

    They are never early, and late by at most a quarter of a second beside what the loop is held up.

    ValueError: a time that is not more than 0.
    """

    first_data: float | None = 60.0
    """From accept to the first byte. A protocol whose messages are longer than that sets a deadline of its own
    (``transport.set_deadline``), so that a byte a second does not keep a connection for ever."""
    idle: float | None = 600.0
    """Without a byte in either direction, while we wait for the peer."""
    write: float | None = 60.0
    """Without the peer taking any of what is queued for it."""
    lifetime: float | None = 86_400.0
    """From accept."""
    close: float | None = 30.0
    """From ``close()``, or from when both sides have said that they send no more, until all that is queued is sent."""
    linger: float | None = 5.0
    """From our EOF to the peer's, after ``close()``. Its input is thrown away meanwhile: a socket that is closed with
    unread input resets, and may take what was sent last with it (RFC 1122, section 4.2.2.13)."""

    def __post_init__(self) -> None:
        _check(self, "seconds")


@dataclass(frozen=True)
class Limits:
    """The most that a server takes on. None: no limit.

    ValueError: a limit that is not more than 0.
    """

    connections: int | None = 65_536
    """Connections at once. Over that the listener rests, and peers wait in its backlog."""
    per_peer: int | None = None
    """Connections at once with one host. Over that its connections are reset as soon as they are accepted."""
    buffered: int | None = 268_435_456
    """Bytes queued for all peers together. Over that, what comes from a peer is only read while nothing is queued for
    it, and nobody is accepted; so what is read already may still be answered, once for each peer."""

    def __post_init__(self) -> None:
        _check(self, "a number")


def _check(values: object, unit: str) -> None:
    for field in fields(values):  # type: ignore[arg-type]
        value = getattr(values, field.name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{field.name} is {unit} above 0, or None for no limit; not {value!r}")
