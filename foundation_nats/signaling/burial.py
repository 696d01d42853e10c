"""`bury`: make a signal that can't be delivered a dead letter, once however often it is repeated.

And `words`: who is to be told of it. A signal may name a box in which its sender waits for the
outcome (`replyto`), and, from an agent, the type of a signal that it gets back (`onerror`).

Pure, but for `bury`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import ExpiredError, MailboxFullError, PayloadTooLargeError
from foundation_nats.signaling.envelope import ANSWER, BOX, SENT, encode_envelope, message_id
from foundation_schemas import DeadLetter, GivenUp, Target, TargetKind
from foundation_schemas.base import is_name
from foundation_schemas.signal import ATTEMPTS_MAX, TYPE_LENGTH_MAX

_RAW_MAX = 4_000
_REASON_MAX = 1000
_DATA_MAX = 256_000
"""What is sent back with the bad news at most."""


@dataclass(frozen=True, slots=True)
class Word:
    """What somebody is told of a signal that was given up: where it is published, as what."""

    subject: str
    msg_id: str
    payload: bytes


def attempts_of(body: Mapping[str, Any] | None, otherwise: int) -> int:
    """How often a signal is tried: as it says itself, else *otherwise*."""
    said = None if body is None else body.get("attempts")
    if isinstance(said, int) and not isinstance(said, bool) and said >= 1:
        return min(said, ATTEMPTS_MAX)
    return otherwise


def words(
    subjects: Subjects,
    body: Mapping[str, Any] | None,
    letter: DeadLetter,
    *,
    source: str,
    seed: str,
) -> list[Word]:
    """Whom to tell of a dead letter, under ids that are the same for one *seed*.

    A box is a mailbox of no agent, so its name is none (`foundation_nats.coordination.desk`). Who
    set a deadline knows that it has passed, and is not told; but the boxes of senders that wait
    are. A signal that tells of another asks for nothing itself, so there is no end of it to fear.
    """
    found: list[Word] = []
    if body is None or not isinstance(body.get("id"), str):
        return found

    def tell(name: str, type: str, data: Any) -> None:
        target = str(Target(kind=TargetKind.AGENT, name=name))
        msg_id = message_id(target, f"given-up\n{type}", seed)
        payload = encode_envelope(
            id=msg_id,
            source=source,
            type=type,
            target=target,
            data=data,
            traceparent=body.get("traceparent"),
            cause=body["id"],
        )
        found.append(Word(subjects.mailbox(name), msg_id, payload))

    box = body.get("replyto")
    if (
        isinstance(box, str)
        and box.startswith(BOX)
        and is_name(box.removeprefix(BOX))
        and (letter.code != ExpiredError.code or box.startswith(SENT))
    ):
        error = {"code": letter.code, "message": letter.reason[:_REASON_MAX]}
        tell(box, ANSWER, {"error": error, "cause": body["id"]})
    type = body.get("onerror")
    sender = str(body.get("source") or "").partition("agent:")[2]
    if isinstance(type, str) and 0 < len(type) <= TYPE_LENGTH_MAX and is_name(sender):
        data = body.get("data")
        told = GivenUp(
            id=body["id"],
            type=str(body.get("type")),
            target=str(body.get("subject")),
            agent=letter.agent,
            code=letter.code,
            reason=letter.reason[:_REASON_MAX],
            attempts=letter.attempts,
            data=data if len(orjson.dumps(data)) <= _DATA_MAX else None,
        )
        tell(sender, type, told)
    return found


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
    for word in words(subjects, signal, letter, source="cluster", seed=msg_id):
        try:
            await append(bus, word.subject, word.payload, headers={"Nats-Msg-Id": word.msg_id})
        except MailboxFullError:
            continue  # there is the dead letter
