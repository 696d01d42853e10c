"""Structured logs over the standard library: constant text, data in fields, one line per event.

Payloads and credentials are never logged. Levels: error = a person must act;
warning = we degraded and say how; info = life cycle; debug = the rest.

Everything goes through loggers named ``foundation_nats.<component>``, so a
program that embeds this library directs it with `logging` as it likes;
`configure` is for processes of our own. (structlog is not used because
importing it takes 80 ms, in every worker.)
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from foundation_nats.base.failpoint import planted_bugs

_ROOT = "foundation_nats"
_FIELDS = "foundation_fields"

# nats-py reports through the standard library; what matters of it reaches us by
# its callbacks.
logging.getLogger("nats").setLevel(logging.CRITICAL)


class Logger:
    """The logger of one component, with fields that every line of it carries."""

    __slots__ = ("_fields", "_logger")

    def __init__(self, logger: logging.Logger, fields: dict[str, Any]) -> None:
        self._logger = logger
        self._fields = fields

    def bind(self, **fields: Any) -> Logger:
        """A logger that adds *fields* to every line."""
        return Logger(self._logger, {**self._fields, **fields})

    def _log(
        self, level: int, text: str, fields: dict[str, Any], error: BaseException | bool | None
    ) -> None:
        if self._logger.isEnabledFor(level):
            merged = {**self._fields, **fields}
            shown = "".join(f" {key}={value}" for key, value in merged.items())
            extra = {_FIELDS: (text, merged)}
            self._logger.log(level, "%s%s", text, shown, exc_info=error or None, extra=extra)

    def debug(self, text: str, **fields: Any) -> None:
        """What a developer of this library wants to see."""
        self._log(logging.DEBUG, text, fields, None)

    def info(self, text: str, **fields: Any) -> None:
        """The life cycle."""
        self._log(logging.INFO, text, fields, None)

    def warning(self, text: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """We degraded, and say how."""
        self._log(logging.WARNING, text, fields, exc_info)

    def error(self, text: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """A person must act."""
        self._log(logging.ERROR, text, fields, exc_info)

    def exception(self, text: str, **fields: Any) -> None:
        """An error, with the traceback of the exception in hand."""
        self._log(logging.ERROR, text, fields, True)


class _LineFormatter(logging.Formatter):
    """``time level component: text key=value …``"""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s")
        self.datefmt = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        record.name = record.name.removeprefix(f"{_ROOT}.")
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        """The traceback, without our frames where it leads into a user's code."""
        from foundation_nats.base import frames

        error = ei[1]
        if error is None or frames.user_frame(frames.of_traceback(error.__traceback__)) is None:
            return super().formatException(ei)
        return frames.trace(error)


class _JsonFormatter(_LineFormatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        text, fields = getattr(record, _FIELDS, (record.getMessage(), {}))
        body = {
            "timestamp": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "component": record.name.removeprefix(f"{_ROOT}."),
            "event": text,
            **fields,
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def configure(*, level: str = "info", json: bool = False) -> None:
    """Write this process's log to standard error, in this format alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json else _LineFormatter())
    root = logging.getLogger(_ROOT)
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(getattr(logging, level.upper(), logging.INFO))
    if bugs := planted_bugs():
        get_logger("failpoint").warning(
            "safeguards are removed in this process (FOUNDATION_TEST_BUG); never do this in earnest",
            removed=", ".join(sorted(bugs)),
        )


def get_logger(component: str) -> Logger:
    """The logger of one component."""
    return Logger(logging.getLogger(f"{_ROOT}.{component}"), {})
