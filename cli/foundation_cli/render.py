"""Prints results as a table, JSON or YAML, and errors as one sentence with an exit code.

stdout is data, stderr is talk. A person's terminal gets rich tables; a pipe
gets plain aligned text. Texts from the cluster are cleaned of control
characters and never read as markup; ids are never wrapped or cut. Rich and
the library are imported only when needed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, TextIO

from foundation_cli.connection import Output, Shared

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
NOT_SETTLED = 5
DIFFERENCES = 6
DENIED = 7
INTERRUPTED = 130

SCHEMA = "foundation/v1"

# C0, DEL, C1, line and paragraph separators, and what reorders text.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_ESCAPED_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ANSI = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-Z\\\\-_])")
_REASONS_MAX = 20
_FREE_WIDTH_MIN = 24

_STYLES = {
    "running": "green",
    "up": "green",
    "ok": "green",
    "yes": "green",
    "starting": "cyan",
    "moving": "cyan",
    "pending": "yellow",
    "suspect": "yellow",
    "draining": "yellow",
    "unavailable": "yellow",
    "warning": "yellow",
    "failed": "red",
    "down": "red",
    "critical": "red",
    "stopped": "dim",
    "hibernated": "dim",
}


class ReaderGoneError(Exception):
    """Whoever read our output has seen enough, as ``head`` does; no error, exit code 0."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its title and what it shows of a row."""

    title: str
    value: Callable[[Any], object]
    free: bool = False
    """Prose that may be folded on a narrow terminal; everything else is kept whole."""
    right: bool = False


def clean(value: object) -> str:
    """*value* as one line for a terminal: no control characters, no escape sequences."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        value = f"{value:g}"
    text = _ANSI.sub("", str(value))
    text = re.sub(r"\s*\n\s*", " ⏎ ", text.strip("\n"))
    return _CONTROL.sub("", text.replace("\t", " "))


def plain(value: Any) -> Any:
    """Models, lists and dicts of models as JSON values."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    return value


# ---- documents ----------------------------------------------------------------------------


def document(shared: Shared, value: Any) -> bool:
    """Print *value* as JSON or YAML if that is wanted; False: print for people instead."""
    if shared.format is Output.TABLE:
        return False
    if shared.format is Output.JSON:
        print_json(value)
    else:
        print_yaml(value)
    return True


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that is safe to show on a terminal."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(
        plain(value), ensure_ascii=False, indent=indent, separators=separators, default=str
    )
    return _ESCAPED_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    write(json_text(value, indent=2))


def print_line(value: Any) -> None:
    """One JSON document on one line of stdout, at once."""
    write(json_text(value))


def print_yaml(value: Any) -> None:
    """One YAML document on stdout."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(plain(value), text)
    write(text.getvalue().removesuffix("\n"))


def write(text: str) -> None:
    """A line on stdout, at once.

    Raises:
        ReaderGoneError: nobody reads it any more.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered must not be tried again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError from None


def talk(text: str) -> None:
    """A line for people on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---- tables ---------------------------------------------------------------------------------


def is_fancy(stream: TextIO) -> bool:
    """Whether *stream* is a terminal that takes colours and cursor movement."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def table(columns: Sequence[Column], rows: Sequence[Any], *, empty: str = "") -> None:
    """Print *rows* for people; *empty* is said on stderr where there is none."""
    if not rows:
        if empty:
            talk(empty)
        return
    cells = [[clean(column.value(row)) for column in columns] for row in rows]
    if is_fancy(sys.stdout):
        _rich_table(columns, cells)
    else:
        _plain_table(columns, cells)


def _plain_table(columns: Sequence[Column], cells: list[list[str]]) -> None:
    titles = [column.title.upper() for column in columns]
    widths = [max(len(line[index]) for line in [titles, *cells]) for index in range(len(columns))]
    for line in [titles, *cells]:
        parts = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ]
        write("  ".join(parts).rstrip())


def _rich_table(columns: Sequence[Column], cells: list[list[str]]) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="bold")
    needed = 0
    for index, column in enumerate(columns):
        width = max([cell_len(column.title), *(cell_len(line[index]) for line in cells)])
        least = min(width, _FREE_WIDTH_MIN) if column.free else width
        needed += least + 2
        view.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=not column.free,
            min_width=least,
            overflow="fold",
        )
    for line in cells:
        view.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in line))
    # Too narrow a terminal gets lines that are too long rather than ids that are cut.
    width = max(needed, shutil.get_terminal_size().columns)
    Console(width=width, highlight=False, markup=False, emoji=False).print(view)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """*text* in a colour where the stream shows colours."""
    target = sys.stdout if stream is None else stream
    if os.environ.get("NO_COLOR") or not is_fancy(target):
        return text
    codes = {"green": "32", "yellow": "33", "red": "31", "cyan": "36", "dim": "2", "bold": "1"}
    return f"\x1b[{codes[style]}m{text}\x1b[0m" if style in codes else text


