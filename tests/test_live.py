"""What a server shows of itself: figures, the live view, statistics on demand, lines for machines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from churn import churning
from helpers import wait_until
from programs import TIMEOUT, echo, muxio_command, serving

if sys.platform == "win32":
    pytest.skip("Windows has no signals for one process, and no pty", allow_module_level=True)

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")

WAYS = {"alone": (), "workers": ("--workers", "2"), "worker threads": ("--workers", "2", "--worker-threads")}

every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# Lines

LINE = (
    r"{who}(\d+) connected, [\d,]+ accepts/s, ([\d,]+) echoes/s, [\d.]+ .?B/s in, [\d.]+ .?B/s out, "
    r"\d+ B buffered, lag [\d.]+ ms, (\d+) timed out, (\d+) errors"
)


def line_of(way: tuple[str, ...]) -> str:
    return LINE.format(who="2 workers, " if way else "")


@every_way
def test_live_is_a_line_a_second_without_a_terminal(way: tuple[str, ...]) -> None:
    with serving(*way, "--live") as served, churning(served.address, 5) as churn:
        served.wait_for(line_of(way), 2)
        assert churn.failures == []
        busiest = [re.fullmatch(line_of(way), line) for line in served.wait_for(line_of(way), 3)]
        assert max(int(found[2].replace(",", "")) for found in busiest if found) > 0
        churn.stopping = True
        wait_until(lambda: len(churn.poller) == 0, TIMEOUT)
        lines = served.stop()
        assert not any(line.startswith("127.0.0.1") for line in lines)  # --live is quiet


@every_way
def test_a_signal_tells_the_statistics_once(way: tuple[str, ...]) -> None:
    with serving(*way, "-q") as served:
        echo(served.address)
        told = line_of(way) + r"; rates since the start, \d+\.\d s"
        served.process.send_signal(signal.SIGUSR1)
        served.wait_for(told)
        served.process.send_signal(signal.SIGUSR1)
        served.wait_for(told, 2)
        lines = served.stop()
        assert sum(bool(re.fullmatch(told, line)) for line in lines) == 2


def test_the_statistics_know_of_workers_that_were_replaced() -> None:
    with talking_json("--workers", "1", "-q") as (process, event):
        host, port = event("listening")["address"].rsplit(":", 1)
        echo((host, int(port)), bytes(1000))
        process.send_signal(signal.SIGHUP)
        event("reloaded")
        for _ in range(20):  # the first worker has nobody left, and ends
            process.send_signal(signal.SIGUSR1)
            figures = event("statistics")
            assert round(figures["bytes_in"] * figures["seconds"]) == 1000
        process.send_signal(signal.SIGTERM)
        event("stopped")


# For machines


@contextmanager
def talking_json(*way: str) -> Iterator[tuple[Any, Callable[[str], dict[str, Any]]]]:
    """A server that talks JSON, and what waits for an event of its."""
    import subprocess

    command = muxio_command("serve", "127.0.0.1:0", "--log-format", "json", *way)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stdout = process.stdout

        def event(name: str) -> dict[str, Any]:
            for line in stdout:
                found: dict[str, Any] = json.loads(line)
                assert list(found)[:3] == ["time", "event", "message"]
                assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
                if found["event"] == name:
                    return found
            raise AssertionError(f"no {name} until the end")

        try:
            yield process, event
        finally:
            process.kill()


@every_way
def test_every_line_is_json(way: tuple[str, ...]) -> None:
    with talking_json(*way) as (process, event):
        listening = event("listening")
        host, port = listening["address"].rsplit(":", 1)
        echo((host, int(port)), b"hello")
        connection = event("connection")
        assert (connection["bytes_in"], connection["bytes_out"], connection["error"]) == (5, 5, None)
        assert connection.get("worker") in (("1", "2") if way else (None,))
        process.send_signal(signal.SIGUSR1)
        figures = event("statistics")
        assert (figures["connections"], len(figures["workers"])) == (0, 2 if way else 1)
        process.send_signal(signal.SIGTERM)
        stopped = event("stopped")
        assert (stopped["connections"], stopped["bytes_in"], stopped["cut"]) == (1, 5, 0)
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == ""


def test_what_is_logged_is_json_as_well() -> None:
    with talking_json("--workers", "1") as (process, event):
        event("listening")
        process.kill()
        found = json.loads(process.stderr.readline())
        assert (found["event"], found["level"], found["logger"]) == ("log", "warning", "muxio.server")
        assert "supervisor is gone" in found["message"]


# On a terminal


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self, *arguments: str, before: str = "") -> None:
        import pty
        import subprocess

        self.ours, theirs = pty.openpty()
        program = f"{before}\nimport sys\nfrom muxio.cli import main\nsys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140", "LINES": "40"}
        command = [sys.executable, "-W", "error", "-c", program, "serve", "127.0.0.1:0", "--live", *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self._written = b""

    def text(self) -> str:
        """All of it, without what moves and colours."""
        try:
            while data := os.read(self.ours, 65_536):
                self._written += data
        except OSError:  # nothing more for now; EIO at the end
            pass
        return re.sub(
            r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace")
        )  # it may end within a letter

    def wait_for(self, pattern: str) -> re.Match[str]:
        found = wait_until(lambda: re.search(pattern, self.text()), TIMEOUT, f"{pattern!r} on the terminal")
        assert found
        return found

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        wait_until(lambda: [self.text(), self.process.poll() is not None][1], TIMEOUT)
        return self.text()


@contextmanager
def terminal(*arguments: str, before: str = "") -> Iterator[Terminal]:
    shown = Terminal(*arguments, before=before)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()
        os.close(shown.ours)


@needs_rich
def test_a_terminal_shows_a_table_with_a_row_for_each_worker_and_one_for_all() -> None:
    with terminal("--workers", "2") as shown:
        address = shown.wait_for(r"listening on 127\.0\.0\.1:(\d+)")
        shown.wait_for(r"worker +┃ +pid ┃ state +┃ connections ┃ accepts/s ┃ echoes/s ┃")
        with churning(("127.0.0.1", int(address[1])), 5):
            shown.wait_for(r"│ all +│ +│ +│ +\d+ │ +[\d,]+ │ +[1-9][\d,]* │")
        for number in "12":
            shown.wait_for(rf"│ {number} +│ +\d+ │ serving │")
        text = shown.stop()
        assert shown.process.returncode == 0
        assert re.search(r"[\d,]+ connections, [\d,]+ B in, [\d,]+ B out", text)
        assert "timed out," not in text  # no lines beside it


@needs_rich
def test_what_happens_to_workers_stands_above_the_table() -> None:
    with terminal("--workers", "2") as shown:
        victim = shown.wait_for(r"workers: (\d+), \d+")[1]
        shown.wait_for("┃")
        os.kill(int(victim), signal.SIGKILL)
        shown.wait_for(rf"worker 1 \(pid {victim}\) was killed by SIGKILL")
        shown.wait_for(r"worker 1 \(pid \d+\) serves")
        assert shown.stop()


def test_without_rich_a_terminal_shows_lines_and_how_to_get_the_table() -> None:
    with terminal(before="import sys; sys.modules['rich'] = None; sys.modules['rich.live'] = None") as shown:
        shown.wait_for(r"python -m pip install 'muxio\[live\]'")
        shown.wait_for("0 connected, 0 accepts/s")
        shown.stop()
        assert shown.process.returncode == 0
