"""From addresses to sockets, and how one is closed the hard way."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Any

#: (host, port), or the path of a Unix socket.
Address = tuple[str, int] | str

#: SO_LINGER on, with no time to linger: close() sends RST.
_NO_TIME_TO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


def resolve(address: Address, flags: int = 0) -> list[Any]:
    """What an address stands for, as getaddrinfo() lists it; `flags` are its own too.

    OSError (socket.gaierror): the name is unknown. ValueError: there is no such port.
    Numeric addresses never block; looking a name up may.
    """
    if isinstance(address, str):
        if sys.platform == "win32":
            raise OSError(errno.EAFNOSUPPORT, "Python has no Unix sockets on Windows", address)
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", address)]
    host, port = address
    if not 0 <= port <= 65_535:
        raise ValueError(f"a port is a number from 0 to 65535, not {port}")
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)


def listen(address: Address, backlog: int) -> socket.socket:
    """A non-blocking listener. OSError: the address is taken or does not exist. ValueError: there is no such port."""
    family, _, _, _, where = resolve(address, socket.AI_PASSIVE)[0]
    listener = socket.create_server(where, family=family, backlog=backlog)
    listener.setblocking(False)
    return listener


def reset_on_close(sock: socket.socket) -> None:
    """Let the close of a socket send RST, and throw away what is still to be sent."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_TIME_TO_LINGER)
    except OSError:
        pass  # the peer has reset it already (macOS)
