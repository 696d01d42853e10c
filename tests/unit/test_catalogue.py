"""`docs/fault-catalogue.md` is true: all numbers are there, and all that it names exists.

So does the reverse for crash points: each is passed by the code, and armed by a test.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from foundation_nats.base.failpoint import POINTS
from foundation_nats.chaos.faults import KINDS

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "docs" / "fault-catalogue.md"
LONG = "--chaos"


@cache
def rows(kind: str) -> dict[int, list[str]]:
    """The rows of the catalogue whose numbers begin with *kind*: number to cells."""
    found: dict[int, list[str]] = {}
    for line in CATALOGUE.read_text().splitlines():
        if match := re.match(rf"\| {kind}-(\d\d) \|", line):
            number = int(match[1])
            assert number not in found, f"{kind}-{number:02} is there twice"
            found[number] = [cell.strip() for cell in line.strip("|").split("|")]
    return found


@cache
def points() -> dict[str, list[str]]:
    """The rows of crash points: point to cells."""
    _, _, section = CATALOGUE.read_text().partition("\n## Crash points\n")
    table = re.findall(r"^\| `([\w.]+)` \|(.*)\|$", section, re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in table}


@cache
def definitions(path: str) -> dict[str, str]:
    """What a Python file defines at its top: name to source, decorators included."""
    source = (ROOT / path).read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def references(text: str) -> list[tuple[str, str]]:
    """What is named as `path::name`."""
    return re.findall(r"`([\w./]+\.py)::(\w+)`", text)


def kinds(text: str) -> list[str]:
    """What is named as a kind of fault of `foundation chaos`."""
    return re.findall(r"chaos `(\w+\.\w+)`", text)


def is_long(path: str, name: str) -> bool:
    """Whether a test is skipped as a whole without --chaos."""
    source = definitions(path)[name]
    return 'usefixtures("chaos")' in source


def test_every_fault_and_every_invariant_is_there() -> None:
    """63 faults and 15 invariants, in order."""
    assert list(rows("R")) == list(range(1, 64))
    assert list(rows("I")) == list(range(1, 16))


def test_everything_that_is_named_exists() -> None:
    """Tests, checkers, and kinds of faults."""
    text = CATALOGUE.read_text()
    for path, name in references(text):
        assert (ROOT / path).exists(), path
        assert name in definitions(path), f"{path} has no {name}"
    assert set(kinds(text)) <= KINDS.keys(), set(kinds(text)) - KINDS.keys()


def test_every_kind_of_chaos_is_in_the_catalogue() -> None:
    """A new kind of fault gets a place."""
    assert set(kinds(CATALOGUE.read_text())) == KINDS.keys()


@pytest.mark.parametrize("number", range(1, 64))
def test_a_fault_is_covered_or_says_why_not(number: int) -> None:
    """Something that covers it and runs by some command, or the reason."""
    _, fault, promised, provoked, covered, run_by = rows("R")[number]
    assert fault
    tests, faults = references(covered), kinds(covered)
    if not tests and not faults:
        assert re.search(r"[Nn]ot covered.*, because ", covered), covered
        assert run_by == "–"
        return
    assert promised
    assert provoked
    commands = set(re.findall(r"`(make [\w-]+)`", run_by))
    if not faults:
        assert "make chaos" not in commands
    quick = [item for item in tests if not is_long(*item)]
    long = [item for item in tests if is_long(*item)]
    assert ("make test" in commands) == bool(quick), f"{quick} run by make test?"
    if long:
        assert "make test-long" in commands, f"{long} need {LONG}"
    if faults:
        assert "make chaos" in commands


@pytest.mark.parametrize("number", range(1, 16))
def test_an_invariant_is_judged_by_something(number: int) -> None:
    """A checker or a test."""
    _, invariant, judged, _ = rows("I")[number]
    assert invariant
    assert references(judged)


def test_every_crash_point_is_in_the_catalogue() -> None:
    """And no other; a new one gets a row with the test that arms it."""
    assert points().keys() == POINTS


@pytest.mark.parametrize("point", sorted(POINTS))
def test_a_crash_point_is_passed_by_the_code_and_armed_by_the_test_that_is_named(
    point: str,
) -> None:
    """A name that nobody calls, or nobody arms, tests nothing."""
    calls = [
        path
        for path in (ROOT / "foundation_nats").rglob("*.py")
        if f'failpoint("{point}")' in path.read_text()
    ]
    assert calls, f"{point} is called nowhere"
    armed_by, run_by = points()[point]
    (path, name), *_ = references(armed_by) or [
        ("tests/cluster/test_failpoints.py", found)
        for found in re.findall(r"`(test_\w+)`", armed_by)
    ]
    assert name in definitions(path), f"{path} has no {name}"
    assert f'"{point}"' in (ROOT / path).read_text() or f'"{point}=' in (ROOT / path).read_text()
    if is_long(path, name):
        assert run_by == "`make test-long`"
