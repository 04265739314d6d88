"""The loop: calls, timers, other threads, and connecting."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, Recorder, run_turns, run_until

from muxio.server import Connection, Loop, Server, Transport, connector


@pytest.fixture(params=BACKENDS)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    loop = Loop(request.param)
    yield loop
    loop.close()


class Client(Recorder):
    """A `Recorder` whose connection the fixture closes, if there was one."""

    def __init__(self) -> None:
        super().__init__()
        self.transport: Transport | None = None  # type: ignore[assignment]


@pytest.fixture
def client(loop: Loop) -> Iterator[Client]:
    client = Client()
    yield client
    if client.transport is not None:
        client.transport.abort()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


def refusing_address() -> tuple[str, int]:
    """An address where nobody listens any more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
    return host, port


# Calls


def test_calls_are_made_in_the_order_of_asking(loop: Loop) -> None:
    made: list[int] = []
    for number in range(10):
        loop.call_soon(made.append, number)
    assert made == []
    loop.call_soon(loop.stop)
    loop.run()
    assert made == list(range(10))


def test_a_call_asked_for_by_a_call_waits_for_the_next_turn(loop: Loop) -> None:
    """Events are looked at in between, so that calls that ask for calls starve nobody."""
    made: list[str] = []

    def first() -> None:
        made.append("first")
        loop.call_soon(made.append, "second")
        loop.stop()

    loop.call_soon(first)
    loop.run()
    assert made == ["first"]
    loop.call_soon(loop.stop)
    loop.run()
    assert made == ["first", "second"]


def test_sockets_are_served_beside_a_call_that_asks_for_itself(loop: Loop, listener: socket.socket) -> None:
    class Ready:
        def ready(self, events: int) -> None:
            loop.stop()

        def failed(self, error: Exception) -> None:
            raise error

    def again() -> None:
        loop.call_soon(again)

    ours, peer = socket.socketpair()
    with ours, peer:
        loop.poller.register(ours, 1, Ready())
        again()
        alarm = threading.Timer(10, loop.call_soon_threadsafe, (loop.stop,))
        alarm.start()
        peer.sendall(b"x")
        loop.run()
        assert alarm.is_alive(), "the socket was starved"
        alarm.cancel()
        alarm.join()
        loop.poller.unregister(ours)


def test_a_cancelled_call_is_never_made(loop: Loop) -> None:
    made: list[str] = []
    handles = [
        loop.call_soon(made.append, "soon"),
        loop.call_later(0.001, made.append, "later"),
        loop.call_at(loop.time(), made.append, "at"),
        loop.call_soon_threadsafe(made.append, "threadsafe"),
    ]
    for handle in handles:
        assert not handle.cancelled()
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
    loop.call_later(0.01, loop.stop)
    loop.run()
    assert made == []


def test_cancelling_a_call_that_was_made_does_nothing(loop: Loop) -> None:
    handle = loop.call_soon(loop.stop)
    loop.run()
    handle.cancel()


def test_stop_lets_the_turn_end_and_run_return(loop: Loop) -> None:
    made: list[str] = []
    loop.call_soon(loop.stop)
    loop.call_soon(made.append, "in the same turn")
    loop.run()
    assert made == ["in the same turn"]


def test_a_loop_can_run_again(loop: Loop) -> None:
    for _ in range(3):
        loop.call_soon(loop.stop)
        loop.run()


