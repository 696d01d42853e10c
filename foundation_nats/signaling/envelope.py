"""Signals as bytes: making envelopes, and the ids under which the server remembers them.

Pure. The server remembers a ``Nats-Msg-Id`` over the whole stream, not per
subject (F6), so the id is a hash of target, source and signal id. Ids of
emitted signals derive from the cause, the sender's private salt, the index and
the target: a repeat has the same id, and nobody else can guess it.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.rpc import to_json

BOX = "~"
"""How the names of mailboxes begin that belong to no agent, but hold the answers to stored questions."""
SENT = f"{BOX}sent-"
"""How the boxes of senders begin that wait for what becomes of a signal; they are told of a passed deadline too."""
ANSWER = "foundation.answer"
"""The type of such an answer."""


def message_id(target: str, source: str, signal_id: str) -> str:
    """What the server deduplicates by: 32 hex digits."""
    return blake2b(f"{target}\n{source}\n{signal_id}".encode(), digest_size=16).hexdigest()


def emitted_id(salt: str, cause: str, index: int, target: str) -> str:
    """The id of the *index*-th signal emitted because of *cause*: 32 hex digits."""
    return blake2b(f"{salt}\n{cause}\n{index}\n{target}".encode(), digest_size=16).hexdigest()


def traceparent_for(signal_id: str, inherited: str | None) -> str:
    """A W3C trace context: the inherited trace with a new span, or a new trace named after the id."""
    digest = blake2b(signal_id.encode(), digest_size=24).hexdigest()
    if inherited and len(inherited) == 55:
        return f"{inherited[:36]}{digest[:16]}{inherited[52:]}"
    return f"00-{digest[:32]}-{digest[32:]}-01"


def encode_envelope(
    *,
    id: str,
    source: str,
    type: str,
    target: str,
    data: Any,
    traceparent: str | None = None,
    cause: str | None = None,
    deadline: str | None = None,
    attempts: int | None = None,
    onerror: str | None = None,
    replyto: str | None = None,
    urgent: bool = False,
) -> bytes:
    """A CloudEvents 1.0 envelope in structured mode.

    Raises:
        TypeError: *data* holds something that JSON can't say; names it.
    """
    body: dict[str, Any] = {
        "specversion": "1.0",
        "id": id,
        "source": source,
        "type": type,
        "subject": target,
        "time": utc_text(),
        "datacontenttype": "application/json",
        "data": data,
        "traceparent": traceparent_for(id, traceparent),
    }
    if cause is not None:
        body["cause"] = cause
    if deadline is not None:
        body["deadline"] = deadline
    if attempts is not None:
        body["attempts"] = attempts
    if onerror:
        body["onerror"] = onerror
    if replyto is not None:
        body["replyto"] = replyto
    if urgent:
        body["urgent"] = True
    return to_json(body)
