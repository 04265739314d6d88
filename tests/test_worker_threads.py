"""Workers on every system: threads, and what is refused to processes."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from churn import SIZE, churning
from helpers import wait_until
from programs import STOP, TIMEOUT, connect, serving

from muxio.server import Protocol, serve

TWO = ("--workers", "2", "--quiet")


def test_a_worker_that_cannot_start_at_all_ends_the_program(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import muxio.server

            class Broken:
                def __init__(self): pass
                def __reduce__(self): return (int, ("no number",))

            if __name__ == "__main__":
                try:
                    muxio.server.serve(("127.0.0.1", 0), Broken(), workers=2)
                except ChildProcessError as error:
                    print(error)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    assert re.search(r"^worker \d \(pid \d+\) ended with status 1 before it served$", done.stdout, re.MULTILINE)
    assert "no number" in done.stderr


def test_what_cannot_be_handed_to_a_process_is_refused() -> None:
    with pytest.raises(TypeError, match="importable"):
        serve(("127.0.0.1", 0), lambda: Protocol(), workers=1, say=lambda line: None)


def test_worker_threads_serve_drain_and_tell() -> None:
    with serving(*TWO, "--worker-threads") as served, connect(served.address) as client:
        assert served.means.endswith("2 threads")
        with churning(served.address, 20) as churn:
            wait_until(lambda: churn.served >= 500, TIMEOUT)
        assert churn.failures == []
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        lines = served.stop(STOP, [client])
        assert lines[-1].startswith(f"{churn.served + 1:,} connections, {SIZE * churn.served + 1:,} B in")
        assert lines[-1].endswith("1 drained, 0 cut")


def test_an_error_of_one_worker_thread_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from muxio.server.server import Server

    failing = iter([True])
    original = Server.serve_forever

    def serve_forever(self: Server) -> None:
        if next(failing, False):
            raise OSError("broken")
        original(self)

    monkeypatch.setattr(Server, "serve_forever", serve_forever)
    with pytest.raises(OSError, match="broken"):
        serve(("127.0.0.1", 0), Protocol, workers=2, worker_threads=True, say=lambda line: None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "1 or more"),
        ({"worker_threads": True}, "number of workers"),
        ({"threads": True, "workers": 2}, "threads serve"),
        ({"threads": True, "live": True}, "threads serve"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        serve(("127.0.0.1", 0), **options)
