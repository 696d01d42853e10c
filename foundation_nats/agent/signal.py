"""`Signal`: one signal as a handler sees it.

Pure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Generic, TypeVar

from foundation_nats.signaling.schedules import read_time

T = TypeVar("T")


class Signal(Generic[T]):
    """One signal as a handler sees it: the CloudEvents attributes, and `data` in the handler's type."""

    __slots__ = (
        "attempt",
        "cause",
        "data",
        "deadline",
        "id",
        "sequence",
        "source",
        "time",
        "traceparent",
        "type",
    )

    def __init__(
        self,
        *,
        id: str,
        source: str,
        type: str,
        data: T,
        time: str | None = None,
        cause: str | None = None,
        traceparent: str | None = None,
        sequence: int = 0,
        attempt: int = 1,
        deadline: str | None = None,
    ) -> None:
        self.id = id
        self.source = source
        """``agent:<id>`` or ``client:<name>``."""
        self.type = type
        self.data = data
        self.time = time
        self.cause = cause
        """The id of the signal whose handling emitted this one."""
        self.traceparent = traceparent
        self.sequence = sequence
        """Its place in the mailbox; 0 for an ask."""
        self.deadline = None if deadline is None else _read_deadline(deadline)
        """After it the signal is not handled; hand it on by ``emit(…, deadline=signal.deadline)``."""
        self.attempt = attempt
        """1 at the first try; grows when the handler raised."""

    def __repr__(self) -> str:
        return f"Signal(type={self.type!r}, id={self.id!r}, source={self.source!r})"


def _read_deadline(text: str) -> datetime | None:
    try:
        return read_time(text)
    except (ValueError, TypeError):
        return None
