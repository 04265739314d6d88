"""CPU-bound work, off the loop: to threads or to processes, and the results back to whoever asked.

While a function computes, a loop that called it serves nobody. So a protocol hands it over::

    def data_received(self, data):
        self.transport.offload(is_prime, int(data)).add_done_callback(self.answer)

    def answer(self, job):
        self.transport.write(b"yes" if job.result() else b"no")  # result() raises what the function raised

On threads the function shares the GIL with the loop, where there is one: the loop then waits for its turn, 5 ms at a
time (sys.setswitchinterval). On processes function, arguments and result have to be picklable, and the loop stays as
quick as there are cores for all.
"""

from __future__ import annotations

import enum
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from typing import Protocol as Interface

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

logger = logging.getLogger("muxio.server")


@dataclass(frozen=True)
class Offload:
    """What `Loop.offload` and `Transport.offload` use: a pool of threads, or of processes.

    ValueError: no such kind, or a number that is not 1 or more.
    """

    kind: Literal["threads", "processes"] = "threads"
    """Threads are started when they are needed; processes with the loop, by a fork server or spawned, since a forked
    one would keep the clients' sockets open. A script does that under ``if __name__ == "__main__"``."""
    workers: int | None = None
    """How many of them; None: one for each core that this process may use."""
    per_connection: int = 16
    """From so many jobs on that were not answered yet, a connection is not read from, until half of them are. What
    it had sent before, 64 KiB at most, may be more jobs than that."""
    jobs: int = 1024
    """From so many jobs in all on, a connection that has asked for one is not read from until it is answered."""

    def __post_init__(self) -> None:
        if self.kind not in ("threads", "processes"):
            raise ValueError(f"a pool is of 'threads' or of 'processes', not of {self.kind!r}")
        for name in ("workers", "per_connection", "jobs"):
            number = getattr(self, name)
            if not (number is None and name == "workers") and not number >= 1:
                raise ValueError(f"{name} is a number from 1 on, not {number!r}")


class Owner(Interface):
    """Whom jobs belong to: a connection."""

    def hold(self, behind: bool) -> None:
        """Receive no more while there is more to do than is done."""

    def answered(self) -> None:
        """All its jobs are over, and it knows."""

    def failed(self, error: Exception) -> None:
        """A callback raised."""


