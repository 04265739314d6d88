"""The server core: a loop on a poller, protocols with asyncio's names, a server, and the threaded oracle."""

from muxio.server.connection import Connection
from muxio.server.limits import Limits, Timeouts
from muxio.server.loop import Handle, Loop
from muxio.server.notices import Notice
from muxio.server.offload import Job, Offload
from muxio.server.protocol import BufferedProtocol, EchoProtocol, Protocol, Transport
from muxio.server.report import ConnectionReport
from muxio.server.serve import Summary, serve
from muxio.server.server import Server, Stats
from muxio.server.threaded import ThreadedServer

__all__ = [
    "BufferedProtocol",
    "Connection",
    "ConnectionReport",
    "EchoProtocol",
    "Handle",
    "Job",
    "Limits",
    "Loop",
    "Notice",
    "Offload",
    "Protocol",
    "Server",
    "Stats",
    "Summary",
    "ThreadedServer",
    "Timeouts",
    "Transport",
    "serve",
]
