"""What became of a signal: put together from the streams, the records, and what workers remember.

Nothing is kept for this question, so the answer is as good as what is there: a signal that waits is
found for ever, a handled one while its mailbox keeps it as evidence (`mailbox.trim_min_age_s`),
a dead letter until it is discarded. The cursor in the state record decides whether a signal
was handled; node and epoch are those of the record's latest commit unless the worker that
handled it remembers.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import Field

from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import read_reply
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.errors import BusError, FoundationError
from foundation_nats.signaling.schedules import SIGNALS, read_timer, timer_name
from foundation_schemas import DeadLetter
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

SEARCHED_MAX = 100_000
_BATCH = 1000
_TRACE_S = 0.5


class SignalState(StrEnum):
    """How far a signal has come."""

    SCHEDULED = "scheduled"
    EXPANDING = "expanding"
    WAITING = "waiting"
    HANDLED = "handled"
    DEAD = "dead"


class Effect(WireModel):
    """A signal that was emitted because of this one."""

    id: str
    type: str
    target: str
    sequence: int = 0


class Delivery(WireModel):
    """One receiver's copy."""

    agent: str
    state: SignalState
    sequence: int | None = None
    """Its place in the mailbox."""
    accepted_at: str | None = None
    """The server's time."""
    handled_by: str | None = None
    """The node; that of the agent's latest commit if no worker remembers."""
    epoch: int | None = None
    took_ms: float | None = None
    attempts: int | None = None
    emitted: int | None = None
    """None, like the two before it: nobody remembers."""
    dead_number: int | None = None
    reason: str | None = None
    code: str | None = None


class SignalStatus(WireModel):
    """The JSON of ``foundation signal ID -o json``."""

    id: str
    state: SignalState
    """`handled` once every copy is."""
    type: str | None = None
    source: str | None = None
    target: str | None = None
    due: str | None = None
    deadline: str | None = None
    deliveries: list[Delivery] = Field(default_factory=list)
    counts: dict[str, int] = Field(default_factory=dict)
    """State to how many receivers are in it."""
    effects: list[Effect] = Field(default_factory=list)
    """Of what it caused to be emitted, what is still in mailboxes."""
    searched_from: int = 0
    """The oldest sequence of the mailboxes that was looked at; what lies before is not known."""


