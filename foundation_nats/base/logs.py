"""Structured logs: one line per event, constant text, data in fields, to standard error.

Payloads and credentials are never logged. Levels: error = a person must act;
warning = we degraded and say how; info = life cycle; debug = the rest.

The format belongs to this library alone: a program's own structlog settings
are neither used nor changed. Until `configure` is called only warnings and
errors are written.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog.processors
import structlog.typing


@dataclass(slots=True)
class _Settings:
    level: int = logging.WARNING
    json: bool = False


_settings = _Settings()

# nats-py reports through the standard library; what matters of it reaches us by
# its callbacks.
logging.getLogger("nats").setLevel(logging.CRITICAL)


def configure(*, level: str = "info", json: bool = False) -> None:
    """Set the process's log format once, at its start, before loggers are made."""
    _settings.level = getattr(logging, level.upper(), logging.INFO)
    _settings.json = json


def _line(_logger: object, _method: str, event: MutableMapping[str, Any]) -> str:
    """``time level component: text key=value …``, and a traceback on lines of its own.

    structlog's own console renderer would import rich into every worker.
    """
    head = f"{event.pop('timestamp')} {event.pop('level'):<8}{event.pop('component', '')}:"
    text, trace = event.pop("event"), event.pop("exception", None)
    fields = "".join(f" {key}={value}" for key, value in event.items())
    return f"{head} {text}{fields}" + (f"\n{trace}" if trace else "")


def get_logger(component: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one component."""
    renderer: Any = structlog.processors.JSONRenderer() if _settings.json else _line
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_settings.level),
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    return logger.bind(component=component)