def style_of(word: str) -> str:
    """The style of a status, for rich; empty for other words."""
    return _STYLES.get(word, "")


def status_word(word: str) -> str:
    """A status in its colour."""
    return styled(clean(word), _STYLES.get(word, ""))


def record(items: Sequence[tuple[str, object]]) -> None:
    """Names and values, one a line."""
    width = max(len(name) for name, _ in items)
    for name, value in items:
        text = clean(value)
        write(f"{name.ljust(width)}  {status_word(text) if text in _STYLES else text}")


def age(text: str | None) -> str:
    """An RFC 3339 time as "12s ago"; as it is where it is no time."""
    if not text:
        return "-"
    from datetime import UTC, datetime

    try:
        then = datetime.fromisoformat(text.replace("Z", "+00:00"))
        seconds = (datetime.now(UTC) - then).total_seconds()
    except (ValueError, TypeError):
        return text
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def labels_text(labels: Mapping[str, Any] | None) -> str:
    """A dict as ``a=1,b=2``."""
    if not labels:
        return ""
    return ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in sorted(labels.items())
    )


class Progress:
    """What is happening now, on stderr: repainted on a terminal, changed lines elsewhere.

    Silent with ``-o json`` or ``-o yaml``, so that stderr holds only errors.
    """

    def __init__(self, shared: Shared) -> None:
        self._silent = shared.format is not Output.TABLE
        self._repaint = is_fancy(sys.stderr) and sys.stderr.isatty()
        self._painted = 0
        self._said: set[str] = set()

    @property
    def repaints(self) -> bool:
        """Whether what is shown is replaced, rather than followed, by what comes next."""
        return self._repaint

    def end(self, lines: Sequence[str] = ()) -> None:
        """Show *lines* and leave them standing."""
        if lines:
            self.show(lines)
            self._painted = 0
        else:
            self.clear()

    def show(self, lines: Sequence[str]) -> None:
        """Replace what was shown by *lines*."""
        if self._silent:
            return
        if not self._repaint:
            for line in lines:
                if line not in self._said:
                    talk(line)
            self._said = set(lines)
            return
        width = shutil.get_terminal_size().columns - 1
        self.clear()
        for line in lines:
            sys.stderr.write(line[:width] + "\n")
        self._painted = len(lines)
        sys.stderr.flush()

    def clear(self) -> None:
        """Take away what was shown, on a terminal."""
        if self._repaint and self._painted:
            sys.stderr.write(f"\x1b[{self._painted}A\x1b[J")
            sys.stderr.flush()
            self._painted = 0


# ---- errors -----------------------------------------------------------------------------------


def exit_code(error: BaseException) -> int:
    """The exit code the contract gives *error*."""
    from foundation_nats import errors

    match error:
        case errors.PermissionDeniedError():
            return DENIED
        case errors.NotFoundError():
            return NOT_FOUND
        case errors.NotSettledError():
            return NOT_SETTLED
        case errors.NoRespondersError():
            return FAILED
        case errors.BusUnavailableError():
            return UNREACHABLE
        case errors.ConfigError():
            return USAGE
    return FAILED


def print_error(
    message: str,
    *,
    code: str,
    hint: str | None = None,
    details: Mapping[str, Any] | None = None,
    as_json: bool = False,
) -> None:
    """Say what went wrong on stderr; never fails itself."""
    details = dict(details or {})
    with contextlib.suppress(OSError, ValueError):
        if as_json:
            body = {"code": code, "message": message, "hint": hint, "details": details}
            talk(json_text({"error": body}))
            return
        text = clean(message) + (f" {clean(hint)}" if hint else "")
        talk(f"{styled('error:', 'red', sys.stderr)} {text}")
        for value in details.values():
            if isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()):
                for name, reason in list(value.items())[:_REASONS_MAX]:
                    talk(f"  {clean(name)}: {clean(reason)}")
                if len(value) > _REASONS_MAX:
                    talk(f"  … and {len(value) - _REASONS_MAX} more")


def report(error: BaseException, *, as_json: bool) -> int:
    """Say *error* on stderr and return its exit code."""
    from foundation_nats.errors import FoundationError

    if isinstance(error, FoundationError):
        details = plain(error.details)
        if error.outcome == "unknown":
            details = {"outcome": "unknown", **details}
        print_error(
            error.message, code=error.code, hint=error.hint, details=details, as_json=as_json
        )
        return exit_code(error)
    if os.environ.get("FOUNDATION_DEBUG"):
        import traceback

        traceback.print_exception(error)
    print_error(
        f"This should not have happened: {type(error).__name__}: {error}.",
        code="internal",
        hint="Set FOUNDATION_DEBUG=1 for the traceback, and please report it.",
        as_json=as_json,
    )
    return FAILED
