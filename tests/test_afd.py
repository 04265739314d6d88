"""What is particular to AFD, and to waiting on Windows."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "win32":
    pytest.skip("AFD is a facility of Windows", allow_module_level=True)

import _thread
import asyncio
import ctypes
import io
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from helpers import BACKENDS, open_handles, wait_until

import muxio
from muxio import ERROR, READ, WRITE
from muxio.backends import afd
from muxio.server import sockets, threaded
from muxio.testing.conformance import Background, idle, on_wine, readable, take_number, unix_pair, until_silent

if "afd" not in BACKENDS:
    pytest.skip("MUXIO_BACKEND leaves another backend", allow_module_level=True)

CONNECTIONS = 2000

NO_SOCKET, NOT_SUPPORTED = 10038, 10045  # WSAENOTSOCK, WSAEOPNOTSUPP


@pytest.fixture
def poller() -> Iterator[muxio.Poller[Any]]:
    poller: muxio.Poller[Any] = muxio.Poller("afd")
    with poller:
        yield poller


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_windows_has_afd_and_select() -> None:
    assert muxio.backends() == ["afd", "select"]
    poller: muxio.Poller[Any] = muxio.Poller()
    with poller:
        assert poller.backend == "afd"


# Memory and handles


def test_a_poller_gives_its_handles_back_with_operations_in_flight(stack: ExitStack) -> None:
    sources = [unix_pair(stack)[0] for _ in range(100)]

    def use() -> None:
        poller: muxio.Poller[Any] = muxio.Poller("afd")
        with poller:
            for source in sources:
                poller.register(source, READ)
            assert poller.poll(0) == []

    use()
    before = open_handles()
    for _ in range(20):
        use()
    wait_until(lambda: open_handles() <= before + 10)  # 20 ports and 80 handles of AFD would be more


def test_a_poller_that_was_not_closed_says_so_and_leaves_nothing_to_the_kernel(stack: ExitStack) -> None:
    ours, theirs = unix_pair(stack)
    forgotten: list[muxio.Poller[Any]] = []
    poller: muxio.Poller[Any] = muxio.Poller("afd")
    poller.register(ours, READ)
    assert poller.poll(0) == []
    before = open_handles()
    forgotten.append(poller)
    del poller
    with pytest.warns(ResourceWarning, match="unclosed"):
        forgotten.clear()
    assert open_handles() < before
    theirs.send(b"x")  # which ends nothing any more


def test_sockets_share_handles(stack: ExitStack) -> None:
    backend = afd.Backend()
    stack.callback(backend.close)
    sources = [unix_pair(stack)[0] for _ in range(afd._GROUP + 1)]
    for _ in range(2):
        for source in sources:
            backend.add(source.fileno(), afd.Backend.masks[READ])
        assert len(backend._port.groups) == 2
        for source in sources:
            backend.remove(source.fileno())


# Numbers


def test_the_late_close_of_an_old_owner_does_not_reach_the_new_one(poller: muxio.Poller[Any], stack: ExitStack) -> None:
    """Its operation has ended with LOCAL_CLOSE, which stands in the queue when the number is used again."""
    for _ in range(20):
        old = unix_pair(stack)[0]
        number = old.fileno()
        poller.register(old, READ, key="old")
        assert poller.poll(0) == []
        old.close()
        poller.unregister(old)
        ours, theirs = take_number(number, stack)
        poller.register(ours, READ, key="new")
        assert until_silent(poller) == []
        theirs.send(b"x")
        assert poller.poll(10) == [("new", READ)]
        poller.unregister(ours)


def test_a_close_is_told_once(poller: muxio.Poller[Any], stack: ExitStack) -> None:
    ours, _ = unix_pair(stack)
    poller.register(ours, READ, key="key")
    assert poller.poll(0) == []
    ours.close()
    assert poller.poll(10) == [("key", READ | ERROR)]
    assert until_silent(poller) == []
    poller.unregister(ours)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_bare_number_is_not_watched_for_its_next_owner(
    poller: muxio.Poller[Any], stack: ExitStack, interrupted: bool
) -> None:
    """The number cannot tell that it was closed, but AFD has told, of an operation that may be given up by now."""
    ours, _ = unix_pair(stack)
    number = ours.fileno()
    poller.register(number, READ, key="old")
    assert poller.poll(0) == []
    vars(poller)["_facility"]._interrupted = interrupted  # as an exception leaves it
    ours.close()
    _, theirs = take_number(number, stack)
    theirs.send(b"x")
    assert poller.poll(10) == [("old", READ | ERROR)]
    with pytest.raises(OSError, match="closed"):
        poller.modify(number, READ)
    assert until_silent(poller) == []


def test_who_is_removed_just_when_he_is_found_closed_is_not_told_of(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, between two steps of the wait. The number may have a new owner, who would be told."""
    backend = afd.Backend()
    stack.callback(backend.close)
    ours, _ = unix_pair(stack)
    number = ours.fileno()
    backend.add(number, afd.Backend.masks[READ])
    assert backend.wait(0, 10) == []
    says_closed = afd._Operation.says_closed

    def remove(operation: afd._Operation) -> bool:
        backend.remove(number)
        return says_closed(operation)

    with monkeypatch.context() as patch:
        patch.setattr(afd.Backend, "_take_hints", lambda backend: None)  # so that the wait itself finds it
        patch.setattr(afd._Operation, "says_closed", remove)
        ours.close()
        backend.wait(10, 10)  # whoever removed it drops what this says
    assert number not in backend._sockets
    assert backend.wait(0, 10) == []


