"""Several threads change, wake and poll one poller, and no event is lost.

Each run has a seed of its own, which a failure names; MUXIO_SEED sets it. The threads' timing it cannot set, so a seed
that failed once may need some runs to fail again. MUXIO_STRESS=100 makes the runs a hundred times as long.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import soak_closing
from helpers import open_descriptors, wait_until
from test_conformance import POLLERS
from tokens import DEADLINE, Hall

import muxio
from muxio import EDGE, ONESHOT, READ, WRITE, Poller
from muxio.events import describe
from muxio.testing.conformance import needs, on_wine, readable, until_silent

LENGTH = float(os.environ.get("MUXIO_STRESS", "1"))

#: How many tokens are sent over a poller: less where it is not the best one, and over the double, which is Python.
ROUNDS = {"epoll": 100_000, "kqueue": 100_000, "poll": 10_000, "select": 10_000}
ROUNDS_OF_DOUBLES = 5_000

WORKERS = 4
MODES = {"level": [0], "edge": [EDGE], "oneshot": [ONESHOT], "mixed": [0, EDGE, ONESHOT]}

each_backend = pytest.mark.parametrize("backend", POLLERS)


class Timing(NamedTuple):
    """How the threads take turns."""

    way: Callable[[], AbstractContextManager[None]]
    length: float  # how much of a run is enough


@contextmanager
def switching(interval: float) -> Iterator[None]:
    """The interpreter moves on to another thread so often. (Without a GIL they run at the same time anyway.)"""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def pausing() -> Iterator[None]:
    """Threads that start now stop for a moment at any line of the poller, as on a machine that has no time for them."""
    chance = random.Random()

    def pause(frame: FrameType, *_: object) -> Any:
        if not frame.f_code.co_filename.startswith(POLLER_FILES):
            return None
        if chance.random() < 0.02:
            time.sleep(chance.choice((0, 0.0001, 0.002)))
        return pause

    threading.settrace(pause)
    try:
        yield
    finally:
        threading.settrace(None)


POLLER_FILES = tuple(str(Path(muxio.__file__).with_name(name)) for name in ("poller.py", "backends"))

TIMINGS = {
    "usual": Timing(nullcontext, 1),
    "shortest": Timing(partial(switching, 1e-6), 1),
    "pausing": Timing(pausing, 0.04),
}
FULL_LENGTHS = sum(timing.length == 1 for timing in TIMINGS.values())  #: what is to be done is shared among these
each_timing = pytest.mark.parametrize("timing", TIMINGS.values(), ids=TIMINGS)


@pytest.fixture
def seed() -> str:
    return os.environ.get("MUXIO_SEED") or str(random.randrange(10**9))


@pytest.fixture
def poller(backend: str) -> Iterator[Poller[Any]]:
    with closing(POLLERS[backend]()) as poller:
        yield poller


def together(*functions: Callable[[], object], give_up: Callable[[], object] = lambda: None) -> None:
    """Run each function in a thread of its own, all at the same moment; raise what the first of them raised.

    give_up: called when one has failed, so that the others end.
    """
    failures: list[BaseException] = []
    gate = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        try:
            gate.wait(DEADLINE)
            function()
        except BaseException as error:
            failures.append(error)
            give_up()

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# Events


@each_timing
@pytest.mark.parametrize("modes", MODES.values(), ids=MODES)
@each_backend
@pytest.mark.skipif(on_wine(), reason="Wine 8.0's server crashes if a number is polled while a socket is made under it")
def test_no_event_is_lost(poller: Poller[Any], backend: str, modes: list[int], timing: Timing, seed: str) -> None:
    supported = [mode for mode in modes if poller.supports(READ | mode)]
    if not supported or (len(modes) > 1 and supported == [0]):
        needs(poller, READ | modes[0])
    rounds = int(LENGTH * timing.length * ROUNDS.get(backend, ROUNDS_OF_DOUBLES) / len(MODES) / FULL_LENGTHS)
    hall = Hall(poller, supported, f"{backend}, seed {seed}")

    def work() -> None:
        together(*[partial(hall.guard, hall.work, name, rounds // WORKERS, seed) for name in range(WORKERS)])
        hall.stop()

    with timing.way():
        together(partial(hall.guard, hall.dispatch, seed), work)
    if hall.failures:
        raise hall.failures[0]
    assert hall.idle_turns <= hall.wakes + 1, f"{hall.what}: poll() returned nothing though nobody woke it"
    assert poller.registrations() == []
    poller.poll(0)  # a wake-up may be left
    assert until_silent(poller) == []


# Changes

#: What two threads do to a source: a method's name, and the events it is told.
CHANGES: list[tuple[str, list[int]]] = [
    ("register", [READ]),
    ("register", [WRITE | ONESHOT]),
    ("modify", [READ]),
    ("modify", [WRITE]),
    ("modify", [READ | WRITE]),
    ("modify", [0]),
    ("modify", [READ | ONESHOT]),
    ("modify", [READ | WRITE | ONESHOT]),
    ("unregister", []),
]


@each_timing
@each_backend
def test_two_threads_that_change_the_same_sources_leave_table_and_kernel_agreeing(
    poller: Poller[Any], backend: str, timing: Timing, seed: str
) -> None:
    """What is registered in the end, and how, shows in what is reported: all sources can be read and written."""

    def change(name: int, number: int) -> None:
        chance = random.Random(f"{seed} {number} {name}")
        for place, source in enumerate(sources):
            for step in range(3):
                method, events = chance.choice(CHANGES)
                key = [(place, name, step)] if events else []
                try:
                    getattr(poller, method)(source, *events, *key)
                except KeyError:
                    pass  # the other thread was faster

    with ExitStack() as stack, timing.way():
        sources = [readable(stack) for _ in range(20)]
        for number in range(math.ceil(LENGTH * timing.length * 40)):
            for place in range(0, len(sources), 2):
                poller.register(sources[place], READ, (place, None, None))
            together(partial(change, 0, number), partial(change, 1, number))
            listed = poller.registrations()
            said = sorted(poller.poll(0))
            expected = sorted((entry.key, entry.events & (READ | WRITE)) for entry in listed if entry.events)
            assert said == expected, f"{backend}, seed {seed}, round {number}: {listed}"
            for entry in listed:
                poller.unregister(entry.source)
            assert poller.poll(0) == []


@each_timing
@each_backend
def test_an_event_is_one_that_its_registration_asked_for(
    poller: Poller[Any], backend: str, timing: Timing, seed: str
) -> None:
    """Every key is the events that it was registered with, and all sources can be read and written."""
    rounds, names = math.ceil(LENGTH * timing.length * 400), range(4)
    over: list[int] = []

    def change(name: int) -> None:
        chance = random.Random(f"{seed} {name}")
        source = sources[name]
        try:
            for _ in range(rounds):
                events = chance.choice((READ, WRITE, READ | WRITE))
                poller.register(source, events, key=events)
                for _ in range(chance.randrange(3)):
                    events = chance.choice((0, READ, WRITE, READ | WRITE, READ | ONESHOT, WRITE | ONESHOT))
                    poller.modify(source, events, key=events)
                poller.unregister(source)
        finally:
            over.append(name)
            poller.wake()

    def poll() -> None:
        while len(over) < len(names):
            for key, events in poller.poll(DEADLINE):
                assert not events & ~key, f"{backend}, seed {seed}: {describe(events)} for {describe(key)}"

    with ExitStack() as stack, timing.way():
        sources = [readable(stack) for _ in names]
        together(poll, *[partial(change, name) for name in names])
    assert poller.registrations() == []


# Close


@each_timing
@each_backend
def test_close_in_the_midst_of_it_all_is_a_runtime_error_everywhere(backend: str, timing: Timing, seed: str) -> None:
    chance = random.Random(seed)
    with ExitStack() as stack, timing.way():
        sources = [readable(stack) for _ in range(3)]
        before = open_descriptors()
        number = math.ceil(LENGTH * timing.length * 20)
        pollers = [POLLERS[backend]() for _ in range(number)]  # none is let go before the end
        for poller in pollers:
            close_in_the_midst(poller, sources, after=chance.randrange(30))
        assert open_descriptors() == before, f"{backend}, seed {seed}"


def close_in_the_midst(poller: Poller[Any], sources: list[Any], after: int) -> None:
    """Close a poller when one thread polls and the others, one a source, have made so many changes."""
    changes: list[None] = []

    def until_closed(act: Callable[[], object]) -> None:
        with pytest.raises(RuntimeError):  # noqa: PT012 - one of many calls
            while True:
                act()

    def change(source: Any) -> None:
        poller.register(source, READ | WRITE)
        poller.modify(source, 0)
        poller.wake()
        poller.modify(source, READ | ONESHOT)
        poller.unregister(source)
        changes.append(None)

    def close() -> None:
        wait_until(lambda: len(changes) >= after)
        poller.close()

    together(
        partial(until_closed, poller.poll),
        *[partial(until_closed, partial(change, source)) for source in sources],
        close,
        give_up=poller.close,
    )


@each_backend
def test_what_is_closed_while_it_is_polled_or_waited_in_loses_nothing_and_leaves_nothing(
    backend: str, seed: str
) -> None:
    report = soak_closing.soak(POLLERS[backend], seed, lambda times: times < 10 * LENGTH)
    assert report.troubles == [], report


# Wake-ups


@each_timing
@each_backend
def test_wake_ups_of_four_threads_coalesce_and_none_is_lost(
    poller: Poller[Any], backend: str, timing: Timing, seed: str
) -> None:
    """Each says what it wants and then wakes; the thread that polls looks at the wishes, and sleeps until all came."""
    rounds, names = math.ceil(LENGTH * timing.length * 100), range(4)
    wishes = [0 for _ in names]
    answered = threading.Barrier(len(names) + 1)
    polls = 0

    def wake(name: int) -> None:
        for number in range(1, rounds + 1):
            wishes[name] = number
            poller.wake()
            answered.wait(2 * DEADLINE)

    def poll() -> None:
        nonlocal polls
        for number in range(1, rounds + 1):
            while min(wishes) < number:
                assert poller.poll(DEADLINE) == []
                polls += 1
                missing = [name for name in names if wishes[name] < number]
                assert time.monotonic() < late, f"{backend}, round {number}: no wake-up; {missing} have not called it"
            answered.wait(2 * DEADLINE)

    with timing.way():
        late = time.monotonic() + max(DEADLINE, 0.1 * rounds)
        together(poll, *[partial(wake, name) for name in names], give_up=answered.abort)
    assert polls <= rounds * len(names)
    poller.poll(0)  # a wake-up may be left
    assert until_silent(poller) == []


# The soak


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_a_short_soak_passes() -> None:
    soak = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "0.03"]
    run = subprocess.run(soak, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no event was lost" in run.stdout
