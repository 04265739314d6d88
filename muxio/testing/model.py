"""A small model of what the kernel knows, and a state machine that holds a poller to it in any order of operations.

>>> import muxio
>>> from muxio.testing.model import any_order
>>> any_order(muxio.Poller, runs=1)

hypothesis makes up the order: sockets are opened, written, read, shut, closed and opened again under the same number,
registered, modified and unregistered meanwhile, and looked at. After each look the model says what it had to tell and
what it may have told; after each step, what is registered and what the list returned last has to read by now.

A failure prints the shortest order that it found, as a program. ``Operations = machine(make_poller)`` makes it one that
runs by itself, without hypothesis choosing; the ``@reproduce_failure`` that is printed as well decorates such a class.

`File`, `Handle` and `Watch` are the whole state. What the promises leave open is open here too, and nothing else: what
a facility says of a source that was closed while it was registered, and which hints it knows.
"""

from __future__ import annotations

import io
import select
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import count
from typing import Any

try:
    from hypothesis import HealthCheck, currently_in_test_context, note, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import (
        RuleBasedStateMachine,
        initialize,
        precondition,
        rule,
        run_state_machine_as_test,
    )
except ImportError as error:
    raise ImportError("muxio.testing.model needs hypothesis: python -m pip install 'muxio[testing]'") from error

from muxio.events import EDGE, ERROR, HANGUP, HINTS, ONESHOT, READ, READ_CLOSED, WRITE, describe
from muxio.poller import MAX_EVENTS, Poller
from muxio.testing.conformance import DEADLINE, pair_under, socket_under, until

__all__ = ["any_order", "machine"]

STEPS = 50  # in a run, at most
CROWD = 8  # descriptors open at a time: so few that they meet, and that numbers are used again
PIECES = 4  # sent and not read; so few that nothing gets full of them

BOTH = READ | WRITE
ENDS = ERROR | HANGUP
ALL = BOTH | HINTS

ASKED = {
    describe(interest | mode): interest | mode
    for interest in (READ, WRITE, BOTH, 0)
    for mode in (0, ONESHOT, EDGE, EDGE | ONESHOT)
}

# The state


def hints_for(interest: int) -> int:
    """READ_CLOSED comes with READ."""
    return HINTS if interest & READ else ENDS


@dataclass(eq=False)
class File:
    """An open file of the kernel: one end of a connected pair of sockets."""

    handles: int = 1  #: how many descriptors it has
    unread: int = 0  #: how often something was sent to it since it was read empty
    full: bool = False  #: it takes no byte until the peer reads
    shut: bool = False  #: it sends no more
    cut: bool = False  #: the peer was closed and had not read everything
    peer: File = field(init=False)

    def takes(self) -> bool:
        """Whether a byte can be sent."""
        return self.peer.handles > 0 and not (self.full or self.shut)

    def must(self) -> int:
        """What it is ready for, on every system."""
        return (READ if self.unread or self.peer.shut else 0) | (0 if self.full else WRITE)

    def hints(self) -> int:
        """The hints that are true."""
        ended = not self.peer.handles or (self.shut and self.peer.shut)
        return (READ_CLOSED if self.peer.shut else 0) | (HANGUP if ended else 0) | (ERROR if self.cut else 0)

    def may(self) -> int:
        """All that is true on some system: to write after an own SHUT_WR, or an end, does not block."""
        hints = self.hints()
        return self.must() | hints | (WRITE if self.shut else 0) | (BOTH if hints & ENDS else 0)


@dataclass(eq=False)
class Handle:
    """A descriptor of a file, open or closed."""

    sock: socket.socket
    file: File
    number: int = field(init=False)
    open: bool = True

    def __post_init__(self) -> None:
        self.number = self.sock.fileno()


