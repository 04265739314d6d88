"""What kqueue(2) promises, asked of the real kernel where there is one and of `kqueue_double` where there is none.

A test's docstring paraphrases the statement and names its source: "man" is kqueue(2) of FreeBSD and macOS, "FreeBSD" is
sys/kern/kern_event.c unless another file is named, "XNU" is bsd/kern/kern_event.c, "CPython" is Modules/selectmodule.c.
What the two kernels answer differently is in `System`, not in the tests.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no kqueue, and no epoll to build the double on", allow_module_level=True)

KERNEL: Any = importlib.import_module("select" if hasattr(select, "kqueue") else "kqueue_double")


@dataclass(frozen=True)
class System:
    """The answers that differ."""

    name: str
    evfilt_user: int
    evfilt_except: int | None
    delete_of_closed: int
    enable_and_disable: int
    receipts_without_room_go_on: bool
    add_can_trigger: bool
    clear_undoes_trigger: bool


FREEBSD = System("freebsd", -11, None, errno.EBADF, errno.EINVAL, False, False, True)
DARWIN = System("darwin", -10, -15, errno.ENOENT, 0, True, True, False)
SYSTEMS = [system for system in (FREEBSD, DARWIN) if KERNEL is not select or sys.platform.startswith(system.name)]
if not SYSTEMS:
    pytest.skip(f"nobody has read what {sys.platform} promises", allow_module_level=True)

kevent = KERNEL.kevent
READ, WRITE = KERNEL.KQ_FILTER_READ, KERNEL.KQ_FILTER_WRITE
ADD, DELETE = KERNEL.KQ_EV_ADD, KERNEL.KQ_EV_DELETE
ENABLE, DISABLE = KERNEL.KQ_EV_ENABLE, KERNEL.KQ_EV_DISABLE
ONESHOT, CLEAR = KERNEL.KQ_EV_ONESHOT, KERNEL.KQ_EV_CLEAR
EOF, ERROR = KERNEL.KQ_EV_EOF, KERNEL.KQ_EV_ERROR
RECEIPT, DISPATCH, NOTE_TRIGGER, NOTE_OOB = 0x40, 0x80, 0x01000000, 0x2  # <sys/event.h>; CPython does not name them

DEADLINE = 10.0  # seconds until a wait that should have ended has failed
ROOM = 16

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=SYSTEMS, ids=lambda system: system.name)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> System:
    chosen: System = request.param
    if KERNEL is not select:
        monkeypatch.setattr(KERNEL, "FLAVOUR", getattr(KERNEL, chosen.name.upper()))
    return chosen


@pytest.fixture
def kq(system: System) -> Iterator[Any]:
    kq = KERNEL.kqueue()
    yield kq
    kq.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def unix_pair(stack: ExitStack) -> Pair:
    ours, theirs = socket.socketpair()
    return stack.enter_context(ours), stack.enter_context(theirs)


def tcp_pair(stack: ExitStack) -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = stack.enter_context(socket.create_connection(listener.getsockname()))
        return ours, stack.enter_context(listener.accept()[0])


@pytest.fixture
def pair(stack: ExitStack) -> Pair:
    return unix_pair(stack)


@pytest.fixture(params=[unix_pair, tcp_pair])
def any_pair(request: pytest.FixtureRequest, stack: ExitStack) -> Pair:
    make: Callable[[ExitStack], Pair] = request.param
    return make(stack)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads. Ask for it before `kq`, so that closing the kqueue ends a failed test's waits before they are joined."""
    with ThreadPoolExecutor() as pool:
        yield pool


def change(kq: Any, *args: Any, **kwargs: Any) -> None:
    kq.control([kevent(*args, **kwargs)], 0)


def outcome(kq: Any, *args: Any, **kwargs: Any) -> int:
    """The errno of a change, or 0."""
    try:
        change(kq, *args, **kwargs)
    except OSError as error:
        return error.errno or -1
    return 0


def look(kq: Any) -> list[Any]:
    events: list[Any] = kq.control(None, ROOM, 0)
    return events


def wait(kq: Any) -> Any:
    """The one event that has to come."""
    (event,) = kq.control(None, ROOM, DEADLINE)
    return event


def wait_for_eof(kq: Any) -> Any:
    """The event with EV_EOF; it may have to come through a socket first, and others may come before it."""
    end = time.monotonic() + DEADLINE
    while not (event := wait(kq)).flags & EOF:
        assert time.monotonic() < end
    return event


