"""Several threads that serve one port: workers for a Python without a GIL, where threads have a core each."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from muxio.server.loop import Loop
from muxio.server.notices import Say, listening
from muxio.server.server import BACKLOG, Server, Stats
from muxio.server.sockets import Address, file_of, listen_each, remove_file
from muxio.server.statistics import WorkerStats
from muxio.server.worker import Order


class WorkerThreads:
    """So many servers at one address, each in a thread of its own; beside them a loop for what belongs to all.

    address, count, order, tell: as `Workers` takes them.

    An exception that ends one of them ends all: what a thread left undone cannot be known.
    """

    #: None of them goes before the others.
    gone = Stats.total([])

    def __init__(self, address: Address, count: int, order: Order, tell: Say) -> None:
        self._tell = tell
        self._running = 0
        self._trouble: BaseException | None = None
        with contextlib.ExitStack() as undo:
            listeners = [undo.enter_context(listener) for listener in listen_each(address, BACKLOG, count)]
            order = replace(order, shared=len(listeners) < count)
            self.server_address: Any = listeners[0].getsockname()
            self._file = file_of(address)
            self.loop = Loop(order.backend)
            undo.callback(self.loop.close)
            self._servers: dict[str, Server] = {}
            for number in range(count):
                name = str(number + 1)
                listener = listeners[number % len(listeners)].dup()
                undo.push(listener)
                self._servers[name] = undo.enter_context(order.server(listener, name))
            undo.pop_all()
            for listener in listeners:
                listener.close()
        self._threads = [
            threading.Thread(target=self._serve, args=(server,), name=f"muxio worker {name}")
            for name, server in self._servers.items()
        ]

    def total(self) -> Stats:
        """What all have counted."""
        return Stats.total(server.stats() for server in self._servers.values())

    def serve_forever(self) -> None:
        """Serve until `stop`. What ended one of the servers is raised here."""
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()
        self._tell(listening(self.server_address, self.loop.poller.backend, f"{len(self._threads)} threads"))
        self.loop.run()
        for thread in self._threads:
            thread.join()
        if self._trouble is not None:
            raise self._trouble

    def stop(self, drain: float) -> None:
        """Accept no more, and let every server drain for so many seconds; again, with less time."""
        for server in self._servers.values():
            server.shutdown(drain, wait=False)

    def look(self, then: Callable[[Sequence[WorkerStats]], object]) -> None:
        """Call `then` with everybody's statistics."""
        pid = os.getpid()
        then([WorkerStats(name, pid, "serving", server.stats()) for name, server in self._servers.items()])

    def close(self) -> None:
        """Stop whoever still serves, and give everything back."""
        for server in self._servers.values():
            server.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self.loop.close()
        remove_file(self._file)

    def _serve(self, server: Server) -> None:
        trouble: BaseException | None = None
        try:
            server.serve_forever()
        except BaseException as error:
            trouble = error
        self.loop.call_soon_threadsafe(self._ended, trouble)

    def _ended(self, trouble: BaseException | None) -> None:
        self._running -= 1
        if trouble is not None:
            self._trouble = self._trouble or trouble
            self.stop(0.0)
        if not self._running:
            self.loop.stop()
