"""What is particular to one backend, and how a backend is chosen."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
from contextlib import ExitStack

import pytest

import muxio
from muxio import READ
from muxio.backends import NAMES, probe


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("MUXIO_BACKEND", raising=False)
    return monkeypatch


def chosen(name: str | None = None) -> str:
    poller: muxio.Poller[None] = muxio.Poller(name)
    with poller:
        return poller.backend


def test_backends_are_what_opens_here_best_first() -> None:
    assert muxio.backends() == [name for name in NAMES if probe()[name] is None]
    assert muxio.backends()[-1] == "select"
    assert all(isinstance(trouble, str) for name, trouble in probe().items() if name not in muxio.backends())


def test_the_best_backend_is_the_default(unforced: pytest.MonkeyPatch) -> None:
    assert chosen() == muxio.backends()[0]
    unforced.setenv("MUXIO_BACKEND", "")
    assert chosen() == muxio.backends()[0]


def test_the_environment_chooses_and_an_argument_overrules_it(unforced: pytest.MonkeyPatch) -> None:
    for name in muxio.backends():
        unforced.setenv("MUXIO_BACKEND", name)
        assert chosen() == name
        assert chosen("select") == "select"


def test_an_unknown_backend_is_a_value_error_that_names_the_known_ones(unforced: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"'abacus'.*epoll, kqueue, poll, select"):
        muxio.Poller("abacus")
    unforced.setenv("MUXIO_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MUXIO_BACKEND"):
        muxio.Poller()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in muxio.backends()])
def test_a_backend_that_does_not_work_here_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(io.UnsupportedOperation, match=name):
        muxio.Poller(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows' select() limits how many sockets, not their numbers")
def test_select_refuses_descriptors_that_it_cannot_watch() -> None:
    poller: muxio.Poller[socket.socket] = muxio.Poller("select")
    with ExitStack() as stack:
        stack.enter_context(poller)
        low, high = (stack.enter_context(sock) for sock in socket.socketpair())
        number = move_above(high.detach(), stack)
        poller.register(low, READ)
        with pytest.raises(io.UnsupportedOperation, match="1024"):
            poller.register(number, READ)
        assert len(poller) == 1
        os.write(number, b"x")
        assert poller.poll(10) == [(low, READ)]


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
@pytest.mark.parametrize("timeout", [0.0001, 0.0021])
def test_epoll_waits_whole_deadlines_where_select_cannot_help(timeout: float) -> None:
    """An epoll whose number is above select()'s limit takes a timer, or rounds up."""
    from muxio.backends.epoll import Backend

    with ExitStack() as stack:
        filler = [stack.enter_context(open(os.devnull)) for _ in range(1024)]
        poller: muxio.Poller[int] = muxio.Poller(Backend())
        stack.enter_context(poller)
        assert poller.fileno() > len(filler)
        reader, writer = (stack.enter_context(sock) for sock in socket.socketpair())
        poller.register(reader, READ, key=1)
        began = time.monotonic()
        assert poller.poll(timeout) == []
        assert time.monotonic() - began >= timeout
        writer.send(b"x")
        assert poller.poll(timeout) == [(1, READ)]


def move_above(fd: int, stack: ExitStack, limit: int = 1024) -> int:
    """The same file under a number of at least `limit`."""
    if sys.platform == "win32":
        pytest.skip("Windows has no fcntl")
    import fcntl

    number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, limit)
    os.close(fd)
    stack.callback(os.close, number)
    return number
