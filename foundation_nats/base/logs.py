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
from dataclasses import dataclass
from typing import Any

import structlog


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


def get_logger(component: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one component."""
    if _settings.json:
        renderer: Any = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if _settings.json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_settings.level),
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    return logger.bind(component=component)
