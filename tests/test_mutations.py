"""mutate.py and its list. All of the mutations are run by hand: ``python tests/mutate.py``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutate
import pytest
from helpers import on_wine
from mutations import MUTATIONS, Mutation

from muxio.testing import PollerConformance

HERE = Path(__file__).parent

HARMLESS = Mutation(
    "says-it-otherwise",
    "none",
    "events.py",
    "Spell bits for people",
    "Write bits for people",
    on="select",
    tests=("tests/test_events.py",),
)
CAUGHT = "describe-names-one-bit-only"


@pytest.fixture
def copying() -> None:
    """For tests in which files are copied."""
    if on_wine():
        pytest.skip("Wine 8.0 has no CopyFile2, which shutil calls")


copies = pytest.mark.usefixtures("copying")


def run(mutations: list[Mutation], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(mutate, "MUTATIONS", mutations)
    return mutate.main([])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_its_file_and_leaves_it_a_program(mutation: Mutation) -> None:
    text = (mutate.ROOT / "muxio" / mutation.file).read_text(encoding="utf-8")
    mutated = mutate.mutate(text, mutation)
    assert mutated != text
    compile(mutated, mutation.file, "exec")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_tests_that_are_to_notice_a_mutation_exist(mutation: Mutation) -> None:
    assert mutation.on in mutate.CLASSES
    if mutation.likely:
        assert hasattr(PollerConformance, mutation.likely)
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (HERE.parent / file).read_text(encoding="utf-8")


def test_names_are_unique() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@copies
def test_a_mutation_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--only", CAUGHT, "--python", sys.executable]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].split()[:2] == ["caught", CAUGHT]
    assert "test_events.py::test_describe_spells_the_bits" in told.out
    assert "1 of 1 caught, 0 missed" in told.out
    assert "without a mutation: passed" in told.err


@copies
def test_a_mutation_that_no_test_notices_is_missed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run([HARMLESS], monkeypatch) == 1
    assert capsys.readouterr().out.split()[:2] == ["MISSED", HARMLESS.name]


@copies
def test_tests_that_hang_have_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = replace(HARMLESS, name="hangs", old="    names = [", new="    while events:\n        pass\n    names = [")
    monkeypatch.setattr(mutate, "TIMEOUT", 10.0)
    assert run([hangs], monkeypatch) == 0
    assert capsys.readouterr().out.split()[:3] == ["caught", "hangs", "hang"]


@copies
@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        ({"old": "not there"}, "is in muxio/events.py 0 times"),
        ({"old": "READ"}, "times, not once"),
        ({"tests": ("tests/test_nothing.py",)}, "do not pass without any mutation"),
    ],
    ids=["nowhere", "everywhere", "no such test"],
)
def test_what_cannot_be_found_out_is_told(
    change: dict[str, Any], trouble: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run([replace(HARMLESS, **change)], monkeypatch) == 2
    assert trouble in capsys.readouterr().err


def test_an_unknown_name_is_told_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--only", "oneshot-stays-harmed"]) == 2
    assert "'oneshot-stays-armed' is" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "x"], ["--only"], ["name"]])
def test_bad_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        mutate.main(arguments)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list_tells_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [mutation.name for mutation in MUTATIONS]
