"""The client side: from an address to a connected socket."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from muxio.events import WRITE
from muxio.server.connection import AnyProtocol, Connection
from muxio.server.sockets import Address, resolve

if TYPE_CHECKING:
    from muxio.server.loop import Loop

#: What connect_ex() answers when it has connected (Unix sockets), or when the kernel goes on in the background; Winsock
#: says WSAEWOULDBLOCK then. Everywhere else EWOULDBLOCK means no: a Unix socket's backlog is full (connect(2)).
_UNDER_WAY = (0, errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS))


class Connector:
    """Tries the addresses that a name stands for, one after the other, and hands the first connected socket on.

    If none answers, the protocol's ``connection_lost`` gets the last error, without a ``connection_made`` before it.
    """

    def __init__(self, loop: Loop, address: Address, factory: Callable[[], AnyProtocol]) -> None:
        self._loop = loop
        self._candidates = resolve(address)
        self._protocol = factory()
        self._sock: socket.socket | None = None
        loop.connectors.add(self)
        loop.call_soon(self._try_next, None)

    def cancel(self) -> None:
        """Stop trying; ``connection_lost(None)`` follows. Once connected, it does nothing."""
        if self._sock is not None or self._candidates:
            self._give_up(None)

    def ready(self, events: int) -> None:
        """The kernel has made up its mind."""
        sock = self._sock
        assert sock is not None
        try:
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number))
            peername = sock.getpeername()  # ENOTCONN: reset already
        except OSError as error:
            self._discard()
            self._try_next(error)
            return
        self._sock, self._candidates = None, []
        self._loop.connectors.discard(self)
        self._loop.poller.unregister(sock)
        Connection(self._loop.clients, sock, peername, self._protocol).start()

    def failed(self, error: Exception) -> None:
        """An exception in here, which the loop caught."""
        self._give_up(error)

    def _try_next(self, error: OSError | None) -> None:
        if self._candidates:
            family, kind, protocol, _, address = self._candidates.pop(0)
            try:
                self._sock = socket.socket(family, kind, protocol)
                self._sock.setblocking(False)
                number = self._sock.connect_ex(address)
                if number not in _UNDER_WAY:
                    raise OSError(number, os.strerror(number))
                self._loop.poller.register(self._sock, WRITE, self)
            except OSError as trouble:
                self._discard()
                self._try_next(trouble)
        elif error is not None:
            self._give_up(error)

    def _give_up(self, error: Exception | None) -> None:
        self._discard()
        self._candidates = []
        self._loop.connectors.discard(self)
        self._loop.call_soon(self._protocol.connection_lost, error)

    def _discard(self) -> None:
        if self._sock is not None:
            if self._sock in self._loop.poller:
                self._loop.poller.unregister(self._sock)
            self._sock.close()
            self._sock = None
