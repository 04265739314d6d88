"""What is particular to one backend, and how a backend is chosen."""

from __future__ import annotations

import importlib
import io
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from test_conformance import POLLERS

import muxio
from muxio import ERROR, HANGUP, ONESHOT, READ, READ_CLOSED, WRITE
from muxio.backends import NAMES, probe
from muxio.backends.facility import Facility
from muxio.backends.waker import Waker
from muxio.testing.conformance import (
    Background,
    both_shut,
    half_closed,
    in_child,
    own_write_shut,
    pipe_without_reader,
    pipe_without_writer,
    readable,
    take_number,
    tcp_pair,
    unix_pair,
    until,
    until_has,
)


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("MUXIO_BACKEND", raising=False)
    return monkeypatch


def chosen(name: str | None = None) -> str:
    poller: muxio.Poller[None] = muxio.Poller(name)
    with poller:
        return poller.backend


def test_backends_are_what_opens_here_best_first() -> None:
    assert muxio.backends() == [name for name in NAMES if probe()[name] is None]
    assert muxio.backends()[-1] == "select"
    assert all(isinstance(trouble, str) for name, trouble in probe().items() if name not in muxio.backends())


def test_the_best_backend_is_the_default(unforced: pytest.MonkeyPatch) -> None:
    assert chosen() == muxio.backends()[0]
    unforced.setenv("MUXIO_BACKEND", "")
    assert chosen() == muxio.backends()[0]


def test_the_environment_chooses_and_an_argument_overrules_it(unforced: pytest.MonkeyPatch) -> None:
    for name in muxio.backends():
        unforced.setenv("MUXIO_BACKEND", name)
        assert chosen() == name
        assert chosen("select") == "select"


def test_an_unknown_backend_is_a_value_error_that_names_the_known_ones(unforced: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*epoll, kqueue, afd, poll, select"):
        muxio.Poller("abacus")
    unforced.setenv("MUXIO_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MUXIO_BACKEND"):
        muxio.Poller()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in muxio.backends()])