class State(enum.Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"  #: it has returned or raised
    CANCELLED = "cancelled"


class Job:
    """One call that was handed over. All methods belong to the loop's thread.

    A job whose connection was lost is cancelled; the protocol hears of that by ``connection_lost`` and by nothing else.
    """

    __slots__ = ("_callbacks", "_error", "_pool", "_result", "_told", "call", "line", "state")

    def __init__(self, pool: Pool, line: Line, call: Callable[[], Any]) -> None:
        self._pool = pool
        self._callbacks: list[Callable[[Job], object]] = []
        self._result: Any = None
        self._error: BaseException | None = None
        self._told = False
        self.line = line
        self.call = call
        self.state = State.WAITING

    def __repr__(self) -> str:
        return f"<Job {self.call!r}: {self.state.value}>"

    def add_done_callback(self, callback: Callable[[Job], object]) -> None:
        """Call a function with this job when it is done, in the order in which the connection's jobs were asked for.

        What it raises ends the connection, as what every callback of a protocol raises does.
        """
        if self._told:
            self._pool.call_soon(self._pool.call_back, self.line.owner, callback, self)
        else:
            self._callbacks.append(callback)

    def result(self) -> Any:
        """What the function returned; or it raises what the function raised.

        concurrent.futures.InvalidStateError: it is not done. BrokenProcessPool (of concurrent.futures.process): a
        process of the pool died meanwhile, of this job or of another.
        """
        error = self.exception()
        if error is not None:
            raise error
        return self._result

    def exception(self) -> BaseException | None:
        """What the function raised, or None. InvalidStateError: it is not done."""
        if self.state is not State.DONE:
            from concurrent.futures import InvalidStateError

            raise InvalidStateError(f"{self!r} has no result")
        return self._error

    def done(self) -> bool:
        """Whether it has a result, or was cancelled."""
        return self.state in (State.DONE, State.CANCELLED)

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.state is State.CANCELLED

    def cancel(self) -> None:
        """Call its callbacks never. If it still waits it will not run, if it runs its result is thrown away.

        Nothing stops a function that runs: until it returns, it has its thread or its process. Once done, or again,
        this does nothing.
        """
        if not self.done():
            self.state = State.CANCELLED
            self._pool.cancelled(self)

    # For the pool

    def finish(self, result: Any, error: BaseException | None) -> None:
        """Take what came of it."""
        self._result, self._error, self.state = result, error, State.DONE

    def take_callbacks(self) -> list[Callable[[Job], object]]:
        """Whom to tell; from now on nobody waits to be."""
        self._told = True
        callbacks, self._callbacks = self._callbacks, []
        return callbacks


class Line:
    """The jobs of one owner; or one job, of nobody's."""

    __slots__ = ("answers", "owner", "waiting")

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        #: Those that are to be told of, in the order of asking.
        self.answers: deque[Job] = deque()
        #: Those of them that have not been given to the executor.
        self.waiting: deque[Job] = deque()


class Pool:
    """Hands jobs to an executor, a few at a time, and tells of them.

    call_soon: how another thread lets the loop call something (`Loop.call_soon_threadsafe`).

    The executor gets one job more than it has workers, from each line in turn: who asks for ten thousand does not keep
    others waiting, what waits is cancelled at once, and a pool that dies takes no more than those few with it.
    """

    def __init__(self, settings: Offload | None, call_soon: Callable[..., object]) -> None:
        self._settings = settings or Offload()
        self.call_soon = call_soon
        #: Jobs that are not over.
        self.jobs = 0
        self._workers = self._settings.workers or _cores()
        self._executor: _Executor | None = None
        self._at_work = 0  # jobs that the executor has
        self._lines: dict[Owner, Line] = {}
        self._turns: deque[Line] = deque()  # lines in which jobs wait
        self._closed = False
        if self._settings.kind == "processes":
            self._open().warm_up()  # starting processes holds up a loop: before it runs

    def submit(self, owner: Owner | None, call: Callable[[], Any]) -> Job:
        """Take a job of an owner, or of nobody. RuntimeError: the pool was closed."""
        if self._closed:
            raise RuntimeError("the loop was closed: it offloads nothing any more")
        line = Line(None) if owner is None else self._lines.setdefault(owner, Line(owner))
        job = Job(self, line, call)
        line.answers.append(job)
        line.waiting.append(job)
        if len(line.waiting) == 1:
            self._turns.append(line)
        self.jobs += 1
        self._feed()
        self._press(line)
        return job

    def refuse(self, call: Callable[[], Any]) -> Job:
        """A job whose owner is about to end, so that nobody wants its answer: it is cancelled."""
        job = Job(self, Line(None), call)
        job.state = State.CANCELLED
        return job

    def drop(self, owner: Owner) -> None:
        """The owner is gone: cancel all that is its."""
        line = self._lines.pop(owner, None)
        if line is not None:
            self._drop(line)

    def cancelled(self, job: Job) -> None:
        """A job was cancelled: it makes room, and who waited behind it may be told."""
        if not self._closed:
            self.call_soon(self._tell, job.line)

    def close(self) -> None:
        """Cancel everything, and give threads and processes back.

        Waits for functions that run in threads; those in processes are ended with them.
        """
        self._closed = True
        for line in [*self._lines.values(), *self._turns]:
            self._drop(line)
        self._lines.clear()
        self._turns.clear()
        if self._executor is not None:
            self._executor.close(self._at_work > 0)
            self._executor = None

    def call_back(self, owner: Owner | None, callback: Callable[[Job], object], job: Job) -> None:
        """Call one callback."""
        try:
            callback(job)
        except Exception as error:
            if owner is None:
                logger.exception("exception in a callback of %r: %r", job, callback)
            else:
                owner.failed(error)

    # Inside

    def _drop(self, line: Line) -> None:
        self.jobs -= len(line.answers)
        for job in line.answers:
            if not job.done():
                job.state = State.CANCELLED
        line.answers.clear()
        line.waiting.clear()

    def _open(self) -> _Executor:
        if self._executor is None:
            self._executor = _EXECUTORS[self._settings.kind](self._workers)
        return self._executor

    def _feed(self) -> None:
        """Give the executor as many jobs as it should have."""
        while self._turns and self._at_work <= self._workers and not self._closed:
            line = self._turns.popleft()
            if line.waiting:  # else its owner is gone
                job = line.waiting.popleft()
                if line.waiting:
                    self._turns.append(line)
                if job.state is State.WAITING:
                    self._run(job)

    def _run(self, job: Job) -> None:
        try:
            executor = self._open()
            try:
                future = executor.pool.submit(job.call)
            except RuntimeError:  # it broke, and nobody has been told yet
                self._bury(executor)
                executor = self._open()
                future = executor.pool.submit(job.call)
        except Exception as error:  # no descriptors or no memory for a pool: that is this job's answer
            job.finish(None, error)
            self.call_soon(self._tell, job.line)
            return
        job.state = State.RUNNING
        self._at_work += 1
        future.add_done_callback(partial(self._came, job, executor))

    def _came(self, job: Job, executor: _Executor, future: Future[Any]) -> None:
        """Called by the executor's thread."""
        try:
            self.call_soon(self._finished, job, executor, future)
        except RuntimeError:
            pass  # the loop is closed, and nobody waits

    def _finished(self, job: Job, executor: _Executor, future: Future[Any]) -> None:
        self._at_work -= 1
        if self._closed:
            return
        error = future.exception()
        if executor.is_broken_by(error):
            self._bury(executor)
        if job.state is State.RUNNING:
            job.finish(future.result() if error is None else None, error)
        self._feed()
        self._tell(job.line)

    def _bury(self, executor: _Executor) -> None:
        """A process of it has died, and the executor with it: who still waits gets a new one."""
        if self._executor is executor:
            self._executor = None
            executor.close(True)

    def _tell(self, line: Line) -> None:
        """Tell of all jobs at the head of a line that are over."""
        if not line.answers:
            return
        while line.answers and line.answers[0].done():
            job = line.answers.popleft()
            self.jobs -= 1
            if not job.cancelled():
                for callback in job.take_callbacks():
                    if not job.cancelled():
                        self.call_back(line.owner, callback, job)
        if line.owner is None or self._lines.get(line.owner) is not line:
            return
        if line.answers:
            self._press(line)
        else:
            del self._lines[line.owner]
            line.owner.answered()

    def _press(self, line: Line) -> None:
        """Let an owner who is far ahead of the pool wait."""
        if line.owner is not None:
            most, count = self._settings.per_connection, len(line.answers)
            if count >= most or self.jobs >= self._settings.jobs:
                line.owner.hold(True)
            elif count <= most // 2:
                line.owner.hold(False)


class _Executor(Interface):
    """One of concurrent.futures' executors, and how it comes and goes."""

    pool: Executor

    def __init__(self, workers: int) -> None: ...

    def warm_up(self) -> None: ...

    def is_broken_by(self, error: BaseException | None) -> bool: ...

    def close(self, busy: bool) -> None: ...


class _Threads:
    def __init__(self, workers: int) -> None:
        from concurrent.futures.thread import ThreadPoolExecutor

        self.pool: Executor = ThreadPoolExecutor(workers, thread_name_prefix="muxio offload")

    def warm_up(self) -> None:
        pass

    def is_broken_by(self, error: BaseException | None) -> bool:
        return False

    def close(self, busy: bool) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


class _Processes:
    """Processes that end with us: each waits for the end of a pipe whose other end nobody has but this process."""

    def __init__(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

        # The fork server forks from a process that has no sockets, and no threads. Apple's libraries do not like forks.
        servable = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        context = multiprocessing.get_context("forkserver" if servable else "spawn")
        self._broken = BrokenProcessPool
        self._workers = workers
        lifeline: tuple[Any, Any] = context.Pipe(duplex=False)
        self._theirs, self._ours = lifeline
        self.pool: Executor = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(self._theirs,)
        )

    def warm_up(self) -> None:
        """Start all of them."""
        for _ in range(self._workers):
            self.pool.submit(os.getpid)

    def is_broken_by(self, error: BaseException | None) -> bool:
        return isinstance(error, self._broken)

    def close(self, busy: bool) -> None:
        """Let them end; at once if they are busy, since nobody waits for what they do."""
        if busy:
            self._ours.close()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._ours.close()
        self._theirs.close()


_EXECUTORS: dict[str, type[_Threads | _Processes]] = {"threads": _Threads, "processes": _Processes}


def _begin(lifeline: Any) -> None:
    """What a process of a pool does first: end when the other end of the lifeline does; leave Ctrl-C to the server."""
    import signal
    import threading

    def wait() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _cores() -> int:
    """How many cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
