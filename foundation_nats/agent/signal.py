"""`Signal`: one signal as a handler sees it; `Payload`: data that knows its signal's type.

Pure.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from foundation_nats.errors import ConfigError
from foundation_nats.signaling.schedules import read_time

T = TypeVar("T")


class Payload(BaseModel):
    """The data of one type of signal, which knows that type.

    Such a class stands for its type in `on`, and an instance for type and data in ``emit``,
    ``send`` and ``ask``.

    Example:
        >>> class Add(Payload, type="counter.add"):
        ...     amount: int
    """

    signal_type: ClassVar[str] = ""

    def __init_subclass__(cls, *, type: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if type is not None:
            if not type or "*" in type or any(c.isspace() for c in type):
                raise ConfigError(f"{cls.__qualname__}: {type!r} is not a signal type")
            cls.signal_type = type


def typed(type: str | Payload, data: Any) -> tuple[str, Any]:
    """Type and data of a signal, from what was given for both.

    Raises:
        ConfigError: a `Payload` with further data, or one that knows no type.
    """
    if isinstance(type, str):
        return type, data
    if data is not None:
        raise ConfigError(f"{type!r} is the data already")
    if not type.signal_type:
        raise ConfigError(
            f"{type.__class__.__qualname__} has no signal type: "
            f"class {type.__class__.__qualname__}(Payload, type='…')"
        )
    return type.signal_type, type


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