def test_an_exception_in_a_call_is_logged_and_survived(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []

    def fail() -> None:
        raise ValueError("bad call")

    loop.call_soon(fail)
    loop.call_later(0, fail)
    loop.call_soon(made.append, "the next one")
    loop.call_later(0.001, loop.stop)
    loop.run()
    assert made == ["the next one"]
    assert [record.name for record in caplog.records] == ["muxio.server"] * 2
    assert caplog.text.count("ValueError: bad call") == 2
    assert "Traceback" in caplog.text


def test_an_interrupt_comes_out_of_run_and_leaves_the_loop_usable(loop: Loop) -> None:
    made: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    loop.call_soon(interrupt)
    loop.call_soon(made.append, "what was asked for behind it")
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop.call_soon(loop.stop)
    loop.run()
    assert made == ["what was asked for behind it"]


# Timers


def test_timers_run_in_the_order_of_their_times(loop: Loop) -> None:
    made: list[str] = []
    loop.call_later(0.02, loop.stop)
    loop.call_later(0.01, made.append, "c")
    loop.call_later(0.001, made.append, "b")
    loop.call_later(0, made.append, "a")
    loop.run()
    assert made == ["a", "b", "c"]


def test_timers_for_one_time_run_in_the_order_of_asking(loop: Loop) -> None:
    made: list[int] = []
    when = loop.time() + 0.005
    for number in range(20):
        loop.call_at(when, made.append, number)
    loop.call_at(when, loop.stop)
    loop.run()
    assert made == list(range(20))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("delay", [0.0, 0.0001, 0.001, 0.0015, 0.01])
def test_a_timer_is_never_early(delay: float, busy: bool, loop: Loop) -> None:
    late: list[float] = []

    def again() -> None:
        loop.call_soon(again)

    if busy:  # then it is not the end of a wait that finds the timer due
        again()
    for _ in range(5):
        due = loop.time() + delay

        def note(due: float = due) -> None:
            late.append(loop.time() - due)
            loop.stop()

        loop.call_at(due, note)
        loop.run()
    assert len(late) == 5
    assert min(late) >= 0


def test_a_timer_may_ask_for_an_earlier_one(loop: Loop) -> None:
    made: list[str] = []
    loop.call_later(10, pytest.fail, "waited for the later timer")
    loop.call_later(0.001, loop.call_later, 0.001, made.append, "earlier")
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert made == ["earlier"]


def test_timers_for_times_that_are_over_starve_nobody(loop: Loop, listener: socket.socket, client: Client) -> None:
    loop.connect(listener.getsockname(), lambda: client)

    def again() -> None:
        if client.transport is None:
            loop.call_at(0.0, again)

    again()
    run_until(loop, lambda: client.transport is not None)


def test_a_time_that_is_no_number_is_refused(loop: Loop) -> None:
    with pytest.raises(ValueError, match="NaN"):
        loop.call_later(float("nan"), print)


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    kept = [loop.call_later(3600, print) for _ in range(10)]
    for _ in range(1000):
        loop.call_later(3600, print).cancel()
    assert len(loop._timers) <= 2 * len(kept) + 1
    made: list[int] = []
    timers = [loop.call_at(loop.time() + number / 1000, made.append, number) for number in range(20)]
    for timer in timers[::2]:
        timer.cancel()
    run_until(loop, lambda: len(made) == 10)
    assert made == list(range(1, 20, 2))
    for timer in timers + kept:
        timer.cancel()
    assert loop._timers == []


def test_time_is_the_monotonic_clock(loop: Loop) -> None:
    before = time.monotonic()
    assert before <= loop.time() <= time.monotonic()


def test_lag_is_the_worst_of_the_last_seconds() -> None:
    now = 100.0
    loop = Loop(clock=lambda: now)

    def late_by(seconds: float) -> float:
        nonlocal now
        loop.call_at(now, list)
        now += seconds
        loop.run_once()
        return loop.lag

    assert loop.lag == 0.0
    assert [late_by(seconds) for seconds in (0.25, 0.5, 0.125)] == [0.25, 0.5, 0.5]
    now += 2.0
    assert late_by(0.125) == 0.125
    assert late_by(0.0) == 0.125
    loop.close()


def test_a_waiting_loop_does_not_turn(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
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


# Other threads


def test_a_call_from_another_thread_wakes_a_waiting_loop(loop: Loop) -> None:
    thread = threading.Thread(target=loop.run)
    thread.start()
    made_in: list[int] = []
    done = threading.Event()
    for _ in range(3):

        def note() -> None:
            made_in.append(threading.get_ident())
            done.set()

        loop.call_soon_threadsafe(note)
        assert done.wait(10)  # there is no timer that could have ended the wait
        done.clear()
    assert made_in == [thread.ident] * 3
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    assert not thread.is_alive()


def test_calls_from_many_threads_are_all_made(loop: Loop) -> None:
    made: list[tuple[int, int]] = []
    calls = 200

    def ask(name: int) -> None:
        for number in range(calls):
            loop.call_soon_threadsafe(made.append, (name, number))

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(5)]
    for thread in threads:
        thread.start()
    run_until(loop, lambda: len(made) == len(threads) * calls)
    for name, thread in enumerate(threads):
        thread.join()
        assert [number for asked_by, number in made if asked_by == name] == list(range(calls))


def test_a_call_from_a_thread_before_run_is_not_lost(loop: Loop) -> None:
    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(loop.stop,))
    thread.start()
    thread.join()
    loop.run()


