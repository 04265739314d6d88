"""A channel that any thread can make readable: how a wait on descriptors is interrupted."""

from __future__ import annotations

import socket


class Waker:
    """A pair of sockets, since that is what every facility on every system can watch.

    Wake-ups coalesce: any number of `wake` calls is one readable condition, and one `drain` takes them all.
    """

    __slots__ = ("_receiver", "_sender", "fd", "sender_fd")

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self.fd = self._receiver.fileno()
        self.sender_fd = self._sender.fileno()  # a byte written here is a wake-up

    def wake(self) -> None:
        """Make `fd` readable. Never blocks."""
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # full, so a wake-up is waiting already

    def drain(self) -> None:
        """Make `fd` unreadable again; without a wake-up it does nothing."""
        try:
            while self._receiver.recv(4096):
                pass
        except BlockingIOError:
            return
        raise ConnectionError("the poller's wake-up channel was closed from outside")

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
