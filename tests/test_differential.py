"""The event-driven server against the thread-per-connection one: what a client sees has to be the same.

No outcome is written down here. Each script is run against both, and the oracle says what is right. A failure prints
the script as Python: paste it into `observe` to see it again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import muxio
from muxio.server import EchoProtocol, Server
from muxio.server.threaded import Connection, ThreadedServer
from muxio.testing.scripts import (
    Drip,
    Leave,
    Observation,
    Receive,
    ReceiveAll,
    Reset,
    Script,
    Send,
    SendWhileReceiving,
    ShutWrite,
    Step,
    agree,
    difference,
    observe,
    run_many,
)

ANY_PORT = ("127.0.0.1", 0)
KIB, MIB = 1024, 1024 * 1024

UNREAD = 48 * KIB
"""Bytes that every system's buffers hold for a client that does not read: less than one 64 KiB receive buffer."""

SLOW = 4 * KIB
"""A slow reader's SO_RCVBUF. The kernel may grant more, and counts its own overhead in it."""

MUCH = 8 * MIB
"""Bytes that fill every buffer on the way. It has to be that much: Linux takes 2.8 MB for a client with 4 KiB of
SO_RCVBUF that reads nothing, so that with less the server would never meet a full socket."""

SCRIPTS = {
    "connect and leave": Script((Leave(),)),
    "half-close with nothing sent": Script((ShutWrite(), ReceiveAll())),
    "one byte": Script((Send(1), Receive(1), Leave())),
    "one byte, half-close": Script((Send(1), ShutWrite(), ReceiveAll())),
    "question and answer": Script((*[step for n in range(100) for step in (Send(50, n), Receive(50))], Leave())),
    "many small chunks": Script((Drip(2000, 7), Receive(14_000), Drip(500, 3, seed=1), ShutWrite(), ReceiveAll())),
    "64 MiB both ways at once": Script((SendWhileReceiving(64 * MIB), ShutWrite(), ReceiveAll())),
    "half-close behind the last byte": Script((SendWhileReceiving(MUCH, half_close=True),)),
    "half-close before reading": Script((Send(UNREAD), ShutWrite(), ReceiveAll())),
    "half-close after reading": Script((Send(UNREAD), Receive(UNREAD), ShutWrite(), ReceiveAll())),
    "half-close between reads": Script((Send(UNREAD), Receive(10_000), ShutWrite(), Receive(5), ReceiveAll())),
    "leave with data unread": Script((Send(UNREAD), Receive(1), Leave())),
    "leave without reading": Script((Send(UNREAD), Leave())),
    "reset at once": Script((Reset(),)),
    "reset in mid-stream": Script((SendWhileReceiving(MIB), Send(UNREAD, 1), Receive(UNREAD // 2), Reset())),
    "reset after half-close": Script((Send(UNREAD), ShutWrite(), Receive(1), Reset())),
    "slow reader": Script((SendWhileReceiving(MUCH, chunk=512), ShutWrite(), ReceiveAll()), SLOW),
    "slow reader, half-close behind": Script((SendWhileReceiving(MUCH, chunk=512, half_close=True),), SLOW),
    "slow reader, half-close before reading": Script((Send(UNREAD), ShutWrite(), ReceiveAll(chunk=256)), SLOW),
}

BACKENDS = [os.environ["MUXIO_BACKEND"]] if "MUXIO_BACKEND" in os.environ else muxio.backends()


@contextlib.contextmanager
def serving(server: ThreadedServer | Server) -> Iterator[Any]:
    """Serve in a thread, and end with the block. Gives the address."""
    with server:
        thread = threading.Thread(target=server.serve_forever, name="server under test")
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def oracle() -> Iterator[Any]:
    with serving(ThreadedServer(ANY_PORT)) as address:
        yield address


@pytest.fixture(params=BACKENDS)
def subject(request: pytest.FixtureRequest) -> Iterator[Any]:
    with serving(Server(ANY_PORT, EchoProtocol, backend=request.param)) as address:
        yield address


def assert_no_difference(script: Script, oracle: Any, subject: Any) -> None:
    found = difference(script, observe(script, oracle), observe(script, subject))
    assert found is None, found


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_client_sees_the_same(script: Script, oracle: Any, subject: Any) -> None:
    assert_no_difference(script, oracle, subject)
    # Whatever the script did to the server, the next client is served.
    assert_no_difference(SCRIPTS["one byte, half-close"], oracle, subject)


def test_200_clients_at_once_see_the_same(oracle: Any, subject: Any) -> None:
    light = [script for script in SCRIPTS.values() if all(getattr(step, "size", 0) < MUCH for step in script.steps)]
    scripts = [light[n % len(light)] for n in range(200)]
    observed = zip(scripts, run_many(scripts, oracle), run_many(scripts, subject), strict=True)
    found = [text for text in (difference(*each) for each in observed) if text]
    assert not found, "\n".join(found)


chunks = st.sampled_from([64 * KIB, 4 * KIB, 1000])
amounts = st.integers(0, 256 * KIB)


@st.composite
def made_up_scripts(draw: st.DrawFn) -> Script:
    """Any script that can come to its end: it waits for no more than an echo owes it, and leaves little unread."""
    steps: list[Step] = []
    unread = 0
    for seed in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from([Send, Drip, SendWhileReceiving, Receive]))
        if kind is Receive:
            if unread:
                size = draw(st.integers(1, unread))
                steps.append(Receive(size, chunk=draw(chunks)))
                unread -= size
        elif kind is SendWhileReceiving:
            steps.append(SendWhileReceiving(draw(amounts), seed, chunk=draw(chunks)))
        else:
            size = draw(st.integers(0, UNREAD - unread))
            if kind is Send:
                steps.append(Send(size, seed))
            else:
                count = draw(st.integers(1, 50))
                size -= size % count
                steps.append(Drip(count, size // count, seed))
            unread += size
    if draw(st.booleans()):
        steps.append(ShutWrite())
        last: Step = ReceiveAll(draw(chunks))
    else:
        last = SendWhileReceiving(draw(amounts | st.just(MUCH // 2)), 99, draw(chunks), half_close=True)
    steps.append(draw(st.sampled_from([last, last, last, Leave(), Reset()])))
    return Script(tuple(steps), receive_buffer=draw(st.sampled_from([None, SLOW])))


def test_made_up_clients_see_the_same(oracle: Any, subject: Any) -> None:
    @settings(max_examples=40, deadline=None, derandomize="CI" in os.environ, suppress_health_check=list(HealthCheck))
    @given(script=made_up_scripts())
    def a_made_up_client_sees_the_same(script: Script) -> None:
        assert_no_difference(script, oracle, subject)

    a_made_up_client_sees_the_same()


# That no difference is found is worth something only if one would be. These servers are wrong in one way each.


def drop_a_byte(connection: Connection) -> None:
    connection.recv(1)
    while data := connection.recv():
        connection.sendall(data)


def swap_two_chunks(connection: Connection) -> None:
    while data := connection.recv():
        half = len(data) // 2
        connection.sendall(data[half:])
        connection.sendall(data[:half])


def repeat_data(connection: Connection) -> None:
    while data := connection.recv():
        connection.sendall(data + data[-1:])


def close_without_flushing(connection: Connection) -> None:
    held = b""
    while data := connection.recv(1000):
        connection.sendall(held)
        held = data


def close_at_the_first_pause(connection: Connection) -> None:
    connection.sendall(connection.recv(1))


def reset_in_place_of_eof(connection: Connection) -> None:
    while data := connection.recv():
        connection.sendall(data)
    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def never_answer(connection: Connection) -> None:
    while connection.recv():
        pass


FAULTS = {
    drop_a_byte: "half-close before reading",
    swap_two_chunks: "half-close before reading",
    repeat_data: "half-close before reading",
    close_without_flushing: "half-close before reading",
    close_at_the_first_pause: "half-close after reading",
    reset_in_place_of_eof: "half-close with nothing sent",
    never_answer: "one byte",
}


@pytest.mark.parametrize(("broken", "name"), FAULTS.items(), ids=[broken.__name__ for broken in FAULTS])
def test_a_broken_server_is_found_out(broken: Callable[[Connection], None], name: str, oracle: Any) -> None:
    script = SCRIPTS[name]
    with serving(ThreadedServer(ANY_PORT, broken)) as address:
        found = difference(script, observe(script, oracle), observe(script, address, timeout=0.5))
    assert found is not None
    assert repr(script) in found


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_printed_script_can_be_pasted(script: Script) -> None:
    assert eval(repr(script)) == script


def test_the_first_different_byte_is_named() -> None:
    script = Script((ReceiveAll(),))
    found = difference(script, Observation(b"abcdef", (6,), "eof"), Observation(b"abcxef", (6,), "eof"))
    assert found is not None
    assert "from byte 3 on: 64 65 66 expected, 78 65 66 received" in found


def test_after_a_reset_a_prefix_agrees() -> None:
    whole, part = Observation(b"abc", (3,), "reset"), Observation(b"ab", (2,), "reset")
    assert agree(whole, part)
    assert agree(part, whole)
    assert not agree(whole, Observation(b"ax", (2,), "reset"))
    assert not agree(whole, Observation(b"abc", (3,), "eof"))


def test_a_stuck_client_agrees_with_nobody() -> None:
    stuck = Observation(b"", (), "stuck")
    assert not agree(stuck, stuck)
