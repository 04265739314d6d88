"""Workers that send tokens through sockets of one poller: what the stress test and the soak are made of.

A worker has a few lines, each a pair of sockets of which one end is registered. A round is a token: the worker runs a
plan on the line (writing the token, arming, registering anew, closing and reopening, in some order), while the other
workers do the same to theirs and meddle with this one; then it waits until the dispatcher, which is the one thread that
polls, says that the line is ready. Whatever the plan was, its last step promises that: an event that got lost is a
token that never comes. Nobody touches the line while its worker waits, so no later change heals what went wrong.
"""

from __future__ import annotations

import queue
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from muxio import ONESHOT, READ, Poller, describe

DEADLINE = 20.0  #: seconds until what has to come has not come
LINES = 8  #: of a worker; their steps are mixed

#: What a round does to its line. The last step is the one after which the event has to come.
PLANS = [
    plan.split()
    for plan in (
        "write arm",
        "arm write",
        "arm write arm",
        "rest write arm",
        "unregister write register",
        "unregister register write",
        "unregister register arm write",
        "unregister close open register write",
        "unregister close open write register",
        "close forget open register write",  # the number is a suspect from now on
        "close open register forget write",  # the new owner of the number wins
        "dup close forget open register haunt write",  # the old file lives on, and is ready
    )
]
PLANS += PLANS[:4] * 4  # most of the time a socket is not closed
UNARMED_PLANS = [["write"]] * 12 + PLANS  # nor armed, where it stays so


Pair = tuple[socket.socket, socket.socket]

#: The registrations of a worker that are ready. None: the run is over.
Inbox = queue.SimpleQueue["Registration | None"]


class Stopped(Exception):
    """Another thread has failed: this one ends too, and what it says does not matter."""


class End:
    """The watched end of a pair, and what its registrations have in common. (list.append is atomic.)"""

    def __init__(self, pair: Pair) -> None:
        self.sock, self.peer = pair
        self.sock.setblocking(False)
        self.written = False  # before that, nothing can be ready
        self.closed = False
        self.armings: list[None] = []  # one for each register and modify
        self.events = 0


class Registration:
    """One registration: it is its own key, so that an event tells for which one it was meant."""

    __slots__ = ("end", "gone_at", "line", "pending", "turn")

    def __init__(self, line: Line, end: End) -> None:
        self.line = line
        self.end = end
        self.gone_at: int | None = None  # the turn of the dispatcher in which it was unregistered
        self.turn = 0  # the turn of its last event
        self.pending = False  # whether it is in its worker's inbox: a level event comes again and again


class Line:
    """A pair of sockets, one end watched; the steps of the plans."""

    def __init__(self, hall: Hall, inbox: Inbox, chance: random.Random) -> None:
        self.hall = hall
        self.inbox = inbox
        self.chance = chance
        self.busy = True  # while its worker runs a plan, others may meddle
        self.token = 0
        self.ghost: Pair | None = None
        self.open()
        self.gone = self.registration  # the one that was closed last
        self.register()

    def open(self) -> None:
        self.registration = Registration(self, End(self.hall.make_pair()))

    def close(self) -> None:
        self.gone = self.registration
        self.gone.end.closed = True
        with self.hall.counting:
            self.hall.closings += 1
        self.gone.end.sock.close()
        if self.ghost is None:
            self.gone.end.peer.close()

    def register(self) -> None:
        end = self.registration.end
        end.armings.append(None)
        self.hall.poller.register(end.sock, READ | self.chance.choice(self.hall.modes), self.registration)

    def unregister(self) -> None:
        end = self.registration.end
        self.hall.poller.unregister(end.sock)
        self.registration.gone_at = self.hall.turn
        self.registration = Registration(self, end)

    def forget(self) -> None:
        """Unregister what was closed first."""
        try:
            self.hall.poller.unregister(self.gone.end.sock)
        except KeyError:
            pass  # a new owner of the number, this line's or another's, has taken its place
        self.gone.gone_at = self.hall.turn

    def arm(self) -> None:
        end = self.registration.end
        end.armings.append(None)
        self.hall.poller.modify(end.sock, READ | self.chance.choice(self.hall.modes))

    def rest(self) -> None:
        self.hall.poller.modify(self.registration.end.sock, 0)

    def write(self) -> None:
        end = self.registration.end
        end.written = True
        end.peer.send(self.token.to_bytes(4, "big"))

    def dup(self) -> None:
        """Keep the file, so that epoll keeps it too."""
        self.ghost = self.registration.end.sock.dup(), self.registration.end.peer

    def haunt(self) -> None:
        assert self.ghost is not None
        self.ghost[1].send(b"boo!")

    def exorcise(self) -> None:
        if self.ghost is not None:
            for sock in self.ghost:
                sock.close()
            self.ghost = None

    def has_token(self) -> bool:
        """Whether the token is there. AssertionError if it is another one, or comes again."""
        try:
            received = self.registration.end.sock.recv(64)
        except BlockingIOError:
            return False
        assert received == self.token.to_bytes(4, "big"), f"token {self.token} came as {received!r}"
        return True

    def end(self) -> None:
        self.exorcise()
        self.registration.end.sock.close()
        self.registration.end.peer.close()


