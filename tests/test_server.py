"""The server on every backend: its beginning and its end, its limits, and the faults that it has to outlive."""

from __future__ import annotations

import errno
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, Recorder, needs_resets, receive_reset, serving, wait_until
from programs import STOP
from programs import serving as running_program

import muxio
from muxio.server import ConnectionReport, EchoProtocol, Limits, Protocol, Server, Stats, Transport
from muxio.server.connection import HIGH_WATER, RECEIVE_SIZE
from muxio.server.listener import ACCEPT_REST
from muxio.testing.scripts import Leave, Receive, ReceiveAll, Script, Send, ShutWrite, observe, run_many

ANY_PORT = ("127.0.0.1", 0)

#: More than the buffers on the way hold for a client that does not read.
MUCH = 8 * 1024 * 1024


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


class Reports:
    """Collects the reports of connections; `next` waits for one."""

    def __init__(self) -> None:
        self._queue: queue.Queue[ConnectionReport] = queue.Queue()
        self.report = self._queue.put

    def next(self) -> ConnectionReport:
        return self._queue.get(timeout=10)


class Burst(Recorder):
    """Answers the first bytes with more than the buffers hold."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(bytes(MUCH))


class ShutsDown(EchoProtocol):
    """Echoes, and shuts the server down from inside the callback."""

    server: Server

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.server.shutdown()


def connect(address: Any) -> socket.socket:
    return socket.create_connection(address[:2], timeout=10)


def ask(client: socket.socket, question: bytes = b"x") -> bytes:
    client.sendall(question)
    return client.recv(100)


def receive_all(client: socket.socket) -> bytes:
    received = bytearray()
    while data := client.recv(65_536):
        received += data
    return bytes(received)


def takes(client: socket.socket, number: int) -> bool:
    """Whether so many bytes come."""
    while number > 0 and (data := client.recv(min(number, 1 << 20))):
        number -= len(data)
    return number == 0


def refuses(address: Any) -> bool:
    """Whether nobody listens there (any more)."""
    try:
        connect(address).close()
    except (ConnectionRefusedError, ConnectionResetError):  # a reset if it stopped listening just now
        return True
    return False


def assert_echoes(address: Any) -> None:
    seen = observe(Script((Send(1000), ShutWrite(), ReceiveAll())), address, timeout=10)
    assert (len(seen.received), seen.ending) == (1000, "eof")


@pytest.fixture
def background() -> Iterator[Any]:
    """Starts threads, and sees to it that they have ended after the test."""
    threads: list[threading.Thread] = []

    def start(function: Any, *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


# Beginning and end


def test_it_serves_until_shutdown_from_another_thread(backend: str, background: Any) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server:
        assert server.backend == backend
        thread = background(server.serve_forever)
        assert_echoes(server.server_address)
        with connect(server.server_address) as client:
            assert ask(client) == b"x"
            server.shutdown()
            thread.join(10)
            assert not thread.is_alive()
            with suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert refuses(server.server_address)
        server.shutdown()  # again, it does nothing


def test_it_listens_before_it_serves(backend: str) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    with connect(server.server_address) as client, serving(server):
        assert ask(client) == b"x"


def test_shutdown_has_ended_every_connection_when_it_returns(backend: str, background: Any) -> None:
    protocols: list[Recorder] = []

    def factory() -> Recorder:
        protocols.append(Recorder())
        return protocols[-1]

    with Server(ANY_PORT, factory, backend=backend) as server, ExitStack() as stack:
        background(server.serve_forever)
        for _ in range(10):
            stack.enter_context(connect(server.server_address))
        wait_until(lambda: len(protocols) == 10)
        server.shutdown()
        assert [protocol.calls[-1] for protocol in protocols] == ["connection_lost"] * 10


def test_shutdown_before_serving_makes_serving_return_at_once(backend: str) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server:
        server.shutdown()
        server.serve_forever()
        with pytest.raises(RuntimeError):
            server.serve_forever()


def test_shutdown_from_inside_a_callback_does_not_wait(backend: str, background: Any) -> None:
    with Server(ANY_PORT, ShutsDown, backend=backend) as server:
        ShutsDown.server = server
        thread = background(server.serve_forever)
        with connect(server.server_address) as client:
            assert ask(client, b"bye") == b"bye"
            thread.join(10)
            assert not thread.is_alive()


def test_serving_twice_is_refused(backend: str) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    with serving(server) as address:
        assert_echoes(address)
        with pytest.raises(RuntimeError):
            server.serve_forever()
        assert_echoes(address)


def test_close_from_inside_is_refused_and_serving_goes_on(backend: str) -> None:
    refused = threading.Event()

    class Closes(EchoProtocol):
        def data_received(self, data: bytes) -> None:
            with pytest.raises(RuntimeError):
                server.close()
            refused.set()
            super().data_received(data)

    server = Server(ANY_PORT, Closes, backend=backend)
    with serving(server) as address, connect(address) as client:
        assert ask(client) == b"x"
        assert refused.is_set()


def test_leaving_the_block_closes_everything(backend: str, background: Any) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server:
        thread = background(server.serve_forever)
        assert_echoes(server.server_address)
    thread.join(10)
    assert not thread.is_alive()
    assert server.loop.poller.closed
    assert refuses(server.server_address)
    server.close()
    server.shutdown()


def test_a_server_that_never_served_can_be_closed(backend: str) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    server.close()
    assert refuses(server.server_address)


def test_protocols_hear_of_their_end_after_an_interrupt(backend: str) -> None:
    class Interrupts(Recorder):
        def data_received(self, data: bytes) -> None:
            raise KeyboardInterrupt

    protocol = Interrupts()
    with Server(ANY_PORT, lambda: protocol, backend=backend) as server, connect(server.server_address) as client:
        client.sendall(b"x")
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert protocol.errors == []
        server.close()
        assert protocol.errors == [None]


def test_connections_of_the_loops_own_hear_of_their_end_as_well(backend: str, background: Any) -> None:
    """A proxy has one on each side."""
    upstream = Recorder()

    class Proxy(Recorder):
        def connection_made(self, transport: Transport) -> None:
            super().connection_made(transport)
            transport.loop.connect(listener.getsockname(), lambda: upstream)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        server = Server(ANY_PORT, Proxy, backend=backend)
        with serving(server) as address, connect(address), listener.accept()[0]:
            wait_until(lambda: upstream.calls)
            server.shutdown()
            assert upstream.errors == []
        assert upstream.errors == [None]


def test_shutdown_by_the_thread_that_is_about_to_serve_does_not_wait_for_itself(backend: str) -> None:
    """As a signal handler may that comes just before or after serve_forever() has taken note of its thread."""
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server, server._serving:
        server.shutdown()


# Draining


def test_shutdown_with_drain_lets_queued_bytes_out(backend: str, background: Any) -> None:
    protocol = Burst()
    protocols = iter([protocol])  # the first client's; those that only look in get their own
    with Server(ANY_PORT, lambda: next(protocols, Recorder()), backend=backend) as server:
        thread = background(server.serve_forever)
        with connect(server.server_address) as client:
            client.sendall(b"x")
            wait_until(lambda: protocol.received)
            began = time.monotonic()
            stopping = background(server.shutdown, 30)
            wait_until(lambda: refuses(server.server_address))  # nobody is accepted while it drains
            assert len(receive_all(client)) == MUCH
            client.close()
            stopping.join(10)
            thread.join(10)
            assert time.monotonic() - began < 10  # it does not wait for the deadline
            assert protocol.errors == [None]


def test_shutdown_cuts_a_peer_that_does_not_read_at_the_deadline(backend: str) -> None:
    protocol = Burst()
    server = Server(ANY_PORT, lambda: protocol, backend=backend)
    with serving(server) as address, connect(address) as client:
        client.sendall(b"x")
        wait_until(lambda: protocol.received)
        began = time.monotonic()
        server.shutdown(drain=0.2)
        assert 0.2 <= time.monotonic() - began < 5
        with pytest.raises(ConnectionResetError):
            receive_reset(client)
        assert protocol.errors == [None]


def test_a_second_shutdown_shortens_the_drain(backend: str, background: Any) -> None:
    protocol = Burst()
    server = Server(ANY_PORT, lambda: protocol, backend=backend)
    with serving(server) as address, connect(address) as client:
        client.sendall(b"x")
        wait_until(lambda: protocol.received)
        first = background(server.shutdown, 60)
        server.shutdown(drain=0)
        first.join(10)
        assert not first.is_alive()
        assert protocol.errors == [None]


def test_a_drain_ends_when_every_peer_has_left(backend: str, background: Any) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    with serving(server) as address, connect(address) as client:
        assert ask(client) == b"x"
        stopping = background(server.shutdown, 3600)
        assert client.recv(1) == b""
        client.sendall(b"too late")  # thrown away, and no reason for a reset
        assert stopping.is_alive()
        client.close()
        stopping.join(10)
        stats = server.stats()
        assert (stats.drained, stats.cut, stats.bytes_in) == (1, 0, 1)


def test_shutdown_need_not_wait(backend: str, background: Any) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server, connect(server.server_address) as client:
        serving = background(server.serve_forever)
        assert ask(client) == b"x"
        server.shutdown(3600, wait=False)  # which would wait for this client
        assert client.recv(1) == b""
        assert serving.is_alive()
        client.close()
        serving.join(10)
        assert not serving.is_alive()
        assert (server.stats().drained, server.stats().cut) == (1, 0)


@pytest.mark.parametrize(("drain", "ends"), [(3600, "drained"), (0, "cut")])
def test_a_server_that_retires_can_be_shut_down(drain: float, ends: str, backend: str, background: Any) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server, connect(server.server_address) as client:
        serving = background(server.serve_forever)
        assert ask(client) == b"x"
        server.retire(3600)
        wait_until(lambda: refuses(server.server_address))
        wait_until(lambda: server.stats().connections == 1)  # who asked that, and was accepted, is gone
        assert ask(client) == b"x"
        server.shutdown(drain, wait=False)
        if drain:
            assert client.recv(1) == b""
            client.close()
        else:
            with pytest.raises(ConnectionResetError):
                receive_reset(client)
        serving.join(10)
        assert not serving.is_alive()
        stats = server.stats()
        assert {"drained": stats.drained, "cut": stats.cut} == {"drained": 0, "cut": 0, ends: 1}


class Patient(EchoProtocol):
    """Ends by itself some time after the server asked for it."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def draining(self) -> bool | None:
        self.asked.set()
        return True

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.asked.is_set():
            self.transport.close()


