"""What a supervisor and its workers tell each other: lists of words and numbers, a line of JSON each."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from muxio.server.connection import Connection
from muxio.server.loop import Loop
from muxio.server.protocol import Protocol


class Channel(Protocol):
    """One end of a socket pair, served by the loop like any other connection.

    heard: called with each list that comes.
    lost: called once when the other side has closed its end, or has died.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, heard: Callable[[list[Any]], object], lost: Callable[[], object]
    ) -> None:
        self._heard = heard
        self._lost = lost
        self._received = bytearray()
        self.closed = False
        sock.setblocking(False)
        Connection(loop.clients, sock, "channel", self).start()

    def send(self, *words: Any) -> None:
        """Tell the other side; if it is gone, nobody hears it."""
        if not self.closed:
            self.transport.write(json.dumps(words).encode() + b"\n")

    def close(self) -> None:
        """Close in order: what was sent arrives, then the other side hears of the end."""
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            self._heard(json.loads(line))

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._lost()
