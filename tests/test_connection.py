"""One connection over a real socket, run by a real loop: its life by the table, and asyncio's rules of transports."""

from __future__ import annotations

import array
import itertools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from typing import Protocol as Interface

import pytest
from helpers import Recorder, needs_resets, receive_reset, run_turns, run_until, tcp_pair

from muxio.server import BufferedProtocol, Connection, Loop, Protocol, Transport
from muxio.server.connection import HIGH_WATER, LOW_WATER, RECEIVE_SIZE, TRANSITIONS, AnyProtocol, Event, State

#: More bytes than the high-water mark, and than the small buffers of `tcp_pair` take.
MUCH = 512 * 1024

Pair = tuple[socket.socket, socket.socket]


class Connect(Interface):
    """Makes a connection that runs a protocol. Returns it and the peer's socket."""

    def __call__(self, protocol: AnyProtocol, pair: Pair | None = None) -> tuple[Connection, socket.socket]: ...


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def connect(loop: Loop) -> Iterator[Connect]:
    """Makes connections, over TCP unless a pair is given, and closes them after the test."""
    made: list[tuple[Connection, socket.socket]] = []

    def connect(protocol: AnyProtocol, pair: Pair | None = None) -> tuple[Connection, socket.socket]:
        ours, peer = pair or tcp_pair()
        connection = Connection(loop.clients, ours, peer.getsockname(), protocol)
        made.append((connection, peer))
        connection.start()
        return connection, peer

    yield connect
    for connection, peer in made:
        connection.abort()
        peer.close()


class KeepsOpen(Recorder):
    """Goes on writing after the peer's EOF."""

    def eof_received(self) -> bool | None:
        super().eof_received()
        return True


class Buffered(BufferedProtocol):
    """Receives into one buffer, 10 bytes at a time."""

    def __init__(self) -> None:
        self.buffer = bytearray(10)
        self.received = bytearray()
        self.errors: list[Exception | None] = []

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self.buffer[:nbytes]

    def connection_lost(self, error: Exception | None) -> None:
        self.errors.append(error)


