"""What an agent's mailbox still holds: `read_history` lists it, `read_recording` is what a replay needs.

A handled signal stays in its mailbox for about a minute as evidence against late repeats, and as long as
`mailbox.history` says; an unread one until it is handled. Nothing else is kept for this question. The
cursor in the state record decides what was handled. What a signal caused is found by the ids that the
emitted ones carry as their cause, in the mailboxes of others, as far as those still hold them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import Field

from foundation_nats.agent.past import base_key
from foundation_nats.agent.record import decode_record
from foundation_nats.api.tracking import SEARCHED_MAX, Effect, parsed
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.errors import (
    AgentNotFoundError,
    BusError,
    DecodeError,
    FoundationError,
    NotFoundError,
)
from foundation_schemas import DeadLetter, StateRecord, StoredBase
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

LAST_DEFAULT = 50
_BATCH = 1000
_TRACED_MAX = 1000
_TRACE_S = 0.5


class Outcome(StrEnum):
    """What became of a signal in a mailbox."""

    HANDLED = "handled"
    DEAD = "dead"
    """Given up; it took no effect."""
    VOID = "void"
    """Given up, and its letter is gone; or it was given to another agent."""
    UNREAD = "unread"


class PastSignal(WireModel):
    """One signal in a mailbox."""

    sequence: int
    at: str
    """When the server stored it."""
    outcome: Outcome
    id: str | None = None
    type: str | None = None
    source: str | None = None
    cause: str | None = None
    """The id of the signal because of which it was emitted."""
    data: Any = None
    dead_number: int | None = None
    reason: str | None = None
    attempts: int | None = None
    took_ms: float | None = None
    """None, as `attempts`: its worker doesn't remember."""
    effects: list[Effect] | None = None
    """What its handling emitted, as far as mailboxes still hold it; None: not looked for."""


class History(WireModel):
    """What a mailbox still holds; the JSON of ``foundation history AGENT -o json``."""

    agent: str
    cursor: int
    """Up to this sequence signals were handled."""
    unread: int
    """How many lie beyond it."""
    kept: int
    """How many handled ones are still there."""
    replay_from: int | None = None
    """The cursor of the oldest stored state, from which a replay can begin; None: none is kept."""
    signals: list[PastSignal] = Field(default_factory=list)
    """The newest of them, oldest first."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A state that an agent had, and every signal that it has handled since."""

    agent: str
    run: str
    config: dict[str, Any]
    bases: tuple[StoredBase, ...]
    """Where it begins, and what it must have come to later on; oldest first."""
    record: StateRecord
    """What it must have come to in the end."""
    messages: tuple[StoredMessage, ...]
    """Those that it has handled since the first base."""
    dead: frozenset[int]
    """Sequences of those that have a dead letter."""


async def read_history(
    cluster: Cluster, agent: str, *, last: int = LAST_DEFAULT, effects: bool = False
) -> History:
    """The newest *last* signals in the mailbox of *agent*, handled and unread.

    Raises:
        AgentNotFoundError: there is none, and nothing of it.
        BusUnavailableError, BusTimeoutError
    """
    record = await _record(cluster, agent)
    cursor = 0 if record is None else record.cursor
    reader = StreamReader(cluster.bus, cluster.subjects.signals_stream)
    newest: deque[StoredMessage] = deque(maxlen=last)
    kept = unread = 0
    start = 1
    while True:
        messages, more = await reader.page(cluster.subjects.mailbox(agent), start, batch=_BATCH)
        newest.extend(messages)
        handled = sum(message.sequence <= cursor for message in messages)
        kept, unread = kept + handled, unread + len(messages) - handled
        if not more or not messages:
            break
        start = messages[-1].sequence + 1
    if record is None and not newest:
        await cluster.agents.get(agent)  # raises where there is none
    letters, traces = await asyncio.gather(
        _letters(cluster, agent), _traces(cluster, agent, [item.sequence for item in newest])
    )
    void = set() if record is None or record.past is None else set(record.past.void)
    found = [_signal(item, cursor, void, letters, traces) for item in newest]
    if effects and found:
        found = await _with_effects(cluster, agent, found)
    bases = [] if record is None else await _bases(cluster, agent, record)
    return History(
        agent=agent,
        cursor=cursor,
        unread=unread,
        kept=kept,
        replay_from=bases[0].cursor if bases else None,
        signals=found,
    )


async def read_recording(cluster: Cluster, agent: str) -> Recording:
    """What a replay of *agent* needs; all of it was so at one moment.

    Raises:
        AgentNotFoundError: there is no such agent, or nothing is stored of it.
        NotFoundError: it keeps no past from which a replay could begin; says what to do.
        BusUnavailableError, BusTimeoutError
    """
    info = await cluster.agents.get(agent)
    wish = (await cluster.deployments.wishes()).get(info.deployment or agent)
    record = await _record(cluster, agent)
    if record is None:
        raise AgentNotFoundError(f"Nothing is stored of agent {agent!r}.", id=agent)
    bases = await _bases(cluster, agent, record)
    if not bases:
        raise NotFoundError(
            f"Agent {agent!r} keeps no state to begin a replay with.",
            hint="Set `history = 1000` in its class, or FOUNDATION_MAILBOX__HISTORY=1000 for the "
            "nodes, and restart it: what it handles from then on can be replayed.",
            agent=agent,
        )
    reader = StreamReader(cluster.bus, cluster.subjects.signals_stream)
    found: list[StoredMessage] = []
    start = bases[0].cursor + 1
    while start <= record.cursor:
        messages, more = await reader.page(cluster.subjects.mailbox(agent), start, batch=_BATCH)
        found += [message for message in messages if message.sequence <= record.cursor]
        if not more or not messages or messages[-1].sequence >= record.cursor:
            break
        start = messages[-1].sequence + 1
    # While this was read the agent has gone on, and its mailbox may have been trimmed: only
    # a base that is still named now has all its signals behind it.
    again = await _record(cluster, agent)
    named = [] if again is None or again.past is None else again.past.bases
    good = [base for base in bases if any(_same(base, item) for item in named)]
    if not good:
        raise NotFoundError(
            f"Agent {agent!r} handles signals faster than they can be read.",
            hint="Try again, or keep more of them (`history`).",
            agent=agent,
        )
    return Recording(
        agent=agent,
        run=record.run or info.run,
        config={} if wish is None else wish.spec.config,
        bases=tuple(good),
        record=record,
        messages=tuple(item for item in found if item.sequence > good[0].cursor),
        dead=frozenset(await _letters(cluster, agent)),
    )