async def read_all(
    reader: StreamReader, subject: str | None, needle: bytes, start: int = 1
) -> list[StoredMessage]:
    """The messages from *start* on that hold *needle* somewhere."""
    found: list[StoredMessage] = []
    for _ in range(2 * SEARCHED_MAX // _BATCH):
        messages, more = await reader.page(subject, start, batch=_BATCH)
        found += [message for message in messages if needle in message.data]
        if not more or not messages:
            break
        start = messages[-1].sequence + 1
    return found


def parsed(message: StoredMessage) -> dict[str, Any]:
    """Its envelope; empty where it is none."""
    try:
        body = orjson.loads(message.data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


async def track(cluster: Cluster, id: str, agent: str | None) -> SignalStatus | None:
    """What is known of the signal *id*; None if nothing is."""
    subjects, bus = cluster.subjects, cluster.bus
    needle = orjson.dumps(id)
    signals = StreamReader(bus, subjects.signals_stream)
    state = (await signals.info())["state"]
    first = int(state["first_seq"])
    start = first if agent is not None else max(first, int(state["last_seq"]) - SEARCHED_MAX + 1)
    stored, routes, letters = await asyncio.gather(
        read_all(signals, None if agent is None else subjects.mailbox(agent), needle, start),
        read_all(StreamReader(bus, subjects.routes_stream), None, needle),
        read_all(
            StreamReader(bus, subjects.dead_stream),
            subjects.dead_all() if agent is None else subjects.dead(agent),
            needle,
        ),
    )
    facts: dict[str, Any] = {}
    deliveries: dict[str, Delivery] = {}
    effects: list[Effect] = []
    for message in stored:
        body = parsed(message)
        if body.get("id") == id:
            facts = facts or body
            name = message.subject.rpartition(".")[2]
            deliveries[name] = Delivery(
                agent=name,
                state=SignalState.WAITING,
                sequence=message.sequence,
                accepted_at=message.time,
            )
        elif body.get("cause") == id:
            effects.append(
                Effect(
                    id=str(body.get("id")),
                    type=str(body.get("type")),
                    target=str(body.get("subject")),
                    sequence=message.sequence,
                )
            )
    await _settle(cluster, deliveries)
    for message in letters:
        letter = DeadLetter.model_validate_json(message.data)
        if (letter.signal or {}).get("id") != id:
            continue
        facts = facts or dict(letter.signal or {})
        known = deliveries.get(letter.agent) or Delivery(
            agent=letter.agent, state=SignalState.DEAD, sequence=letter.sequence or None
        )
        deliveries[letter.agent] = known.model_copy(
            update={
                "state": SignalState.DEAD,
                "dead_number": message.sequence,
                "reason": letter.reason,
                "code": letter.code,
                "attempts": letter.attempts,
            }
        )
    expanding = [body for message in routes if (body := parsed(message)).get("id") == id]
    due, scheduled = await _scheduled(cluster, id)
    facts = facts or (expanding or [scheduled])[0]
    if not facts:
        return None
    counts: dict[str, int] = {}
    for delivery in deliveries.values():
        counts[delivery.state] = counts.get(delivery.state, 0) + 1
    return SignalStatus(
        id=id,
        state=_state(counts, is_expanding=bool(expanding), is_scheduled=due is not None),
        type=facts.get("type"),
        source=facts.get("source"),
        target=facts.get("subject"),
        deadline=facts.get("deadline"),
        due=due,
        deliveries=[deliveries[name] for name in sorted(deliveries)],
        counts=counts,
        effects=effects,
        searched_from=start,
    )


def _state(counts: dict[str, int], *, is_expanding: bool, is_scheduled: bool) -> SignalState:
    if is_expanding:
        return SignalState.EXPANDING
    for state in (SignalState.WAITING, SignalState.DEAD, SignalState.HANDLED):
        if counts.get(state):
            return state
    assert is_scheduled
    return SignalState.SCHEDULED


async def _scheduled(cluster: Cluster, id: str) -> tuple[str | None, dict[str, Any]]:
    timers = StreamReader(cluster.bus, cluster.subjects.timers_stream)
    armed = await timers.last_from_leader(cluster.subjects.timer(SIGNALS, timer_name(id)))
    if armed is None:
        return None, {}
    try:
        if read_timer(armed.headers).is_cancel:
            return None, {}
    except ValueError:
        return None, {}
    return armed.headers["Fnd-Due"], parsed(armed)


async def _settle(cluster: Cluster, deliveries: dict[str, Delivery]) -> None:
    """Say of each copy whether it was handled, and what else is known of it."""
    if not deliveries:
        return
    records = await Bucket(cluster.bus, cluster.subjects, "state").read_many(list(deliveries))
    told = await asyncio.gather(
        *(_remembered(cluster, name, item) for name, item in deliveries.items())
    )
    for (name, item), trace in zip(list(deliveries.items()), told, strict=True):
        entry = records.get(name)
        try:
            record = {} if entry is None or entry.value is None else orjson.loads(entry.value)
        except ValueError:
            record = {}
        sequence = item.sequence or 0
        is_ahead = any(number == sequence for number, _ in record.get("ahead", ()))
        is_handled = is_ahead or int(record.get("cursor", 0)) >= sequence
        if not record and trace:
            is_handled = True  # it keeps no record
        if not is_handled:
            continue
        update: dict[str, Any] = {
            "state": SignalState.HANDLED,
            "epoch": record.get("epoch"),
            "handled_by": (record.get("writer") or {}).get("node"),
        }
        if trace:
            update |= {
                "epoch": trace["epoch"],
                "took_ms": round(float(trace["took_ms"]), 3),
                "attempts": trace["attempts"],
                "emitted": trace["emitted"],
            }
        deliveries[name] = item.model_copy(update=update)


async def _remembered(cluster: Cluster, name: str, item: Delivery) -> dict[str, Any]:
    """What the worker that hosts the agent remembers of it; empty if it doesn't."""
    question = orjson.dumps({"sequences": [item.sequence]})
    try:
        reply = await cluster.bus.request(cluster.subjects.trace(name), question, timeout=_TRACE_S)
        found: dict[str, Any] = read_reply(reply.data) or {}
    except (BusError, FoundationError):
        return {}
    return dict(found.get(str(item.sequence)) or {})
