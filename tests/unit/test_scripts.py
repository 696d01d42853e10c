"""The runner of transcripts: what it compares, what it keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from foundation_nats.testing.scripts import Command, ScriptError, play, run_script

STORY = """\
# Sums are sums.

add 1 2
----
3

# Two commands, one block.
add 1 2 unit=m
# Comments between commands stay.
add 3
----
3 m
3
"""


def _sum(command: Command) -> Iterator[str]:
    if command.name != "add":
        raise ScriptError(f"unknown command {command.name!r}")
    total = sum(int(word) for word in command.arguments)
    yield f"{total} {command.option('unit', '')}".rstrip()


def test_a_story_that_is_true_passes(tmp_path: Path) -> None:
    """Comments, empty lines and several commands per block are kept as they are."""
    path = tmp_path / "sums.txt"
    path.write_text(STORY)
    run_script(path, _sum, rewrite=False)
    assert play(STORY, _sum) == STORY
    assert play("", _sum) == ""


def test_a_difference_is_shown_with_the_way_to_accept_it(tmp_path: Path) -> None:
    """The failure says what was expected, what happened, and how to rewrite."""
    path = tmp_path / "sums.txt"
    path.write_text(STORY.replace("3 m", "4 m"))
    with pytest.raises(AssertionError) as caught:
        run_script(path, _sum, rewrite=False)
    text = str(caught.value)
    assert "-4 m" in text
    assert "+3 m" in text
    assert "sums.txt (expected)" in text
    assert "FOUNDATION_REWRITE=1" in text
    assert "4 m" in path.read_text(), "without being asked to, it writes nothing"


def test_rewriting_stores_what_happened(tmp_path: Path) -> None:
    """Also where nothing was expected so far, or a line too many."""
    path = tmp_path / "sums.txt"
    path.write_text(STORY.replace("3 m\n", "").replace("----\n3\n\n", "----\n\n"))
    run_script(path, _sum, rewrite=True)
    assert path.read_text() == STORY
    path.write_text(STORY + "7\n")
    run_script(path, _sum, rewrite=True)
    assert path.read_text() == STORY


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("----\n3\n", "story:1: ---- without a command"),
        ("add 1\n", "story:1: no ---- after 'add 1'"),
        ("# a\nadd 1\n\nadd 2\n----\n", "story:2: no ---- after 'add 1'"),
        ("add 1\nadd x\n----\n", "story:2: 'add x' failed: ValueError"),
        ("multiply 1\n----\n", "story:1: 'multiply 1' failed: ScriptError: unknown command"),
    ],
)
def test_what_is_no_story_is_refused_by_its_line(text: str, words: str) -> None:
    """The reader is told where, and what."""
    with pytest.raises(ScriptError) as caught:
        play(text, _sum, name="story")
    assert words in str(caught.value)


@pytest.mark.parametrize("output", ["", " ", "a\nb"])
def test_output_that_would_end_the_block_is_refused(output: str) -> None:
    """Otherwise the next run would read the rest of it as commands."""
    with pytest.raises(ScriptError, match="empty line or one with a line break"):
        play("add\n----\n", lambda _: [output])


def test_a_command_has_arguments_and_options() -> None:
    """They may be mixed; what is missing or no number is said by name."""
    command = Command.parse("heard a@1  t=1.5 b@2 name=x=y")
    assert command == Command("heard", ("a@1", "b@2"), {"t": "1.5", "name": "x=y"})
    assert command.argument(1) == "b@2"
    assert command.number("t") == 1.5
    assert command.number("missing", 2) == 2.0
    assert command.option("missing", "that") == "that"
    with pytest.raises(ScriptError, match="needs 3 arguments"):
        command.argument(2)
    with pytest.raises(ScriptError, match="needs missing="):
        command.option("missing")
    with pytest.raises(ScriptError, match="needs missing="):
        command.number("missing")
    with pytest.raises(ScriptError, match="no number"):
        command.number("name")
