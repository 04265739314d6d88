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

sys.path.append(str(Path(__file__).parents[1]))  # a clone, if muxio is not installed

from differential import ANY_PORT, Case, run_all, server_under_test
from helpers import serving, wait_until
from soak import descriptors

import muxio
from muxio.server import ThreadedServer

BATCH = 200  #: scripts from one quiet moment to the next


def soak(backend: str, seed: str, first: int, scripts: int, at_once: int) -> int:
    """How many things went wrong; prints them, and a line for each batch."""
    before = descriptors(), threading.active_count()
    failures = done = lossy = cut_short = received = 0
    quiet: int | None = None
    began = time.monotonic()
    with serving(ThreadedServer(ANY_PORT)) as oracle, server_under_test(backend) as (subject, ledger):
        while done < scripts and not failures:
            numbers = range(first + done, first + min(done + BATCH, scripts))
            try:
                outcomes = run_all([Case.random(seed, number) for number in numbers], oracle, subject, ledger, at_once)
            except AssertionError as error:
                failures += 1
                print(f"FAILED: {error}\namong scripts {numbers[0]} to {numbers[-1]}; again, with all of them:")
                print(again(backend, seed, numbers[0], len(numbers)), flush=True)
                break
            for number, outcome in zip(numbers, outcomes, strict=True):
                received += outcome.received
                lossy += not outcome.case.plan.lossless
                cut_short += outcome.cut_short
                if outcome.trouble is not None:
                    failures += 1
                    print(f"FAILED: script {number}: {outcome.trouble}\n{again(backend, seed, number, 1)}", flush=True)
            done += len(numbers)
            if quiet is None:
                quiet = descriptors()
            elif (left := settled(quiet)) > quiet:
                failures += 1
                print(f"FAILED: {left} descriptors at a quiet moment, {quiet} at the first one")
            print(
                f"{backend:6} {time.monotonic() - began:6.1f} s  {done:,} of {scripts:,} scripts, {lossy:,} lossy, "
                f"{cut_short:,} cut short, {received / 2**20:,.0f} MiB received, {failures} failed",
                flush=True,
            )
    if imbalance := ledger.imbalance():
        failures += 1
        print(f"FAILED: after the server's end its books are not even:\n{imbalance}")
    if (left := settled(before[0])) > before[0] or threading.active_count() > before[1]:
        failures += 1
        print(f"FAILED: {left} descriptors and {threading.active_count()} threads are left, of {before} before")
    return failures


def settled(descriptors_before: int) -> int:
    """How many descriptors are open when those that are just being closed are closed."""
    try:
        wait_until(lambda: descriptors() <= descriptors_before)
    except AssertionError:
        pass
    return descriptors()


def again(backend: str, seed: str, first: int, scripts: int) -> str:
    return f"python {sys.argv[0]} --backend {backend} --seed {seed} --first {first} --scripts {scripts}"


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
            failures += soak(backend, options.seed, options.first, options.scripts, options.at_once)
    except KeyboardInterrupt:
        return 130
    if failures:
        return 1
    print(f"no client saw a difference, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