# One knote an (ident, filter)


def test_two_filters_of_one_descriptor_are_two_events(kq: Any, pair: Pair) -> None:
    """An event is identified by the pair of ident and filter (man, DESCRIPTION)."""
    ours, theirs = pair
    theirs.send(b"x")
    kq.control([kevent(ours, READ, udata=1), kevent(ours, WRITE, udata=2)], 0)
    assert sorted((e.ident, e.filter, e.udata) for e in look(kq)) == [
        (ours.fileno(), WRITE, 2),
        (ours.fileno(), READ, 1),
    ]


def test_max_events_counts_events_not_descriptors(kq: Any, pair: Pair) -> None:
    """nevents is the size of the event list, in events (man, DESCRIPTION)."""
    ours, theirs = pair
    theirs.send(b"x")
    kq.control([kevent(ours, READ, ADD | CLEAR), kevent(ours, WRITE, ADD | CLEAR)], 0)
    first, second, third = (kq.control(None, 1, 0) for _ in range(3))
    assert sorted(e.filter for e in first + second) == [WRITE, READ]
    assert len(first) == 1
    assert not third


def test_no_ready_descriptor_starves(kq: Any, stack: ExitStack) -> None:
    """An event that was returned goes to the end of the queue (FreeBSD kqueue_scan, XNU knote_activate)."""
    pairs = [unix_pair(stack) for _ in range(4)]
    for ours, theirs in pairs:
        theirs.send(b"x")
        change(kq, ours, READ)
    seen = {kq.control(None, 1, 0)[0].ident for _ in range(2 * len(pairs))}
    assert seen == {ours.fileno() for ours, _ in pairs}


def test_adding_again_replaces_the_parameters_and_adds_no_event(kq: Any, pair: Pair) -> None:
    """Re-adding modifies the event that is there, without a duplicate (man, EV_ADD)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, udata=1)
    change(kq, ours, READ, udata=2)
    assert [e.udata for e in look(kq)] == [2]


@pytest.mark.parametrize("mode", [ONESHOT, CLEAR, DISPATCH], ids=["oneshot", "clear", "dispatch"])
def test_adding_again_does_not_change_the_mode(kq: Any, pair: Pair, mode: int) -> None:
    """A touch copies fflags, data and udata, but no flags (FreeBSD kqueue_register, XNU kevent_register)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD)
    change(kq, ours, READ, ADD | mode)
    assert len(look(kq)) == 1
    assert len(look(kq)) == 1


def test_deleting_and_adding_changes_the_mode(kq: Any, pair: Pair) -> None:
    """EV_DELETE removes the event, so what is added then is a new one (man, EV_DELETE)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD)
    kq.control([kevent(ours, READ, DELETE), kevent(ours, READ, ADD | CLEAR)], 0)
    assert len(look(kq)) == 1
    assert not look(kq)


def test_unknown_event_cannot_be_changed(kq: Any, pair: Pair) -> None:
    """An event that is not there to be modified or deleted gives ENOENT (man, ERRORS)."""
    assert outcome(kq, pair[0], READ, DELETE) == errno.ENOENT
    assert outcome(kq, pair[0], READ, ENABLE) == errno.ENOENT


def test_unknown_filter_is_invalid(kq: Any, pair: Pair) -> None:
    """An invalid filter gives EINVAL (man, ERRORS)."""
    assert outcome(kq, pair[0], -100, ADD) == errno.EINVAL


# When an event is returned


def test_level_event_comes_until_its_condition_is_gone(kq: Any, pair: Pair) -> None:
    """The filter runs again at retrieval, and what no longer holds is not returned (man, DESCRIPTION)."""
    ours, theirs = pair
    change(kq, ours, READ)
    assert not look(kq)
    theirs.send(b"x")
    assert len(look(kq)) == len(look(kq)) == 1
    ours.recv(1)
    assert not look(kq)


def test_condition_that_was_there_before_is_reported(kq: Any, pair: Pair) -> None:
    """The filter runs at registration to find what already is (man, DESCRIPTION)."""
    ours, theirs = pair
    theirs.send(b"x")
    (event,) = kq.control([kevent(ours, READ, ADD | CLEAR)], ROOM, 0)
    assert event.ident == ours.fileno()


def test_clear_reports_a_state_once(kq: Any, pair: Pair) -> None:
    """EV_CLEAR resets the state after retrieval: the next event needs news (man, EV_CLEAR)."""
    ours, theirs = pair
    change(kq, ours, READ, ADD | CLEAR)
    theirs.send(b"x")
    assert look(kq)[0].flags & CLEAR
    assert not look(kq)
    theirs.send(b"y")
    assert [e.data for e in look(kq)] == [2]


def test_touching_a_cleared_event_looks_again(kq: Any, pair: Pair) -> None:
    """Every successful change but a deletion runs the filter (FreeBSD kqueue_register, XNU kevent_register)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD | CLEAR)
    assert look(kq)
    assert not look(kq)
    change(kq, ours, READ, ADD | CLEAR)
    assert len(look(kq)) == 1


