"""CPython's own tests of selectors and of asyncio, run over `muxio.Selector`.

They come with the interpreter, in its package ``test``; where that was left out, they are skipped. Each module runs in
a process of its own, this very file as the program, with `selectors.DefaultSelector` and its like replaced: so all that
is made in there, event loops and subprocess pipes too, runs on ours.

Whatever does not pass is run again with CPython's own selector of the same kind. What fails there too is this
machine's doing or CPython's. The counts and these names are printed; ``-rP`` shows them.

asyncio's tests take half a minute a backend, so they run on the best backend only, unless asked for all of them::

    pytest tests/test_cpython_suite.py -m ""
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import BACKENDS

import muxio

ASYNCIO = [
    *("events", "streams", "sock_lowlevel", "sendfile", "server"),
    pytest.param(
        "subprocess",
        marks=pytest.mark.skipif(sys.platform == "win32", reason="there a loop with a selector runs no subprocesses"),
    ),
    "unix_events",
]

TIMEOUT = 110.0  # seconds for one module, which takes 20 at most where nothing hangs

KINDS = ("Default", "Select", "Poll", "Epoll", "Kqueue")

#: Whose tests stand for a backend of which CPython has no selector.
NAMESAKES = {"afd": "select"}


class Outcome(NamedTuple):
    """What a module's tests came to: how many ran, and the full names of those that did not pass, with the reason."""

    run: int
    failures: dict[str, str]
    errors: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{self.run} run, {len(self.failures)} failures, {len(self.errors)} errors, {len(self.skipped)} skipped"


@pytest.mark.parametrize("backend", BACKENDS)
def test_selectors(backend: str, tmp_path: Path) -> None:
    check("test.test_selectors", backend, tmp_path)


@pytest.mark.parametrize("module", ASYNCIO)
@pytest.mark.parametrize(
    "backend", [BACKENDS[0], *(pytest.param(name, marks=pytest.mark.every_backend) for name in BACKENDS[1:])]
)
def test_asyncio(backend: str, module: str, tmp_path: Path) -> None:
    check(f"test.test_asyncio.test_{module}", backend, tmp_path)


def check(module: str, backend: str, tmp_path: Path) -> None:
    ours = run(module, backend, "muxio", [], tmp_path)
    print(f"{module} on {backend}: {ours}")
    assert ours.run > len(ours.skipped)
    wrong = ours.failures | ours.errors
    if not wrong and not ours.skipped:
        return
    own = run(module, backend, "CPython", [*wrong, *ours.skipped], tmp_path)
    also_wrong = own.failures | own.errors
    for name in ours.skipped.keys() - own.skipped.keys():
        print(f"skipped on muxio's selector only: {name}: {ours.skipped[name]}")
    for name in wrong.keys() & also_wrong.keys():
        print(f"fails on CPython's selector too: {name}\n{also_wrong[name]}")
    remaining = wrong.keys() - also_wrong.keys()
    assert not remaining, "fails on muxio's selector only:\n" + "\n".join(f"{n}\n{wrong[n]}" for n in sorted(remaining))


def run(module: str, backend: str, whose: str, names: list[str], tmp_path: Path) -> Outcome:
    """Run a module's tests, or those with the full names given, in a process; on muxio's or CPython's selector."""
    report = tmp_path / f"{whose}.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(Path(muxio.__file__).parents[1])
    process = subprocess.run(
        [sys.executable, __file__, module, backend, whose, str(report), *names],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=tmp_path,
        env=environment,
        timeout=TIMEOUT,
    )
    assert report.exists(), process.stdout
    found = json.loads(report.read_text(encoding="utf-8"))
    if isinstance(found, str):
        pytest.skip(found)
    return Outcome(*found)


# From here on: in the process.


def drive(module: str, backend: str, whose: str, names: list[str]) -> Outcome | str:
    """Run the tests; without any, say why."""
    if whose == "muxio":

        class OnBackend(muxio.Selector):
            def __init__(self) -> None:
                super().__init__(backend)

        for kind in KINDS:
            if hasattr(selectors, f"{kind}Selector"):
                setattr(selectors, f"{kind}Selector", OnBackend)
    else:
        selectors.DefaultSelector = getattr(  # type: ignore[misc]
            selectors, f"{backend.capitalize()}Selector", selectors.DefaultSelector
        )
    if sys.platform == "win32":  # where the default loop has no selector
        import asyncio

        asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    try:
        loaded = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    except (ModuleNotFoundError, unittest.SkipTest) as error:
        return f"{module}: {error}"
    wanted = [test for test in flat(loaded) if (test.id() in names if names else is_about(test, backend))]
    result = Result()
    unittest.TestSuite(wanted).run(result)
    return Outcome(
        result.testsRun,
        {name_of(test): trace for test, trace in result.failures},
        {name_of(test): trace for test, trace in result.errors},
        {name_of(test): reason for test, reason in result.skipped},
    )


class Result(unittest.TestResult):
    """Names each test as it starts, so that the output tells which one hung."""

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        print(test.id(), flush=True)


def flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


def is_about(test: unittest.TestCase, backend: str) -> bool:
    """Some classes are the same tests for one kind of selector each: EPollEventLoopTests, PollSelectorTestCase.

    With all kinds replaced by the same one, the namesake of the backend is enough. Proactors have no selector.
    """
    name = type(test).__name__.lower()
    kind = name.removesuffix("selectortestcase").removesuffix("eventlooptests")
    return kind in (name, NAMESAKES.get(backend, backend)) and not kind.startswith("proactor")


def name_of(test: unittest.TestCase) -> str:
    return getattr(test, "test_case", test).id()  # of a subtest, the test


if __name__ == "__main__":
    _, module, backend, whose, report, *names = sys.argv
    outcome = drive(module, backend, whose, names)
    Path(report).write_text(json.dumps(outcome), encoding="utf-8")
