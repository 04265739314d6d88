"""CPU-bound work off the loop: in order, in turn, cancelled with its connection, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import (
    BACKENDS,
    Recorder,
    needs_resets,
    receive_reset,
    run_turns,
    run_until,
    serving,
    tcp_pair,
    wait_until,
)
from programs import TIMEOUT, Served, ended, running

from muxio.server import Job, Loop, Offload, Protocol, Server
from muxio.server.connection import TRANSITIONS, Connection, Event, State
from muxio.server.limits import Timeouts

ANY_PORT = ("127.0.0.1", 0)

THREADS = Offload("threads", workers=2)
PROCESSES = Offload("processes", workers=2)

both = pytest.mark.parametrize("offload", [THREADS, PROCESSES], ids=lambda offload: offload.kind)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_loop() -> Iterator[Callable[..., Loop]]:
    """Makes loops, and closes them when the test is over, connections first."""
    loops: list[Loop] = []

    def make(offload: Offload = THREADS, backend: str | None = None) -> Loop:
        loops.append(Loop(backend, offload=offload))
        return loops[-1]

    yield make
    for loop in loops:
        loop.end_clients()
        loop.run_once()
        loop.run_once()
        loop.close()


class Asker(Recorder):
    """Hands over what it is told to, and writes down the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Job:
        job = self.transport.offload(function, *arguments)
        job.add_done_callback(self.answer)
        return job

    def answer(self, job: Job) -> None:
        error = job.exception()
        self.answers.append(job.result() if error is None else error)


def connected(loop: Loop, protocol: Asker) -> tuple[Connection, socket.socket]:
    """A connection of the loop's, and the peer's end."""
    ours, peer = tcp_pair()
    connection = Connection(loop.clients, ours, "peer", protocol)
    connection.start()
    return connection, peer


# What comes of a job


