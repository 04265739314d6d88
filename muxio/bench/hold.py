"""What ``muxio bench hold`` does: hold very many connections at once, by workers, and let each echo at the end.

A process may have so many open files and no more, on both sides; so there are several workers, and several processes of
clients (``python -m muxio.bench.hold PORT FIRST COUNT``, connections FIRST to FIRST + COUNT - 1). Ports are numbers of
16 bits: each ten thousand connections come from a loopback address of their own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import muxio
from muxio import READ, WRITE
from muxio.bench.measure import Failure
from muxio.bench.processes import can_tell_memory, module, private_memory, running, where
from muxio.bench.report import open_files

SIZE = 64  #: bytes of an echo
PER_SOURCE = 10_000  #: connections from one address
WINDOW = 64  #: connections of a process that are being made at a time
SPARE_FILES = 100  #: descriptors of a process beside its connections
ROOM = 1.1  #: how much more than its share a worker can take: the kernel shares out by a hash
PATIENCE = 60.0  #: seconds without any progress


@dataclass(frozen=True)
class Settings:
    connections: int
    workers: int | None = None  #: None: as few as can hold them
    clients: int | None = None  #: processes; None: as few as can hold them


@dataclass
class Held:
    """What was found. Memory in bytes, times in seconds."""

    connections: int
    workers: int
    clients: int
    connecting: float  #: until all were connected, and had been greeted by a first echo
    per_worker: list[int]  #: connections that each held
    user_memory: int | None  #: by which the workers grew, their own alone; None if the system does not tell
    machine_memory: int | None  #: by which what is available of the whole machine shrank, clients and kernel included
    kernel_memory: int | None  #: by which the kernel's slabs grew, for both ends
    echoing: float  #: from the first byte of the last echoes to the last
    echoed: int  #: connections that got back at the end what they had sent
    errors: dict[str, int]  #: what went wrong, and how often

    @property
    def whole(self) -> bool:
        """Whether every connection was held, and every byte came back."""
        return not self.errors and self.echoed == self.connections == sum(self.per_worker)


def plan(settings: Settings) -> tuple[int, int]:
    """How many workers and processes of clients it takes. ValueError: the limits do not allow it, and what to raise."""
    allowed = open_files()
    each = math.inf if allowed is None else allowed - SPARE_FILES
    if each < 1:
        raise ValueError(f"a process may have {allowed} open files, which is too few for any (ulimit -n)")
    workers = settings.workers or math.ceil(settings.connections * ROOM / each)
    clients = settings.clients or math.ceil(settings.connections / each)
    if workers * each < settings.connections * (ROOM if workers > 1 else 1):
        enough = math.ceil(settings.connections * ROOM / each)
        raise ValueError(f"{workers} workers of {allowed:,} open files are too few (ulimit -n), {enough} would do")
    if clients * each < settings.connections:
        raise ValueError(f"{clients} processes of {allowed:,} open files are too few for the clients (ulimit -n)")
    return workers, clients


def hold(settings: Settings, progress: Callable[[str], object]) -> Held:
    """Do it. ValueError: the limits do not allow it. Failure: the server or a client process does not work."""
    workers, clients = plan(settings)
    serve = [*module("muxio"), "serve", "127.0.0.1:0", "-q", "--log-format", "json", "--workers", str(workers)]
    serve += ["--first-data", "1h", "--max-connections", str(settings.connections)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(serve, None))
        port, pids = where(server)
        memory, available, slab = _private(pids), _of_machine("MemAvailable"), _of_machine("Slab")
        ends = [settings.connections * number // clients for number in range(clients + 1)]
        began = time.monotonic()
        crowd = [
            stack.enter_context(running([*module("muxio.bench.hold"), str(port), str(first), str(end - first)], None))
            for first, end in pairwise(ends)
        ]
        connected = _until(crowd, "connected", settings.connections, progress)
        connecting = time.monotonic() - began
        user_memory = _less(_private(pids), memory)
        machine_memory = _less(available, _of_machine("MemAvailable"))
        kernel_memory = _less(_of_machine("Slab"), slab)
        per_worker = _per_worker(server)
        began = time.monotonic()
        for client in crowd:
            _say(client, "echo")
        echoed = _until(crowd, "echoed", settings.connections, progress)
        echoing = time.monotonic() - began
        errors: Counter[str] = Counter()
        for found in (*connected, *echoed):
            errors.update(found["errors"])
        return Held(
            settings.connections,
            workers,
            clients,
            connecting,
            per_worker,
            user_memory,
            machine_memory,
            kernel_memory,
            echoing,
            sum(found["count"] for found in echoed),
            dict(errors),
        )


def conduct(settings: Settings, as_json: bool) -> int:
    """Do it, tell of it, and return the exit status: 0 if all were held and echoed, 1 if not."""

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{line:60}", end="", file=sys.stderr, flush=True)

    try:
        held = hold(settings, progress)
    except Failure as failure:
        progress("")
        print(f"muxio bench: {failure}", file=sys.stderr)
        return 1
    progress("")
    print(json.dumps(asdict(held)) if as_json else "\n".join(_lines(held)))
    return 0 if held.whole else 1


def _lines(held: Held) -> Iterator[str]:
    def memory(number: int | None) -> str:
        if number is None:
            return "not to be told here"
        return f"{number / held.connections:,.0f} B a connection, {number / 1e6:,.1f} MB in all"

    shares = ", ".join(f"{count:,}" for count in held.per_worker)
    yield f"{held.connections:,} connections, by {held.workers} workers, from {held.clients} client processes"
    yield f"connected    in {held.connecting:,.1f} s, each with an echo of {SIZE} B"
    yield f"held         {sum(held.per_worker):,} at once: {shares}"
    yield f"workers      {memory(held.user_memory)} (private memory beyond that of idle workers)"
    yield f"kernel       {memory(held.kernel_memory)} (slabs, of both ends)"
    yield f"machine      {memory(held.machine_memory)} (what is available less; clients and all)"
    yield f"echoed       {held.echoed:,} of {held.connections:,}, every byte compared, in {held.echoing:,.1f} s"
    for error, count in sorted(held.errors.items()):
        yield f"error        {count:,} x {error}"


def _until(
    crowd: Sequence[subprocess.Popen[str]], word: str, of: int, progress: Callable[[str], object]
) -> list[dict[str, Any]]:
    """What each process of clients says when all of its connections are done with something. Failure: one does not."""
    results: list[dict[str, Any]] = []
    for client in crowd:
        assert client.stdout is not None
        done = sum(result["count"] for result in results)
        while True:
            line = client.stdout.readline()
            if not line:
                raise Failure("a process of clients has ended")
            found = json.loads(line)
            progress(f"{word} {done + found['count']:,} of {of:,}")
            if found["over"]:
                results.append(found)
                break
    return results


def _say(client: subprocess.Popen[str], word: str) -> None:
    assert client.stdin is not None
    client.stdin.write(f"{word}\n")
    client.stdin.flush()


def _per_worker(server: subprocess.Popen[str]) -> list[int]:
    """How many connections each worker has, by the server's own statistics."""
    assert server.stdout is not None
    if sys.platform == "win32":
        return []
    server.send_signal(signal.SIGUSR1)
    while line := server.stdout.readline():
        found = json.loads(line)
        if found["event"] == "statistics":
            return [worker["connections"] for worker in found["workers"]]
    raise Failure("the server has ended")