def test_a_protocol_may_go_on_until_it_is_done(backend: str, background: Any) -> None:
    protocol = Patient()
    server = Server(ANY_PORT, lambda: protocol, backend=backend)
    with serving(server) as address, connect(address) as client:
        assert ask(client) == b"x"
        stopping = background(server.shutdown, 3600)
        assert protocol.asked.wait(10)
        assert ask(client, b"one more") == b"one more"
        assert client.recv(1) == b""
        client.close()
        stopping.join(10)
    assert server.stats().drained == 1


def test_an_exception_in_draining_costs_one_connection(
    backend: str, background: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken(EchoProtocol):
        def draining(self) -> bool | None:
            raise RuntimeError("not now")

    kinds: Iterator[type[EchoProtocol]] = iter([Mistaken, EchoProtocol])
    server = Server(ANY_PORT, lambda: next(kinds)(), backend=backend)
    with serving(server) as address, connect(address) as mistaken, connect(address) as client:
        assert ask(mistaken) == ask(client) == b"x"
        stopping = background(server.shutdown, 3600)
        assert client.recv(1) == b""
        with pytest.raises(ConnectionResetError):
            receive_reset(mistaken)
        client.close()
        stopping.join(10)
    assert "not now" in caplog.text


def test_who_waits_to_be_accepted_at_a_stop_is_not_reset(backend: str, background: Any) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server.server_address)) for _ in range(100)]
        server.loop.call_soon(server.shutdown, 3600)  # before the first accept
        thread = background(server.serve_forever)
        for client in clients:
            assert client.recv(1) == b""
            client.close()
        thread.join(10)
        assert server.stats().accepted == server.stats().drained == 100