def test_oneshot_is_deleted_when_it_is_returned(kq: Any, pair: Pair) -> None:
    """Only the first occurrence is returned, then the event is deleted (man, EV_ONESHOT), so deleting gives ENOENT."""
    ours, theirs = pair
    change(kq, ours, READ, ADD | ONESHOT)
    theirs.send(b"x")
    assert look(kq)[0].flags & ONESHOT
    assert not look(kq)
    assert outcome(kq, ours, READ, DELETE) == errno.ENOENT


def test_dispatch_disables_until_enabled(kq: Any, pair: Pair) -> None:
    """EV_DISPATCH disables the event right after its delivery (man, EV_DISPATCH)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD | DISPATCH)
    assert look(kq)
    assert not look(kq)
    change(kq, ours, READ, ENABLE)
    assert look(kq)
    assert not look(kq)


def test_disabled_event_is_not_returned(kq: Any, pair: Pair) -> None:
    """EV_DISABLE keeps an event from being returned, EV_ENABLE permits it (man, flags)."""
    ours, theirs = pair
    change(kq, ours, READ, ADD | DISABLE)
    theirs.send(b"x")
    assert not look(kq)
    change(kq, ours, READ, ENABLE)
    assert look(kq)
    change(kq, ours, READ, DISABLE)
    assert not look(kq)
    theirs.close()
    assert not look(kq)


def test_adding_a_disabled_event_enables_it_only_with_enable(kq: Any, pair: Pair) -> None:
    """EV_ADD alone leaves an event that is there disabled (FreeBSD kqueue_register, XNU knote_apply_touch; not man)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD | DISABLE)
    change(kq, ours, READ, ADD)
    assert not look(kq)
    change(kq, ours, READ, ADD | ENABLE)
    assert look(kq)


def test_enable_with_disable(kq: Any, pair: Pair, system: System) -> None:
    """EINVAL (FreeBSD kqueue_register), or EV_DISABLE wins (XNU kevent_register)."""
    ours, theirs = pair
    theirs.send(b"x")
    assert outcome(kq, ours, READ, ADD | ENABLE | DISABLE) == system.enable_and_disable
    assert not look(kq)


# What an event says


def test_read_event_counts_the_bytes(kq: Any, any_pair: Pair) -> None:
    """data is the number of bytes to read (man, EVFILT_READ, sockets)."""
    ours, theirs = any_pair
    change(kq, ours, READ)
    theirs.send(b"12345")
    assert wait(kq).data == 5


def test_eof_comes_while_bytes_are_buffered(kq: Any, any_pair: Pair) -> None:
    """EV_EOF says that the read direction is shut, and may come with data still pending (man, EVFILT_READ, sockets)."""
    ours, theirs = any_pair
    theirs.sendall(b"12345")
    theirs.shutdown(socket.SHUT_WR)
    change(kq, ours, READ)
    event = wait_for_eof(kq)
    assert (event.data, event.fflags) == (5, 0)
    ours.recv(5)
    event = wait_for_eof(kq)
    assert event.data == 0


def test_reset_is_eof_with_the_error_and_leaves_it_to_the_socket(kq: Any, stack: ExitStack) -> None:
    """The socket error is in fflags with EV_EOF, for both filters (man, EVFILT_READ and EVFILT_WRITE, sockets)."""
    ours, theirs = tcp_pair(stack)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    for filter in (READ, WRITE):
        change(kq, ours, filter)
        event = wait_for_eof(kq)
        assert (event.filter, event.fflags) == (filter, errno.ECONNRESET)
        change(kq, ours, filter, DELETE)
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_own_shutdown_is_eof_of_the_write_filter_only(kq: Any, any_pair: Pair) -> None:
    """A socket that cannot send more has EV_EOF on EVFILT_WRITE (FreeBSD and XNU uipc_socket.c, filt_sowrite)."""
    ours, _ = any_pair
    ours.shutdown(socket.SHUT_WR)
    kq.control([kevent(ours, READ), kevent(ours, WRITE)], 0)
    event = wait(kq)
    assert event.filter == WRITE
    assert event.flags & EOF


