"""Prove that the tests of the poller, and of offloading, can fail: python tests/mutate.py

One mutation of mutations.py at a time is made in a copy of muxio, and the tests that should notice are run on it. A
mutation is caught if one of them fails, or if they hang. Those that are missed show what the tests do not test.

    python tests/mutate.py                             all of them, two at a time; some minutes
    python tests/mutate.py --list                      what they are
    python tests/mutate.py --only a-hang-up-comes-alone nan-is-a-timeout
    python tests/mutate.py --python .venv/bin/python   the tests run on another interpreter, which needs pytest

Progress goes to stderr, the result to stdout. Exit status: 0 if all were caught, 1 if one was missed, 2 if it could not
be found out (bad input, a mutation whose text is not in its file once, tests that fail without any mutation), 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent

#: What a copy consists of.
COPIED = ("muxio", "tests", "pyproject.toml")

#: Seconds until tests hang. The conformance tests notice that themselves after 30, and can say which one does.
TIMEOUT = 90.0

#: What pytest ends with: all passed, some failed. (Anything else: it could not run them.)
PASSED, FAILED = 0, 1

#: The classes of tests/test_conformance.py that test a backend. Without a kqueue, there are two doubles of one.
CLASSES = {"epoll": ["TestEpoll"], "kqueue": ["TestKqueue"], "poll": ["TestPoll"], "select": ["TestSelect"]}
if sys.platform == "linux":
    CLASSES["kqueue"] = ["TestKqueueOfFreebsd", "TestKqueueOfDarwin"]


class Trouble(Exception):
    """Why it could not be found out whether the tests notice."""


def mutate(text: str, mutation: Mutation) -> str:
    """A file's text with the mutation. Trouble if that does not fit exactly once."""
    found = text.count(mutation.old)
    if found != 1:
        raise Trouble(f"{mutation.name}: its old text is in muxio/{mutation.file} {found} times, not once")
    return text.replace(mutation.old, mutation.new)


def arguments(mutation: Mutation) -> list[str]:
    """Which tests are to notice a mutation, as pytest's arguments: the most likely ones first."""
    if mutation.tests:
        return list(mutation.tests)
    classes = [f"tests/test_conformance.py::{name}" for name in CLASSES[mutation.on]]
    return [f"{name}::{mutation.likely}" for name in classes if mutation.likely] + classes


# Running tests


class Run:
    """pytest in a copy, in the background."""

    def __init__(self, python: str, copy: Path, tests: Iterable[str]) -> None:
        self.began = time.monotonic()
        self._log = copy / "log"
        # Duplicates, since else a test that stands before its class would not be run before the others of that.
        command = [python, "-m", "pytest", "-x", "--tb=short", "-p", "no:cacheprovider", "--keep-duplicates", *tests]
        environment = {name: value for name, value in os.environ.items() if name != "MUXIO_BACKEND"}
        environment["PYTHONPATH"] = str(copy)  # before any muxio that is installed
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=copy, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def is_over(self) -> bool:
        return self._process.poll() is not None or self.seconds() > TIMEOUT

    def end(self) -> int | None:
        """Returns pytest's exit status, None if it had to be stopped; so are the processes that the tests started."""
        status = self._process.poll()
        if status is None:
            if sys.platform == "win32":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return status

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def first_failure(self) -> str:
        """The test that failed, by its class and name."""
        for line in self.said().splitlines():
            if line.startswith(("FAILED ", "ERROR ")):
                return (
                    line.split(" ", 1)[1].split(" - ")[0].removeprefix("tests/").removeprefix("test_conformance.py::")
                )
        return "the end of the run"


@dataclass
class Outcome:
    mutation: Mutation
    caught_by: str | None  #: a test, or "hang"
    seconds: float


def outcome(mutation: Mutation, run: Run) -> Outcome:
    """What came of a run that is over."""
    seconds, status = run.seconds(), run.end()
    if status == PASSED:
        return Outcome(mutation, None, seconds)
    if status is None:
        return Outcome(mutation, "hang", seconds)
    if status < 0 or status == FAILED:
        return Outcome(mutation, run.first_failure() if status > 0 else f"crash (signal {-status})", seconds)
    raise Trouble(f"{mutation.name}: the tests could not be run\n{run.said()}")


def copied(source: Path, folder: Path) -> Path:
    """A copy of what the tests need. Bytecode is copied too, for modification times stay."""
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        else:
            shutil.copy2(source / name, folder / name)
    return folder


