"""One non-blocking socket and the protocol that it serves."""

from __future__ import annotations

import enum
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from muxio.events import READ, WRITE
from muxio.server.protocol import BufferedProtocol, Protocol

if TYPE_CHECKING:
    from muxio.server.loop import Loop

logger = logging.getLogger("muxio.server")

#: How many bytes are received at once: what one event may hold up the others for. Below the size (128 KiB) from which
#: malloc asks the kernel for memory each time.
RECEIVE_SIZE = 65_536

HIGH_WATER = 65_536
LOW_WATER = HIGH_WATER // 4

#: SO_LINGER on, with no time to linger: close() sends RST.
_RESET_ON_CLOSE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class State(enum.Enum):
    """Where a connection is in its life. The words are those of RFC 9113, section 5.1."""

    OPEN = "open"
    HALF_CLOSED_REMOTE = "half-closed (remote)"  #: the peer sends no more
    HALF_CLOSED_LOCAL = "half-closed (local)"  #: we send no more than what is queued, then EOF
    CLOSING = "closing"  #: we receive no more, and send what is queued
    CLOSED = "closed"


class Event(enum.Enum):
    """What happens to a connection."""

    PEER_EOF = "the peer's EOF"
    WRITE_EOF = "write_eof()"
    CLOSE = "close()"
    LOST = "lost"  #: an error, abort(), or the last byte sent while closing


#: A connection's whole life. What is not in here does nothing.
TRANSITIONS = {
    (State.OPEN, Event.PEER_EOF): State.HALF_CLOSED_REMOTE,
    (State.OPEN, Event.WRITE_EOF): State.HALF_CLOSED_LOCAL,
    (State.OPEN, Event.CLOSE): State.CLOSING,
    (State.OPEN, Event.LOST): State.CLOSED,
    (State.HALF_CLOSED_REMOTE, Event.WRITE_EOF): State.CLOSING,
    (State.HALF_CLOSED_REMOTE, Event.CLOSE): State.CLOSING,
    (State.HALF_CLOSED_REMOTE, Event.LOST): State.CLOSED,
    (State.HALF_CLOSED_LOCAL, Event.PEER_EOF): State.CLOSING,
    (State.HALF_CLOSED_LOCAL, Event.CLOSE): State.CLOSING,
    (State.HALF_CLOSED_LOCAL, Event.LOST): State.CLOSED,
    (State.CLOSING, Event.LOST): State.CLOSED,
}

_RECEIVING = (State.OPEN, State.HALF_CLOSED_LOCAL)
_SENDING = (State.OPEN, State.HALF_CLOSED_REMOTE)

Data = bytes | bytearray | memoryview
AnyProtocol = Protocol | BufferedProtocol
OnLost = Callable[["Connection", Exception | None], object]


