"""A TCP proxy that does to a connection, by a plan, what networks and peers do to it.

A `FaultPlan` is data: what happens to each direction, action by action, counted in bytes. A `FaultProxy` stands between
a client and a server and follows it, the same for every connection::

    plan = FaultPlan.random(7)                              # or FaultPlan.random(7, lossy=True), or one of your own
    with FaultProxy(server.server_address, plan) as proxy:
        ...                                                 # the client connects to proxy.address
    print(plan)                                             # Python: paste it, and the same happens again

What can happen:

========================= ==============================================================================================
`Pass`, `Trickle`         bytes go on as they come, or a few at a time
`Stall`                   the direction rests: it neither receives nor sends. One direction is late against the other,
                          the sender's buffers fill, and what came in several segments goes on in one
`HalfClose`               the direction ends, with FIN; what comes after is thrown away
`Cut`, `Abort`            the whole connection ends, with close() or with a reset (RST)
========================= ==============================================================================================

The bytes are never changed. With the first three, the plan is lossless: all of them arrive, in order, and so do the EOF
or the reset behind them. The others make it lossy: each side gets a beginning of what the other sent.

The proxy is one thread over the standard library's selectors: so it shares no code with the servers it is there to
judge, and nobody blocks in a socket that is to be reset (close() would send the RST only once he has left).
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE
from types import TracebackType
from typing import Any, TypeAlias, final

from muxio.testing.scripts import RESET_ON_CLOSE, limit_segments

__all__ = ["Abort", "Action", "Cut", "FaultPlan", "FaultProxy", "HalfClose", "Pass", "Stall", "Trickle"]

RECEIVE_SIZE = 64 * 1024
"""Bytes that one recv() asks for."""

BUFFER_SIZE = 64 * 1024
"""SO_RCVBUF towards the target and SO_SNDBUF towards the client, in bytes. With the systems' megabytes the proxy would
take in what a client does not read, and the server would never meet a full socket. The other way they are the system's:
a client that sends before it reads gets as far as without the proxy."""

ACCEPT_REST = 0.01
"""Seconds without accepting after an error of accept(): out of descriptors, mostly."""


@dataclass(frozen=True)
class Pass:
    """The next `size` bytes go on as they come."""

    size: int

    def __post_init__(self) -> None:
        _check(size=self.size)


@dataclass(frozen=True)
class Trickle:
    """The next `size` bytes go on at most `chunk` at a time, with `pause` seconds after each."""

    size: int
    chunk: int = 1
    pause: float = 0.0

    def __post_init__(self) -> None:
        _check(size=self.size, chunk=self.chunk - 1, pause=self.pause)


@dataclass(frozen=True)
class Stall:
    """Nothing is received or sent for `seconds`. A peer's end is noticed only after it, in this direction."""

    seconds: float

    def __post_init__(self) -> None:
        _check(seconds=self.seconds)


@dataclass(frozen=True)
class HalfClose:
    """This direction ends, with FIN, and the other goes on. What its sender sends now is received and thrown away."""


@dataclass(frozen=True)
class Cut:
    """Both sockets are closed: the peers see EOF behind what was sent, or a reset if more of theirs was on its way."""


@dataclass(frozen=True)
class Abort:
    """Both sockets are reset: SO_LINGER with no time, then close(). What was sent may be lost on the way."""


Action: TypeAlias = Pass | Trickle | Stall | HalfClose | Cut | Abort

_ENDINGS = (HalfClose, Cut, Abort)


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is too small, or not finite")


@dataclass(frozen=True)
class FaultPlan:
    """What happens to each direction, in order; after the last action everything passes. Its ``repr`` is Python.

    upstream: the direction from the client to the server.
    downstream: the direction from the server to the client.

    If a direction's EOF comes first, the rest of its actions does not happen. ``FaultPlan()`` does nothing.

    ValueError: an action stands behind a `HalfClose`, `Cut` or `Abort`, and would never happen.
    """

    upstream: tuple[Action, ...] = ()
    downstream: tuple[Action, ...] = ()

    def __post_init__(self) -> None:
        for actions in (self.upstream, self.downstream):
            if any(isinstance(action, _ENDINGS) for action in actions[:-1]):
                raise ValueError("nothing can follow a HalfClose, Cut or Abort")

    @property
    def lossless(self) -> bool:
        """Whether every byte arrives."""
        return not any(isinstance(action, _ENDINGS) for action in self.upstream + self.downstream)

    @classmethod
    def random(cls, seed: int | str, *, lossy: bool = False) -> FaultPlan:
        """Make up a plan. The same seed makes the same plan, on every system and version of Python.

        lossy: let one direction or both end early, or the connection.

        A direction rests for a fifth of a second at most, and mostly for some milliseconds. All faults are within its
        first two million bytes, and more often near the beginning.
        """
        chance = _Chance(seed)
        directions = [chance.actions(), chance.actions()]
        if lossy:
            first = chance.below(2)
            directions[first] += chance.ending()
            if not chance.below(3):
                directions[1 - first] += chance.ending()
        return cls(*map(tuple, directions))