def mutated(mutation: Mutation, original: Path, folder: Path) -> Path:
    """A copy with the mutation."""
    folder.mkdir()
    path = copied(original, folder) / "muxio" / mutation.file
    path.write_text(mutate(path.read_text(encoding="utf-8"), mutation), encoding="utf-8")
    for bytecode in path.parent.glob(f"__pycache__/{path.stem}.*"):
        bytecode.unlink()  # it would be taken for the file's if size and second are the same
    return folder


def run_all(mutations: Sequence[Mutation], jobs: int, python: str, folder: Path) -> list[Outcome]:
    """Run the tests without a mutation, then with each; tells on the way what came of it."""
    original = folder / "original"
    original.mkdir()
    copied(ROOT, original)
    for mutation in mutations:
        mutate((original / "muxio" / mutation.file).read_text(encoding="utf-8"), mutation)
    check_unmutated(mutations, original, python)
    outcomes: list[Outcome] = []
    waiting = list(reversed(mutations))
    running: list[tuple[Mutation, Run, Path]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutation = waiting.pop()
                copy = mutated(mutation, original, folder / mutation.name)
                running.append((mutation, Run(python, copy, arguments(mutation)), copy))
            over = [job for job in running if job[1].is_over()]
            for job in over:
                running.remove(job)
                mutation, run, copy = job
                outcomes.append(outcome(mutation, run))
                shutil.rmtree(copy)
                tell(f"{len(outcomes):3}/{len(mutations)} {line(outcomes[-1])}  {outcomes[-1].seconds:.1f} s")
            if not over:
                time.sleep(0.02)
    finally:
        for _, run, _ in running:
            run.end()
    return sorted(outcomes, key=lambda one: mutations.index(one.mutation))


def check_unmutated(mutations: Sequence[Mutation], original: Path, python: str) -> None:
    """The same tests have to pass. Besides, this fills the copy with bytecode."""
    tests = list(dict.fromkeys(test for mutation in mutations for test in arguments(mutation)))
    tell("without a mutation: ...")
    run = Run(python, original, tests)
    try:
        while not run.is_over():
            time.sleep(0.02)
    finally:
        status = run.end()
    if status != PASSED:
        hang = "" if status is not None else f"they had not ended after {TIMEOUT:g} s\n"
        raise Trouble(f"the tests do not pass without any mutation\n{hang}{run.said()}")
    tell(f"without a mutation: passed  {run.seconds():.1f} s")


# The command


def tell(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def line(outcome: Outcome) -> str:
    verdict = "MISSED" if outcome.caught_by is None else "caught"
    return f"{verdict}  {outcome.mutation.name:{WIDTH}}  {outcome.caught_by or outcome.mutation.promise}"


WIDTH = max(len(mutation.name) for mutation in MUTATIONS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    title, _, text = __doc__.partition("\n\n")
    parser = _Parser(description=title, epilog=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="tell what the mutations are, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations")
    parser.add_argument("--jobs", type=_count, default=2, metavar="N", help="how many at a time (default: 2)")
    parser.add_argument("--python", default=sys.executable, metavar="EXE", help="the interpreter (default: this one)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def chosen(names: Sequence[str] | None) -> list[Mutation]:
    """The mutations of these names. Trouble if there is none of a name."""
    known = {mutation.name: mutation for mutation in MUTATIONS}
    for name in names or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise Trouble(f"no mutation is called {name!r}" + (f"; {close[0]!r} is" if close else ", see --list"))
    return [mutation for mutation in MUTATIONS if not names or mutation.name in names]


def possible(mutations: Sequence[Mutation]) -> list[Mutation]:
    """Those that show on a backend of this system; tells of the others."""
    here = [name for name in CLASSES if hasattr(select, name) or (name == "kqueue" and sys.platform == "linux")]
    for mutation in mutations:
        if mutation.on not in here:
            tell(f"left out: {mutation.name} shows on {mutation.on} only")
    return [mutation for mutation in mutations if mutation.on in here]


def main(given: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(given)
    try:
        mutations = chosen(options.only)
        if options.list:
            for mutation in mutations:
                print(f"{mutation.name:{WIDTH}}  {mutation.file:19}  {mutation.promise}")
            return 0
        if shutil.which(options.python) is None:
            raise Trouble(f"no interpreter is called {options.python!r}")
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            outcomes = run_all(possible(mutations), options.jobs, options.python, Path(folder))
    except Trouble as trouble:
        print(f"mutate.py: {trouble}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(map(line, outcomes)))
    missed = sum(outcome.caught_by is None for outcome in outcomes)
    print(f"{len(outcomes) - missed} of {len(outcomes)} caught, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
