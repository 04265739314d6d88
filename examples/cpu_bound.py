"""What a request that computes does to the clients beside it: in the loop, on threads, on processes.

A server answers ``prime?`` by trial division, which takes some tenths of a second, and echoes the rest. One client
asks for primes without pause; the others send a line now and then, and how long their echoes take is printed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from muxio.server import Job, Loop, Offload, Protocol, Server, Transport

LIGHT_CLIENTS = 20
PAUSE = 0.01  # seconds between two lines of a light client
PRIME = 9_999_999_999_971  # takes some tenths of a second


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class Inline(Protocol):
    """Computes in the loop."""

    def data_received(self, data: bytes) -> None:
        if data == b"prime?\n":
            self.transport.write(b"yes\n" if is_prime(PRIME) else b"no\n")
        else:
            self.transport.write(data)


class Offloaded(Protocol):
    """Lets the server's pool compute."""

    def data_received(self, data: bytes) -> None:
        if data == b"prime?\n":
            self.transport.offload(is_prime, PRIME).add_done_callback(self.answer)
        else:
            self.transport.write(data)

    def answer(self, job: Job) -> None:
        self.transport.write(b"yes\n" if job.result() else b"no\n")


class Light(Protocol):
    """Sends a line, waits for its echo, and rests a little."""

    def __init__(self, latencies: list[float]) -> None:
        self.latencies = latencies

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self.send()

    def data_received(self, data: bytes) -> None:
        self.latencies.append(time.perf_counter() - self.sent)
        self.transport.loop.call_later(PAUSE, self.send)

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(b"hello\n")


class Heavy(Protocol):
    """Asks for one prime after another."""

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        transport.write(b"prime?\n")

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"prime?\n")


def measure(port: int, seconds: float, found: Connection) -> None:
    """What the clients' process runs."""
    loop, latencies, address = Loop(), [0.0] * 0, ("127.0.0.1", port)
    clients: list[Light | Heavy] = [Heavy(), *(Light(latencies) for _ in range(LIGHT_CLIENTS))]
    for client in clients:
        loop.connect(address, lambda client=client: client)  # type: ignore[misc]

    def end() -> None:
        if latencies:
            loop.stop()
        else:  # the first echo takes longer than all was to take
            loop.call_later(0.1, end)

    loop.call_later(seconds, end)
    loop.run()
    loop.end_clients()
    loop.run_once()
    loop.close()
    found.send(latencies)


@contextlib.contextmanager
def serving(factory: type[Protocol], offload: Offload | None) -> Iterator[int]:
    with Server(("127.0.0.1", 0), factory, offload=offload) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    ways: dict[str, tuple[type[Protocol], Offload | None]] = {
        "in the loop": (Inline, None),
        "on threads": (Offloaded, Offload("threads")),
        "on processes": (Offloaded, Offload("processes")),
    }
    spawning = multiprocessing.get_context("spawn")
    print(f"latency of {LIGHT_CLIENTS} light clients, one heavy request after another beside them, ms:")
    for name, (factory, offload) in ways.items():
        with serving(factory, offload) as port:
            ours, theirs = spawning.Pipe(duplex=False)
            clients = spawning.Process(target=measure, args=(port, seconds, theirs))
            clients.start()
            latencies = sorted(1000 * latency for latency in ours.recv())
            clients.join()
            ours.close()
            theirs.close()
        middle, high = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
        print(f"{name:14} median {middle:7.2f}   99 % {high:7.2f}   most {latencies[-1]:7.2f}   ({len(latencies):,})")


if __name__ == "__main__":
    main()