class _Chance:
    """Draws with random() alone: of all methods, the one whose numbers Python promises to keep."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        return int(self._random() * limit)

    def size(self, bits: int) -> int:
        """Below ``2 ** bits``; each order of magnitude is as likely as the others."""
        return int(2 ** (self._random() * bits)) - 1

    def actions(self) -> list[Action]:
        return [self._action() for _ in range(self.below(5))]

    def _action(self) -> Action:
        kind = self.below(4)
        if kind == 0:
            return Stall((1 + self.below(20)) / 1000)
        if kind == 1:
            return Pass(self.size(18))
        chunk = 1 + self.size(11)
        pieces = 1 + self.below(25)
        return Trickle(chunk * pieces, chunk, 0.001 if kind == 2 else 0.0)

    def ending(self) -> list[Action]:
        endings: list[Action] = [HalfClose(), Cut(), Abort()]
        return [Pass(self.size(18)), endings[self.below(3)]]


_Task: TypeAlias = Generator[tuple[socket.socket, int] | float, None, None]
"""Yields what it waits for: a socket and the event on it, or so many seconds."""


class _Link:
    """A client's connection and the proxy's own one to the target."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.over = False
        self._reset = False
        self._flowing = 2  # directions whose EOF has not come

    def end(self, reset: bool = False) -> None:
        """Let the proxy `close` it when the task that runs has come to its next wait."""
        self.over = True
        self._reset = reset

    def close(self) -> None:
        for sock in (self.client, self.server):
            if self._reset:
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                except OSError:
                    pass  # this is the one that was reset (macOS)
            sock.close()

    def flow(self, source: socket.socket, sink: socket.socket, actions: tuple[Action, ...]) -> _Task:
        """Task: one direction. A reset of either socket is passed on to the other."""
        try:
            at_eof = yield from self._follow(source, sink, actions)
            if not self.over:
                sink.shutdown(socket.SHUT_WR)
                while not at_eof:
                    yield source, EVENT_READ
                    at_eof = _receive(source, RECEIVE_SIZE) == b""
                self._flowing -= 1
                if not self._flowing:
                    self.end()
        except OSError:
            self.end(reset=True)

    def _follow(
        self, source: socket.socket, sink: socket.socket, actions: tuple[Action, ...]
    ) -> Generator[tuple[socket.socket, int] | float, None, bool]:
        """Do what is planned up to the direction's end; tell whether that was the source's EOF."""
        for action in (*actions, Pass(sys.maxsize)):
            at_eof = False
            match action:
                case Pass(size):
                    at_eof = yield from _carry(source, sink, size)
                case Trickle(size, chunk, pause):
                    at_eof = yield from _carry(source, sink, size, chunk, pause)
                case Stall(seconds):
                    yield seconds
                case HalfClose():
                    break
                case Cut() | Abort():
                    self.end(reset=isinstance(action, Abort))
                    break
            if at_eof:
                return True
        return False


def _carry(
    source: socket.socket, sink: socket.socket, size: int, chunk: int = RECEIVE_SIZE, pause: float = 0.0
) -> Generator[tuple[socket.socket, int] | float, None, bool]:
    """Carry `size` bytes; True when the source's EOF came before them."""
    while size:
        yield source, EVENT_READ
        data = _receive(source, min(size, RECEIVE_SIZE))
        if data is None:
            continue
        if not data:
            return True
        size -= len(data)
        for start in range(0, len(data), chunk):
            piece = data[start : start + chunk]
            while piece:
                try:
                    piece = piece[sink.send(piece) :]
                except BlockingIOError:
                    yield sink, EVENT_WRITE
            if pause:
                yield pause
    return False


def _receive(sock: socket.socket, size: int) -> bytes | None:
    """Some bytes, none at EOF, None if none are there after all."""
    try:
        return sock.recv(size)
    except BlockingIOError:
        return None


