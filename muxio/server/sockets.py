"""From addresses to sockets, and how one is closed the hard way."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
from typing import Any

#: (host, port); the path of a Unix socket, with a NUL in front for Linux's abstract ones; or, for servers, a stream
#: socket that is bound or listens already: one that was inherited, for example.
Address = tuple[str, int] | str | socket.socket

#: SO_LINGER on, with no time to linger: close() sends RST.
_NO_TIME_TO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)

#: Whether listeners of one port get a share of its peers each. Elsewhere SO_REUSEPORT either is missing, or gives all
#: to the latest (socket(7) of Linux 3.9; FreeBSD has SO_REUSEPORT_LB for it, which Python does not name).
PORTS_BALANCE = sys.platform == "linux"


def resolve(address: Address, flags: int = 0) -> list[Any]:
    """What an address stands for, as getaddrinfo() lists it; `flags` are its own too.

    OSError (socket.gaierror): the name is unknown. ValueError: there is no such port.
    TypeError: a socket is only an address to listen on.
    Numeric addresses never block; looking a name up may.
    """
    if isinstance(address, socket.socket):
        raise TypeError(f"an address to connect to is (host, port) or a path, not {address!r}")
    if isinstance(address, str):
        if sys.platform == "win32":
            raise OSError(errno.EAFNOSUPPORT, "Python has no Unix sockets on Windows", address)
        return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", address)]
    host, port = address
    if not 0 <= port <= 65_535:
        raise ValueError(f"a port is a number from 0 to 65535, not {port}")
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)


def listen(address: Address, backlog: int) -> socket.socket:
    """A non-blocking listener. A socket that is given is taken over: made to listen, if it does not.

    The file of a Unix socket that nobody listens on any more is replaced.

    OSError: the address is taken or does not exist. ValueError: there is no such port, or the socket is no stream.
    """
    if isinstance(address, socket.socket):
        listener = address
        if listener.type != socket.SOCK_STREAM:
            raise ValueError(f"only a stream socket can be listened on, not {listener!r}")
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.listen(backlog)
    else:
        family, _, _, _, where = resolve(address, socket.AI_PASSIVE)[0]
        if isinstance(where, str):
            _remove_stale(where)
        listener = _bound(where, family, backlog)
    listener.setblocking(False)
    return listener


def _bound(where: Any, family: int, backlog: int) -> socket.socket:
    """socket.create_server(); on Windows with SO_EXCLUSIVEADDRUSE.

    Without it, a socket of any program that sets SO_REUSEADDR can be bound to the port as well, and takes its peers
    (Microsoft, "Using SO_REUSEADDR and SO_EXCLUSIVEADDRUSE").
    """
    if sys.platform != "win32":
        return socket.create_server(where, family=family, backlog=backlog)
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        listener.bind(where)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def listen_each(address: Address, backlog: int, count: int) -> list[socket.socket]:
    """Listeners for so many processes: one each where the kernel shares peers out among them, else one for all.

    OSError, ValueError: as `listen` has them; an address is taken also if it is so with SO_REUSEPORT.
    """
    first = listen(address, backlog)
    if not PORTS_BALANCE or not isinstance(address, tuple) or count == 1:
        return [first]
    # Now that it is known to be free. All that share a port must have said so before they were bound (socket(7)).
    where, family = first.getsockname(), first.family
    first.close()
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            listeners.append(socket.create_server(where, family=family, backlog=backlog, reuse_port=True))
            listeners[-1].setblocking(False)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def inherited(fd: int) -> socket.socket:
    """The listening socket that was handed to this process under a number. It is not handed on.

    OSError: EBADF or ENOTSOCK, there is no such descriptor, or it is no socket.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OverflowError:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
    sock.set_inheritable(False)
    return sock


#: The path of a socket's file, and what makes it this one. Its inode alone would not: that is soon used again.
SocketFile = tuple[str, int, int]


def file_of(address: Address) -> SocketFile | None:
    """The file that `listen` has just made for an address; None if it needed none."""
    try:
        found = os.stat(address) if isinstance(address, str) else None
    except (OSError, ValueError):  # gone already; an abstract name
        return None
    return None if found is None else (str(address), found.st_ino, found.st_mtime_ns)


def remove_file(file: SocketFile | None) -> None:
    """Remove what `file_of` told of, unless it is somebody else's by now."""
    if file is not None:
        path, *mine = file
        try:
            found = os.stat(path)
            if [found.st_ino, found.st_mtime_ns] == mine:
                os.unlink(path)
        except OSError:
            pass  # gone, or not ours to remove


def reset_on_close(sock: socket.socket) -> None:
    """Let the close of a socket send RST, and throw away what is still to be sent."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_TIME_TO_LINGER)
    except OSError:
        pass  # the peer has reset it already (macOS)


def _remove_stale(path: str) -> None:
    """Remove a Unix socket that a server left behind: connecting to it is refused (unix(7))."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except (OSError, ValueError):  # there is none; an abstract name
        return
    if sys.platform != "win32":
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)
