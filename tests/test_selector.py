"""What `muxio.Selector` promises beyond CPython's own tests of selectors, which test_cpython_suite.py runs over it."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, SelectorKey
from typing import Any

import pytest
from helpers import BACKENDS, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import muxio

BOTH = EVENT_READ | EVENT_WRITE

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=BACKENDS)
def selector(request: pytest.FixtureRequest) -> Iterator[muxio.Selector]:
    with muxio.Selector(request.param) as selector:
        yield selector


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, peer = socket.socketpair()
    with ours, peer:
        yield ours, peer


# The backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_is_chosen_as_for_a_poller(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXIO_BACKEND", backend)
    with muxio.Selector() as selector:
        assert selector.poller.backend == backend
    with pytest.raises(ValueError, match="nonesuch"):
        muxio.Selector("nonesuch")


def test_fileno_is_there_where_the_facility_has_a_descriptor(selector: muxio.Selector, pair: Pair) -> None:
    assert hasattr(selector, "fileno") == (selector.poller.backend in ("epoll", "kqueue"))
    if hasattr(selector, "fileno"):
        ours, peer = pair
        selector.register(ours, EVENT_READ)
        with muxio.Selector("select") as outer:
            outer.register(selector, EVENT_READ)
            assert outer.select(0) == []
            peer.send(b"x")
            assert outer.select(10) == [(outer.get_key(selector), EVENT_READ)]


# The map


def test_the_map_follows_every_change_and_is_read_only(selector: muxio.Selector, pair: Pair) -> None:
    ours, _ = pair
    keys = selector.get_map()
    key = selector.register(ours, EVENT_READ, "data")
    assert key == SelectorKey(ours, ours.fileno(), EVENT_READ, "data")
    assert dict(keys) == {ours.fileno(): key}
    assert keys[ours] is keys[ours.fileno()] is selector.get_key(ours) is key
    assert not hasattr(keys, "__setitem__")
    assert not hasattr(keys, "__delitem__")
    changed = selector.modify(ours, BOTH, "other")
    assert list(keys.values()) == [changed]
    assert selector.unregister(ours) is changed
    assert len(keys) == 0
    assert keys.get(ours, "nothing") == "nothing"


def test_after_close_the_map_is_empty_and_the_selector_refuses(selector: muxio.Selector, pair: Pair) -> None:
    ours, _ = pair
    selector.register(ours, EVENT_READ)
    keys = selector.get_map()
    selector.close()
    selector.close()
    assert len(keys) == 0
    assert selector.get_map() is None
    attempts: list[Callable[[], object]] = [
        lambda: selector.get_key(ours),
        lambda: selector.register(ours, EVENT_READ),
        lambda: selector.select(0),
        lambda: selector.select(),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError):
            attempt()


def test_what_cannot_be_registered_leaves_no_trace(selector: muxio.Selector, pair: Pair) -> None:
    ours, _ = pair
    with socket.socket() as closed:
        number = closed.fileno()
    with tempfile.TemporaryFile() as file:
        for source in (number, file):
            with pytest.raises(OSError):
                selector.register(source, EVENT_READ)
    for events in (0, EVENT_READ | 4, -1):
        with pytest.raises(ValueError, match="Invalid events"):
            selector.register(ours, events)
    assert len(selector.get_map()) == len(selector.poller) == 0


# What is reported


@pytest.mark.parametrize("asked", [EVENT_READ, EVENT_WRITE, BOTH])
def test_a_hang_up_is_reported_as_all_that_was_asked_for(selector: muxio.Selector, pair: Pair, asked: int) -> None:
    ours, peer = pair
    key = selector.register(ours, asked)
    peer.close()
    for timeout in (0, 10, None):
        assert selector.select(timeout) == [(key, asked)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows polls sockets only")
def test_a_pipe_without_its_other_end_is_ready(selector: muxio.Selector) -> None:
    for end, asked in ((0, EVENT_READ), (1, EVENT_WRITE)):
        pipe = os.pipe()
        os.close(pipe[1 - end])
        try:
            key = selector.register(pipe[end], asked)
            assert selector.select(10) == [(key, asked)]
            selector.unregister(pipe[end])
        finally:
            os.close(pipe[end])


def test_only_what_was_asked_for_is_reported(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")
    for asked in (EVENT_READ, EVENT_WRITE, BOTH):
        key = selector.register(ours, asked)
        assert selector.select(10) == [(key, asked)]
        selector.unregister(ours)


def test_a_list_stays_as_it_was_returned(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")
    key = selector.register(ours, EVENT_READ)
    looked, waited = selector.select(0), selector.poller.poll(0) and selector.select(10)
    selector.unregister(ours)
    assert looked == waited == [(key, EVENT_READ)]


def test_new_data_come_with_the_next_event(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")
    selector.register(ours, EVENT_READ, "old")
    key = selector.modify(ours, EVENT_READ, "new")
    assert selector.select(10) == [(key, EVENT_READ)]
    assert key.data == "new"


# Time and threads


@pytest.mark.parametrize("timeout", [0.0002, 0.0014, 0.01])
def test_a_timeout_is_never_early(selector: muxio.Selector, timeout: float) -> None:
    start = time.monotonic()
    assert selector.select(timeout) == []
    assert time.monotonic() >= start + timeout


def test_a_negative_timeout_is_a_look(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    key = selector.register(ours, EVENT_READ)
    assert selector.select(-1) == []
    peer.send(b"x")
    assert selector.select(-1) == [(key, EVENT_READ)]


def test_a_registration_by_another_thread_is_noticed(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")

    def register() -> None:
        wait_until(lambda: "waiting" in repr(selector.poller))
        selector.register(ours, EVENT_READ)

    thread = threading.Thread(target=register)
    thread.start()
    try:
        ready = selector.select(10)
    finally:
        thread.join()
    assert ready == [(selector.get_key(ours), EVENT_READ)]


@pytest.mark.parametrize("timeout", [0, 10, None])
def test_a_wake_up_ends_one_select(selector: muxio.Selector, pair: Pair, timeout: float | None) -> None:
    ours, peer = pair
    key = selector.register(ours, EVENT_READ)
    selector.poller.wake()
    assert selector.select(timeout) == []
    peer.send(b"x")
    assert selector.select(timeout) == [(key, EVENT_READ)]


# Descriptors that were closed, and numbers that were used again


def test_a_closed_descriptor_does_not_spin_and_can_be_unregistered(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")
    key = selector.register(ours, EVENT_READ)
    ours.close()
    selector.select(0)  # may report it, once
    assert selector.select(0) == []
    assert selector.unregister(ours) is key


def test_modify_of_a_closed_descriptor_unregisters_it(selector: muxio.Selector, pair: Pair) -> None:
    ours, _ = pair
    selector.register(ours, EVENT_READ)
    ours.close()
    with pytest.raises(OSError):
        selector.modify(ours, BOTH)
    assert len(selector.get_map()) == len(selector.poller) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a number of one's own choice")
@pytest.mark.parametrize("looks", [0, 2])
def test_modify_watches_the_new_owner_of_a_number(selector: muxio.Selector, pair: Pair, looks: int) -> None:
    """asyncio asks for `modify` when a reader is added for a number that is registered, whoever has it by now."""
    ours, peer = pair
    former, former_peer = socket.socketpair()
    number = former.detach()
    selector.register(number, EVENT_READ, "old")
    os.close(number)
    for _ in range(looks):
        selector.select(0)
    os.dup2(ours.fileno(), number)
    try:
        key = selector.modify(number, EVENT_READ, "new")
        former_peer.close()
        assert selector.select(0) == []
        peer.send(b"x")
        assert selector.select(10) == [(key, EVENT_READ)]
    finally:
        os.close(number)


def test_a_forked_child_may_only_forget(selector: muxio.Selector, pair: Pair) -> None:
    if sys.platform == "win32":
        pytest.skip("needs fork()")
    ours, peer = pair
    key = selector.register(ours, EVENT_READ)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(RuntimeError):
                selector.select(0)
            selector.unregister(ours)
            selector.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    peer.send(b"x")
    assert selector.select(10) == [(key, EVENT_READ)]


# asyncio


def run(selector: muxio.Selector, main: Callable[[], Any]) -> Any:
    loop = asyncio.SelectorEventLoop(selector)
    try:
        return loop.run_until_complete(asyncio.wait_for(main(), 10))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_asyncio_streams_echo(selector: muxio.Selector) -> None:
    data = bytes(range(256)) * 4096  # more than the socket buffers hold

    async def main() -> None:
        served = asyncio.Event()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while chunk := await reader.read(65_536):
                writer.write(chunk)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
            served.set()

        async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()
            await served.wait()

    run(selector, main)


def test_asyncio_takes_a_reader_from_another_thread(selector: muxio.Selector, pair: Pair) -> None:
    ours, peer = pair
    peer.send(b"x")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()

        def add() -> None:
            wait_until(lambda: "waiting" in repr(selector.poller))
            loop.call_soon_threadsafe(loop.add_reader, ours, readable.set)

        thread = threading.Thread(target=add)
        thread.start()
        try:
            await readable.wait()
        finally:
            thread.join()
        assert loop.remove_reader(ours)

    run(selector, main)


# The same as CPython's


PAIRS = 3
index = st.integers(0, PAIRS - 1)
by_number = st.booleans()
asked = st.sampled_from([EVENT_READ, EVENT_WRITE, BOTH])
operations = st.one_of(
    st.tuples(st.just("register"), index, by_number, asked | st.sampled_from([0, 4, 7]), st.integers(0, 1)),
    st.tuples(st.just("modify"), index, by_number, asked, st.integers(0, 1)),
    st.tuples(st.sampled_from(["unregister", "get_key"]), index, by_number),
    st.tuples(st.sampled_from(["send", "receive", "shut", "hang up", "renew"]), index),
)


def told(operation: Callable[..., SelectorKey], *arguments: Any) -> object:
    """What a selector answers: the key but for the file object, of which CPython's keep the first or the last."""
    try:
        return operation(*arguments)[1:]
    except (KeyError, ValueError) as error:
        return type(error)


