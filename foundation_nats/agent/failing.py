"""What a handler raised, as a `HandlerError` that names the user's line; and what is no signal. Pure."""

from __future__ import annotations

from foundation_nats.base import frames
from foundation_nats.errors import HandlerError, PayloadInvalidError


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


def malformed(data: bytes, error: Exception) -> PayloadInvalidError:
    """The error of something that is no signal at all."""
    return PayloadInvalidError(
        f"Not a CloudEvents 1.0 envelope in JSON: {type(error).__name__}: {str(error)[:200]}."
    )