async def _record(cluster: Cluster, agent: str) -> StateRecord | None:
    entry = await Bucket(cluster.bus, cluster.subjects, "state").read(agent)
    return None if entry is None or entry.value is None else decode_record(agent, entry.value)


def _same(base: StoredBase, named: Any) -> bool:
    return (base.place, base.cursor, base.handled, base.asides) == (
        named.place,
        named.cursor,
        named.handled,
        named.asides,
    )


async def _bases(cluster: Cluster, agent: str, record: StateRecord) -> list[StoredBase]:
    """The bases that *record* names and that are stored as it says, oldest first."""
    named = [] if record.past is None else record.past.bases
    state = Bucket(cluster.bus, cluster.subjects, "state")
    found = []
    for base in named:
        entry = await state.read(base_key(agent, base.place))
        if entry is None or entry.value is None:
            continue
        try:
            stored = rpc.decode(StoredBase, entry.value)
        except DecodeError:
            continue
        if _same(stored, base):  # else a newer one has its place already
            found.append(stored)
    return found


async def _letters(cluster: Cluster, agent: str) -> dict[int, tuple[int, DeadLetter]]:
    """Dead letters of *agent* by the sequence of the signal, with their numbers."""
    reader = StreamReader(cluster.bus, cluster.subjects.dead_stream)
    found: dict[int, tuple[int, DeadLetter]] = {}
    start = 1
    while True:
        messages, more = await reader.page(cluster.subjects.dead(agent), start, batch=_BATCH)
        for message in messages:
            try:
                letter = rpc.decode(DeadLetter, message.data)
            except DecodeError:
                continue
            found[letter.sequence] = message.sequence, letter
        if not more or not messages:
            return found
        start = messages[-1].sequence + 1


async def _traces(cluster: Cluster, agent: str, sequences: list[int]) -> dict[int, Any]:
    """What the worker that hosts it remembers; empty if it doesn't run."""
    question = orjson.dumps({"sequences": sequences[-_TRACED_MAX:]})
    try:
        reply = await cluster.bus.request(cluster.subjects.trace(agent), question, timeout=_TRACE_S)
        told = rpc.read_reply(reply.data) or {}
    except (BusError, FoundationError):
        return {}
    return {int(sequence): item for sequence, item in told.items()}


def _signal(
    message: StoredMessage,
    cursor: int,
    void: set[int],
    letters: dict[int, tuple[int, DeadLetter]],
    traces: dict[int, Any],
) -> PastSignal:
    body = parsed(message)
    number, letter = letters.get(message.sequence, (None, None))
    trace = traces.get(message.sequence) or {}
    if message.sequence > cursor:
        outcome, trace = Outcome.UNREAD, {}
    elif letter is not None:
        outcome = Outcome.DEAD
    else:
        outcome = Outcome.VOID if message.sequence in void else Outcome.HANDLED
    return PastSignal(
        sequence=message.sequence,
        at=message.time,
        outcome=outcome,
        id=body.get("id"),
        type=body.get("type"),
        source=body.get("source"),
        cause=body.get("cause"),
        data=body.get("data"),
        dead_number=number,
        reason=None if letter is None else letter.reason,
        attempts=trace.get("attempts") if letter is None else letter.attempts,
        took_ms=round(float(trace["took_ms"]), 3) if "took_ms" in trace else None,
    )


async def _with_effects(
    cluster: Cluster, agent: str, signals: list[PastSignal]
) -> list[PastSignal]:
    """The same, with what each has caused to be emitted, of what mailboxes still hold."""
    reader = StreamReader(cluster.bus, cluster.subjects.signals_stream)
    last = int((await reader.info())["state"]["last_seq"])
    start = max(signals[0].sequence, last - SEARCHED_MAX + 1)
    wanted = {signal.id for signal in signals}
    source, needle = f"agent:{agent}", orjson.dumps(f"agent:{agent}")
    found: dict[str, list[Effect]] = {}
    while True:
        messages, more = await reader.page(None, start, batch=_BATCH)
        for message in messages:
            if needle not in message.data:
                continue
            body = parsed(message)
            cause = body.get("cause")
            if body.get("source") == source and cause in wanted:
                found.setdefault(str(cause), []).append(
                    Effect(
                        id=str(body.get("id")),
                        type=str(body.get("type")),
                        target=str(body.get("subject")),
                        sequence=message.sequence,
                    )
                )
        if not more or not messages:
            break
        start = messages[-1].sequence + 1
    return [
        signal.model_copy(update={"effects": found.get(signal.id or "", [])}) for signal in signals
    ]


__all__ = ["History", "Outcome", "PastSignal", "Recording", "read_history", "read_recording"]
