"""What imports what: the floors of docs/architecture.md, and how little `import muxio` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import muxio

PACKAGE = Path(muxio.__file__).parent

FLOORS = {
    "muxio.events": -1,
    "muxio.backends": 0,
    "muxio.forks": 0,
    "muxio.cores": 0,
    "muxio.poller": 1,
    "muxio.selector": 2,
    "muxio": 2,
    "muxio.server.protocol": 2,
    "muxio.server.report": 2,
    "muxio.server.sockets": 2,
    "muxio.server.limits": 2,
    "muxio.server.wheel": 2,
    "muxio.server.offload": 2,
    "muxio.server.systemd": 2,
    "muxio.server.signals": 2,
    "muxio.server.notices": 3,
    "muxio.server.group": 3,
    "muxio.server.connection": 3,
    "muxio.server.connector": 3,
    "muxio.server.loop": 4,
    "muxio.server.listener": 3,
    "muxio.server.server": 5,
    "muxio.server.threaded": 5,
    "muxio.server.channel": 5,
    "muxio.server.statistics": 6,
    "muxio.server.live": 6,
    "muxio.server.worker": 6,
    "muxio.server.workers": 6,
    "muxio.server.worker_threads": 6,
    "muxio.server.serve": 6,
    "muxio.server": 6,
    "muxio.bench": 7,
    "muxio.testing": 7,
    "muxio.quantities": 7,
    "muxio.info": 8,
    "muxio.cli": 8,
    "muxio.__main__": 8,
}

#: Modules of one floor that may lean on each other, in this direction.
SAME_FLOOR = {
    ("muxio", "muxio.selector"),
    ("muxio.server.connection", "muxio.server.group"),
    ("muxio.server.connector", "muxio.server.connection"),
    ("muxio.server.live", "muxio.server.statistics"),
    ("muxio.server.workers", "muxio.server.statistics"),
    ("muxio.server.workers", "muxio.server.worker"),
    ("muxio.server.worker_threads", "muxio.server.statistics"),
    ("muxio.server.worker_threads", "muxio.server.worker"),
    ("muxio.server.serve", "muxio.server.live"),
    ("muxio.server.serve", "muxio.server.statistics"),
    ("muxio.server.serve", "muxio.server.worker"),
    ("muxio.server.serve", "muxio.server.workers"),
    ("muxio.server.serve", "muxio.server.worker_threads"),
    ("muxio.server", "muxio.server.serve"),
    ("muxio.cli", "muxio.info"),
    ("muxio.__main__", "muxio.cli"),
}


def place(module: str) -> str:
    """The name under which a module, or the package that it is inside of, stands in FLOORS."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return module


def modules() -> dict[str, Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path: Path) -> set[str]:
    """The modules of muxio that a file imports when it runs (not those for type checkers only)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            known = modules()
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            found.update(submodules or {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name.split(".")[0] == "muxio"}


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_floors_below(module: str) -> None:
    here = place(module)
    for imported in imports(modules()[module]):
        there = place(imported)
        assert here == there or FLOORS[there] < FLOORS[here] or (here, there) in SAME_FLOOR, f"{module} <- {imported}"


def test_threaded_shares_nothing_with_what_it_judges() -> None:
    assert imports(modules()["muxio.server.threaded"]) == {"muxio.server.report"}


def test_the_fault_proxy_shares_nothing_with_the_servers_behind_it() -> None:
    assert imports(modules()["muxio.testing.faults"]) == {"muxio.testing.scripts"}
    assert imports(modules()["muxio.testing.scripts"]) == set()


def test_protocol_knows_no_socket_no_poller_and_no_thread() -> None:
    tree = ast.parse(modules()["muxio.server.protocol"].read_text(encoding="utf-8"))
    top = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert top == set()
    assert imports(modules()["muxio.server.protocol"]) == set()


def test_import_loads_the_poller_and_nothing_more() -> None:
    unwanted = [
        "typing",
        "threading",
        "ctypes",
        "logging",
        "ssl",
        "asyncio",
        "socketserver",
        "argparse",
        "muxio.server",
        "muxio.cli",
    ]
    unwanted += ["muxio.bench", "muxio.testing", "muxio.info"]
    program = f"import sys, muxio; print([name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
