"""Structured logs: one line per event, constant text, data in fields, to standard error.

Payloads and credentials are never logged. Levels: error = a person must act;
warning = we degraded and say how; info = life cycle; debug = the rest.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure(*, level: str = "info", json: bool = False, **bound: Any) -> None:
    """Set the process's log format once, at its start."""
    renderer: Any
    if json:
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, level.upper(), logging.INFO)
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # nats-py reports through the standard library; what matters of it reaches
    # us by its callbacks.
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    if bound:
        structlog.contextvars.bind_contextvars(**bound)


def get_logger(component: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one component."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=component)
    return logger
