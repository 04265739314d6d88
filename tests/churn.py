"""Clients that come and go without pause: what a server must survive that replaces its workers meanwhile."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from helpers import wait_until

import muxio
from muxio import READ, WRITE

SIZE = 300  # bytes that each client sends


class _Client:
    """Connects, sends, says EOF, and takes all back until the server's EOF. Then the next one comes."""

    def __init__(self, churn: Churn) -> None:
        self._churn = churn
        self._connect()

    def _connect(self) -> None:
        self.payload = os.urandom(SIZE)
        self.received = bytearray()
        self.connected = False
        self.sock = socket.socket(self._churn.family)
        self.sock.setblocking(False)
        self.sock.connect_ex(self._churn.address)
        self._churn.poller.register(self.sock, WRITE, self)

    def ready(self) -> None:
        try:
            if not self.connected:
                error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                self.connected = True
                self._churn.accepted += 1
                assert self.sock.send(self.payload) == SIZE  # the buffer of a new socket takes it whole
                self.sock.shutdown(socket.SHUT_WR)
                self._churn.poller.modify(self.sock, READ)
                return
            data = self.sock.recv(4096)
            self.received += data
            if data:
                return
            if self.received != self.payload:
                raise ValueError(f"{len(self.received)} of {SIZE} bytes came back")
            self._churn.served += 1
        except (OSError, ValueError) as error:
            self._churn.failures.append(f"{'connected' if self.connected else 'connecting'}: {error!r}")
        self._churn.poller.unregister(self.sock)
        self.sock.close()
        if not self._churn.stopping:
            self._connect()


class Churn:
    """So many clients at a time, in a thread of its own."""

    def __init__(self, address: Any, clients: int) -> None:
        self.address = address
        self.family = socket.AF_INET
        if isinstance(address, str) and sys.platform != "win32":
            self.family = socket.AF_UNIX
        self.poller: muxio.Poller[_Client] = muxio.Poller()
        self.accepted = self.served = 0
        self.failures: list[str] = []
        self.stopping = False
        self._clients = clients
        self._thread = threading.Thread(target=self._run, name="churn")

    def wait_for(self, more: int) -> None:
        """Wait until so many more clients were served, or one was not."""
        enough = self.served + more
        wait_until(lambda: self.failures or self.served >= enough, 60.0)

    def _run(self) -> None:
        for _ in range(self._clients):
            _Client(self)
        while len(self.poller):
            for client, events in self.poller.poll():
                if events:
                    client.ready()


@contextlib.contextmanager
def churning(address: Any, clients: int) -> Iterator[Churn]:
    """Let clients come and go until the end of the block, and the last ones come to their end."""
    churn = Churn(address, clients)
    with churn.poller:
        churn._thread.start()
        try:
            yield churn
        finally:
            churn.stopping = True
            churn._thread.join()
