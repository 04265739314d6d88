"""Signals of a program whose main thread runs a loop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

#: What asks a program to stop, as far as the system has them: Ctrl-C, a service manager, Windows' Ctrl-Break.
STOP = tuple(number for name in ("SIGINT", "SIGTERM", "SIGBREAK") if (number := getattr(signal, name, None)))
#: What asks it for something else; not on Windows.
RELOAD: int | None = getattr(signal, "SIGHUP", None)
STATISTICS: int | None = getattr(signal, "SIGUSR1", None)


@contextlib.contextmanager
def handled(handlers: Mapping[int | None, Callable[[], object] | None], wakeup_fd: int) -> Iterator[None]:
    """Handle signals until the end of the block, then put back what was there. Only in the main thread.

    handlers: number of a signal -> what to call, between two bytecodes of the main thread; or None: ignore it.
    wakeup_fd: where a byte wakes the loop (`Loop.wakeup_fd`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def installed(call: Callable[[], object] | None) -> Callable[[int, object], object] | signal.Handlers:
        return signal.SIG_IGN if call is None else lambda number, frame: call()

    before = signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    old = {number: signal.signal(number, installed(call)) for number, call in handlers.items() if number is not None}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
        signal.set_wakeup_fd(before)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block: for a child that inherits that, until it is ready to ignore it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_interrupts() -> None:
    """In the child: take Ctrl-C again."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
