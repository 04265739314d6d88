"""The oracle itself: it has to be right before anything is judged by it."""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import needs_resets, wait_until

from muxio.server.report import ConnectionReport, format_address
from muxio.server.threaded import BACK_OFF, Connection, ThreadedServer, echo
from muxio.testing.scripts import Receive, ReceiveAll, Reset, Script, Send, SendWhileReceiving, ShutWrite, observe

ANY_PORT = ("127.0.0.1", 0)
ECHO_AND_END = Script((Send(1000), ShutWrite(), ReceiveAll()))


class Reports:
    """Collects the reports of connections; `next` waits for one."""

    def __init__(self) -> None:
        self._queue: queue.Queue[ConnectionReport] = queue.Queue()
        self.report: Callable[[ConnectionReport], None] = self._queue.put

    def next(self) -> ConnectionReport:
        return self._queue.get(timeout=10)

    def __len__(self) -> int:
        return self._queue.qsize()


@contextlib.contextmanager
def serving(server: ThreadedServer) -> Iterator[threading.Thread]:
    with server:
        thread = threading.Thread(target=server.serve_forever, name="server under test")
        thread.start()
        try:
            yield thread
        finally:
            server.shutdown()
            thread.join()


def connect(server: ThreadedServer) -> socket.socket:
    return socket.create_connection(server.server_address[:2], timeout=10)


def assert_echoes(address: Any) -> None:
    seen = observe(ECHO_AND_END, address)
    assert (len(seen.received), seen.ending) == (1000, "eof")


# What is served


def test_echo_sends_everything_back_until_the_half_close() -> None:
    server = ThreadedServer(ANY_PORT)
    with serving(server), connect(server) as client:
        client.sendall(b"one")
        assert client.recv(100) == b"one"
        client.sendall(b"two")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"two"
        assert client.recv(100) == b""


def test_more_than_the_buffers_hold_is_echoed_while_it_is_sent() -> None:
    server = ThreadedServer(ANY_PORT)
    with serving(server):
        seen = observe(Script((SendWhileReceiving(4 * 1024 * 1024, half_close=True),)), server.server_address)
    assert (len(seen.received), seen.ending) == (4 * 1024 * 1024, "eof")


def test_port_0_becomes_a_real_port() -> None:
    with ThreadedServer(ANY_PORT) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        assert port > 0


def test_an_address_in_use_is_refused() -> None:
    with ThreadedServer(ANY_PORT) as server, pytest.raises(OSError) as caught:
        ThreadedServer(server.server_address)
    assert caught.value.errno in {errno.EADDRINUSE, errno.EACCES}


def test_ipv6() -> None:
    reports = Reports()
    try:
        server = ThreadedServer(("::1", 0), report=reports.report)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with serving(server):
        assert_echoes(server.server_address)
        assert str(reports.next()).startswith("[::1]:")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets in this Python")
def test_unix_socket(tmp_path: Path) -> None:
    reports = Reports()
    server = ThreadedServer(str(tmp_path / "echo"), report=reports.report)
    with serving(server):
        assert server.server_address == str(tmp_path / "echo")
        assert_echoes(server.server_address)
        assert str(reports.next()).startswith("unix  1,000 B in, 1,000 B out, ")


@pytest.mark.skipif(sys.platform != "win32", reason="Windows")
def test_a_unix_socket_is_refused_on_windows() -> None:
    with pytest.raises(OSError):
        ThreadedServer("echo")


def test_nagle_is_off() -> None:
    seen: queue.Queue[int] = queue.Queue()

    def look(connection: Connection) -> None:
        seen.put(connection.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    server = ThreadedServer(ANY_PORT, look)
    with serving(server), connect(server):
        assert seen.get(timeout=10)


# Reports


def test_a_report_tells_who_and_how_much() -> None:
    reports = Reports()
    server = ThreadedServer(ANY_PORT, report=reports.report)
    with serving(server), connect(server) as client:
        client.sendall(b"x" * 1234)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
        report = reports.next()
        assert report.peer == client.getsockname()
    assert (report.bytes_in, report.bytes_out, report.error) == (1234, 1234, None)
    assert 0 <= report.seconds < 10


def test_a_reset_is_an_ordinary_end_that_the_report_names(caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()
    server = ThreadedServer(ANY_PORT, report=reports.report)
    with serving(server):
        observe(Script((Send(10), Receive(10), Reset())), server.server_address)
        report = reports.next()
    assert (report.bytes_in, report.bytes_out) == (10, 10)
    assert not caplog.records
    needs_resets()
    assert isinstance(report.error, ConnectionResetError)
    assert str(report).endswith(", reset by peer")


def test_what_was_sent_before_an_error_is_counted() -> None:
    reports = Reports()
    much = 64 * 1024 * 1024

    def talk(connection: Connection) -> None:
        connection.sendall(bytes(much))

    server = ThreadedServer(ANY_PORT, talk, report=reports.report)
    with serving(server):
        observe(Script((Receive(1000), Reset())), server.server_address)
        report = reports.next()
    assert report.error is not None
    assert 1000 <= report.bytes_out < much


def test_a_failing_report_is_logged_and_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(report: ConnectionReport) -> None:
        raise ValueError("no paper")

    server = ThreadedServer(ANY_PORT, report=fail)
    with serving(server):
        assert_echoes(server.server_address)
        assert_echoes(server.server_address)
    assert "no paper" in caplog.text


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 5000, 0, 0), "[::1]:5000"),
        (("fe80::1%eth0", 5000, 0, 2), "[fe80::1%eth0]:5000"),
        ("/run/echo", "/run/echo"),
        ("", "unix"),
        (None, "unix"),
        (b"\0name", "@name"),
        (7, "7"),
    ],
)
def test_addresses_are_written_as_people_do(address: Any, text: str) -> None:
    assert format_address(address) == text


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, " 0.83 s"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), " 0.83 s, reset by peer"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), " 0.83 s, peer gone while sending"),
        (ConnectionAbortedError(), " 0.83 s, aborted"),
        (TimeoutError(errno.ETIMEDOUT, "idle for 600 s"), " 0.83 s, idle for 600 s"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), " 0.83 s, No route to host"),
        (OSError("odd"), " 0.83 s, odd"),
        (ValueError("bad byte"), " 0.83 s, bad byte"),
        (ValueError(), " 0.83 s, ValueError"),
    ],
)
def test_a_report_is_one_line_for_people(error: Exception | None, end: str) -> None:
    line = str(ConnectionReport(("127.0.0.1", 53422), 1024, 123456, 0.834, error))
    assert line == "127.0.0.1:53422  1,024 B in, 123,456 B out," + end


