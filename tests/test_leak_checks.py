"""The checks of conftest.py: each is seen to fail a test that leaks, and that test alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
SHORT = "\nSETTLE_SECONDS = 0.2\n"


@pytest.fixture
def under_checks(pytester: pytest.Pytester) -> pytest.Pytester:
    """A directory for tests that run under the same checks, less their patience."""
    pytester.makeconftest((HERE / "conftest.py").read_text(encoding="utf-8") + SHORT)
    pytester.makepyfile(helpers=(HERE / "helpers.py").read_text(encoding="utf-8"))
    return pytester


def run(pytester: pytest.Pytester) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:cacheprovider")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no list of descriptors")
def test_leaked_descriptors_fail_the_tests_that_leaked_them(under_checks: pytest.Pytester) -> None:
    under_checks.makepyfile(
        """
        import os, selectors, socket

        KEPT = []
        SPARE = os.pipe()[0]

        def test_before(): pass
        def test_file(): os.open(os.devnull, os.O_RDONLY)
        def test_pipe(): os.pipe()
        def test_socket(): KEPT.append(socket.socket())
        def test_facility(): KEPT.append(selectors.DefaultSelector())
        def test_number_used_again():
            fd = os.open(os.devnull, os.O_RDONLY)
            os.dup2(fd, SPARE)
            os.close(fd)
        def test_after(): pass
        """
    )
    result = run(under_checks)
    result.assert_outcomes(passed=7, errors=5)
    for name in ("file", "pipe", "socket", "facility", "number_used_again"):
        result.stdout.fnmatch_lines([f"*ERROR at teardown of test_{name} *", "the test left behind:", "  descriptor *"])
    if sys.platform == "linux":  # the only one that tells what a descriptor is open on
        result.stdout.fnmatch_lines(["  descriptor *: /dev/null", "  descriptor *: pipe:*", "  descriptor *: socket:*"])


def test_leaked_thread_fails_the_test_that_leaked_it(under_checks: pytest.Pytester) -> None:
    under_checks.makepyfile(
        """
        import threading

        def test_before(): pass
        def test_leak(): threading.Thread(target=threading.Event().wait, name="left-over", daemon=True).start()
        def test_after(): pass
        """
    )
    result = run(under_checks)
    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_leak *", "the test left behind:", "  <Thread(left-over, started daemon*"]
    )


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="children are checked where os.waitid exists")
def test_leaked_child_processes_fail_the_tests_that_leaked_them(under_checks: pytest.Pytester) -> None:
    under_checks.makepyfile(
        """
        import os, subprocess, sys

        CHILDREN = []
        READ, WRITE = os.pipe()

        def start():
            CHILDREN.append(subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=READ))

        def teardown_module():
            os.close(WRITE)
            for child in CHILDREN:
                child.wait()

        def test_before(): pass
        def test_running(): start()
        def test_ended():
            start()
            CHILDREN[1].kill()
            os.waitid(os.P_PID, CHILDREN[1].pid, os.WEXITED | os.WNOWAIT)
        def test_after(): pass
        """
    )
    result = run(under_checks)
    result.assert_outcomes(passed=4, errors=2)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_running *", "the test left behind:", "  process *sys.stdin.read()"]
    )
    result.stdout.fnmatch_lines(["*ERROR at teardown of test_ended *", "the test left behind:", "  process *"])


def test_what_ends_or_is_meant_to_stay_is_no_leak(under_checks: pytest.Pytester) -> None:
    under_checks.makepyfile(
        """
        import multiprocessing.resource_tracker, os, subprocess, sys, threading, time
        import pytest

        class Ends:
            def __init__(self):
                self.me = self  # a cycle: only the collector closes it
                self.ends = os.pipe()

            def __del__(self):
                for fd in self.ends:
                    os.close(fd)

        @pytest.fixture(scope="module")
        def shared():
            yield Ends()

        @pytest.fixture
        def own():
            reader, writer = os.pipe()
            yield
            os.close(reader)
            os.close(writer)

        def test_module_fixture(shared): pass
        def test_fixture(own): pass
        def test_cycle(): Ends()
        def test_thread_that_is_just_ending(): threading.Thread(target=time.sleep, args=(0.05,)).start()
        def test_child_that_was_waited_for(): subprocess.run([sys.executable, "-c", ""], check=True)
        @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource tracker")
        def test_resource_tracker(): multiprocessing.resource_tracker.ensure_running()
        """
    )
    result = run(under_checks)
    skipped = int(sys.platform == "win32")
    result.assert_outcomes(passed=6 - skipped, skipped=skipped)


@pytest.mark.parametrize("backend", ["select", None])
def test_header_names_the_backend(
    under_checks: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    monkeypatch.delenv("MUXIO_BACKEND", raising=False)
    if backend:
        monkeypatch.setenv("MUXIO_BACKEND", backend)
    said = f"MUXIO_BACKEND={backend}" if backend else "MUXIO_BACKEND not set"
    run(under_checks).stdout.fnmatch_lines([f"muxio: * on *, {said}"])