def test_a_closed_loop_refuses_calls_from_threads() -> None:
    loop = Loop()
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError):
        loop.call_soon_threadsafe(print)


# Connecting


def test_connect_makes_a_connection(loop: Loop, client: Client, listener: socket.socket) -> None:
    loop.connect(listener.getsockname(), lambda: client)
    run_until(loop, lambda: client.calls)
    assert client.transport is not None
    assert isinstance(client.transport, Connection)
    assert client.transport.get_extra_info("peername") == listener.getsockname()
    served, _ = listener.accept()
    with served:
        served.settimeout(10)
        client.transport.write(b"ping")
        assert served.recv(10) == b"ping"
        served.sendall(b"pong")
        run_until(loop, lambda: client.received == b"pong")
    run_until(loop, lambda: client.errors)
    assert client.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]


def test_the_protocol_is_made_at_once_and_hears_nothing_from_inside_connect(
    loop: Loop, client: Client, listener: socket.socket
) -> None:
    made: list[Client] = []

    def factory() -> Client:
        made.append(client)
        return client

    loop.connect(listener.getsockname(), factory)
    assert made == [client]
    assert client.calls == []
    run_until(loop, lambda: client.calls)
    assert made == [client]


def test_a_refused_connection_is_lost_without_having_been_made(loop: Loop, client: Client) -> None:
    loop.connect(refusing_address(), lambda: client)
    run_until(loop, lambda: client.errors)
    run_turns(loop)
    assert client.calls == ["connection_lost"]
    assert isinstance(client.errors[0], ConnectionRefusedError)
    assert len(loop.poller) == 0


