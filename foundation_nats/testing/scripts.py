"""Run a transcript of commands and their expected output against a pure machine, or rewrite it.

Reads a text file, and writes it only when ``FOUNDATION_REWRITE=1``. The file is
a sequence of stories that a person who can't read Python can review:

    # Why this happens.
    command argument key=value
    another-command
    ----
    what comes of both

A block ends with an empty line; lines that start with ``#`` stay as they are.
The whole transcript is played and compared, so that a failure shows all that
has changed as a diff. A rewritten file must be read before it is committed: it
says what the machine does, not what it should do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_REWRITE_VARIABLE = "FOUNDATION_REWRITE"
_SEPARATOR = "----"

# Read once: the tests' fixtures take all our variables out of the environment.
_REWRITE = os.environ.get(_REWRITE_VARIABLE) == "1"


class ScriptError(Exception):
    """A script can't be played: it is not well formed, or a command has failed."""


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a script: ``name argument … key=value …``."""

    name: str
    arguments: tuple[str, ...]
    options: dict[str, str]

    @classmethod
    def parse(cls, line: str) -> Command:
        """The command in *line*, which has at least one word."""
        name, *words = line.split()
        pairs = [word.partition("=") for word in words]
        return cls(
            name,
            tuple(key for key, is_pair, _ in pairs if not is_pair),
            {key: value for key, is_pair, value in pairs if is_pair},
        )

    def argument(self, index: int = 0) -> str:
        """The argument at *index*.

        Raises:
            ScriptError: there are not so many.
        """
        if index >= len(self.arguments):
            raise ScriptError(f"{self.name!r} needs {index + 1} arguments")
        return self.arguments[index]

    def option(self, key: str, default: str | None = None) -> str:
        """The value of *key*.

        Raises:
            ScriptError: it is missing and has no *default*.
        """
        value = self.options.get(key, default)
        if value is None:
            raise ScriptError(f"{self.name!r} needs {key}=…")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of *key* as a number.

        Raises:
            ScriptError: it is missing and has no *default*, or is no number.
        """
        text = self.option(key, None if default is None else str(default))
        try:
            return float(text)
        except ValueError:
            raise ScriptError(f"{key}={text} is no number") from None


Perform = Callable[[Command], Iterable[str]]
"""Carries out one command; returns the lines that come of it."""


def play(text: str, perform: Perform, *, name: str = "script") -> str:
    """*text* with the output of its commands replaced by what *perform* returns.

    Raises:
        ScriptError: *text* is not a script, or a command fails; says the line.
    """
    return "".join(f"{line}\n" for line in _play(text.splitlines(), perform, name))


def _play(lines: list[str], perform: Perform, name: str) -> Iterator[str]:
    commands: list[tuple[int, str]] = []
    rest = iter(enumerate(lines, start=1))
    for number, line in rest:
        if line == _SEPARATOR:
            if not commands:
                raise ScriptError(f"{name}:{number}: {_SEPARATOR} without a command before it")
            yield line
            for at, command in commands:
                yield from _perform(perform, command, f"{name}:{at}")
            commands = []
            yield from _skip_output(rest)
            continue
        if not line.strip() and commands:
            break
        if line.strip() and not line.startswith("#"):
            commands.append((number, line))
        yield line
    if commands:
        raise ScriptError(f"{name}:{commands[0][0]}: no {_SEPARATOR} after {commands[0][1]!r}")


def _skip_output(rest: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Pass over what was expected, up to the empty line that ends it."""
    for _, line in rest:
        if not line.strip():
            yield line
            return


def _perform(perform: Perform, line: str, where: str) -> list[str]:
    try:
        output = list(perform(Command.parse(line)))
    except Exception as error:  # whatever it is, the reader needs the line of the script
        raise ScriptError(f"{where}: {line!r} failed: {type(error).__name__}: {error}") from error
    if any(not item.strip() or "\n" in item for item in output):
        raise ScriptError(f"{where}: {line!r} returned an empty line or one with a line break")
    return output


def run_script(path: Path, perform: Perform, *, rewrite: bool = _REWRITE) -> None:
    """Play the script at *path* and compare; or with *rewrite*, store what came of it.

    Raises:
        AssertionError: something else came of it; shows the difference.
        ScriptError: it is not a script, or a command failed.
    """
    text = path.read_text(encoding="utf-8")
    played = play(text, perform, name=path.name)
    if played == text:
        return
    if rewrite:
        path.write_text(played, encoding="utf-8")
        return
    difference = difflib.unified_diff(
        text.splitlines(),
        played.splitlines(),
        f"{path.name} (expected)",
        "what happened",
        "",
        "",
        6,
        "",
    )
    raise AssertionError(
        "\n".join(difference)
        + f"\nIf this is what should happen: {_REWRITE_VARIABLE}=1 and read the change."
    )
