"""The poller alone: two sockets and a pipe, watched together.

Run it: ``python examples/watch_three.py``. (Windows' facilities watch sockets only: there the pipe is left out.)
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

import muxio
from muxio import READ


class Stream(NamedTuple):
    """What poll() is to give back when there is something to read. A key is any object you like."""

    name: str
    source: muxio.Source
    read: Callable[[], bytes]


def main() -> None:
    alice, alices_end = socket.socketpair()
    bob, bobs_end = socket.socketpair()
    streams = [
        Stream("alice", alice, lambda: alice.recv(100)),
        Stream("bob", bob, lambda: bob.recv(100)),
    ]
    alices_end.sendall(b"hello from alice")
    bobs_end.sendall(b"hello from bob")
    alices_end.close()
    bobs_end.close()
    if sys.platform != "win32":
        pipe, pipes_end = os.pipe()
        streams.append(Stream("pipe", pipe, lambda: os.read(pipe, 100)))
        os.write(pipes_end, b"hello from the pipe")
        os.close(pipes_end)

    poller: muxio.Poller[Stream] = muxio.Poller()
    with poller, alice, bob:
        for stream in streams:
            poller.register(stream.source, READ, key=stream)
        while len(poller):
            for stream, events in poller.poll(timeout=5.0):
                data = stream.read()
                print(f"{stream.name:5}  {muxio.describe(events):24}  {data!r}")
                if not data:  # end of file
                    poller.unregister(stream.source)
        print(f"all have ended, on {poller.backend}")
    if sys.platform != "win32":
        os.close(pipe)


if __name__ == "__main__":
    main()