@dataclass(eq=False)
class Watch:
    """A registration. fresh: the bits that may be reported; owed: those that must be, as soon as they hold."""

    handle: Handle
    events: int
    key: int
    armed: bool = True
    fresh: int = ALL
    owed: int = ALL

    def tells_changes(self) -> bool:
        """EDGE; what is watched for its end alone tells that once, in any mode."""
        return bool(self.events & EDGE and self.events & BOTH)

    def arm(self, events: int) -> None:
        self.events, self.armed, self.fresh, self.owed = events, True, ALL, ALL

    def must(self, tells: int) -> int:
        """What a look with room for all has to report."""
        if not (self.armed and self.handle.open):
            return 0
        file, interest = self.handle.file, self.events & BOTH
        ready = file.must() & interest & self.owed
        if ready or (self.owed and not interest):
            ready |= file.hints() & tells & ~ERROR & hints_for(interest)
        return ready

    def may(self, files: list[File]) -> int:
        """What any look may report, if these are the files that its number may stand for."""
        if not self.armed:
            return 0
        interest, truth = self.events & BOTH, 0 if self.handle.open else ERROR
        for file in files:
            truth |= file.may()
        return truth & (interest | hints_for(interest)) | (interest if truth & ENDS else 0)

    def told(self, events: int, files: list[File]) -> None:
        """It was reported. ONESHOT rests then, EDGE says nothing twice, nor does what is watched for its end alone."""
        if self.events & ONESHOT or not files:
            self.armed = False
        if self.tells_changes():
            self.owed &= ~events
            if not events & ENDS:  # else either of kqueue's two filters says all that was asked for, in its turn
                self.fresh &= ~events
        if not self.events & BOTH:
            self.fresh &= ~events
            self.owed = 0


@dataclass(eq=False)
class Entry:
    """An entry of the list that was returned last, as it has to read now."""

    watch: Watch
    key: int
    events: int


# The machine


def has_room(machine: Operations) -> bool:
    return sum(handle.open for handle in machine.handles) < CROWD


def operation(
    condition: Callable[[Operations], Any] = lambda machine: True,
    which: Callable[[Operations, Handle], Any] | None = None,
    **arguments: Any,
) -> Callable[[Callable[..., None]], Any]:
    """A rule that applies on a condition; with `which`, to a descriptor out of those that meet that one as well."""

    def candidates(machine: Operations) -> list[int]:
        return [place for place, handle in enumerate(machine.handles) if which and which(machine, handle)]

    def applies(machine: Operations) -> bool:
        return bool(condition(machine) and (which is None or candidates(machine)))

    def decorate(method: Callable[..., None]) -> Any:
        @wraps(method)
        def operate(machine: Operations, **drawn: Any) -> None:
            method(machine, **drawn)
            machine.agree()

        if which:
            arguments["which"] = st.runner().flatmap(lambda machine: st.sampled_from(candidates(machine)))
        make_rule: Any = rule(**arguments)
        return precondition(applies)(make_rule(operate))

    return decorate


#: What is registered, spelled.
SUPPORTED = st.runner().flatmap(lambda machine: st.sampled_from(machine.supported))