# Faults


def test_an_exception_in_the_handler_is_logged_and_ends_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()

    def fragile(connection: Connection) -> None:
        if (data := connection.recv(1)) == b"!":
            raise ValueError("bad byte")
        connection.sendall(data)

    server = ThreadedServer(ANY_PORT, fragile, report=reports.report)
    with serving(server), connect(server) as sibling:
        with connect(server) as client:
            client.sendall(b"!")
            assert client.recv(1) == b""
        assert isinstance(reports.next().error, ValueError)
        sibling.sendall(b"a")
        assert sibling.recv(10) == b"a"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("muxio.server", logging.ERROR)
    assert record.exc_info is not None
    assert "bad byte" in caplog.text


def test_a_thread_that_cannot_be_started_costs_one_connection(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse_once(thread: threading.Thread) -> None:
        if not thread.name.startswith("connection from"):
            return start(thread)
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    server = ThreadedServer(ANY_PORT)
    with serving(server):
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        with connect(server) as client:
            assert client.recv(1) == b""
        assert_echoes(server.server_address)
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED])
def test_an_error_of_accept_does_not_end_serving(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedServer(ANY_PORT)
    accept, failures = server._accept, [OSError(number, "injected")] * 2

    def fail_twice() -> None:
        if failures:
            raise failures.pop()
        accept()

    monkeypatch.setattr(server, "_accept", fail_twice)
    began = time.monotonic()
    with serving(server):
        assert_echoes(server.server_address)
    assert not failures
    if number != errno.ECONNABORTED:
        assert time.monotonic() - began >= 2 * BACK_OFF  # it paused, and did not spin


def test_shutdown_does_not_wait_for_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedServer(ANY_PORT)
    failed = threading.Event()

    def fail() -> None:
        failed.set()
        raise OSError(errno.EMFILE, "injected")

    monkeypatch.setattr(server, "_accept", fail)
    monkeypatch.setattr("muxio.server.threaded.BACK_OFF", 3600)
    with serving(server) as thread, connect(server):
        assert failed.wait(10)
        server.shutdown()
        thread.join(10)
        assert not thread.is_alive()


def test_a_broken_listener_ends_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError(errno.EBADF, "injected")

    with ThreadedServer(ANY_PORT) as server, connect(server):
        monkeypatch.setattr(server, "_accept", fail)
        with pytest.raises(OSError) as caught:
            server.serve_forever()
    assert caught.value.errno == errno.EBADF


# As many descriptors as the interpreter has open, and a few more. The server is told to end by its standard input.
SERVER_WITH_FEW_DESCRIPTORS = """
import resource, socket, sys, threading
from muxio.server.threaded import ThreadedServer

with ThreadedServer(("127.0.0.1", 0)) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(server.server_address) as client:  # it serves: all that it needs is open
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        highest = client.fileno()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()
    thread.join()
"""


def test_running_out_of_descriptors_is_survived() -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", SERVER_WITH_FEW_DESCRIPTORS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = ("127.0.0.1", int(process.stdout.readline()))
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(40)]
                for client in clients:
                    client.sendall(b"x")
                for client in clients:  # in the order of accept: each that leaves makes room for one that waits
                    assert client.recv(1) == b"x"
                    client.close()
            assert_echoes(address)
            process.stdin.close()
            process.wait(10)
        finally:
            process.kill()
    assert process.returncode == 0


# Shutdown


