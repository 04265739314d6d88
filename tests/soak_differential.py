"""Run thousands of made-up clients through made-up faults, and compare what they see with the oracle.

    python tests/soak_differential.py                               # 2,000 scripts for every backend here
    python tests/soak_differential.py --backend poll --scripts 50000

Each script runs against the thread-per-connection oracle directly, and against the event-driven server through a
`FaultProxy` with a plan of its own; differential.py says what must hold. A third of the plans are lossy. At each line
everything is quiet, and the server must have told of every connection once and hold no descriptor of it.

Ends with 0 if all that holds; else with 1, the script and the plan as Python, and the command that runs them again (the
threads' timing it cannot repeat: more than one run may be needed). Ctrl-C ends it with 130.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # a clone, if muxio is not installed

from differential import ANY_PORT, Case, run, run_all, server_under_test
from helpers import open_descriptors, serving, wait_until

import muxio
from muxio.server import ThreadedServer

BATCH = 200  #: scripts from one quiet moment to the next


class Soak:
    """One backend's run: a server, the oracle, and cases by their numbers."""

    def __init__(self, backend: str, seed: str, at_once: int) -> None:
        self.backend = backend
        self.seed = seed
        self.at_once = at_once
        self.failures = self.done = self.lossy = self.cut_short = self.received = 0

    def run(self, first: int, scripts: int) -> None:
        """Run so many scripts, and print a line for each batch; stop behind one with a failure."""
        before = open_descriptors(), threading.active_count()
        quiet: int | None = None
        began = time.monotonic()
        with serving(ThreadedServer(ANY_PORT)) as oracle, server_under_test(self.backend) as (subject, ledger):
            while self.done < scripts and not self.failures:
                numbers = range(first + self.done, first + min(self.done + BATCH, scripts))
                self.batch(numbers, oracle, subject)
                if imbalance := ledger.settle():
                    self.fail(f"the server's books are not even:\n{imbalance}", numbers)
                    self.narrow_down(numbers, oracle)
                if quiet is None:
                    quiet = open_descriptors()
                elif (left := settled(quiet)) > quiet:
                    self.fail(f"{left} descriptors at a quiet moment, {quiet} at the first one", numbers)
                print(
                    f"{self.backend:6} {time.monotonic() - began:6.1f} s  {self.done:,} of {scripts:,} scripts, "
                    f"{self.lossy:,} lossy, {self.cut_short:,} cut short, {self.received / 2**20:,.0f} MiB received, "
                    f"{self.failures} failed",
                    flush=True,
                )
        if not self.failures and (imbalance := ledger.imbalance()):
            self.fail(f"the server's books are not even after its end:\n{imbalance}", range(first, first + scripts))
        if (left := settled(before[0])) > before[0] or threading.active_count() > before[1]:
            left_behind = f"{left} descriptors and {threading.active_count()} threads, of {before} before"
            self.fail(f"what is left: {left_behind}", range(first, first + scripts))

    def batch(self, numbers: range, oracle: Any, subject: Any) -> None:
        cases = [Case.random(self.seed, number) for number in numbers]
        for number, outcome in zip(numbers, run_all(cases, oracle, subject, self.at_once), strict=True):
            self.done += 1
            self.received += outcome.received
            self.lossy += not outcome.case.plan.lossless
            self.cut_short += outcome.cut_short
            if outcome.trouble is not None:
                self.fail(outcome.trouble, range(number, number + 1))

    def narrow_down(self, numbers: range, oracle: Any) -> None:
        """Look for one script after which a fresh server's books are not even."""
        for number in numbers:
            case = Case.random(self.seed, number)
            with server_under_test(self.backend) as (subject, ledger):
                run(case, oracle, subject)
                imbalance = ledger.settle()
            if imbalance:
                self.fail(f"the books of one script alone:\n{imbalance}\n{case}", range(number, number + 1))
                return
        print("no script alone does that")

    def fail(self, what: str, numbers: range) -> None:
        self.failures += 1
        print(
            f"FAILED: {what}\nagain: python {sys.argv[0]} --backend {self.backend} --seed {self.seed} "
            f"--first {numbers[0]} --scripts {len(numbers)}",
            flush=True,
        )


def settled(descriptors_before: int) -> int:
    """How many descriptors are open when those that are just being closed are closed."""
    try:
        wait_until(lambda: open_descriptors() <= descriptors_before)
    except AssertionError:
        pass
    return open_descriptors()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=muxio.backends(), help="of the server; by default each in turn")
    parser.add_argument("--scripts", type=int, default=2000, help="how many for each backend; 2000 by default")
    parser.add_argument("--at-once", type=int, default=8, help="how many clients at a time; 8 by default")
    parser.add_argument("--seed", default=str(random.randrange(10**9)), help="of scripts and plans; a new one each run")
    parser.add_argument("--first", type=int, default=0, help="the number of the first script; 0 by default")
    options = parser.parse_args()
    if options.scripts < 1 or options.at_once < 1:
        parser.error("--scripts, --at-once: at least 1")
    backends = [options.backend] if options.backend else muxio.backends()
    print(f"seed {options.seed}, {options.scripts:,} scripts on each of {', '.join(backends)}", flush=True)
    began = time.monotonic()
    failures = 0
    try:
        for backend in backends:
            soak = Soak(backend, options.seed, options.at_once)
            soak.run(options.first, options.scripts)
            failures += soak.failures
    except KeyboardInterrupt:
        return 130
    if failures:
        return 1
    print(f"no client saw a difference, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
