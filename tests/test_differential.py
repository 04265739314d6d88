"""The event-driven server against the thread-per-connection one: what a client sees has to be the same.

No outcome is written down here. Each script is run against both, and the oracle says what is right. A failure prints
the script as Python: paste it into `observe` to see it again.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from differential import ANY_PORT, NEXT_CLIENT, Case, Ledger, make_server, run, run_all, server_under_test
from helpers import BACKENDS, needs_resets, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muxio.server.threaded import Connection, ThreadedServer
from muxio.testing import FaultPlan
from muxio.testing.faults import HalfClose, Pass, Stall
from muxio.testing.scripts import (
    MUCH,
    RESET_ON_CLOSE,
    SLOW,
    UNREAD,
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
    agree,
    difference,
    made_up,
    observe,
    run_many,
)

KIB, MIB = 1024, 1024 * 1024

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


@pytest.fixture
def oracle() -> Iterator[Any]:
    with serving(ThreadedServer(ANY_PORT)) as address:
        yield address


@pytest.fixture(params=BACKENDS)
def subject(request: pytest.FixtureRequest) -> Iterator[Any]:
    with serving(make_server(request.param)) as address:
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


def test_made_up_clients_see_the_same(oracle: Any, subject: Any) -> None:
    @settings(max_examples=40, deadline=None, derandomize="CI" in os.environ, suppress_health_check=list(HealthCheck))
    @given(chance=st.randoms())
    def a_made_up_client_sees_the_same(chance: random.Random) -> None:
        assert_no_difference(made_up(chance), oracle, subject)

    a_made_up_client_sees_the_same()


@pytest.mark.parametrize("backend", BACKENDS)
def test_made_up_clients_behind_made_up_faults_see_the_same(backend: str, oracle: Any) -> None:
    seed = os.environ.get("MUXIO_SEED") or str(random.randrange(10**9))
    cases = [Case.random(seed, number) for number in range(40)]
    with server_under_test(backend) as (subject, ledger):
        outcomes = run_all(cases, oracle, subject)
        imbalance = ledger.settle()
    assert not [outcome.trouble for outcome in outcomes if outcome.trouble], f"MUXIO_SEED={seed}"
    assert ledger.made
    assert imbalance is None, imbalance
    assert ledger.imbalance() is None, "something was told after everything had ended"


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
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


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
    if broken is reset_in_place_of_eof:
        needs_resets()
    script = SCRIPTS[name]
    with serving(ThreadedServer(ANY_PORT, broken)) as address:
        found = difference(script, observe(script, oracle), observe(script, address, timeout=0.5))
    assert found is not None
    assert repr(script) in found


@pytest.mark.parametrize(
    ("broken", "plan"),
    [
        (drop_a_byte, FaultPlan((Stall(0.001),))),
        (drop_a_byte, FaultPlan((), (Pass(1), HalfClose()))),
        (close_at_the_first_pause, FaultPlan()),
        (repeat_data, FaultPlan((Pass(500), HalfClose()))),
        (swap_two_chunks, FaultPlan((), (Pass(900), HalfClose()))),
    ],
)
def test_a_broken_server_is_found_out_behind_faults(
    broken: Callable[[Connection], None], plan: FaultPlan, oracle: Any
) -> None:
    case = Case(NEXT_CLIENT, plan)
    with serving(ThreadedServer(ANY_PORT, broken)) as address:
        outcome = run(case, oracle, address)
    assert outcome.trouble is not None
    assert repr(case.script) in outcome.trouble
    assert repr(case.plan) in outcome.trouble


def test_books_that_are_not_even_are_found_out() -> None:
    ledger = Ledger()
    assert ledger.imbalance() is None
    ledger.made.append("peer")
    ledger.lost.append("peer")
    assert ledger.imbalance() == "peer: connected 1 times, connection_lost 1, reported 0"
    ledger.reported.append("peer")
    assert ledger.imbalance() is None
    ledger.reported.append("peer")
    assert ledger.imbalance() == "peer: connected 1 times, connection_lost 1, reported 2"


def test_a_short_soak_passes() -> None:
    soak = [sys.executable, str(Path(__file__).with_name("soak_differential.py")), "--scripts", "20", "--seed", "1"]
    run = subprocess.run(soak, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout + run.stderr


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