def test_a_backend_that_does_not_work_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(io.UnsupportedOperation, match=name):
        muxio.Poller(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows' select() limits how many sockets, not their numbers")
def test_select_refuses_descriptors_that_it_cannot_watch() -> None:
    poller: muxio.Poller[socket.socket] = muxio.Poller("select")
    with ExitStack() as stack:
        stack.enter_context(poller)
        low, high = (stack.enter_context(sock) for sock in socket.socketpair())
        number = move_above(high.detach(), stack)
        poller.register(low, READ)
        with pytest.raises(io.UnsupportedOperation, match="1024"):
            poller.register(number, READ)
        assert len(poller) == 1
        os.write(number, b"x")
        assert poller.poll(10) == [(low, READ)]


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
@pytest.mark.parametrize("timeout", [0.0001, 0.0021])
def test_epoll_waits_whole_deadlines_where_select_cannot_help(timeout: float) -> None:
    """An epoll whose number is above select()'s limit takes a timer, or rounds up."""
    from muxio.backends.epoll import Backend

    with ExitStack() as stack:
        filler = [stack.enter_context(open(os.devnull)) for _ in range(1024)]
        poller: muxio.Poller[int] = muxio.Poller(Backend())
        stack.enter_context(poller)
        assert poller.fileno() > len(filler)
        reader, writer = (stack.enter_context(sock) for sock in socket.socketpair())
        poller.register(reader, READ, key=1)
        began = time.monotonic()
        assert poller.poll(timeout) == []
        assert time.monotonic() - began >= timeout
        writer.send(b"x")
        assert poller.poll(timeout) == [(1, READ)]


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
def test_epoll_knows_that_the_owner_of_a_bare_number_is_gone() -> None:
    """A number cannot tell, but epoll watches files, and accepts a new one under it."""
    poller: muxio.Poller[str] = muxio.Poller("epoll")
    with poller, ExitStack() as stack:
        old, new, peer = (stack.enter_context(sock) for sock in (socket.socket(), *socket.socketpair()))
        number = old.fileno()
        poller.register(number, READ, key="old")
        os.dup2(new.fileno(), number, inheritable=False)
        poller.register(old, READ, key="new")
        assert poller.registrations() == [(old, number, READ, "new")]
        peer.send(b"x")
        assert poller.poll(10) == [("new", READ)]


#: What a kqueue is told of the end of a source, and what muxio makes of it: (situation, asked, events).
ENDS = [
    (partial(half_closed, tcp_pair, b""), READ, READ | READ_CLOSED),
    (partial(half_closed, tcp_pair, b"x"), READ | WRITE, READ | WRITE | READ_CLOSED),
    (own_write_shut, WRITE, WRITE),
    (partial(both_shut, tcp_pair), READ | WRITE, READ | WRITE | READ_CLOSED | HANGUP),
    (pipe_without_reader, WRITE, WRITE | ERROR),
    (pipe_without_writer, READ, READ | HANGUP),
]


@pytest.mark.parametrize("name", [name for name in POLLERS if name.startswith("kqueue")])
@pytest.mark.parametrize(("situation", "asked", "events"), ENDS)
def test_kqueue_tells_of_the_end(name: str, situation: Callable[[ExitStack], Any], asked: int, events: int) -> None:
    with POLLERS[name]() as poller, ExitStack() as stack:
        poller.register(situation(stack), asked)
        assert until_has(poller, events) == events


@pytest.mark.skipif(sys.platform != "linux", reason="a double of kqueue is needed that a child inherits")
def test_kqueue_closes_nothing_in_a_forked_child() -> None:
    """A kqueue is not inherited: what has its number in the child is somebody else's."""
    from muxio.backends.kqueue import Backend

    double: Any = importlib.import_module("kqueue_double")
    kqueue = double.kqueue()
    backend = Backend(SimpleNamespace(**{**vars(double), "kqueue": lambda: kqueue}), "freebsd")

    def child() -> None:
        backend.close()
        assert not kqueue.closed

    assert in_child(child) == ""
    backend.close()
    assert kqueue.closed


def test_a_wake_up_channel_that_was_closed_is_an_error() -> None:
    """It reads as ready for ever: to go on would be a busy loop."""
    waker = Waker()
    with closing(waker):
        waker._sender.close()
        with pytest.raises(ConnectionError):
            waker.drain()


def test_a_wake_up_in_the_middle_of_draining_an_interruption_is_not_lost() -> None:
    """A signal handler may wake the very thread that drains."""
    from muxio.backends.select import Backend

    class Signalled(Backend):
        def drain(self) -> None:
            poller.wake()
            super().drain()

    facility = Signalled()
    poller: muxio.Poller[None] = muxio.Poller(facility)
    with poller:
        facility.wake()  # as if a change by another thread had to be seen
        began = time.monotonic()
        assert poller.poll(10) == []
        assert time.monotonic() < began + 10


class Events(list[tuple[int, int]]):
    """Events of a facility; something happens when the poller has looked at all of them."""

    def __init__(self, events: list[tuple[int, int]], happens: Callable[[], object]) -> None:
        super().__init__(events)
        self.happens = happens

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from super().__iter__()
        self.happens()


@contextmanager
def overtaken(facility: Facility, name: str, when: str, change: Callable[[], object]) -> Iterator[None]:
    """In the block another thread makes a change at the first call of a method of the facility.

    when: "before" or "after" the call, or when what it returned was "read".
    """
    method = getattr(facility, name)
    threads: list[Background[object]] = []

    def begin() -> None:
        if not threads:
            threads.append(Background(change))
            threads[0].join(0.05)  # it is over by then, or waits for a lock

    def call(*arguments: Any) -> Any:
        setattr(facility, name, method)
        if when == "before":
            begin()
        result = method(*arguments)
        if when == "after":
            begin()
        return Events(result, begin) if when == "read" else result

    setattr(facility, name, call)
    yield
    threads[0].result()


def changeable(name: str) -> Facility:
    """A facility of which a test can replace methods."""
    backend = importlib.import_module(f"muxio.backends.{name}").Backend
    facility: Facility = type("WithoutSlots", (backend,), {})()
    return facility


@pytest.mark.parametrize("name", muxio.backends())
def test_an_exception_out_of_a_wait_repeats_nothing(name: str) -> None:
    """It arms anew what the wait may have lost, but not what the list before has said."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    facility: Any = changeable(name)
    poller: muxio.Poller[Any] = muxio.Poller(facility)
    with poller, ExitStack() as stack:
        poller.register(readable(stack), READ | ONESHOT, key="key")
        assert poller.poll(10) == [("key", READ)]
        wait, facility.wait = facility.wait, interrupt
        with pytest.raises(KeyboardInterrupt):
            poller.poll()
        facility.wait = wait
        assert poller.poll(0) == []


@pytest.mark.parametrize("name", muxio.backends())
def test_an_exception_in_the_midst_of_a_batch_loses_none_of_it(name: str) -> None:
    facility: Any = changeable(name)
    poller: muxio.Poller[Any] = muxio.Poller(facility)
    disarm, disarmed = facility.disarm, []

    def interrupt(*arguments: Any) -> None:
        disarm(*arguments)
        disarmed.append(arguments)
        if len(disarmed) == 2:
            raise KeyboardInterrupt

    with poller, ExitStack() as stack:
        for key in range(3):
            poller.register(readable(stack), READ | ONESHOT, key=key)
        facility.disarm = interrupt
        with pytest.raises(KeyboardInterrupt):
            poller.poll(10)
        assert sorted(poller.poll(10)) == [(key, READ) for key in range(3)]
        assert poller.poll(0) == []


@pytest.mark.parametrize("name", muxio.backends())
class TestTwoThreads:
    """A change overtakes what another thread does: all is then as if one had come after the other."""

    @pytest.fixture
    def stack(self) -> Iterator[ExitStack]:
        with ExitStack() as stack:
            yield stack

    @pytest.fixture
    def facility(self, name: str) -> Facility:
        return changeable(name)

    @pytest.fixture
    def poller(self, facility: Facility) -> Iterator[muxio.Poller[Any]]:
        poller: muxio.Poller[Any] = muxio.Poller(facility)
        with poller:
            yield poller

    @pytest.fixture
    def source(self, poller: muxio.Poller[Any], stack: ExitStack) -> socket.socket:
        """It can be read and written."""
        source = readable(stack)
        poller.register(source, READ, key="key")
        assert poller.poll(10) == [("key", READ)]
        return source

    def test_modify_changes_what_was_reported_before(self, poller: muxio.Poller[Any], source: socket.socket) -> None:
        poller.modify(source, READ, key="new")
        assert poller.poll(10) == [("new", READ)]
        poller.modify(source, READ | ONESHOT)
        assert poller.poll(0) == [("new", READ)]
        assert poller.poll(0) == []

    def test_modify_overtakes_modify(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket
    ) -> None:
        with overtaken(facility, "modify", "before", lambda: poller.modify(source, WRITE)):
            poller.modify(source, READ | WRITE)
        assert poller.registrations() == [(source, source.fileno(), WRITE, "key")]
        assert poller.poll(10) == [("key", WRITE)]

    def test_register_overtakes_unregister(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket
    ) -> None:
        with overtaken(facility, "remove", "before", lambda: poller.register(source, WRITE, key="new")):
            poller.unregister(source)
        assert poller.poll(10) == [("new", WRITE)]

    @pytest.mark.parametrize("when", ["after", "read"])
    def test_modify_overtakes_an_event(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket, when: str
    ) -> None:
        with overtaken(facility, "wait", when, lambda: poller.modify(source, WRITE)):
            assert poller.poll(10) == [("key", WRITE)]

    @pytest.mark.parametrize("when", ["after", "read"])
    def test_unregister_overtakes_an_event(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket, when: str
    ) -> None:
        with overtaken(facility, "wait", when, lambda: poller.unregister(source)):
            assert poller.poll(0) in ([], [("key", 0)])

    @pytest.mark.parametrize("when", ["after", "read"])
    def test_a_new_owner_of_the_number_overtakes_an_event(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket, stack: ExitStack, when: str
    ) -> None:
        def take_over() -> None:
            unix_pair(stack)  # a thread's first blocking call on Windows makes an event, which would take the number
            number = source.fileno()
            source.close()
            poller.register(take_number(number, stack)[0], READ, key="new")

        with overtaken(facility, "wait", when, take_over):
            assert poller.poll(0) in ([], [("key", 0)])

    def test_an_event_overtakes_modify(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket
    ) -> None:
        """There was nothing to report for the old key."""
        said: list[object] = []
        poller.modify(source, 0)
        with overtaken(facility, "modify", "after", lambda: said.extend(poller.poll(0))):
            poller.modify(source, READ, key="new")
        assert said in ([], [("new", READ)])

    def test_an_event_overtakes_a_new_owner_of_the_number(
        self, poller: muxio.Poller[Any], facility: Facility, source: socket.socket, stack: ExitStack
    ) -> None:
        said: list[object] = []
        number = source.fileno()
        source.close()
        new, peer = take_number(number, stack)
        peer.send(b"x")
        with overtaken(facility, "add", "after", lambda: said.extend(poller.poll(0))):
            poller.register(new, READ, key="new")
        assert said in ([], [("new", READ)])


@pytest.mark.skipif(sys.platform == "win32", reason="its timers tick every 15 ms")
@pytest.mark.parametrize("name", muxio.backends())
@pytest.mark.parametrize("timeout", [0.0001, 0.0021])
def test_a_timeout_is_late_by_what_the_facility_resolves(name: str, timeout: float) -> None:
    """On a busy machine a wait may take longer, but not every one does."""
    poller: muxio.Poller[None] = muxio.Poller(name)
    with poller:

        def lateness() -> float:
            began = time.monotonic()
            assert poller.poll(timeout) == []
            return time.monotonic() - began - timeout

        until(lambda: lateness() < (0.0012 if name == "poll" else 0.0003))


def move_above(fd: int, stack: ExitStack, limit: int = 1024) -> int:
    """The same file under a number of at least `limit`."""
    if sys.platform == "win32":
        pytest.skip("Windows has no fcntl")
    import fcntl

    number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, limit)
    os.close(fd)
    stack.callback(os.close, number)
    return number