def pattern(size: int) -> bytes:
    """Bytes in which no two places look the same, so that what is lost, repeated or swapped is found."""
    return b"".join(number.to_bytes(4, "big") for number in range(size // 4))


PATTERN = pattern(MUCH)


def fill(transport: Transport) -> bytes:
    """Write until the peer would have to read: bytes stay queued. Returns what was written.

    One write does, but on Windows: there a first send is taken whole, however big.
    """
    written = b""
    while transport.get_write_buffer_size() <= MUCH // 2 and not transport.is_closing():
        transport.write(PATTERN)
        written += PATTERN
    return written


def read_until_eof(loop: Loop, peer: socket.socket, expected: int | None = None) -> bytes:
    """What the peer receives until EOF, or so many bytes, while the loop runs."""
    received = bytearray()
    peer.setblocking(False)

    def ended() -> bool:
        with suppress(BlockingIOError):
            while expected is None or len(received) < expected:
                if not (data := peer.recv(65_536)):
                    return True
                received.extend(data)
        return len(received) == expected

    run_until(loop, ended)
    peer.settimeout(10)
    return bytes(received)


def reset(peer: socket.socket) -> None:
    """Close the peer's end with a RST."""
    linger = array.array("H" if os.name == "nt" else "i", [1, 0])
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    peer.close()


# The table


def path_to(state: State) -> list[Event]:
    """The shortest way from OPEN to a state, by the table."""
    paths: dict[State, list[Event]] = {State.OPEN: []}
    while state not in paths:
        found = {
            after: [*paths[before], event]
            for (before, event), after in TRANSITIONS.items()
            if before in paths and after not in paths
        }
        assert found, f"{state} cannot be reached"
        paths.update(found)
    return paths[state]


def bring_about(event: Event, loop: Loop, connection: Connection, peer: socket.socket) -> None:
    after = TRANSITIONS.get((connection.state, event), connection.state)
    if connection.get_write_buffer_size() == 0:  # then what has to wait for that happens at once
        after = TRANSITIONS.get((after, Event.FLUSHED), after)
    if event is Event.PEER_EOF:
        with suppress(OSError):  # reset by us
            peer.shutdown(socket.SHUT_WR)
    elif event is Event.WRITE_EOF:
        connection.write_eof()
    elif event is Event.CLOSE:
        connection.close()
    elif event is Event.FLUSHED:
        take_all(loop, connection, peer)
    else:
        connection.abort()
    run_until(loop, lambda: connection.state is after)
    run_turns(loop)


def take_all(loop: Loop, connection: Connection, peer: socket.socket) -> None:
    """Let the peer read until nothing is queued for it."""
    peer.setblocking(False)

    def is_flushed() -> bool:
        with suppress(BlockingIOError, ConnectionResetError):
            peer.recv(65_536)
        return connection.get_write_buffer_size() == 0

    run_until(loop, is_flushed)
    peer.settimeout(10)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name.lower())
@pytest.mark.parametrize("state", State, ids=lambda state: state.name.lower())
def test_the_table_is_followed(state: State, event: Event, loop: Loop, connect: Connect) -> None:
    protocol = KeepsOpen()
    connection, peer = connect(protocol)
    fill(connection)  # as long as bytes are queued, no state passes into the next by itself
    path = path_to(state)
    for step in path:
        bring_about(step, loop, connection, peer)
    assert connection.state is state
    calls = list(protocol.calls)

    bring_about(event, loop, connection, peer)
    after = TRANSITIONS.get((state, event), state)
    assert connection.state is after
    assert connection.is_reading() == (after in (State.OPEN, State.HALF_CLOSED_LOCAL))
    assert connection.is_closing() == (after in (State.CLOSING, State.LINGERING, State.FLUSHING, State.CLOSED))
    flushed = after is State.CLOSED or Event.FLUSHED in (*path, event)
    assert (connection.get_write_buffer_size() > 0) == (not flushed)
    told = []
    if event is Event.PEER_EOF and state in (State.OPEN, State.HALF_CLOSED_LOCAL):
        told = ["eof_received"]
    elif after is State.CLOSED and state is not State.CLOSED:
        told = ["connection_lost"]
    assert [call for call in protocol.calls[len(calls) :] if call != "resume_writing"] == told


@pytest.mark.parametrize("state", State, ids=lambda state: state.name.lower())
def test_every_state_can_be_reached_and_left(state: State) -> None:
    path_to(state)
    assert ((state, Event.LOST) in TRANSITIONS) == (state is not State.CLOSED)


def test_a_life_goes_only_forward() -> None:
    ages = {
        State.OPEN: 0,
        State.HALF_CLOSED_REMOTE: 1,
        State.HALF_CLOSED_LOCAL: 1,
        State.CLOSING: 2,
        State.LINGERING: 3,
        State.FLUSHING: 3,
        State.CLOSED: 4,
    }
    assert ages.keys() == set(State)
    for (before, _), after in TRANSITIONS.items():
        assert ages[before] < ages[after]


@pytest.mark.parametrize(
    "events",
    [
        (Event.CLOSE, Event.PEER_EOF),
        (Event.WRITE_EOF, Event.PEER_EOF),
        (Event.PEER_EOF, Event.WRITE_EOF),
        (Event.PEER_EOF, Event.CLOSE),
        (Event.WRITE_EOF, Event.CLOSE, Event.PEER_EOF),
    ],
    ids=lambda events: "+".join(event.name.lower() for event in events),
)
@pytest.mark.parametrize("queued", [False, True], ids=["nothing queued", "bytes queued"])
def test_the_last_byte_sent_ends_what_is_closed_from_both_sides(
    queued: bool, events: tuple[Event, ...], loop: Loop, connect: Connect
) -> None:
    protocol = KeepsOpen()
    connection, peer = connect(protocol)
    written = fill(connection) if queued else b""
    for event in events:
        if event is Event.PEER_EOF and connection.state is State.LINGERING:
            assert protocol.errors == []
        bring_about(event, loop, connection, peer)
    assert protocol.errors == ([] if queued else [None])
    assert read_until_eof(loop, peer) == written
    run_until(loop, lambda: protocol.errors)
    assert connection.state is State.CLOSED
    assert protocol.errors == [None]


# Closing


def test_what_was_sent_is_not_lost_to_unread_input(loop: Loop, connect: Connect) -> None:
    """A close() with unread input resets, and the reset would take the answer with it."""
    protocol = Recorder()
    connection, peer = connect(protocol)
    connection.pause_reading()
    peer.sendall(b"question" * 1000)
    run_turns(loop)
    answer = fill(connection)
    connection.close()
    assert read_until_eof(loop, peer) == answer
    peer.sendall(b"and more")
    peer.close()
    run_until(loop, lambda: protocol.errors)
    assert protocol.errors == [None]
    assert protocol.received == b""


def test_a_peer_that_sends_before_it_reads_gets_what_is_queued(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    written = fill(connection)
    connection.close()
    peer.setblocking(False)
    left = bytearray(PATTERN)

    def all_sent() -> bool:
        with suppress(BlockingIOError):
            del left[: peer.send(left)]
        return not left

    run_until(loop, all_sent)
    assert read_until_eof(loop, peer) == written


# Receiving


def test_data_is_bytes_of_the_protocols_own(loop: Loop, connect: Connect) -> None:
    pieces: list[bytes] = []

    class Keeper(Protocol):
        def data_received(self, data: bytes) -> None:
            pieces.append(data)

    _, peer = connect(Keeper())
    for number, piece in enumerate((b"first", b"other"), 1):
        peer.sendall(piece)
        run_until(loop, lambda number=number: len(pieces) == number)  # type: ignore[misc]
    assert pieces == [b"first", b"other"]
    assert [type(piece) for piece in pieces] == [bytes, bytes]


def test_what_comes_with_eof_is_received_before_it(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    _, peer = connect(protocol)
    peer.sendall(b"last words")
    peer.shutdown(socket.SHUT_WR)
    run_until(loop, lambda: protocol.errors)
    assert protocol.received == b"last words"
    assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]


def test_paused_reading_receives_nothing_until_it_is_resumed(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    connection.pause_reading()
    connection.pause_reading()
    assert not connection.is_reading()
    peer.sendall(b"x")
    run_turns(loop)
    assert protocol.received == b""
    connection.resume_reading()
    assert connection.is_reading()
    run_until(loop, lambda: protocol.received == b"x")


def test_pausing_from_inside_data_received_holds_back_the_rest(loop: Loop, connect: Connect) -> None:
    class OneBite(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()

    protocol = OneBite()
    connection, peer = connect(protocol)
    peer.sendall(b"one")
    run_until(loop, lambda: protocol.received == b"one")
    peer.sendall(b"two")
    run_turns(loop)
    assert protocol.received == b"one"
    connection.resume_reading()
    run_until(loop, lambda: protocol.received == b"onetwo")


def test_pausing_another_connection_counts_within_the_same_batch(loop: Loop, connect: Connect) -> None:
    connections: list[Connection] = []

    class PausesAll(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            for connection in connections:
                connection.pause_reading()

    protocols = [PausesAll(), PausesAll()]
    for protocol in protocols:
        connection, peer = connect(protocol)
        connections.append(connection)
        peer.sendall(b"x")  # both are ready when the loop looks
    run_until(loop, lambda: protocols[0].received or protocols[1].received)
    run_turns(loop)
    assert sorted(len(protocol.received) for protocol in protocols) == [0, 1]
    for connection in connections:
        connection.resume_reading()
    run_until(loop, lambda: protocols[0].received == protocols[1].received == b"x")


def test_closing_another_connection_counts_within_the_same_batch(loop: Loop, connect: Connect) -> None:
    connections: list[Connection] = []

    class ClosesAll(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            for connection in connections:
                connection.close()

    protocols = [ClosesAll(), ClosesAll()]
    for protocol in protocols:
        connection, peer = connect(protocol)
        connections.append(connection)
        peer.sendall(b"x")
        peer.shutdown(socket.SHUT_WR)  # which the connections wait for when they close
    run_until(loop, lambda: protocols[0].errors and protocols[1].errors)
    assert sorted(len(protocol.received) for protocol in protocols) == [0, 1]


def test_no_peer_is_received_from_more_than_once_an_event(loop: Loop, connect: Connect) -> None:
    """A greedy peer holds up the others for one receive at most."""
    sizes: list[int] = []

    class Sizes(Protocol):
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            loop.stop()

    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    connect(Sizes(), (ours, peer))
    with suppress(BlockingIOError):
        while True:
            peer.send(bytes(4 * RECEIVE_SIZE))
    for turns in (1, 2):
        loop.run()
        assert len(sizes) == turns
    assert max(sizes) <= RECEIVE_SIZE


@pytest.mark.parametrize("view", [False, True], ids=["bytearray", "memoryview"])
def test_a_buffered_protocol_receives_into_its_own_buffer(view: bool, loop: Loop, connect: Connect) -> None:
    class Viewed(Buffered):
        def get_buffer(self, sizehint: int) -> bytearray | memoryview:
            return memoryview(self.buffer)

    protocol = Viewed() if view else Buffered()
    _, peer = connect(protocol)
    sent = pattern(100)
    peer.sendall(sent)
    peer.shutdown(socket.SHUT_WR)
    run_until(loop, lambda: protocol.errors)
    assert protocol.received == sent
    assert len(protocol.buffer) == 10
    assert protocol.errors == [None]


def test_an_empty_buffer_is_an_error(loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    protocol = Buffered()
    _, peer = connect(protocol)
    protocol.buffer = bytearray()
    peer.sendall(b"x")
    run_until(loop, lambda: protocol.errors)
    assert [type(error) for error in protocol.errors] == [RuntimeError]
    assert "get_buffer()" in caplog.text


# EOF


def test_a_false_eof_received_closes_after_what_is_queued(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    written = fill(connection)
    peer.shutdown(socket.SHUT_WR)
    run_until(loop, connection.is_closing)
    assert protocol.errors == []
    assert read_until_eof(loop, peer) == written
    run_until(loop, lambda: protocol.errors == [None])


def test_a_true_eof_received_goes_on_writing(loop: Loop, connect: Connect) -> None:
    protocol = KeepsOpen()
    connection, peer = connect(protocol)
    peer.shutdown(socket.SHUT_WR)
    run_until(loop, lambda: "eof_received" in protocol.calls)
    run_turns(loop)
    assert not connection.is_closing()
    written = fill(connection)
    connection.close()
    assert read_until_eof(loop, peer) == written
    run_until(loop, lambda: protocol.errors == [None])
    assert protocol.calls.count("eof_received") == 1


def test_write_eof_sends_eof_after_what_is_queued_and_goes_on_receiving(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    written = fill(connection)
    connection.write_eof()
    connection.write_eof()
    with pytest.raises(RuntimeError):
        connection.write(b"more")
    assert read_until_eof(loop, peer) == written
    with pytest.raises(RuntimeError):
        connection.writelines([b"more"])
    peer.sendall(b"still here")
    run_until(loop, lambda: protocol.received == b"still here")
    assert protocol.errors == []
    peer.shutdown(socket.SHUT_WR)
    run_until(loop, lambda: protocol.errors == [None])


# Writing


def test_a_big_write_arrives_whole_and_in_order_through_a_small_buffer(loop: Loop, connect: Connect) -> None:
    connection, peer = connect(Recorder())
    written = fill(connection)
    queued = connection.get_write_buffer_size()
    assert 0 < queued < len(written)  # the kernel took a part
    connection.write(PATTERN)
    assert connection.get_write_buffer_size() == queued + MUCH
    written += PATTERN
    assert read_until_eof(loop, peer, len(written)) == written
    assert connection.get_write_buffer_size() == 0
    assert connection.bytes_out == len(written)


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "queued"])
@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"memoryview"),
        memoryview(array.array("I", range(100))),
        memoryview(array.array("d", range(16_000))),  # the kernel takes more bytes than there are items, but not all
        memoryview(bytearray(range(12))).cast("B", (3, 4)),
        b"",
        memoryview(b""),
    ],
    ids=["bytes", "bytearray", "memoryview", "items", "many items", "two dimensions", "empty", "empty view"],
)
def test_every_kind_of_bytes_arrives(data: Any, queued: bool, loop: Loop, connect: Connect) -> None:
    connection, peer = connect(Recorder())
    expected = fill(connection) if queued else b""
    connection.write(data)
    expected += bytes(data)
    if isinstance(data, bytearray):
        data[:] = b"changed"  # it was ours only during the call
    connection.close()
    assert read_until_eof(loop, peer) == expected


def test_writelines_is_one_write(loop: Loop, connect: Connect) -> None:
    connection, peer = connect(Recorder())
    connection.writelines([b"one", bytearray(b"two"), memoryview(array.array("H", [1, 2]))])
    connection.writelines([])
    connection.close()
    assert read_until_eof(loop, peer) == b"onetwo" + array.array("H", [1, 2]).tobytes()


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "after others"])
def test_writelines_of_many_pieces_arrive_whole_and_in_order(queued: bool, loop: Loop, connect: Connect) -> None:
    """More than one sendmsg() takes, of all kinds and sizes, empty ones too."""
    connection, peer = connect(Recorder())
    written = fill(connection) if queued else b""
    kinds: list[Any] = [bytes, bytearray, memoryview]
    cuts = [0, *itertools.accumulate(number % 300 for number in range(3000))]
    pieces = [kinds[a % 3](PATTERN[a:b]) for a, b in itertools.pairwise(cuts)]
    connection.writelines(iter(pieces))
    connection.close()
    assert read_until_eof(loop, peer) == written + PATTERN[: cuts[-1]]


def test_lower_water_marks_count_at_once(connect: Connect) -> None:
    protocol = Recorder()
    connection, _ = connect(protocol)
    connection.set_write_buffer_limits(high=1 << 30)
    fill(connection)
    assert "pause_writing" not in protocol.calls
    connection.set_write_buffer_limits(high=1000)
    assert protocol.calls[-1] == "pause_writing"


def test_writelines_counts_against_the_high_water_mark(connect: Connect) -> None:
    protocol = Recorder()
    connection, _ = connect(protocol)
    while not connection.get_write_buffer_size():
        connection.writelines(itertools.repeat(bytes(1024), MUCH // 1024))
    assert protocol.calls == ["connection_made", "pause_writing"]


def test_close_sends_what_is_queued(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    written = fill(connection)
    connection.close()
    connection.write(b"too late")
    assert protocol.errors == []
    assert read_until_eof(loop, peer) == written
    peer.close()
    run_until(loop, lambda: protocol.errors == [None])


def test_a_closing_connection_receives_nothing(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    fill(connection)
    connection.close()
    peer.sendall(b"too late")
    run_turns(loop)
    assert connection.state is State.CLOSING
    assert protocol.received == b""


# Water marks


def test_pause_writing_comes_from_inside_the_write(connect: Connect) -> None:
    protocol = Recorder()
    connection, _ = connect(protocol)
    fill(connection)
    assert protocol.calls == ["connection_made", "pause_writing"]
    connection.write(PATTERN)
    assert protocol.calls == ["connection_made", "pause_writing"]  # once


def test_resume_writing_comes_at_the_low_water_mark(loop: Loop, connect: Connect) -> None:
    sizes: list[int] = []

    class Sizes(Recorder):
        def resume_writing(self) -> None:
            super().resume_writing()
            sizes.append(self.transport.get_write_buffer_size())

    protocol = Sizes()
    connection, peer = connect(protocol)
    connection.set_write_buffer_limits(high=MUCH // 2, low=MUCH // 4)
    written = fill(connection)
    read_until_eof(loop, peer, MUCH // 8)
    run_turns(loop)
    assert connection.get_write_buffer_size() > MUCH // 4
    assert sizes == []
    read_until_eof(loop, peer, len(written) - MUCH // 8)
    run_until(loop, lambda: sizes)
    assert protocol.calls == ["connection_made", "pause_writing", "resume_writing"]
    assert 0 < sizes[0] <= MUCH // 4  # not only when the queue is empty


def test_up_to_the_high_water_mark_nothing_is_paused(connect: Connect) -> None:
    protocol = Recorder()
    connection, _ = connect(protocol)
    while not connection.get_write_buffer_size():
        connection.write(bytes(1024))
    connection.write(bytes(HIGH_WATER - connection.get_write_buffer_size()))
    assert connection.get_write_buffer_size() == HIGH_WATER
    assert protocol.calls == ["connection_made"]
    connection.write(b"x")
    assert protocol.calls == ["connection_made", "pause_writing"]


def test_a_producer_may_write_on_from_inside_resume_writing(loop: Loop, connect: Connect) -> None:
    rounds = 5

    class Producer(Recorder):
        written = b""

        def connection_made(self, transport: Transport) -> None:
            super().connection_made(transport)
            self.written += fill(transport)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.calls.count("resume_writing") < rounds:
                self.written += fill(self.transport)
            else:
                self.transport.close()

    protocol = Producer()
    _, peer = connect(protocol)
    assert read_until_eof(loop, peer) == protocol.written
    peer.close()
    run_until(loop, lambda: protocol.errors == [None])
    assert protocol.calls == ["connection_made", *["pause_writing", "resume_writing"] * rounds, "connection_lost"]


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        ({}, LOW_WATER, HIGH_WATER),
        ({"high": 1000}, 250, 1000),
        ({"low": 1000}, 1000, 4000),
        ({"high": 5, "low": 5}, 5, 5),
        ({"high": 0}, 0, 0),
    ],
    ids=["default", "high only", "low only", "equal", "zero"],
)
def test_water_marks_can_be_set(given: dict[str, int], low: int, high: int, connect: Connect) -> None:
    connection, _ = connect(Recorder())
    assert connection.get_write_buffer_limits() == (LOW_WATER, HIGH_WATER)
    connection.set_write_buffer_limits(high=1, low=1)
    connection.set_write_buffer_limits(**given)
    assert connection.get_write_buffer_limits() == (low, high)


@pytest.mark.parametrize("given", [{"high": 1, "low": 2}, {"low": -1}, {"high": -1}, {"high": 5, "low": -1}], ids=str)
def test_water_marks_that_make_no_sense_are_refused(given: dict[str, int], connect: Connect) -> None:
    connection, _ = connect(Recorder())
    with pytest.raises(ValueError, match="water"):
        connection.set_write_buffer_limits(**given)
    assert connection.get_write_buffer_limits() == (LOW_WATER, HIGH_WATER)


# The end


@pytest.mark.parametrize("queued", [False, True], ids=["nothing queued", "bytes queued"])
def test_abort_sends_a_reset(queued: bool, loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    if queued:
        fill(connection)
    connection.abort()
    connection.abort()
    with pytest.raises(ConnectionResetError):
        receive_reset(peer)
    run_turns(loop)
    assert protocol.errors == [None]


def test_writes_after_the_loss_are_dropped(loop: Loop, connect: Connect) -> None:
    class LastWords(Recorder):
        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self.transport.write(b"too late")

    protocol = LastWords()
    connection, _ = connect(protocol)
    connection.abort()
    connection.write(PATTERN)
    connection.writelines([b"too late"])
    run_turns(loop)
    assert protocol.calls == ["connection_made", "connection_lost"]
    assert (connection.bytes_out, connection.get_write_buffer_size()) == (0, 0)


def test_a_closed_connection_takes_every_call(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, _ = connect(protocol)
    connection.abort()
    for call in (connection.close, connection.abort, connection.write_eof):
        call()
    connection.pause_reading()
    connection.resume_reading()
    assert not connection.is_reading()
    run_turns(loop)
    assert protocol.errors == [None]


def test_a_reset_by_the_peer_is_told_once_with_its_error(loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    reset(peer)
    run_until(loop, lambda: protocol.errors)
    connection.abort()
    connection.close()
    run_turns(loop)
    assert len(protocol.errors) == 1
    needs_resets()
    assert isinstance(protocol.errors[0], ConnectionResetError)


@pytest.mark.parametrize("queued", [False, True], ids=["nothing queued", "bytes queued"])
def test_a_reset_in_mid_write_is_told_once_with_the_first_error(queued: bool, loop: Loop, connect: Connect) -> None:
    protocol = Recorder()
    connection, peer = connect(protocol)
    if queued:
        fill(connection)
    reset(peer)
    connection.write(b"into the void")
    connection.write(b"and again")
    connection.abort()
    run_turns(loop)
    connection.write(b"and again")
    run_turns(loop)
    assert len(protocol.errors) == 1
    if not queued:
        assert isinstance(protocol.errors[0], (ConnectionResetError, BrokenPipeError))


def test_a_reset_while_nothing_is_read_or_queued_is_noticed(loop: Loop, connect: Connect) -> None:
    if loop.poller.backend == "select":
        pytest.skip("select() tells errors only with READ or WRITE")
    protocol = Recorder()
    connection, peer = connect(protocol)
    connection.pause_reading()
    reset(peer)
    run_until(loop, lambda: protocol.errors)
    run_turns(loop)
    assert [type(error) for error in protocol.errors] == [ConnectionResetError]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="Unix sockets hang up with either end")
def test_a_hang_up_while_reading_is_paused_does_not_spin(
    loop: Loop, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = Recorder()
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    connection, _ = connect(protocol, (ours, peer))
    connection.pause_reading()
    peer.sendall(b"unread")
    peer.close()
    turns = 0
    poll = loop.poller.poll

    def count(timeout: float | None) -> Any:
        nonlocal turns
        turns += 1
        return poll(timeout)

    monkeypatch.setattr(loop.poller, "poll", count)
    loop.call_later(0.1, loop.stop)
    loop.run()
    assert turns < 10
    assert protocol.errors == []
    connection.resume_reading()
    run_until(loop, lambda: protocol.errors)
    assert protocol.received == b"unread"
    assert protocol.errors == [None]


def write_to_a_reset_peer(transport: Transport, peer: socket.socket) -> None:
    reset(peer)
    transport.write(b"x")
    transport.write(b"x")


ENDINGS: dict[str, Callable[[Transport, socket.socket], object]] = {
    "abort": lambda transport, peer: transport.abort(),
    "close": lambda transport, peer: transport.close(),
    "write to a reset peer": write_to_a_reset_peer,
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "pause_writing"])
def test_connection_lost_never_comes_from_inside_another_callback(
    callback: str, ending: str, loop: Loop, connect: Connect
) -> None:
    ours, peer = tcp_pair()
    inside: list[str] = []

    class Ends(Recorder):
        def connection_lost(self, error: Exception | None) -> None:
            assert inside == []
            super().connection_lost(error)

    def end(*arguments: Any) -> None:
        inside.append(callback)
        getattr(Recorder, callback)(protocol, *arguments)
        ENDINGS[ending](protocol.transport, peer)
        inside.clear()

    protocol = Ends()
    setattr(protocol, callback, end)
    connection, _ = connect(protocol, (ours, peer))
    if callback == "data_received":
        peer.sendall(b"x")
    elif callback == "eof_received":
        peer.shutdown(socket.SHUT_WR)
    elif callback == "pause_writing":
        fill(connection)
        assert protocol.errors == []
    run_until(loop, lambda: callback in protocol.calls)
    connection.abort()
    run_until(loop, lambda: protocol.errors)
    run_turns(loop)
    assert len(protocol.errors) == 1


# Callbacks that raise


class Mistake(Exception):
    pass


@pytest.mark.parametrize(
    "callback", ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing"]
)
def test_an_exception_in_a_callback_ends_that_connection_only(
    callback: str, loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise Mistake(callback)

    sibling = Recorder()
    _, siblings_peer = connect(sibling)
    protocol = Recorder()
    setattr(protocol, callback, fail)
    connection, peer = connect(protocol)
    if callback == "data_received":
        peer.sendall(b"x")
    elif callback == "eof_received":
        peer.shutdown(socket.SHUT_WR)
    elif callback in ("pause_writing", "resume_writing"):
        fill(connection)
    peer.setblocking(False)

    def lost() -> list[Exception | None]:
        with suppress(BlockingIOError, ConnectionResetError):
            peer.recv(65_536)
        return protocol.errors

    run_until(loop, lost)
    siblings_peer.sendall(b"y")
    run_until(loop, lambda: sibling.received == b"y")
    assert [(type(error), str(error)) for error in protocol.errors] == [(Mistake, callback)]
    assert connection.state is State.CLOSED
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("muxio.server", logging.ERROR)
    assert "Mistake" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("callback", ["get_buffer", "buffer_updated"])
def test_an_exception_of_a_buffered_protocol_ends_its_connection(
    callback: str, loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise Mistake(callback)

    protocol = Buffered()
    setattr(protocol, callback, fail)
    _, peer = connect(protocol)
    peer.sendall(b"x")
    run_until(loop, lambda: protocol.errors)
    assert [type(error) for error in protocol.errors] == [Mistake]
    assert "Traceback" in caplog.text
    with pytest.raises(ConnectionResetError):
        receive_reset(peer)


def test_an_exception_in_connection_lost_is_logged_and_comes_to_nothing(
    loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Recorder):
        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            raise Mistake("lost")

    protocol = Fails()
    connection, _ = connect(protocol)
    connection.abort()
    run_turns(loop)
    assert protocol.errors == [None]
    (record,) = caplog.records
    assert record.name == "muxio.server"
    assert "Traceback" in caplog.text


def test_an_exception_in_pause_writing_ends_the_connection_that_is_written_to(
    loop: Loop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy writes to one connection from a callback of another: that one has done nothing wrong."""

    class Fragile(Recorder):
        def pause_writing(self) -> None:
            raise Mistake("pause")

    target = Fragile()
    outgoing, _ = connect(target)

    class Forwards(Recorder):
        def data_received(self, data: bytes) -> None:
            fill(outgoing)
            super().data_received(data)

    source = Forwards()
    _, peer = connect(source)
    peer.sendall(b"x")
    run_until(loop, lambda: source.received == b"x")
    run_turns(loop)
    assert [type(error) for error in target.errors] == [Mistake]
    assert source.errors == []
    assert "Traceback" in caplog.text


# What is told about it


def test_get_extra_info(loop: Loop, connect: Connect) -> None:
    ours, peer = tcp_pair()
    connection, _ = connect(Recorder(), (ours, peer))
    assert connection.get_extra_info("peername") == peer.getsockname()
    assert connection.get_extra_info("sockname") == peer.getpeername()
    assert connection.get_extra_info("socket") is ours
    assert connection.get_extra_info("cipher") is None
    assert connection.get_extra_info("cipher", "none") == "none"
    assert connection.loop is loop
    connection.abort()
    assert connection.get_extra_info("peername") == peer.getsockname()
    assert connection.get_extra_info("sockname", "closed") == "closed"


def test_bytes_are_counted_both_ways(loop: Loop, connect: Connect) -> None:
    class Twice(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.write(data + data)

    connection, peer = connect(Twice())
    peer.sendall(b"12345")
    assert read_until_eof(loop, peer, 10) == b"1234512345"
    assert (connection.bytes_in, connection.bytes_out) == (5, 10)


def test_repr_tells_peer_state_and_queue(connect: Connect) -> None:
    connection, peer = connect(Recorder())
    assert repr(connection) == f"<Connection with {peer.getsockname()}: open, 0 B queued>"


def test_small_answers_are_not_held_back(connect: Connect) -> None:
    connection, _ = connect(Recorder())
    assert connection.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
