"""Each example does what it says."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


def test_watch_three_reads_each_to_its_end() -> None:
    lines = run("watch_three")
    for name in ("alice", "bob", "pipe") if sys.platform != "win32" else ("alice", "bob"):
        mine = [line for line in lines if line.startswith(name)]
        assert mine[0].endswith(f"b'hello from {'the ' if name == 'pipe' else ''}{name}'")
        assert mine[-1].endswith("b''")
    assert lines[-1].startswith("all have ended")


def test_asyncio_add_reader_hears_all() -> None:
    assert run("asyncio_add_reader") == ["100 connections were answered"]


def test_two_styles_cannot_be_told_apart() -> None:
    threads, events, verdict = run("two_styles")
    assert threads == "threads:     I am client 0 ... I am client 9"
    assert events == "event loop:  I am client 0 ... I am client 9"
    assert verdict == "the same"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows' facilities watch sockets only, no pipes")
def test_guest_poller_hears_of_all_three() -> None:
    assert sorted(run("guest_poller")) == [
        "child:  hello from the child",
        "socket: hello from the socket",
        "thread: the sum is 499,999,500,000",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a single process on Windows")
def test_own_protocol_answers_in_capitals() -> None:
    command = [sys.executable, "-u", "-W", "error", str(EXAMPLES / "own_protocol.py"), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline().split()[2].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as stream:
                assert stream.read() == b"HELLO"
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0


def test_cpu_bound_tells_the_latencies_of_three_ways() -> None:
    title, *ways = run("cpu_bound", "0.5")
    assert "light clients" in title
    for line, name in zip(ways, ("in the loop", "on threads", "on processes"), strict=True):
        found = re.fullmatch(rf"{name} +median +([\d.]+)   99 % +([\d.]+)   most +([\d.]+)   \(([\d,]+)\)", line)
        assert found, line
        assert 0 < float(found[1]) <= float(found[2]) <= float(found[3])
