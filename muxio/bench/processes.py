"""Processes of a benchmark: compiled, started, pinned to a core, looked at from outside, and ended."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from muxio.bench.measure import Failure

HERE = Path(__file__).parent

COMPILERS = (os.environ.get("CC") or "cc", "gcc", "clang")

LAST_WORDS = 0.5  #: seconds for a program that failed to end by itself, and say why
ORDERLY = 10.0  #: seconds for a program that is told to end

#: A server's first line; those of several processes name them.
LISTENS = re.compile(r"listening on 127\.0\.0\.1:(\d+)(?: \(.* workers?: (\d+(?:, \d+)*))?")


class Cores(NamedTuple):
    """Where the processes run; None: wherever the system likes."""

    server: int | None
    client: int | None


def cores() -> Cores:
    """A core for the server and another for its clients, if there are two and processes can be pinned."""
    if sys.platform == "linux":
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) > 1:
            return Cores(allowed[-1], allowed[0])  # the first one also has the interrupts, as a rule
    return Cores(None, None)


def compiler() -> str | None:
    """The C compiler, for programs that use epoll; None if there is none, or no epoll."""
    if sys.platform != "linux":
        return None
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def build(compiler: str, source: str, directory: str) -> str:
    """Compile a source of this package into a program, and return its path. Failure: the compiler refuses."""
    program = os.path.join(directory, Path(source).stem)
    command = [compiler, "-O2", "-o", program, str(HERE / source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise Failure(f"{compiler} does not run: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        raise Failure(f"{compiler} cannot compile {source}: {lines[0] if lines else done.returncode}")
    return program


@contextmanager
def running(command: Sequence[str], core: int | None) -> Iterator[subprocess.Popen[str]]:
    """Run a program until the end of the block, with pipes for stdin and stdout. What it says on stderr is not shown.

    It is told to end, so that it can end what it has started itself; then it is killed.

    Failure: what the block raised as such, with the last line that the program said on stderr.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path])}
    environment.pop("MUXIO_BACKEND", None)  # what is measured is named on the command line
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is for the benchmark alone, which then ends this one
        )
        try:
            if core is not None and sys.platform == "linux":
                os.sched_setaffinity(process.pid, {core})
            yield process
        except Failure as failure:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            stderr.seek(0)
            last = stderr.read().strip().rpartition("\n")[2]
            raise Failure(f"{failure} ({last})" if last else str(failure)) from None
        finally:
            try:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=ORDERLY)
            finally:
                process.kill()
                process.communicate()


def where(server: subprocess.Popen[str]) -> tuple[int, list[int]]:
    """The port on which a server says that it listens, in its first line, and the processes that serve. Failure: it
    does not."""
    assert server.stdout is not None
    line = server.stdout.readline()
    found = LISTENS.search(line)
    if not found:
        raise Failure("the server did not start")
    return int(found[1]), [int(pid) for pid in found[2].split(", ")] if found[2] else [server.pid]


def cpu_clock(pid: int = 0) -> int:
    """The number of a process' CPU clock, for `time.clock_gettime`; 0 where there is none (macOS, Windows).

    pid: the process; 0 is this one.
    """
    try:
        get = ctypes.CDLL(None).clock_getcpuclockid
    except (AttributeError, TypeError, OSError):
        return 0
    clock = ctypes.c_int()
    return 0 if get(pid, ctypes.byref(clock)) else clock.value


def machine_time() -> tuple[float, float] | None:
    """The time that all cores together have been busy, and that they have been idle, since some moment, in one unit;
    None if the system does not tell (proc_stat(5) does).

    Where softirqs are counted apart, the kernel's work for the network is in there, and in no process' CPU time.
    """
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return None
    user, nice, system, idle, waiting, *others = map(float, line.split()[1:9])
    return user + nice + system + sum(others), idle + waiting


def can_tell_memory() -> bool:
    return os.path.exists("/proc/self/smaps_rollup")


def private_memory(*pids: int) -> int:
    """How many bytes of memory processes have for themselves alone: Private_* of proc_pid_smaps_rollup(5)."""
    files = (Path(f"/proc/{pid}/smaps_rollup") for pid in pids)
    lines = [line for file in files for line in file.read_text(encoding="ascii", errors="replace").splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def module(name: str) -> list[str]:
    """The command that runs a Python module."""
    return [sys.executable, "-m", name]
