"""What is told about a connection when it has ended, and how an address is written for people."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ConnectionReport", "format_address"]

# Resets are worded by their class: the texts of the systems differ ("Connection reset by peer", "An existing connection
# was forcibly closed by the remote host"), and the classes are what PEP 3151 made of all their numbers.
_REASONS: tuple[tuple[type[OSError], str], ...] = (
    (ConnectionResetError, "reset by peer"),
    (BrokenPipeError, "peer gone while sending"),
    (ConnectionAbortedError, "aborted"),
)


class ConnectionReport(NamedTuple):
    """One connection that ended. ``str()`` of it is one line for people.

    >>> print(ConnectionReport(("127.0.0.1", 53422), 1024, 1024, 0.834, None))
    127.0.0.1:53422  1,024 B in, 1,024 B out, 0.83 s
    """

    peer: Any
    """The peer's address, as ``socket.getpeername()`` gave it."""
    bytes_in: int
    """Bytes received from the peer."""
    bytes_out: int
    """Bytes handed to the kernel for the peer; a reset may have thrown some of them away."""
    seconds: float
    """From accept to close; of `Server`, without the time for which callbacks held up its loop."""
    error: Exception | None
    """What ended it; None for an orderly end."""

    def __str__(self) -> str:
        line = f"{format_address(self.peer)}  {self.bytes_in:,} B in, {self.bytes_out:,} B out, {self.seconds:,.2f} s"
        return line if self.error is None else f"{line}, {_reason(self.error)}"


def format_address(address: Any) -> str:
    """Write a socket address as people do: ``127.0.0.1:80``, ``[::1]:80``, a Unix socket's path.

    A Unix peer mostly has no name: that is ``unix``. A name in Linux's abstract namespace starts with ``@``, as
    ``ss`` and ``netstat`` write it. What is no address that is known here is shown as it is.
    """
    if isinstance(address, tuple) and len(address) >= 2:
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, bytes):
        return address.decode("utf-8", "backslashreplace").replace("\0", "@")
    if isinstance(address, str) or address is None:
        return (address or "unix").replace("\0", "@")
    return str(address)


def _reason(error: Exception) -> str:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