def test_an_exception_in_the_loss_of_a_refused_connection_does_not_repeat_it(
    loop: Loop, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(error: Exception | None) -> None:
        Recorder.connection_lost(client, error)
        raise ValueError("bad end")

    monkeypatch.setattr(client, "connection_lost", fail)
    loop.connect(refusing_address(), lambda: client)
    run_until(loop, lambda: client.errors)
    run_turns(loop)
    assert client.calls == ["connection_lost"]
    assert "bad end" in caplog.text


@contextmanager
def unanswered_address() -> Iterator[Any]:
    """Of a listener whose backlog is full, so that it answers no more and connecting lasts."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.mark.parametrize("turns", [0, 1], ids=["before trying", "while trying"])
def test_cancel_gives_up(turns: int, loop: Loop, client: Client) -> None:
    with unanswered_address() as address:
        connecting = loop.connect(address, lambda: client)
        if turns:
            run_turns(loop, turns)
        if client.calls:
            pytest.skip("this system accepts more than it was told to")
        connecting.cancel()
        connecting.cancel()
        run_turns(loop)
        assert client.calls == ["connection_lost"]
        assert client.errors == [None]
        assert len(loop.poller) == 0


def test_a_server_that_closes_gives_up_connecting() -> None:
    class Stubborn(Recorder):
        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            with pytest.raises(RuntimeError):
                server.loop.connect(address, Recorder)

    client = Stubborn()
    with unanswered_address() as address, Server(("127.0.0.1", 0), Recorder) as server:
        server.loop.connect(address, lambda: client)
        run_turns(server.loop)
    assert client.calls == ["connection_lost"]
    assert client.errors == [None]


def test_cancel_does_nothing_once_it_is_decided(loop: Loop, client: Client, listener: socket.socket) -> None:
    connecting = loop.connect(listener.getsockname(), lambda: client)
    run_until(loop, lambda: client.calls)
    connecting.cancel()
    refused = Recorder()
    failing = loop.connect(refusing_address(), lambda: refused)
    run_until(loop, lambda: refused.calls)
    failing.cancel()
    run_turns(loop)
    assert client.calls == ["connection_made"]
    assert refused.calls == ["connection_lost"]


def found(*addresses: tuple[str, int]) -> list[Any]:
    """What getaddrinfo() finds for a name that stands for these addresses."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]


def test_the_next_address_is_tried_when_one_refuses(
    loop: Loop, client: Client, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = found(refusing_address(), refusing_address(), listener.getsockname(), refusing_address())
    monkeypatch.setattr(connector, "resolve", lambda address: addresses)
    loop.connect(("several.example", 80), lambda: client)
    run_until(loop, lambda: client.calls)
    run_turns(loop)
    assert client.calls == ["connection_made"]


def test_an_address_family_that_is_missing_here_is_passed_over(
    loop: Loop, client: Client, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = (-1, socket.SOCK_STREAM, 0, "", ("nowhere", 80))
    monkeypatch.setattr(connector, "resolve", lambda address: [missing, *found(listener.getsockname())])
    loop.connect(("several.example", 80), lambda: client)
    run_until(loop, lambda: client.calls)
    assert client.calls == ["connection_made"]


def test_when_all_addresses_refuse_the_loss_is_told_once(
    loop: Loop, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "resolve", lambda address: found(refusing_address(), refusing_address()))
    loop.connect(("several.example", 80), lambda: client)
    run_until(loop, lambda: client.calls)
    run_turns(loop)
    assert client.calls == ["connection_lost"]
    assert isinstance(client.errors[0], ConnectionRefusedError)


def test_localhost_finds_a_listener_on_either_family(loop: Loop, client: Client, listener: socket.socket) -> None:
    loop.connect(("localhost", listener.getsockname()[1]), lambda: client)
    run_until(loop, lambda: client.calls)
    assert client.calls == ["connection_made"]


def test_an_unknown_host_is_an_error_at_once(loop: Loop) -> None:
    with pytest.raises(OSError):
        loop.connect(("host.invalid", 80), pytest.fail)
    run_turns(loop)


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_that_does_not_exist_is_an_error_at_once(port: int, loop: Loop) -> None:
    with pytest.raises(ValueError, match=str(port)):
        loop.connect(("127.0.0.1", port), pytest.fail)


def test_a_peer_that_resets_at_once_does_not_leak(
    loop: Loop, client: Client, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the kernel's word that it is connected and the look who that is, the peer may be gone."""

    def fail(sock: socket.socket) -> None:
        raise OSError(errno.ENOTCONN, "injected")

    monkeypatch.setattr(socket.socket, "getpeername", fail, raising=False)
    loop.connect(listener.getsockname(), lambda: client)
    run_until(loop, lambda: client.calls)
    assert client.calls == ["connection_lost"]
    assert isinstance(client.errors[0], OSError)
    assert len(loop.poller) == 0


if sys.platform != "win32":

    def test_connect_to_a_unix_socket(loop: Loop, client: Client, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            loop.connect(path, lambda: client)
            assert client.calls == []
            run_until(loop, lambda: client.calls)
            assert client.transport is not None
            assert client.transport.get_extra_info("peername") == path
            served, _ = listener.accept()
            with served:
                served.sendall(b"x")
                run_until(loop, lambda: client.received == b"x")

    def test_a_unix_socket_that_does_not_exist_refuses(loop: Loop, client: Client, tmp_path: Path) -> None:
        loop.connect(str(tmp_path / "nobody"), lambda: client)
        run_until(loop, lambda: client.calls)
        assert client.calls == ["connection_lost"]
        assert isinstance(client.errors[0], FileNotFoundError)

    def test_a_unix_socket_with_a_full_backlog_refuses(loop: Loop, client: Client, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(0)
            number = 0
            while not number:  # EAGAIN on Linux, ECONNREFUSED elsewhere
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                number = waiting.connect_ex(path)
            loop.connect(path, lambda: client)
            run_until(loop, lambda: client.calls)
            assert client.calls == ["connection_lost"]
            assert isinstance(client.errors[0], OSError)
            assert client.errors[0].errno == number
