"""`bury`: make a signal that can't be delivered a dead letter, once however often it is repeated."""

from __future__ import annotations

from typing import Any

import orjson

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import PayloadTooLargeError
from foundation_schemas import DeadLetter

_RAW_MAX = 4_000


def content(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """A dead letter's `signal` and `raw`: the envelope, or the bytes that are none."""
    try:
        body = orjson.loads(data)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body, None
    return None, data[:_RAW_MAX].decode("utf-8", "replace")


async def bury(
    bus: Bus,
    subjects: Subjects,
    agent: str,
    data: bytes,
    *,
    code: str,
    reason: str,
    msg_id: str,
    attempts: int = 1,
) -> None:
    """Store a dead letter of *agent* (or of ``route``); repeats under one *msg_id* are dropped.

    Raises:
        BusTimeoutError, BusUnavailableError: not stored, or not known.
        MailboxFullError: there is no room for dead letters.
    """
    signal, raw = content(data)
    letter = DeadLetter(
        agent=agent,
        signal=signal,
        raw=raw,
        code=code,
        reason=reason,
        attempts=attempts,
        at=utc_text(),
    )
    subject, headers = subjects.dead(agent), {"Nats-Msg-Id": msg_id}
    try:
        await append(
            bus, subject, letter.model_dump_json(exclude_none=True).encode(), headers=headers
        )
    except PayloadTooLargeError:
        raw = data[:_RAW_MAX].decode("utf-8", "replace")
        brief = letter.model_copy(update={"signal": None, "raw": raw})
        await append(
            bus, subject, brief.model_dump_json(exclude_none=True).encode(), headers=headers
        )