class Busy:
    """Clients that send and receive without pause, in a thread of their own, until they see the end."""

    def __init__(self, address: Any, number: int) -> None:
        self.resets = 0
        self.sent: dict[socket.socket, int] = {}
        self.received: dict[socket.socket, int] = {}
        self._poller: muxio.Poller[socket.socket] = muxio.Poller()
        for _ in range(number):
            client = connect(address)
            client.setblocking(False)
            self.sent[client] = self.received[client] = 0
            self._poller.register(client, muxio.READ | muxio.WRITE)

    def run(self) -> None:
        with self._poller:
            while len(self._poller):
                for client, events in self._poller.poll(10):
                    try:
                        if events & muxio.WRITE and self.sent[client] - self.received[client] < 1000:
                            self.sent[client] += client.send(b"x" * 500)
                        if events & muxio.READ:
                            data = client.recv(65_536)
                            self.received[client] += len(data)
                            if not data:
                                self._leave(client)
                    except BlockingIOError:
                        pass
                    except ConnectionError:
                        self.resets += 1
                        self._leave(client)

    def _leave(self, client: socket.socket) -> None:
        self._poller.unregister(client)
        client.close()


@pytest.mark.parametrize("how", ["shutdown", "signal"])
def test_busy_clients_see_their_answers_and_then_eof_at_a_stop(how: str, backend: str, background: Any) -> None:
    number = 1000 if backend != "select" else 300  # of 1,024 descriptors, both ends are in this process
    if how == "signal":
        with running_program("-q", "--drain", "60", "--backend", backend) as served:
            busy = Busy(served.address, number)
            thread = background(busy.run)
            wait_until(lambda: all(busy.received.values()))
            summary = served.stop(STOP)[-1]
            thread.join(60)
        assert summary.endswith(f"{number:,} drained, 0 cut")
        bytes_in, bytes_out = (int(part.split()[0].replace(",", "")) for part in summary.split(", ")[1:3])
    else:
        with Server(ANY_PORT, EchoProtocol, backend=backend) as server:
            serving_thread = background(server.serve_forever)
            busy = Busy(server.server_address, number)
            thread = background(busy.run)
            wait_until(lambda: all(busy.received.values()))
            server.shutdown(drain=60)
            thread.join(60)
            serving_thread.join(10)
            stats = server.stats()
        assert (stats.drained, stats.cut) == (number, 0)
        bytes_in, bytes_out = stats.bytes_in, stats.bytes_out
    assert busy.resets == 0
    assert bytes_in == bytes_out == sum(busy.received.values())


