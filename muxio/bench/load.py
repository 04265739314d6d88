"""A load, and how a load generator puts it on a server.

There are two generators, which do the same: client.c, and client.py where there is no C compiler. A generator gets its
parameters as ``name=value`` words: the fields of `Load`, ``port`` (the server's, at 127.0.0.1) and ``clock`` (the CPU
clocks of the server's processes, with commas between). It connects, waits until each connection had a first echo, lets
the busy ones run to warm up, measures, and waits for the echoes that are still on their way. Every byte that comes back
is compared.

Then it prints a line of JSON, the fields of `Found` and ``error`` (null, or in words what went wrong, and nothing
else), and keeps everything connected until its stdin ends.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from muxio.bench.measure import Failure
from muxio.bench.processes import Cores, can_tell_memory, cpu_clock, machine_time, private_memory, running, where

PERCENTILES = ("p50", "p75", "p90", "p99", "p99.9", "max")


@dataclass(frozen=True)
class Load:
    busy: int = 0  #: connections with one message on its way at a time; their latency is what is measured
    size: int = 64  #: of these messages, bytes
    rate: float = 0.0  #: messages a second, of all busy ones together (open loop); 0: as fast as echoes come (closed)
    idle: int = 0  #: connections that had an echo, and are silent since
    hello: int = 1024  #: the size of that echo, bytes
    drip: int = 0  #: connections that send a byte every 100 ms
    deaf: int = 0  #: connections that send as much as they can, and never read
    reset: int = 0  #: connections that send 16 KiB, read nothing, and reset half a second later, each second again
    window: int = 64  #: how many at most are between connect and first echo
    warmup: float = 0.3  #: seconds
    duration: float = 1.0  #: seconds measured; 0: only connect
    patience: float = 30.0  #: seconds for all to get a first echo, and for the last echoes to come


@dataclass(frozen=True)
class Found:
    setup: float  #: seconds from the first connect to when the last connection had its first echo
    connections: int  #: busy ones
    seconds: float  #: that were measured
    echoes: int  #: in that time
    slowest: int  #: echoes of the connection that had fewest
    starved: int  #: connections that had none
    server_cpu: float | None  #: seconds of the server process, user and system; None if that cannot be told
    own_cpu: float  #: seconds of the generator
    cuts: int  #: how often the server ended a connection that drips, is deaf or resets
    latency: dict[str, float] | None  #: `PERCENTILES`, µs; in an open loop from when a message was to be sent
    lateness: dict[str, float] | None  #: how much later than that the generator sent, with a connection free for it
    memory_before: int | None = None  #: private bytes of the server once it had a first echo; None if not to be told
    memory: int | None = None  #: and at the end, with everything connected
    beside: str = ""  #: what the program beside has said
    machine: float | None = None  #: the share of all cores that was busy, others included, while the generator ran


def put(load: Load, server: Sequence[str], generator: Sequence[str], cores: Cores, beside: Sequence[str] = ()) -> Found:
    """Start the server, put the load on it, and end it. Failure: the server does not do what it should.

    beside: a program that runs meanwhile; it is told the server's port as its last argument. It has to say a line, and
    to run until the end.
    """
    with contextlib.ExitStack() as stack:
        port, pids = where(stack.enter_context(running(server, cores.server)))
        _generate(Load(idle=1, patience=load.patience), port, [], generator, cores)
        before = private_memory(*pids) if can_tell_memory() else None
        other = stack.enter_context(running([*beside, str(port)], cores.client)) if beside else None
        start = machine_time()
        found = _generate(load, port, pids, generator, cores)
        machine = _busy(start, machine_time())
        said = _end(other) if other else ""
        return Found(**{**asdict(found), "memory_before": before, "beside": said, "machine": machine})


def _busy(start: tuple[float, float] | None, end: tuple[float, float] | None) -> float | None:
    if start is None or end is None:
        return None
    busy, idle = end[0] - start[0], end[1] - start[1]
    return busy / (busy + idle) if busy + idle > 0 else None  # it counts in hundredths of a second


def _end(other: subprocess.Popen[str]) -> str:
    """End a program that was to run until now, and return what it has said, when that is a line at least."""
    assert other.stdout is not None
    first = other.stdout.readline()
    if not first or other.poll() is not None:
        raise Failure("the program beside has ended too early")
    other.kill()
    return first + other.stdout.read()


def _generate(load: Load, port: int, server: Sequence[int], generator: Sequence[str], cores: Cores) -> Found:
    clocks = ",".join(str(clock) for pid in server if (clock := cpu_clock(pid)))
    words = [f"{name}={value}" for name, value in {**asdict(load), "port": port, "clock": clocks}.items()]
    with running([*generator, *words], cores.client) as process:
        found = _line(process)
        if error := found.pop("error"):
            raise Failure(error)
        memory = private_memory(*server) if server and can_tell_memory() else None
        process.communicate()  # ends its stdin, and waits
        return Found(**found, memory=memory)


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        found: dict[str, Any] = json.loads(process.stdout.readline())
    except ValueError:
        raise Failure("the load generator broke off") from None
    return found