class Operations(RuleBasedStateMachine):
    """Each rule does one thing to the kernel or the poller, and the same to the model.

    A rule's `which` is a descriptor: the first that was opened, the second, ...
    """

    make_poller: Callable[[], Any]
    tells: int
    begin: Callable[[], object]

    def __init__(self) -> None:
        super().__init__()
        if currently_in_test_context():
            note("Operations = muxio.testing.model.machine(make_poller)  # and with it, this goes wrong:")
        self.begin()
        self.handles: list[Handle] = []
        self.table: dict[int, Watch] = {}
        self.haunting: list[File] = []  #: a descriptor was closed while registered, and another keeps the file open
        #: On Windows: number of a closed source -> a socket that keeps others from using it by chance.
        self.kept_free: dict[int, socket.socket] = {}
        self.keys = count()
        self.woken = False
        self.batch: list[tuple[Any, int]] = []
        self.entries: list[Entry] = []
        self.poller: Poller[Any] = self.make_poller()
        self.supported = [name for name, events in ASKED.items() if self.poller.supports(events)]

    def teardown(self) -> None:
        self.poller.close()
        for handle in self.handles:
            handle.sock.close()
        for sock in self.kept_free.values():
            sock.close()

    # The kernel

    @initialize(events=st.runner().flatmap(lambda machine: st.lists(st.sampled_from(machine.supported), max_size=3)))
    def begin_with(self, events: list[str]) -> None:
        """Some pairs, one end of each registered."""
        for which, asked in enumerate(events):
            self.open()
            self.register(which=2 * which, events=asked)

    @operation(has_room)
    def open(self) -> None:
        files = File(), File()
        files[0].peer, files[1].peer = files[1], files[0]
        for sock, file in zip(self.new_pair(), files, strict=True):
            sock.setblocking(False)
            self.handles.append(Handle(sock, file))

    def new_pair(self) -> tuple[socket.socket, socket.socket]:
        """Its first end has the number of a closed source soon, and by the same operations always at the same time."""
        if not self.kept_free:
            return socket.socketpair()
        number, sock = self.kept_free.popitem()
        sock.close()
        return pair_under(number)

    @operation(has_room, which=lambda self, handle: handle.open)
    def dup(self, which: int) -> None:
        handle = self.handles[which]
        handle.file.handles += 1
        self.handles.append(Handle(handle.sock.dup(), handle.file))

    @operation(which=lambda self, handle: handle.open and handle.file.takes() and handle.file.peer.unread < PIECES)
    def send(self, which: int) -> None:
        handle = self.handles[which]
        handle.sock.send(b"x")
        handle.file.peer.unread += 1
        self.happened(handle.file.peer, READ)

    if sys.platform != "win32":  # TCP, which socketpairs are there, moves some of it to the peer, and takes more then

        @operation(which=lambda self, handle: handle.open and handle.file.takes())
        def fill(self, which: int) -> None:
            handle = self.handles[which]
            with suppress(BlockingIOError):
                while True:
                    handle.sock.send(bytes(65536))
            handle.file.peer.unread += 1
            handle.file.full = True
            self.happened(handle.file.peer, READ)

    @operation(which=lambda self, handle: handle.open and handle.file.unread)
    def read(self, which: int) -> None:
        file = self.handles[which].file
        until(partial(read_all, self.handles[which].sock, [file.unread if sys.platform == "win32" else 0]))
        was_full = file.peer.full
        file.unread, file.cut, file.peer.full = 0, False, False
        self.happened(file.peer, WRITE if was_full else 0)

    @operation(which=lambda self, handle: handle.open and handle.file.peer.handles and not handle.file.shut)
    def shut(self, which: int) -> None:
        handle = self.handles[which]
        handle.sock.shutdown(socket.SHUT_WR)
        handle.file.shut = True
        self.happened(handle.file.peer, READ)

    @operation(which=lambda self, handle: handle.open)
    def close(self, which: int) -> None:
        handle = self.handles[which]
        file, peer = handle.file, handle.file.peer
        handle.sock.close()
        if sys.platform == "win32" and self.watch(handle):  # where it is chance which number is used again
            self.kept_free[handle.number] = socket_under(handle.number)
        handle.open = False
        file.handles -= 1
        if file.handles:
            if self.watch(handle):
                self.haunting.append(file)
            return
        if file in self.haunting:
            self.haunting = [other for other in self.haunting if other is not file]
            self.stir()
        was_full = peer.full
        file.shut, peer.full, peer.cut = True, False, peer.cut or file.unread > 0
        self.happened(peer, READ | WRITE if was_full else READ)

    def happened(self, file: File, news: int) -> None:
        """Something was done to a file or its peer. EDGE has to tell the news, and may tell all, of both."""
        for watch in self.table.values():
            if watch.tells_changes() and watch.handle.file in (file, file.peer):
                watch.fresh = ALL
                watch.owed |= news if watch.handle.file is file else 0
        for handle in self.handles:
            if handle.open and handle.file in (file, file.peer):
                until(partial(is_so, handle))

    def stir(self) -> None:
        """What a closed source has left behind is cleared away, for which EDGE may be armed anew."""
        for watch in self.table.values():
            if watch.tells_changes():
                watch.fresh = ALL

    # The poller

    @operation(which=lambda self, handle: handle.open and not self.watch(handle), events=SUPPORTED)
    def register(self, which: int, events: str) -> None:
        handle, key = self.handles[which], next(self.keys)
        self.poller.register(handle.sock, ASKED[events], key)
        if handle.number in self.table:  # its owner is closed
            self.forget(handle.number)
        self.table[handle.number] = Watch(handle, ASKED[events], key)

    @operation(which=lambda self, handle: handle.open and self.watch(handle), events=SUPPORTED, rename=st.booleans())
    def modify(self, which: int, events: str, rename: bool) -> None:
        handle, asked = self.handles[which], ASKED[events]
        watch = self.table[handle.number]
        if rename:
            watch.key = next(self.keys)
            self.poller.modify(handle.sock, asked, watch.key)
        else:
            self.poller.modify(handle.sock, asked)
        watch.arm(asked)
        for entry in self.entries:
            if entry.watch is watch:
                entry.key = watch.key
                entry.events &= asked | hints_for(asked)

    @operation(which=lambda self, handle: self.watch(handle))
    def unregister(self, which: int) -> None:
        self.poller.unregister(self.handles[which].sock)
        self.forget(self.handles[which].number)

    def provoke(self) -> None:
        """Try all that is an error now, which may change nothing."""
        unsupported = [events for name, events in ASKED.items() if name not in self.supported]
        poller = self.poller
        for handle in self.handles:
            watch, sock = self.watch(handle), handle.sock
            if watch or not handle.open:
                refused(KeyError if handle.open else OSError, poller.register, sock, READ)
            if not watch:
                refused(KeyError, poller.modify, sock, READ, "key")
                refused(KeyError, poller.unregister, sock)
            elif not handle.open:
                refused(OSError, poller.modify, sock, READ, "key")
            for events in unsupported if handle.open else ():
                refused(io.UnsupportedOperation, poller.modify if watch else poller.register, sock, events, "key")

    def forget(self, number: int) -> None:
        """A registration is over."""
        watch = self.table.pop(number)
        for entry in self.entries:
            if entry.watch is watch:
                entry.events = 0
        if not watch.handle.open:
            self.stir()

    @operation(lambda self: not self.woken)
    def wake(self) -> None:
        self.poller.wake()
        self.woken = True

    @operation(cap=st.sampled_from([MAX_EVENTS, 1, 2, 3]), provoked=st.booleans())
    def look(self, cap: int, provoked: bool) -> None:
        if provoked:
            self.provoke()
        self.poll(cap)

    @operation(lambda self: self.steady(), cap=st.sampled_from([1, 2, 3]))
    def take_turns(self, cap: int) -> None:
        """Whoever is ready for as long as it lasts is told so by and by, however short the lists are."""
        waiting = self.steady()
        for _ in range(7 * len(self.table)):
            waiting -= self.poll(cap)
        assert not waiting

    def steady(self) -> set[int]:
        """The keys of what is ready, and stays so while nothing is done but to look."""
        modes = EDGE | ONESHOT
        return {watch.key for watch in self.table.values() if watch.must(0) and not watch.events & modes}

    def poll(self, cap: int) -> set[int]:
        """Look once, and compare with the model; returns the keys of what was reported."""
        haunted = any(file.handles for file in self.haunting)
        if haunted:
            self.stir()
        watches = {watch.key: watch for watch in self.table.values()}
        owed = {key: bits for key, watch in watches.items() if (bits := watch.must(self.tells))}
        start = time.monotonic()
        self.batch = self.poller.poll(DEADLINE if self.woken else 0, cap)
        assert not self.woken or time.monotonic() < start + DEADLINE, "wake() did not end it"
        self.woken = False
        said = dict(self.batch)
        assert len(said) == len(self.batch) <= cap
        self.entries = [Entry(watches[key], key, events) for key, events in self.batch]
        for key, events in self.batch:
            self.check(watches[key], events)
        # select() tells of closed descriptors, and of nothing else until the next look.
        cut_short = any(events & ERROR and not watches[key].handle.open for key, events in self.batch)
        if cap < MAX_EVENTS or cut_short:
            assert said or not owed, "nothing was said, and something is ready"
            return set(said)
        for key, bits in owed.items():
            # Of a haunted number, what two files are ready for may come in two turns.
            missing = 0 if haunted and key in said else bits & ~said.get(key, 0)
            assert not missing, f"{key}: {describe(missing)} was not said"
        for watch in watches.values():
            if watch.tells_changes():
                watch.fresh = watch.owed = 0
        return set(said)

    def check(self, watch: Watch, events: int) -> None:
        """One entry."""
        files = self.files(watch)
        may, interest = watch.may(files), watch.events & BOTH
        assert events & watch.fresh, f"{watch.key}: {describe(events)} is no news"
        assert not events & ~may, f"{watch.key}: {describe(events)}, where only {describe(may)} may be said"
        if events & ENDS or not files:
            assert events & interest == interest, f"{watch.key}: {describe(events)} without all that was asked for"
        assert files or events & ERROR, f"{watch.key}: {describe(events)} of a file that is closed"
        watch.told(events, files)

    def files(self, watch: Watch) -> list[File]:
        """Whose events a registration may get: its file's; poll and select follow a closed number to its new file."""
        handle = watch.handle
        found = [other.file for other in self.handles if other.open and other.number == handle.number]
        return [*found, handle.file] if handle.file.handles and not handle.open else found

    def watch(self, handle: Handle) -> Watch | None:
        """The registration of a descriptor."""
        watch = self.table.get(handle.number)
        return watch if watch and watch.handle is handle else None

    def agree(self) -> None:
        """What the poller says of itself, and the list returned last."""
        assert self.batch == [(entry.key, entry.events) for entry in self.entries]
        assert len(self.poller) == len(self.table)
        listed = sorted(self.poller.registrations(), key=lambda registration: registration.fd)
        expected = [(watch.handle.sock, fd, watch.events, watch.key) for fd, watch in sorted(self.table.items())]
        assert listed == expected
        for handle in self.handles:
            registered = self.watch(handle) is not None
            assert (handle.sock in self.poller) == registered
            if handle.open and handle.number not in self.table:
                assert handle.number not in self.poller


