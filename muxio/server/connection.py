"""One non-blocking socket and the protocol that it serves."""

from __future__ import annotations

import enum
import errno
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from muxio.events import READ, WRITE
from muxio.server.group import Group
from muxio.server.offload import Job
from muxio.server.protocol import BufferedProtocol, Protocol
from muxio.server.sockets import reset_on_close

if TYPE_CHECKING:
    from muxio.server.loop import Loop

T = TypeVar("T")

logger = logging.getLogger("muxio.server")

#: How many bytes are received at once: what one event may hold up the others for. Below the size (128 KiB) from which
#: malloc asks the kernel for memory each time.
RECEIVE_SIZE = 65_536

HIGH_WATER = 65_536
LOW_WATER = HIGH_WATER // 4
_WATER = (LOW_WATER, HIGH_WATER)

#: How many pieces sendmsg() takes at once: the least that POSIX lets a system have is 16, Linux and the BSDs have this.
_PIECES = 1024


class State(enum.Enum):
    """Where a connection is in its life. The first words are those of RFC 9113, section 5.1."""

    OPEN = "open"
    HALF_CLOSED_REMOTE = "half-closed (remote)"  #: the peer sends no more
    HALF_CLOSED_LOCAL = "half-closed (local)"  #: we send no more than what is queued, then EOF
    CLOSING = "closing"  #: we send what is queued, then EOF; input is thrown away
    LINGERING = "lingering"  #: all is sent, EOF too; input is thrown away until the peer's EOF
    FLUSHING = "flushing"  #: the peer sends no more, and we no more than what is queued
    CLOSED = "closed"


class Event(enum.Enum):
    """What happens to a connection."""

    PEER_EOF = "the peer's EOF"
    WRITE_EOF = "write_eof()"
    CLOSE = "close()"
    FLUSHED = "nothing is queued (any more)"
    LOST = "lost"  #: an error, or abort()


#: A connection's whole life. What is not in here does nothing.
TRANSITIONS = {
    (State.OPEN, Event.PEER_EOF): State.HALF_CLOSED_REMOTE,
    (State.OPEN, Event.WRITE_EOF): State.HALF_CLOSED_LOCAL,
    (State.OPEN, Event.CLOSE): State.CLOSING,
    (State.OPEN, Event.LOST): State.CLOSED,
    (State.HALF_CLOSED_REMOTE, Event.WRITE_EOF): State.FLUSHING,
    (State.HALF_CLOSED_REMOTE, Event.CLOSE): State.FLUSHING,
    (State.HALF_CLOSED_REMOTE, Event.LOST): State.CLOSED,
    (State.HALF_CLOSED_LOCAL, Event.PEER_EOF): State.FLUSHING,
    (State.HALF_CLOSED_LOCAL, Event.CLOSE): State.CLOSING,
    (State.HALF_CLOSED_LOCAL, Event.LOST): State.CLOSED,
    (State.CLOSING, Event.PEER_EOF): State.FLUSHING,
    (State.CLOSING, Event.FLUSHED): State.LINGERING,
    (State.CLOSING, Event.LOST): State.CLOSED,
    (State.LINGERING, Event.PEER_EOF): State.CLOSED,
    (State.LINGERING, Event.LOST): State.CLOSED,
    (State.FLUSHING, Event.FLUSHED): State.CLOSED,
    (State.FLUSHING, Event.LOST): State.CLOSED,
}

# What each state is for.
_RECEIVES = (State.OPEN, State.HALF_CLOSED_LOCAL)
_DISCARDS = (State.CLOSING, State.LINGERING)
_SENDS = (State.OPEN, State.HALF_CLOSED_REMOTE)
_ENDS_WITH_EOF = (State.HALF_CLOSED_LOCAL, State.CLOSING)  #: once all that is queued is sent
_ENDING = (State.CLOSING, State.LINGERING, State.FLUSHING, State.CLOSED)

# Beside the READ and WRITE that the poller watches for, who has paused what. All are bits of one number, since there
# are many connections and each field costs them 8 bytes.
_READING_PAUSED = 1 << 8  #: the protocol, receiving
_HELD = 1 << 9  #: the group, which has too much queued, receiving: until our queue is sent
_WRITING_PAUSED = 1 << 10  #: the high-water mark, the protocol's writing
_BEHIND = 1 << 11  #: the pool, which has too many of our jobs, receiving: until it has fewer
_ANSWERING = 1 << 12  #: nobody; but there are jobs whose answers are owed
_CLOSES_LATER = 1 << 13  #: close(), receiving: it comes when the answers are given

# How to receive.
_NOT = 0
_AS_BYTES = 1
_INTO_BUFFER = 2  #: the protocol's

Data = bytes | bytearray | memoryview
AnyProtocol = Protocol | BufferedProtocol


class _Queue(bytearray):
    """Bytes that wait to be sent, and when the peer last took some of them."""

    __slots__ = ("progress",)

    progress: float


class Connection:
    """A transport over one connected, non-blocking stream socket, which it owns from now on.

    group: the connections that it is watched over with.
    """

    __slots__ = (
        "_active",
        "_deadline",
        "_error",
        "_flags",
        "_group",
        "_protocol",
        "_queue",
        "_receiving",
        "_sock",
        "_state",
        "_water",
        "began",
        "bytes_in",
        "bytes_out",
        "peername",
        "slot",
    )

    def __init__(self, group: Group, sock: socket.socket, peername: Any, protocol: AnyProtocol) -> None:
        self.peername = peername
        self.bytes_in = 0
        self.bytes_out = 0
        self.slot: Any = None  # the wheel's
        #: By the loop's `peer_time`: when it began, and when bytes last came or went.
        self.began = self._active = group.loop.now
        #: The one that the protocol has set, or that closing has.
        self._deadline = math.inf
        self._group = group
        self._sock = sock
        self._protocol: Any = protocol
        self._state = State.OPEN
        self._error: Exception | None = None
        self._queue: _Queue | None = None  # what the kernel has not taken yet; None when that is nothing
        self._water = _WATER
        self._flags = READ  # that is what is watched for, and nobody has paused anything
        # What follows from the state and the pauses, so that the hot path need not find out.
        self._receiving = self._how_to_receive()
        group.loop.poller.register(sock, READ, self)
        group.join(self, self._next_deadline()[0])

    def __repr__(self) -> str:
        return f"<Connection with {self.peername}: {self._state.value}, {self.get_write_buffer_size()} B queued>"

    @property
    def loop(self) -> Loop:
        """The loop that serves this connection."""
        return self._group.loop

    @property
    def state(self) -> State:
        """Where the connection is in its life."""
        return self._state

    # What the loop and the server call

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
        if events & READ:
            if self._receiving == _AS_BYTES:  # written out here: a call costs as much as all the rest of it
                try:
                    data = self._sock.recv(RECEIVE_SIZE)
                except BlockingIOError:
                    pass
                except OSError as error:
                    self._lose(error)
                else:
                    if data:
                        self.bytes_in += len(data)
                        group = self._group
                        group.received += 1
                        self._active = group.loop.now
                        self._protocol.data_received(data)
                    else:
                        self._receive_eof()
            elif self._receiving:
                self._receive_into()
            elif self._state in _DISCARDS:
                self._discard()
        if events != READ:
            if events & WRITE and self._queue is not None:
                self._flush()
            if not events & (READ | WRITE):
                # ERROR or HANGUP while neither was asked for: nobody is about to find out by reading or writing.
                trouble = self._socket_error()
                if trouble is not None:
                    self._lose(trouble)

    def failed(self, error: Exception) -> None:
        """A callback of the protocol raised: this connection dies, the others live."""
        logger.error("exception in a callback of %r, %r", self._protocol, self, exc_info=error)
        self._reset(error)

    def hold(self, behind: bool) -> None:
        """The pool is behind with our jobs, or no more: receive or not."""
        if bool(self._flags & _BEHIND) != behind:
            self._flags ^= _BEHIND
            self._watch()

    def answered(self) -> None:
        """The last of our jobs is over."""
        later = self._flags & _CLOSES_LATER
        self._flags &= ~(_ANSWERING | _BEHIND | _CLOSES_LATER)
        self._active = self.loop.peer_time()  # it was we who let the peer wait
        if later:
            self._move(Event.CLOSE)
        else:
            self._watch()
            self._group.hasten(self, self._next_deadline()[0])

    def call_back(self, callback: Callable[[Job], object], job: Job) -> None:
        """One of our jobs is over: tell the protocol, unless it has been lost in the meantime."""
        if self._state is not State.CLOSED:
            try:
                callback(job)
            except Exception as error:
                self.failed(error)

    def drain(self) -> None:
        """The server stops: let the protocol come to an end."""
        if not self.is_closing():
            try:
                goes_on = self._protocol.draining()
            except Exception as error:
                self.failed(error)
            else:
                if not goes_on:
                    self.close()

    def check(self, now: float) -> float:
        """Act on the deadlines that are over; returns when the next one is."""
        when, reason = self._next_deadline()
        if when <= now:
            self._time_out(reason)
            when, _ = self._next_deadline()
        return when

    # The transport; see protocol.Transport for what each method promises.

    def write(self, data: Data) -> None:
        if self._queue is None and self._state in _SENDS:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._lose(error)
                return
            self.bytes_out += sent
            self._active = self._group.loop.now
            if sent != (len(data) if type(data) is bytes else _size(data)):
                self._enqueue(bytes(data)[sent:])
        elif self._may_write():
            self._enqueue(data)

    def writelines(self, pieces: Iterable[Data]) -> None:
        if self._queue is not None or not hasattr(self._sock, "sendmsg"):  # Windows has none
            self.write(b"".join(pieces))
        elif self._may_write():
            gathered = list(pieces)
            sent = self._attempt(self._sock.sendmsg, gathered[:_PIECES]) or 0
            if self._state is State.CLOSED:
                return
            self.bytes_out += sent
            self._active = self.loop.now
            for place, piece in enumerate(gathered):
                size = _size(piece)
                if sent < size:
                    self._enqueue(b"".join((bytes(piece)[sent:], *gathered[place + 1 :])))
                    return
                sent -= size

    def write_eof(self) -> None:
        if not self._flags & _CLOSES_LATER:  # EOF will follow the answers
            self._move(Event.WRITE_EOF)

    def close(self) -> None:
        if self._flags & _ANSWERING and self._state not in _ENDING:
            self._flags |= _CLOSES_LATER
            self._watch()
        else:
            self._move(Event.CLOSE)

    def abort(self) -> None:
        self._reset(None)

    def is_closing(self) -> bool:
        return self._state in _ENDING or bool(self._flags & _CLOSES_LATER)

    def pause_reading(self) -> None:
        self._flags |= _READING_PAUSED
        self._watch()

    def resume_reading(self) -> None:
        if self._flags & _READING_PAUSED:
            self._flags &= ~_READING_PAUSED
            self._active = self.loop.peer_time()  # it was we who let the peer wait
            self._watch()

    def is_reading(self) -> bool:
        return self._state in _RECEIVES and not self._flags & (_READING_PAUSED | _CLOSES_LATER)

    def offload(self, function: Callable[..., Any], *arguments: Any) -> Job:
        call = partial(function, *arguments)
        if self._state in _ENDING:
            return self.loop.jobs.refuse(call)
        self._flags |= _ANSWERING
        return self.loop.jobs.submit(self, call)

    def set_deadline(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"a deadline is in seconds above 0, or None for none; not {seconds!r}")
        if self._state not in _ENDING:
            self._set_deadline(math.inf if seconds is None else seconds)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"water marks are high >= low >= 0, not high={high!r}, low={low!r}")
        self._water = low, high
        self._pause_writing()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._water

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

    # Inside: the life

    def _move(self, event: Event) -> None:
        """Follow the table; where it has no such transition, nothing is to be done."""
        before = self._state
        state = TRANSITIONS.get((before, event))
        if state is None:
            return
        self._state = state
        if state is State.CLOSED:
            self._end()
            return
        if state in _ENDING and before not in _ENDING:  # by close(), or because both sides have said EOF
            self._set_deadline(self._group.close)
        elif state is State.LINGERING:
            self._set_deadline(self._group.linger)
        if self._queue is None and event is not Event.FLUSHED:
            self._flushed()
        self._watch()

    def _flushed(self) -> None:
        """Nothing is queued (any more): do what waited for that."""
        if self._state in _SENDS:
            return
        if self._state in _ENDS_WITH_EOF:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._lose(self._socket_error() or error)
        self._move(Event.FLUSHED)

    def _reset(self, error: Exception | None) -> None:
        """Close so that the peer sees a reset."""
        if self._state is not State.CLOSED:
            reset_on_close(self._sock)
            self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        if self._state is not State.CLOSED:
            self._error = self._error or error
            self._move(Event.LOST)

    def _end(self) -> None:
        """Give everything back."""
        self._drop_jobs()
        self._receiving = _NOT
        self._group.buffered -= self.get_write_buffer_size()
        self._queue = None
        self.loop.poller.unregister(self._sock)
        self._sock.close()
        self.loop.call_soon(self._tell_lost)

    def _drop_jobs(self) -> None:
        if self._flags & _ANSWERING:
            self._flags &= ~(_ANSWERING | _BEHIND | _CLOSES_LATER)
            self.loop.jobs.drop(self)

    def _attempt(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """What a call of the socket returns. None if it would block, or has failed, which loses the connection."""
        try:
            return call(*arguments)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error)
        return None

    def _socket_error(self) -> OSError | None:
        try:
            number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if sys.platform == "win32" and not number:  # there it is of connect() only: an operation tells of a reset
                if self._state in _SENDS:
                    self._sock.send(b"")
                self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError as error:  # that, or the protocol has closed or detached it
            return error
        return OSError(number, os.strerror(number)) if number else None

    def _tell_lost(self) -> None:
        try:
            self._protocol.connection_lost(self._error)
        finally:
            self._group.leave(self, self._error)

    def _how_to_receive(self) -> int:
        """How to receive now."""
        if self._state not in _RECEIVES or self._flags & (_READING_PAUSED | _HELD | _BEHIND | _CLOSES_LATER):
            return _NOT
        return _INTO_BUFFER if isinstance(self._protocol, BufferedProtocol) else _AS_BYTES

    def _watch(self) -> None:
        """Ask the poller for what there is a use for now. Another use, other deadlines."""
        state = self._state
        if state is not State.CLOSED:
            self._receiving = self._how_to_receive()
            interest = (READ if self._receiving or state in _DISCARDS else 0) | (0 if self._queue is None else WRITE)
            if interest != self._flags & (READ | WRITE):
                self._flags = self._flags & ~(READ | WRITE) | interest
                self.loop.poller.modify(self._sock, interest)
                self._group.hasten(self, self._next_deadline()[0])

    # Inside: receiving

    def _receive_into(self) -> None:
        buffer = self._protocol.get_buffer(-1)
        if not len(buffer):
            raise RuntimeError("get_buffer() returned an empty buffer")
        if self._receiving != _INTO_BUFFER:  # paused or closed in there
            return
        received = self._attempt(self._sock.recv_into, buffer)
        if received is None:
            return
        if received:
            self.bytes_in += received
            self._group.received += 1
            self._active = self.loop.now
            self._protocol.buffer_updated(received)
        else:
            self._receive_eof()

    def _receive_eof(self) -> None:
        keep_open = self._protocol.eof_received()
        self._move(Event.PEER_EOF)
        if not keep_open:
            self.close()

    def _discard(self) -> None:
        """Throw away what comes while we are closing."""
        if self._attempt(self._sock.recv, RECEIVE_SIZE) == b"":
            self._move(Event.PEER_EOF)

    # Inside: sending

    def _may_write(self) -> bool:
        if self._state is State.HALF_CLOSED_LOCAL:
            raise RuntimeError("write() after write_eof()")
        return self._state in _SENDS

    def _enqueue(self, data: Data) -> None:
        """Keep what the kernel does not take now."""
        group = self._group
        if self._queue is None:
            self._queue = _Queue(data)
            self._queue.progress = self.loop.peer_time()
            self._watch()
            group.buffered += len(self._queue)
        else:
            before = len(self._queue)
            self._queue += data
            group.buffered += len(self._queue) - before
        if group.buffered > group.most_buffered and not self._flags & _HELD:
            self._flags |= _HELD
            self._watch()
        self._pause_writing()

    def _pause_writing(self) -> None:
        """Tell the protocol if more is queued than it should be."""
        if not self._flags & _WRITING_PAUSED and self.get_write_buffer_size() > self._water[1]:
            self._flags |= _WRITING_PAUSED
            try:
                self._protocol.pause_writing()
            except Exception as error:  # here: the caller may be another connection's protocol
                self.failed(error)

    def _flush(self) -> None:
        """Send of the queue what the kernel takes."""
        queue = self._queue
        assert queue is not None
        sent = self._attempt(self._sock.send, queue)
        if sent is None:
            return
        self.bytes_out += sent
        self._group.buffered -= sent
        self._active = queue.progress = self.loop.peer_time()
        del queue[:sent]
        if not queue:
            self._queue = None
            self._flags &= ~_HELD
            self._flushed()
            self._watch()
        if self._flags & _WRITING_PAUSED and len(queue) <= self._water[0]:
            self._flags &= ~_WRITING_PAUSED
            if self._state is not State.CLOSED:
                self._protocol.resume_writing()

    # Inside: deadlines

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self.loop.peer_time() + seconds
        self._group.hasten(self, self._deadline)

    def _next_deadline(self) -> tuple[float, str]:
        """The earliest that holds now, and what it means if it is over; inf for none."""
        if self._state is State.CLOSED:
            return math.inf, ""
        group = self._group
        if self._state in _ENDING:
            return self._deadline, f"not all was taken within {group.close:g} s of closing"
        deadlines = [
            (self._deadline, "the protocol's deadline is over"),
            (self.began + group.lifetime, f"connected for {group.lifetime:g} s"),
        ]
        waits = self._receiving and not self._flags & _ANSWERING  # for the peer
        if self._queue is not None:
            deadlines.append((self._queue.progress + group.write, f"nothing was taken for {group.write:g} s"))
        elif waits:
            deadlines.append((self._active + group.idle, f"idle for {group.idle:g} s"))
        if waits and not self.bytes_in:
            deadlines.append((self.began + group.first_data, f"no data within {group.first_data:g} s"))
        return min(deadlines)

    def _time_out(self, reason: str) -> None:
        if self._state is State.LINGERING:
            self._lose(None)  # all was sent, and whether the peer closes is its own business
            return
        logger.debug("%r: %s", self, reason)
        error = TimeoutError(errno.ETIMEDOUT, reason)
        stalled = self._queue is not None and self._queue.progress + self._group.write <= self.loop.peer_time()
        if stalled or self._state in _ENDING:
            self._reset(error)
        else:
            self._error = error
            self._drop_jobs()
            self.close()


def _size(data: Data) -> int:
    """In bytes: len() may count larger items."""
    with memoryview(data) as view:
        return view.nbytes
