"""What a client does, written down as data, and what it saw, so that two servers can be compared.

A `Script` is a list of steps. `observe` runs it against a server and returns an `Observation`; `difference` compares
what the same script saw of two servers. Only what a client can tell in the end counts: which bytes, in which order, and
whether EOF or a reset came after them. How much could be written before anything was read does not: that is the
kernel's.

>>> script = Script((Send(1000), ShutWrite(), ReceiveAll()))
>>> text = difference(script, observe(script, oracle.server_address), observe(script, server.server_address))
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import random
import selectors
import socket
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Drip",
    "Leave",
    "Observation",
    "Receive",
    "ReceiveAll",
    "Reset",
    "Script",
    "Send",
    "SendWhileReceiving",
    "ShutWrite",
    "Step",
    "agree",
    "difference",
    "made_up",
    "observe",
    "run_many",
]

RECEIVE_SIZE = 64 * 1024
"""Bytes that one recv() asks for, unless the step says otherwise."""

TIMEOUT = 30.0
"""Seconds that one operation of a client may take before the client counts as stuck."""

UNREAD = 48 * 1024
"""Bytes that every system's buffers hold for a client that does not read: less than one 64 KiB receive buffer."""

SLOW = 4 * 1024
"""A slow reader's SO_RCVBUF. The kernel may grant more, and counts its own overhead in it."""

MUCH = 8 * 1024 * 1024
"""Bytes that fill every buffer on the way. It has to be that much: Linux takes 2.8 MB for a client with 4 KiB of
SO_RCVBUF that reads nothing, so that with less the server would never meet a full socket."""

SEGMENT_SIZE = 1448
"""TCP_MAXSEG in bytes for small receive buffers on Linux: Ethernet's. Loopback's 64 KiB are more than such a buffer
ever offers, and nothing may then be sent before the persist timer fires: 2 KB each 200 ms, for minutes, were seen. The
loopback of other systems has segments of at most 16 KiB."""

# struct linger has two shorts on Windows, two ints elsewhere.
RESET_ON_CLOSE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
"""SO_LINGER on, with no time to linger: close() sends a reset."""


@dataclass(frozen=True)
class Send:
    """Send `size` bytes, reading nothing. More than the kernels' buffers hold will be stuck, whatever the server is."""

    size: int
    seed: int = 0


@dataclass(frozen=True)
class Drip:
    """Send `chunks` times `size` bytes, each with a call of its own."""

    chunks: int
    size: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Receive:
    """Receive exactly `size` bytes, at most `chunk` at once: with a small chunk, slowly."""

    size: int
    chunk: int = RECEIVE_SIZE


@dataclass(frozen=True)
class ReceiveAll:
    """Receive until EOF or a reset, at most `chunk` bytes at once."""

    chunk: int = RECEIVE_SIZE


@dataclass(frozen=True)
class SendWhileReceiving:
    """Send `size` bytes and receive as many, both at once: send until the kernel takes no more, then receive a chunk.

    With `half_close`, shut the write side behind the last byte, and receive until EOF.
    """

    size: int
    seed: int = 0
    chunk: int = RECEIVE_SIZE
    half_close: bool = False


@dataclass(frozen=True)
class ShutWrite:
    """Half-close: the server will see EOF."""


@dataclass(frozen=True)
class Reset:
    """Close with a reset (RST), whatever is still on its way."""


@dataclass(frozen=True)
class Leave:
    """Close, also with data unread. The end of a script does the same."""


Step = Send | Drip | Receive | ReceiveAll | SendWhileReceiving | ShutWrite | Reset | Leave


@dataclass(frozen=True)
class Script:
    """The steps of one client. Its ``repr`` is Python: what a failed test prints can be pasted and run.

    `receive_buffer` is the SO_RCVBUF in bytes that is asked for before connecting, None for the system's: a small one
    makes the client a slow reader as far as the server can see.
    """

    steps: tuple[Step, ...]
    receive_buffer: int | None = None


