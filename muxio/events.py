"""The bits that a poller takes and reports.

They have the values of poll(2) and epoll(7), so that those two need no translation. Interest and events share
READ, PRIORITY and WRITE; ERROR, HANGUP and READ_CLOSED are only ever reported; EDGE, ONESHOT and EXCLUSIVE are modes
of a registration.
"""

from __future__ import annotations

READ = 0x1  #: data, a waiting peer (listener) or end of file can be read
PRIORITY = 0x2  #: out-of-band data (TCP), an exceptional condition (devices)
WRITE = 0x4  #: a write takes at least one byte, or a connect has ended
ERROR = 0x8  #: the next operation fails; ask SO_ERROR, or just read or write
HANGUP = 0x10  #: both directions are shut; what was received before may still be read
READ_CLOSED = 0x2000  #: a hint: the peer sends no more; read until ``b""``

EDGE = 1 << 31  #: report a change once, not a condition for as long as it holds
ONESHOT = 1 << 30  #: report once, then rest until ``modify``
EXCLUSIVE = 1 << 28  #: of several pollers that wait for one source, wake few, not all (Linux)

INTEREST = READ | PRIORITY | WRITE
HINTS = ERROR | HANGUP | READ_CLOSED
MODES = EDGE | ONESHOT | EXCLUSIVE

_NAMES = {
    READ: "READ",
    PRIORITY: "PRIORITY",
    WRITE: "WRITE",
    ERROR: "ERROR",
    HANGUP: "HANGUP",
    READ_CLOSED: "READ_CLOSED",
    EDGE: "EDGE",
    ONESHOT: "ONESHOT",
    EXCLUSIVE: "EXCLUSIVE",
}


def describe(events: int) -> str:
    """Spell bits for people: ``describe(READ | HANGUP)`` is ``"READ|HANGUP"``, ``describe(0)`` is ``"0"``."""
    names = [name for bit, name in _NAMES.items() if events & bit]
    unknown = events & ~sum(_NAMES)
    if unknown or not names:
        names.append(hex(unknown) if unknown else "0")
    return "|".join(names)


def objection(events: int) -> str | None:
    """Say why no backend could register these bits, or None where they make sense."""
    if not isinstance(events, int):
        return f"events are bits such as READ | WRITE, not {events!r}"
    if events & (ERROR | HANGUP):
        return f"{describe(events & (ERROR | HANGUP))} is always reported and cannot be asked for"
    if events & READ_CLOSED and not events & READ:
        return "READ_CLOSED comes with READ and cannot be asked for alone"
    if events & EXCLUSIVE and events & (ONESHOT | PRIORITY | READ_CLOSED):
        return f"EXCLUSIVE cannot be combined with {describe(events & (ONESHOT | PRIORITY | READ_CLOSED))}"
    if events & ~(INTEREST | READ_CLOSED | MODES):
        return f"unknown bits in events: {describe(events)}"
    return None


def combinations(can: int) -> dict[int, int]:
    """Every sensible choice of interest and modes out of the bits in `can`, as the table of a backend: to itself."""
    found = {0}
    for bit in _NAMES:
        if bit & (can | READ_CLOSED):
            found |= {events | bit for events in found}
    return {events: events for events in sorted(found) if objection(events) is None}
