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
import pickle
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from typing import Protocol as Interface

from muxio.cores import core_count

if TYPE_CHECKING:
    from concurrent.futures import Future

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

    def call_back(self, callback: Callable[[Job], object], job: Job) -> None:
        """Call a callback, unless its end has come. What that raises is its own trouble."""


class RemoteTraceback(Exception):
    """Where in a process of the pool an exception was raised, as text: the cause of the one that a job tells."""


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

    __slots__ = ("_callbacks", "_error", "_pool", "_result", "_told", "call", "future", "line", "state")

    def __init__(self, pool: Pool, line: Line, call: Callable[[], Any]) -> None:
        self._pool = pool
        self._callbacks: list[Callable[[Job], object]] = []
        self._result: Any = None
        self._error: Exception | None = None
        self._told = False
        self.line = line
        self.call = call
        self.future: Future[Any] | None = None  # the executor's, while that has the job
        self.state = State.WAITING

    def __repr__(self) -> str:
        return f"<Job {self.call!r}: {self.state.value}>"

    def add_done_callback(self, callback: Callable[[Job], object]) -> None:
        """Call a function with this job when it is done, in the order in which the connection's jobs were asked for.

        What it raises ends the connection, as what every callback of a protocol raises does.
        """
        if self._told:
            self._pool.call_soon(self.line.call_back, callback, self)
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

    def exception(self) -> Exception | None:
        """What the function raised, or None. InvalidStateError: it is not done.

        What is no `Exception`, such as sys.exit()'s SystemExit, was not meant for this thread: it is the cause of a
        RuntimeError.
        """
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

        Nothing stops a function that runs, or that has been sent to a process which will be free next: until it
        returns, it has its thread or its process. Once its callbacks were called, or again, this does nothing.
        """
        if not self._told and self.state is not State.CANCELLED:
            self._pool.cancel(self)

    # For the pool

    def finish(self, result: Any, error: BaseException | None) -> None:
        """Take what came of it."""
        if error is not None and not isinstance(error, Exception):
            cause, error = error, RuntimeError(f"the function raised {error!r}")
            error.__cause__ = cause
        self._result, self._error, self.state = result, error, State.DONE

    def give_up(self) -> None:
        """Be cancelled, as far as the job itself goes; `Pool.cancel` does the rest."""
        self.state = State.CANCELLED
        if self.future is not None:
            self.future.cancel()  # if it has not begun, it never will

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

    def call_back(self, callback: Callable[[Job], object], job: Job) -> None:
        """Call one callback."""
        if self.owner is not None:
            self.owner.call_back(callback, job)
            return
        try:
            callback(job)
        except Exception:
            logger.exception("exception in a callback of %r: %r", job, callback)


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
        self._workers = self._settings.workers or core_count()
        self._executor: _Executor | None = None
        self._at_work: set[Job] = set()  # what the executor has
        self._lines: dict[Owner, Line] = {}
        self._turns: deque[Line] = deque()  # lines in which jobs wait
        self._closed = False
        if self._settings.kind == "processes":
            try:
                self._open().warm_up()  # starting processes holds up a loop: before it runs
            except BaseException:
                self.close()
                raise

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

    def cancel(self, job: Job) -> None:
        """Forget a job: it makes room, and who waited behind it may be told."""
        line = job.line
        job.give_up()
        if job in line.answers:  # else the pool was closed meanwhile
            line.answers.remove(job)
            self.jobs -= 1
            if job in line.waiting:
                line.waiting.remove(job)
                if not line.waiting:
                    self._turns.remove(line)
            self.call_soon(self._tell, line)  # not now: a callback may be at it

    def close(self) -> None:
        """Cancel everything, and give threads and processes back.

        Waits for functions that run in threads; those in processes are ended with them.
        """
        self._closed = True
        for line in [*self._lines.values(), *self._turns, *(job.line for job in self._at_work)]:
            self._drop(line)
        self._lines.clear()
        self._turns.clear()
        if self._executor is not None:
            self._executor.close(bool(self._at_work))
            self._executor = None

    # Inside

    def _drop(self, line: Line) -> None:
        self.jobs -= len(line.answers)
        for job in line.answers:
            job.give_up()
        line.answers.clear()
        line.waiting.clear()

    def _open(self) -> _Executor:
        if self._executor is None:
            self._executor = _EXECUTORS[self._settings.kind](self._workers)
        return self._executor

    def _feed(self) -> None:
        """Give the executor as many jobs as it should have."""
        while self._turns and len(self._at_work) <= self._workers and not self._closed:
            line = self._turns.popleft()
            if line.waiting:  # else its owner is gone
                job = line.waiting.popleft()
                if line.waiting:
                    self._turns.append(line)
                self._run(job)

    def _run(self, job: Job) -> None:
        try:
            executor = self._open()
            try:
                job.future = executor.submit(job.call)
            except RuntimeError:
                if not executor.broken:
                    raise
                self._bury(executor)  # it broke, and nobody has been told yet
                executor = self._open()
                job.future = executor.submit(job.call)
        except Exception as error:  # not to be pickled, or no descriptors or no memory: that is this job's answer
            job.finish(None, error)
            self.call_soon(self._tell, job.line)
            return
        job.state = State.RUNNING
        self._at_work.add(job)
        job.future.add_done_callback(partial(self._came, job, executor))

    def _came(self, job: Job, executor: _Executor, future: Future[Any]) -> None:
        """Called by the executor's thread, or by `Job.cancel`."""
        result, error = (None, None) if future.cancelled() else executor.outcome(future)
        try:
            self.call_soon(self._finished, job, executor, result, error)
        except RuntimeError:
            pass  # the loop is closed, and nobody waits

    def _finished(self, job: Job, executor: _Executor, result: Any, error: BaseException | None) -> None:
        self._at_work.discard(job)
        job.future = None
        if self._closed:
            return
        if executor.broken:
            self._bury(executor)
        if job.state is State.RUNNING:
            job.finish(result, error)
        self._feed()
        self._tell(job.line)

    def _bury(self, executor: _Executor) -> None:
        """A process of it has died, and the executor with it: who still waits gets a new one."""
        if self._executor is executor:
            self._executor = None
            executor.close(True)

    def _tell(self, line: Line) -> None:
        """Tell of all jobs at the head of a line that are over."""
        while line.answers and line.answers[0].done():
            job = line.answers.popleft()
            self.jobs -= 1
            for callback in job.take_callbacks():
                line.call_back(callback, job)
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

    #: Whether one of its processes has died, and all that it had to do with it.
    broken: bool

    def __init__(self, workers: int) -> None: ...

    def warm_up(self) -> None: ...

    def submit(self, call: Callable[[], Any]) -> Future[Any]: ...

    def outcome(self, future: Future[Any]) -> tuple[Any, BaseException | None]:
        """What came of it: the result, or what was raised. In the executor's thread."""

    def close(self, busy: bool) -> None: ...