@dataclass(frozen=True)
class Observation:
    """What a client saw: the bytes, how many of them each receiving step got, and how it ended.

    `ending` is ``"eof"``, ``"reset"``, ``"left"`` (the client went first) or ``"stuck"`` (an operation took longer than
    its time).
    """

    received: bytes = field(repr=False)
    seen: tuple[int, ...]
    ending: str

    def __str__(self) -> str:
        digest = hashlib.blake2b(self.received, digest_size=8).hexdigest()
        return f"{len(self.received):,} bytes ({digest}) in steps of {list(self.seen)}, then {self.ending}"


def made_up(chance: random.Random) -> Script:
    """Make up a script that can come to its end: it waits for no more than an echo owes it, and leaves little unread.

    `chance` makes every choice, so that the same state of it makes the same script.
    """
    steps: list[Step] = []
    unread = 0
    for seed in range(chance.randint(0, 6)):
        kind = chance.choice((Send, Drip, SendWhileReceiving, Receive))
        if kind is Receive:
            if unread:
                size = chance.randint(1, unread)
                steps.append(Receive(size, _made_up_chunk(chance)))
                unread -= size
        elif kind is SendWhileReceiving:
            steps.append(SendWhileReceiving(chance.randint(0, 256 * 1024), seed, _made_up_chunk(chance)))
        else:
            size = chance.randint(0, UNREAD - unread)
            if kind is Send:
                steps.append(Send(size, seed))
            else:
                count = chance.randint(1, 50)
                size -= size % count
                steps.append(Drip(count, size // count, seed))
            unread += size
    last: Step
    if chance.random() < 0.5:
        steps.append(ShutWrite())
        last = ReceiveAll(_made_up_chunk(chance))
    else:
        size = chance.choice((chance.randint(0, 256 * 1024), MUCH // 2))
        last = SendWhileReceiving(size, 99, _made_up_chunk(chance), half_close=True)
    steps.append(chance.choice((last, last, last, Leave(), Reset())))
    return Script(tuple(steps), chance.choice((None, SLOW)))


def _made_up_chunk(chance: random.Random) -> int:
    return chance.choice((64 * 1024, 4 * 1024, 1000))


def observe(script: Script, address: Any, timeout: float = TIMEOUT) -> Observation:
    """Run `script` against the server at `address` (as ``server_address`` gives it) and return what the client saw.

    `timeout` is in seconds, for each operation that waits. Raises OSError when the server cannot be connected to.
    """
    with contextlib.closing(_Client(script, address, timeout)) as client:
        return client.run()


def run_many(scripts: Sequence[Script], address: Any, timeout: float = TIMEOUT) -> list[Observation]:
    """Run all `scripts` at once, each in a thread: all are connected before the first of them begins."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(_Client(script, address, timeout))) for script in scripts]
        with ThreadPoolExecutor(max(1, len(clients))) as pool:
            return list(pool.map(_Client.run, clients))


def agree(expected: Observation, actual: Observation) -> bool:
    """Tell whether two servers showed a client the same.

    After a reset, one may have shown less than the other: a reset overtakes data, or not. A client that is stuck agrees
    with nobody, not even with another one that is.
    """
    if expected.ending != actual.ending or expected.ending == "stuck":
        return False
    if expected.ending == "reset":
        return expected.received.startswith(actual.received) or actual.received.startswith(expected.received)
    return expected == actual


def difference(script: Script, expected: Observation, actual: Observation) -> str | None:
    """Say how two observations of `script` differ, with the script as Python; None when they agree."""
    if agree(expected, actual):
        return None
    lines = ["a client sees the difference:", f"  {script!r}", f"  expected: {expected}", f"  actual:   {actual}"]
    one, other = expected.received, actual.received
    common = range(min(len(one), len(other)))
    first = bisect.bisect_left(common, True, key=lambda index: one[: index + 1] != other[: index + 1])
    if first < len(common):
        here = slice(first, first + 8)
        lines.append(f"  from byte {first:,} on: {one[here].hex(' ')} expected, {other[here].hex(' ')} received")
    return "\n".join(lines)


class _Client:
    """One connected client and what it has seen so far."""

    def __init__(self, script: Script, address: Any, timeout: float) -> None:
        self.script = script
        self.timeout = timeout
        self.received = bytearray()
        self.socket = _connect(address, script.receive_buffer, timeout)

    def close(self) -> None:
        self.socket.close()

    def run(self) -> Observation:
        seen: list[int] = []
        ending = None
        for step in self.script.steps:
            before = len(self.received)
            try:
                ending = self._do(step)
            except TimeoutError:
                ending = "stuck"
            except OSError as error:
                # ENOTCONN is what shutdown() says on Linux once a reset has come in.
                if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
                    raise
                ending = "reset"
            if isinstance(step, (Receive, ReceiveAll, SendWhileReceiving)):
                seen.append(len(self.received) - before)
            if ending is not None:
                break
        self.close()
        return Observation(bytes(self.received), tuple(seen), ending or "left")

    def _do(self, step: Step) -> str | None:
        """Do one step; return the ending when it was the last, by the script or by the server."""
        match step:
            case Send(size, seed):
                self.socket.sendall(_data(size, seed))
            case Drip(chunks, size, seed):
                data = _data(chunks * size, seed)
                for n in range(chunks):
                    self.socket.sendall(data[n * size : (n + 1) * size])
            case Receive(size, chunk):
                return self._receive(size, chunk)
            case ReceiveAll(chunk):
                return self._receive(sys.maxsize, chunk)
            case SendWhileReceiving():
                return self._exchange(step)
            case ShutWrite():
                self.socket.shutdown(socket.SHUT_WR)
            case Reset():
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                return "left"
            case Leave():
                return "left"
        return None

    def _receive(self, size: int, chunk: int) -> str | None:
        while size > 0:
            data = self.socket.recv(min(size, chunk))
            if not data:
                return "eof"
            self.received += data
            size -= len(data)
        return None

    def _exchange(self, step: SendWhileReceiving) -> str | None:
        self.socket.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
            outgoing = memoryview(_data(step.size, step.seed))
            missing = sys.maxsize if step.half_close else step.size
            while outgoing or missing:
                ready = selector.select(self.timeout)
                if not ready:
                    raise TimeoutError
                for _, events in ready:
                    if events & selectors.EVENT_WRITE:
                        with contextlib.suppress(BlockingIOError):
                            while outgoing:
                                outgoing = outgoing[self.socket.send(outgoing) :]
                            if step.half_close:
                                self.socket.shutdown(socket.SHUT_WR)
                    if events & selectors.EVENT_READ:
                        data = self.socket.recv(min(missing, step.chunk))
                        if not data:
                            return "eof"
                        self.received += data
                        missing -= len(data)
                reading = selectors.EVENT_READ if missing else 0
                writing = selectors.EVENT_WRITE if outgoing else 0
                if reading | writing:
                    selector.modify(self.socket, reading | writing)
        self.socket.settimeout(self.timeout)
        return None


def _connect(address: Any, receive_buffer: int | None, timeout: float) -> socket.socket:
    if not isinstance(address, str):
        sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    elif sys.platform == "win32":
        raise OSError(errno.EAFNOSUPPORT, "Python has no Unix sockets on Windows", address)
    else:
        sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(timeout)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if not isinstance(address, str):
                limit_segments(sock)
        if not isinstance(address, str):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def limit_segments(sock: socket.socket) -> None:
    """Make a TCP socket that is not connected, or a listener for those that it accepts, get small segments."""
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_SIZE)


def _data(size: int, seed: int) -> bytes:
    """Make bytes that never repeat, so that what is lost, doubled or out of order shows."""
    return random.Random(seed).randbytes(size)
