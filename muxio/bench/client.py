"""The load generator of ``muxio bench echo`` where there is no C compiler: what client.c does, over muxio's poller.

`muxio.bench.load` says what its parameters mean and what it prints.
"""

from __future__ import annotations

import enum
import errno
import json
import math
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import muxio
from muxio import ERROR, HANGUP, READ, WRITE
from muxio.bench.load import PERCENTILES, Load

PERIOD, STRIDE, CHUNK, RESET_BYTES = 65_521, 7_919, 65_536, 16_384

PATTERN = random.Random(1).randbytes(PERIOD)
PATTERN += (PATTERN + PATTERN)[:CHUNK]

DRIP_PAUSE, RESET_PAUSE, TICK = 0.1, 0.5, 0.01  # seconds

RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)

SMALL, SEGMENT = 4096, 536  # buffers and segments of those that do not read; client.c says why
PER_SOURCE = 10_000  # connections from one address; client.c says why


class Kind(enum.Enum):
    BUSY = "busy"
    IDLE = "idle"
    DRIP = "drip"
    DEAF = "deaf"
    RESET = "reset"


NEVER_READS = (Kind.DEAF, Kind.RESET)
HONEST = (Kind.BUSY, Kind.IDLE)


class Phase(enum.Enum):
    SETUP = enum.auto()
    WARMUP = enum.auto()
    WINDOW = enum.auto()
    DRAIN = enum.auto()


class Wrong(Exception):
    """The server did not do what it should."""


class Peer:
    """A connection. Places are places in its stream of bytes."""

    __slots__ = (
        "connecting",
        "due",
        "echoes",
        "interest",
        "kind",
        "message",
        "next",
        "number",
        "received",
        "sent",
        "served",
        "sock",
        "started",
        "target",
        "waiting",
    )

    def __init__(self, kind: Kind, number: int) -> None:
        self.kind = kind
        self.number = number
        self.sock: socket.socket | None = None
        self.connecting = self.served = self.waiting = False
        self.interest = 0
        self.sent = self.received = 0
        self.target = 0.0  # the end of the message under way; infinite for those that never stop sending
        self.started = 0.0  # when it was sent, or in an open loop ought to have been
        self.message = self.due = 0  # open loop: the number of that message, and how many more ought to be on the way
        self.next = 0.0  # a hostile peer's next deed
        self.echoes = 0  # in the measured window

    def bytes_at(self, place: int, length: int) -> bytes:
        start = (self.number * STRIDE + place) % PERIOD
        return PATTERN[start : start + length]

    def __str__(self) -> str:
        return f"{self.kind.value} connection {self.number}"