class Connection:
    """A transport over one connected, non-blocking stream socket, which it owns from now on.

    on_lost: called with the connection and the first error (or None), right after ``connection_lost``.
    """

    __slots__ = (
        "_buffered",
        "_high_water",
        "_interest",
        "_low_water",
        "_on_lost",
        "_protocol",
        "_queue",
        "_reading_paused",
        "_sock",
        "_state",
        "_writing_paused",
        "bytes_in",
        "bytes_out",
        "loop",
        "peername",
    )

    def __init__(
        self, loop: Loop, sock: socket.socket, peername: Any, protocol: AnyProtocol, on_lost: OnLost | None = None
    ) -> None:
        self.loop = loop
        self.peername = peername
        self.bytes_in = 0
        self.bytes_out = 0
        self._sock = sock
        self._protocol: Any = protocol
        self._buffered = isinstance(protocol, BufferedProtocol)
        self._on_lost = on_lost
        self._state = State.OPEN
        self._queue: bytearray | None = None  # what the kernel has not taken yet; None when that is nothing
        self._high_water = HIGH_WATER
        self._low_water = LOW_WATER
        self._reading_paused = False
        self._writing_paused = False
        self._interest = READ
        loop.poller.register(sock, READ, self)

    def __repr__(self) -> str:
        return f"<Connection with {self.peername}: {self._state.value}, {self.get_write_buffer_size()} B queued>"

    @property
    def state(self) -> State:
        """Where the connection is in its life."""
        return self._state

    # What the loop calls

    def start(self) -> None:
        """Introduce the protocol to its transport."""
        try:
            if self._sock.family in (socket.AF_INET, socket.AF_INET6):
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._protocol.connection_made(self)
        except Exception as error:
            self.failed(error)

    def ready(self, events: int) -> None:
        """Readiness: move bytes. One receive an event, so that no peer holds up the others."""
        if events & READ and self.is_reading():
            if self._buffered:
                self._receive_into()
            else:
                self._receive()
        if events & WRITE and self._queue is not None:
            self._flush()
        if not events & (READ | WRITE):
            # ERROR or HANGUP while neither was asked for: nobody is about to find out by reading or writing.
            number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._lose(OSError(number, os.strerror(number)))

    def failed(self, error: Exception) -> None:
        """A callback of the protocol raised: this connection dies, the others live."""
        logger.error("exception in a callback of %r, %r", self._protocol, self, exc_info=error)
        self._reset(error)

    # The transport; see protocol.Transport for what each method promises.

    def write(self, data: Data) -> None:
        if self._state not in _SENDING:
            if self._state is State.HALF_CLOSED_LOCAL:
                raise RuntimeError("write() after write_eof()")
            return
        if self._queue is None:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._lose(error)
                return
            self.bytes_out += sent
            if sent == (len(data) if type(data) is bytes else _size(data)):
                return
            self._queue = bytearray(bytes(data)[sent:])
            self._watch()
        else:
            self._queue += data
        if len(self._queue) > self._high_water and not self._writing_paused:
            self._writing_paused = True
            try:
                self._protocol.pause_writing()
            except Exception as error:  # here: the caller may be another connection's protocol
                self.failed(error)

    def writelines(self, pieces: Iterable[Data]) -> None:
        self.write(b"".join(pieces))

    def write_eof(self) -> None:
        self._move(Event.WRITE_EOF)

    def close(self) -> None:
        self._move(Event.CLOSE)

    def abort(self) -> None:
        self._reset(None)

    def is_closing(self) -> bool:
        return self._state in (State.CLOSING, State.CLOSED)

    def pause_reading(self) -> None:
        self._reading_paused = True
        self._watch()

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._watch()

    def is_reading(self) -> bool:
        return self._state in _RECEIVING and not self._reading_paused

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"water marks are high >= low >= 0, not high={high!r}, low={low!r}")
        self._high_water, self._low_water = high, low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low_water, self._high_water

    def get_write_buffer_size(self) -> int:
        return 0 if self._queue is None else len(self._queue)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "peername":
            return self.peername
        if name == "socket":
            return self._sock
        if name == "sockname" and self._state is not State.CLOSED:
            return self._sock.getsockname()
        return default

    # Inside

    def _move(self, event: Event) -> None:
        """Follow the table; where it has no such transition, nothing is to be done."""
        state = TRANSITIONS.get((self._state, event))
        if state is not None:
            self._state = state
            if self._queue is None:
                self._flushed()
            self._watch()

    def _watch(self) -> None:
        """Ask the poller for what this state has a use for."""
        if self._state is not State.CLOSED:
            interest = (READ if self.is_reading() else 0) | (WRITE if self._queue is not None else 0)
            if interest != self._interest:
                self._interest = interest
                self.loop.poller.modify(self._sock, interest)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self.bytes_in += len(data)
            self._protocol.data_received(data)
        else:
            self._receive_eof()

    def _receive_into(self) -> None:
        buffer = self._protocol.get_buffer(-1)
        if not len(buffer):
            raise RuntimeError("get_buffer() returned an empty buffer")
        try:
            received = self._sock.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if received:
            self.bytes_in += received
            self._protocol.buffer_updated(received)
        else:
            self._receive_eof()

    def _receive_eof(self) -> None:
        keep_open = self._protocol.eof_received()
        self._move(Event.PEER_EOF)
        if not keep_open:
            self.close()

    def _flush(self) -> None:
        """Send of the queue what the kernel takes."""
        queue = self._queue
        assert queue is not None
        try:
            sent = self._sock.send(queue)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        self.bytes_out += sent
        del queue[:sent]
        if not queue:
            self._queue = None
            self._flushed()
            self._watch()
        if self._writing_paused and len(queue) <= self._low_water:
            self._writing_paused = False
            if self._state is not State.CLOSED:
                self._protocol.resume_writing()

    def _flushed(self) -> None:
        """Nothing is queued (any more): do what waited for that."""
        if self._state is State.CLOSING:
            self._lose(None)
        elif self._state is State.HALF_CLOSED_LOCAL:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._lose(error)

    def _reset(self, error: Exception | None) -> None:
        """Close so that the peer sees a reset."""
        if self._state is not State.CLOSED:
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            except OSError:
                pass  # the peer has reset it already (macOS)
            self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if self._state is not State.CLOSED:
            self._state = TRANSITIONS[self._state, Event.LOST]
            self._queue = None
            self.loop.poller.unregister(self._sock)
            self._sock.close()
            self.loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            on_lost, self._on_lost = self._on_lost, None
            if on_lost is not None:
                on_lost(self, error)


def _size(data: Data) -> int:
    """In bytes: len() may count larger items."""
    with memoryview(data) as view:
        return view.nbytes
