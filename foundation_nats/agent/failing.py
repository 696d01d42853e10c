"""What a handler raised, as a `HandlerError` that names the user's line. Pure."""

from __future__ import annotations

from foundation_nats.base import frames
from foundation_nats.errors import HandlerError


def handler_error(error: BaseException, doing: str = "") -> HandlerError:
    """``RuntimeError: no such order (orders.py:14 in Orders.find)``, with the traceback.

    Args:
        doing: what comes before it in the message, such as ``"on_start raised "``.
    """
    return HandlerError(
        f"{doing}{frames.summary(error)}",
        traceback=frames.trace(error),
        where=frames.where(error) or None,
    )
