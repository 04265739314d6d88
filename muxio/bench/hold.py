"""What ``muxio bench hold`` does: hold very many connections at once, by workers, and let each echo at the end.

A process may have so many open files and no more, on both sides; so there are several workers, and several processes of
clients (``python -m muxio.bench.hold PORT FIRST COUNT SOURCE``, connections FIRST to FIRST + COUNT - 1). Ports are
numbers of 16 bits: each SOURCE connections come from a loopback address of their own.

The JSON is one object, schema 1: ``schema``, ``bench``, ``complete``, ``error``, ``machine``, ``settings`` and
``warnings`` as in `muxio.bench.report`, and the fields of `Held`.
"""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import muxio
from muxio import READ, WRITE
from muxio.bench.measure import Failure
from muxio.bench.processes import can_tell_memory, module, private_memory, running, where
from muxio.bench.report import interruptible, machine, open_files, spoilers

SIZE = 64  #: bytes of an echo
PER_SOURCE = 10_000  #: connections from one address, at most; client.c says why not more
SOURCES = 254  #: addresses: 127.0.1.1 and so on
WINDOW = 64  #: connections of a process that are being made, or wait for an echo, at a time
SPARE_FILES = 100  #: descriptors of a process beside its connections
ROOM = 1.1  #: how much more than its share a worker can take: the kernel shares out by a hash
PATIENCE = 60.0  #: seconds without any progress

_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True)
class Settings:
    connections: int
    workers: int | None = None  #: None: as few as can hold them
    clients: int | None = None  #: processes; None: as few as can hold them


@dataclass(frozen=True)
class Plan:
    """How it is done."""

    workers: int
    clients: int  #: processes
    per_source: int  #: connections from one address


@dataclass
class Held:
    """What was found. Memory in bytes, times in seconds. None: not told by the system, or not reached."""

    connections: int  #: that were asked for
    workers: int
    clients: int
    connected: int = 0  #: connections that had a first echo; while they are being made, at least so many
    connecting: float | None = None  #: until all had it
    per_worker: list[int] = field(default_factory=list)  #: connections that each held, all at once
    user_memory: int | None = None  #: by which the workers grew, their own alone
    machine_memory: int | None = None  #: by which what is available of the whole machine shrank, clients and kernel too
    kernel_memory: int | None = None  #: by which the slabs of the whole machine's kernel grew, for both ends
    echoed: int = 0  #: connections that got back at the end what they had sent; while they echo, at least so many
    echoing: float | None = None  #: from the first byte of the last echoes to the last
    errors: dict[str, int] = field(default_factory=dict)  #: what went wrong, and how often

    @property
    def whole(self) -> bool:
        """Whether every connection was held, and every byte came back."""
        return not self.errors and self.echoed == self.connections == sum(self.per_worker)


