"""Tables, documents and errors: clean, whole, and parseable."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from ruamel.yaml import YAML

from foundation_cli import render
from foundation_cli.connection import Output, Shared
from foundation_cli.render import Column
from foundation_nats import errors
from foundation_schemas import Receipt

_COLUMNS = (
    Column("id", lambda row: row["id"]),
    Column("count", lambda row: row["count"], right=True),
    Column("reason", lambda row: row["reason"], free=True),
)


def test_a_pipe_gets_plain_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    """No box, no colour, every cell whole."""
    long = "x" * 128
    render.table(
        _COLUMNS,
        [{"id": long, "count": 7, "reason": "r" * 300}, {"id": "b", "count": 12, "reason": None}],
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["ID", "COUNT", "REASON"]
    assert out.splitlines()[1].split() == [long, "7", "r" * 300]
    assert out.splitlines()[2].split() == ["b", "12", "-"]
    assert "\x1b" not in out


def test_control_characters_and_escape_sequences_are_stripped() -> None:
    """A payload can't move the cursor, set a title, reorder text or break a line."""
    nasty = "a\x1b[31mred\x1b]0;title\x07\x00\x9b\u202eb\r\nc\td"
    text = render.clean(nasty)
    assert text == "aredb ⏎ c d"


def test_markup_is_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets in ids and reasons are shown, not obeyed, by rich tables too."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    row = {"id": "[red]a[/red]", "count": 1, "reason": ":boom: [link=x]y[/link]"}
    render.table(_COLUMNS, [row])
    out = capsys.readouterr().out
    assert "[red]a[/red]" in out
    assert ":boom: [link=x]y[/link]" in out


def test_ids_are_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only prose is folded; an id that does not fit makes a long line."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    id = "very-long-agent-id-" + "x" * 80
    render.table(_COLUMNS, [{"id": id, "count": 1, "reason": "word " * 30}])
    assert id in capsys.readouterr().out


def test_nothing_to_show_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is data only."""
    render.table(_COLUMNS, [], empty="No agents.")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "No agents.\n")


def test_json_and_yaml_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """One document each; models, dataclasses and odd characters included."""
    value = [
        Receipt(id="a", target="agent:x", stream="S", sequence=1),
        {"column": "é ☃ \x1b \x9b \u202e", "n": None, "list": [1, 2.5, True]},
    ]
    assert render.document(Shared(output=Output.JSON), value)
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    found = json.loads(text)
    assert found[0]["sequence"] == 1
    assert found[1]["column"] == "é ☃ \x1b \x9b \u202e"
    assert render.document(Shared(output=Output.YAML), value)
    assert YAML(typ="safe").load(capsys.readouterr().out) == found
    assert not render.document(Shared(), value)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BusUnavailableError("x"), 3),
        (errors.NoRespondersError("x"), 1),
        (errors.BusTimeoutError("x"), 1),
        (errors.AgentNotFoundError("x"), 4),
        (errors.DeadLetterNotFoundError("x"), 4),
        (errors.NotSettledError("x"), 5),
        (errors.PermissionDeniedError("x"), 7),
        (errors.ManifestError("x"), 2),
        (errors.ConfigError("x"), 2),
        (errors.HandlerError("x"), 1),
        (errors.PlacementError("x"), 1),
        (RuntimeError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    """The contract's table."""
    assert render.exit_code(error) == code


def test_an_error_is_one_sentence_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Message and hint on one line, reasons below."""
    error = errors.NotSettledError(
        "2 agents are not as wished.", hint="See `foundation status`.", reasons={"a": "no\nroom"}
    )
    assert render.report(error, as_json=False) == 5
    assert capsys.readouterr().err == (
        "error: 2 agents are not as wished. See `foundation status`.\n  a: no ⏎ room\n"
    )


def test_a_json_error_has_the_contracts_shape(capsys: pytest.CaptureFixture[str]) -> None:
    """code, message, hint and details, and whether it may have happened all the same."""
    error = errors.BusTimeoutError("No answer.", subject="a", odd=object())
    assert render.report(error, as_json=True) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().err)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"code", "message", "hint", "details"}
    assert found["error"]["code"] == "bus.timeout"
    assert found["error"]["details"]["outcome"] == "unknown"


def test_a_terminal_gets_colours_and_no_color_does_not() -> None:
    """Tried on a real pseudo-terminal."""
    program = (
        "from foundation_cli import render\n"
        "from foundation_cli.render import Column\n"
        "render.table((Column('status', lambda r: r),), ['running'])\n"
    )

    def show(**env: str) -> str:
        outer, inner = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        environment |= {"TERM": "xterm-256color", **env}
        with subprocess.Popen([sys.executable, "-c", program], stdout=inner, env=environment):
            pass
        os.close(inner)
        text = b""
        while True:
            try:
                part = os.read(outer, 4096)
            except OSError:
                break
            if not part:
                break
            text += part
        os.close(outer)
        return text.decode()

    assert "\x1b[32m" in show()
    assert "\x1b[3" not in show(NO_COLOR="1")
    assert "\x1b" not in show(TERM="dumb")
    assert "running" in show(TERM="dumb")
