"""What a serving program tells on its way: lines for people, which machines can read as well."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, Literal

from muxio.server.report import ConnectionReport, format_address

#: How lines are written: for people, or as one JSON object each.
LogFormat = Literal["text", "json"]


class Notice(str):
    """A line for people, which also knows what it is about.

    event: what kind of thing happened: ``listening``, ``connection``, ``stopping``, ``worker``, ``reload``,
    ``reloaded``, ``statistics``, ``hint``, ``stopped``.
    fields: the figures and names in it, as JSON has them.
    """

    __slots__ = ("event", "fields")

    event: str
    fields: Mapping[str, Any]

    def __new__(cls, line: str, event: str, **fields: Any) -> Notice:  # noqa: PYI034 - typing.Self is of 3.11
        self = super().__new__(cls, line)
        self.event = event
        self.fields = fields
        return self


#: Called with each notice.
Say = Callable[[Notice], object]


def listening(address: Any, backend: str, who: str = "", **fields: Any) -> Notice:
    """Whoever connects is served from now on."""
    where = format_address(address)
    means = f"{backend}, {who}" if who else backend
    return Notice(
        f"listening on {where} ({means}); Ctrl-C stops", "listening", address=where, backend=backend, **fields
    )


def of_connection(report: ConnectionReport, worker: str | None = None) -> Notice:
    """A connection has ended."""
    fields: dict[str, Any] = {} if worker is None else {"worker": worker}
    error = report.error
    fields |= {
        "peer": format_address(report.peer),
        "bytes_in": report.bytes_in,
        "bytes_out": report.bytes_out,
        "seconds": round(report.seconds, 6),
        "error": None if error is None else f"{type(error).__name__}: {error}",
    }
    return Notice(str(report) if worker is None else f"worker {worker}: {report}", "connection", **fields)


def writer(log_format: LogFormat) -> Say:
    """Writes each notice to standard output, as one line and in one piece."""
    return _write_json if log_format == "json" else _write


def log_as_json() -> logging.Handler:
    """Let what muxio logs go to standard error as JSON, a line each. Returns the handler, to be removed again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    logging.getLogger("muxio").addHandler(handler)
    return handler


def _write(notice: Notice) -> None:
    _write_line(str(notice))


def _write_json(notice: Notice) -> None:
    _write_line(_line(datetime.now(timezone.utc), notice.event, str(notice), notice.fields))


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # print() writes twice when Python does not buffer (-u), and workers come between
    sys.stdout.flush()


def _line(when: datetime, event: str, message: str, fields: Mapping[str, Any]) -> str:
    time = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    finite = {name: None if value in (math.inf, -math.inf) else value for name, value in fields.items()}
    return json.dumps({"time": time, "event": event, "message": message, **finite})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"level": record.levelname.lower(), "logger": record.name, "process": record.process}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _line(datetime.fromtimestamp(record.created, timezone.utc), "log", record.getMessage(), fields)