def test_peer_shutdown_is_no_eof_of_the_write_filter(kq: Any, any_pair: Pair) -> None:
    """EV_EOF is of one direction: a peer that sends no more may still read (man, EVFILT_WRITE)."""
    ours, theirs = any_pair
    theirs.shutdown(socket.SHUT_WR)
    change(kq, ours, READ)
    wait_for_eof(kq)
    change(kq, ours, READ, DELETE)
    change(kq, ours, WRITE)
    assert not wait(kq).flags & EOF


def test_pipe_reader_has_eof_when_the_writer_is_gone(kq: Any, stack: ExitStack) -> None:
    """EV_EOF is set when the last writer disconnects; data counts what is left (man, EVFILT_READ, pipes)."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    os.write(writer, b"123")
    change(kq, reader, READ)
    event = wait(kq)
    assert (event.data, event.flags & EOF) == (3, 0)
    os.close(writer)
    event = wait(kq)
    assert (event.data, event.flags & EOF) == (3, EOF)
    os.read(reader, 3)
    event = wait(kq)
    assert (event.data, event.flags & EOF) == (0, EOF)


def test_pipe_writer_has_eof_when_the_reader_is_gone(kq: Any, stack: ExitStack) -> None:
    """EV_EOF is set when the reader disconnects (man, EVFILT_WRITE)."""
    reader, writer = os.pipe()
    stack.callback(os.close, writer)
    change(kq, writer, WRITE)
    event = wait(kq)
    assert event.data >= 1
    assert not event.flags & EOF
    os.close(reader)
    assert wait(kq).flags & EOF


def test_listener_is_ready_when_a_connection_is_pending(kq: Any, stack: ExitStack) -> None:
    """A listening socket returns when a connection is pending, data is the backlog (man, EVFILT_READ, sockets)."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    change(kq, listener, READ)
    assert not look(kq)
    stack.enter_context(socket.create_connection(listener.getsockname()))
    assert wait(kq).data >= 1
    stack.enter_context(listener.accept()[0])
    assert not look(kq)


def test_except_filter_reports_out_of_band_data(kq: Any, stack: ExitStack, system: System) -> None:
    """EVFILT_EXCEPT with NOTE_OOB watches for out-of-band data on a socket (macOS man, EVFILT_EXCEPT)."""
    if system.evfilt_except is None:
        pytest.skip("a filter of macOS")
    ours, theirs = tcp_pair(stack)
    change(kq, ours, system.evfilt_except, fflags=NOTE_OOB)
    assert not look(kq)
    theirs.send(b"!", socket.MSG_OOB)
    event = wait(kq)
    assert event.filter == system.evfilt_except
    assert event.fflags & NOTE_OOB
    assert not event.flags & EOF


# Errors and receipts


def test_failed_change_has_an_entry_where_there_is_room(kq: Any, pair: Pair) -> None:
    """A failed change is in the event list, with EV_ERROR and its errno; others are made (man, RETURN VALUES)."""
    ours, theirs = pair
    theirs.send(b"x")
    (entry,) = kq.control([kevent(ours, WRITE, DELETE, udata=7), kevent(ours, READ)], ROOM, 0)
    assert (entry.ident, entry.filter, entry.data, entry.udata) == (ours.fileno(), WRITE, errno.ENOENT, 7)
    assert entry.flags & ERROR
    assert [e.filter for e in look(kq)] == [READ]


def test_entries_end_the_call_without_a_wait(kq: Any, pair: Pair) -> None:
    """With entries in the event list the kernel looks for no events (FreeBSD kqueue_kevent, XNU kevent_internal)."""
    assert len(kq.control([kevent(pair[0], READ, DELETE)], ROOM, None)) == 1


