"""Several processes that serve one port, and the supervisor that starts, replaces and ends them.

The supervisor owns the listeners and accepts nobody. Each worker inherits the listener of its place, and so does who
comes after it: whoever waits in the kernel's queue meanwhile is served by the successor, and nobody is reset.
"""

from __future__ import annotations

import enum
import math
import multiprocessing
import pickle
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from muxio.server.channel import Channel
from muxio.server.loop import Handle, Loop
from muxio.server.notices import Notice, Say, listening
from muxio.server.server import BACKLOG, Stats
from muxio.server.signals import interrupts_blocked
from muxio.server.sockets import Address, file_of, listen_each, remove_file
from muxio.server.statistics import WorkerStats
from muxio.server.worker import Order, work

#: Seconds after which a worker that does not end although it should is killed.
LAST_PATIENCE = 5.0

#: A worker that dies is replaced at once. If its successor has not served for so many seconds when it dies too, there
#: is a pause, which doubles each time.
HEALTHY = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0

#: Seconds between two looks whether a process has ended that has closed its channel.
_REAP = 0.01


class State(enum.Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    RETIRING = "retiring"  #: it has a successor, and serves those whom it had accepted
    ENDING = "ending"  #: its channel is closed: it is about to end, or has died


class Place:
    """One of the places that are to have a worker each: its listener, who serves it, and who is about to."""

    def __init__(self, name: str, listener: socket.socket) -> None:
        self.name = name
        self.listener = listener
        self.worker: Worker | None = None
        self.successor: Worker | None = None
        #: How often a worker of this place has died soon, one after the other.
        self.deaths = 0
        #: What starts the next one.
        self.restart: Handle | None = None


class Worker:
    """One process, as its supervisor sees it."""

    def __init__(self, place: Place, process: BaseProcess, since: float) -> None:
        self.place = place
        self.process = process
        self.pid = process.pid or 0
        self.since = since
        self.state = State.STARTING
        self.channel: Channel
        #: What it told last.
        self.stats = Stats.total([])

    def __str__(self) -> str:
        return f"worker {self.place.name} (pid {self.pid})"


class Workers:
    """So many processes at one address.

    address: as `Server` takes it.
    count: how many processes.
    order: what they serve.
    retire: how many seconds a worker that was replaced goes on with those whom it serves, before it drains.
    tell: called with what happens.

    OSError: the address is taken or does not exist. ValueError: no such backend.

    Somebody has to `close` it.
    """

    def __init__(self, address: Address, count: int, order: Order, retire: float, tell: Say) -> None:
        listeners = listen_each(address, BACKLOG, count)
        self._order = replace(order, shared=len(listeners) < count)
        try:
            self.loop = Loop(order.backend)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        self.server_address: Any = listeners[0].getsockname()
        self._file = file_of(address)
        self._listeners = listeners
        self._places = [Place(str(number + 1), listeners[number % len(listeners)]) for number in range(count)]
        self._workers: set[Worker] = set()
        self._retire = retire
        self._tell = tell
        if sys.platform != "win32":
            # A process of its own, which would unblock signals in the middle of `interrupts_blocked`.
            resource_tracker.ensure_running()
        self._processes = multiprocessing.get_context("spawn")  # never fork: a successor runs the code of its day
        self._listening = False
        self._stopping = False
        self._trouble: str | None = None
        #: The places that are still to be renewed, the one that is first; None: nobody asked.
        self._reload: deque[Place] | None = None
        self._reload_again = False
        #: Who wants to see the statistics, and who still has to tell his.
        self._looks: list[Callable[[Sequence[WorkerStats]], object]] = []
        self._asked: set[Worker] = set()
        #: What they see: of everybody who was there when they asked.
        self._shown: dict[Worker, Stats] = {}
        #: What those had counted who were no more at the last `look`.
        self.gone = Stats.total([])
        #: What those have counted who have ended.
        self._ended = Stats.total([])

    @property
    def backend(self) -> str:
        """The name of the pollers' backend."""
        return self.loop.poller.backend

    def serve_forever(self) -> None:
        """Start the workers, and see to them until `stop`.

        ChildProcessError: a worker ended before it had served at all; the others were ended.
        """
        for place in self._places:
            self._start(place)
        self.loop.run()
        if self._trouble is not None:
            raise ChildProcessError(self._trouble)

    def stop(self, drain: float) -> None:
        """Accept no more, and let every worker drain for so many seconds; again, with less time."""
        if not self._stopping:
            self._stopping = True
            self._reload = None
            for place in self._places:
                if place.restart is not None:
                    place.restart.cancel()
            for listener in self._listeners:
                listener.close()
        for worker in self._workers:
            worker.channel.send("stop", drain)
        if drain < math.inf:
            self.loop.call_later(drain + LAST_PATIENCE, self._kill)
        self._leave_if_alone()

    def reload(self) -> None:
        """Replace the workers, one after the other: each goes when its successor accepts."""
        if self._stopping or not self._listening:
            return
        if self._reload is not None:
            self._reload_again = True
            return
        self._tell(Notice(f"reload: replacing {_workers(len(self._places))}, one after the other", "reload"))
        self._reload = deque(self._places)
        self._renew_next()

    def look(self, then: Callable[[Sequence[WorkerStats]], object]) -> None:
        """Ask all workers for their statistics, and call `then` with them.

        Who has not answered when the next look comes is shown with what it told before.
        """
        if self._looks:
            self._finish_looks()
        self._looks.append(then)
        self._shown = {
            worker: worker.stats
            for worker in sorted(self._workers, key=lambda worker: (int(worker.place.name), worker.since))
            if worker.state in (State.SERVING, State.RETIRING)
        }
        others = (_at_rest(worker.stats) for worker in self._workers if worker not in self._shown)
        self.gone = Stats.total([self._ended, *others])
        self._asked = set(self._shown)
        for worker in self._asked:
            worker.channel.send("stats")
        if not self._asked:
            self._finish_looks()

    def close(self) -> None:
        """End whoever still runs, and give everything back."""
        self._stopping = True
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self.loop.end_clients()
        self.loop.run_once()
        while len(self.loop.clients):
            self.loop.run_once()
        self.loop.close()
        for listener in self._listeners:
            listener.close()
        remove_file(self._file)

    def total(self) -> Stats:
        """What all have counted, as far as they have told."""
        return Stats.total([self._ended, *(worker.stats for worker in self._workers)])

    def _pids(self) -> list[int]:
        return [worker.pid for place in self._places if (worker := place.worker)]

    # Starting

    def _start(self, place: Place) -> None:
        place.restart = None
        ours, theirs = socket.socketpair()
        process = self._processes.Process(
            target=work, args=(self._order, place.listener, theirs, place.name), name=f"muxio worker {place.name}"
        )
        try:
            with theirs, interrupts_blocked():
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # the ways in which pickle says no
            ours.close()
            raise TypeError(
                f"workers are processes, so what makes protocols must be importable there: {error}"
            ) from error
        except BaseException:
            ours.close()
            raise
        worker = place.successor = Worker(place, process, self.loop.time())
        self._workers.add(worker)
        worker.channel = Channel(self.loop, ours, partial(self._heard, worker), partial(self._lost, worker))
        if sys.platform == "win32":
            self._await_start(worker)

    def _await_start(self, worker: Worker) -> None:
        """On Windows a worker fetches its sockets: until then its end of the channel is here, and its death no EOF."""
        if worker.state is State.STARTING:
            if worker.process.exitcode is None:
                self.loop.call_later(_REAP, self._await_start, worker)
            else:
                worker.channel.transport.abort()

    def _start_later(self, place: Place, delay: float) -> None:
        place.restart = self.loop.call_later(delay, self._start_again, place)

    def _start_again(self, place: Place) -> None:
        try:
            self._start(place)
        except OSError as error:  # no memory, no processes, no descriptors: later there may be some
            self._tell(Notice(f"worker {place.name} does not start: {error}", "worker", worker=place.name))
            self._start_later(place, self._pause(place))

    def _pause(self, place: Place) -> float:
        """How long to wait after a death."""
        place.deaths += 1
        return 0.0 if place.deaths == 1 else min(FIRST_PAUSE * 2.0 ** (place.deaths - 2), LONGEST_PAUSE)

    # What workers tell

    def _heard(self, worker: Worker, words: list[Any]) -> None:
        what, *figures = words
        if what == "ready":
            self._ready(worker)
        elif what == "leaving":
            self._leaving(worker)
        else:
            worker.stats = Stats(*figures)
            if worker in self._asked:  # else it has ended since, and was shown, or is, as it was
                self._shown[worker] = worker.stats
            self._answered(worker)

    def _ready(self, worker: Worker) -> None:
        place, old = worker.place, worker.place.worker
        worker.state, worker.since = State.SERVING, self.loop.time()
        place.worker, place.successor = worker, None
        if old is not None:
            old.state = State.RETIRING
            old.channel.send("retire", self._retire, self._order.drain)
        if not self._listening:
            if all(place.worker for place in self._places):
                self._listening = True
                pids = self._pids()
                self._tell(listening(self.server_address, self.backend, _list(pids), pids=pids))
        elif not self._stopping:
            self._tell(Notice(f"{worker} serves", "worker", worker=place.name, pid=worker.pid))
            if self._reload is not None and self._reload and self._reload[0] is place:
                self._reload.popleft()
                self._renew_next()

    def _leaving(self, worker: Worker) -> None:
        """Somebody asked it to stop, not us: it drains, and its place is free."""
        if worker.place.worker is worker and not self._stopping:
            worker.state = State.RETIRING
            worker.place.worker = None
            if worker.place.successor is None:
                self._start_again(worker.place)

    def _answered(self, worker: Worker) -> None:
        self._asked.discard(worker)
        if self._looks and not self._asked:
            self._finish_looks()

    def _finish_looks(self) -> None:
        rows = [
            WorkerStats(worker.place.name, worker.pid, worker.state.value, stats)
            for worker, stats in self._shown.items()
        ]
        looks, self._looks = self._looks, []
        for then in looks:
            then(rows)

    # Replacing

    def _renew_next(self) -> None:
        """Start the successor of the next one; `_ready` goes on."""
        assert self._reload is not None
        if self._reload:
            place = self._reload[0]
            if place.restart is not None:
                place.restart.cancel()
            if place.successor is None:
                self._start_again(place)
            return
        self._reload = None
        pids = self._pids()
        self._tell(Notice(f"reloaded: {_list(pids)}", "reloaded", pids=pids))
        if self._reload_again:
            self._reload_again = False
            self.reload()

    # Ending

    def _lost(self, worker: Worker) -> None:
        """Its channel has ended: so does it, in order or not."""
        retiring = worker.state is State.RETIRING
        worker.state = State.ENDING
        self._reap(worker, retiring, self.loop.time() + LAST_PATIENCE)

    def _reap(self, worker: Worker, retiring: bool, deadline: float) -> None:
        status = worker.process.exitcode
        if status is None:
            if self.loop.time() >= deadline:
                worker.process.kill()
            self.loop.call_later(_REAP, self._reap, worker, retiring, deadline)
            return
        worker.process.close()
        self._workers.discard(worker)
        last = worker.stats
        if status != 0 and self._stopping:
            # It was killed, or died: whom it had is not known, but that somebody was cut is the safer thing to say.
            last = last._replace(cut=last.cut + max(1, last.connections))
        self._ended = Stats.total([self._ended, _at_rest(last)])
        self._answered(worker)
        if status != 0 or not (retiring or self._stopping):
            self._mourn(worker, status, retiring)
        self._leave_if_alone()

    def _mourn(self, worker: Worker, status: int, retiring: bool) -> None:
        """A worker has ended that should not have."""
        place = worker.place
        how = _manner(status)
        self._tell(Notice(f"{worker} {how}", "worker", worker=place.name, pid=worker.pid, status=status))
        if self._stopping or retiring:
            return
        if worker.place.successor is worker:
            place.successor = None
            if not self._listening:
                self._trouble = f"{worker} {how} before it served"
                self.stop(0.0)
                return
            if self._reload is not None and self._reload[0] is place and place.worker is not None:
                self._reload, self._reload_again = None, False
                self._tell(Notice("reload: given up; the workers that were not replaced go on", "reloaded"))
        else:
            place.worker = None
            if self.loop.time() - worker.since >= HEALTHY:
                place.deaths = 0
        if place.worker is None and place.successor is None:
            self._start_later(place, self._pause(place))

    def _kill(self) -> None:
        """The time to drain is over, and more."""
        for worker in self._workers:
            if worker.process.exitcode is None:
                self._tell(Notice(f"{worker} does not end, and is killed", "worker", worker=worker.place.name))
                worker.process.kill()

    def _leave_if_alone(self) -> None:
        if self._stopping and not self._workers:
            self.loop.stop()


def _at_rest(stats: Stats) -> Stats:
    """What is left of it when its worker has ended."""
    return stats._replace(connections=0, buffered=0, jobs=0, lag=0.0)


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _list(pids: list[int]) -> str:
    return f"{_workers(len(pids))}: {', '.join(map(str, pids))}"


def _manner(status: int) -> str:
    """How a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
