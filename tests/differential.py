"""The server under test, and made-up clients behind made-up faults: what must hold of them, for the tests and the soak.

Behind a lossless plan a client of the server sees what it sees of the oracle with nothing in between. Behind a lossy
one it sees a beginning of that. Either way the connection comes to its end, and the server lives, logs nothing and
tells of each connection once.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from helpers import serving, wait_until

from muxio.server import ConnectionReport, EchoProtocol, Limits, Server, Timeouts, Transport
from muxio.server.connection import AnyProtocol
from muxio.testing import FaultPlan, FaultProxy
from muxio.testing.scripts import Observation, ReceiveAll, Script, Send, ShutWrite, difference, made_up, observe

ANY_PORT = ("127.0.0.1", 0)

LOSSY_SHARE = 1 / 3

END_TIMEOUT = 10.0  # seconds for a connection to come to its end when the client has left

NEXT_CLIENT = Script((Send(1000), ShutWrite(), ReceiveAll()))


def make_server(
    backend: str | None,
    factory: Callable[[], AnyProtocol] = EchoProtocol,
    report: Callable[[ConnectionReport], object] | None = None,
) -> Server:
    """The server under test, with all that it can do switched on. This is the one place where it is made.

    The deadlines and limits are such that no script reaches them.
    """
    timeouts = Timeouts(first_data=60, idle=60, write=60, lifetime=600, close=60, linger=60)
    limits = Limits(connections=10_000, per_peer=10_000, buffered=1 << 30)
    return Server(ANY_PORT, factory, backend=backend, timeouts=timeouts, limits=limits, report=report)


class Ledger(logging.Handler):
    """What the server told about its connections: to their protocols, in its reports, and in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        # Lists: they are copied in one go while the server's thread appends.
        self.made: list[Any] = []
        self.lost: list[Any] = []
        self.reported: list[Any] = []
        self.logged: list[str] = []

    def protocol(self) -> EchoProtocol:
        return _Entered(self)

    def report(self, report: ConnectionReport) -> None:
        self.reported.append(report.peer)

    def emit(self, record: logging.LogRecord) -> None:
        self.logged.append(self.format(record))

    def imbalance(self) -> str | None:
        """How the books differ, None if they do not: as long as a connection stands, they do."""
        made, lost, reported = (Counter(list(peers)) for peers in (self.made, self.lost, self.reported))
        peers = {peer for peer in made | lost | reported if not made[peer] == lost[peer] == reported[peer]}
        lines = [
            f"{peer}: connected {made[peer]} times, connection_lost {lost[peer]}, reported {reported[peer]}"
            for peer in sorted(peers)
        ]
        return "\n".join(lines + self.logged) or None

    def settle(self) -> str | None:
        """The imbalance that is left when every connection has had time to end."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.imbalance(), END_TIMEOUT)
        return self.imbalance()


class _Entered(EchoProtocol):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._ledger.made.append(transport.get_extra_info("peername"))

    def connection_lost(self, error: Exception | None) -> None:
        self._ledger.lost.append(self.transport.get_extra_info("peername"))


@contextlib.contextmanager
def server_under_test(backend: str | None) -> Iterator[tuple[Any, Ledger]]:
    """Serve with the books kept. Gives the address and the ledger, which is complete when the block is left."""
    ledger = Ledger()
    logger = logging.getLogger("muxio.server")
    logger.addHandler(ledger)
    try:
        with serving(make_server(backend, ledger.protocol, ledger.report)) as address:
            yield address, ledger
    finally:
        logger.removeHandler(ledger)


@dataclass(frozen=True)
class Case:
    """One client, and what happens to its connection on the way."""

    script: Script
    plan: FaultPlan

    @classmethod
    def random(cls, seed: str, number: int) -> Case:
        chance = random.Random(f"{seed} {number}")
        return cls(made_up(chance), FaultPlan.random(f"{seed} {number}", lossy=chance.random() < LOSSY_SHARE))

    def __str__(self) -> str:
        return f"script = {self.script!r}\nplan = {self.plan!r}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    case: Case
    received: int
    """Bytes that the client received."""
    cut_short: bool
    """Whether the faults kept something from the client."""
    trouble: str | None
    """What is wrong, with the case as Python; None if all is right."""


def run(case: Case, oracle: Any, subject: Any) -> Outcome:
    """Run a case against the server at `subject`, and its script against the one at `oracle`. Raises nothing."""
    received, cut_short, trouble = 0, False, None
    try:
        expected = observe(case.script, oracle)
        with FaultProxy(subject, case.plan) as proxy:
            actual = _observe_through(proxy, case.script)
            received, cut_short = len(actual.received), actual != expected
            trouble = difference(case.script, expected, actual) if case.plan.lossless else _excess(expected, actual)
            if trouble is None:
                wait_until(lambda: not proxy.connections, END_TIMEOUT, "the connection's end, with the client gone")
        if trouble is None and not case.plan.lossless:
            following = observe(NEXT_CLIENT, oracle), observe(NEXT_CLIENT, subject)
            trouble = difference(NEXT_CLIENT, *following)
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"
    return Outcome(case, received, cut_short, None if trouble is None else f"{trouble}\n{case}")


def _observe_through(proxy: FaultProxy, script: Script) -> Observation:
    try:
        return observe(script, proxy.address)
    except ConnectionError:
        if proxy.plan.lossless:
            raise
        return Observation(b"", (), "reset")  # it was quicker than the end of connect()


def _excess(expected: Observation, actual: Observation) -> str | None:
    """Say what a client should not have seen, even if its connection ended early."""
    if actual.ending == "stuck" or not expected.received.startswith(actual.received):
        return f"no beginning of what should have come:\n  expected: {expected}\n  actual:   {actual}"
    return None


def run_all(cases: Sequence[Case], oracle: Any, subject: Any, at_once: int = 8) -> list[Outcome]:
    """Run cases, so many at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda case: run(case, oracle, subject), cases))