def test_shutdown_from_another_thread_ends_connections_and_threads() -> None:
    reports = Reports()
    server = ThreadedServer(ANY_PORT, report=reports.report)
    with serving(server) as thread, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(10)]
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        server.shutdown()
        assert len(reports) == len(clients)  # no connection is still being served when shutdown() has returned
        thread.join(10)
        assert not thread.is_alive()
        assert [client.recv(1) for client in clients] == [b""] * len(clients)
        with pytest.raises(ConnectionRefusedError):
            connect(server)


def test_shutdown_wakes_a_thread_that_cannot_send() -> None:
    reports = Reports()

    def talk(connection: Connection) -> None:
        while True:
            connection.sendall(bytes(1024 * 1024))

    server = ThreadedServer(ANY_PORT, talk, report=reports.report)
    with serving(server), connect(server) as client:
        assert client.recv(1)
        server.shutdown()
        assert reports.next().error is not None


def test_shutdown_before_serving_makes_serving_return_at_once() -> None:
    with ThreadedServer(ANY_PORT) as server:
        server.shutdown()
        server.serve_forever()


def test_close_before_serving_makes_serving_return_at_once() -> None:
    server = ThreadedServer(ANY_PORT)
    server.close()
    server.serve_forever()


def test_close_and_shutdown_may_be_repeated() -> None:
    server = ThreadedServer(ANY_PORT)
    with serving(server):
        server.close()
        server.shutdown()
        server.close()


def test_serving_twice_is_refused() -> None:
    server = ThreadedServer(ANY_PORT)
    with serving(server):
        assert_echoes(server.server_address)
        with pytest.raises(RuntimeError):
            server.serve_forever()
    with pytest.raises(RuntimeError):
        server.serve_forever()


@pytest.mark.parametrize("end", [ThreadedServer.shutdown, ThreadedServer.close])
def test_a_handler_may_end_the_server(end: Callable[[ThreadedServer], None]) -> None:
    def last(connection: Connection) -> None:
        connection.sendall(connection.recv())
        end(server)

    server = ThreadedServer(ANY_PORT, last)
    with serving(server) as thread, connect(server) as client:
        client.sendall(b"bye")
        assert client.recv(10) == b"bye"
        thread.join(10)
        assert not thread.is_alive()


def interrupt_main_thread() -> None:
    """Send SIGINT to the main thread: raise_signal() would send it to the thread that calls, and wake nobody else."""
    ident = threading.main_thread().ident
    if ident is not None and sys.platform != "win32":
        signal.pthread_kill(ident, signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="no signal interrupts a wait on Windows")
@pytest.mark.parametrize("end", [ThreadedServer.shutdown, ThreadedServer.close])
def test_a_signal_handler_in_the_serving_thread_may_end_the_server(end: Callable[[ThreadedServer], None]) -> None:
    def on_request(connection: Connection) -> None:
        connection.recv()
        interrupt_main_thread()

    with ThreadedServer(ANY_PORT, on_request) as server:
        before = signal.signal(signal.SIGINT, lambda *_: end(server))
        try:
            with connect(server) as client:
                client.sendall(b"x")
                server.serve_forever()
        finally:
            signal.signal(signal.SIGINT, before)


def test_with_the_wakeup_fd_a_signal_may_come_to_any_thread() -> None:
    def on_request(connection: Connection) -> None:
        connection.recv()
        signal.raise_signal(signal.SIGINT)  # to this thread; the handler runs in the main one, which waits

    with ThreadedServer(ANY_PORT, on_request) as server:
        handler = signal.signal(signal.SIGINT, lambda *_: server.shutdown())
        fd = signal.set_wakeup_fd(server.wakeup_fd())
        try:
            with connect(server) as client:
                client.sendall(b"x")
                server.serve_forever()
        finally:
            signal.set_wakeup_fd(fd)
            signal.signal(signal.SIGINT, handler)


def test_a_wake_up_that_is_no_shutdown_changes_nothing() -> None:
    server = ThreadedServer(ANY_PORT)
    with serving(server):
        assert server._waker.send(b"x") == 1
        assert_echoes(server.server_address)


@pytest.mark.skipif(sys.platform == "win32", reason="no signal interrupts a wait on Windows")
def test_an_interrupt_in_the_serving_thread_leaves_nothing_behind() -> None:
    def interrupt(connection: Connection) -> None:
        connection.recv()
        interrupt_main_thread()
        echo(connection)

    with ThreadedServer(ANY_PORT, interrupt) as server, connect(server) as client:
        client.sendall(b"x")
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert client.recv(1) == b""


def test_threads_of_ended_connections_are_forgotten() -> None:
    reports = Reports()
    server = ThreadedServer(ANY_PORT, report=reports.report)
    with serving(server):
        for _ in range(20):
            assert_echoes(server.server_address)
            reports.next()
        with connect(server):
            wait_until(lambda: len(server._connections) <= 2)


def test_an_early_reset_does_no_harm() -> None:
    with ThreadedServer(ANY_PORT) as server:
        client = connect(server)  # reset while it waits in the backlog
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        client.close()
        with serving(server):
            assert_echoes(server.server_address)