def refused(kind: type[Exception], change: Callable[..., object], *arguments: Any) -> None:
    try:
        change(*arguments)
    except kind:
        return
    raise AssertionError(f"{change.__name__}{arguments} was not refused with {kind.__name__}")


def read_all(sock: socket.socket, missing: list[int]) -> bool:
    """Read a socket empty; whether so many bytes have come. (Where socketpairs are TCP's, a second takes its time.)"""
    try:
        while data := sock.recv(65536):
            missing[0] -= len(data)
    except BlockingIOError:
        return missing[0] <= 0
    except ConnectionResetError:
        pass
    return True


def is_so(handle: Handle) -> bool:
    """Whether the kernel sees a file as the model does. (Where socketpairs are TCP's, that takes its time.)"""
    readable, writable, _ = select.select([handle.sock], [handle.sock], [], 0)
    seen = (READ if readable else 0) | (WRITE if writable else 0)
    return not handle.file.must() & ~seen and not seen & ~handle.file.may()


def machine(
    make_poller: Callable[[], Any], tells: int = 0, begin: Callable[[], object] = lambda: None
) -> type[Operations]:
    """The state machine for one kind of poller; the parameters are those of `any_order`."""
    attributes = {"make_poller": staticmethod(make_poller), "tells": tells, "begin": staticmethod(begin)}
    return type("Operations", (Operations,), attributes)


def any_order(
    make_poller: Callable[[], Any], tells: int = 0, runs: int = 100, begin: Callable[[], object] = lambda: None
) -> None:
    """Hold pollers to their promises in made-up orders of operations; say of a wrong one how the shortest order goes.

    make_poller: called without arguments, returns a new poller with nothing registered.
    tells: the hints (ERROR, HANGUP, READ_CLOSED) that its facility gives whenever they are true.
    runs: how many orders are tried, each on a new poller.
    begin: called before each.

    AssertionError, or whatever the poller raised: a promise was broken.
    """
    run_state_machine_as_test(
        machine(make_poller, tells, begin),
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
