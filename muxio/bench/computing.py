"""What `muxio bench offload` measures: ``python -m muxio.bench.computing serve WAY``, and ``ask PORT``.

The server echoes, and computes for who asks it to: in its loop, on threads or on processes. Its client asks for one
such computation after another, until it is killed, and says of each how many seconds it took.
"""

from __future__ import annotations

import socket
import sys
import time

from muxio.server import Job, Offload, Protocol, serve

BURN = 0.2  #: seconds of CPU that a heavy request takes
PATIENCE = 60.0  #: seconds for an answer

#: What asks for it; no echo begins so.
HEAVY = b"\xffcompute\n"

WAYS: dict[str, Offload | None] = {
    "inline": None,
    "threads": Offload("threads"),
    "processes": Offload("processes"),
}


def burn() -> int:
    """Compute for so long, in Python: with the GIL, where there is one."""
    end = time.thread_time() + BURN
    turns = 0
    while time.thread_time() < end:
        turns += sum(range(1000)) > 0
    return turns


class Inline(Protocol):
    def data_received(self, data: bytes) -> None:
        if data == HEAVY:
            burn()
        self.transport.write(data)


class Offloaded(Protocol):
    def data_received(self, data: bytes) -> None:
        if data == HEAVY:
            self.transport.offload(burn).add_done_callback(self.answer)
        else:
            self.transport.write(data)

    def answer(self, job: Job) -> None:
        job.result()
        self.transport.write(HEAVY)


def ask(port: int) -> None:
    """ConnectionError: the server does not answer what it should."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock, sock.makefile("rb") as stream:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            start = time.monotonic()
            sock.sendall(HEAVY)
            if stream.read(len(HEAVY)) != HEAVY:
                raise ConnectionError("a heavy request was not answered")
            print(time.monotonic() - start, flush=True)


def main() -> None:
    task, what = sys.argv[1:]
    if task == "ask":
        ask(int(what))
    else:
        offload = WAYS[what]
        serve(("127.0.0.1", 0), Offloaded if offload else Inline, offload=offload, quiet=True)


if __name__ == "__main__":
    main()
