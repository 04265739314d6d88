"""The command line: ``python -m muxio serve``, ``info`` and ``bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import muxio
from muxio.backends import NAMES

DEFAULT_ADDRESS = "127.0.0.1:8007"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for bad input (told in one line on stderr); `bench` has more."""
    options = _parser().parse_args(arguments)
    command = {"serve": _serve, "info": _info, "bench": _bench}[options.command]
    return command(options)


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muxio", description="Readiness I/O: one poller, and an echo server that proves it.")
    parser.add_argument("--version", action="version", version=f"muxio {muxio.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="run the echo server",
        description="Run the echo server until Ctrl-C or SIGTERM. A first one lets clients take what is queued for "
        "them, up to 5 seconds; a second one stops at once.",
        epilog="examples:  muxio serve            muxio serve :8007 --backend poll            muxio serve [::1]:0",
    )
    serve.add_argument(
        "address",
        nargs="?",
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        type=_address,
        help=f"where to listen (default: {DEFAULT_ADDRESS}); no host means every interface, port 0 any free port",
    )
    how = serve.add_mutually_exclusive_group()
    how.add_argument("--backend", metavar="NAME", help=f"the facility to wait with: {', '.join(NAMES)}")
    how.add_argument("--threads", action="store_true", help="a thread per connection instead of an event loop")
    serve.add_argument("-q", "--quiet", action="store_true", help="no line for each connection")
    commands.add_parser("info", help="tell what works here", description="Tell what works here, and the limits.")
    bench = commands.add_parser("bench", help="measure", description="Measure muxio beside its peers, in turn.")
    benches = bench.add_subparsers(dest="bench", metavar="WHAT", required=True)
    poller = benches.add_parser(
        "poller",
        help="the poller, beside selectors and the bare facilities",
        description="Measure polls, changes of registrations, the import and the lateness of timeouts, of muxio, "
        "selectors and the bare facilities; half a minute on an idle machine. Ctrl-C shows what is there by then.",
        epilog="exit status: 0, 1 if a contestant failed, 2 for bad input, 130 after Ctrl-C",
    )
    length = poller.add_mutually_exclusive_group()
    length.add_argument("--runs", metavar="N", type=_runs, default=15, help="rounds, 7 or more (default: 15)")
    length.add_argument("--quick", action="store_true", help="a look: three short rounds, nothing is judged")
    poller.add_argument("--backend", metavar="NAME", help=f"muxio on this one only: {', '.join(NAMES)}")
    poller.add_argument("--json", metavar="FILE", help="write JSON instead of tables, to a file or - (needs no rich)")
    return parser


def _runs(text: str) -> int:
    from muxio.bench.measure import FEWEST_ROUNDS

    if not text.isdecimal() or int(text) < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {FEWEST_ROUNDS} on")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` or ``PORT``."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address goes in brackets, as in [::1]:8007")
    if not (port.isascii() and port.isdigit() and int(port) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in a port from 0 to 65535")
    return host, int(port)


def _serve(options: argparse.Namespace) -> int:
    from muxio.server.report import format_address
    from muxio.server.serve import serve

    try:
        serve(options.address, backend=options.backend, threads=options.threads, quiet=options.quiet)
    except ValueError as error:  # no such backend, or not here
        return _complain("serve", str(error))
    except OSError as error:
        return _complain("serve", f"cannot serve at {format_address(options.address)}: {error.strerror or error}")
    return 0


def _complain(command: str, message: str) -> int:
    print(f"muxio {command}: {message}", file=sys.stderr)
    return 2


def _info(options: argparse.Namespace) -> int:
    from muxio.info import describe_system

    print("\n".join(describe_system()))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from muxio.bench import poller
    from muxio.bench.report import conduct

    try:
        results, scenarios = poller.bench(options.runs, options.quick, options.backend)
    except (ValueError, OSError) as error:  # no such backend, or not here
        return _complain("bench", str(error))
    return conduct(results, scenarios, options.json)