def seen(selector: BaseSelector) -> dict[SelectorKey, int]:
    """What is ready now. (CPython's kqueue selector may report the two directions apart.)"""
    if sys.platform == "win32" and isinstance(selector, selectors.SelectSelector) and not selector.get_map():
        return {}  # WinError 10022: Winsock's select() does not wait for nothing
    found: dict[Any, int] = {}
    for key, events in selector.select(0):
        found[key[1:]] = found.get(key[1:], 0) | events
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None)
@given(sequence=st.lists(operations, max_size=25))
def test_any_sequence_gives_what_cpythons_selector_gives(backend: str, sequence: list[Any]) -> None:
    pairs = [socket.socketpair() for _ in range(PAIRS)]
    with muxio.Selector(backend) as mine, selectors.DefaultSelector() as theirs:
        # CPython's selector over select() puts what is modified at the end of its map.
        ordered = sorted if isinstance(theirs, selectors.SelectSelector) else list

        def listed(selector: BaseSelector) -> list[Any]:
            return ordered(key[1:] for key in selector.get_map().values())

        try:
            for name, which, *rest in sequence:
                ours, peer = pairs[which]
                if name == "send" and peer.fileno() >= 0:
                    try:
                        peer.send(b"x")
                    except BrokenPipeError:
                        pass  # shut already
                elif name == "receive":
                    ours.setblocking(False)
                    try:
                        ours.recv(1)
                    except OSError:
                        pass  # nothing there, or reset
                elif name == "shut" and peer.fileno() >= 0:
                    peer.shutdown(socket.SHUT_WR)
                elif name == "hang up":
                    peer.close()
                elif name == "renew":  # the number is often used again at once
                    keys = mine.get_map().get(ours), theirs.get_map().get(ours)
                    ours.close()
                    assert (keys[0] is None) == (keys[1] is None)
                    if keys[0] and keys[1]:
                        assert told(mine.unregister, keys[0].fileobj) == told(theirs.unregister, keys[1].fileobj)
                    peer.close()
                    pairs[which] = socket.socketpair()
                elif rest:
                    by_number, *arguments = rest
                    source = ours.fileno() if by_number else ours
                    assert told(getattr(mine, name), source, *arguments) == told(
                        getattr(theirs, name), source, *arguments
                    )
                assert seen(mine) == seen(theirs)
                assert listed(mine) == listed(theirs)
        finally:
            for ours, peer in pairs:
                ours.close()
                peer.close()
