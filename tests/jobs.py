"""What tests offload: functions of a module, so that processes can be told of them."""

from __future__ import annotations

import os
import sys
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


class LoadsOnlyIn:
    """What can be pickled, but be made again in one process only."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __reduce__(self) -> tuple[Any, ...]:
        return load_only_in, (self.pid,)


def load_only_in(pid: int) -> LoadsOnlyIn:
    if os.getpid() != pid:
        raise LookupError(pid)
    return LoadsOnlyIn(pid)


def result_that_loads_only_here() -> LoadsOnlyIn:
    return LoadsOnlyIn(os.getpid())


def leave() -> None:
    sys.exit("the whole program, one would think")


def keep_the_gil(path: str) -> int:
    """Leave a file with our process id, and compute in C for minutes: no other thread of this process runs."""
    Path(path).write_text(str(os.getpid()), encoding="ascii")
    return sum(range(10**10))


def die_while_answering() -> bytes:
    """Crash when a part of the result is on its way."""
    main = threading.get_ident()
    sending = "_send_bytes" if sys.platform == "win32" else "_send"  # what multiprocessing calls it

    def watch() -> None:
        while sys._current_frames()[main].f_code.co_name != sending:
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    return bytes(200_000_000)
