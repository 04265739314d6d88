"""What a service manager and a service tell each other: sockets on the way in, the state on the way out.

Both are plain conventions of environment variables (sd_listen_fds(3), sd_notify(3)), which others than systemd follow
too. Without the variables everything in here does nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import MutableMapping

#: The number of the first descriptor handed over: SD_LISTEN_FDS_START.
_FIRST = 3


def listen_fds(environment: MutableMapping[str, str] = os.environ) -> dict[int, str]:
    """The descriptors that were handed to this process, with the names that the manager gave them.

    The variables are removed, so that no child takes them for its own.

    ValueError: they make no sense.
    """
    pid, count, names = (environment.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()):  # meant for somebody else, who has not removed them
        return {}
    if not count.isdecimal():
        raise ValueError(f"LISTEN_FDS is not a number: {count!r}")
    named = [*names.split(":"), *[""] * int(count)]
    return {_FIRST + place: named[place] for place in range(int(count))}


class Notifier:
    """Tells the service manager how this process is doing, if there is one: ``Type=notify`` in a systemd unit.

    The variable is removed from the environment: children speak for themselves, and not here.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        name = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name

    def ready(self, status: str) -> None:
        """It serves, for the first time or again; `status` is a line for people."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """It is about to replace its workers; `ready` says when that is over."""
        # CLOCK_MONOTONIC, which this is on Linux, is what Type=notify-reload waits for.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """It stops."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if self._address and sys.platform != "win32":
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.setblocking(False)  # a manager that does not read must not hold up the service
                    sock.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass  # nobody listens (any more): serving matters more