class Hall:
    """One poller, the thread that polls it, and all the workers around.

    modes: EDGE, ONESHOT, 0 for level: one of them is taken whenever a line is armed.
    what: which run this is, for the message of a failure.
    make_pair: where the pairs of sockets come from.
    """

    def __init__(
        self,
        poller: Poller[Registration],
        modes: Sequence[int],
        what: str,
        make_pair: Callable[[], Pair] = socket.socketpair,
    ) -> None:
        self.poller = poller
        self.make_pair = make_pair
        self.modes = modes
        self.what = what
        self._plans = PLANS if ONESHOT in modes else UNARMED_PLANS
        self.turn = 0  # which poll() the dispatcher is in
        self.events = 0
        self.idle_turns = 0
        self.wakes = 0
        self.closings = 0
        self.counting = threading.Lock()
        self.over = False
        self.failures: list[BaseException] = []
        self.lines: list[Line] = []
        self._inboxes: list[Inbox] = []

    def guard(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run a part of the test; the first that fails ends all the others."""
        try:
            function(*arguments)
        except Stopped:
            pass
        except BaseException as error:
            self.failures.append(error)
            self.stop()

    def stop(self) -> None:
        self.over = True
        with suppress(RuntimeError):  # it is closed
            self.poller.wake()
        for inbox in list(self._inboxes):
            inbox.put(None)

    def dispatch(self, seed: object) -> None:
        """Poll, and tell the workers."""
        chance = random.Random(f"{seed} dispatcher")
        while not self.over:
            self.turn += 1
            batch = self.poller.poll(None, max_events=chance.choice((1, 3, 1024)))
            self.idle_turns += not batch
            for place in range(len(batch)):
                registration = batch[place][0]
                gone = registration.gone_at is not None
                now, events = batch[place]  # looked at again: unregister() has returned, so it must show here
                if events:
                    self._tell(now, events, gone and now is registration)

    def _tell(self, registration: Registration, events: int, gone: bool) -> None:
        end = registration.end
        trouble = ""
        if gone or (registration.gone_at is not None and registration.gone_at < self.turn):
            trouble = "an event of a registration that was removed before"
        elif events != READ and not end.closed:
            trouble = f"{describe(events)} of a socket that is open and can only be read"
        elif not end.written and not end.closed:
            trouble = "an event of a socket through which nothing has come yet"
        end.events += 1
        if self.modes == [ONESHOT] and end.events > len(end.armings):
            trouble = f"a ONESHOT armed {len(end.armings)} times fired once more"
        if trouble:
            raise AssertionError(f"{self.what}: {trouble}")
        self.events += 1
        registration.turn = self.turn
        if not registration.pending:
            registration.pending = True
            registration.line.inbox.put(registration)

    def work(
        self, name: object, rounds: int, seed: object, ended: Callable[[int], object] = lambda rounds: None
    ) -> None:
        """Send so many tokens, and see each of them come.

        ended: told how many rounds are done, now and then.
        """
        chance = random.Random(f"{seed} {name}")
        inbox: Inbox = queue.SimpleQueue()
        self._inboxes.append(inbox)
        lines: list[Line] = []
        try:
            for _ in range(LINES):
                lines.append(Line(self, inbox, chance))
                self.lines.append(lines[-1])
            for done in range(0, rounds, LINES):
                self._round(f"worker {name}, round {done}", lines, inbox, chance)
                ended(LINES)
            for line in lines:
                line.unregister()
        finally:
            self._inboxes.remove(inbox)
            for line in lines:
                self.lines.remove(line)
                line.end()

    def _round(self, name: str, lines: list[Line], inbox: Inbox, chance: random.Random) -> None:
        """A token through each of the lines."""
        for line in lines:
            line.token = chance.randrange(1 << 32)
        plans = {line: chance.choice(self._plans) for line in lines}
        since = self._run(plans, chance)
        self._receive(since, inbox, lambda line: f"{name}: {' '.join(plans[line])}")
        for line in lines:
            line.exorcise()

    def _run(self, plans: dict[Line, list[str]], chance: random.Random) -> dict[Line, int]:
        """Run plans, their steps mixed. Returns in which turn each came to its last step."""
        since: dict[Line, int] = {}
        steps = {line: deque(plan) for line, plan in plans.items()}
        for line in plans:
            line.busy = True
        unfinished = list(plans)
        while unfinished:
            line = chance.choice(unfinished)
            step = steps[line].popleft()
            if not steps[line]:
                since[line] = self.turn
                unfinished.remove(line)
            getattr(line, step)()
            line.busy = bool(steps[line])
            dice = chance.random()
            if dice < 0.1:
                self._meddle(chance)
            elif dice < 0.12:
                with self.counting:
                    self.wakes += 1
                self.poller.wake()
        return since

    def _meddle(self, chance: random.Random) -> None:
        """Arm somebody else's line."""
        line = chance.choice(self.lines)
        end = line.registration.end
        if line.busy:
            end.armings.append(None)
            try:
                self.poller.modify(end.sock, READ | chance.choice(self.modes))
            except (KeyError, OSError):
                pass  # not registered, or closed, just now

    def _receive(
        self,
        since: dict[Line, int],
        inbox: Inbox,
        where: Callable[[Line], str],
    ) -> None:
        while since:
            try:
                told = inbox.get(timeout=DEADLINE)
            except queue.Empty:
                lost = "; ".join(where(line) for line in since)
                raise AssertionError(f"{self.what}: no event came in {DEADLINE:g} s. {lost}") from None
            if told is None:
                raise Stopped
            told.pending = False
            line = told.line
            if line in since and told is line.registration and told.turn >= since[line] and line.has_token():
                del since[line]