@both
def test_a_result_comes_back_through_the_loop(offload: Offload, make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(offload)
    answers: list[int] = []
    job = loop.offload(jobs.double, 21)
    job.add_done_callback(lambda job: answers.append(job.result()))
    assert answers == []  # never from inside offload()
    run_until(loop, lambda: answers)
    assert (answers, job.done(), job.cancelled(), loop.jobs.jobs) == ([42], True, False, 0)


@both
def test_an_exception_is_delivered(offload: Offload, make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(offload)
    job = loop.offload(jobs.fail, "nothing there")
    run_until(loop, job.done)
    with pytest.raises(LookupError, match="nothing there"):
        job.result()


def test_a_job_that_is_not_done_has_no_result(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    job = make_loop().offload(jobs.wait_for, str(tmp_path / "go"))
    with pytest.raises(InvalidStateError):
        job.result()
    jobs.note(str(tmp_path / "go"))


def test_a_callback_added_after_the_end_comes_all_the_same(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    job = loop.offload(jobs.double, 1)
    run_until(loop, job.done)
    run_turns(loop)
    answers: list[int] = []
    job.add_done_callback(lambda job: answers.append(job.result()))
    assert answers == []
    run_until(loop, lambda: answers)
    assert answers == [2]


@both
def test_jobs_run_where_they_were_sent(offload: Offload, make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(offload)
    pid, name = loop.offload(jobs.own_pid), loop.offload(jobs.thread_name)
    run_until(loop, lambda: pid.done() and name.done())
    if offload is THREADS:
        assert (pid.result(), name.result().startswith("muxio offload")) == (os.getpid(), True)
    else:
        assert pid.result() != os.getpid()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(lambda: 1, ()), (jobs.double, (socket.socket.accept,)), (jobs.not_picklable, ())],
    ids=["function", "argument", "result"],
)
def test_what_cannot_be_pickled_is_told_as_an_exception(
    make_loop: Callable[..., Loop], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    loop = make_loop(PROCESSES)
    bad, good = loop.offload(function, *arguments), loop.offload(jobs.double, 4)
    run_until(loop, lambda: bad.done() and good.done())
    assert isinstance(bad.exception(), Exception)
    assert good.result() == 8


@pytest.mark.parametrize(
    ("function", "arguments", "tells"),
    [
        (len, (jobs.LoadsOnlyIn(os.getpid()),), str(os.getpid())),
        (jobs.result_that_loads_only_here, (), ""),
        (jobs.fail_unloadably, (), "Unloadable: one"),
    ],
    ids=["argument", "result", "exception"],
)
def test_what_cannot_be_loaded_is_told_as_an_exception_and_costs_no_other_job(
    make_loop: Callable[..., Loop], tmp_path: Path, function: Callable[..., Any], arguments: tuple[Any, ...], tells: str
) -> None:
    loop = make_loop(PROCESSES)
    other = loop.offload(jobs.wait_for, str(tmp_path / "go"), "unharmed")
    bad = loop.offload(function, *arguments)
    run_until(loop, bad.done)
    error = bad.exception()
    assert isinstance(error, Exception)
    assert not isinstance(error, BrokenProcessPool)
    assert tells in str(error)
    jobs.note(str(tmp_path / "go"))
    run_until(loop, other.done)
    assert other.result() == "unharmed"


def test_an_exception_from_a_process_tells_where_it_was_raised(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop(PROCESSES)
    job = loop.offload(jobs.fail, "nothing there")
    run_until(loop, job.done)
    error = job.exception()
    assert error is not None
    assert "in fail" in str(error.__cause__)


@both
def test_a_job_that_wants_to_end_the_program_ends_nothing(offload: Offload, make_loop: Callable[..., Loop]) -> None:
    loop, asker = make_loop(offload), Asker()
    _, peer = connected(loop, asker)
    with peer:
        asker.answer = lambda job: job.result()  # type: ignore[method-assign]
        asker.ask(jobs.leave)
        run_until(loop, lambda: asker.errors)
        (error,) = asker.errors
        assert isinstance(error, RuntimeError)
        assert isinstance(error.__cause__, SystemExit)


# A connection's jobs


@both
def test_answers_come_in_the_order_of_asking(
    offload: Offload, backend: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, asker = make_loop(offload, backend), Asker()
    _, peer = connected(loop, asker)
    with peer:
        asker.ask(jobs.wait_for, str(tmp_path / "go"), "first")
        quick = asker.ask(jobs.double, 1)
        run_until(loop, quick.done)  # at the same time as the first one
        assert asker.answers == []
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: len(asker.answers) == 2)
        assert asker.answers == ["first", 2]


def test_who_asks_for_much_does_not_keep_others_waiting(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop, greedy, modest = make_loop(Offload(workers=1)), Asker(), Asker()
    _, peer = connected(loop, greedy)
    _, other = connected(loop, modest)
    with peer, other:
        greedy.ask(jobs.wait_for, str(tmp_path / "go"), "first")
        for number in range(100):
            greedy.ask(jobs.double, number)
        job = modest.ask(jobs.double, 21)
        ahead: list[int] = []
        job.add_done_callback(lambda job: ahead.append(len(greedy.answers)))
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: ahead)
        assert ahead[0] <= 3  # what the executor had by then, and one in turn
        run_until(loop, lambda: len(greedy.answers) == 101)


def test_who_is_far_ahead_of_the_pool_is_not_read_from(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    class Busy(Asker):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            for _ in data:
                self.ask(jobs.wait_for, str(tmp_path / "go"))

    loop, busy = make_loop(Offload(workers=1, per_connection=4)), Busy()
    _, peer = connected(loop, busy)
    with peer:
        for count in range(1, 5):
            peer.sendall(b"x")
            run_until(loop, lambda count=count: len(busy.received) == count)  # type: ignore[misc]
        peer.sendall(b"x")
        run_turns(loop)
        assert (len(busy.received), loop.jobs.jobs) == (4, 4)
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: len(busy.answers) == 5)
        assert len(busy.received) == 5


def test_a_pool_that_is_behind_holds_who_asks_until_he_is_answered(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    class Busy(Asker):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.ask(jobs.wait_for, str(tmp_path / "go"))

    loop = make_loop(Offload(workers=1, jobs=2))
    busy = [Busy(), Busy()]
    peers = [connected(loop, each)[1] for each in busy]
    peers[0].sendall(b"x")
    run_until(loop, lambda: busy[0].received)
    peers[0].sendall(b"y")  # one job: it may ask for another
    run_until(loop, lambda: busy[0].received == b"xy")
    peers[0].sendall(b"z")
    peers[1].sendall(b"x")  # who has none is read from
    run_until(loop, lambda: busy[1].received)
    peers[1].sendall(b"y")
    run_turns(loop)
    assert (bytes(busy[0].received), bytes(busy[1].received)) == (b"xy", b"x")
    jobs.note(str(tmp_path / "go"))
    run_until(loop, lambda: (bytes(busy[0].received), bytes(busy[1].received)) == (b"xyz", b"xy"))
    run_until(loop, lambda: not loop.jobs.jobs)
    for peer in peers:
        peer.close()


def test_what_a_callback_raises_ends_its_connection_and_no_other(
    make_loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(Asker):
        def answer(self, job: Job) -> None:
            job.result()

    loop, careless, other = make_loop(), Careless(), Asker()
    _, peer = connected(loop, careless)
    _, others_peer = connected(loop, other)
    with peer, others_peer:
        careless.ask(jobs.fail, "unexpected")
        later = careless.ask(jobs.double, 1)
        other.ask(jobs.double, 2)
        run_until(loop, lambda: careless.errors and other.answers)
        assert isinstance(careless.errors[0], LookupError)
        assert "exception in a callback" in caplog.text
        assert (later.cancelled() or later.done(), other.answers) == (True, [4])
        with pytest.raises(ConnectionResetError):
            receive_reset(peer)


def test_after_a_callback_that_raises_no_other_comes(
    make_loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    loop, careless = make_loop(), Asker()
    _, peer = connected(loop, careless)
    with peer:
        job = careless.transport.offload(jobs.fail, "unexpected")
        job.add_done_callback(Job.result)
        job.add_done_callback(careless.answer)
        run_until(loop, lambda: careless.errors)
        job.add_done_callback(careless.answer)
        run_turns(loop)
        assert (careless.answers, "unexpected" in caplog.text) == ([], True)


def test_what_a_callback_of_nobodys_job_raises_is_logged(
    make_loop: Callable[..., Loop], caplog: pytest.LogCaptureFixture
) -> None:
    loop = make_loop()
    loop.offload(jobs.fail, "unexpected").add_done_callback(Job.result)
    run_until(loop, lambda: "unexpected" in caplog.text)
    job = loop.offload(jobs.double, 1)
    run_until(loop, job.done)


# Cancelling


def test_a_cancelled_job_that_waits_never_runs_and_nobody_is_told(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, asker = make_loop(Offload(workers=1)), Asker()
    _, peer = connected(loop, asker)
    with peer:
        asker.ask(jobs.wait_for, str(tmp_path / "go"), "first")
        asker.ask(jobs.wait_for, str(tmp_path / "go"), "second")  # the executor has these two
        cancelled = asker.ask(jobs.note, str(tmp_path / "ran"))
        asker.ask(jobs.double, 4)
        cancelled.cancel()
        cancelled.cancel()
        assert (cancelled.cancelled(), cancelled.done()) == (True, True)
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: len(asker.answers) == 3)
        assert asker.answers == ["first", "second", 8]
        assert not (tmp_path / "ran").exists()
        assert loop.jobs.jobs == 0


def test_the_result_of_a_cancelled_job_that_runs_is_thrown_away(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop, asker = make_loop(), Asker()
    _, peer = connected(loop, asker)
    with peer:
        running_job = asker.ask(jobs.wait_for, str(tmp_path / "go"), "late")
        asker.ask(jobs.double, 4)
        running_job.cancel()
        run_until(loop, lambda: asker.answers)  # it is not waited for
        jobs.note(str(tmp_path / "go"))
        job = asker.ask(jobs.double, 5)
        run_until(loop, job.done)
        run_turns(loop)
        assert asker.answers == [8, 10]


def test_a_job_that_its_thread_has_not_begun_never_runs_once_it_is_cancelled(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop = make_loop(Offload(workers=1))
    first = loop.offload(jobs.wait_for, str(tmp_path / "go"))
    following = loop.offload(jobs.note, str(tmp_path / "ran"))  # the executor has it, too
    following.cancel()
    last = loop.offload(jobs.double, 1)
    jobs.note(str(tmp_path / "go"))
    run_until(loop, lambda: first.done() and last.done())
    assert not (tmp_path / "ran").exists()


def test_cancelled_jobs_make_room_behind_one_that_runs(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop, asker = make_loop(Offload(workers=1, per_connection=4)), Asker()
    connection, peer = connected(loop, asker)
    with peer:
        asker.ask(jobs.wait_for, str(tmp_path / "go"), "first")
        for _ in range(100):
            waiting = [asker.ask(jobs.double, number) for number in range(5)]
            for job in waiting[1:]:
                job.cancel()
            waiting[0].cancel()
        assert loop.jobs.jobs == 1
        peer.sendall(b"x")
        run_until(loop, lambda: asker.received)  # it is not held back any more
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: asker.answers)
        connection.close()
        assert connection.state is State.LINGERING  # nothing is owed
        assert asker.answers == ["first"]


def test_a_job_is_cancelled_as_long_as_nobody_was_told(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop, asker = make_loop(), Asker()
    _, peer = connected(loop, asker)
    with peer:
        asker.ask(jobs.wait_for, str(tmp_path / "go"), "first")
        quick, last = asker.ask(jobs.double, 1), asker.ask(jobs.double, 2)
        run_until(loop, lambda: quick.done() and last.done())
        quick.cancel()
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: len(asker.answers) == 2)
        last.cancel()  # too late
        assert (asker.answers, quick.cancelled(), last.cancelled()) == (["first", 4], True, False)


def test_closing_the_loop_cancels_what_nobody_owns_as_well(tmp_path: Path) -> None:
    loop = Loop(offload=Offload(workers=1))
    everything = [loop.offload(jobs.wait_for, str(tmp_path / "go")) for _ in range(4)]
    jobs.note(str(tmp_path / "go"))
    loop.close()
    assert [job.cancelled() for job in everything] == [True] * 4
    assert loop.jobs.jobs == 0
    everything[0].cancel()


@both
def test_a_reset_cancels_what_waits_and_nobody_is_told_of_what_runs(
    offload: Offload, backend: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    """Also while the peer is not read from because it is far ahead; but select() tells only what was asked for."""
    if backend == "select":
        needs_resets()
    ahead = Offload(offload.kind, workers=1, per_connection=16 if backend == "select" else 2)
    loop, asker = make_loop(ahead, backend), Asker()
    _, peer = connected(loop, asker)
    asker.ask(jobs.wait_for, str(tmp_path / "go"))
    asker.ask(jobs.wait_for, str(tmp_path / "go"))
    waiting = asker.ask(jobs.note, str(tmp_path / "ran"))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    run_until(loop, lambda: asker.errors)
    assert isinstance(asker.errors[0], ConnectionError)
    assert (waiting.cancelled(), loop.jobs.jobs) == (True, 0)
    jobs.note(str(tmp_path / "go"))
    following = loop.offload(jobs.double, 1)
    run_until(loop, following.done)
    assert (asker.answers, asker.calls[-1], (tmp_path / "ran").exists()) == ([], "connection_lost", False)


def test_after_the_end_of_its_connection_a_job_is_cancelled_from_the_beginning(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, asker = make_loop(), Asker()
    connection, peer = connected(loop, asker)
    with peer:
        connection.abort()
        job = asker.ask(jobs.note, str(tmp_path / "ran"))
        run_until(loop, lambda: asker.errors)
        assert (job.cancelled(), asker.answers, (tmp_path / "ran").exists()) == (True, [], False)


# Closing


class Answering(Asker):
    """Sends the answers."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.ask(jobs.wait_for, self.path, data)

    def answer(self, job: Job) -> None:
        super().answer(job)
        self.transport.write(job.result())


def test_who_has_said_eof_gets_his_answer_and_then_eof(
    backend: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, protocol = make_loop(THREADS, backend), Answering(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    with peer:
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        run_until(loop, lambda: "eof_received" in protocol.calls)
        run_turns(loop)
        assert connection.is_closing()
        assert protocol.errors == []
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: protocol.errors)
        assert (protocol.errors, peer.recv(100), peer.recv(100)) == ([None], b"question", b"")


def test_close_waits_for_the_answers_and_receives_nothing_meanwhile(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, protocol = make_loop(), Answering(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    with peer:
        peer.sendall(b"question")
        run_until(loop, lambda: protocol.received)
        connection.close()
        peer.sendall(b"another")
        run_turns(loop)
        assert bytes(protocol.received) == b"question"
        assert (connection.is_closing(), connection.is_reading()) == (True, False)
        jobs.note(str(tmp_path / "go"))
        run_until(loop, lambda: protocol.answers)
        assert peer.recv(100) == b"question"
        peer.shutdown(socket.SHUT_WR)
        run_until(loop, lambda: protocol.errors)
        assert (protocol.errors, peer.recv(100)) == ([None], b"")


#: What may happen before close(), as long as we may still send.
BEFORE = {State.OPEN: (), State.HALF_CLOSED_REMOTE: (Event.PEER_EOF,)}


@pytest.mark.parametrize("then", ["answered", "cancelled", "aborted", "write_eof"])
@pytest.mark.parametrize("state", BEFORE, ids=lambda state: state.name.lower())
def test_a_close_that_waits_for_answers_follows_the_table_afterwards(
    state: State, then: str, make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    class KeepsOpen(Answering):
        def eof_received(self) -> bool | None:
            super().eof_received()
            return True

    loop, protocol = make_loop(), KeepsOpen(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    with peer:
        job = protocol.ask(jobs.wait_for, protocol.path, b"answer")
        if Event.PEER_EOF in BEFORE[state]:
            peer.shutdown(socket.SHUT_WR)
            run_until(loop, lambda: "eof_received" in protocol.calls)
        connection.close()
        connection.close()
        assert (connection.state, connection.is_closing(), connection.is_reading()) == (state, True, False)
        if then == "aborted":
            connection.abort()
            expected = TRANSITIONS[state, Event.LOST]
        else:
            closing = TRANSITIONS[state, Event.CLOSE]
            expected = TRANSITIONS[closing, Event.FLUSHED]
        if then == "cancelled":
            job.cancel()
        elif then == "write_eof":  # as after any close(), it does nothing
            connection.write_eof()
        jobs.note(protocol.path)
        run_until(loop, lambda: connection.state is expected)
        if then == "aborted":
            with pytest.raises(ConnectionResetError):
                receive_reset(peer)
        else:
            answer = b"" if then == "cancelled" else b"answer"
            assert peer.recv(100, socket.MSG_WAITALL) == answer
        peer.close()
        run_until(loop, lambda: protocol.errors)
        assert protocol.errors == [None]


def test_who_closes_already_is_not_asked_to_drain(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    class Told(Answering):
        def draining(self) -> bool | None:
            self.calls.append("draining")
            return None

    loop, protocol = make_loop(), Told(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    with peer:
        protocol.ask(jobs.wait_for, protocol.path, b"answer")
        connection.close()
        connection.drain()
        assert "draining" not in protocol.calls
        jobs.note(protocol.path)


def test_the_first_byte_is_not_waited_for_while_an_answer_is_owed(
    make_loop: Callable[..., Loop], tmp_path: Path
) -> None:
    loop, protocol = make_loop(), Answering(str(tmp_path / "go"))
    loop.clients.first_data = 10.0
    connection, peer = connected(loop, protocol)
    with peer:
        assert connection.check(connection.began) == connection.began + 10.0
        protocol.ask(jobs.wait_for, protocol.path, b"greeting")
        connection.check(connection.began + 100.0)
        assert not connection.is_closing()
        jobs.note(protocol.path)
        run_until(loop, lambda: protocol.answers)


def test_the_peer_does_not_idle_while_it_waits_for_an_answer(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    now = [0.0]
    loop = Loop(offload=THREADS, clock=lambda: now[0])
    loop.clients.idle = 10.0
    protocol = Answering(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    try:
        peer.sendall(b"question")
        while not protocol.received:
            loop.run_once()
        now[0] += 0.04  # less than what counts as holding up
        assert connection.check(100.0) > 100.0
        jobs.note(str(tmp_path / "go"))
        while not protocol.answers:
            loop.run_once()
        assert connection.check(loop.peer_time()) == pytest.approx(loop.peer_time() + 10.0, abs=0.1)
    finally:
        peer.close()
        loop.end_clients()
        loop.run_once()
        loop.run_once()
        loop.close()


def test_a_deadline_of_the_protocols_cuts_jobs_off(make_loop: Callable[..., Loop], tmp_path: Path) -> None:
    loop, protocol = make_loop(), Answering(str(tmp_path / "go"))
    connection, peer = connected(loop, protocol)
    with peer:
        peer.sendall(b"question")
        run_until(loop, lambda: protocol.received)
        connection.set_deadline(0.01)
        run_until(loop, lambda: connection.is_closing())
        assert peer.recv(1) == b""
        peer.close()
        run_until(loop, lambda: protocol.errors)
        assert isinstance(protocol.errors[0], TimeoutError)
        assert (protocol.answers, loop.jobs.jobs) == ([], 0)
        jobs.note(str(tmp_path / "go"))


def test_a_drain_lets_jobs_come_to_their_end_and_cuts_those_that_do_not(tmp_path: Path) -> None:
    made: list[Answering] = []

    def factory() -> Answering:
        made.append(Answering(str(tmp_path / f"go{len(made)}")))
        return made[-1]

    server = Server(ANY_PORT, factory, offload=THREADS, timeouts=Timeouts())
    with serving(server) as address:
        clients = [socket.create_connection(address, TIMEOUT) for _ in range(2)]
        for client in clients:
            client.sendall(b"question")
        wait_until(lambda: server.stats().jobs == 2)
        server.shutdown(3600, wait=False)
        answered = made[0].path
        jobs.note(answered)
        peername = made[0].transport.get_extra_info("peername")
        first = next(client for client in clients if client.getsockname() == peername)
        assert first.recv(100, socket.MSG_WAITALL) == b"question"  # and then EOF
        first.close()
        wait_until(lambda: server.stats().connections == 1)
        server.shutdown(0.0, wait=False)
        other = next(client for client in clients if client is not first)
        with pytest.raises(ConnectionResetError):
            receive_reset(other)
        other.close()
        jobs.note(made[1].path)
        wait_until(lambda: server.stats().connections == 0)
        assert (server.stats().drained, server.stats().cut, server.stats().jobs) == (1, 1, 0)


# Processes


def test_a_pool_that_dies_fails_what_it_had_and_the_rest_goes_on(make_loop: Callable[..., Loop]) -> None:
    loop, asker = make_loop(Offload("processes", workers=1)), Asker()
    _, peer = connected(loop, asker)
    with peer:
        for _ in range(3):
            asker.answers.clear()
            asker.ask(jobs.die)
            for number in range(5):
                asker.ask(jobs.double, number)
            run_until(loop, lambda: len(asker.answers) == 6)
            assert isinstance(asker.answers[0], BrokenProcessPool)
            assert asker.answers[2:] == [2, 4, 6, 8]  # the executor may have had the first of them, too


def test_a_process_that_dies_while_arguments_are_on_their_way_holds_up_nobody(make_loop: Callable[..., Loop]) -> None:
    """They are more than a pipe holds, and nobody reads them any more."""
    loop = make_loop(Offload("processes", workers=1))
    dying = loop.offload(jobs.die)
    others = [loop.offload(len, bytes(10_000_000)) for _ in range(3)]
    run_until(loop, lambda: all(job.done() for job in (dying, *others)))
    assert isinstance(dying.exception(), BrokenProcessPool)
    assert others[-1].result() == 10_000_000


def test_closing_does_not_wait_for_a_process_that_computes_for_ever(tmp_path: Path) -> None:
    loop = Loop(offload=PROCESSES)
    pid = loop.offload(jobs.own_pid)
    run_until(loop, pid.done)
    loop.offload(jobs.wait_for, str(tmp_path / "never"), None, 3600.0)
    loop.close()
    wait_until(lambda: ended(pid.result()))


def test_closing_does_not_wait_for_processes_that_keep_their_gil(tmp_path: Path) -> None:
    loop = Loop(offload=PROCESSES)
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        loop.offload(jobs.keep_the_gil, str(path))
    pids = [int(wait_until(lambda path=path: path.exists() and path.read_text())) for path in paths]  # type: ignore[misc]
    loop.close()
    for pid in pids:
        wait_until(lambda pid=pid: ended(pid))  # type: ignore[misc]


def test_closing_does_not_wait_for_the_rest_of_a_result(tmp_path: Path) -> None:
    """Its process ended in the middle of it."""
    loop = Loop(offload=Offload("processes", workers=1))
    pid = loop.offload(jobs.own_pid)
    run_until(loop, pid.done)
    loop.offload(jobs.die_while_answering)
    wait_until(lambda: ended(pid.result()))
    loop.close()


def test_a_pool_that_cannot_be_made_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(executor: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr("muxio.server.offload._Processes.warm_up", fail)
    with pytest.raises(OSError, match="no more processes"):
        Loop(offload=PROCESSES)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no list of descriptors")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to see a process's descriptors")
def test_processes_of_a_pool_have_no_sockets_of_the_server() -> None:
    class Telling(Protocol):
        def data_received(self, data: bytes) -> None:
            self.transport.offload(jobs.sockets_of_this_process).add_done_callback(self.tell)

        def tell(self, job: Job) -> None:
            self.transport.write(repr(job.result()).encode())
            self.transport.close()

    # The pool is begun when a client is there already, and is still there when its connection closes.
    server = Server(ANY_PORT, Telling, offload=Offload("processes", workers=1))
    with serving(server) as address, socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"?")
        with client.makefile("rb") as stream:
            assert stream.read() == b"[]"


SCRIPT = """
    import sys
    import jobs
    from muxio.server import Offload, Protocol, serve

    KINDS = {"waits": (jobs.wait_for, "/never/there", None, 3600.0), "keeps the GIL": (jobs.keep_the_gil, "started")}

    class Busy(Protocol):
        def data_received(self, data):
            self.transport.offload(jobs.own_pid).add_done_callback(self.tell)
            self.transport.offload(*KINDS[sys.argv[1]])

        def tell(self, job):
            self.transport.write(b"%d" % job.result())

    if __name__ == "__main__":
        serve(("127.0.0.1", 0), Busy, offload=Offload("processes", workers=1), quiet=True)
"""


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals for one process")


def killed(served: Served) -> None:
    served.process.kill()
    served.process.wait()


def interrupted(served: Served) -> None:
    """By Ctrl-C, twice: the first waits for the answer that never comes."""
    if sys.platform == "win32":
        raise NotImplementedError
    os.killpg(served.process.pid, signal.SIGINT)
    served.wait_for("stopping.*")
    os.killpg(served.process.pid, signal.SIGINT)
    assert served.process.stderr is not None
    assert served.process.stderr.read() == ""


@pytest.mark.parametrize("computing", ["waits", "keeps the GIL"])
@pytest.mark.parametrize("end", [killed, pytest.param(interrupted, marks=posix)])
def test_processes_of_a_pool_end_with_the_server(end: Callable[[Served], None], computing: str, tmp_path: Path) -> None:
    if computing == "keeps the GIL" and sys.platform != "linux":
        pytest.skip("no signal at the end of a pipe")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    path = os.pathsep.join([str(Path(jobs.__file__).parent), *sys.path])
    command = [sys.executable, str(script), computing]
    environment = {**os.environ, "PYTHONPATH": path}
    program = running(command, env=environment, cwd=tmp_path, start_new_session=True)
    with program as served, socket.create_connection(served.address, TIMEOUT) as client:
        client.sendall(b"?")
        pid = int(client.recv(100))
        if computing == "keeps the GIL":
            wait_until((tmp_path / "started").exists)
        end(served)
        wait_until(lambda: ended(pid), TIMEOUT / 2)  # it would compute for longer


def test_without_a_job_nothing_is_imported_for_it() -> None:
    import subprocess

    program = "import sys, muxio.server; print({'concurrent.futures', 'multiprocessing'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("wrong", [{"kind": "fibres"}, {"workers": 0}, {"per_connection": 0}, {"jobs": -1}], ids=str)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "kind" not in wrong else "fibres"):
        Offload(**wrong)


def test_a_closed_loop_takes_no_jobs() -> None:
    loop = Loop()
    loop.close()
    with pytest.raises(RuntimeError):
        loop.offload(jobs.double, 1)