# Reports


def test_a_report_tells_who_and_how_much(backend: str) -> None:
    reports = Reports()
    server = Server(ANY_PORT, EchoProtocol, backend=backend, report=reports.report)
    with serving(server) as address, connect(address) as client:
        client.sendall(b"x" * 1234)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"x" * 1234
        report = reports.next()
        assert report.peer == client.getsockname()
    assert (report.bytes_in, report.bytes_out, report.error) == (1234, 1234, None)
    assert 0 <= report.seconds < 10


def test_a_report_tells_the_error(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Protocol):
        def data_received(self, data: bytes) -> None:
            raise ValueError("bad byte")

    reports = Reports()
    server = Server(ANY_PORT, Fails, backend=backend, report=reports.report)
    with serving(server) as address, connect(address) as client:
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            receive_reset(client)
        report = reports.next()
        stats = server.stats()
        assert (stats.failed, stats.reset, stats.timed_out) == (1, 0, 0)
    assert isinstance(report.error, ValueError)
    assert "bad byte" in caplog.text


def test_a_failing_report_is_logged_and_stands_in_nobodys_way(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail(report: ConnectionReport) -> None:
        raise ValueError("no paper")

    server = Server(ANY_PORT, EchoProtocol, backend=backend, report=fail)
    with serving(server) as address, connect(address) as client:
        assert_echoes(address)
        assert_echoes(address)
        assert ask(client) == b"x"
        server.shutdown()  # returns, although the last report fails
    assert caplog.text.count("ValueError: no paper") == 3


# Addresses


def test_ipv6(backend: str) -> None:
    reports = Reports()
    try:
        server = Server(("::1", 0), EchoProtocol, backend=backend, report=reports.report)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serving(server) as address:
        assert_echoes(address)
        assert str(reports.next()).startswith("[::1]:")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets in this Python")
def test_unix_socket(backend: str, tmp_path: Path) -> None:
    reports = Reports()
    server = Server(str(tmp_path / "echo"), EchoProtocol, backend=backend, report=reports.report)
    with serving(server) as address:
        assert address == str(tmp_path / "echo")
        assert_echoes(address)
        assert str(reports.next()).startswith("unix  1,000 B in, 1,000 B out, ")


def test_an_empty_host_is_every_address(backend: str) -> None:
    server = Server(("", 0), EchoProtocol, backend=backend)
    with serving(server) as address:
        host = "::1" if ":" in address[0] else "127.0.0.1"
        assert_echoes((host, address[1]))


def test_an_address_in_use_is_refused() -> None:
    with Server(ANY_PORT, EchoProtocol) as server, pytest.raises(OSError) as caught:
        Server(server.server_address, EchoProtocol)
    assert caught.value.errno in {errno.EADDRINUSE, errno.EACCES}


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_that_does_not_exist_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=str(port)):
        Server(("127.0.0.1", port), EchoProtocol)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="carrier pigeon"):
        Server(ANY_PORT, EchoProtocol, backend="carrier pigeon")


