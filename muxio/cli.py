"""The command line: ``python -m muxio serve``, ``info`` and ``bench``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import muxio
from muxio.backends import NAMES
from muxio.cores import core_count
from muxio.quantities import count, or_none, seconds

DEFAULT_ADDRESS = "127.0.0.1:8007"

#: Exit statuses beside 0 and argparse's 2.
FAILED, CUT = 1, 3

#: More workers than this are a slip of the finger.
MOST_WORKERS = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 for bad input (one line on stderr); --help tells of others."""
    options = _parser().parse_args(arguments)
    command = {"serve": _serve, "info": _info, "bench": _bench}[options.command]
    return command(options)


_SERVE_EPILOG = """\
SECONDS as in 90, 1.5, 500ms, 5m or 24h, N as in 500 or 64k; 'none' means no
limit. Time-outs and limits are each worker's own.

examples:
  muxio serve
  muxio serve :8007 --backend poll
  muxio serve [::1]:0 --idle 5m
  muxio serve unix:/run/echo.sock --workers 2 --live

signals:
  SIGINT, SIGTERM  stop: clients get what was received from them, and have the
                   time --drain to leave; a second one cuts them at once
  SIGHUP           replace the workers one by one; nobody is refused or reset
                   (worker threads and a single server end, and cut everybody)
  SIGUSR1          tell the statistics once

exit status:
  0  all clients came to their end
  1  the workers did not start
  2  bad input
  3  some clients were cut, because the time to drain was over
"""


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are one line."""

    #: Adds the options that would cost an import, once this is the parser in question.
    complete: Callable[[_Parser], None] | None = None

    def parse_known_args(self, *arguments: Any, **others: Any) -> Any:
        complete, self.complete = self.complete, None
        if complete is not None:
            complete(self)
        return super().parse_known_args(*arguments, **others)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help explains)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="muxio", description="Readiness I/O: one poller, and an echo server that proves it.")
    parser.add_argument("--version", action="version", version=f"muxio {muxio.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="run the echo server",
        description="Run the echo server until Ctrl-C or SIGTERM.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        type=_address,
        help="where to listen: HOST:PORT, where no host means every interface and port 0 any free port; unix:PATH, or "
        "unix:@NAME for Linux's abstract names; or fd:N, a socket that was inherited under that number (default: the "
        f"socket that a service manager hands over, else {DEFAULT_ADDRESS})",
    )
    how = serve.add_mutually_exclusive_group()
    how.add_argument("--backend", metavar="NAME", help=f"the facility to wait with: {', '.join(NAMES)}")
    how.add_argument("--threads", action="store_true", help="a thread per connection instead of an event loop")
    serve.complete = _add_limits
    serve.add_argument(
        "--workers",
        metavar="N",
        type=_workers,
        help="so many processes on one port, or auto: one a core; one that dies is replaced",
    )
    serve.add_argument(
        "--worker-threads",
        action="store_true",
        help="workers are threads of one process: for a Python without a GIL",
    )
    serve.add_argument("-q", "--quiet", action="store_true", help="no line for each connection")
    serve.add_argument(
        "--live",
        action="store_true",
        help="show once a second what goes on: a table on a terminal (with muxio[live]), else a line; implies --quiet",
    )
    serve.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="lines for people, or a JSON object each (default: text)",
    )
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
    _json_option(poller)
    _add_bench_echo(benches)
    _add_bench_offload(benches)
    hold = benches.add_parser(
        "hold",
        help="very many connections at once, by workers",
        description="Hold so many connections at once, by as many workers, and from as many client processes, as the "
        "limit of open files makes necessary, and let each echo once at the end; every byte is compared. Says how long "
        "it took, what each worker held, and the memory of it. The server has its usual time-outs and limits, but for "
        "the first byte and the number of connections. Limits that are too low are told before it begins. Ctrl-C shows "
        "what is there by then.",
        epilog="N as in 500 or 64k (65,536).    examples:  muxio bench hold -c 200            "
        "muxio bench hold -c 100000 --workers 6    "
        "exit status: 0 if all were held and echoed, 1 if not, 2 for bad input or a limit that is too low, "
        "130 after Ctrl-C",
    )
    hold.add_argument("-c", "--connections", metavar="N", type=count, default=10_000, help="(default: 10,000)")
    hold.add_argument("--workers", metavar="N", type=_workers, help="of the server (default: as few as can hold them)")
    hold.add_argument("--clients", metavar="N", type=_workers, help="processes (default: as few as can hold them)")
    _json_option(hold)
    return parser


#: Option of `serve` -> the field of `Timeouts` or `Limits` that it sets, and what it says of itself.
_TIMEOUTS = {
    "--first-data": ("first_data", "cut who sends nothing at all for so long"),
    "--idle": ("idle", "cut who neither sends nor takes anything for so long"),
    "--write-timeout": ("write", "cut who takes nothing of what is queued for so long"),
    "--lifetime": ("lifetime", "cut everybody after so long"),
    "--close-timeout": ("close", "how long a closing connection may take for what is queued"),
    "--linger": ("linger", "how long to wait for the other side's EOF after ours"),
}
_LIMITS = {
    "--max-connections": ("connections", "connections at once; others wait to be accepted"),
    "--max-per-peer": ("per_peer", "connections at once with one address; others are reset"),
    "--max-buffered": ("buffered", "bytes queued for all clients together, before less is read"),
}


def _add_limits(serve: _Parser) -> None:
    from muxio.server.limits import Limits, Timeouts
    from muxio.server.serve import DRAIN, RETIRE

    group = serve.add_argument_group("time-outs and limits")
    group.add_argument(
        "--drain",
        metavar="SECONDS",
        type=lambda text: 0.0 if text == "0" else or_none(seconds)(text),
        default=DRAIN,
        help=f"time that clients get to end after a stop, 0 for none (default: {DRAIN:g})",
    )
    group.add_argument(
        "--retire",
        metavar="SECONDS",
        type=or_none(seconds),
        default=RETIRE,
        help=f"time that a replaced worker leaves its clients alone before it drains (default: {RETIRE:g})",
    )
    for options, defaults, convert in ((_TIMEOUTS, Timeouts(), seconds), (_LIMITS, Limits(), count)):
        for option, (field, text) in options.items():
            default = getattr(defaults, field)
            group.add_argument(
                option,
                dest=field,
                metavar="SECONDS" if convert is seconds else "N",
                type=or_none(convert),
                default=argparse.SUPPRESS,
                help=f"{text} (default: {'none' if default is None else f'{int(default):,}'})",
            )


def _add_bench_echo(benches: argparse._SubParsersAction[_Parser]) -> None:
    echo = benches.add_parser(
        "echo",
        help="the echo server, beside C, uvloop, asyncio and others",
        description="Measure echo servers in turn: CPU time an echo, throughput, latency, fairness. Each serves in a "
        "process of its own, and the load comes from another, in C if there is a compiler. Three loads and all that "
        "is installed take five minutes. Ctrl-C shows what is there by then.",
        epilog="scenarios: load (64 B over 100 and 1,000 connections, 16 KiB over 100); memory (an idle connection's); "
        "crowd (busy connections alone, and beside idle ones); storm (1,000 clients that connect at once); workers "
        "(muxio in one process, by one worker and by two, on all cores); hostile (honest clients alone, and beside "
        "others that drip, never read, or reset). "
        "exit status: 0, 1 if a contestant failed, 2 for bad input, 130 after Ctrl-C",
    )
    echo.add_argument(
        "--scenario",
        dest="scenarios",
        metavar="NAME,...",
        type=_names,
        default=("load",),
        help="what to measure (default: load), or all",
    )
    echo.add_argument(
        "--only",
        "--contestants",
        metavar="NAME,...",
        type=_names,
        help="of muxio, c, epoll, selectors, asyncio, uvloop, gevent, threads (default: all that are here; muxio, "
        "asyncio and uvloop in scenarios other than load)",
    )
    echo.add_argument("-c", "--connections", metavar="N", type=count, help="busy connections")
    echo.add_argument("--size", metavar="BYTES", type=count, help="of a message, as in 64, 16k or 1M")
    echo.add_argument(
        "--rate",
        metavar="N",
        type=count,
        help="so many messages a second from all together, latency counted from when each was to be sent (open loop); "
        "without it each connection sends when it had its echo (closed loop)",
    )
    echo.add_argument(
        "-d",
        "--duration",
        metavar="TIME",
        type=_duration,
        default=1.0,
        help="of a sample, as in 500ms or 2s (default: 1s)",
    )
    echo.add_argument("--idle", metavar="N", type=count, help="idle connections (default: memory 9000, crowd 19000)")
    echo.add_argument("--hostile", metavar="N", type=count, default=500, help="hostile peers a kind (default: 500)")
    length = echo.add_mutually_exclusive_group()
    length.add_argument("--rounds", metavar="N", type=_runs, default=7, help="7 or more (default: 7)")
    length.add_argument("--quick", action="store_true", help="a look: three short rounds, nothing is judged")
    echo.add_argument("--backend", metavar="NAME", help=f"muxio on this one: {', '.join(NAMES)}")
    _json_option(echo)


def _add_bench_offload(benches: argparse._SubParsersAction[_Parser]) -> None:
    offload = benches.add_parser(
        "offload",
        help="what a request that computes does to other clients",
        description="Measure the latency of 100 light clients while the server computes for another one without pause: "
        "in its loop, on threads, on processes; and without it. Three minutes. Ctrl-C shows what is there by then.",
        epilog="exit status: 0, 1 if a contestant failed, 2 for bad input, 130 after Ctrl-C",
    )
    offload.add_argument(
        "-d", "--duration", metavar="TIME", type=_duration, default=5.0, help="of a sample, as in 500ms (default: 5s)"
    )
    offload.add_argument(
        "--rate", metavar="N", type=count, default=100, help="messages a second of all light clients (default: 100)"
    )
    length = offload.add_mutually_exclusive_group()
    length.add_argument("--rounds", metavar="N", type=_runs, default=7, help="7 or more (default: 7)")
    length.add_argument("--quick", action="store_true", help="a look: three short rounds, nothing is judged")
    _json_option(offload)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write JSON instead of tables, to a file or - (needs no rich)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.lower().split(","))


def _duration(text: str) -> float:
    duration = seconds(text)
    if not 0.01 <= duration <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 10ms to 1h")
    return duration


def _runs(text: str) -> int:
    from muxio.bench.measure import FEWEST_ROUNDS

    if not text.isdecimal() or int(text) < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {FEWEST_ROUNDS} on")
    return int(text)


def _workers(text: str) -> int:
    if text == "auto":
        return core_count()
    if not text.isdecimal() or not 1 <= int(text) <= MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST_WORKERS}, or auto")
    return int(text)


def _address(text: str) -> tuple[str, int] | str | int:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``:PORT`` or ``PORT``; ``unix:PATH``; ``fd:N``, which is a number here."""
    host, _, port = text.rpartition(":")
    if host == "fd":
        if not port.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r}: a descriptor is a number, as in fd:3")
        return int(port)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path in ("", "@"):
            raise argparse.ArgumentTypeError(f"{text!r} has no path")
        return "\0" + path[1:] if path.startswith("@") else path
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise argparse.ArgumentTypeError(f"{text!r}: an IPv6 address goes in brackets, as in [::1]:8007")
    if not (port.isascii() and port.isdigit() and int(port) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in a port from 0 to 65535")
    return host, int(port)


def _serve(options: argparse.Namespace) -> int:
    from muxio.server.limits import Limits, Timeouts
    from muxio.server.report import format_address
    from muxio.server.serve import serve
    from muxio.server.sockets import Address, inherited
    from muxio.server.systemd import listen_fds

    given = vars(options)
    timeouts = {field: given[field] for field, _ in _TIMEOUTS.values() if field in given}
    limits = {field: given[field] for field, _ in _LIMITS.values() if field in given}
    address = options.address
    try:
        handed_over = listen_fds()
        if address is None:
            if len(handed_over) > 1:
                raise ValueError(f"{len(handed_over)} sockets were handed over: say which, as in fd:{min(handed_over)}")
            address = min(handed_over, default=_address(DEFAULT_ADDRESS))
        place: AbstractContextManager[Address] = nullcontext(address)
        if isinstance(address, int):
            place = inherited(address)
        with place as address_or_socket:
            summary = serve(
                address_or_socket,
                backend=options.backend,
                threads=options.threads,
                workers=options.workers,
                worker_threads=options.worker_threads,
                quiet=options.quiet,
                live=options.live,
                drain=math.inf if options.drain is None else options.drain,
                retire=math.inf if options.retire is None else options.retire,
                timeouts=Timeouts(**timeouts) if timeouts else None,
                limits=Limits(**limits) if limits else None,
                log_format=options.log_format,
            )
    except ChildProcessError as error:  # its traceback is on stderr already
        _complain("serve", str(error))
        return FAILED
    except ValueError as error:  # no such backend, or not here; options that exclude each other
        return _complain("serve", str(error))
    except OSError as error:
        where = f"fd:{address}" if isinstance(address, int) else format_address(address)
        return _complain("serve", f"cannot serve at {where}: {error.strerror or error}")
    return CUT if summary.cut else 0


def _complain(command: str, message: str) -> int:
    print(f"muxio {command}: {message}", file=sys.stderr)
    return 2


def _info(options: argparse.Namespace) -> int:
    from muxio.info import describe_system

    print("\n".join(describe_system()))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from muxio.bench import echo, hold, offload, poller
    from muxio.bench.measure import Results, Scenario
    from muxio.bench.report import conduct

    results: Results
    scenarios: Iterable[Scenario]

    try:
        if options.bench == "hold":
            return hold.conduct(hold.Settings(options.connections, options.workers, options.clients), options.json)
        if options.bench == "poller":
            results, scenarios = poller.bench(options.runs, options.quick, options.backend)
        elif options.bench == "offload":
            results, scenarios = offload.bench(
                offload.Settings(options.duration, options.rounds, options.quick, options.rate)
            )
        else:
            names = [field.name for field in fields(echo.Settings)]
            results, scenarios = echo.bench(echo.Settings(**{name: getattr(options, name) for name in names}))
    except (ValueError, OSError) as error:  # no such backend, or not here
        return _complain("bench", str(error))
    return conduct(results, scenarios, options.json)
