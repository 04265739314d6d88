"""Accepting: in batches, not over what is allowed, and whatever accept() has to say."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from muxio.events import EXCLUSIVE, READ
from muxio.server.sockets import reset_on_close

if TYPE_CHECKING:
    from muxio.server.loop import Handle, Loop

logger = logging.getLogger("muxio.server")

#: How many peers one readiness of the listener accepts: one at a time starves clients in a connect storm, all of them
#: would starve the connections that stand.
ACCEPT_BATCH = 64

#: Out of descriptors (of the process, of the system), of buffers or of memory, or the listener itself is no good (shut
#: down by somebody who shares it): this lasts, and would be reported without end, so accepting rests a while. Every
#: other error of accept(2) is that one peer's.
_LASTING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL, errno.EBADF, errno.ENOTSOCK}
ACCEPT_REST = 0.1  #: seconds

#: How many seconds peers wait while the process has no descriptor left, before they are turned away: refused is better
#: than never answered, and waiting better than refused.
PATIENCE = 1.0


class Listener:
    """Accepts peers on a listening socket, which it owns from now on.

    welcome: called with each accepted, non-blocking socket and its peer's address. An exception is logged, and costs
    that peer its connection.
    full: asked before each accept; while it says yes the listener rests, until `resume`.
    shared: others accept on the same socket, each in a loop of its own; one peer should not wake them all.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        welcome: Callable[[socket.socket, Any], object],
        full: Callable[[], object],
        shared: bool = False,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._welcome = welcome
        self._full = full
        #: What ends a rest.
        self._rest: Handle | None = None
        self._closed = False
        #: A descriptor kept back, for turning peers away when there are no others.
        self._reserve: int | None = None
        self._keep_reserve()
        #: Since when accept() has failed for want of something.
        self._exhausted_since: float | None = None
        #: How many peers were turned away for want of descriptors.
        self.turned_away = 0
        #: An EXCLUSIVE registration cannot be modified: who rests is not registered.
        self._interest = READ | EXCLUSIVE if shared and loop.poller.supports(READ | EXCLUSIVE) else READ
        loop.poller.register(sock, self._interest, self)

    def ready(self, events: int) -> None:
        """Peers wait: accept some of them."""
        for _ in range(ACCEPT_BATCH):
            if self._full():
                self._pause()
                return
            if not self._accept():
                return
        if self._full():  # now, not when it is woken for a peer: of those that share the socket, only it would be
            self._pause()

    def failed(self, error: Exception) -> None:
        """What `ready` raised, which it does not expect to."""
        logger.error("accepting failed", exc_info=error)

    def resume(self) -> None:
        """Accept again, if it rested and there is room."""
        if self._rest is not None and not self._full():
            self._rest.cancel()
            self._rest = None
            self._loop.poller.register(self._sock, self._interest, self)

    def close(self, take: int) -> None:
        """Listen no more; the kernel resets those who wait. Up to `take` of them are accepted before."""
        if not self._closed:
            while take > 0 and self._accept():
                take -= 1
            self._closed = True
            if self._rest is not None:
                self._rest.cancel()
                self._rest = None
            else:
                self._loop.poller.unregister(self._sock)
            self._sock.close()
            self._give_up_reserve()

    def _accept(self) -> bool:
        """Accept one peer. Whether there may be more."""
        try:
            sock, peername = self._sock.accept()
        except BlockingIOError:
            self._exhausted_since = None
            return False
        except OSError as error:
            if error.errno in _LASTING:
                self._run_out(error)
                return False
            return True
        self._exhausted_since = None
        try:
            sock.setblocking(False)
            self._welcome(sock, peername)
        except Exception as error:
            sock.close()
            logger.error("cannot serve a connection", exc_info=error)
        return True

    def _pause(self) -> None:
        """Rest: leave those who wait in the backlog. Somebody calls `resume`, or there is room after a while."""
        if self._rest is None:
            self._loop.poller.unregister(self._sock)
        else:
            self._rest.cancel()
        self._rest = self._loop.call_later(ACCEPT_REST, self._look)

    def _look(self) -> None:
        if self._full():
            self._pause()
        else:
            self.resume()

    def _run_out(self, error: OSError) -> None:
        now = self._loop.time()
        if self._exhausted_since is None:
            self._exhausted_since = now
            logger.warning("accepting rests: %s", error)
        elif error.errno == errno.EMFILE and now - self._exhausted_since >= PATIENCE:
            self._turn_away()
        self._pause()

    def _turn_away(self) -> None:
        """Accept those who wait into the place of the descriptor kept back, and reset them."""
        for _ in range(ACCEPT_BATCH):
            self._give_up_reserve()
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            else:
                self.turned_away += 1  # before the peer can know
                reset_on_close(sock)
                sock.close()
            finally:
                self._keep_reserve()

    def _give_up_reserve(self) -> None:
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    def _keep_reserve(self) -> None:
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            pass  # somebody else was quicker; the next time
