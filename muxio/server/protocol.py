"""What a user writes: callbacks about one connection. No socket, no poller and no thread is visible from here.

The names and the rules are asyncio's:

- ``connection_made`` comes first, then any number of ``data_received`` (or ``get_buffer`` and ``buffer_updated``), at
  most one ``eof_received``, and at the end one ``connection_lost``, never from inside another call of the protocol's.
- ``data`` is bytes of the protocol's own, in the order sent; its borders mean nothing.
- When a peer does not read, ``pause_writing`` comes from inside the ``write`` that went over the high-water mark, and
  ``resume_writing`` when what is queued has sunk to the low-water mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

if TYPE_CHECKING:
    from muxio.server.loop import Loop
    from muxio.server.offload import Job


class Transport(Interface):
    """One connection, as its protocol sees it. All methods belong to the loop's thread."""

    @property
    def loop(self) -> Loop:
        """The loop that serves this connection: ``call_soon``, ``call_later``, ``connect`` and so on."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, now or when the peer takes them; never blocks. Dropped once the connection is lost.

        RuntimeError: after ``write_eof``.
        """

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send several pieces as one ``write``."""

    def write_eof(self) -> None:
        """Send EOF after what is queued; the peer may go on sending. Again, it does nothing."""

    def close(self) -> None:
        """Send what is queued, then EOF; then wait for the peer's, and close. Nothing more is received.

        A peer that does not take what is queued, or keeps its end open, is waited for as long as the server's
        `Timeouts` say: ``close`` and ``linger``.
        """

    def abort(self) -> None:
        """Close at once; what is queued is lost, and the peer sees a reset."""

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""

    def pause_reading(self) -> None:
        """Receive nothing until ``resume_reading``: the way to push back on a peer that sends too fast."""

    def resume_reading(self) -> None:
        """Receive again."""

    def is_reading(self) -> bool:
        """Whether bytes from the peer are being received."""

    def offload(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Let a thread or a process call a function that takes its time, and go on serving meanwhile (`Loop.offload`).

        The job's callbacks come in the order of asking, each when the jobs before it are over. While many are not, the
        peer is not read from (`Offload` says how many). ``close`` waits for them: their answers are owed. When the
        connection is lost they are cancelled; but a peer that has only said EOF may still wait for its answers, and
        that it is gone shows when one is written (on select a reset does so, too, if the peer is not read from).

        Once the connection is lost, or closing with no answers owed, the job is cancelled from the beginning.
        """

    def set_deadline(self, seconds: float | None) -> None:
        """Close the connection after so many seconds, unless another deadline is set before; None takes it back.

        For what the protocol waits for: the rest of a message that comes a byte at a time, a login, an answer.
        ``connection_lost`` gets a TimeoutError then. Late by a quarter of a second at most, never early.

        ValueError: not more than 0.
        """

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the water marks in bytes. By default 64 KiB and a quarter of the high one.

        ValueError: not high >= low >= 0.
        """

    def get_write_buffer_size(self) -> int:
        """How many bytes are queued."""

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """The water marks: (low, high)."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """``"peername"``, ``"sockname"`` or ``"socket"``; `default` for everything else."""


class BaseProtocol:
    """What both kinds of protocol have in common. Every callback has a default, so override what you need."""

    # A class that derives from this one has a __dict__ all the same, unless it says __slots__ = () or names its own.
    __slots__ = ("transport",)

    transport: Transport

    def connection_made(self, transport: Transport) -> None:
        """A connection stands. The default keeps the transport as ``self.transport``."""
        self.transport = transport

    def eof_received(self) -> bool | None:
        """The peer sends no more. A true value keeps our side open for writing; otherwise the transport closes."""
        return None

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is over: with the first error, or None if it ended in order or by our own hand.

        A ``Loop.connect`` that failed says so here, without a ``connection_made`` before.
        """

    def draining(self) -> bool | None:
        """The server stops. A true value lets the protocol go on until it closes by itself, or the server's drain
        time is over; otherwise the transport closes: what was received is answered, the rest is not.
        """
        return None

    def pause_writing(self) -> None:
        """More than the high-water mark is queued: stop producing."""

    def resume_writing(self) -> None:
        """The queue has sunk to the low-water mark: go on."""


class Protocol(BaseProtocol):
    """Receives bytes."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Some bytes came: one or more, never none."""


class BufferedProtocol(BaseProtocol):
    """Receives into a buffer of its own, without a copy."""

    __slots__ = ()

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        """A buffer of at least one byte to receive into; `sizehint` is a good size, -1 if any is."""
        raise NotImplementedError

    def buffer_updated(self, nbytes: int) -> None:
        """The first `nbytes` of the buffer were filled."""
        raise NotImplementedError


class EchoProtocol(Protocol):
    """Sends back what it receives, in order and to the last byte, and holds little of it at any time.

    A peer that does not read is not read from either. A peer that has sent everything gets the rest, then EOF.
    """

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()
