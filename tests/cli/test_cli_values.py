"""What people type as values: durations, JSON, pairs."""

from __future__ import annotations

import io
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from foundation_cli import values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("30s", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("1m30s", 90.0),
        ("1.5s", 1.5),
        ("7", 7.0),
        ("0s", 0.0),
    ],
)
def test_a_duration_is_read_with_its_unit(text: str, seconds: float) -> None:
    """Each unit of the contract, and a bare number of seconds."""
    assert values.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "3q", "-1s", "1 s", "5m!", "nan", "1e3", "ms5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """The error quotes the text and shows the right form."""
    with pytest.raises(typer.BadParameter, match="30s"):
        values.duration(text)


def test_json_errors_name_line_and_column() -> None:
    """The position is the one in what was typed."""
    with pytest.raises(typer.BadParameter, match="line 2, column 7") as caught:
        values.json_value('{"a": 1,\n "b": ]}')
    assert "]" in str(caught.value)


@pytest.mark.parametrize("text", ["hello", "'x'", "NaN", "[Infinity]", "", "{", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str) -> None:
    """Never a traceback, whatever the text is."""
    with pytest.raises(typer.BadParameter, match="not JSON"):
        values.json_value(text)


def test_a_bare_word_is_told_how_to_be_a_text() -> None:
    """The commonest mistake has its own hint."""
    with pytest.raises(typer.BadParameter, match="double quotes"):
        values.json_value("hello")


def test_a_dash_reads_stdin_and_nothing_is_no_payload() -> None:
    """`-` is stdin; an absent payload is null."""
    assert values.json_value("-", io.StringIO('{"a": [1]}')) == {"a": [1]}
    assert values.json_value(None) is None


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_every_json_value_is_read(value: Any) -> None:
    """What json writes, we read."""
    import json

    assert values.json_value(json.dumps(value)) == value


def test_pairs_and_numbers_are_checked() -> None:
    """Missing =, repeated keys and wrong numbers are usage errors."""
    assert values.pairs(["a=1", "b=x=y"], "--label") == {"a": "1", "b": "x=y"}
    assert values.numbers(["slots=500", "gpu=0.5"], "--capacity") == {"slots": 500, "gpu": 0.5}
    for wrong in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(typer.BadParameter):
            values.pairs(wrong, "--label")
    for wrong in (["a=x"], ["a=-1"], ["a=nan"], ["a=inf"]):
        with pytest.raises(typer.BadParameter):
            values.numbers(wrong, "--capacity")
