"""The fault proxy: each fault as a peer sees it, what comes through untouched, and plans that can be repeated.

What must not come is held back for a minute by the plan, and the test is over before: so no test depends on time.
"""

from __future__ import annotations

import errno
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from helpers import needs_resets, receive_reset, serving, wait_until

from muxio.server import ThreadedServer
from muxio.testing import FaultPlan, FaultProxy
from muxio.testing.faults import Abort, Action, Cut, HalfClose, Pass, Stall, Trickle
from muxio.testing.scripts import RESET_ON_CLOSE, Script, SendWhileReceiving, observe, run_many

ENDLESS = 60.0
"""Seconds that a plan rests when the test is to be over before."""

ENDINGS = [HalfClose(), Cut(), Abort()]
MIB = 1024 * 1024


@contextmanager
def connected(plan: FaultPlan) -> Iterator[tuple[socket.socket, socket.socket, FaultProxy]]:
    """A client and the server's end of its connection, with the proxy between them."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        proxy = stack.enter_context(FaultProxy(listener.getsockname(), plan))
        client = stack.enter_context(socket.create_connection(proxy.address, timeout=10))
        listener.settimeout(10)
        server = stack.enter_context(listener.accept()[0])
        server.settimeout(10)
        yield client, server, proxy


def receive(sock: socket.socket, size: int = sys.maxsize) -> bytes:
    """So many bytes, fewer at EOF."""
    received = bytearray()
    while len(received) < size and (data := sock.recv(min(65536, size - len(received)))):
        received += data
    return bytes(received)


def fill(sock: socket.socket) -> int:
    """Send until the kernel takes no more, or 64 MiB; say how much that was."""
    sent = 0
    sock.setblocking(False)
    try:
        while sent < 64 * MIB:
            sent += sock.send(bytes(MIB))
    except BlockingIOError:
        pass
    sock.settimeout(10)
    return sent


def is_over(sock: socket.socket) -> bool:
    """Wait for the end of what comes: EOF, or a reset."""
    try:
        receive(sock)
    except ConnectionError:
        pass
    return True


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


# What peers see


def test_a_trickle_comes_in_small_pieces() -> None:
    with connected(FaultPlan(downstream=(Trickle(4, chunk=2, pause=ENDLESS),))) as (client, server, _):
        server.sendall(b"abcd")
        assert client.recv(100) == b"ab"


def test_all_of_a_trickle_comes() -> None:
    with connected(FaultPlan(upstream=(Trickle(500, chunk=3, pause=0.001),))) as (client, server, _):
        data = random.Random(1).randbytes(1000)
        client.sendall(data)
        assert receive(server, 1000) == data


def test_a_stalled_direction_rests_and_the_other_goes_on() -> None:
    with connected(FaultPlan(downstream=(Pass(2), Stall(ENDLESS)))) as (client, server, _):
        server.sendall(b"abcd")
        assert client.recv(100) == b"ab"
        client.sendall(b"efgh")
        assert receive(server, 4) == b"efgh"
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(100)


def test_a_stall_ends() -> None:
    with connected(FaultPlan(upstream=(Stall(0.001), Pass(1), Stall(0.001)))) as (client, server, _):
        client.sendall(b"abcd")
        assert receive(server, 4) == b"abcd"


def test_a_stalled_direction_fills_its_senders_buffers() -> None:
    with connected(FaultPlan(upstream=(Stall(ENDLESS),))) as (client, _, _):
        assert fill(client) < 64 * MIB


def test_a_reader_that_does_not_read_is_felt_through_the_proxy() -> None:
    with connected(FaultPlan()) as (_, server, _):
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.sendall(bytes(64 * MIB))


def test_a_half_close_downstream_is_eof_for_the_client_alone() -> None:
    with connected(FaultPlan(downstream=(Pass(3), HalfClose()))) as (client, server, _):
        server.sendall(b"abcdef")
        assert receive(client) == b"abc"
        server.sendall(bytes(4 * MIB))  # nobody gets it, and it is in nobody's way
        client.sendall(b"still here")
        assert receive(server, 10) == b"still here"


def test_a_half_close_upstream_is_eof_for_the_server_alone() -> None:
    with connected(FaultPlan(upstream=(Pass(3), HalfClose()))) as (client, server, proxy):
        client.sendall(b"abcdef")
        assert receive(server) == b"abc"
        server.sendall(b"answer")
        server.close()
        assert receive(client) == b"answer"
        client.close()
        wait_until(lambda: not proxy.connections)


def test_a_cut_closes_both_sides() -> None:
    with connected(FaultPlan(downstream=(Pass(3), Cut()))) as (client, server, proxy):
        server.sendall(b"abcdef")
        assert receive(client) == b"abc"
        assert is_over(server)
        wait_until(lambda: not proxy.connections)


def test_an_abort_resets_both_sides() -> None:
    with connected(FaultPlan(upstream=(Pass(3), Abort()))) as (client, server, _):
        client.sendall(b"abcdef")
        with pytest.raises(ConnectionResetError):
            receive_reset(client)
        with pytest.raises(ConnectionResetError):
            receive_reset(server)


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
def test_an_ending_at_once_happens_with_nothing_sent(ending: Action) -> None:
    plan = FaultPlan(downstream=(ending,))
    with socket.create_server(("127.0.0.1", 0)) as target, FaultProxy(target.getsockname(), plan) as proxy:
        try:
            with socket.create_connection(proxy.address, timeout=10) as client:
                assert receive(client) == b""
        except ConnectionResetError:  # that of connect() included, if the reset was quicker
            assert ending == Abort()


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
def test_an_ending_behind_the_eof_does_not_happen(ending: Action) -> None:
    with connected(FaultPlan(upstream=(Pass(100), ending))) as (client, server, proxy):
        client.sendall(b"abc")
        client.shutdown(socket.SHUT_WR)
        assert receive(server) == b"abc"
        server.sendall(b"answer")
        server.close()
        assert receive(client) == b"answer"
        wait_until(lambda: not proxy.connections)


# What passes


def test_eof_passes_behind_the_last_byte_and_the_other_direction_goes_on() -> None:
    with connected(FaultPlan()) as (client, server, proxy):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert receive(server) == b"question"
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert receive(client) == b"answer"
        wait_until(lambda: not proxy.connections)


@pytest.mark.parametrize("direction", ["upstream", "downstream"])
def test_a_reset_passes_as_a_reset(direction: str) -> None:
    needs_resets()
    with connected(FaultPlan()) as (client, server, proxy):
        first, other = (client, server) if direction == "upstream" else (server, client)
        reset(first)
        with pytest.raises(ConnectionResetError):
            receive_reset(other)
        wait_until(lambda: not proxy.connections)


def test_the_refusal_of_a_dead_server_is_a_reset() -> None:
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # and does not listen
        with FaultProxy(dead.getsockname(), FaultPlan()) as proxy:
            for _ in range(3):
                with (
                    pytest.raises(ConnectionResetError),
                    socket.create_connection(proxy.address, timeout=10) as client,
                ):
                    receive_reset(client)
            wait_until(lambda: not proxy.connections)


@pytest.mark.parametrize("seed", range(6))
def test_lossless_plans_lose_nothing_of_a_mebibyte_both_ways_at_once(seed: int) -> None:
    upstream, downstream = (random.Random(n).randbytes(MIB) for n in range(2))
    with connected(FaultPlan.random(seed)) as (client, server, proxy), ThreadPoolExecutor(4) as pool:

        def send(sock: socket.socket, data: bytes) -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        sending = [pool.submit(send, client, upstream), pool.submit(send, server, downstream)]
        receiving = [pool.submit(receive, server), pool.submit(receive, client)]
        # Equality first: a failed assert would print a mebibyte.
        assert [job.result() == data for job, data in zip(receiving, (upstream, downstream), strict=True)] == [True] * 2
        for job in sending:
            job.result()
        wait_until(lambda: not proxy.connections)


def test_a_hundred_connections_at_once_follow_the_same_plan() -> None:
    plan = FaultPlan((Trickle(50, 7), Stall(0.005)), (Pass(10), Stall(0.005), Trickle(20, 1, 0.001), Pass(5000), Cut()))
    scripts = [Script((SendWhileReceiving(10_000, seed, half_close=True),)) for seed in range(100)]
    with serving(ThreadedServer(("127.0.0.1", 0))) as address, FaultProxy(address, plan) as proxy:
        for script, seen in zip(scripts, run_many(scripts, proxy.address), strict=True):
            assert seen.ending in ("eof", "reset")
            assert len(seen.received) <= 5030
            assert observe(script, address).received.startswith(seen.received)
        wait_until(lambda: not proxy.connections)


def test_the_target_may_have_an_ipv6_address() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this system has no IPv6 loopback address")
    with (
        listener,
        FaultProxy(listener.getsockname(), FaultPlan()) as proxy,
        socket.create_connection(proxy.address, timeout=10) as client,
        listener.accept()[0] as server,
    ):
        server.sendall(b"abc")
        assert receive(client, 3) == b"abc"


# The proxy's own life


def test_closing_in_mid_stream_leaves_nothing() -> None:
    plan = FaultPlan((Pass(10), Stall(ENDLESS)), (Trickle(50, 1, ENDLESS),))
    with ExitStack() as stack:
        address = stack.enter_context(serving(ThreadedServer(("127.0.0.1", 0))))
        stalled = stack.enter_context(FaultProxy(address, plan))
        full = stack.enter_context(FaultProxy(address, FaultPlan()))
        clients = [
            stack.enter_context(socket.create_connection(proxy.address, timeout=10))
            for proxy in (stalled, full)
            for _ in range(10)
        ]
        for client in clients:
            fill(client)
        wait_until(lambda: stalled.connections == full.connections == 10)
        stalled.close()
        full.close()
        assert stalled.connections == full.connections == 0
        assert all(map(is_over, clients))


def test_close_may_be_called_again_and_by_any_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, FaultProxy(listener.getsockname(), FaultPlan()) as proxy:
        threads = [threading.Thread(target=proxy.close) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        proxy.close()


def test_accepting_goes_on_when_the_system_was_out_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = socket.socket.accept
    errors = [OSError(errno.EMFILE, "Too many open files") for _ in range(2)]

    def accept_or_fail(self: socket.socket) -> Any:
        if errors:
            raise errors.pop()
        return accept(self)

    with socket.create_server(("127.0.0.1", 0)) as dead, FaultProxy(dead.getsockname(), FaultPlan()) as proxy:
        monkeypatch.setattr(socket.socket, "accept", accept_or_fail)
        with socket.create_connection(proxy.address):
            wait_until(lambda: proxy.connections)
        assert not errors


def test_a_proxy_shows_what_it_is() -> None:
    with connected(FaultPlan((Stall(0.5),))) as (_, _, proxy):
        assert repr(proxy) == (
            f"<FaultProxy from {proxy.address} to {proxy.target}, 1 connected, "
            "FaultPlan(upstream=(Stall(seconds=0.5),), downstream=())>"
        )


# Plans


@pytest.mark.parametrize("lossy", [False, True])
def test_a_seed_makes_the_same_plan_each_time_and_its_print_repeats_it(lossy: bool) -> None:
    plans = [FaultPlan.random(seed, lossy=lossy) for seed in range(300)]
    assert plans == [FaultPlan.random(seed, lossy=lossy) for seed in range(300)]
    assert len(set(plans)) > 200
    for plan in plans:
        assert plan.lossless is not lossy
        assert eval(repr(plan)) == plan


def test_a_seed_makes_the_same_plan_everywhere() -> None:
    assert FaultPlan.random("muxio 2", lossy=True) == FaultPlan(
        upstream=(
            Trickle(size=40, chunk=2, pause=0.001),
            Stall(seconds=0.011),
            Pass(size=1685),
            Pass(size=11615),
            Cut(),
        ),
        downstream=(
            Trickle(size=418, chunk=38, pause=0.001),
            Stall(seconds=0.018),
            Trickle(size=18, chunk=6, pause=0.001),
        ),
    )


def test_random_plans_hold_everything_that_there_is() -> None:
    plans = [FaultPlan.random(seed, lossy=True) for seed in range(300)]
    for direction in ("upstream", "downstream"):
        kinds = {type(action) for plan in plans for action in getattr(plan, direction)}
        assert kinds == {Pass, Trickle, Stall, HalfClose, Cut, Abort}


def test_random_plans_are_short() -> None:
    for seed in range(300):
        plan = FaultPlan.random(seed, lossy=True)
        for actions in (plan.upstream, plan.downstream):
            assert sum(rest(action) for action in actions) <= 0.2
            assert sum(getattr(action, "size", 0) for action in actions) <= 2_000_000


def rest(action: Action) -> float:
    if isinstance(action, Trickle):
        return action.pause * -(-action.size // action.chunk)
    return action.seconds if isinstance(action, Stall) else 0


@pytest.mark.parametrize("ending", ENDINGS, ids=repr)
def test_nothing_may_stand_behind_an_ending(ending: Action) -> None:
    with pytest.raises(ValueError):
        FaultPlan((ending, Pass(1)))
    with pytest.raises(ValueError):
        FaultPlan((), (Stall(1), ending, Stall(1)))


@pytest.mark.parametrize(
    "wrong",
    ["Pass(-1)", "Trickle(-1)", "Trickle(1, 0)", "Trickle(1, 1, -0.1)", "Stall(-1)", "Stall(float('inf'))"],
)
def test_amounts_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        eval(wrong)


def test_the_proxy_needs_no_pytest() -> None:
    program = "import sys, muxio.testing as t; t.FaultProxy, t.FaultPlan; print('pytest' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
