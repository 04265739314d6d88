"""The loop: a poller, timers, and calls from this and other threads."""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any
from typing import Protocol as Interface

from muxio.backends.waker import Waker
from muxio.events import READ
from muxio.poller import Poller
from muxio.server.connection import AnyProtocol
from muxio.server.connector import Connector
from muxio.server.group import Group
from muxio.server.limits import Timeouts
from muxio.server.offload import Job, Offload, Pool
from muxio.server.sockets import Address

logger = logging.getLogger("muxio.server")


_TICK = 0.001  #: seconds; how coarse `Loop.now` is

#: Seconds from which on a turn of the loop has held up everybody.
_HELD_UP = 0.05

#: Seconds that `Loop.lag` is remembered for.
_LATELY = 2.0


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


class Timer(Handle):
    """A call that is going to be made when its time has come."""

    __slots__ = ("_loop",)

    def __init__(self, loop: Loop, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        super().__init__(function, arguments)
        self._loop: Loop | None = loop  # while it waits

    def cancel(self) -> None:
        loop, self._loop = self._loop, None
        super().cancel()
        if loop is not None:
            loop.forget_cancelled()

    def run(self) -> None:
        self._loop = None
        super().run()


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
    clock: what time it is, in seconds: `time.monotonic`, unless a test needs another.
    offload: what `offload` uses; see `Offload`.

    All methods but `call_soon_threadsafe` belong to the thread that runs the loop.
    """

    def __init__(
        self, backend: str | None = None, clock: Callable[[], float] = monotonic, offload: Offload | None = None
    ) -> None:
        self.poller: Poller[Handler] = Poller(backend)
        #: The loop's clock: ``time()`` is in seconds.
        self.time = clock
        #: `peer_time` when this turn of the loop began to hand out events, for who wants to remember that. One number
        #: for all turns within a millisecond, and late by no more: one each would cost 32 bytes a connection.
        self.now = clock()
        self._turn_began = self.now
        self._held_up = 0.0
        #: The most seconds that a timer was late by in the last few: about how long one turn lets the others wait.
        self.lag = 0.0
        self._lag_expires = 0.0
        #: The connections that `connect` made.
        self.clients = Group(self, Timeouts(first_data=None, idle=None, lifetime=None))
        #: Those that `connect` has not made yet.
        self.connectors: set[Connector] = set()
        self._ends_clients = False
        self._soon: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # of the timers
        self._order = itertools.count()
        self._stopping = False
        self._signals: _SignalChannel | None = None
        try:
            #: What was offloaded.
            self.jobs = Pool(offload, self.call_soon_threadsafe)
        except BaseException:
            self.poller.close()
            raise

    def peer_time(self) -> float:
        """The time by which peers are judged: when this turn began, less what callbacks have held up the loop.

        What a peer sent meanwhile was not received, and that is not its fault.
        """
        return self._turn_began - self._held_up

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
        return self.call_at(self.time() + delay, function, *arguments)

    def call_at(self, when: float, function: Callable[..., object], *arguments: Any) -> Handle:
        """Call a function when `time()` says `when`. Calls for one time come in the order of asking."""
        if when != when:
            raise ValueError("a time is a number, not NaN")
        timer = Timer(self, function, arguments)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def forget_cancelled(self) -> None:
        """A timer was cancelled. When half of them are, they go, so that they do not pile up until their times."""
        self._cancelled += 1
        if self._cancelled > len(self._timers) // 2:
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def connect(self, address: Address, factory: Callable[[], AnyProtocol]) -> Connector:
        """Connect to (host, port), or to the path of a Unix socket, and run a protocol on the connection.

        The protocol is made at once. It hears ``connection_made`` when the connection stands, and only
        ``connection_lost(error)`` if it does not come to that. Returns an object whose ``cancel`` gives up trying.

        OSError: a host name that does not resolve. Looking a name up may block; a numeric address does not.
        RuntimeError: the server whose loop this is closes.
        """
        if self._ends_clients:
            raise RuntimeError("the loop is about to be closed, and connects no more")
        return Connector(self, address, factory)

    def offload(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Let a thread or a process call a function that takes its time, and go on serving meanwhile.

        Returns a `Job`; its callbacks are called by this loop. It belongs to no connection: a protocol takes
        `Transport.offload`, whose answers come in order, and end with the connection. When the loop is closed, jobs are
        cancelled.

        RuntimeError: the loop was closed.
        """
        return self.jobs.submit(None, partial(function, *arguments))

    def end_clients(self) -> None:
        """Reset the connections that `connect` made, give up those that it has not made yet, and make no more."""
        self._ends_clients = True
        for connector in list(self.connectors):
            connector.cancel()
        for client in self.clients:
            client.abort()

    def run_once(self) -> None:
        """Run one turn that does not wait."""
        self.call_soon(self.stop)
        self.run()

    def run(self) -> None:
        """Serve until `stop`."""
        self._stopping = False
        poll, clock = self.poller.poll, self.time
        now = clock()
        while not self._stopping:
            # A turn: wait, hand out events, make the calls that are due and those that were asked for.
            timeout = None
            before = clock()
            if before - now > _HELD_UP:
                self._held_up += before - now
            if self._soon:
                timeout = 0.0
            elif self._timers:
                timeout = self._timers[0][0] - before
                if timeout < 0.0:
                    timeout = 0.0
            batch = poll(timeout)
            self._turn_began = now = clock()
            if now - self._held_up > self.now:
                self.now = now - self._held_up + _TICK
            for handler, events in batch:
                if events:
                    try:
                        handler.ready(events)
                    except Exception as error:
                        handler.failed(error)
            if self._timers and self._timers[0][0] <= now:
                self._run_timers(now)
            if self._soon:
                for _ in range(len(self._soon)):  # who asks meanwhile waits a turn, so that sockets are not starved
                    self._soon.popleft().run()

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
        self.jobs.close()
        self._soon.clear()
        self._timers.clear()
        self.poller.close()
        if self._signals is not None:
            self._signals.waker.close()
            self._signals = None

    def _run_timers(self, now: float) -> None:
        """Make the calls whose times had come when the turn began."""
        late = now - self._timers[0][0]
        if late >= self.lag or now >= self._lag_expires:
            self.lag, self._lag_expires = late, now + _LATELY
        newest = next(self._order)  # who asks meanwhile for a time that is over waits a turn as well
        while self._timers and self._timers[0][0] <= now and self._timers[0][1] < newest:
            timer = heapq.heappop(self._timers)[2]
            if timer.cancelled():
                self._cancelled -= 1
            else:
                timer.run()
