"""The loop: a poller, timers, and calls from this and other threads."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any
from typing import Protocol as Interface

from muxio.backends.waker import Waker
from muxio.events import READ
from muxio.poller import Poller
from muxio.server.connection import AnyProtocol
from muxio.server.connector import Address, Connector

logger = logging.getLogger("muxio.server")


class Handler(Interface):
    """What is registered with the loop's poller, as the key: somebody who is told."""

    def ready(self, events: int) -> None:
        """The source is ready."""

    def failed(self, error: Exception) -> None:
        """`ready` raised."""


class Handle:
    """A call that is going to be made."""

    __slots__ = ("_arguments", "_function")

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._function: Callable[..., object] | None = function
        self._arguments = arguments

    def cancel(self) -> None:
        """Make the call never. Afterwards and again, it does nothing."""
        self._function, self._arguments = None, ()

    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._function is None

    def run(self) -> None:
        """Make the call, if it was not cancelled. An exception is logged: it is nobody else's."""
        if self._function is not None:
            try:
                self._function(*self._arguments)
            except Exception:
                logger.exception("exception in a call from the loop: %r", self._function)


class _SignalChannel:
    """Lets the loop's thread run Python when a signal has come, so that Python runs the signal's handler."""

    def __init__(self, poller: Poller[Handler]) -> None:
        self.waker = Waker()
        poller.register(self.waker.fd, READ, self)

    def ready(self, events: int) -> None:
        self.waker.drain()

    def failed(self, error: Exception) -> None:
        raise error  # the channel is broken: nothing would wake the loop for a signal any more


class Loop:
    """Runs callbacks when sockets are ready, when times have come, and when somebody asks.

    backend: the poller's backend; the best one by default.

    All methods but `call_soon_threadsafe` belong to the thread that runs the loop.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.poller: Poller[Handler] = Poller(backend)
        self._soon: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._order = itertools.count()
        self._stopping = False
        self._signals: _SignalChannel | None = None

    def time(self) -> float:
        """The loop's clock in seconds: time.monotonic()."""
        return monotonic()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> Handle:
        """Call a function at the next turn of the loop, in the order of asking."""
        handle = Handle(function, arguments)
        self._soon.append(handle)
        return handle

    def call_soon_threadsafe(self, function: Callable[..., object], *arguments: Any) -> Handle:
        """`call_soon` from any thread or signal handler: it wakes the loop. RuntimeError once the loop is closed."""
        handle = self.call_soon(function, *arguments)
        self.poller.wake()
        return handle

    def call_later(self, delay: float, function: Callable[..., object], *arguments: Any) -> Handle:
        """Call a function in `delay` seconds; never early."""
        return self.call_at(monotonic() + delay, function, *arguments)

    def call_at(self, when: float, function: Callable[..., object], *arguments: Any) -> Handle:
        """Call a function when `time()` says `when`. Calls for one time come in the order of asking."""
        handle = Handle(function, arguments)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def connect(self, address: Address, factory: Callable[[], AnyProtocol]) -> Connector:
        """Connect to (host, port), or to the path of a Unix socket, and run a protocol on the connection.

        The protocol is made at once. It hears ``connection_made`` when the connection stands, and only
        ``connection_lost(error)`` if it does not come to that. Returns an object whose ``cancel`` gives up trying.

        OSError: a host name that does not resolve. Looking a name up may block; a numeric address does not.
        """
        return Connector(self, address, factory)

    def run(self) -> None:
        """Serve until `stop`."""
        self._stopping = False
        while not self._stopping:
            self._turn()

    def stop(self) -> None:
        """Let `run` return at the end of this turn."""
        self._stopping = True

    def wakeup_fd(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd``, for a program whose main thread runs the loop.

        Python runs a handler between two bytecodes of the main thread. A signal that comes just before the loop
        blocks in the kernel would wait there for the next event, were it not for the byte that Python writes here.
        """
        if self._signals is None:
            self._signals = _SignalChannel(self.poller)
        return self._signals.waker.sender_fd

    def close(self) -> None:
        """Close the poller. What was registered stays open, calls that wait are dropped."""
        self._soon.clear()
        self._timers.clear()
        self.poller.close()
        if self._signals is not None:
            self._signals.waker.close()
            self._signals = None

    def _turn(self) -> None:
        """Once: wait, hand out events, run what is due, run what was asked for before."""
        timeout = None
        if self._soon:
            timeout = 0.0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - monotonic())
        for handler, events in self.poller.poll(timeout):
            if events:
                try:
                    handler.ready(events)
                except Exception as error:
                    handler.failed(error)
        if self._timers:
            now = monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2].run()
        for _ in range(len(self._soon)):  # those asked for meanwhile wait a turn, so that sockets are not starved
            self._soon.popleft().run()
