"""A thread-per-connection server with blocking sockets: the oracle that the event-driven server is judged by.

It is meant to be so plain that it is right at sight: a thread, a socket, ``recv`` and ``sendall``. It shares no code
with what it judges, so that it shares no bug with it: no poller of this package and no protocol, only the form of the
report.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, final

from muxio.server.report import ConnectionReport, format_address

__all__ = ["Connection", "ThreadedServer", "echo"]

logger = logging.getLogger("muxio.server")

RECEIVE_SIZE = 64 * 1024
"""Bytes that one recv() asks for."""

BACK_OFF = 0.1
"""Seconds without accepting after the process or the system ran out of descriptors or memory."""

#: For ever; on Windows a number of seconds that is as good as that (see `Connection.interrupt`).
_TIMEOUT = 2e6 if sys.platform == "win32" else None

# accept(2): these say something about us, and come again at once. EMFILE and ENFILE end when a connection is closed.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# These say that the listener itself is no good. All the others, ECONNABORTED, EPERM (a firewall), EPROTO and the errors
# of the network that Linux passes on from the new socket, are one peer's problem.
_BROKEN = {errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EOPNOTSUPP}


class Connection:
    """What a handler gets: a blocking socket that counts its bytes. (On Windows it has a time-out, of weeks.)

    ``socket`` is the socket itself, for options; what is received or sent on it directly is not counted. ``peer`` is
    the address that accept() gave.
    """

    def __init__(self, sock: socket.socket, peer: Any) -> None:
        self.socket = sock
        self.peer = peer
        self.bytes_in = 0
        self.bytes_out = 0
        # Without it, interrupt() could hit a socket that took the number of this one just after it was closed.
        self._closing = threading.Lock()
        self._ended = False  # on Windows: an error of recv() is the end that interrupt() has made

    def recv(self, size: int = RECEIVE_SIZE) -> bytes:
        """Wait for data and return at most `size` bytes of it, or ``b""`` when the peer has shut its write side.

        Raises OSError as ``socket.recv()`` does, ConnectionResetError above all.
        """
        try:
            data = self.socket.recv(size)
        except OSError:
            if not self._ended:
                raise
            return b""
        self.bytes_in += len(data)
        return data

    def sendall(self, data: bytes) -> None:
        """Send all of `data`, waiting as long as the peer takes. Raises OSError when the connection is gone."""
        # Not socket.sendall(): it does not tell how much went out before an error.
        view = memoryview(data)
        while view:
            sent = self.socket.send(view)
            self.bytes_out += sent
            view = view[sent:]

    def interrupt(self) -> None:
        """Wake the thread that waits in recv() or sendall(): the one sees the end, the other an error. Never raises.

        On Windows only closing the socket wakes them (cpython#91913), and what recv() gets there is an error. A send()
        may go on even then [Wine 8.0], so both wait in select(), as Python has it do where there is a timeout.
        """
        with self._closing:
            self._ended = sys.platform == "win32"
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            if sys.platform == "win32":
                self.socket.close()

    def close(self) -> None:
        """Close the socket. What was sent still arrives, as long as everything that came in was received."""
        with self._closing:
            self.socket.close()


def echo(connection: Connection) -> None:
    """Send back whatever comes, until the peer has shut its write side. The server's close() then is our own EOF."""
    while data := connection.recv():
        connection.sendall(data)


@final
class ThreadedServer:
    """Serve every connection with a blocking function in a thread of its own.

    Parameters:

    - `address`: ``(host, port)`` for IPv4 and IPv6, port 0 for any free one; the path of a Unix socket (not on
      Windows), whose file stays behind, as socketserver leaves it; or a listening stream socket, which belongs to the
      server from now on.
    - `handler`: called with a `Connection` in the connection's thread; the connection ends when it returns. An OSError
      that it lets through is an ordinary end, for the report to tell. Any other exception is logged to the logger
      ``muxio.server`` as well. Both end this connection only.
    - `backlog`: how many connections may wait to be accepted; the system may allow fewer.
    - `report`: called with a `ConnectionReport` in the connection's thread when the connection has ended.

    Raises OSError when the address cannot be listened on. A server serves once, and has to be closed::

        with ThreadedServer(("127.0.0.1", 0)) as server:
            threading.Thread(target=server.serve_forever).start()
            ...                                               # leaving the block shuts down and closes
    """

    def __init__(
        self,
        address: tuple[str, int] | str | socket.socket,
        handler: Callable[[Connection], object] = echo,
        *,
        backlog: int = 1024,
        report: Callable[[ConnectionReport], object] | None = None,
    ) -> None:
        self._handler = handler
        self._report = report
        self._listener = _listen(address, backlog)
        try:
            self._listener.setblocking(False)
            self._wake, self._waker = socket.socketpair()
            self._waker.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        self.server_address: Any = self._listener.getsockname()
        """The address listened on, as ``getsockname()`` gives it: with the real port where 0 was asked for."""
        self._started = False
        self._stopping = False
        # Held while serving, so that shutdown() can wait for it. Re-entrant: shutdown() then passes when it is called
        # from the serving thread, from a signal handler in it, or from one that interrupted a shutdown().
        self._serving = threading.RLock()
        self._connections: dict[threading.Thread, Connection] = {}  # touched by the serving thread alone ...
        self._ended: deque[threading.Thread] = deque()  # ... which learns here whose thread is through

    def serve_forever(self) -> None:
        """Accept and serve until `shutdown`, then wake every connection's thread and wait for its end.

        Returns at once after an early `shutdown` or `close`. Raises RuntimeError when called a second time, and the
        OSError of accept() if it is the listener's own.
        """
        if self._started:
            raise RuntimeError("a ThreadedServer serves once")
        self._started = True
        with self._serving:
            try:
                if not self._stopping:
                    self._serve()
            finally:
                self._listener.close()
                for connection in self._connections.values():
                    connection.interrupt()
                for thread in self._connections:
                    thread.join()
                self._wake.close()

    def shutdown(self) -> None:
        """Stop accepting, end all connections, and wait until `serve_forever` has returned.

        From any thread, at any time, any number of times, and from a signal handler. It does not wait where that would
        be for ever: in the thread that serves, and in the thread of a connection. Before `serve_forever` it makes that
        return at once. Peers see EOF, or a reset if they had sent what was not received yet.
        """
        self._stopping = True
        with contextlib.suppress(OSError):  # closed, or full of wake-ups: one of them is enough
            self._waker.send(b"\0")
        if threading.current_thread() not in self._connections:
            with self._serving:
                pass

    def wakeup_fd(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd``, for those who end the server from a signal handler.

        Without it the handler may have to wait: the system gives a signal to any thread, Python runs the handler in the
        main thread, and that wakes up only if the signal came to itself; on Windows not even then.
        """
        return self._waker.fileno()

    def close(self) -> None:
        """Shut down if that has not been done, and close the listener. Harmless when repeated."""
        self.shutdown()
        self._waker.close()  # its EOF wakes as well, should this be the serving thread
        if not self._started:  # else serve_forever() closes what it waits on
            self._listener.close()
            self._wake.close()

    def __enter__(self) -> ThreadedServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _serve(self) -> None:
        # Closing a listener does not wake accept() on every system, hence a selector over it and the wake-up socket.
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while True:
                if any(key.fileobj is self._wake for key, _ in selector.select()):
                    self._wake.recv(4096)
                if self._stopping:
                    return
                while self._ended:
                    thread = self._ended.popleft()
                    thread.join()
                    del self._connections[thread]
                try:
                    self._accept()
                except OSError as error:
                    if error.errno in _BROKEN:
                        raise
                    if error.errno in _EXHAUSTED:
                        # The listener stays ready, so that waiting for it would spin; a wake-up still ends this.
                        selector.unregister(self._listener)
                        selector.select(BACK_OFF)
                        selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        sock, peer = self._listener.accept()
        sock.settimeout(_TIMEOUT)  # BSD and macOS hand the listener's O_NONBLOCK on
        connection = Connection(sock, peer)
        thread = threading.Thread(
            target=self._run, args=(connection,), name=f"connection from {format_address(peer)}", daemon=True
        )
        self._connections[thread] = connection
        try:
            thread.start()
        except RuntimeError as error:
            logger.warning("%s is turned away: %s", format_address(peer), error)
            del self._connections[thread]
            connection.close()

    def _run(self, connection: Connection) -> None:
        began = time.monotonic()
        error: Exception | None = None
        try:
            if connection.socket.family != getattr(socket, "AF_UNIX", None):
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._handler(connection)
        except OSError as exception:
            error = exception
        except Exception as exception:
            error = exception
            logger.exception("the handler of %s failed", format_address(connection.peer))
        finally:
            connection.close()
        try:
            if self._report is not None:
                seconds = time.monotonic() - began
                self._report(
                    ConnectionReport(connection.peer, connection.bytes_in, connection.bytes_out, seconds, error)
                )
        except Exception:
            logger.exception("the report about %s failed", format_address(connection.peer))
        finally:
            self._ended.append(threading.current_thread())


def _listen(address: tuple[str, int] | str | socket.socket, backlog: int) -> socket.socket:
    if isinstance(address, socket.socket):
        return address
    if not isinstance(address, str):
        host, port = address[:2]
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        if sys.platform != "win32":
            return socket.create_server(resolved, family=family, backlog=backlog)
        listener = socket.socket(family)
        try:
            # Else whoever sets SO_REUSEADDR, in any program, can have the port as well.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            listener.bind(resolved)
            listener.listen(backlog)
        except OSError:
            listener.close()
            raise
        return listener
    if sys.platform == "win32":
        raise OSError(errno.EAFNOSUPPORT, "Python has no Unix sockets on Windows", address)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener
