"""Keep a poller and a server busy for minutes: nothing is lost, and nothing is left.

    python tests/soak.py                                   # 10 minutes on the best backend here
    python tests/soak.py --minutes 60 --backend poll

Half of the threads send tokens through short-lived sockets of one poller (see tokens.py); the others are clients of one
`muxio.server.Server` that echoes, and go in order, half-closed or with a reset. Each thread lives for some hundred
milliseconds. Once a minute all of them end, and what is left is counted: descriptors, threads, private memory.

Ends with 0 if no event and no byte was lost, no descriptor and no thread is left, and private memory is within 2 MiB of
what it was after the first minute (not judged in runs shorter than three, nor where the system does not tell); else
with 1 and what went wrong. Ctrl-C ends it with 130 and the figures so far.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a clone, if muxio is not installed

from helpers import open_descriptors
from tokens import DEADLINE, Hall, Registration, Stopped

import muxio
from muxio import EDGE, ONESHOT, READ
from muxio.server import EchoProtocol, Server

WORKERS = 3  #: at a time, and as many clients
ROUNDS = 400  #: in the life of a worker
PERIOD = 60.0  #: seconds between two lines; shorter in runs of less than six minutes
WARM = 180.0  #: seconds of a run that is long enough to judge its memory
MEMORY = 2 << 20  #: bytes of private memory that may come on top


def private_memory() -> int:
    """Bytes that nobody else shares; 0 where the system does not tell."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what ended threads have freed in their arenas is no leak
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


class Counter:
    """Counts from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.value = 0

    def add(self, more: int = 1) -> None:
        with self._lock:
            self.value += more


@dataclass
class Figures:
    """What is left at a quiet moment."""

    descriptors: int
    threads: int
    memory: int

    @classmethod
    def now(cls) -> Figures:
        gc.collect()
        return cls(open_descriptors(), threading.active_count(), private_memory())

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.threads} threads, {self.memory / 2**20:.2f} MiB private"


class Soak:
    """A poller with a dispatcher, a server, and generations of short-lived threads around them."""

    def __init__(self, backend: str | None, seed: str) -> None:
        self.seed = seed
        poller: muxio.Poller[Registration] = muxio.Poller(backend)
        modes = [mode for mode in (0, EDGE, ONESHOT) if poller.supports(READ | mode)]
        self.hall = Hall(poller, modes, f"{poller.backend}, seed {seed}")
        self.server = Server(("127.0.0.1", 0), EchoProtocol, backend=backend)
        self.rounds, self.clients, self.threads = Counter(), Counter(), Counter()
        self.failures = self.hall.failures
        self._standing = [self._start(self.hall.dispatch, seed), self._start(self.server.serve_forever)]
        self._passing: list[threading.Thread] = []

    def run(self, seconds: float) -> None:
        """Keep generations coming for so long, then let them end."""
        end = time.monotonic() + seconds
        lives = [self._worker] * WORKERS + [self._client] * WORKERS
        self._passing = [self._start(self._generations, life, end) for life in lives]
        for thread in self._passing:
            thread.join()

    def close(self) -> None:
        self.hall.stop()
        for thread in self._passing:
            thread.join()
        self.server.shutdown()
        for thread in self._standing:
            thread.join()
        self.server.close()
        self.hall.poller.close()

    def _start(self, function: Callable[..., object], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=self.hall.guard, args=(function, *arguments))
        thread.start()
        return thread

    def _generations(self, life: Callable[[str], object], end: float) -> None:
        while time.monotonic() < end and not self.hall.over:
            self.threads.add()
            self._start(life, f"{life.__name__} {self.threads.value}").join()

    def _worker(self, name: str) -> None:
        self.hall.work(name, ROUNDS, self.seed, self.rounds.add)

    def _client(self, name: str) -> None:
        chance = random.Random(f"{self.seed} {name}")
        for _ in range(20):
            if self.hall.over:
                raise Stopped
            with socket.create_connection(self.server.server_address, timeout=DEADLINE) as sock:
                self._talk(sock, chance)
            self.clients.add()

    def _talk(self, sock: socket.socket, chance: random.Random) -> None:
        for _ in range(chance.randrange(5)):
            data = chance.randbytes(chance.choice((1, 64, 4096, 50_000)))
            sock.sendall(data)
            assert receive(sock, len(data)) == data, f"{self.hall.what}: the echo is not what was sent"
        farewell = chance.choice(("close", "half-close", "reset"))
        if farewell == "half-close":
            sock.sendall(b"last words")
            sock.shutdown(socket.SHUT_WR)
            assert receive(sock, 11) == b"last words", f"{self.hall.what}: the last words were not echoed"
        elif farewell == "reset":
            linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def receive(sock: socket.socket, size: int) -> bytes:
    """So many bytes, fewer at EOF."""
    received = bytearray()
    while len(received) < size and (data := sock.recv(size - len(received))):
        received += data
    return bytes(received)


def soak(minutes: float, backend: str | None, seed: str) -> int:
    """Returns the exit status."""
    seconds = 60 * minutes
    period = min(PERIOD, seconds / 6)
    before = Figures.now()
    run = Soak(backend, seed)
    print(f"{run.hall.what}: {minutes:g} minutes, a line each {period:.3g} s", flush=True)
    began = time.monotonic()
    standing: list[Figures] = []
    interrupted = False
    try:
        while (left := began + seconds - time.monotonic()) > period / 100 and not run.failures:
            run.run(min(period, left))
            standing.append(Figures.now())
            print(f"{time.monotonic() - began:6.1f} s  {progress(run)}; {standing[-1]}", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    run.close()
    after = Figures.now()
    print(f"{time.monotonic() - began:6.1f} s  {progress(run)}; closed: {after}")
    if interrupted:
        return 130
    troubles = [repr(error) for error in run.failures]
    if not troubles:
        first, last = standing[0], standing[-1]
        if last.descriptors > first.descriptors or after.descriptors > before.descriptors:
            troubles.append("descriptors are left")
        if last.threads > first.threads or after.threads > before.threads:
            troubles.append("threads are left")
        if seconds >= WARM and last.memory > first.memory + MEMORY:
            troubles.append(f"private memory grew by {(last.memory - first.memory) / 2**20:.2f} MiB")
    for trouble in troubles:
        print(f"FAILED: {trouble}")
    if not troubles:
        print("no event was lost and nothing is left")
    return 1 if troubles else 0


def progress(run: Soak) -> str:
    return (
        f"{run.hall.events} events, {run.rounds.value} rounds, {run.clients.value} connections, "
        f"{run.threads.value} threads so far"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long; 10 by default")
    parser.add_argument("--backend", choices=muxio.backends(), help="of the poller and of the server")
    parser.add_argument(
        "--seed", default=str(random.randrange(10**9)), help="of what the threads do; a new one each run"
    )
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes: more than 0")
    return soak(options.minutes, options.backend, options.seed)


if __name__ == "__main__":
    sys.exit(main())
