"""The deadlines of a connection, on a fake clock: each alone, and all of them together against a small model."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from helpers import Recorder, receive_reset, run_turns, tcp_pair, wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from muxio.server import Connection, Loop, Timeouts
from muxio.server.connection import State
from muxio.server.group import Group
from muxio.server.wheel import TICK

#: More than the buffers of `tcp_pair` take.
MUCH = bytes(512 * 1024)

NONE = Timeouts(first_data=None, idle=None, write=None, lifetime=None, close=None, linger=None)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A connection on a loop with a fake clock, and its peer."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.clock = Clock()
        self.loop = Loop(clock=self.clock)
        self.group = Group(self.loop, timeouts)
        self.protocol = Recorder()
        ours, self.peer = tcp_pair()
        self.connection = Connection(self.group, ours, self.peer.getsockname(), self.protocol)
        self.connection.start()
        self.peer.setblocking(False)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass, in steps, since a loop would not sleep through its timers either."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + TICK)
            run_turns(self.loop, 3)

    def pass_by(self, seconds: float) -> None:
        """Hold up the loop for so long, from inside of it."""
        self.clock.now += seconds

    def turn(self) -> None:
        run_turns(self.loop, 5)

    def turned(self) -> Connection:
        self.turn()
        return self.connection

    def is_in(self, state: State) -> bool:
        return self.connection.state is state

    def peer_sends(self) -> None:
        """A byte, which has come when this returns, if the connection reads."""
        before = self.connection.bytes_in
        self.peer.send(b"x")
        if self.connection.is_reading():
            wait_until(lambda: self.turned().bytes_in > before)
        else:
            self.turn()

    def peer_takes_all(self) -> None:
        self.turn()
        while True:
            try:
                if not self.peer.recv(1 << 20):
                    return
            except ConnectionResetError:
                return
            except BlockingIOError:
                self.turn()
                if not self.connection.get_write_buffer_size():
                    return

    def peer_sees_reset(self) -> bool:
        with suppress(BlockingIOError):
            try:
                receive_reset(self.peer)
            except ConnectionResetError:
                return True
        return False

    def close(self) -> None:
        self.connection.abort()
        self.turn()
        self.peer.close()
        self.loop.close()


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(Timeouts(**{**vars(NONE), **request.param}))
    yield bench
    bench.close()


def only(**timeouts: float) -> pytest.MarkDecorator:
    """Run the test with these time-outs and no others."""
    return pytest.mark.parametrize("bench", [timeouts], indirect=True, ids=["+".join(timeouts)])


def lives_for(bench: Bench, seconds: float) -> None:
    """It is not touched before its time, and closing or gone a slot after it."""
    bench.pass_time(seconds - 0.001)
    assert not bench.connection.is_closing()
    bench.pass_time(0.001 + TICK)
    assert bench.connection.is_closing()


def stalls_for(bench: Bench, seconds: float) -> None:
    """It is cut when nothing was taken for so long; the kernel may still take some, in a while of its own."""
    taken, queued = bench.clock.now, bench.connection.get_write_buffer_size()
    while not bench.connection.is_closing():
        assert bench.clock.now < taken + seconds + TICK
        bench.pass_time(TICK)
        if not bench.connection.is_closing() and bench.connection.get_write_buffer_size() != queued:
            taken, queued = bench.clock.now, bench.connection.get_write_buffer_size()
    assert bench.clock.now >= taken + seconds


def end(bench: Bench) -> Exception | None:
    """Let the peer answer our EOF, and see how it ended."""
    bench.peer.close()
    bench.turn()
    (error,) = bench.protocol.errors
    return error


@only(first_data=10)
def test_who_sends_nothing_is_cut(bench: Bench) -> None:
    lives_for(bench, 10)
    assert bench.peer.recv(1) == b""
    error = end(bench)
    assert isinstance(error, TimeoutError)
    assert "no data within 10 s" in str(error)
    assert bench.group.timed_out == 1


@only(first_data=10)
def test_the_first_byte_ends_the_wait_for_it(bench: Bench) -> None:
    bench.pass_time(9)
    bench.peer_sends()
    bench.pass_time(1000)
    assert not bench.connection.is_closing()


@only(idle=10)
def test_who_is_idle_is_cut(bench: Bench) -> None:
    for _ in range(5):
        bench.pass_time(9)
        bench.peer_sends()
    lives_for(bench, 10)
    assert "idle for 10 s" in str(end(bench))


@only(idle=10)
def test_who_gets_something_is_not_idle(bench: Bench) -> None:
    for _ in range(5):
        bench.pass_time(9)
        bench.connection.write(b"x")
        bench.turn()
    lives_for(bench, 10)


@only(idle=10)
def test_a_peer_is_not_idle_while_we_do_not_read(bench: Bench) -> None:
    bench.connection.pause_reading()
    bench.pass_time(100)
    assert not bench.connection.is_closing()
    bench.connection.resume_reading()
    lives_for(bench, 10)


@only(first_data=10)
def test_the_first_byte_is_not_waited_for_while_we_do_not_read(bench: Bench) -> None:
    bench.connection.pause_reading()
    bench.pass_time(100)
    bench.peer_sends()
    bench.connection.resume_reading()
    wait_until(lambda: bench.turned().bytes_in)
    bench.pass_time(100)
    assert not bench.connection.is_closing()


@only(first_data=10)
def test_the_first_byte_is_waited_for_again_when_all_is_sent_to_a_peer_that_was_held(bench: Bench) -> None:
    bench.group.most_buffered = 1000
    bench.connection.write(MUCH)
    bench.pass_time(100)
    assert not bench.connection.is_closing()  # its first byte would not have been read
    bench.peer_takes_all()
    bench.pass_time(TICK)
    assert bench.connection.is_closing()


@only(idle=10)
def test_who_has_sent_all_is_not_idle_while_we_think(bench: Bench) -> None:
    bench.protocol.eof_received = lambda: True  # type: ignore[method-assign]
    bench.peer.shutdown(socket.SHUT_WR)
    wait_until(lambda: bench.turned().state is State.HALF_CLOSED_REMOTE)
    bench.pass_time(100)
    assert not bench.connection.is_closing()


@pytest.mark.parametrize("bench", [{"idle": 1, "first_data": 1}], indirect=True, ids=["idle+first_data"])
def test_a_peer_does_not_pay_for_a_callback_that_holds_up_the_loop(bench: Bench) -> None:
    bench.loop.call_soon(bench.pass_by, 5.0)
    bench.turn()
    bench.pass_time(1 - TICK)
    assert not bench.connection.is_closing()
    bench.peer_sends()
    bench.loop.call_soon(bench.pass_by, 5.0)
    bench.turn()
    lives_for(bench, 1)


@only(write=10)
def test_who_takes_nothing_is_reset(bench: Bench) -> None:
    bench.pass_time(100)
    bench.connection.write(MUCH)
    stalls_for(bench, 10)
    assert bench.is_in(State.CLOSED)
    assert bench.peer_sees_reset()
    assert "nothing was taken for 10 s" in str(end(bench))


@only(write=10)
def test_who_takes_some_gets_more_time(bench: Bench) -> None:
    bench.connection.write(MUCH)
    for _ in range(5):
        bench.pass_time(9)
        queued = bench.connection.get_write_buffer_size()
        while bench.connection.get_write_buffer_size() == queued:
            with suppress(BlockingIOError):
                bench.peer.recv(65_536)
            bench.turn()
    stalls_for(bench, 10)


@only(write=10)
def test_what_was_taken_is_waited_for_no_more(bench: Bench) -> None:
    bench.connection.write(MUCH)
    bench.peer_takes_all()
    bench.pass_time(1000)
    assert not bench.connection.is_closing()


@only(lifetime=10)
def test_everybody_is_cut_in_the_end(bench: Bench) -> None:
    for _ in range(9):
        bench.pass_time(1)
        bench.peer_sends()
    lives_for(bench, 1)
    assert "connected for 10 s" in str(end(bench))


@only(lifetime=10)
def test_what_is_queued_at_the_end_of_a_life_is_sent(bench: Bench) -> None:
    bench.connection.write(MUCH)
    lives_for(bench, 10)
    assert bench.is_in(State.CLOSING)
    bench.peer_takes_all()
    assert bench.is_in(State.LINGERING)


@only(close=10)
def test_a_close_that_cannot_flush_resets(bench: Bench) -> None:
    bench.connection.write(MUCH)
    bench.connection.close()
    bench.pass_time(9.999)
    assert bench.is_in(State.CLOSING)
    bench.pass_time(0.001 + TICK)
    assert bench.is_in(State.CLOSED)
    assert bench.peer_sees_reset()
    assert "within 10 s of closing" in str(end(bench))


@only(close=10)
def test_what_is_queued_when_both_sides_have_ended_has_a_deadline_too(bench: Bench) -> None:
    bench.protocol.eof_received = lambda: True  # type: ignore[method-assign]
    bench.connection.write(MUCH)
    bench.connection.write_eof()
    bench.peer.shutdown(socket.SHUT_WR)
    wait_until(lambda: bench.turned().state is State.FLUSHING)
    bench.pass_time(10 + TICK)
    assert bench.is_in(State.CLOSED)
    assert isinstance(end(bench), TimeoutError)


@only(linger=10)
def test_a_peer_that_keeps_its_end_open_is_left_in_peace(bench: Bench) -> None:
    bench.connection.write(b"answer")
    bench.connection.close()
    bench.pass_time(9.999)
    assert bench.is_in(State.LINGERING)
    bench.pass_time(0.001 + TICK)
    assert bench.is_in(State.CLOSED)
    assert bench.peer.recv(100) == b"answer"
    assert bench.peer.recv(100) == b""
    assert end(bench) is None
    assert bench.group.timed_out == 0


@only(first_data=10)
def test_a_protocol_sets_a_deadline_for_the_rest_of_a_message(bench: Bench) -> None:
    """A byte a second does not keep a connection for ever."""
    bench.connection.set_deadline(20)
    for _ in range(19):
        bench.peer_sends()
        bench.pass_time(1)
    lives_for(bench, 1)
    assert "the protocol's deadline" in str(end(bench))


@only()
def test_a_deadline_can_be_moved_and_taken_back(bench: Bench) -> None:
    bench.connection.set_deadline(10)
    bench.pass_time(9)
    bench.connection.set_deadline(5)
    bench.pass_time(4)
    bench.connection.set_deadline(None)
    bench.pass_time(1000)
    assert not bench.connection.is_closing()


@only(close=10)
@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_deadline_that_makes_no_sense_is_refused(bench: Bench, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        bench.connection.set_deadline(seconds)


@only(close=10)
def test_a_closing_connection_keeps_its_own_deadline(bench: Bench) -> None:
    bench.connection.write(MUCH)
    bench.connection.close()
    bench.connection.set_deadline(1000)
    bench.pass_time(10 + TICK)
    assert bench.is_in(State.CLOSED)


@pytest.mark.parametrize("field", list(vars(NONE)))
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_timeouts_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Timeouts(**{field: value})


@only(idle=1)
def test_the_wheel_rests_while_there_is_nobody(bench: Bench) -> None:
    bench.pass_time(1 + TICK)
    end(bench)
    bench.pass_time(2 * TICK)
    assert not bench.loop._timers  # what would wake the loop


# All of them together


TIMEOUTS = Timeouts(first_data=7, idle=5, write=6, lifetime=30, close=None, linger=None)


class Deadlines(RuleBasedStateMachine):
    """A connection whose peer does this and that while time passes, and a model that says when it has to end.

    How much the kernel takes at a time is its own affair, and with it when a connection ends. So any rule may come at
    any time, and goes on with another connection if the last one has ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.bench = Bench(TIMEOUTS)
        self.now = self.bench.clock
        self.began = self.active = self.progress = self.now()
        self.heard = self.paused = False
        self.sent = 0
        self.deadline = math.inf

    def expected(self) -> float:
        """When it has to end, if nothing happens until then."""
        if self.bench.connection.bytes_out > self.sent:  # the kernel took some more
            self.sent = self.bench.connection.bytes_out
            self.progress = self.active = self.now()
        times = [self.began + 30, self.deadline]
        if not self.heard and not self.paused:
            times.append(self.began + 7)
        if self.bench.connection.get_write_buffer_size():
            times.append(self.progress + 6)
        elif not self.paused:
            times.append(self.active + 5)
        return min(times)

    def is_open(self) -> bool:
        return not self.bench.connection.is_closing()

    def go_on(self) -> None:
        """With another connection, if this one has ended."""
        if not self.is_open():
            self.bench.close()
            self.begin()

    @rule()
    def peer_sends(self) -> None:
        self.go_on()
        self.bench.peer_sends()
        if not self.paused:
            self.heard, self.active = True, self.now()

    @rule()
    def we_write_more_than_is_taken(self) -> None:
        self.go_on()
        if not self.bench.connection.get_write_buffer_size():
            self.progress = self.now()
        self.bench.connection.write(MUCH)
        self.expected()

    @rule()
    def peer_takes_all(self) -> None:
        self.go_on()
        self.expected()
        self.bench.peer_takes_all()
        self.expected()

    @rule()
    def we_pause(self) -> None:
        self.go_on()
        self.bench.connection.pause_reading()
        self.paused = True

    @rule()
    def we_resume(self) -> None:
        self.go_on()
        if self.paused:
            self.paused, self.active = False, self.now()
            self.bench.connection.resume_reading()
            self.bench.peer_sends()
            self.heard = True

    @rule(seconds=st.none() | st.integers(1, 12))
    def we_set_a_deadline(self, seconds: int | None) -> None:
        self.go_on()
        self.bench.connection.set_deadline(seconds)
        self.deadline = math.inf if seconds is None else self.now() + seconds

    @rule(ticks=st.integers(1, 24))
    def time_passes(self, ticks: int) -> None:
        self.go_on()
        for _ in range(ticks):
            expected = self.expected()
            self.bench.pass_time(TICK / 2)
            if self.is_open():
                expected = max(expected, self.expected())
                assert self.now() < expected + TICK, "late"
            else:
                assert self.now() >= expected, "early"
                return

    def teardown(self) -> None:
        self.bench.close()


def test_deadlines_are_those_of_the_model() -> None:
    run_state_machine_as_test(
        Deadlines,
        settings=settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None),
    )
