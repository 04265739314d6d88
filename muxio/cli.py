"""The command line: ``python -m muxio serve`` and ``python -m muxio info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import muxio
from muxio.backends import NAMES

DEFAULT_ADDRESS = "127.0.0.1:8007"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 2 for bad input (which is told in one line on stderr)."""
    options = _parser().parse_args(arguments)
    command = {"serve": _serve, "info": _info}[options.command]
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
    return parser


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
        return _complain(str(error))
    except OSError as error:
        return _complain(f"cannot serve at {format_address(options.address)}: {error.strerror or error}")
    return 0


def _complain(message: str) -> int:
    print(f"muxio serve: {message}", file=sys.stderr)
    return 2


def _info(options: argparse.Namespace) -> int:
    from muxio.info import describe_system

    print("\n".join(describe_system()))
    return 0
