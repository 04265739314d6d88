"""Close sockets that are polled and pollers that are waited in, for a minute: nothing is lost, mixed up or left.

    python tests/soak_closing.py                             # a minute on the best backend here
    python tests/soak_closing.py --seconds 600 --backend poll

There are two pollers at a time and four threads: at each poller one that waits in it, and one that sends tokens through
its sockets. This one closes them and opens others all the while, now before it unregisters them and now after it, so
that the numbers are used again at once, by either poller's; and it wakes the other thread (see tokens.py). After some
rounds both pollers are closed as they are, with a thread in them and all sockets registered, and the next two are made.

The last line says what was done, what is left, and whether it passed; the exit status is 0 or 1. Under Wine, where an
exit status says nothing, that line is the proof. Should it hang, it says where each thread is instead, and ends with 1.

On Wine an AFD handle that takes the number of a closed socket crashes the wineserver if it is polled as that socket.
A poller opens such handles when it is made, and when it has more than 32 sockets; and a socket is one until it has got
its type, in a second step. So pollers and sockets are made when all others are closed, none has more than 32 sockets,
and what takes a number while others run is a dup of one of these sockets, which comes in one step.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # a clone, if muxio is not installed

from helpers import open_handles, wait_until
from tokens import DEADLINE, LINES, Hall, Pair, Registration, Stopped

import muxio
from muxio import EDGE, ONESHOT, READ

POLLERS = 2  #: at a time
ROUNDS = 200  #: at most, at a poller
PAIRS = 40  #: of sockets, at most, at a poller
SPARE = 10 if sys.platform == "win32" else 0  #: handles that may come on top: Windows opens some for itself

MakePoller = Callable[[], "muxio.Poller[Registration]"]


class Site:
    """A poller, the thread that waits in it, and the one that uses its sockets, until it is closed under both."""

    def __init__(self, poller: muxio.Poller[Registration], rounds: int, seed: str) -> None:
        modes = [mode for mode in (0, EDGE, ONESHOT) if poller.supports(READ | mode)]
        self.hall = Hall(poller, modes, f"{poller.backend}, seed {seed}", self._next_pair)
        self.pairs = [socket.socketpair() for _ in range(PAIRS)]
        self.rounds = 0
        self._wanted = rounds
        self._enough = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self.hall.guard, args=(self._until_closed, part))
            for part in (partial(self.hall.dispatch, seed), partial(self._work, seed))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._enough.wait()
        self.hall.poller.close()
        self._closed.set()
        self.hall.stop()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        for pair in self.pairs:
            for sock in pair:
                sock.close()

    def _next_pair(self) -> Pair:
        """One that nobody had, its first socket under a number that is free now."""
        if not self.pairs:
            self._enough.set()
            self._closed.wait()  # the sockets stay open until then
            raise Stopped
        original, peer = self.pairs.pop()
        with original:
            return original.dup(), peer

    def _until_closed(self, part: Callable[[], object]) -> None:
        try:
            part()
        except RuntimeError:
            if not self.hall.poller.closed:
                raise
            raise Stopped from None

    def _work(self, seed: str) -> None:
        try:
            self.hall.work("worker", sys.maxsize, seed, self._count)
        finally:
            self._enough.set()

    def _count(self, more: int) -> None:
        self.rounds += more
        if self.rounds >= self._wanted:
            self._enough.set()


@dataclass
class Report:
    """What was done, and what is left. handles, threads: before, and after."""

    what: str
    pollers: int = 0
    sockets: int = 0
    rounds: int = 0
    events: int = 0
    wakes: int = 0
    handles: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    troubles: list[str] = field(default_factory=list)

    def add(self, site: Site) -> None:
        self.pollers += 1
        self.sockets += site.hall.closings
        self.rounds += site.rounds
        self.events += site.hall.events
        self.wakes += site.hall.wakes
        self.troubles += map(repr, site.hall.failures)

    def __str__(self) -> str:
        done = f"{self.pollers} pollers and {self.sockets} sockets closed, {self.rounds} rounds, {self.events} events"
        left = "handles {} -> {}, threads {} -> {}".format(*self.handles, *self.threads)
        verdict = "FAILED" if self.troubles else "passed"
        return f"{self.what}: {done}, {self.wakes} wake-ups, {left}: {verdict}"


def soak(make_poller: MakePoller, seed: str, more: Callable[[int], bool]) -> Report:
    """Make pollers and close them, at least twice, as long as there are to be more after so many times."""
    chance = random.Random(seed)
    with make_poller() as poller:
        report = Report(f"{poller.backend}, seed {seed}")
    threads = threading.active_count()
    handles = times = 0
    while times < 2 or (more(times) and not report.troubles):
        pollers = [make_poller() for _ in range(POLLERS)]  # all, before there are sockets
        sites = [
            Site(poller, chance.randrange(LINES, ROUNDS), f"{seed} {times} {place}")
            for place, poller in enumerate(pollers)
        ]
        for site in sites:
            site.start()
        for site in sites:
            site.close()
        for site in sites:
            site.join()
            report.add(site)
        times += 1
        if times == 1:  # now everything that is opened once is open
            gc.collect()
            handles = open_handles()
    gc.collect()
    with suppress(AssertionError):
        wait_until(lambda: open_handles() <= handles + SPARE)
    report.handles = handles, open_handles()
    report.threads = threads, threading.active_count()
    if report.handles[1] > handles + SPARE:
        report.troubles.append("handles are left")
    if report.threads[1] > threads:
        report.troubles.append("threads are left")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long; 60 by default")
    parser.add_argument("--backend", choices=muxio.backends(), help="of the pollers")
    parser.add_argument(
        "--seed", default=str(random.randrange(10**9)), help="of what the threads do; a new one each run"
    )
    options = parser.parse_args()
    faulthandler.dump_traceback_later(options.seconds + 3 * DEADLINE, exit=True)
    end = time.monotonic() + options.seconds
    make_poller: MakePoller = partial(muxio.Poller, options.backend)
    report = soak(make_poller, options.seed, lambda times: time.monotonic() < end)
    for trouble in report.troubles:
        print(f"FAILED: {trouble}")
    print(report)
    return 1 if report.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