def test_failed_change_without_room_raises_and_ends_the_changes(kq: Any, pair: Pair) -> None:
    """Without room for the entry the call fails (man, RETURN VALUES), there and then (FreeBSD kqueue_kevent)."""
    ours, theirs = pair
    theirs.send(b"x")
    first, failing, last = kevent(ours, READ), kevent(theirs, READ, DELETE), kevent(ours, WRITE)
    with pytest.raises(OSError) as raised:
        kq.control([first, failing, last], 0)
    assert raised.value.errno == errno.ENOENT
    assert [e.filter for e in look(kq)] == [READ]


def test_receipt_answers_success_and_drains_no_event(kq: Any, pair: Pair) -> None:
    """EV_RECEIPT forces an entry, with data 0 after success, so that no pending event comes (man, EV_RECEIPT)."""
    ours, theirs = pair
    theirs.send(b"x")
    changes = [kevent(ours, READ, ADD | RECEIPT), kevent(ours, WRITE, DELETE | RECEIPT)]
    entries = kq.control(changes, ROOM, None)
    assert [(e.filter, e.data) for e in entries] == [(READ, 0), (WRITE, errno.ENOENT)]
    assert all(e.flags & ERROR for e in entries)
    assert [e.filter for e in look(kq)] == [READ]


def test_receipt_without_room(kq: Any, pair: Pair, system: System) -> None:
    """Changes after it are not made, and nothing says so (FreeBSD man, EV_RECEIPT); XNU's kevent_internal goes on."""
    ours, theirs = pair
    theirs.send(b"x")
    kq.control([kevent(ours, READ, ADD | RECEIPT), kevent(ours, WRITE, ADD)], 0)
    made = [READ, WRITE] if system.receipts_without_room_go_on else [READ]
    assert sorted((e.filter for e in look(kq)), reverse=True) == made


# Descriptors that go


def test_closed_descriptor_cannot_be_changed(kq: Any, pair: Pair, system: System) -> None:
    """An invalid descriptor gives EBADF (man, ERRORS); XNU misses the event first, so deleting gives ENOENT there."""
    number = pair[0].fileno()
    change(kq, number, READ)
    pair[0].close()
    assert outcome(kq, number, READ, DELETE) == system.delete_of_closed
    assert outcome(kq, number, READ, ADD) == errno.EBADF


def test_closing_removes_the_events(kq: Any, pair: Pair, stack: ExitStack) -> None:
    """close() removes the events of a descriptor, so that a new file under its number has none (man, DESCRIPTION)."""
    ours, _ = pair
    other, peer = unix_pair(stack)
    number = ours.fileno()
    kq.control([kevent(number, READ), kevent(number, WRITE)], 0)
    ours.close()
    assert not look(kq)
    stack.callback(os.close, os.dup2(other.fileno(), number))
    peer.send(b"x")
    assert not look(kq)
    assert outcome(kq, number, READ, DELETE) == errno.ENOENT
    change(kq, number, READ, udata=9)
    assert [(e.ident, e.udata) for e in look(kq)] == [(number, 9)]


def test_closing_one_of_two_descriptors_of_a_file_removes_its_events(kq: Any, pair: Pair, stack: ExitStack) -> None:
    """Events belong to the number, a dup does not keep them (FreeBSD and XNU knote_fdclose; not man)."""
    ours, theirs = pair
    kept = stack.enter_context(ours.dup())
    number = ours.fileno()
    change(kq, number, READ, udata=1)
    change(kq, kept, READ, udata=2)
    ours.close()
    theirs.send(b"x")
    assert [(e.ident, e.udata) for e in look(kq)] == [(kept.fileno(), 2)]
    change(kq, kept, READ, DELETE)
    assert not look(kq)


def test_event_of_a_dup_does_not_reach_the_new_owner_of_the_number(kq: Any, pair: Pair, stack: ExitStack) -> None:
    """The new file under a closed number has events of its own only (FreeBSD and XNU knote_fdclose)."""
    ours, theirs = pair
    stack.enter_context(ours.dup())
    other, peer = unix_pair(stack)
    number = ours.fileno()
    change(kq, number, READ, udata=1)
    ours.close()
    stack.callback(os.close, os.dup2(other.fileno(), number))
    theirs.send(b"x")
    change(kq, number, READ, udata=2)
    assert not look(kq)
    peer.send(b"xyz")
    assert [(e.data, e.udata) for e in look(kq)] == [(3, 2)]