def _private(pids: Sequence[int]) -> int | None:
    return private_memory(*pids) if can_tell_memory() else None


def _of_machine(name: str) -> int | None:
    """A line of proc_meminfo(5), in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _less(more: int | None, less: int | None) -> int | None:
    return None if more is None or less is None else more - less


# A process of clients


class _Peer:
    """One connection: greets, is silent, and asks once more at the end."""

    def __init__(self, number: int) -> None:
        self.sock = socket.socket()
        self.payload = random.Random(number).randbytes(2 * SIZE)  # the greeting, and the echo at the end
        self.sent = self.received = 0
        self.failed = False

    def connect(self, port: int, number: int) -> None:
        self.sock.setblocking(False)
        if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):  # the port is chosen when the other end is known (ip(7))
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
        if sys.platform == "linux":  # elsewhere 127.0.0.1 is the only one without further ado
            self.sock.bind((f"127.0.1.{1 + number // PER_SOURCE}", 0))
        self.sock.connect_ex(("127.0.0.1", port))

    def send(self) -> None:
        """Send the next part."""
        self.sent += self.sock.send(self.payload[self.sent : self.sent + SIZE])

    def receive(self) -> bool:
        """Whether all that was sent has come back. ValueError: something else came. OSError: an end."""
        data = self.sock.recv(SIZE)
        if not data:
            raise ConnectionAbortedError("EOF")
        if data != self.payload[self.received : self.received + len(data)]:
            raise ValueError("another byte than was sent")
        self.received += len(data)
        return self.received == self.sent


class _Clients:
    """All connections of one process."""

    def __init__(self, port: int, first: int, count: int) -> None:
        self.poller: muxio.Poller[_Peer] = muxio.Poller()
        self.peers: list[_Peer] = []
        self.errors: Counter[str] = Counter()
        self._port, self._first, self._count = port, first, count

    def connect(self) -> None:
        """Make all connections, a few at a time, and let each have its greeting back."""
        done = 0
        while len(self.peers) < self._count or done < self._count:
            while len(self.peers) < min(self._count, done + WINDOW):
                number = self._first + len(self.peers)
                peer = _Peer(number)
                self.peers.append(peer)
                try:
                    peer.connect(self._port, number)
                except OSError as error:
                    self._fail(peer, error)
                    done += 1
                else:
                    self.poller.register(peer.sock, WRITE, peer)
            done += self._turn("connecting", done)

    def echo(self) -> None:
        """Let each of them echo once more."""
        left = [peer for peer in self.peers if not peer.failed]
        done = self._count - len(left)
        for start in range(0, len(left), WINDOW):
            batch = left[start : start + WINDOW]
            for peer in batch:
                try:
                    peer.send()
                except OSError as error:
                    self._fail(peer, error)
                    done += 1
            enough = done + sum(not peer.failed for peer in batch)
            while done < enough:
                done += self._turn("echoing", done)

    def report(self, count: int, over: bool = True) -> None:
        print(json.dumps({"count": count, "errors": self.errors if over else {}, "over": over}), flush=True)
        if over:
            self.errors.clear()

    def held(self) -> int:
        return sum(not peer.failed for peer in self.peers)

    def _turn(self, what: str, done: int) -> int:
        """Serve who is ready. How many are done with what they do, or have failed."""
        batch = self.poller.poll(PATIENCE)
        if not batch:
            raise Failure(f"no progress in {PATIENCE:g} s of {what}")
        over = 0
        for peer, events in batch:
            if peer.failed or not events:
                continue
            try:
                if peer.sent == 0:
                    number = peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if number:
                        raise OSError(number, os.strerror(number))
                    peer.send()
                    self.poller.modify(peer.sock, READ)
                else:
                    over += peer.receive()
            except (OSError, ValueError) as error:
                self._fail(peer, error)
                over += 1
        if (done + over) // 1000 != done // 1000:
            self.report(done + over, over=False)
        return over

    def _fail(self, peer: _Peer, error: Exception) -> None:
        peer.failed = True
        self.errors[f"{type(error).__name__}: {error}"] += 1
        if peer.sock in self.poller:
            self.poller.unregister(peer.sock)
        peer.sock.close()


def main(port: int, first: int, count: int) -> None:
    """What a process of clients does."""
    clients = _Clients(port, first, count)
    clients.connect()
    clients.report(clients.held())
    sys.stdin.readline()
    clients.echo()
    clients.report(clients.held())
    sys.stdin.read()  # until the end, everything stays connected


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