# Events


def test_what_was_read_before_the_look_is_not_reported(poller: muxio.Poller[Any], stack: ExitStack) -> None:
    """Its operation has ended, and stands in the queue."""
    ours, theirs = unix_pair(stack)
    poller.register(ours, READ)
    for _ in range(50):
        assert poller.poll(0) == []
        theirs.send(b"x")
        wait_until(lambda: peeks(ours))
        assert ours.recv(1) == b"x"
    assert until_silent(poller) == []


def test_a_poll_begins_as_many_operations_as_were_ready(
    poller: muxio.Poller[Any], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are registered."""
    begin = afd._NtDeviceIoControlFile
    begun: list[None] = []

    def count(*arguments: Any) -> Any:
        begun.append(None)
        return begin(*arguments)

    ready = {readable(stack) for _ in range(10)}
    for source in [*ready, *(idle(stack) for _ in range(500))]:
        poller.register(source, READ)
    while {key for key, _ in poller.poll(10)} != ready:
        pass
    monkeypatch.setattr(afd, "_NtDeviceIoControlFile", count)
    for _ in range(10):
        begun.clear()
        assert {key for key, _ in poller.poll(10)} == ready
        assert len(begun) == len(ready)


def peeks(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("name", muxio.backends())
def test_urgent_data_that_nobody_asked_for_makes_no_wait_spin(name: str, stack: ExitStack) -> None:
    """Winsock's select() has it in the set in which a refused connect is, too."""
    poller: muxio.Poller[Any] = muxio.Poller(name)
    stack.enter_context(poller)
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    ours = stack.enter_context(socket.socket())
    ours.setblocking(False)
    poller.register(ours, WRITE)
    with pytest.raises(BlockingIOError):
        ours.connect(listener.getsockname())
    theirs = stack.enter_context(listener.accept()[0])
    theirs.send(b"!", socket.MSG_OOB)
    assert poller.poll(10) == [(ours, WRITE)]
    poller.modify(ours, READ)
    assert until_silent(poller) == []


def test_select_has_a_limit_and_says_so(stack: ExitStack) -> None:
    poller: muxio.Poller[Any] = muxio.Poller("select")
    stack.enter_context(poller)
    watched = [stack.enter_context(socket.socket()) for _ in range(511)]  # one more is its own
    resting, one_more = stack.enter_context(socket.socket()), stack.enter_context(socket.socket())
    for sock in watched:
        poller.register(sock, READ)
    poller.register(resting, 0)
    with pytest.raises(io.UnsupportedOperation, match=r"512.*afd"):
        poller.register(one_more, READ)
    with pytest.raises(io.UnsupportedOperation, match=r"512.*afd"):
        poller.modify(resting, WRITE)
    assert len(poller) == len(watched) + 1
    poller.poll(0)
    poller.unregister(watched[0])
    poller.modify(resting, WRITE)
    poller.poll(0)


# Signals


@pytest.mark.parametrize("name", muxio.backends())
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_ctrl_c_ends_a_wait(name: str, timeout: float | None) -> None:
    """A signal is noted by another thread there, and does not interrupt the call that the main thread is in."""
    poller: muxio.Poller[Any] = muxio.Poller(name)

    def interrupt() -> None:
        wait_until(lambda: "waiting" in repr(poller))
        _thread.interrupt_main()

    with poller:
        thread = Background(interrupt)
        with pytest.raises(KeyboardInterrupt):
            poller.poll(timeout)
        thread.result()
        assert poller.poll(0) == []


@pytest.mark.parametrize("name", muxio.backends())
def test_an_interrupted_wait_loses_nothing(name: str, stack: ExitStack) -> None:
    """Wherever in the wait it strikes."""
    poller: muxio.Poller[Any] = muxio.Poller(name)
    stack.enter_context(poller)
    ours, theirs = unix_pair(stack)
    poller.register(ours, READ, key="key")
    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.001):
            _thread.interrupt_main()

    thread = Background(interrupt)
    interrupted = 0
    while thread.is_alive():
        try:
            if interrupted < 200:
                poller.modify(ours, READ)
                poller.poll(0)
            else:
                over.set()
                thread.join()
        except KeyboardInterrupt:
            interrupted += 1
    poller.poll(0)
    theirs.send(b"x")
    assert poller.poll(10) == [("key", READ)]
    for _ in range(3):
        assert poller.poll(10) == [("key", READ)]


# Threads