def test_closing_disturbs_no_other_event(kq: Any, stack: ExitStack) -> None:
    """Only the events that reference the closed descriptor go (man, DESCRIPTION)."""
    (closed, peer), (kept, other) = unix_pair(stack), unix_pair(stack)
    kq.control([kevent(closed, READ), kevent(kept, READ, ADD | CLEAR), kevent(kept, WRITE, ADD | DISABLE)], 0)
    stack.enter_context(closed.dup())
    closed.close()
    peer.send(b"x")
    other.send(b"x")
    assert [(e.ident, e.filter) for e in look(kq)] == [(kept.fileno(), READ)]


# EVFILT_USER


def test_user_event_stays_until_it_is_deleted(kq: Any, system: System) -> None:
    """NOTE_TRIGGER triggers a user event (man, EVFILT_USER), which without EV_CLEAR stays so (FreeBSD filt_user)."""
    change(kq, 1, system.evfilt_user, udata=5)
    assert not look(kq)
    change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER, udata=5)
    assert [(e.ident, e.filter, e.udata) for e in look(kq)] == [(1, system.evfilt_user, 5)]
    assert look(kq)
    change(kq, 1, system.evfilt_user, DELETE)
    assert not look(kq)


def test_user_event_with_clear_is_returned_once(kq: Any, system: System) -> None:
    """Two triggers make one event, which EV_CLEAR resets (man, DESCRIPTION and EV_CLEAR)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR)
    for _ in range(2):
        change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
        change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
        assert len(look(kq)) == 1
        assert not look(kq)


def test_trigger_replaces_udata(kq: Any, system: System) -> None:
    """A trigger is a change: its udata becomes the event's (FreeBSD kqueue_register, XNU kevent_register)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR, udata=5)
    change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
    assert [e.udata for e in look(kq)] == [0]


def test_trigger_with_clear_in_the_same_change(kq: Any, system: System) -> None:
    """EV_CLEAR in the triggering change takes the trigger back (FreeBSD filt_usertouch); XNU's has no such line."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR)
    change(kq, 1, system.evfilt_user, CLEAR, NOTE_TRIGGER)
    assert bool(look(kq)) is not system.clear_undoes_trigger


def test_trigger_in_the_change_that_adds(kq: Any, system: System) -> None:
    """FreeBSD clears fflags before filt_userattach looks at them; XNU's filt_userattach looks at a copy."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR, NOTE_TRIGGER)
    assert bool(look(kq)) is system.add_can_trigger


def test_user_event_needs_no_descriptor_but_an_add(kq: Any, system: System) -> None:
    """ident is not a descriptor here (man, EVFILT_USER); what was never added gives ENOENT (man, ERRORS)."""
    assert outcome(kq, 987654, system.evfilt_user, 0, NOTE_TRIGGER) == errno.ENOENT
    assert outcome(kq, 987654, system.evfilt_user, ADD) == 0


def test_disabled_user_event_keeps_its_trigger(kq: Any, system: System) -> None:
    """EV_DISABLE keeps the event from being returned; the filter itself is not disabled (man, EV_DISABLE)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR | DISABLE)
    change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
    assert not look(kq)
    change(kq, 1, system.evfilt_user, ENABLE)
    assert len(look(kq)) == 1


# Threads. In rounds, because nobody can see whether the other thread waits already: either order has to work.


def test_user_trigger_ends_the_wait_of_another_thread(pool: ThreadPoolExecutor, kq: Any, system: System) -> None:
    """A user event is triggered by user-level code, from any thread (man, EVFILT_USER)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR)
    for _ in range(50):
        waiting = pool.submit(wait, kq)
        change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
        assert waiting.result(DEADLINE).ident == 1


def test_change_reaches_a_thread_that_waits(pool: ThreadPoolExecutor, kq: Any, pair: Pair) -> None:
    """Registering queues an event whose condition holds and wakes who waits (FreeBSD knote_enqueue, XNU the same)."""
    ours, theirs = pair
    theirs.send(b"x")
    change(kq, ours, READ, ADD | DISABLE)
    for _ in range(25):
        waiting = pool.submit(wait, kq)
        change(kq, ours, READ, ENABLE)
        assert waiting.result(DEADLINE).filter == READ
        change(kq, ours, READ, DISABLE)
        waiting = pool.submit(wait, kq)
        change(kq, ours, WRITE, ADD | ONESHOT)
        assert waiting.result(DEADLINE).filter == WRITE


