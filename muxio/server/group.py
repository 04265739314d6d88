"""What connections have in common: their time-outs, how much is queued for all of them, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from muxio.server.limits import Timeouts
from muxio.server.wheel import TICK, Wheel

if TYPE_CHECKING:
    from muxio.server.connection import Connection
    from muxio.server.loop import Loop

OnLost = Callable[["Connection", Exception | None], object]

#: How many connections are asked for their deadlines in one go, some tenths of a millisecond, before sockets are
#: served again.
_BATCH = 256


class Group:
    """Connections of one loop that are watched over together.

    timeouts: how long their peers may take.
    most_buffered: bytes queued for all of them from which on each is only read while nothing is queued for it.
    on_lost: called with the connection and the first error (or None), right after ``connection_lost``.

    Iterating gives the connections; so it may from other threads.
    """

    def __init__(
        self,
        loop: Loop,
        timeouts: Timeouts | None = None,
        most_buffered: int | None = None,
        on_lost: OnLost | None = None,
    ) -> None:
        self.loop = loop
        # What is compared with on the way is a number in any case.
        timeouts = timeouts or Timeouts()
        self.first_data = _or_inf(timeouts.first_data)
        self.idle = _or_inf(timeouts.idle)
        self.write = _or_inf(timeouts.write)
        self.lifetime = _or_inf(timeouts.lifetime)
        self.close = _or_inf(timeouts.close)
        self.linger = _or_inf(timeouts.linger)
        self.most_buffered = _or_inf(most_buffered)
        #: Bytes that are queued for all peers.
        self.buffered = 0
        #: Of connections that are over.
        self.bytes_in = self.bytes_out = 0
        self.timed_out = self.reset = self.failed = 0
        #: How often bytes came, for any of them.
        self.received = 0
        #: Odd while a connection is in neither the group nor the sums, and another number afterwards.
        self.leaving = 0
        self._on_lost = on_lost
        self._wheel: Wheel[Connection] = Wheel()
        self._turning = False

    def __len__(self) -> int:
        return len(self._wheel)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._wheel)

    def join(self, connection: Connection, deadline: float) -> None:
        """A connection begins; `deadline` is its first one."""
        self._wheel.add(connection, deadline)
        if not self._turning:
            self._turning = True
            self._turn_later()

    def hasten(self, connection: Connection, deadline: float) -> None:
        """A connection has got a deadline that may be earlier than those that it had."""
        self._wheel.hasten(connection, deadline)

    def leave(self, connection: Connection, error: Exception | None) -> None:
        """A connection is over, and its protocol knows."""
        self.leaving += 1
        self._wheel.remove(connection)
        self.bytes_in += connection.bytes_in
        self.bytes_out += connection.bytes_out
        if isinstance(error, TimeoutError):
            self.timed_out += 1
        elif isinstance(error, ConnectionError):
            self.reset += 1
        elif error is not None:
            self.failed += 1
        self.leaving += 1
        if self._on_lost is not None:
            self._on_lost(connection, error)

    def _turn(self) -> None:
        more = True  # should a check raise
        try:
            more = self._wheel.turn(self.loop.peer_time(), _BATCH)
        finally:
            if more:
                self.loop.call_soon(self._turn)
            elif len(self._wheel):
                self._turn_later()
            else:
                self._turning = False

    def _turn_later(self) -> None:
        """When the next slot is due, not a slot's time from now: that would add to what a deadline is late."""
        self.loop.call_later(TICK - self.loop.peer_time() % TICK, self._turn)


def _or_inf(limit: float | None) -> float:
    return math.inf if limit is None else limit
