"""Reads what people type as values: durations, JSON, ``key=value`` pairs.

Pure. Each function raises `typer.BadParameter` with the text as it was given
and what would be right, which becomes exit code 2.
"""

from __future__ import annotations

import json
import re
from typing import Any

import typer

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def duration(text: str) -> float:
    """``500ms``, ``30s``, ``1m30s`` or a bare number of seconds, as seconds.

    Raises:
        typer.BadParameter: it is none of these.
    """
    clean = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", clean):
        return float(clean)
    parts = _PART.findall(clean)
    if not parts or "".join(number + unit for number, unit in parts) != clean:
        raise typer.BadParameter(f"{text!r} is not a duration: write 500ms, 30s, 5m, 2h or 1m30s.")
    return float(sum(float(number) * _UNITS[unit] for number, unit in parts))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def json_value(text: str | None, stdin: Any = None) -> Any:
    """The JSON value in *text*; ``-`` reads *stdin*; None is no payload.

    Raises:
        typer.BadParameter: it is not JSON; says at which line and column.
    """
    if text is None:
        return None
    where = "The payload"
    if text == "-":
        where = "The payload on stdin"
        text = stdin.read() if stdin is not None else ""
    assert text is not None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        lines = text.splitlines() or [""]
        # The end behind a line break is a line of its own to the parser.
        line = lines[min(error.lineno, len(lines)) - 1]
        near = line[max(0, error.colno - 11) : error.colno + 10]
        hint = " A text needs double quotes inside the shell's single ones: '\"text\"'."
        raise typer.BadParameter(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            + (f", near {near!r}." if near else ".")
            + (hint if re.match(r"\s*[A-Za-z']", text) else "")
        ) from None
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{where} is not JSON: {error}.") from None


def pairs(items: list[str], option: str) -> dict[str, str]:
    """``k=v`` texts as a dict.

    Raises:
        typer.BadParameter: one of them has no ``=`` or no key, or a key comes twice.
    """
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{item!r} is not KEY=VALUE.", param_hint=option)
        if key in found:
            raise typer.BadParameter(f"{key!r} is given twice.", param_hint=option)
        found[key] = value
    return found


def address(text: str, option: str) -> str:
    """``HOST:PORT`` of ``[HOST:]PORT``; this machine's loopback unless a host is given.

    Raises:
        typer.BadParameter: it is none.
    """
    host, _, port = text.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter(
            f"{text!r} is no address: write a port, or HOST:PORT as in 0.0.0.0:9464.",
            param_hint=option,
        )
    return f"{host or '127.0.0.1'}:{port}"


def numbers(items: list[str], option: str) -> dict[str, float]:
    """``k=number`` texts as a dict.

    Raises:
        typer.BadParameter: as in `pairs`, or a value is not a number of at least 0.
    """
    found: dict[str, float] = {}
    for key, text in pairs(items, option).items():
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise typer.BadParameter(
                f"{key}={text!r}: write a number of at least 0, as in {key}=4.", param_hint=option
            )
        found[key] = number
    return found