class Client:
    def __init__(self, load: Load, port: int, clocks: Sequence[int]) -> None:
        self.load = load
        self.address = ("127.0.0.1", port)
        self.cpu_clocks = clocks
        self.poller: muxio.Poller[Peer] = muxio.Poller()
        kinds = [kind for kind in Kind for _ in range(getattr(load, kind.value))]
        self.peers = [Peer(kind, number) for number, kind in enumerate(kinds)]
        self.busy = self.peers[: load.busy]
        self.hostile = [peer for peer in self.peers if peer.kind not in HONEST]
        self.dialled = self.opening = self.waiting = 0
        self.unserved = len(self.peers)
        self.phase = Phase.SETUP
        self.began = time.monotonic()
        self.phase_end = self.began + load.patience
        self.tick = self.began if self.hostile else math.inf
        self.loop_start = 0.0
        self.messages = self.cuts = 0
        self.latencies: list[float] = []
        self.lateness: list[float] = []
        self.clocks: list[tuple[float, float, float]] = []  # of the day, the server and this process; at both ends
        self.setup = 0.0

    def run(self) -> dict[str, Any]:
        """Do what is to be done, and return what was found."""
        self.dial_more()
        while True:
            now = time.monotonic()
            if self.move_on(now):
                return self.found()
            if now >= self.tick:
                self.do_harm(now)
            wake = min(self.phase_end, self.tick)
            if self.load.rate and self.phase in (Phase.WARMUP, Phase.WINDOW):
                self.release(now)
                wake = min(wake, self.time_of(self.messages))
            for peer, events in self.poller.poll(max(0.0, wake - time.monotonic())):
                if events:
                    self.handle(peer, events)

    def close(self) -> None:
        for peer in self.peers:
            if peer.sock is not None:
                self.hang_up(peer, 0.0)
        self.poller.close()

    # Connections

    def dial_more(self) -> None:
        while self.dialled < len(self.peers) and self.opening < self.load.window:
            self.opening += 1
            self.dialled += 1
            self.dial(self.peers[self.dialled - 1])

    def dial(self, peer: Peer) -> None:
        sock = peer.sock = socket.socket()
        sock.setblocking(False)
        if sys.platform == "linux" and (source := peer.number // PER_SOURCE):
            sock.bind((f"127.0.0.{1 + source}", 0))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if peer.kind in NEVER_READS:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            if hasattr(socket, "TCP_MAXSEG"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        number = sock.connect_ex(self.address)
        if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise Wrong(f"{peer}: connect: {os.strerror(number)}")
        peer.sent = peer.received = 0
        peer.target = 0.0
        peer.connecting = True
        peer.waiting = False
        peer.interest = WRITE
        self.poller.register(sock, WRITE, peer)

    def connected(self, peer: Peer) -> None:
        assert peer.sock is not None
        if number := peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.lost(peer, f"connect: {os.strerror(number)}")
            return
        peer.connecting = False
        now = time.monotonic()
        if peer.kind in NEVER_READS:
            self.serve_first(peer, now)
        hello = {Kind.BUSY: self.load.size, Kind.IDLE: self.load.hello, Kind.DRIP: 1, Kind.RESET: RESET_BYTES}
        self.start(peer, hello.get(peer.kind, math.inf), now)

    def serve_first(self, peer: Peer, now: float) -> None:
        if not peer.served:
            peer.served = True
            self.opening -= 1
            self.unserved -= 1
            pause = DRIP_PAUSE if peer.kind is Kind.DRIP else RESET_PAUSE
            peer.next = now + peer.number * STRIDE % 1000 * pause / 1000
            self.dial_more()

    def hang_up(self, peer: Peer, now: float) -> None:
        assert peer.sock is not None
        self.poller.unregister(peer.sock)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        peer.sock.close()
        peer.sock = None
        peer.next = now + RESET_PAUSE

    def lost(self, peer: Peer, what: str) -> None:
        """The server ended it, which it may do to hostile peers only."""
        if peer.kind in HONEST:
            raise Wrong(f"{peer}: {what}")
        self.cuts += 1
        now = time.monotonic()
        self.serve_first(peer, now)
        self.hang_up(peer, now)

    # Bytes

    def handle(self, peer: Peer, events: int) -> None:
        if peer.connecting:
            self.connected(peer)
            return
        if peer.sock is not None and events & WRITE:
            self.push(peer)
        if peer.sock is not None and events & (READ | ERROR | HANGUP):
            if peer.kind not in NEVER_READS:
                self.pull(peer)
            elif events & (ERROR | HANGUP):
                self.lost(peer, "hung up")

    def start(self, peer: Peer, length: float, when: float) -> None:
        peer.started = when
        peer.target += length
        if not peer.waiting:
            peer.waiting = True
            self.waiting += peer.kind is Kind.BUSY
        self.push(peer)

    def push(self, peer: Peer) -> None:
        assert peer.sock is not None
        for _ in range(16):
            if peer.sent == peer.target:
                break
            try:
                peer.sent += peer.sock.send(peer.bytes_at(peer.sent, int(min(CHUNK, peer.target - peer.sent))))
            except BlockingIOError:
                break
            except OSError as error:
                self.lost(peer, f"send: {error.strerror}")
                return
        interest = (READ if peer.kind not in NEVER_READS else 0) | (WRITE if peer.sent < peer.target else 0)
        if interest != peer.interest:
            peer.interest = interest
            self.poller.modify(peer.sock, interest)

    def pull(self, peer: Peer) -> None:
        assert peer.sock is not None
        try:
            data = peer.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self.lost(peer, f"recv: {error.strerror}")
            return
        if not data:
            self.lost(peer, "closed by the server")
            return
        if peer.received + len(data) > peer.sent:
            raise Wrong(f"{peer}: more bytes came back than were sent")
        if data != peer.bytes_at(peer.received, len(data)):
            raise Wrong(f"{peer}: wrong bytes")
        peer.received += len(data)
        if peer.received == peer.target:
            self.echoed(peer)

    def echoed(self, peer: Peer) -> None:
        now = time.monotonic()
        peer.waiting = False
        self.waiting -= peer.kind is Kind.BUSY
        if not peer.served:
            self.serve_first(peer, now)
        elif peer.kind is Kind.BUSY:
            self.latencies.append(now - peer.started)
            if self.phase is Phase.DRAIN:
                return
            peer.echoes += 1
            if not self.load.rate:
                self.start(peer, self.load.size, now)
            elif peer.due:
                peer.due -= 1
                peer.message += len(self.busy)
                self.start(peer, self.load.size, self.time_of(peer.message))

    # Time

    def time_of(self, message: int) -> float:
        """When a message of an open loop is to be sent."""
        return self.loop_start + message / self.load.rate

    def release(self, now: float) -> None:
        """Open loop: send what is due."""
        while (intended := self.time_of(self.messages)) <= now:
            peer = self.busy[self.messages % len(self.busy)]
            if peer.waiting:
                peer.due += 1
            else:
                peer.message = self.messages
                self.lateness.append(time.monotonic() - intended)
                self.start(peer, self.load.size, intended)
            self.messages += 1

    def do_harm(self, now: float) -> None:
        for peer in self.hostile:
            if not peer.served or now < peer.next:
                continue
            if peer.sock is None:
                peer.next = now + RESET_PAUSE
                self.dial(peer)
            elif peer.kind is Kind.RESET:
                self.hang_up(peer, now)
            elif peer.kind is Kind.DRIP and not peer.connecting:
                peer.next += DRIP_PAUSE
                if not peer.waiting:
                    self.start(peer, 1, now)
        self.tick = now + TICK

    def move_on(self, now: float) -> bool:
        """To the next phase, if it is time; true after the last."""
        load = self.load
        if self.phase is Phase.SETUP and not self.unserved:
            self.setup = now - self.began
            if not (self.busy and load.duration):
                return True
            self.phase, self.phase_end, self.loop_start = Phase.WARMUP, now + load.warmup, now
            for peer in self.busy if not load.rate else ():
                self.start(peer, load.size, now)
        elif self.phase is Phase.WARMUP and now >= self.phase_end:
            self.phase, self.phase_end = Phase.WINDOW, now + load.duration
            self.latencies.clear()
            self.lateness.clear()
            for peer in self.busy:
                peer.echoes = 0
            self.read_clocks(now)
        elif self.phase is Phase.WINDOW and now >= self.phase_end:
            self.phase, self.phase_end = Phase.DRAIN, now + load.patience
            self.read_clocks(now)
            for peer in self.busy:  # what was not even sent counts with its age
                for later in range(1, peer.due + 1):
                    self.latencies.append(now - self.time_of(peer.message + later * len(self.busy)))
                peer.due = 0
        if self.phase is Phase.SETUP and now >= self.phase_end:
            raise Wrong(f"{self.unserved} of {len(self.peers)} connections were not served within {load.patience:g} s")
        if self.phase is Phase.DRAIN and self.waiting and now >= self.phase_end:
            raise Wrong(f"{self.waiting} echoes did not come within {load.patience:g} s")
        return self.phase is Phase.DRAIN and not self.waiting

    def read_clocks(self, now: float) -> None:
        server = 0.0
        if sys.platform != "win32":
            server = sum(time.clock_gettime(clock) for clock in self.cpu_clocks)
        self.clocks.append((now, server, time.process_time()))

    def found(self) -> dict[str, Any]:
        seconds, server, own = 0.0, 0.0, 0.0
        if self.clocks:
            seconds, server, own = (end - start for start, end in zip(*self.clocks, strict=True))
        echoes = [peer.echoes for peer in self.busy]
        return {
            "error": None,
            "setup": self.setup,
            "connections": len(self.busy),
            "seconds": seconds,
            "echoes": sum(echoes),
            "slowest": min(echoes, default=0),
            "starved": echoes.count(0),
            "server_cpu": server if self.cpu_clocks else None,
            "own_cpu": own,
            "cuts": self.cuts,
            "latency": percentiles(self.latencies),
            "lateness": percentiles(self.lateness),
        }


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    places = [1.0 if name == "max" else float(name[1:]) / 100 for name in PERCENTILES]
    return {
        name: ordered[min(int(place * len(ordered)), len(ordered) - 1)] * 1e6
        for name, place in zip(PERCENTILES, places, strict=True)
    }


def main(words: Sequence[str]) -> int:
    given = dict(word.split("=") for word in words)
    port, clocks = int(given.pop("port")), [int(clock) for clock in given.pop("clock").split(",") if clock]
    defaults = asdict(Load())
    client = Client(Load(**{name: type(defaults[name])(value) for name, value in given.items()}), port, clocks)
    try:
        print(json.dumps(client.run()), flush=True)
        sys.stdin.read()
    except Wrong as wrong:
        print(json.dumps({"error": str(wrong)}), flush=True)
        return 1
    finally:
        client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
