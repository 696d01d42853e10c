"""Signals for one of several whose receiver went away before it handled them go to another one.

A copy for ``any:`` (or for one of a topic's group) says so in a header. While its receiver
is not running, and is not about to be, the leader reads what its mailbox holds beyond its
cursor and moves such copies to a receiver that runs.

Exactly once, because of one compare-and-set: the sequences are first written into the absent
agent's state record as `skip`. Either the agent's own commit came first, then it has
handled the signal and the cursor says so; or the mark came first, then a commit of any
activation that still lives somewhere is refused, and later ones skip the signal. Only after
that the choice is changed, the copy is stored with the next one, and removed here, in this
order; a rerouter that dies half-way is repeated by its successor under the same ids.

Not covered: agents that keep no record (``durable = False``): at least once. A repeat of a
rerouter that died half-way, later than the stream remembers ids, looks for evidence first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from secrets import token_hex
from typing import Any

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import StoredMessage, StreamReader, append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.errors import (
    AlreadyExistsError,
    BusError,
    FoundationError,
    MailboxFullError,
    StaleRevisionError,
)
from foundation_nats.signaling.evidence import is_stored, parse_time
from foundation_nats.signaling.expander import (
    ANY_HEADER,
    PICK_TTL_S,
    copy_id,
    pick_name,
    read_choice,
)
from foundation_nats.signaling.receivers import pick, receivers, subscribers
from foundation_schemas import AgentRecord, AgentStatus, TargetKind

GRACE_S = 2.0
"""How long an agent may be away before its shared signals go to others."""
_EVERY_S = 0.5
_LOOK_AGAIN_S = 5.0
_AWAY = (
    AgentStatus.UNAVAILABLE,
    AgentStatus.FAILED,
    AgentStatus.PENDING,
    AgentStatus.STOPPED,
)


def is_away(record: AgentRecord) -> bool:
    """Whether the agent does not run and is not about to; one that is being stopped still runs."""
    return record.status in _AWAY


class Rerouter:
    """Moves shared signals away from agents that don't run; works while this node leads."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        registry: Registry,
        *,
        node: str,
        is_leader: Callable[[], bool],
        emit: Callable[..., None],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._registry = registry
        self._node = node
        self._is_leader = is_leader
        self._emit = emit
        self._state = Bucket(bus, subjects, "state")
        self._picks = Bucket(bus, subjects, "coordination")
        self._signals = StreamReader(bus, subjects.signals_stream)
        self._log = get_logger("rerouter")
        self._due: dict[str, float] = {}
        """Agents that are away to when their mailbox is looked at next."""
        registry.subscribe(self._on_change)
        for agent, held in registry.all().items():
            self._on_change(agent, held)

    def _on_change(self, agent: str, held: Held | None) -> None:
        if held is None or not is_away(held.record):
            self._due.pop(agent, None)
        elif held.record.spec.capabilities or held.record.spec.subscribe:
            self._due.setdefault(agent, monotonic() + GRACE_S)

    async def run(self) -> None:
        """Look at who is away, for ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if not self._is_leader():
                continue
            now = monotonic()
            for agent in [agent for agent, due in self._due.items() if due <= now]:
                moved = 0
                try:
                    moved = await self._look(agent)
                except (BusError, FoundationError, ValueError) as error:
                    self._log.debug("re-routing put off", agent=agent, error=str(error))
                if agent in self._due:
                    self._due[agent] = monotonic() + (_EVERY_S if moved else _LOOK_AGAIN_S)

    async def _look(self, agent: str) -> int:
        """Move what can be moved of one page of its mailbox; returns how many that were."""
        entry = await self._state.read(agent)
        record = {} if entry is None or entry.value is None else orjson.loads(entry.value)
        subject = self._subjects.mailbox(agent)
        # A replica may answer: what it does not know yet is looked at the next time.
        messages, _ = await self._signals.page(subject, int(record.get("cursor", 0)) + 1)
        # Urgent ones that were handled before those in front of them.
        ahead = {number for number, _ in record.get("ahead", ())}
        moves = [
            (message, others)
            for message in messages
            if message.sequence not in ahead
            and ANY_HEADER in message.headers
            and (others := self._others(agent, message))
        ]
        held = self._registry.get(agent)
        if not moves or held is None or not is_away(held.record):
            return 0
        await self._fence(agent, record, [message.sequence for message, _ in moves], entry)
        failpoint("reroute.after_fence")
        for message, others in moves:
            await self._move(agent, message, others)
        return len(moves)

    def _others(self, agent: str, message: StoredMessage) -> list[Held]:
        """Who runs and could take it instead."""
        words = message.headers[ANY_HEADER].split(" ")
        if len(words) != 4:
            return []
        kind, name, group, _ = words
        if kind == TargetKind.ANY:
            found = receivers(self._registry, kind, name)
        else:
            found = subscribers(self._registry.all().values(), name)[1].get(group, [])
        return [
            held
            for held in found
            if held.record.id != agent and held.record.status is AgentStatus.RUNNING
        ]

    async def _fence(
        self, agent: str, record: dict[str, Any], sequences: list[int], entry: Any
    ) -> None:
        """Write down that *agent* does not handle these any more.

        Raises:
            StaleRevisionError: it has committed, or was claimed, just now.
        """
        known = set(record.get("skip", ()))
        if known.issuperset(sequences):
            return
        blank = {
            "v": 1,
            "epoch": 0,
            "commit": 0,
            "cursor": 0,
            "run": "",
            "state": None,
            "salt": token_hex(8),
        }
        after = {
            **blank,
            **record,
            "skip": sorted(known | set(sequences)),
            # Not the activation's own writer: one that still lives sees that it was fenced.
            "writer": {"node": self._node, "incarnation": 0, "worker": "rerouter"},
        }
        revision = 0 if entry is None else entry.revision
        await self._state.replace(agent, orjson.dumps(after), expected=revision)

    async def _move(self, agent: str, message: StoredMessage, others: list[Held]) -> None:
        key = message.headers[ANY_HEADER].split(" ")[3]
        to, hop = await self._choose(agent, key, others)
        msg_id = copy_id(key, to, hop)
        subject = self._subjects.mailbox(to)
        headers = {"Nats-Msg-Id": msg_id, ANY_HEADER: message.headers[ANY_HEADER]}
        if not await self._has(subject, msg_id, message):
            try:
                await append(self._bus, subject, message.data, headers=headers)
            except MailboxFullError:
                return  # it is looked at again
        failpoint("reroute.before_delete")
        await self._signals.delete(message.sequence)
        body = orjson.loads(message.data)
        self._emit(
            "signal",
            "rerouted",
            f"A signal for {body.get('subject')} went from {agent}, which does not run, to {to}.",
            agent=agent,
            to=to,
            id=body.get("id"),
        )

    async def _has(self, subject: str, msg_id: str, message: StoredMessage) -> bool:
        return await is_stored(self._signals, subject, msg_id, parse_time(message.time))

    async def _choose(self, agent: str, key: str, others: list[Held]) -> tuple[str, int]:
        """The next receiver, written down; the one that an earlier try has chosen, if there is."""
        entry = await self._picks.read(pick_name(key))
        hop = 0
        if entry is not None and entry.value is not None:
            chosen, hop = read_choice(entry.value)
            if chosen != agent:
                return chosen, hop
        to = pick(others, key)
        value = f"{to} {hop + 1}".encode()
        if entry is None or entry.value is None:
            try:
                await self._picks.create(pick_name(key), value, ttl_s=PICK_TTL_S)
            except AlreadyExistsError as error:
                raise StaleRevisionError(f"The choice for {key} has changed.") from error
        else:
            await self._picks.replace(
                pick_name(key), value, expected=entry.revision, ttl_s=PICK_TTL_S
            )
        return to, hop + 1
