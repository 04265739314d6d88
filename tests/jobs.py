"""What tests offload: functions of a module, so that processes can be told of them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any


def double(number: int) -> int:
    return 2 * number


def wait_for(path: str, value: Any = None, timeout: float = 30.0) -> Any:
    """Work that lasts until a file is there."""
    deadline = time.monotonic() + timeout
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.001)
    return value


def note(path: str) -> None:
    """Leave a file that says that this ran."""
    Path(path).touch()


def fail(text: str) -> None:
    raise LookupError(text)


def die() -> None:
    """What a crash of an extension module is like."""
    os._exit(3)


def own_pid() -> int:
    return os.getpid()


def sockets_of_this_process() -> list[str]:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith("socket:")]


def thread_name() -> str:
    return threading.current_thread().name


def not_picklable() -> Any:
    return threading.Lock()


class Unloadable(Exception):
    """An exception that can be pickled, but not be made again from that."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def fail_unloadably() -> None:
    raise Unloadable("one", "two")