def test_repr_tells_address_backend_and_connections(backend: str) -> None:
    with Server(ANY_PORT, EchoProtocol, backend=backend) as server:
        host, port = server.server_address
        assert repr(server) == f"<Server at {host}:{port}, {backend}, 0 connected>"


# Faults


def test_a_factory_that_raises_costs_one_connection(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    failures = ["no protocol today"]

    def factory() -> EchoProtocol:
        if failures:
            raise ValueError(failures.pop())
        return EchoProtocol()

    server = Server(ANY_PORT, factory, backend=backend)
    with serving(server) as address:
        with connect(address) as client, suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert_echoes(address)
    assert "no protocol today" in caplog.text


@pytest.mark.parametrize(
    "number", [errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN], ids=errno.errorcode.get
)
def test_an_error_of_one_peer_in_accept_is_passed_over(
    number: int, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [OSError(number, "injected")]
    accept = socket.socket.accept

    def fail_once(sock: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(sock)

    server = Server(ANY_PORT, EchoProtocol, backend=backend)  # on Windows a socketpair(), which it may need, accepts
    monkeypatch.setattr(socket.socket, "accept", fail_once)
    with serving(server) as address:
        began = time.monotonic()
        assert_echoes(address)
        assert failures == []
        assert time.monotonic() - began < 5
    assert not caplog.records


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], ids=errno.errorcode.get)
def test_accepting_rests_when_the_system_is_exhausted(
    number: int, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [OSError(number, "injected")] * 2
    accept = socket.socket.accept

    def fail_twice(sock: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(sock)

    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    monkeypatch.setattr(socket.socket, "accept", fail_twice)
    with serving(server) as address:
        began = time.monotonic()
        assert_echoes(address)
        assert time.monotonic() - began >= 2 * ACCEPT_REST
    assert failures == []
    assert caplog.text.count("accepting rests") == 1  # once for as long as it lasts


def test_an_error_of_the_listener_itself_does_not_spin(
    backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[float] = []

    def fail(sock: socket.socket) -> Any:
        tries.append(time.monotonic())
        raise OSError(errno.EINVAL, "injected")

    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    monkeypatch.setattr(socket.socket, "accept", fail)
    with serving(server) as address, connect(address):
        wait_until(lambda: len(tries) == 3)
    assert tries[2] - tries[0] >= 2 * ACCEPT_REST
    assert caplog.text.count("accepting rests") == 1


def test_shutdown_does_not_wait_for_the_rest(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(sock: socket.socket) -> Any:
        failed.set()
        raise OSError(errno.EMFILE, "injected")

    server = Server(ANY_PORT, EchoProtocol, backend=backend)
    monkeypatch.setattr(socket.socket, "accept", fail)
    monkeypatch.setattr("muxio.server.listener.ACCEPT_REST", 3600)
    with serving(server) as address, connect(address):
        assert failed.wait(10)
        began = time.monotonic()
        server.shutdown()
        assert time.monotonic() - began < 10


# It has as many descriptors as the interpreter has open, and a few more. For each line of its standard input it tells
# how often the loop has turned, and how many seconds of processor time it has had; the end of the input ends it.
SERVER_WITH_FEW_DESCRIPTORS = """
import resource, socket, sys, threading, time
from muxio.server import EchoProtocol, Server, listener

listener.PATIENCE = float(sys.argv[2])
turns = 0
with Server(("127.0.0.1", 0), EchoProtocol, backend=sys.argv[1]) as server:
    poll = server.loop.poller.poll
    def count(timeout):
        global turns
        turns += 1
        return poll(timeout)
    server.loop.poller.poll = count
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address) as client:  # it serves: all that it needs is open
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        highest = client.fileno()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        print(turns, time.process_time(), server.stats().refused, flush=True)
    server.shutdown()
    thread.join()
"""


@pytest.fixture
def few_descriptors(request: pytest.FixtureRequest, backend: str) -> Iterator[Any]:
    """A server with few descriptors: its address, what it says on stderr, and a function that asks it."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", SERVER_WITH_FEW_DESCRIPTORS, backend, str(request.param)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to_server, from_server = process.stdin, process.stdout

        def ask_it() -> tuple[int, float, int]:
            to_server.write("?\n")
            to_server.flush()
            turns, seconds, refused = from_server.readline().split()
            return int(turns), float(seconds), int(refused)

        try:
            yield ("127.0.0.1", int(from_server.readline())), process.stderr, ask_it
            process.communicate("", timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0


@pytest.mark.parametrize("few_descriptors", [3600], indirect=True, ids=["patient"])
def test_running_out_of_descriptors_is_survived(few_descriptors: Any) -> None:
    address, errors, ask_it = few_descriptors
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(40)]
        for client in clients:
            client.sendall(b"x")
        assert "accepting rests" in errors.readline()
        assert clients[0].recv(1) == b"x"
        assert ask(clients[0], b"still served") == b"still served"
        (before, busy, _), began = ask_it(), time.monotonic()
        time.sleep(10 * ACCEPT_REST)  # a measurement, not a wait
        (turns, still_busy, refused), passed = ask_it(), time.monotonic() - began
        assert turns - before < 10 + 5 * passed / ACCEPT_REST  # it does not spin
        assert still_busy - busy < 0.05 * passed
        assert refused == 0
        clients.pop(0).close()
        for client in clients:  # in the order of accept: each that leaves makes room for one that waits
            assert client.recv(1) == b"x"
            client.close()
    assert_echoes(address)


@pytest.mark.parametrize("few_descriptors", [0.2], indirect=True, ids=["impatient"])
def test_who_waits_for_a_descriptor_for_long_is_turned_away(few_descriptors: Any) -> None:
    address, _, ask_it = few_descriptors
    with ExitStack() as stack:
        served = 0
        for _ in range(40):
            with suppress(ConnectionResetError):
                client = stack.enter_context(connect(address))
                client.sendall(b"x")
                served += client.recv(1) == b"x"
        assert 0 < served < 40
        assert ask_it()[2] == 40 - served
    wait_until(lambda: answers(address))


def answers(address: Any) -> bool:
    with suppress(ConnectionResetError), connect(address) as client:
        return ask(client) == b"x"
    return False


# Limits


def test_over_the_limit_of_connections_peers_wait_in_the_backlog(backend: str) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend, limits=Limits(connections=3))
    with serving(server) as address, ExitStack() as stack:
        clients = [stack.enter_context(connect(address)) for _ in range(10)]
        for client in clients:
            client.sendall(b"x")
        for served in range(10):  # in the order of accept
            assert clients[served].recv(1) == b"x"
            assert server.stats().connections <= 3
            clients[served].close()
        wait_until(lambda: server.stats().connections == 0)
        assert server.stats().accepted == 10
        assert server.stats().refused == 0


def test_over_the_limit_of_its_host_a_peer_is_reset(backend: str) -> None:
    server = Server(ANY_PORT, EchoProtocol, backend=backend, limits=Limits(per_peer=2))
    with serving(server) as address, ExitStack() as stack:
        first = stack.enter_context(connect(address))
        assert ask(first) == b"x"
        assert ask(stack.enter_context(connect(address))) == b"x"
        with pytest.raises(ConnectionResetError), connect(address) as third:
            receive_reset(third)
        if sys.platform == "linux":  # where all of 127/8 is ours
            other = socket.create_connection(address, 10, source_address=("127.0.0.2", 0))
            assert ask(stack.enter_context(other)) == b"x"
        first.close()
        wait_until(lambda: answers(address))
        assert server.stats().refused >= 1
    assert not server._per_peer


def test_over_the_limit_of_queued_bytes_only_those_are_read_who_take_what_they_get(backend: str) -> None:
    server = Server(ANY_PORT, Burst, backend=backend, limits=Limits(buffered=MUCH))
    with serving(server) as address, ExitStack() as stack:
        greedy = [stack.enter_context(connect(address)) for _ in range(3)]
        honest = stack.enter_context(connect(address))
        wait_until(lambda: server.stats().connections == len(greedy) + 1)  # over the limit nobody would be accepted
        for client in greedy:
            client.sendall(b"x")
        wait_until(lambda: server.stats().bytes_in == len(greedy))
        for client in greedy:
            client.sendall(b"y" * 1000)
        wait_until(lambda: server.stats().bytes_in == len(greedy) + 1000)  # from the first, who was within the limit
        honest.sendall(b"x")
        assert takes(honest, MUCH)
        honest.sendall(b"x")
        assert takes(honest, MUCH)
        assert server.stats().bytes_in == len(greedy) + 1000 + 2  # of the others nothing more was read
        with connect(address) as waiting:
            waiting.sendall(b"x")
            for client in greedy:
                assert takes(client, 2 * MUCH)
            assert waiting.recv(1) == b"\0"  # and there is room again
        assert server.stats().bytes_in == len(greedy) * 1001 + 3


@pytest.mark.parametrize("field", ["connections", "per_peer", "buffered"])
def test_limits_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})


# Statistics


def test_stats_tell_what_was_done_and_what_is_going_on(backend: str) -> None:
    class Impatient(EchoProtocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if data == b"bye":
                self.transport.set_deadline(0.01)

    server = Server(ANY_PORT, Impatient, backend=backend)
    with serving(server) as address:
        with connect(address) as first, connect(address) as second:
            assert ask(first, b"12345") == b"12345"
            assert ask(second, b"123") == b"123"
            wait_until(lambda: server.stats().bytes_out == 8)  # which is counted after the send
            expected = Stats.total([])._replace(connections=2, accepted=2, bytes_in=8, bytes_out=8, received=2)
            assert server.stats()._replace(lag=0.0) == expected
            second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            second.close()
            wait_until(lambda: server.stats().connections == 1)
            assert ask(first, b"bye") == b"bye"
            assert first.recv(1) == b""
        wait_until(lambda: server.stats().connections == 0)
        stats = server.stats()
        assert (stats.accepted, stats.timed_out) == (2, 1)
        assert (stats.bytes_in, stats.bytes_out, stats.buffered) == (11, 11, 0)
        assert 0.0 <= stats.lag < 10.0
    needs_resets()
    assert stats.reset == 1


# Many at once


def test_200_quick_clients_are_all_served(backend: str) -> None:
    reports = Reports()
    scripts = [Script((Send(10, seed), Receive(10), Leave())) for seed in range(200)]
    server = Server(ANY_PORT, EchoProtocol, backend=backend, report=reports.report)
    with serving(server) as address:
        seen = run_many(scripts, address)
        assert [(len(each.received), each.ending) for each in seen] == [(10, "left")] * 200
        assert sum(reports.next().bytes_out for _ in scripts) == 2000


def test_a_client_that_does_not_read_is_held_back_and_loses_nothing(backend: str) -> None:
    class Measured(EchoProtocol):
        peak = 0

        def connection_made(self, transport: Transport) -> None:
            super().connection_made(transport)
            protocols.append(self)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            Measured.peak = max(Measured.peak, self.transport.get_write_buffer_size())

    protocols: list[Measured] = []
    server = Server(ANY_PORT, Measured, backend=backend)
    with serving(server) as address, closing(connect(address)) as client:
        sent = bytearray()
        client.setblocking(False)
        piece = bytes(range(251)) * 100  # no power of two: what is lost or repeated shifts the rest

        def full() -> bool:
            with suppress(BlockingIOError):
                while True:
                    sent.extend(piece[: client.send(piece)])
            return bool(protocols) and not protocols[0].transport.is_reading()

        wait_until(full)
        assert 0 < Measured.peak <= HIGH_WATER + RECEIVE_SIZE
        assert_echoes(address)  # the others are served
        full()
        client.settimeout(10)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == sent
