"""A worker: a process that serves a listener together with others, and does what its supervisor says."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from muxio.server.channel import Channel
from muxio.server.connection import AnyProtocol
from muxio.server.limits import Limits, Timeouts
from muxio.server.notices import LogFormat, Say, log_as_json, of_connection
from muxio.server.offload import Offload
from muxio.server.report import ConnectionReport
from muxio.server.server import Server
from muxio.server.signals import RELOAD, STATISTICS, STOP, handled, unblock_interrupts
from muxio.server.sockets import Address

logger = logging.getLogger("muxio.server")


@dataclass(frozen=True)
class Order:
    """What all workers serve, and how; it can be pickled if the factory can."""

    factory: Callable[[], AnyProtocol]
    backend: str | None
    timeouts: Timeouts | None
    limits: Limits | None
    offload: Offload | None
    drain: float
    say: Say | None  #: called with each connection that has ended
    log_format: LogFormat
    shared: bool = False  #: whether all have one listener

    def server(self, address: Address, worker: str | None = None) -> Server:
        """A server that does that, for the worker of that name if there are several."""
        say = self.say

        def report(ended: ConnectionReport) -> None:
            if say is not None:
                say(of_connection(ended, worker))

        return Server(
            address,
            self.factory,
            backend=self.backend,
            timeouts=self.timeouts,
            limits=self.limits,
            offload=self.offload,
            report=None if say is None else report,
            shared=self.shared,
        )


def work(order: Order, listener: socket.socket, line: socket.socket, name: str) -> None:
    """Serve until the supervisor says stop, or is gone. This is what a worker's process runs.

    SIGTERM drains this worker alone, and the supervisor replaces it. Everything else that is sent to a whole group of
    processes (Ctrl-C, a terminal that closes) is the supervisor's to hear.
    """
    for sock in (listener, line):
        sock.set_inheritable(False)
    if order.log_format == "json":
        log_as_json()
    with order.server(listener, name) as server:
        drains = [order.drain]

        def stop() -> None:
            server.shutdown(drains.pop() if drains else 0.0)

        def terminated() -> None:
            channel.send("leaving")
            stop()

        def heard(words: list[Any]) -> None:
            asked, *arguments = words
            if asked == "stats":
                channel.send("stats", *server.stats())
            elif asked == "retire":
                server.retire(*arguments)
            else:
                server.shutdown(*arguments)

        def lost() -> None:
            if not ended:
                logger.warning("worker %s drains and ends: its supervisor is gone", name)
            stop()

        ended = False
        channel = Channel(server.loop, line, heard, lost)
        handlers: dict[int | None, Callable[[], object] | None] = dict.fromkeys((*STOP, RELOAD, STATISTICS))
        handlers[signal.SIGTERM] = partial(server.loop.call_soon_threadsafe, terminated)
        with handled(handlers, server.wakeup_fd()):
            unblock_interrupts()
            channel.send("ready")
            server.serve_forever()
            ended = True
            channel.send("ended", *server.stats())
            channel.close()
            if not channel.closed:
                server.loop.run()  # until it is: that stops the loop