def test_two_waiting_threads_share_the_events(pool: ThreadPoolExecutor, kq: Any, system: System) -> None:
    """A one-shot event is returned once, whoever waits (man, EV_ONESHOT)."""
    for _ in range(25):
        kq.control([kevent(ident, system.evfilt_user, ADD | ONESHOT) for ident in (1, 2)], 0)
        waiting = [pool.submit(kq.control, None, 1, DEADLINE) for _ in range(2)]
        for ident in (1, 2):
            change(kq, ident, system.evfilt_user, 0, NOTE_TRIGGER)
        assert sorted(event.ident for future in waiting for event in future.result(DEADLINE)) == [1, 2]


# Timeouts


def test_zero_timeout_is_a_look(kq: Any, pair: Pair) -> None:
    """A zero timeout polls (man, DESCRIPTION)."""
    change(kq, pair[0], READ)
    assert kq.control(None, ROOM, 0) == kq.control([], ROOM, 0.0) == []


def test_no_room_never_waits(kq: Any, pair: Pair) -> None:
    """With nevents 0 the call returns at once, whatever the timeout (FreeBSD man, DESCRIPTION)."""
    ours, theirs = pair
    theirs.send(b"x")
    assert kq.control([kevent(ours, READ)], 0, None) == kq.control(None, 0) == []
    assert kq.control(None, 0, DEADLINE) == []


@pytest.mark.parametrize("timeout", [0.0001, 0.0015, 0.02])
def test_timeout_is_never_early(kq: Any, timeout: float) -> None:
    """The timeout is a maximum that is waited for in full when nothing comes; then there are no events (man)."""
    start = time.monotonic()
    assert kq.control(None, ROOM, timeout) == []
    assert time.monotonic() - start >= timeout


@pytest.mark.parametrize("timeout", [None, 1e5, 1e8], ids=str)
def test_long_wait_ends_with_its_event(
    pool: ThreadPoolExecutor, kq: Any, system: System, timeout: float | None
) -> None:
    """Without a timeout the wait is indefinite (man); a long one is not cut to an error (FreeBSD kqueue_scan)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR)
    waiting = pool.submit(kq.control, None, ROOM, timeout)
    change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
    assert [e.ident for e in waiting.result(DEADLINE)] == [1]


@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), OverflowError)],
)
def test_timeout_that_makes_no_sense_is_refused(kq: Any, timeout: float, error: type[Exception]) -> None:
    """A timeout must fit a timespec and not be negative (CPython select_kqueue_control)."""
    with pytest.raises(error):
        kq.control(None, ROOM, timeout)


# The objects


def test_negative_room_is_refused(kq: Any) -> None:
    """max_events must be 0 or positive (CPython select_kqueue_control)."""
    with pytest.raises(ValueError):
        kq.control(None, -1, 0)


def test_descriptor_of_the_kqueue_is_readable_while_events_wait(kq: Any, system: System) -> None:
    """A kqueue can be polled: it is readable when an event is queued (FreeBSD kqueue_poll)."""
    change(kq, 1, system.evfilt_user, ADD | CLEAR)
    assert select.select([kq.fileno()], [], [], 0)[0] == []
    change(kq, 1, system.evfilt_user, 0, NOTE_TRIGGER)
    assert select.select([kq.fileno()], [], [], DEADLINE)[0] == [kq.fileno()]
    look(kq)
    assert select.select([kq.fileno()], [], [], 0)[0] == []


def test_closed_kqueue_refuses_everything_but_close(kq: Any) -> None:
    """Operations on a closed kqueue raise ValueError (CPython kqueue_queue_err_closed)."""
    assert not kq.closed
    kq.close()
    kq.close()
    assert kq.closed
    for call in (kq.fileno, lambda: kq.control(None, 0)):
        with pytest.raises(ValueError):
            call()


def test_kevent_has_defaults_and_compares_by_value(pair: Pair) -> None:
    """ident may be an object with fileno(); the rest defaults to adding a READ filter (CPython kqueue_event_init)."""
    event = kevent(pair[0])
    fields = (event.ident, event.filter, event.flags, event.fflags, event.data, event.udata)
    assert fields == (pair[0].fileno(), READ, ADD, 0, 0, 0)
    assert event == kevent(pair[0].fileno(), READ, ADD)
    assert event != kevent(pair[0], WRITE)
    assert event < kevent(pair[0], udata=1)