@final
class FaultProxy:
    """Listens on a port of 127.0.0.1, and connects whoever comes to `target`, with faults in between.

    target: where the server listens, (host, port) with a numeric IPv4 or IPv6 address, as ``server_address`` gives it.
    plan: what happens to each connection; each begins it from the start.

    OSError: no port or no descriptor is left.

    Runs from the beginning, in a thread of its own, until `close`; a context manager, which closes. A client whose
    connection the target refuses sees a reset.
    """

    def __init__(self, target: Any, plan: FaultPlan) -> None:
        self.target = target
        self.plan = plan
        self._links: set[_Link] = set()
        self._timers: list[tuple[float, int, _Link, _Task]] = []  # a heap: when, and in which order at the same time
        self._order = itertools.count()
        self._selector = selectors.DefaultSelector()
        try:
            self._wake, self._waker = socket.socketpair()
        except OSError:
            self._selector.close()
            raise
        try:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        except OSError:
            self._give_back(self._wake, self._waker)
            raise
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)  # accepted sockets inherit it ...
        limit_segments(self._listener)  # ... and this
        self._listener.setblocking(False)
        self._selector.register(self._wake, EVENT_READ)
        self._selector.register(self._listener, EVENT_READ)
        self.address: tuple[str, int] = self._listener.getsockname()
        """Where clients connect to: ("127.0.0.1", port)."""
        self._thread = threading.Thread(target=self._run, name=f"fault proxy for {target}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<FaultProxy from {self.address} to {self.target}, {self.connections} connected, {self.plan}>"

    @property
    def connections(self) -> int:
        """How many clients are connected: accepted, and not yet closed towards both sides."""
        return len(self._links)

    def close(self) -> None:
        """Close every connection as `Cut` does, and give everything back. From any thread; again, it does nothing."""
        self._waker.close()  # its EOF ends the thread
        self._thread.join()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # In the thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._give_back(self._wake, self._listener)
            for link in self._links:
                link.close()
            self._links.clear()

    def _turn(self) -> bool:
        """Wait, and run the tasks whose wait is over; False when the proxy is closed."""
        timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        for key, events in self._selector.select(timeout):
            if key.fileobj is self._wake:
                return False
            if key.fileobj is self._listener:
                self._accept()
                continue
            waiting: dict[int, tuple[_Link, _Task]] = key.data  # empty if the link has ended in this turn
            due = [waiting.pop(event) for event in (EVENT_READ, EVENT_WRITE) if events & event and event in waiting]
            if due:
                self._watch(key.fileobj, waiting)
            for link, task in due:
                self._step(link, task)
        while self._timers and self._timers[0][0] <= time.monotonic():
            _, _, link, task = heapq.heappop(self._timers)
            self._step(link, task)
        return True

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # it has gone again
        except OSError:
            time.sleep(ACCEPT_REST)
            return
        try:
            server = socket.socket(socket.AF_INET6 if ":" in self.target[0] else socket.AF_INET)
        except OSError:
            client.close()
            return
        link = _Link(client, server)
        self._links.add(link)
        self._step(link, self._connect(link))

    def _connect(self, link: _Link) -> _Task:
        """Task: connect to the target, and let both directions flow."""
        try:
            link.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
            limit_segments(link.server)
            for sock in (link.client, link.server):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                link.server.connect(self.target)
            except BlockingIOError:
                yield link.server, EVENT_WRITE
                number = link.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise OSError(number, "connect") from None
        except OSError:
            link.end(reset=True)
            return
        self._step(link, link.flow(link.client, link.server, self.plan.upstream))
        self._step(link, link.flow(link.server, link.client, self.plan.downstream))

    def _step(self, link: _Link, task: _Task) -> None:
        """Run a task up to its next wait."""
        if link.over:
            return
        wait = next(task, None)
        if link.over:
            self._remove(link)
        elif isinstance(wait, tuple):
            sock, event = wait
            known = self._selector.get_map().get(sock)
            waiting = {} if known is None else known.data
            waiting[event] = link, task
            self._watch(sock, waiting)
        elif wait is not None:
            heapq.heappush(self._timers, (time.monotonic() + wait, next(self._order), link, task))

    def _watch(self, sock: Any, waiting: dict[int, tuple[_Link, _Task]]) -> None:
        """Watch a socket for what is waited for; not at all if that is nothing, lest a hang-up spins."""
        known = sock in self._selector.get_map()
        if not waiting:
            self._selector.unregister(sock)
        elif known:
            self._selector.modify(sock, sum(waiting), waiting)
        else:
            self._selector.register(sock, sum(waiting), waiting)

    def _remove(self, link: _Link) -> None:
        if link not in self._links:
            return  # by the first direction, already while connecting
        for sock in (link.client, link.server):
            if sock in self._selector.get_map():
                self._selector.unregister(sock).data.clear()
        link.close()
        self._links.remove(link)

    def _give_back(self, *socks: socket.socket) -> None:
        self._selector.close()
        for sock in socks:
            sock.close()
