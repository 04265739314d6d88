"""What ``python -m muxio info`` tells: the versions, the backends, and the limits that matter."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import muxio
from muxio.backends import probe


def describe_system() -> Iterator[str]:
    """The lines of the answer."""
    yield f"muxio     {muxio.__version__}"
    yield f"Python    {platform.python_implementation()} {platform.python_version()}"
    yield f"system    {platform.system()} {platform.release()} {platform.machine()}"
    chosen, note = _chosen()
    for place, (name, trouble) in enumerate(probe().items()):
        state = f"no: {trouble}" if trouble else "works, and is chosen" + note if name == chosen else "works"
        yield f"{'' if place else 'backends':9} {name:7} {state}"
    if chosen is None:
        yield f"{'':9} none is chosen: {note}"
    yield f"limits    open files  {_open_files()}"
    yield f"{'':9} backlog     {_backlog()}"


def _chosen() -> tuple[str | None, str]:
    forced = os.environ.get("MUXIO_BACKEND")
    try:
        poller: muxio.Poller[None] = muxio.Poller()
        with poller:
            return poller.backend, " by MUXIO_BACKEND" if forced else ""
    except (ValueError, OSError) as error:
        return None, str(error)


def _open_files() -> str:
    if sys.platform == "win32":
        return "no limit of the process's own"
    import resource

    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft if soft == hard else f"{soft}, and up to {hard} after ulimit -n"


def _backlog() -> str:
    try:
        return f"{int(Path('/proc/sys/net/core/somaxconn').read_text()):,} (net.core.somaxconn)"
    except (OSError, ValueError):
        import socket

        return f"{socket.SOMAXCONN:,} (SOMAXCONN)"
