"""The poller as a guest in somebody else's program: a subprocess's output, a socket, and a wake-up from a thread.

Run it: ``python examples/guest_poller.py``. (Not on Windows: its facilities watch sockets only, not pipes.)
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading

import muxio
from muxio import READ


def main() -> None:
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    child = subprocess.Popen([sys.executable, "-c", "print('hello from the child')"], stdout=subprocess.PIPE)
    ours, theirs = socket.socketpair()
    poller: muxio.Poller[str] = muxio.Poller()

    def compute() -> None:
        results.put(sum(range(1_000_000)))
        poller.wake()  # a queue has no descriptor to watch, so tell the poller

    worker = threading.Thread(target=compute)
    with poller, child, ours, theirs:
        assert child.stdout is not None
        poller.register(child.stdout, READ, key="child")
        poller.register(ours, READ, key="socket")
        theirs.sendall(b"hello from the socket")
        worker.start()
        awaited = {"child", "socket", "thread"}
        while awaited:
            for key, events in poller.poll(timeout=10.0):
                if key == "child" and events:
                    print(f"child:  {os.read(child.stdout.fileno(), 100).decode().strip()}")
                    poller.unregister(child.stdout)
                elif key == "socket" and events:
                    print(f"socket: {ours.recv(100).decode()}")
                    poller.unregister(ours)
                awaited.discard(key)
            while not results.empty():  # poll() has returned: perhaps for a wake-up
                print(f"thread: the sum is {results.get():,}")
                awaited.discard("thread")
        worker.join()


if __name__ == "__main__":
    main()