def test_a_look_of_another_thread_is_refused_while_one_waits(stack: ExitStack) -> None:
    selector = stack.enter_context(muxio.Selector("afd"))
    ours, theirs = unix_pair(stack)
    key = selector.register(ours, selectors.EVENT_READ)
    thread = Background(selector.select)
    wait_until(lambda: "waiting" in repr(selector.poller))
    with pytest.raises(RuntimeError, match="waits"):
        selector.select(0)
    theirs.send(b"x")
    assert thread.result() == [(key, selectors.EVENT_READ)]


DAEMON = """
import socket, threading, time, muxio
pairs = [socket.socketpair() for _ in range(50)]
poller = muxio.Poller("afd")
for ours, _ in pairs:
    poller.register(ours, muxio.READ)
threading.Thread(target=poller.poll, daemon=True).start()
while "waiting" not in repr(poller):
    time.sleep(0.001)
print("the end")
"""


def test_a_process_ends_while_a_daemon_thread_waits() -> None:
    done = subprocess.run([sys.executable, "-c", DAEMON], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("the end\n", "")


# Base handles


class Layers:
    """A socket 1 with layered providers over it, which are numbers 2 and 3. knows: the codes that these answer."""

    def __init__(self, *knows: int) -> None:
        self.knows = knows

    def __call__(self, handle: int, code: int) -> int:
        if handle not in (1, 2, 3):
            raise ctypes.WinError(NO_SOCKET)
        if handle == 1 and code == afd._SIO_BASE_HANDLE:
            return 1
        if code not in self.knows:
            raise ctypes.WinError(NOT_SUPPORTED)
        return 1 if code == afd._SIO_BASE_HANDLE else max(handle - 1, 1)


@pytest.mark.parametrize("code", [afd._SIO_BASE_HANDLE, afd._SIO_BSP_HANDLE_POLL, afd._SIO_BSP_HANDLE_SELECT])
def test_the_base_of_a_layered_socket_is_found(code: int) -> None:
    assert afd._lowest(3, Layers(code)) == 1


@pytest.mark.parametrize(("handle", "number"), [(3, NOT_SUPPORTED), (4, NO_SOCKET)])
def test_a_base_that_cannot_be_found_is_an_error(handle: int, number: int) -> None:
    with pytest.raises(OSError) as caught:
        afd._lowest(handle, Layers())
    assert caught.value.winerror == number


def test_errors_have_windows_numbers(poller: muxio.Poller[Any]) -> None:
    with pytest.raises(OSError) as caught:
        poller.register(3, READ)
    assert caught.value.winerror == NO_SOCKET


# Servers


@pytest.mark.parametrize("listen", [sockets.listen, threaded._listen])
def test_listeners_ask_for_their_ports_alone(listen: Callable[[Any, int], socket.socket], stack: ExitStack) -> None:
    listener = stack.enter_context(listen(("127.0.0.1", 0), 1))
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)
    assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


@pytest.mark.skipif(on_wine(), reason="Wine 8.0 lets SO_REUSEADDR have a port that SO_EXCLUSIVEADDRUSE protects")
def test_a_port_cannot_be_taken_from_a_listener(stack: ExitStack) -> None:
    listener = stack.enter_context(sockets.listen(("127.0.0.1", 0), 1))
    thief = stack.enter_context(socket.socket())
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with pytest.raises(PermissionError):  # WSAEACCES
        thief.bind(listener.getsockname())


# asyncio


def test_asyncio_has_thousands_of_connections_on_one_loop() -> None:
    """Two sockets each. CPython's selector there takes 512 sockets, and its other loop has no add_reader."""

    async def talk(loop: asyncio.AbstractEventLoop) -> None:
        readable: asyncio.Queue[socket.socket] = asyncio.Queue()
        clients: list[socket.socket] = []
        handlers: set[asyncio.Task[None] | None] = set()

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handlers.add(asyncio.current_task())
            while data := await reader.read(100):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        for _ in range(CONNECTIONS):
            sock = socket.socket()
            sock.setblocking(False)
            clients.append(sock)
            await loop.sock_connect(sock, server.sockets[0].getsockname())
        for number, sock in enumerate(clients):  # now that all stand
            await loop.sock_sendall(sock, b"%d" % number)
            loop.add_reader(sock, readable.put_nowait, sock)
        said: dict[socket.socket, bytes] = {}
        while len(said) < CONNECTIONS:
            sock = await readable.get()
            if sock not in said:  # it may stand in the queue more than once
                said[sock] = sock.recv(100)
                loop.remove_reader(sock)
        assert [said[sock] for sock in clients] == [b"%d" % number for number in range(CONNECTIONS)]
        for sock in clients:
            sock.close()
        assert len(handlers) == CONNECTIONS
        await asyncio.gather(*(task for task in handlers if task))
        server.close()

    loop = asyncio.SelectorEventLoop(muxio.Selector("afd"))
    try:
        loop.run_until_complete(asyncio.wait_for(talk(loop), 100))
    finally:
        loop.close()
