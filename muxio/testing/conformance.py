"""Every promise of a poller as a test, for any object with the interface of `muxio.Poller`, ours or not.

>>> import muxio, muxio.testing
>>> class TestMine(muxio.testing.PollerConformance):
...     make_poller = staticmethod(lambda: muxio.Poller("select"))

pytest then runs all of them. What a facility cannot do is skipped with its name, or tested for being refused.

How the tests are made: whatever has to come is waited for, up to `DEADLINE`; whatever must not come is looked for in a
real wait (`until_silent`), which also must not have spun. No test asserts that something was fast. A poller that hangs
is interrupted after `WATCHDOG` seconds, and its test fails. Where a test needs another thread to be inside `poll`, it
knows that by being refused there itself (`Wait`).
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import io
import math
import os
import queue
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

try:
    import pytest
except ImportError as error:
    raise ImportError("muxio.testing.PollerConformance needs pytest: python -m pip install pytest") from error

from muxio.events import EDGE, ERROR, EXCLUSIVE, HANGUP, ONESHOT, PRIORITY, READ, READ_CLOSED, WRITE, describe
from muxio.poller import Poller

__all__ = ["PollerConformance"]

DEADLINE = 10.0  # seconds until what has to come has not come
WATCHDOG = 30.0  # seconds until a test hangs
RESEND = 0.5  # seconds until a signal is sent again
REST = 0.025  # seconds in which nothing may come
PAUSES = (0, 0, 0, 0, 0.001, 0.001, 0.005)  # seconds; after them another thread is somewhere inside poll(), or asleep

WINDOWS, LINUX, DARWIN = (sys.platform.startswith(name) for name in ("win32", "linux", "darwin"))

#: What is sent to a thread that waits.
SIGNAL: int = getattr(signal, "SIGUSR1", signal.SIGTERM)

T = TypeVar("T")
Entries = list[tuple[Any, int]]
Pair = tuple[socket.socket, socket.socket]


# Sources


def unix_pair(stack: ExitStack) -> Pair:
    """Two connected sockets, both non-blocking. (On Windows they are TCP's.)"""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        stack.enter_context(sock).setblocking(False)
    return ours, theirs


def tcp_pair(stack: ExitStack) -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = stack.enter_context(socket.create_connection(listener.getsockname()))
        ours = stack.enter_context(listener.accept()[0])
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def take_number(number: int, stack: ExitStack) -> Pair:
    """A new pair whose first socket has a number that was just closed."""
    ours, theirs = unix_pair(stack)
    if ours.fileno() == number:
        return ours, theirs
    if theirs.fileno() == number:
        return theirs, ours
    if sys.platform == "win32":
        reborn, theirs = pair_under(number)
        return stack.enter_context(reborn), stack.enter_context(theirs)
    os.dup2(ours.fileno(), number, inheritable=False)
    ours.close()
    reborn = stack.enter_context(socket.socket(fileno=number))
    reborn.setblocking(False)
    return reborn, theirs


def pair_under(number: int) -> Pair:
    """A new pair whose first socket has a free number: Windows has no dup2 for sockets."""
    ours = socket_under(number)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


def socket_under(number: int) -> socket.socket:
    """A new socket that has a free number, which Windows uses again soon."""
    with ExitStack() as others:
        for _ in range(1000):
            sock = socket.socket()
            if sock.fileno() == number:
                return sock
            others.enter_context(sock)
    pytest.skip("the number was not used again, and Windows has no dup2 for sockets")


def leave_behind(poller: Poller[Any], sock: socket.socket, stack: ExitStack) -> int:
    """Register a socket, close and unregister it, while a dup keeps its file alive. Returns its number."""
    number = sock.fileno()
    poller.register(sock, READ, key="old")
    stack.enter_context(sock.dup())
    sock.close()
    poller.unregister(sock)
    return number


def pipe(stack: ExitStack) -> tuple[io.FileIO, io.FileIO]:
    if sys.platform == "win32":
        pytest.skip("Windows polls sockets only, no pipes")
    reader, writer = os.pipe()
    return stack.enter_context(open(reader, "rb", 0)), stack.enter_context(open(writer, "wb", 0))


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    # struct linger has two shorts on Windows, two ints elsewhere.
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


def closed_port(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> Any:
    """An address where nobody listens: bound, so that nobody else takes it meanwhile."""
    holder = stack.enter_context(socket.socket(socket.AF_INET, kind))
    holder.bind(("127.0.0.1", 0))
    address = holder.getsockname()
    if kind == socket.SOCK_DGRAM:
        holder.close()  # a bound UDP socket would receive
    return address


class Wrapped:
    """A source that is not a socket, only has its number."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def fileno(self) -> int:
        number: int = self._source.fileno()
        return number


# Situations


def idle(stack: ExitStack) -> socket.socket:
    return unix_pair(stack)[0]


def readable(stack: ExitStack) -> socket.socket:
    ours, theirs = unix_pair(stack)
    theirs.send(b"x")
    return ours


def half_closed(make: Callable[[ExitStack], Pair], data: bytes, stack: ExitStack) -> socket.socket:
    ours, theirs = make(stack)
    theirs.send(data)
    theirs.shutdown(socket.SHUT_WR)
    return ours


def own_write_shut(stack: ExitStack) -> socket.socket:
    ours, _ = tcp_pair(stack)
    ours.shutdown(socket.SHUT_WR)
    return ours


def own_read_shut(stack: ExitStack) -> socket.socket:
    ours, _ = tcp_pair(stack)
    ours.shutdown(socket.SHUT_RD)
    return ours


def both_shut(make: Callable[[ExitStack], Pair], stack: ExitStack) -> socket.socket:
    ours, theirs = make(stack)
    ours.shutdown(socket.SHUT_WR)
    theirs.shutdown(socket.SHUT_WR)
    return ours


def reset_by_peer(stack: ExitStack) -> socket.socket:
    ours, theirs = tcp_pair(stack)
    reset(theirs)
    return ours


def connecting(address: Any, stack: ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    try:
        sock.connect(address)
    except BlockingIOError:
        pass  # it is under way
    except ConnectionRefusedError:
        pytest.skip("this system refuses in connect() itself, there is nothing to wait for")
    return sock


def connected(stack: ExitStack) -> socket.socket:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    return connecting(listener.getsockname(), stack)


def refused_by_peer(stack: ExitStack) -> socket.socket:
    return connecting(closed_port(stack), stack)


def fresh(stack: ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket())
    sock.setblocking(False)
    return sock


def pending_peer(stack: ExitStack) -> socket.socket:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.enter_context(socket.create_connection(listener.getsockname()))
    return listener


def datagram_refused(stack: ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.setblocking(False)
    sock.connect(closed_port(stack, socket.SOCK_DGRAM))
    sock.send(b"x")
    return sock


def pipe_without_reader(stack: ExitStack) -> io.FileIO:
    reader, writer = pipe(stack)
    reader.close()
    return writer


def pipe_without_writer(stack: ExitStack) -> io.FileIO:
    reader, writer = pipe(stack)
    writer.close()
    return reader


@dataclass(frozen=True)
class Situation:
    """What a source goes through, and what a poller that watches it for READ and WRITE may say of that.

    must: reported on every system. tells: hints that are true here; reported where the poller's class says that its
    facility tells them (`PollerConformance.tells`). may: what else some system says. Nothing more may be reported.
    asks: the interests that make sense.
    """

    name: str
    make: Callable[[ExitStack], Any]
    must: int
    tells: int = 0
    may: int = 0
    asks: tuple[int, ...] = (READ, WRITE, READ | WRITE, READ | PRIORITY)


ANY_HINT = ERROR | HANGUP | READ_CLOSED

SITUATIONS = [
    Situation("idle", idle, WRITE),
    Situation("readable", readable, READ | WRITE),
    Situation("peer half-closed", partial(half_closed, tcp_pair, b""), READ | WRITE, READ_CLOSED),
    Situation("peer half-closed (pair)", partial(half_closed, unix_pair, b""), READ | WRITE, READ_CLOSED),
    Situation("peer half-closed after data", partial(half_closed, tcp_pair, b"x"), READ | WRITE, READ_CLOSED),
    # Never a hang-up. kqueue has EV_EOF on its write filter then.
    Situation("own SHUT_WR", own_write_shut, WRITE),
    # Winsock says nothing of it.
    Situation("own SHUT_RD", own_read_shut, WRITE if WINDOWS else READ | WRITE, READ_CLOSED, READ),
    Situation("both halves shut", partial(both_shut, tcp_pair), READ | WRITE, HANGUP | READ_CLOSED),
    Situation("both halves shut (pair)", partial(both_shut, unix_pair), READ | WRITE, HANGUP | READ_CLOSED),
    Situation("reset", reset_by_peer, READ | WRITE, ANY_HINT),
    Situation("connect succeeded", connected, WRITE),
    # On kqueue EV_EOF on the write filter, not EV_ERROR; on Windows only select's except set tells.
    Situation("connect refused", refused_by_peer, WRITE, ANY_HINT, READ),
    # Linux reports EPOLLHUP at once; BSD nothing until it connects.
    Situation("fresh", fresh, READ | WRITE if LINUX else 0, HANGUP, READ | WRITE | READ_CLOSED),
    Situation("pending peer", pending_peer, READ),
    Situation("datagram refused", datagram_refused, WRITE if WINDOWS else READ | WRITE, ERROR, READ | ANY_HINT),
    Situation("pipe without reader", pipe_without_reader, WRITE, ERROR, HANGUP, (WRITE,)),
    # epoll_wait(2) has EPOLLHUP without EPOLLIN here.
    Situation("pipe without writer", pipe_without_writer, READ, HANGUP, READ_CLOSED, (READ,)),
]


# Waiting


def on_wine() -> bool:
    """Whether this Windows is Wine, some of whose sockets' habits are its own."""
    if sys.platform != "win32":
        return False
    import ctypes

    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


def until(condition: Callable[[], T]) -> T:
    """Wait for a condition that no poller can tell."""
    end = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < end, "what has to come has not come"
        time.sleep(0.0005)
    return result


def only(poller: Poller[Any]) -> tuple[Any, int]:
    """The one entry that has to come."""
    (entry,) = poller.poll(DEADLINE)
    return entry


def until_has(poller: Poller[Any], bits: int) -> int:
    """Poll until the one level-triggered source of a poller has all these bits; return what it has."""
    return until(lambda: (events := only(poller)[1]) & bits == bits and events)


def batch_of(poller: Poller[Any], size: int) -> Entries:
    """Poll until one list has so many entries."""
    end = time.monotonic() + DEADLINE
    while len(batch := poller.poll(DEADLINE)) < size:
        assert time.monotonic() < end, f"{batch!r} is all that came"
    return batch


def until_silent(poller: Poller[Any]) -> Entries:
    """All that a poller says before it rests. It must have waited for the whole time then, and not have spun."""
    said: Entries = []
    busy = 0
    while True:
        end, cpu = time.monotonic() + REST, time.thread_time()
        batch = poller.poll(REST)
        cpu = time.thread_time() - cpu
        if not batch:
            assert time.monotonic() >= end, "poll() returned early, with nothing to report"
            if cpu < REST * 0.25:
                return said
            busy += 1
            assert busy < 3, "poll() was busy while nothing happened"
            continue  # once it may be the garbage collector
        said += batch
        assert all(events for _, events in batch), "poll() reports nothing of a source"
        assert len(said) < 50, "poll() repeats itself"


class Background(threading.Thread, Generic[T]):
    """A function in another thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._returned: list[T] = []
        self._raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._returned.append(self._function())
        except BaseException as error:
            self._raised = error

    def result(self) -> T:
        self.join(DEADLINE)
        assert not self.is_alive(), "the other thread has not ended"
        if self._raised is not None:
            raise self._raised
        return self._returned[0]


class Wait:
    """One `poll` of which another thread can know that it is under way.

    That thread looks in with poll(0), which is refused for as long as the wait is under way. A look may come first and
    be in the wait's way; the wait is refused then and tries again.
    """

    def __init__(self, poller: Poller[Any], timeout: float | None = None) -> None:
        self._poller, self._timeout = poller, timeout
        self._begun = self.is_over = False

    def __call__(self) -> Entries:
        try:
            while True:
                try:
                    return self._poller.poll(self._timeout)
                except RuntimeError:
                    if self._begun:
                        raise
        finally:
            self.is_over = True

    def has_begun(self) -> bool:
        """Wait until it has; False if it was over before anybody could see it."""

        def seen() -> bool:
            try:
                self._poller.poll(0)
            except RuntimeError:
                self._begun = True
            return self._begun or self.is_over

        until(seen)
        return self._begun


@contextmanager
def waiting(poller: Poller[Any], timeout: float | None = None, pause: float = 0) -> Iterator[Background[Entries]]:
    """Another thread that is in poll() when the block begins. `result()` is what its poll() returned or raised."""
    wait = Wait(poller, timeout)
    thread = Background(wait)
    try:
        assert wait.has_begun()
        time.sleep(pause)
        yield thread
    finally:
        if thread.is_alive():  # the test has failed
            poller.close()
        thread.join(1)


@contextmanager
def refused(poller: Poller[Any], kind: type[BaseException]) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """The block raises this error, and no registration changes."""
    before = poller.registrations()
    with pytest.raises(kind) as caught:
        yield caught
    assert poller.registrations() == before


def assert_closed_descriptor(error: BaseException) -> None:
    assert isinstance(error, OSError)
    assert error.errno in (errno.EBADF, getattr(errno, "WSAENOTSOCK", errno.EBADF))


def needs(poller: Poller[Any], events: int) -> None:
    if not poller.supports(events):
        pytest.skip(f"the {poller.backend} backend has no {describe(events)}")


class Interrupted(Exception):
    """Raised by signal handlers."""


def interrupt() -> None:
    raise Interrupted


@contextmanager
def handling(handler: Callable[[], object], where: Callable[[FrameType | None], bool] = bool) -> Iterator[int]:
    """Call `handler` for a signal in the block, if it interrupts the right place. Gives the signal's number."""
    before = signal.signal(SIGNAL, lambda _, frame: where(frame) and handler())
    try:
        yield SIGNAL
    finally:
        signal.signal(SIGNAL, before)


def send_signal(thread: int) -> None:
    """From another thread to this one. (On Windows a signal is the process's, and the main thread runs its handler.)"""
    if sys.platform == "win32":
        signal.raise_signal(SIGNAL)
    else:
        signal.pthread_kill(thread, SIGNAL)


def once(handler: Callable[[], object]) -> Callable[[], object]:
    """The handler for the first signal alone: a signal that was sent again may come when the first was answered."""
    left = [handler]
    return lambda: left.pop()() if left else None


def wait_and_signal(
    poller: Poller[Any], timeout: float | None, before: Callable[[], object] = lambda: None
) -> Entries | None:
    """Poll in the main thread, which is sent a signal while it waits. None: the wait was over before that.

    before: called just before the signal is sent.

    A wait without timeout is sent it again if it goes on: a signal that arrives just before the facility's call begins
    is noted by Python, but nobody looks before the call is over.
    """
    wait = Wait(poller, timeout)

    def send() -> bool:
        begun = wait.has_begun()
        if begun:
            before()
            send_signal(main)
            sent = time.monotonic()
            while timeout is None and not wait.is_over and signal.getsignal(SIGNAL) is handler:
                time.sleep(0.001)
                if time.monotonic() > sent + RESEND:
                    send_signal(main)
                    sent = time.monotonic()
        return begun

    main, handler = threading.get_ident(), signal.getsignal(SIGNAL)
    thread = Background(send)
    try:
        result = wait()
    finally:
        interrupted = thread.result()
    return result if interrupted else None


def is_inside_poll(frame: FrameType | None) -> bool:
    """Whether a signal's handler interrupted the poller's own code, called by a `Wait`. (C code has no frames.)"""
    caller = frame and frame.f_back
    while caller and caller.f_code is not Wait.__call__.__code__:
        caller = caller.f_back
    return caller is not None


def in_child(function: Callable[[], object]) -> str:
    """Run a function in a forked child; return the traceback of what it raised, or ``""``."""
    if sys.platform == "win32":
        pytest.skip("Windows has no os.fork")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads (from Python 3.12): that is the test
        pid = os.fork()
    if pid == 0:
        report = ""
        try:
            function()
        except BaseException:
            report = traceback.format_exc()
        finally:
            os.write(writer, report.encode())
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as output:
            ended = select.select([output], [], [], DEADLINE)[0]
            return output.read() if ended else "the child hangs"
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# What a poller refuses whatever its facility can

SENSELESS = [
    ERROR,
    HANGUP,
    READ | ERROR,
    READ_CLOSED,
    WRITE | READ_CLOSED,
    READ | 0x20,
    READ | 1 << 20,
    -1,
    READ | EXCLUSIVE | ONESHOT,
    READ | EXCLUSIVE | PRIORITY,
    READ | EXCLUSIVE | READ_CLOSED,
]

#: (name, call): every method that does something, of a poller and a registered source.
METHODS: list[tuple[str, Callable[[Poller[Any], Any], object]]] = [
    ("register", lambda poller, source: poller.register(source, READ)),
    ("modify", lambda poller, source: poller.modify(source, READ)),
    ("unregister", lambda poller, source: poller.unregister(source)),
    ("poll", lambda poller, source: poller.poll(0)),
    ("wake", lambda poller, source: poller.wake()),
    ("supports", lambda poller, source: poller.supports(READ)),
    ("fileno", lambda poller, source: poller.fileno()),
    ("__enter__", lambda poller, source: poller.__enter__()),
]

each_method = pytest.mark.parametrize("call", [call for _, call in METHODS], ids=[name for name, _ in METHODS])
each_mode = pytest.mark.parametrize("mode", [0, EDGE, ONESHOT], ids=["level", "edge", "oneshot"])


class PollerConformance:
    """Subclass it, say how a poller is made, and pytest tests that poller.

    make_poller: called without arguments, returns a new poller with nothing registered.
    tells: the hints (ERROR, HANGUP, READ_CLOSED) that its facility gives whenever they are true; none by default.
    runs: how many orders of operations are made up and tried, each on a new poller; 0 for none.
    """

    tells: int = 0
    runs: int = 100

    @staticmethod
    def make_poller() -> Any:
        raise NotImplementedError("a subclass says how its poller is made")

    @pytest.fixture(autouse=True)
    def watchdog(self) -> Iterator[Callable[[], object]]:
        """A poller that hangs fails the test: by an exception in the main thread, or else by the end of the run.

        Gives a function that lets the time begin anew.
        """
        feed: Callable[[], object]
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            feed = partial(faulthandler.dump_traceback_later, WATCHDOG, exit=True, file=2)
            feed()
            yield feed
            faulthandler.cancel_dump_traceback_later()
            return

        def bark(*_: object) -> None:
            raise TimeoutError(f"the test has not ended within {WATCHDOG:g} s")

        before = signal.signal(signal.SIGALRM, bark)
        feed = partial(signal.setitimer, signal.ITIMER_REAL, WATCHDOG)
        feed()
        try:
            yield feed
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @pytest.fixture
    def poller(self) -> Iterator[Any]:
        with closing(self.make_poller()) as poller:
            yield poller

    @pytest.fixture
    def another(self) -> Iterator[Any]:
        """A second poller."""
        with closing(self.make_poller()) as poller:
            yield poller

    @pytest.fixture
    def stack(self) -> Iterator[ExitStack]:
        with ExitStack() as stack:
            yield stack

    @pytest.fixture
    def pair(self, stack: ExitStack) -> Pair:
        return unix_pair(stack)

    # Keys and sources

    @pytest.mark.parametrize("key", [None, 0, "text", ["unhashable"], {}, float("nan")], ids=repr)
    def test_any_object_is_a_key_and_comes_back_itself(self, poller: Poller[Any], pair: Pair, key: object) -> None:
        poller.register(pair[0], WRITE, key=key)
        got, events = only(poller)
        assert got is key
        assert events == WRITE

    def test_the_key_is_the_source_unless_given(self, poller: Poller[Any], stack: ExitStack) -> None:
        sources: list[Any] = [idle(stack), idle(stack).fileno(), Wrapped(idle(stack))]
        for source in sources:
            poller.register(source, WRITE)
        assert {id(key) for key, _ in batch_of(poller, 3)} == {id(source) for source in sources}

    def test_sources_may_share_a_key(self, poller: Poller[Any], stack: ExitStack) -> None:
        for _ in range(2):
            poller.register(unix_pair(stack)[0], WRITE, key="same")
        assert batch_of(poller, 2) == [("same", WRITE)] * 2

    def test_modify_keeps_the_key(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")
        poller.modify(pair[0], WRITE)
        assert only(poller) == ("key", WRITE)

    @pytest.mark.parametrize("key", [None, "new"])
    def test_modify_changes_the_key_if_one_is_given(self, poller: Poller[Any], pair: Pair, key: object) -> None:
        poller.register(pair[0], WRITE, key="old")
        assert only(poller) == ("old", WRITE)
        poller.modify(pair[0], WRITE, key=key)
        assert only(poller) == (key, WRITE)

    def test_a_source_is_known_by_its_number(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")
        assert pair[0].fileno() in poller
        assert Wrapped(pair[0]) in poller
        poller.modify(pair[0].fileno(), WRITE)
        assert only(poller) == ("key", WRITE)
        poller.unregister(Wrapped(pair[0]))
        assert pair[0] not in poller

    def test_source_and_key_are_kept_alive(self, poller: Poller[Any], pair: Pair) -> None:
        source, key = Wrapped(pair[0]), Wrapped(pair[0])
        alive = weakref.ref(source), weakref.ref(key)
        poller.register(source, WRITE, key=key)
        del source, key
        gc.collect()
        assert only(poller)[0] is alive[1]()
        assert poller.registrations()[0].source is alive[0]()

    def test_the_key_is_let_go_with_the_poll_after_unregister(self, poller: Poller[Any], pair: Pair) -> None:
        key = Wrapped(pair[0])
        alive = weakref.ref(key)
        poller.register(pair[0], WRITE, key=key)
        del key
        batch = poller.poll(DEADLINE)
        poller.unregister(pair[0])
        assert batch == [(alive(), 0)]
        del batch
        poller.poll(0)
        gc.collect()
        assert alive() is None

    def test_the_key_is_let_go_as_soon_as_the_next_poll_begins(self, poller: Poller[Any], pair: Pair) -> None:
        key = Wrapped(pair[0])
        alive = weakref.ref(key)
        poller.register(pair[0], WRITE, key=key)
        del key
        assert only(poller)[0] is alive()
        poller.unregister(pair[0])
        with waiting(poller) as wait:
            until(lambda: (gc.collect(), alive())[1] is None)
            poller.wake()
            assert wait.result() == []

    def test_many_sources_are_watched_at_once(self, poller: Poller[Any], stack: ExitStack) -> None:
        pairs = [unix_pair(stack) for _ in range(100)]
        for number, (ours, _) in enumerate(pairs):
            poller.register(ours, READ, key=number)
        assert poller.poll(0) == []
        for _, theirs in pairs:
            theirs.send(b"x")
        assert sorted(batch_of(poller, 100)) == [(number, READ) for number in range(100)]

    # Bits

    @pytest.mark.parametrize(
        ("situation", "asked"),
        [(situation, asked) for situation in SITUATIONS for asked in situation.asks],
        ids=lambda value: value.name if isinstance(value, Situation) else describe(value),
    )
    def test_a_situation_is_reported_as_listed(
        self, poller: Poller[Any], stack: ExitStack, situation: Situation, asked: int
    ) -> None:
        needs(poller, asked)
        directions = asked & (READ | WRITE)
        hints = ANY_HINT if asked & READ else ERROR | HANGUP
        tells = situation.tells & hints
        must = situation.must & asked | tells & self.tells
        may = (situation.must | situation.may) & (asked | hints) | tells
        if may & (ERROR | HANGUP):
            may |= directions
        poller.register(situation.make(stack), asked)
        events = until_has(poller, must) if must else sum(bits for _, bits in poller.poll(0))
        assert describe(events & ~may) == "0"
        if events & (ERROR | HANGUP):
            assert describe(events & directions) == describe(directions)

    def test_readiness_is_reported_for_as_long_as_it_lasts(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ)
        pair[1].send(b"xy")
        for _ in range(2):
            assert only(poller) == (pair[0], READ)
            pair[0].recv(1)
        assert until_silent(poller) == []

    def test_a_source_that_can_be_read_and_written_is_one_entry(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ | WRITE)
        pair[1].send(b"x")
        assert until_has(poller, READ) == READ | WRITE

    def test_what_cannot_take_a_byte_is_not_writable(self, poller: Poller[Any], pair: Pair) -> None:
        ours, theirs = pair
        poller.register(ours, WRITE)
        while poller.poll(0):  # TCP moves some of it to the peer, and takes more then
            with suppress(BlockingIOError):
                while ours.send(bytes(65536)):
                    pass
        assert until_silent(poller) == []
        with suppress(BlockingIOError):
            while theirs.recv(65536):
                pass
        assert only(poller) == (ours, WRITE)

    def test_modify_changes_what_is_reported(self, poller: Poller[Any], pair: Pair) -> None:
        pair[1].send(b"x")
        poller.register(pair[0], READ)
        assert only(poller) == (pair[0], READ)
        for asked in (WRITE, READ, READ | WRITE):
            poller.modify(pair[0], asked)
            assert until_has(poller, asked) == asked

    def test_what_is_unregistered_is_not_reported(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ | WRITE)
        assert only(poller)
        poller.unregister(pair[0])
        assert until_silent(poller) == []

    def test_read_closed_may_be_spelled_out_beside_read(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ | READ_CLOSED)
        pair[1].shutdown(socket.SHUT_WR)
        assert until_has(poller, READ) in (READ, READ | READ_CLOSED)

    def test_data_sent_before_a_half_close_can_be_read(self, poller: Poller[Any], stack: ExitStack) -> None:
        """kqueue's EV_EOF comes with data still buffered."""
        ours = half_closed(tcp_pair, b"last words", stack)
        poller.register(ours, READ)
        received = [b"?"]
        while received[-1]:
            assert only(poller)[1] & READ
            received.append(ours.recv(4))
        assert b"".join(received) == b"?last words"

    def test_after_a_reset_the_next_recv_raises(self, poller: Poller[Any], stack: ExitStack) -> None:
        ours = reset_by_peer(stack)
        poller.register(ours, READ)
        assert only(poller)[1] & READ
        if on_wine():
            pytest.skip("Wine 8.0 receives b'' where Windows raises ConnectionResetError")
        with pytest.raises(ConnectionResetError):
            ours.recv(1)

    def test_so_error_says_how_a_connect_ended(self, poller: Poller[Any], stack: ExitStack) -> None:
        for sock, outcome in ((connected(stack), 0), (refused_by_peer(stack), errno.ECONNREFUSED)):
            poller.register(sock, WRITE)
            assert only(poller)[1] & WRITE
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == outcome
            poller.unregister(sock)

    def test_a_hang_up_of_a_fresh_socket_is_no_failure(self, poller: Poller[Any], stack: ExitStack) -> None:
        """Linux says EPOLLHUP of a socket that is not connected yet; the recv that follows says ENOTCONN."""
        sock = fresh(stack)
        poller.register(sock, READ | WRITE)
        poller.poll(0)
        with pytest.raises(OSError) as caught:
            sock.recv(1)
        assert caught.value.errno in (errno.ENOTCONN, getattr(errno, "WSAENOTCONN", errno.ENOTCONN))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        with suppress(BlockingIOError):
            sock.connect(listener.getsockname())
        peer = stack.enter_context(listener.accept()[0])
        poller.modify(sock, READ)
        assert until_silent(poller) == []
        peer.send(b"x")
        assert only(poller) == (sock, READ)

    def test_pipes_are_watched(self, poller: Poller[Any], stack: ExitStack) -> None:
        reader, writer = pipe(stack)
        poller.register(reader, READ)
        poller.register(writer, WRITE)
        assert only(poller) == (writer, WRITE)
        writer.write(b"x")
        assert set(batch_of(poller, 2)) == {(reader, READ), (writer, WRITE)}

    # Interest 0

    def test_without_interest_readiness_is_not_reported(self, poller: Poller[Any], pair: Pair) -> None:
        pair[1].send(b"x")
        poller.register(pair[0], 0)
        assert until_silent(poller) == []
        poller.modify(pair[0], READ)
        assert only(poller) == (pair[0], READ)
        poller.modify(pair[0], 0)
        assert until_silent(poller) == []
        assert len(poller) == 1

    @pytest.mark.parametrize("asked", [0, PRIORITY], ids=describe)
    @pytest.mark.parametrize("early", [True, False], ids=["before register", "after register"])
    @pytest.mark.parametrize("name", ["both halves shut", "both halves shut (pair)", "reset", "peer half-closed"])
    def test_without_interest_errors_and_hang_ups_come_once(
        self, poller: Poller[Any], another: Poller[Any], stack: ExitStack, name: str, early: bool, asked: int
    ) -> None:
        """epoll and poll report ERR and HUP at every call, interest or not (epoll_ctl(2), poll(2))."""
        needs(poller, asked)
        ours, theirs = tcp_pair(stack)
        if not early:
            poller.register(ours, asked, key="key")
            assert until_silent(poller) == []
        if name == "reset":
            reset(theirs)
        else:
            theirs.shutdown(socket.SHUT_WR)
        if name.startswith("both"):
            ours.shutdown(socket.SHUT_WR)
        another.register(ours, READ)
        until_has(another, READ)
        if early:
            poller.register(ours, asked, key="key")
        (situation,) = (situation for situation in SITUATIONS if situation.name == name)
        expected = situation.tells & (ERROR | HANGUP)
        said = 0
        for key, events in until_silent(poller):
            assert key == "key"
            assert events
            assert not events & (said | ~expected), "once each, and nothing else"
            said |= events
        assert said & self.tells == expected & self.tells
        poller.modify(ours, READ)
        assert only(poller)[1] & READ

    # Modes

    @pytest.mark.parametrize("mode", [PRIORITY, EDGE, ONESHOT, EXCLUSIVE, EDGE | ONESHOT], ids=describe)
    def test_supports_tells_what_is_accepted(self, poller: Poller[Any], stack: ExitStack, mode: int) -> None:
        ours, theirs = unix_pair(stack)
        plain = unix_pair(stack)[0]
        poller.register(plain, WRITE, key="plain")
        if poller.supports(READ | mode):
            poller.register(ours, READ | mode, key="key")
            assert len(poller) == 2
            theirs.send(b"x")
            assert ("key", READ) in batch_of(poller, 2)
            return
        with refused(poller, io.UnsupportedOperation):
            poller.register(ours, READ | mode)
        with refused(poller, io.UnsupportedOperation):
            poller.modify(plain, READ | mode)
        assert only(poller) == ("plain", WRITE)

    def test_interest_and_oneshot_are_supported_everywhere(self, poller: Poller[Any]) -> None:
        for interest in (0, READ, WRITE, READ | WRITE):
            assert poller.supports(interest)
            assert poller.supports(interest | ONESHOT)

    @pytest.mark.parametrize("events", SENSELESS, ids=hex)
    def test_what_makes_no_sense_is_not_supported(self, poller: Poller[Any], events: int) -> None:
        assert not poller.supports(events)

    def test_edge_is_reported_once_a_change(self, poller: Poller[Any], pair: Pair) -> None:
        needs(poller, READ | EDGE)
        poller.register(pair[0], READ | EDGE)
        for _ in range(2):
            pair[1].send(b"x")
            assert only(poller) == (pair[0], READ)
            assert until_silent(poller) == []

    def test_edge_reports_what_holds_already(self, poller: Poller[Any], pair: Pair) -> None:
        needs(poller, READ | EDGE)
        pair[1].send(b"x")
        poller.register(pair[0], READ | EDGE)
        assert until_silent(poller) == [(pair[0], READ)]
        poller.modify(pair[0], READ | EDGE)
        assert until_silent(poller) == [(pair[0], READ)]

    @pytest.mark.parametrize("mode", [EDGE, ONESHOT], ids=describe)
    def test_what_is_reported_once_is_not_lost_beyond_max_events(
        self, poller: Poller[Any], stack: ExitStack, mode: int
    ) -> None:
        needs(poller, READ | mode)
        for number in range(7):
            poller.register(readable(stack), READ | mode, key=number)
        said: Entries = []
        for _ in range(7):
            said += poller.poll(DEADLINE, max_events=1)
        assert sorted(said) == [(number, READ) for number in range(7)]
        assert until_silent(poller) == []

    def test_oneshot_rests_until_modify(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ | ONESHOT, key="key")
        assert until_silent(poller) == []
        pair[1].send(b"x")
        for _ in range(2):
            assert until_silent(poller) == [("key", READ)]
            pair[1].send(b"x")
            assert until_silent(poller) == []
            assert len(poller) == 1
            poller.modify(pair[0], READ | ONESHOT)
        poller.modify(pair[0], READ)
        assert [only(poller) for _ in range(3)] == [("key", READ)] * 3

    @pytest.mark.parametrize("mode", [EDGE, ONESHOT], ids=describe)
    def test_modify_changes_the_mode(self, poller: Poller[Any], stack: ExitStack, mode: int) -> None:
        needs(poller, READ | mode)
        source = readable(stack)
        poller.register(source, READ)
        for _ in range(2):
            assert [only(poller) for _ in range(2)] == [(source, READ)] * 2
            poller.modify(source, READ | mode)
            assert until_silent(poller) == [(source, READ)]
            poller.modify(source, READ)

    def test_oneshot_is_one_shot_for_both_directions(self, poller: Poller[Any], pair: Pair) -> None:
        """kqueue's filters would fire one after the other."""
        poller.register(pair[0], READ | WRITE | ONESHOT)
        assert only(poller) == (pair[0], WRITE)
        pair[1].send(b"x")
        assert until_silent(poller) == []
        poller.modify(pair[0], READ | WRITE | ONESHOT)
        assert until_silent(poller) == [(pair[0], READ | WRITE)]

    def test_oneshot_that_fired_says_nothing_of_the_end(self, poller: Poller[Any], stack: ExitStack) -> None:
        ours, theirs = tcp_pair(stack)
        poller.register(ours, WRITE | ONESHOT)
        assert only(poller) == (ours, WRITE)
        reset(theirs)
        assert until_silent(poller) == []
        poller.modify(ours, READ | ONESHOT)
        assert only(poller)[1] & READ
        assert until_silent(poller) == []

    def test_oneshot_that_fired_can_be_unregistered_and_registered(self, poller: Poller[Any], pair: Pair) -> None:
        """A kqueue filter that fired is gone; deleting it gives ENOENT."""
        for _ in range(2):
            poller.register(pair[0], READ | WRITE | ONESHOT)
            assert only(poller) == (pair[0], WRITE)
            poller.unregister(pair[0])
        assert len(poller) == 0

    def test_exclusive_cannot_be_modified(self, poller: Poller[Any], pair: Pair) -> None:
        """epoll_ctl(2): EINVAL."""
        needs(poller, READ | EXCLUSIVE)
        poller.register(pair[0], READ | EXCLUSIVE, key="key")
        with refused(poller, io.UnsupportedOperation):
            poller.modify(pair[0], READ)
        with refused(poller, io.UnsupportedOperation):
            poller.modify(pair[0], READ | EXCLUSIVE)
        pair[1].send(b"x")
        assert only(poller) == ("key", READ)

    def test_exclusive_cannot_be_had_by_modify(self, poller: Poller[Any], pair: Pair) -> None:
        needs(poller, READ | EXCLUSIVE)
        poller.register(pair[0], READ)
        with refused(poller, io.UnsupportedOperation):
            poller.modify(pair[0], READ | EXCLUSIVE)

    def test_exclusive_wakes_at_least_one(self, poller: Poller[Any], another: Poller[Any], stack: ExitStack) -> None:
        needs(poller, READ | EXCLUSIVE)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for each in (poller, another):
            each.register(listener, READ | EXCLUSIVE, key="peer")
        with waiting(poller) as one, waiting(another) as other:
            stack.enter_context(socket.create_connection(listener.getsockname()))
            until(lambda: not (one.is_alive() and other.is_alive()))
            for each in (poller, another):
                each.wake()
            assert ("peer", READ) in one.result() + other.result()

    def test_urgent_data_is_priority_and_nothing_else(self, poller: Poller[Any], stack: ExitStack) -> None:
        needs(poller, READ | PRIORITY)
        ours, theirs = tcp_pair(stack)
        poller.register(ours, READ | PRIORITY)
        theirs.send(b"!", socket.MSG_OOB)
        for _ in range(2):  # for as long as it waits
            assert only(poller) == (ours, PRIORITY)
        theirs.send(b"x")
        assert until_has(poller, READ) & ~PRIORITY == READ
        assert ours.recv(1, socket.MSG_OOB) == b"!"

    def test_urgent_data_is_not_reported_unless_asked_for(
        self, poller: Poller[Any], another: Poller[Any], stack: ExitStack
    ) -> None:
        needs(another, PRIORITY)
        ours, theirs = tcp_pair(stack)
        poller.register(ours, READ | WRITE)
        another.register(ours, PRIORITY)
        theirs.send(b"!", socket.MSG_OOB)
        assert only(another) == (ours, PRIORITY)
        assert only(poller) == (ours, WRITE)

    # Batches

    @pytest.mark.parametrize("timeout", [None, 0, DEADLINE])
    def test_max_events_caps_a_list(self, poller: Poller[Any], stack: ExitStack, timeout: float | None) -> None:
        for _ in range(5):
            poller.register(readable(stack), READ | WRITE)
        assert len(batch_of(poller, 5)) == 5
        for cap in range(1, 6):  # kqueue counts filters, so there may be fewer
            assert 1 <= len(poller.poll(timeout, max_events=cap)) <= cap
        assert len(poller.poll(timeout, max_events=10)) == 5

    @pytest.mark.parametrize("cap", [1, 2, 3])
    def test_beyond_max_events_all_get_their_turn(self, poller: Poller[Any], stack: ExitStack, cap: int) -> None:
        """max_events counts entries, though kqueue counts filters."""
        for number in range(7):
            poller.register(readable(stack), READ | WRITE, key=number)
        missing = set(range(7))
        for _ in range(7 * 7):
            missing -= {key for key, _ in poller.poll(DEADLINE, max_events=cap)}
        assert not missing

    def test_max_events_caps_what_was_closed_as_well(self, poller: Poller[Any], stack: ExitStack) -> None:
        sources = [readable(stack) for _ in range(3)]
        for source in sources:
            poller.register(source, READ)
            source.close()
        for _ in sources:
            assert len(poller.poll(0, max_events=1)) <= 1
        assert poller.poll(0) == []

    @pytest.mark.parametrize("cap", [0, -1])
    def test_max_events_below_one_is_a_value_error(self, poller: Poller[Any], pair: Pair, cap: int) -> None:
        poller.register(pair[0], WRITE)
        with refused(poller, ValueError):
            poller.poll(0, max_events=cap)
        assert only(poller) == (pair[0], WRITE)

    def test_the_entry_of_what_was_unregistered_reads_nothing(self, poller: Poller[Any], stack: ExitStack) -> None:
        sources = [readable(stack) for _ in range(4)]
        for source in sources:
            poller.register(source, READ | WRITE)
        handled = []
        for key, events in batch_of(poller, 4):
            if events:
                handled.append(key)
                for source in sources:
                    if source is not key and source in poller:
                        poller.unregister(source)
            else:
                assert key not in poller
        assert len(handled) == 1

    def test_the_entry_of_what_was_replaced_reads_nothing(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], WRITE, key="old")
        batch = poller.poll(DEADLINE)
        poller.unregister(pair[0])
        poller.register(pair[0], WRITE, key="new")
        assert batch == [("old", 0)]
        assert only(poller) == ("new", WRITE)

    def test_the_entry_of_what_was_taken_over_reads_nothing(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        poller.register(pair[0], WRITE, key="old")
        batch = poller.poll(DEADLINE)
        number = pair[0].fileno()
        pair[0].close()
        ours, _ = take_number(number, stack)
        poller.register(ours, WRITE, key="new")
        assert batch == [("old", 0)]
        assert only(poller) == ("new", WRITE)

    def test_an_entry_stays_its_owners_when_the_number_has_come_and_gone_again(
        self, poller: Poller[Any], pair: Pair
    ) -> None:
        poller.register(pair[0], WRITE, key="old")
        batch = poller.poll(DEADLINE)
        poller.unregister(pair[0])
        poller.register(pair[0], READ, key="new")
        poller.unregister(pair[0])
        assert batch == [("old", 0)]

    def test_one_batch_two_owners(self, poller: Poller[Any], stack: ExitStack) -> None:
        """A handler closes a later source of its batch, and a new one takes the number."""
        sources = {name: readable(stack) for name in ("one", "two")}
        for name, source in sources.items():
            poller.register(source, READ, key=name)
        batch = batch_of(poller, 2)
        first, later = (key for key, _ in batch)
        number = sources[later].fileno()
        poller.unregister(sources[later])
        sources[later].close()
        ours, theirs = take_number(number, stack)
        poller.register(ours, READ, key="new")
        assert batch == [(first, READ), (later, 0)]
        poller.unregister(sources[first])
        assert until_silent(poller) == []
        theirs.send(b"x")
        assert only(poller) == ("new", READ)

    def test_the_entry_of_what_was_modified_shows_what_is_still_asked_for(
        self, poller: Poller[Any], stack: ExitStack
    ) -> None:
        source = readable(stack)
        poller.register(source, READ | WRITE, key="old")
        until_has(poller, READ | WRITE)
        batch = poller.poll(DEADLINE)
        poller.modify(source, READ)
        assert batch == [("old", READ)]
        poller.modify(source, WRITE, key="new")
        assert batch == [("new", 0)]

    def test_only_the_last_list_follows_changes(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], WRITE)
        before, last = poller.poll(DEADLINE), poller.poll(DEADLINE)
        poller.unregister(pair[0])
        assert before == [(pair[0], WRITE)]
        assert last == [(pair[0], 0)]

    # Ownership

    def test_a_taken_number_is_a_key_error(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="first")
        for source in (pair[0], pair[0].fileno(), Wrapped(pair[0])):
            with refused(poller, KeyError):
                poller.register(source, WRITE, key="second")
        pair[1].send(b"x")
        assert only(poller) == ("first", READ)

    def test_closing_a_source_disturbs_no_other(self, poller: Poller[Any], stack: ExitStack) -> None:
        """select fails as a whole for one closed descriptor, poll says POLLNVAL for ever, epoll and kqueue nothing."""
        gone, (ours, theirs) = readable(stack), unix_pair(stack)
        poller.register(gone, READ, key="gone")
        poller.register(ours, READ, key="ours")
        gone.close()
        said = until_silent(poller)
        assert [key for key, _ in said] in ([], ["gone"])
        assert all(events & ERROR for _, events in said)
        theirs.send(b"x")
        assert only(poller) == ("ours", READ)
        assert len(poller) == 2
        assert gone in poller

    @each_mode
    @pytest.mark.parametrize("dup", [False, True], ids=["closed", "dup kept"])
    @pytest.mark.parametrize("as_number", [False, True], ids=["socket", "number"])
    def test_unregister_after_close_works(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack, mode: int, dup: bool, as_number: bool
    ) -> None:
        """epoll watches files: a dup keeps one in it, under a number that is closed (epoll(7), questions)."""
        needs(poller, READ | mode)
        source = pair[0].fileno() if as_number else pair[0]
        for polls in (0, 3):
            poller.register(source, READ | mode, key="key")
            if dup:
                stack.enter_context(pair[0].dup())
                pair[1].send(b"x")
            number = pair[0].fileno()
            pair[0].close()
            said = [entry for _ in range(polls) for entry in poller.poll(0)]
            # The facility tells that it is closed, once; or goes on to tell what the file does; or says nothing.
            assert said in ([("key", READ | ERROR)], [("key", READ)] * len(said))
            poller.unregister(source)
            assert len(poller) == 0
            assert source not in poller
            assert until_silent(poller) == []
            with refused(poller, KeyError):
                poller.unregister(source)
            pair = take_number(number, stack)
            source = number if as_number else pair[0]

    def test_what_is_closed_stays_listed(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")
        number = pair[0].fileno()
        pair[0].close()
        until_silent(poller)
        assert poller.registrations() == [(pair[0], number, READ, "key")]

    def test_a_stranger_under_the_number_is_not_the_owner(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        poller.register(pair[0], READ, key="owner")
        number = pair[0].fileno()
        pair[0].close()
        stranger, _ = take_number(number, stack)
        assert stranger not in poller
        with refused(poller, OSError) as caught:
            poller.modify(pair[0], WRITE)
        assert_closed_descriptor(caught.value)
        assert until_silent(poller) == []
        with refused(poller, KeyError):
            poller.modify(stranger, WRITE)
        with refused(poller, KeyError):
            poller.unregister(stranger)
        poller.unregister(pair[0])
        assert len(poller) == 0

    @each_mode
    @pytest.mark.parametrize("dup", [False, True], ids=["closed", "dup kept"])
    @pytest.mark.parametrize("unregistered", [True, False], ids=["unregistered", "still listed"])
    def test_the_new_owner_of_a_number_gets_no_event_of_the_old_one(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack, mode: int, dup: bool, unregistered: bool
    ) -> None:
        needs(poller, READ | mode)
        old, peer = pair
        poller.register(old, READ | mode, key="old")
        number = old.fileno()
        if dup:
            stack.enter_context(old.dup())
        old.close()
        if unregistered:
            poller.unregister(old)
        ours, theirs = take_number(number, stack)
        poller.register(ours, READ | mode, key="new")
        assert old not in poller
        assert len(poller) == 1
        if dup:
            peer.send(b"x")
        assert until_silent(poller) == []
        theirs.send(b"x")
        assert only(poller) == ("new", READ)
        ours.recv(1)
        if dup:
            peer.send(b"x")
        assert until_silent(poller) == []
        poller.unregister(ours)
        assert len(poller) == 0

    def test_a_number_is_one_entry_though_its_old_file_is_ready_as_well(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        """epoll reports both, and under the same number."""
        ours, theirs = take_number(leave_behind(poller, pair[0], stack), stack)
        poller.register(ours, READ, key="new")
        for sock in (pair[1], theirs):
            sock.send(b"x")
        assert poller.poll(DEADLINE) == [("new", READ)]

    def test_the_new_owner_of_a_number_is_told_nothing_that_it_did_not_ask_for(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        """epoll adds up what it reports of the old file and of the new one."""
        ours, theirs = take_number(leave_behind(poller, pair[0], stack), stack)
        theirs.shutdown(socket.SHUT_WR)
        pair[1].close()
        poller.register(ours, WRITE, key="new")
        assert only(poller) == ("new", WRITE)

    def test_a_file_that_outlived_its_owner_takes_nobodys_place(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        leave_behind(poller, pair[0], stack)
        pair[1].send(b"x")
        poller.register(unix_pair(stack)[0], WRITE, key="ready")
        assert poller.poll(0, max_events=1) == [("ready", WRITE)]

    def test_a_taken_number_that_cannot_be_told_free_is_a_key_error(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        """A bare number cannot say whether it was closed meanwhile. epoll knows: it accepts a new file only."""
        number = pair[0].fileno()
        poller.register(number, READ, key="old")
        pair[0].close()
        ours, theirs = take_number(number, stack)
        try:
            poller.register(ours, READ, key="new")
        except KeyError:
            poller.unregister(number)
            poller.register(ours, READ, key="new")
        theirs.send(b"x")
        assert only(poller) == ("new", READ)
        assert len(poller) == 1

    def test_a_refused_new_owner_changes_nothing(self, poller: Poller[Any], pair: Pair, stack: ExitStack) -> None:
        poller.register(pair[0], READ, key="old")
        number = pair[0].fileno()
        pair[0].close()
        ours, theirs = take_number(number, stack)
        with refused(poller, ValueError):
            poller.register(ours, HANGUP, key="new")
        poller.unregister(pair[0])
        poller.register(ours, READ, key="new")
        theirs.send(b"x")
        assert only(poller) == ("new", READ)

    def test_others_survive_a_dup_that_keeps_a_closed_source_alive(
        self, poller: Poller[Any], pair: Pair, stack: ExitStack
    ) -> None:
        """Modes and states are kept: what was said once, by a one-shot or without interest, is not said again."""
        fired, (ours, theirs) = readable(stack), unix_pair(stack)
        poller.register(fired, READ | ONESHOT, key="fired")
        assert only(poller) == ("fired", READ)
        for asked in filter(poller.supports, (0, PRIORITY)):
            poller.register(both_shut(unix_pair, stack), asked, key="hung up")
        assert {key for key, _ in until_silent(poller)} <= {"hung up"}
        poller.register(ours, READ | ONESHOT, key="armed")
        poller.register(pair[0], READ, key="gone")
        stack.enter_context(pair[0].dup())
        pair[0].close()
        pair[1].send(b"x")
        poller.unregister(pair[0])
        assert until_silent(poller) == []
        theirs.send(b"x")
        assert until_silent(poller) == [("armed", READ)]
        poller.modify(fired, READ)
        assert only(poller) == ("fired", READ)
        poller.modify(fired, 0)
        poller.wake()
        assert poller.poll() == []

    def test_a_dup_is_a_source_of_its_own(self, poller: Poller[Any], pair: Pair, stack: ExitStack) -> None:
        dup = stack.enter_context(pair[0].dup())
        poller.register(pair[0], READ, key="one")
        poller.register(dup, READ, key="two")
        pair[1].send(b"x")
        assert sorted(batch_of(poller, 2)) == [("one", READ), ("two", READ)]
        poller.unregister(pair[0])
        pair[0].close()
        assert only(poller) == ("two", READ)

    # Several pollers

    def test_pollers_share_a_source(self, poller: Poller[Any], another: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="one")
        another.register(pair[0], READ | ONESHOT, key="another")
        pair[1].send(b"x")
        assert only(poller) == ("one", READ)
        assert only(another) == ("another", READ)
        another.unregister(pair[0])
        assert only(poller) == ("one", READ)

    def test_a_wake_up_is_for_one_poller(self, poller: Poller[Any], another: Poller[Any]) -> None:
        another.wake()
        assert until_silent(poller) == []
        assert another.poll() == []

    def test_a_poller_is_a_source_of_another(self, poller: Poller[Any], another: Poller[Any], pair: Pair) -> None:
        try:
            poller.fileno()
        except io.UnsupportedOperation:
            pytest.skip(f"the {poller.backend} backend has no descriptor")
        poller.register(pair[0], READ, key="inner")
        another.register(poller, READ, key="outer")
        if not DARWIN:  # a nested kqueue reads as ready at once there
            assert until_silent(another) == []
        pair[1].send(b"x")
        assert only(another) == ("outer", READ)
        assert only(poller) == ("inner", READ)
        pair[0].recv(1)
        if not DARWIN:
            assert poller.poll(0) == []
            assert until_silent(another) == []

    # Fork

    @each_method
    def test_a_forked_child_is_refused(
        self, poller: Poller[Any], pair: Pair, call: Callable[[Poller[Any], Any], object]
    ) -> None:
        poller.register(pair[0], READ, key="key")

        def child() -> None:
            with pytest.raises(RuntimeError):
                call(poller, pair[0])

        assert in_child(child) == ""
        pair[1].send(b"x")
        assert only(poller) == ("key", READ)

    def test_closing_in_a_forked_child_does_not_disturb_the_parent(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")

        def child() -> None:
            for _ in range(2):
                poller.close()
                assert poller.closed

        assert in_child(child) == ""
        assert not poller.closed
        assert until_silent(poller) == []
        pair[1].send(b"x")
        assert only(poller) == ("key", READ)

    def test_a_forked_child_takes_no_wake_up(self, poller: Poller[Any]) -> None:
        poller.wake()
        assert in_child(poller.close) == ""
        assert poller.poll() == []

    def test_a_forked_child_makes_a_poller_of_its_own(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="parent")

        def child() -> None:
            with closing(self.make_poller()) as fresh:
                fresh.register(pair[0], READ, key="child")
                pair[1].send(b"x")
                assert only(fresh) == ("child", READ)

        assert in_child(child) == ""
        assert only(poller) == ("parent", READ)

    def test_a_fork_does_not_disturb_a_waiting_thread(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")

        def child() -> None:
            with pytest.raises(RuntimeError):
                poller.poll(0)
            poller.close()

        with waiting(poller) as wait:
            assert in_child(child) == ""
            pair[1].send(b"x")
            assert wait.result() == [("key", READ)]

    # Threads

    @each_mode
    def test_a_wait_under_way_sees_what_is_registered(self, poller: Poller[Any], stack: ExitStack, mode: int) -> None:
        """poll and select look at their set when a call begins, so another thread's change must interrupt it."""
        needs(poller, READ | mode)
        for pause in PAUSES:
            source = readable(stack)
            with waiting(poller, pause=pause) as wait:
                poller.register(source, READ | mode, key="key")
                assert wait.result() == [("key", READ)]
            poller.unregister(source)

    @each_mode
    def test_a_wait_under_way_sees_what_is_modified(self, poller: Poller[Any], stack: ExitStack, mode: int) -> None:
        needs(poller, READ | mode)
        for pause in PAUSES:
            source = readable(stack)
            poller.register(source, 0, key="old")
            with waiting(poller, pause=pause) as wait:
                poller.modify(source, READ | mode, key="new")
                assert wait.result() == [("new", READ)]
            poller.unregister(source)

    def test_a_wait_under_way_sees_a_oneshot_armed_again(self, poller: Poller[Any], stack: ExitStack) -> None:
        source = readable(stack)
        poller.register(source, READ | ONESHOT)
        assert only(poller) == (source, READ)
        for pause in PAUSES:
            with waiting(poller, pause=pause) as wait:
                poller.modify(source, READ | ONESHOT)
                assert wait.result() == [(source, READ)]

    def test_a_wait_under_way_sees_what_is_unregistered(self, poller: Poller[Any], stack: ExitStack) -> None:
        for pause in PAUSES:
            ours, theirs = unix_pair(stack)
            poller.register(ours, READ)
            with waiting(poller, pause=pause) as wait:
                poller.unregister(ours)
                theirs.send(b"x")
                poller.wake()
                assert wait.result() == []

    def test_a_wait_under_way_lets_go_of_what_was_unregistered(self, poller: Poller[Any], stack: ExitStack) -> None:
        """poll(2) and select(2) keep a file open for as long as they wait for it, and its peer sees no end."""
        for pause in PAUSES:
            ours, theirs = unix_pair(stack)
            poller.register(ours, READ)
            with waiting(poller, pause=pause) as wait:
                poller.unregister(ours)
                ours.close()
                theirs.settimeout(DEADLINE)
                assert theirs.recv(1) == b""
                poller.wake()
                assert wait.result() == []

    def test_an_event_that_meets_its_unregister_reads_nothing(self, poller: Poller[Any], stack: ExitStack) -> None:
        """Whichever of the two comes first, once both calls are over the list shows no event."""
        for _ in range(50):
            ours, theirs = unix_pair(stack)
            poller.register(ours, READ, key="key")
            with waiting(poller) as wait:
                theirs.send(b"x")
                poller.unregister(ours)
                poller.wake()
                assert wait.result() in ([], [("key", 0)])
            poller.poll(0)  # takes the wake-up, if the event came first

    def test_a_wait_under_way_sees_what_is_asked_for_no_more(self, poller: Poller[Any], stack: ExitStack) -> None:
        for pause in PAUSES:
            ours, theirs = unix_pair(stack)
            poller.register(ours, READ)
            with waiting(poller, pause=pause) as wait:
                poller.modify(ours, 0)
                theirs.send(b"x")
                poller.wake()
                assert wait.result() == []

    def test_a_wait_under_way_sees_the_new_owner_of_a_number(self, poller: Poller[Any], stack: ExitStack) -> None:
        for pause in PAUSES:
            old, _ = unix_pair(stack)
            number = old.fileno()
            poller.register(old, READ, key="old")
            with waiting(poller, pause=pause) as wait:
                poller.unregister(old)
                old.close()
                ours, theirs = take_number(number, stack)
                poller.register(ours, READ, key="new")
                theirs.send(b"x")
                assert wait.result() == [("new", READ)]
            poller.unregister(ours)

    def test_a_wait_under_way_survives_the_close_of_a_source(self, poller: Poller[Any], stack: ExitStack) -> None:
        gone, (ours, theirs) = unix_pair(stack)[0], unix_pair(stack)
        poller.register(gone, READ, key="gone")
        poller.register(ours, READ, key="ours")
        with waiting(poller) as wait:
            gone.close()
            poller.unregister(gone)
            theirs.send(b"x")
            told = wait.result()
            if told == [("gone", 0)]:  # the facility told of the close at once, and that ended the wait
                told = poller.poll(DEADLINE)
            assert told == [("ours", READ)]

    def test_changes_do_not_end_a_wait(self, poller: Poller[Any], stack: ExitStack) -> None:
        """A backend may have to interrupt its facility; the user must not see that."""
        source, over, changes = idle(stack), threading.Event(), 0
        poller.wake()
        assert poller.poll() == []  # and so it is spent

        def change() -> None:
            nonlocal changes
            while not over.is_set():
                poller.register(source, READ)
                poller.modify(source, 0)
                poller.unregister(source)
                changes += 1

        thread = Background(change)
        try:
            until(lambda: changes)
            end = time.monotonic() + 4 * REST
            assert poller.poll(4 * REST) == []
            assert time.monotonic() >= end
        finally:
            over.set()
            thread.result()
        assert until_silent(poller) == []

    def test_changes_from_many_threads_at_once(self, poller: Poller[Any], stack: ExitStack) -> None:
        def change(source: socket.socket) -> None:
            for _ in range(50):
                poller.register(source, READ, key="never")
                poller.modify(source, READ | WRITE, key="now and then")
                assert source in poller
                poller.unregister(source)

        poller.register(readable(stack), READ, key="always")
        threads = [Background(partial(change, idle(stack))) for _ in range(4)]
        while any(thread.is_alive() for thread in threads):
            said = poller.poll(DEADLINE)
            # (key, 0): it was unregistered since.
            assert all(entry in (("always", READ), ("now and then", WRITE)) or not entry[1] for entry in said)
        for thread in threads:
            thread.result()
        assert len(poller) == 1
        assert only(poller) == ("always", READ)

    def test_a_second_wait_is_refused(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ)
        with waiting(poller) as wait:
            for timeout in (0, 0.001, None):
                with refused(poller, RuntimeError):
                    poller.poll(timeout)
            assert wait.is_alive()
            pair[1].send(b"x")
            assert wait.result() == [(pair[0], READ)]
        assert only(poller) == (pair[0], READ)

    def test_looking_at_a_poller_does_not_disturb_a_wait(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ, key="key")
        with waiting(poller) as wait:
            assert len(poller) == 1
            assert pair[0] in poller
            assert pair[1] not in poller
            assert [registration.key for registration in poller.registrations()] == ["key"]
            assert poller.backend in repr(poller)
            assert wait.is_alive()
            pair[1].send(b"x")
            assert wait.result() == [("key", READ)]

    def test_close_ends_a_wait_under_way(self, stack: ExitStack) -> None:
        for pause in PAUSES:
            poller = stack.enter_context(closing(self.make_poller()))
            poller.register(idle(stack), READ)
            with waiting(poller, pause=pause) as wait:
                poller.close()
                with pytest.raises(RuntimeError):
                    wait.result()
            assert poller.closed

    def test_close_from_many_threads_at_once(self, poller: Poller[Any]) -> None:
        with waiting(poller) as wait:
            for thread in [Background(poller.close) for _ in range(4)]:
                thread.result()
            with pytest.raises(RuntimeError):
                wait.result()
        assert poller.closed

    # Wake-ups

    @pytest.mark.parametrize("timeout", [None, math.inf, 2 * WATCHDOG])
    def test_wake_ends_a_wait_under_way(self, poller: Poller[Any], timeout: float | None) -> None:
        for pause in PAUSES:
            with waiting(poller, timeout, pause) as wait:
                poller.wake()
                assert wait.result() == []

    def test_wake_ends_the_next_wait_and_only_that(self, poller: Poller[Any]) -> None:
        poller.wake()
        assert poller.poll() == []
        assert until_silent(poller) == []

    def test_a_look_takes_the_wake_up(self, poller: Poller[Any]) -> None:
        poller.wake()
        assert poller.poll(0) == []
        assert until_silent(poller) == []

    def test_wake_ups_coalesce_and_never_block(self, poller: Poller[Any]) -> None:
        for _ in range(2000):
            poller.wake()
        assert poller.poll() == []
        assert until_silent(poller) == []

    @pytest.mark.parametrize("cap", [1, 2, 100])
    @pytest.mark.parametrize("woken_first", [False, True], ids=["ready first", "woken first"])
    def test_a_woken_poll_returns_what_is_ready(
        self, poller: Poller[Any], pair: Pair, woken_first: bool, cap: int
    ) -> None:
        """Though a wake-up may take the only place in the facility's list."""
        if woken_first:
            poller.wake()
        poller.register(pair[0], READ | WRITE)
        if not woken_first:
            poller.wake()
        assert poller.poll(None, max_events=cap) == [(pair[0], WRITE)]
        poller.modify(pair[0], READ)
        if cap == 1:
            poller.poll(0)  # where the source took its place, the wake-up ends this one too
        assert until_silent(poller) == []

    def test_a_wake_up_takes_nobodys_place(self, poller: Poller[Any], stack: ExitStack) -> None:
        for number in range(3):
            poller.register(idle(stack), WRITE | ONESHOT, key=number)
        said: Entries = []
        for _ in range(12):
            poller.wake()
            said += poller.poll(0, max_events=1)
        assert sorted(said) == [(number, WRITE) for number in range(3)]

    def test_no_wake_up_is_lost(self, poller: Poller[Any]) -> None:
        """Each comes at any moment between two polls or in one, and ends one."""
        rounds, ended = 2000, queue.SimpleQueue[Entries]()

        def wait() -> None:
            for _ in range(rounds):
                ended.put(poller.poll())

        thread = Background(wait)
        for _ in range(rounds):
            poller.wake()
            assert ended.get(timeout=DEADLINE) == []
        thread.result()
        assert until_silent(poller) == []  # had a poll ended unasked, a wake-up would be left

    # Deadlines

    @pytest.mark.parametrize("timeout", [1e-9, 0.0001, 0.0005, 0.001, 0.0021, 0.0031, 0.01, 0.029, 0.05])
    def test_timeout_is_never_early(self, poller: Poller[Any], pair: Pair, timeout: float) -> None:
        """epoll and poll count milliseconds, and a timer of Windows may fire early."""
        poller.register(pair[0], READ)
        for _ in range(10 if timeout < 0.005 else 2):
            start = time.monotonic()
            assert poller.poll(timeout) == []
            assert time.monotonic() >= start + timeout

    def test_a_short_wait_is_no_busy_loop(self, poller: Poller[Any], pair: Pair) -> None:
        """Not for the part of a millisecond either that a facility cannot wait."""
        poller.register(pair[0], READ)
        start, cpu = time.monotonic(), time.thread_time()
        end = start + (0.5 if WINDOWS else 0.03)  # many ticks of 15.6 ms, in which Windows counts a thread's time
        while time.monotonic() < end:
            assert poller.poll(0.0009) == []
        assert time.thread_time() - cpu < (time.monotonic() - start) * 0.25

    def test_an_integer_is_a_timeout(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], WRITE)
        assert poller.poll(int(DEADLINE)) == [(pair[0], WRITE)]

    @pytest.mark.parametrize("timeout", [0, 0.0, -0.0])
    def test_zero_is_a_look(self, poller: Poller[Any], pair: Pair, timeout: float) -> None:
        poller.register(pair[0], READ)
        assert poller.poll(timeout) == []
        poller.modify(pair[0], WRITE)
        assert poller.poll(timeout) == [(pair[0], WRITE)]

    @pytest.mark.parametrize("timeout", [None, math.inf, 86_400.5, 2**31 / 1000, 2**32, 1e12, 1e300])
    def test_any_timeout_is_waited_for(self, poller: Poller[Any], pair: Pair, timeout: float | None) -> None:
        """select.epoll raises OverflowError for 1e9 s, and Windows takes anything above 32 bits for infinite."""
        poller.register(pair[0], READ)
        with waiting(poller, timeout, pause=0.01) as wait:
            assert wait.is_alive()
            pair[1].send(b"x")
            assert wait.result() == [(pair[0], READ)]

    @pytest.mark.parametrize("timeout", [-1, -0.5, -1e-9, -math.inf, math.nan])
    def test_a_timeout_that_is_none_is_a_value_error(self, poller: Poller[Any], pair: Pair, timeout: float) -> None:
        """select.epoll waits for ever for -1, and does not wait for -1e-9."""
        poller.register(pair[0], WRITE)
        with refused(poller, ValueError):
            poller.poll(timeout)
        assert only(poller) == (pair[0], WRITE)

    # Signals

    def test_a_wait_goes_on_to_its_deadline_after_a_signal(self, poller: Poller[Any]) -> None:
        handled: list[float] = []
        for timeout in (0.1, 1, 5):  # a longer one, if the signal came too late, or just before the facility's call
            handled.clear()
            start = time.monotonic()
            with handling(lambda: handled.append(time.monotonic())):
                result = wait_and_signal(poller, timeout)
            if result is not None and any(when < start + timeout for when in handled):
                break
        assert result == []
        assert time.monotonic() >= start + timeout
        assert len(handled) == 1
        assert handled[0] < start + timeout, "the handler runs in the wait, not after it"

    def test_a_wait_without_deadline_goes_on_after_a_signal(self, poller: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ)
        with handling(lambda: pair[1].send(b"x")):
            assert wait_and_signal(poller, None) == [(pair[0], READ)]

    def test_a_handler_may_wake(self, poller: Poller[Any]) -> None:
        with handling(poller.wake):
            assert wait_and_signal(poller, None) == []
        assert until_silent(poller) == []

    @each_mode
    def test_a_handler_that_raises_leaves_the_poller_usable(self, poller: Poller[Any], pair: Pair, mode: int) -> None:
        needs(poller, READ | mode)
        poller.register(pair[0], READ | mode)
        for _ in range(5):
            with handling(once(interrupt)), refused(poller, Interrupted):
                wait_and_signal(poller, None)
        with waiting(poller) as wait:
            pair[1].send(b"x")
            assert wait.result() == [(pair[0], READ)]

    @each_mode
    def test_what_a_handler_that_raises_gets_in_the_way_of_is_not_lost(
        self, poller: Poller[Any], pair: Pair, mode: int
    ) -> None:
        """It may strike when the kernel has handed out an event that it will not report again."""
        needs(poller, READ | mode)
        for _ in range(10):
            poller.register(pair[0], READ | mode, key="key")
            with handling(once(interrupt), where=is_inside_poll):
                try:
                    said = wait_and_signal(poller, None, before=lambda: pair[1].send(b"x"))
                except Interrupted:
                    said = poller.poll(DEADLINE)
            assert said == [("key", READ)]
            pair[0].recv(1)
            poller.unregister(pair[0])

    @pytest.mark.parametrize("name", ["register", "modify", "unregister", "contains"])
    def test_a_handler_may_wake_in_the_middle_of_a_change(self, poller: Poller[Any], pair: Pair, name: str) -> None:
        """With a plain lock it would wait for itself."""

        class Signalling(Wrapped):
            def fileno(self) -> int:
                signal.raise_signal(number)
                return super().fileno()

        source = Signalling(pair[0])
        with handling(poller.wake) as number:
            poller.register(source, READ)
            if name == "register":
                pass
            elif name == "modify":
                poller.modify(source, 0)
            elif name == "unregister":
                poller.unregister(source)
            else:
                assert source in poller
        assert poller.poll() == []
        assert until_silent(poller) == []

    # Errors

    def test_what_is_not_registered_is_a_key_error(self, poller: Poller[Any], stack: ExitStack) -> None:
        poller.register(idle(stack), READ)
        stranger, closed = idle(stack), idle(stack)
        closed.close()
        for source in (stranger, stranger.fileno(), closed):
            assert source not in poller
            with refused(poller, KeyError):
                poller.modify(source, WRITE)
            with refused(poller, KeyError):
                poller.unregister(source)

    @pytest.mark.parametrize("events", SENSELESS, ids=hex)
    def test_senseless_bits_are_a_value_error(self, poller: Poller[Any], stack: ExitStack, events: int) -> None:
        source = readable(stack)
        with refused(poller, ValueError):
            poller.register(source, events)
        poller.register(source, WRITE, key="key")
        with refused(poller, ValueError):
            poller.modify(source, events, key="new")
        assert only(poller) == ("key", WRITE)

    def test_registering_a_closed_descriptor_is_ebadf(self, poller: Poller[Any], pair: Pair) -> None:
        number = pair[0].fileno()
        pair[0].close()
        for source in (pair[0], number):
            with refused(poller, OSError) as caught:
                poller.register(source, READ)
            assert_closed_descriptor(caught.value)
        assert len(poller) == 0
        assert until_silent(poller) == []

    @pytest.mark.parametrize("as_number", [False, True], ids=["socket", "number"])
    def test_modifying_a_closed_descriptor_is_ebadf(self, poller: Poller[Any], pair: Pair, as_number: bool) -> None:
        source = pair[0].fileno() if as_number else pair[0]
        poller.register(source, READ, key="key")
        pair[0].close()
        with refused(poller, OSError) as caught:
            poller.modify(source, WRITE, key="new")
        assert_closed_descriptor(caught.value)
        said = until_silent(poller)
        assert all(key == "key" and events & ERROR for key, events in said)
        poller.unregister(source)

    def test_a_regular_file_is_refused(self, poller: Poller[Any], tmp_path: Path) -> None:
        """epoll_ctl(2): EPERM. poll and select would report it ready for ever, kqueue until its end."""
        with open(tmp_path / "file", "wb") as file, refused(poller, OSError if WINDOWS else PermissionError):
            poller.register(file, WRITE)
        assert until_silent(poller) == []

    def test_a_directory_is_refused(self, poller: Poller[Any], tmp_path: Path) -> None:
        if sys.platform == "win32":
            pytest.skip("Windows has no descriptors of directories")
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            with refused(poller, PermissionError):
                poller.register(directory, READ)
        finally:
            os.close(directory)

    def test_a_device_is_watched_or_refused(self, poller: Poller[Any]) -> None:
        """/dev/null: EPERM from epoll; poll and select say that it is ready."""
        if sys.platform == "win32":
            pytest.skip("Windows polls sockets only")
        with open(os.devnull, "wb", 0) as device:
            try:
                poller.register(device, WRITE)
            except OSError:
                assert device not in poller
            else:
                assert poller.poll(0) in ([], [(device, WRITE)])
                poller.unregister(device)
            assert until_silent(poller) == []

    @each_method
    def test_a_closed_poller_refuses(
        self, poller: Poller[Any], pair: Pair, call: Callable[[Poller[Any], Any], object]
    ) -> None:
        poller.register(pair[0], READ)
        poller.close()
        with pytest.raises(RuntimeError):
            call(poller, pair[0])

    # Everything in any order

    def test_any_order_of_operations(self, watchdog: Callable[[], object]) -> None:
        """A failure prints the shortest order found, as a program, and how to repeat it: see `muxio.testing.model`."""
        try:
            from muxio.testing.model import any_order
        except ImportError as error:
            pytest.skip(str(error))
        any_order(self.make_poller, self.tells, self.runs, begin=watchdog)

    # What it is

    def test_registrations_tell_all(self, poller: Poller[Any], stack: ExitStack) -> None:
        one, other = idle(stack), idle(stack)
        assert poller.registrations() == []
        poller.register(one, READ | WRITE | ONESHOT)
        poller.register(other.fileno(), 0, key="key")
        assert len(poller) == 2
        first, second = sorted(poller.registrations(), key=lambda registration: registration.events, reverse=True)
        assert (first.source, first.fd, first.events, first.key) == (one, one.fileno(), READ | WRITE | ONESHOT, one)
        assert second == (other.fileno(), other.fileno(), 0, "key")
        poller.modify(one, READ)
        poller.unregister(other)
        assert poller.registrations() == [(one, one.fileno(), READ, one)]

    def test_a_repr_tells_the_backend_and_the_state(self, poller: Poller[Any]) -> None:
        working = repr(poller)
        assert isinstance(poller.backend, str)
        assert poller.backend in working
        poller.close()
        assert poller.backend in repr(poller)
        assert repr(poller) != working

    def test_leaving_the_context_closes(self, poller: Poller[Any], pair: Pair) -> None:
        with poller as entered:
            assert entered is poller
            assert not poller.closed
            poller.register(pair[0], READ)
        assert poller.closed

    def test_closing_again_does_nothing(self, poller: Poller[Any]) -> None:
        for _ in range(2):
            poller.close()
            assert poller.closed

    def test_sources_outlive_the_poller(self, poller: Poller[Any], another: Poller[Any], pair: Pair) -> None:
        poller.register(pair[0], READ)
        poller.close()
        pair[1].send(b"x")
        another.register(pair[0], READ)
        assert only(another) == (pair[0], READ)
        assert pair[0].recv(1) == b"x"