def plan(settings: Settings) -> Plan:
    """How many workers and processes of clients it takes. ValueError: the limits do not allow it, and what to raise."""
    connections = settings.connections
    allowed = open_files()
    each = math.inf if allowed is None else allowed - SPARE_FILES
    if each < 1:
        raise ValueError(f"a process may have {allowed} open files, which is too few for any ({_more_files()})")
    alone = connections <= each and settings.workers in (None, 1)
    roomy = max(1, math.ceil(connections * ROOM / each))
    enough = max(1, math.ceil(connections / each))
    workers = settings.workers or (1 if alone else roomy)
    clients = settings.clients or enough
    if not alone and workers < roomy:
        raise ValueError(
            f"{workers} x {allowed:,} open files are too few for {connections:,} connections, which the kernel shares "
            f"out by a hash: --workers {roomy}, or {_more_files()}"
        )
    if clients < enough:
        raise ValueError(
            f"{clients} x {allowed:,} open files are too few for the clients: --clients {enough}, or {_more_files()}"
        )
    per_source = PER_SOURCE
    if (ports := _ports()) is not None:
        per_source = min(PER_SOURCE, max(1, ports // 2))
        if connections > SOURCES * per_source:
            raise ValueError(
                f"{SOURCES} addresses of {ports:,} ports are too few for {connections:,} connections: raise "
                "net.ipv4.ip_local_port_range (sysctl)"
            )
    return Plan(workers, clients, per_source)


def _more_files() -> str:
    """How to get more open files."""
    if sys.platform == "win32":
        return "more open files"
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return "more open files (ulimit -n; the hard limit is infinite)"
    if soft < hard:
        return f"more open files (ulimit -n {hard})"
    return f"a hard limit of more than {hard:,} open files (ulimit -Hn, as root)"


def _ports() -> int | None:
    """How many ports there are for those who connect; None if the system does not tell."""
    try:
        low, high = map(int, _PORTS.read_text(encoding="ascii").split())
    except OSError:
        return None
    return high - low + 1


def hold(settings: Settings, plan: Plan, held: Held, progress: Callable[[str], object]) -> None:
    """Do it, and fill in what is found on the way. Failure: the server or a client process does not work."""
    serve = [*module("muxio"), "serve", "127.0.0.1:0", "-q", "--log-format", "json", "--workers", str(plan.workers)]
    serve += ["--first-data", "1h", "--idle", "1h", "--max-connections", str(settings.connections)]

    def connected(count: int) -> None:
        held.connected = count
        progress(f"connected {count:,} of {settings.connections:,}")

    def echoed(count: int) -> None:
        held.echoed = count
        progress(f"echoed {count:,} of {settings.connections:,}")

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(serve, None))
        port, pids = where(server)
        memory, available, slab = _private(pids), _of_machine("MemAvailable"), _of_machine("Slab")
        ends = [settings.connections * number // plan.clients for number in range(plan.clients + 1)]
        began = time.monotonic()
        crowd = []
        for first, end in pairwise(ends):
            words = map(str, (port, first, end - first, plan.per_source))
            crowd.append(stack.enter_context(running([*module("muxio.bench.hold"), *words], None)))
        errors = _until_over(crowd, connected)
        held.connecting = time.monotonic() - began
        held.user_memory = _less(_private(pids), memory)
        held.machine_memory = _less(available, _of_machine("MemAvailable"))
        held.kernel_memory = _less(_of_machine("Slab"), slab)
        held.errors = dict(errors)
        held.per_worker = _per_worker(server)
        began = time.monotonic()
        for client in crowd:
            _say(client, "echo")
        errors += _until_over(crowd, echoed)
        held.echoing = time.monotonic() - began
        held.errors = dict(errors)


def conduct(settings: Settings, file: str | None) -> int:
    """Do it, and tell of it: in lines, or as JSON if there is a file (or ``-``) to write it to.

    Returns the exit status: 0 if all were held and echoed, 1 if not, 130 if interrupted. ValueError: the limits do not
    allow it. OSError: the file cannot be written.
    """
    planned = plan(settings)
    facts = machine()
    warnings = spoilers(facts, 0)
    for warning in warnings:
        print(f"muxio bench: {warning}", file=sys.stderr)

    def progress(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{line:60}", end="\r", file=sys.stderr, flush=True)

    held = Held(settings.connections, planned.workers, planned.clients)
    trouble, status = None, 0
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if file not in (None, "-"):
            stream = stack.enter_context(open(str(file), "w", encoding="utf-8"))
        try:
            with interruptible():
                hold(settings, planned, held, progress)
            status = 0 if held.whole else 1
        except KeyboardInterrupt:
            trouble, status = "interrupted", 130
        except (Failure, OSError) as error:
            trouble, status = str(error), 1
        progress("")
        if file is None:
            print("\n".join(_lines(held)))
        else:
            head = {"schema": 1, "bench": "hold", "complete": trouble is None, "error": trouble, "machine": facts}
            document = {**head, "settings": asdict(settings), "warnings": warnings, **asdict(held)}
            json.dump(document, stream, indent=1)
            stream.write("\n")
    if trouble:
        print(f"muxio bench: {trouble}, the results are partial", file=sys.stderr)
    return status


def _lines(held: Held) -> Iterator[str]:
    """What was found, as far as it went."""

    def memory(number: int | None) -> str:
        if number is None:
            return "not to be told here"
        return f"{number / held.connections:,.0f} B a connection, {number / 1e6:,.1f} MB in all"

    yield f"{held.connections:,} connections; {held.workers:,} x worker, {held.clients:,} x client process"
    if held.connecting is None:
        yield f"connected    at least {held.connected:,}"
        return
    yield f"connected    {held.connected:,} in {held.connecting:,.1f} s, each with an echo of {SIZE} B"
    yield f"workers      {memory(held.user_memory)} (private memory beyond that of idle workers)"
    yield f"kernel       {memory(held.kernel_memory)} (slabs of the whole machine, for both ends)"
    yield f"machine      {memory(held.machine_memory)} (less available of the whole machine; clients and all)"
    if held.per_worker:
        shares = ", ".join(f"{count:,}" for count in held.per_worker)
        yield f"held         {sum(held.per_worker):,} at once: {shares}"
    if held.echoing is None:
        yield f"echoed       at least {held.echoed:,}"
    else:
        yield f"echoed       {held.echoed:,} of {held.connections:,}, every byte compared, in {held.echoing:,.1f} s"
    for error, count in sorted(held.errors.items()):
        yield f"error        {count:,} x {error}"


def _until_over(crowd: Sequence[subprocess.Popen[str]], done: Callable[[int], object]) -> Counter[str]:
    """Wait until each process of clients is through with what it does. Returns what went wrong, and how often.

    done: called with how many connections are through with it, as far as is known.

    Failure: a process has ended.
    """
    through, errors = 0, Counter[str]()
    for client in crowd:
        assert client.stdout is not None
        over = False
        while not over:
            line = client.stdout.readline()
            if not line:
                raise Failure("a process of clients has ended")
            found = json.loads(line)
            over = found["over"]
            done(through + found["count"])
        through += found["count"]
        errors.update(found["errors"])
    return errors


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
        self.number = number
        self.sock = socket.socket()
        self.payload = random.Random(number).randbytes(2 * SIZE)  # the greeting, and the echo at the end
        self.sent = self.received = 0
        self.failed = False

    def connect(self, port: int, per_source: int) -> None:
        self.sock.setblocking(False)
        if hasattr(socket, "IP_BIND_ADDRESS_NO_PORT"):  # the port is chosen when the other end is known (ip(7))
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_BIND_ADDRESS_NO_PORT, 1)
        if sys.platform == "linux":  # elsewhere 127.0.0.1 is the only one without further ado
            self.sock.bind((f"127.0.1.{1 + self.number // per_source}", 0))
        number = self.sock.connect_ex(("127.0.0.1", port))
        if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            raise OSError(number, os.strerror(number))

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

    def through(self, echoes: int) -> bool:
        """Whether so many echoes came back whole, and nothing has failed."""
        return not self.failed and self.received == echoes * SIZE


class _Clients:
    """All connections of one process."""

    def __init__(self, port: int, first: int, count: int, per_source: int = PER_SOURCE) -> None:
        self.poller: muxio.Poller[_Peer] = muxio.Poller()
        self.peers: list[_Peer] = []
        self.errors: Counter[str] = Counter()
        self._port, self._numbers, self._per_source = port, range(first, first + count), per_source
        #: Who waits for an echo.
        self._waiting: set[_Peer] = set()
        self._done = 0

    def connect(self) -> None:
        """Make all connections, a few at a time, and let each have its greeting back."""

        def dial(peer: _Peer) -> None:
            self.peers.append(peer)
            peer.connect(self._port, self._per_source)
            self.poller.register(peer.sock, WRITE, peer)

        self._for_each(map(_Peer, self._numbers), dial, "connecting")

    def echo(self) -> None:
        """Let each of them echo once more."""
        self._for_each((peer for peer in self.peers if not peer.failed), _Peer.send, "echoing")

    def report(self, echoes: int) -> None:
        """Say that this is over, how many have had so many echoes, and what went wrong."""
        count = sum(peer.through(echoes) for peer in self.peers)
        print(json.dumps({"count": count, "errors": self.errors, "over": True}), flush=True)
        self.errors.clear()

    def _for_each(self, peers: Iterable[_Peer], start: Callable[[_Peer], object], what: str) -> None:
        """Start something with each, and serve them until they have their echo or have failed."""
        self._done = 0
        for peer in peers:
            while len(self._waiting) >= WINDOW:
                self._turn(what)
            self._waiting.add(peer)
            try:
                start(peer)
            except OSError as error:
                self._fail(peer, error)
        while self._waiting:
            self._turn(what)

    def _turn(self, what: str) -> None:
        """Serve who is ready. Failure: nobody is for too long."""
        batch = self.poller.poll(PATIENCE)
        if not batch:
            raise Failure(f"no progress in {PATIENCE:g} s of {what}, {len(self._waiting)} wait")
        for peer, events in batch:
            if peer.failed or not events:
                continue
            try:
                self._serve(peer)
            except (OSError, ValueError) as error:
                self._fail(peer, error)

    def _serve(self, peer: _Peer) -> None:
        if peer.sent == 0:
            if number := peer.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(number, os.strerror(number))
            peer.send()
            self.poller.modify(peer.sock, READ)
        elif peer.receive():
            self._waiting.discard(peer)
            self._done += 1
            if self._done % 1000 == 0:
                print(json.dumps({"count": self._done, "over": False}), flush=True)

    def _fail(self, peer: _Peer, error: Exception) -> None:
        peer.failed = True
        self._waiting.discard(peer)
        self.errors[f"{type(error).__name__}: {error}"] += 1
        if peer.sock in self.poller:
            self.poller.unregister(peer.sock)
        peer.sock.close()


def main(port: int, first: int, count: int, per_source: int) -> None:
    """What a process of clients does."""
    clients = _Clients(port, first, count, per_source)
    clients.connect()
    clients.report(1)
    sys.stdin.readline()
    clients.echo()
    clients.report(2)
    sys.stdin.read()  # until the end, everything stays connected


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