class _Threads:
    def __init__(self, workers: int) -> None:
        from concurrent.futures.thread import ThreadPoolExecutor

        self.broken = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="muxio offload")

    def warm_up(self) -> None:
        pass

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        return self._pool.submit(call)

    def outcome(self, future: Future[Any]) -> tuple[Any, BaseException | None]:
        error = future.exception()
        return (future.result(), None) if error is None else (None, error)

    def close(self, busy: bool) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Processes:
    """Processes that end with us: each waits for the end of a pipe whose other end nobody has but this process."""

    def __init__(self, workers: int) -> None:
        import multiprocessing
        from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

        # The fork server forks from a process that has no sockets, and no threads. Apple's libraries do not like forks.
        servable = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
        context = multiprocessing.get_context("forkserver" if servable else "spawn")
        self.broken = False
        self._broken_pool = BrokenProcessPool
        self._workers = workers
        lifeline: tuple[Any, Any] = context.Pipe(duplex=False)
        self._theirs, self._ours = lifeline
        self._pool: Any = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(self._theirs,))

    def warm_up(self) -> None:
        """Start all of them."""
        for _ in range(self._workers):
            self._pool.submit(os.getpid)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        try:
            future: Future[Any] = self._pool.submit(_compute, pickle.dumps(call))
        except self._broken_pool:
            self.broken = True
            raise
        return future

    def outcome(self, future: Future[Any]) -> tuple[Any, BaseException | None]:
        try:
            told = future.result()
        except Exception as error:  # not the function's: a process has died
            self.broken = True
            return None, error
        try:
            result, failure, trace = pickle.loads(told)
        except BaseException as error:
            return None, error
        if failure is not None:
            failure.__cause__ = RemoteTraceback(f"\n{trace}")
        return result, failure

    def close(self, busy: bool) -> None:
        """Let them end; at once if they are busy, since nobody waits for what they do."""
        if busy:
            self._ours.close()
            self._kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ours.close()
        self._theirs.close()

    def _kill(self) -> None:
        """End the processes whatever they do, and let the executor's threads know.

        Nobody else can end one that runs C code with its GIL. The threads would wait for ever for the rest of a message
        whose sender, or receiver, was ended in the middle of it: the other ends of these pipes are open here, too. The
        executor has nothing for that (kill_workers() of Python 3.14 only kills), so this looks inside.
        """
        for process in [*(self._pool._processes or {}).values()]:
            process.kill()
        self._pool._result_queue._writer.close()
        if sys.version_info < (3, 11, 5):  # since then it closes this one itself when it breaks (gh-94777)
            self._pool._call_queue._reader.close()


_EXECUTORS: dict[str, type[_Threads | _Processes]] = {"threads": _Threads, "processes": _Processes}


# What the processes of a pool run


def _begin(lifeline: Any) -> None:
    """The first thing: end when the other end of the lifeline does; leave Ctrl-C, and Ctrl-Break, to the server."""
    import signal
    import threading

    def wait() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)

    for number in (signal.SIGINT, getattr(signal, "SIGBREAK", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()
    if sys.platform == "linux":
        _end_by_signal(lifeline.fileno())


def _end_by_signal(lifeline: int) -> None:
    """Let the kernel end this process with the lifeline: by SIGIO, since a thread waits for C code that keeps the GIL.

    Who gets that signal is a property of the open file, which all processes of the pool share: so it is opened anew.
    """
    if sys.platform == "linux":
        import fcntl

        try:
            own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no /proc
            return
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)


def _compute(call: bytes) -> bytes:
    """Make a call, and tell what came of it: the result, what was raised, and where.

    Pickled and loaded here, and loaded there by `_Processes.outcome`, so that what cannot be is this job's trouble. The
    executor itself would break of it, and all other jobs that it has with this one.
    """
    try:
        return pickle.dumps((pickle.loads(call)(), None, ""))
    except BaseException as error:
        import traceback

        trace = traceback.format_exc()
        try:
            told = pickle.dumps((None, error, trace))
            pickle.loads(told)
        except Exception:
            told = pickle.dumps((None, RuntimeError(trace.strip().rpartition("\n")[2]), trace))
        return told
