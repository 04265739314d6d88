"""One file a kernel facility, and the choice between them.

Every backend file has the same parts in the same order, those of `facility.Facility`, so a reader who knows one
knows all. What only one system has lives in its file and nowhere else, and is imported only when it is opened.
"""

from __future__ import annotations

from muxio.backends.facility import Facility

#: Best first. A name stands here if muxio knows the facility, whether or not this system has it.
NAMES = ("epoll", "kqueue", "afd", "poll", "select")


def open_backend(name: str) -> Facility:
    """Open the facility called `name`. ImportError or OSError where this system has none that works."""
    import importlib  # here, so that importing muxio stays cheap

    facility: Facility = importlib.import_module(f"{__name__}.{name}").Backend()
    return facility


def probe() -> dict[str, str | None]:
    """Try every known backend: name -> None where it works here, else the reason why not. Best first."""
    return {name: _trouble(name) for name in NAMES}


def backends() -> list[str]:
    """The names of the backends that work on this system, best first; found out by opening each.

    >>> import muxio
    >>> "select" in muxio.backends()
    True
    """
    return [name for name, trouble in probe().items() if trouble is None]


def _trouble(name: str) -> str | None:
    try:
        open_backend(name).close()
    except (ImportError, OSError) as error:
        return str(error)
    return None
