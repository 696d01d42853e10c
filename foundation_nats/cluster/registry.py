"""Which node runs which agent: a watch-fed view of the ``agents`` bucket, and compare-and-set changes to it.

Reads are local and as fresh as the watch (`age_s`); writes are conditional on
the revision that the decision was based on, and visible here at once when
acknowledged. An assignment is a record that names a node; there is no other
command to start or stop an agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from foundation_nats.base import telemetry
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import EXPECTED, TOMBSTONE_TTL, Bucket, Entry, Watch
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.streams import PubAck, append_nowait
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import DecodeError, FoundationError
from foundation_schemas import AgentRecord


@dataclass(frozen=True, slots=True)
class Held:
    """A record and the revision it was read at."""

    record: AgentRecord
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """A write: *record* replaces what is at revision *expected* (0: nothing); None deletes it."""

    id: str
    record: AgentRecord | None
    expected: int


OnChange = Callable[[str, Held | None], None]


class Registry:
    """The registry as one process sees it."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self.bucket = Bucket(bus, subjects, "agents")
        self._held: dict[str, Held] = {}
        self._gone: dict[str, int] = {}
        """Revisions of tombstones, so that a late event can't resurrect a record."""
        self._by_node: dict[str | None, set[str]] = {}
        self._listeners: list[OnChange] = []
        self._watch: Watch | None = None
        self._is_open = False
        """Whether what comes now is news."""
        self._log = get_logger("registry")

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Read everything there is, then follow changes until *scope* closes.

        Raises:
            BusTimeoutError: the bucket could not be read in time.
        """
        self._watch = self.bucket.watch(scope, self._on_entry)
        await self._watch.wait_ready(timeout)
        self._is_open = True

    @property
    def age_s(self) -> float:
        """Seconds since the server last confirmed this view."""
        return float("inf") if self._watch is None else self._watch.age_s

    # ---- reading ----------------------------------------------------------------

    def get(self, agent: str) -> Held | None:
        """The record of *agent*; None if there is none."""
        return self._held.get(agent)

    def all(self) -> Mapping[str, Held]:
        """Every record, live: it changes under your hands across awaits."""
        return self._held

    def on_node(self, node: str | None) -> list[Held]:
        """The records that name *node*."""
        return [self._held[agent] for agent in self._by_node.get(node, ())]

    def nodes(self) -> list[str]:
        """The nodes that some record names."""
        return [node for node, agents in self._by_node.items() if node is not None and agents]

    def providing(self, capability: str) -> list[Held]:
        """The records of agents that provide *capability*, by id."""
        found = [h for h in self._held.values() if capability in h.record.spec.capabilities]
        return sorted(found, key=lambda held: held.record.id)

    def of_deployment(self, name: str) -> list[Held]:
        """The records of one deployment, by id."""
        found = [h for h in self._held.values() if h.record.deployment == name]
        return sorted(found, key=lambda held: held.record.id)

    def subscribe(self, listener: OnChange) -> None:
        """Call *listener* after every change, in order, own writes included."""
        self._listeners.append(listener)

    # ---- changing ---------------------------------------------------------------

    def _on_entry(self, entry: Entry) -> None:
        if entry.revision <= self._newest(entry.key):
            return  # our own acknowledged write comes back: not worth decoding
        if entry.value is None:
            self._apply(entry.key, None, entry.revision)
            return
        try:
            record = decode(AgentRecord, entry.value)
        except DecodeError as error:
            self._log.error("record not understood, left alone", agent=entry.key, error=str(error))
            return
        self._apply(entry.key, record, entry.revision)

    def _newest(self, agent: str) -> int:
        held = self._held.get(agent)
        return held.revision if held is not None else self._gone.get(agent, 0)

    def _apply(self, agent: str, record: AgentRecord | None, revision: int) -> None:
        if revision <= self._newest(agent):
            return
        before = self._held.get(agent)
        if before is not None:
            self._by_node[before.record.node].discard(agent)
        after = None if record is None else Held(record, revision)
        if after is None:
            self._held.pop(agent, None)
            self._gone[agent] = revision
            while len(self._gone) > 10_000:
                self._gone.pop(next(iter(self._gone)))
        else:
            self._held[agent] = after
            self._gone.pop(agent, None)
            self._by_node.setdefault(after.record.node, set()).add(agent)
        if self._is_open and (before is None) != (after is None):
            self._measure(agent, before, after)
        for listener in self._listeners:
            listener(agent, after)

    def _measure(self, agent: str, before: Held | None, after: Held | None) -> None:
        held = after or before
        assert held is not None
        telemetry.execute(
            telemetry.AGENT_UNREGISTERED if after is None else telemetry.AGENT_REGISTERED,
            {"agents": len(self._held)},
            {
                "agent": agent,
                "node": held.record.node,
                "deployment": held.record.deployment,
                "status": str(held.record.status),
            },
        )

    async def write_many(self, changes: Sequence[Change]) -> list[int | FoundationError]:
        """Apply changes side by side; for each its new revision, or why it was not applied.

        Cancellation-safe: what was sent may be applied, and arrives by the watch.
        """
        loop = asyncio.get_running_loop()
        results: list[int | FoundationError | None] = [None] * len(changes)
        open_count = len(changes)
        done = loop.create_future()
        if not changes:
            return []

        def finish(index: int, ack: PubAck | FoundationError) -> None:
            nonlocal open_count
            change = changes[index]
            if isinstance(ack, PubAck):
                results[index] = ack.sequence
                self._apply(change.id, change.record, ack.sequence)
            else:
                results[index] = ack
            open_count -= 1
            if open_count == 0 and not done.done():
                done.set_result(None)

        for index, change in enumerate(changes):
            await self._bus.wait_room()
            headers = {EXPECTED: str(change.expected)}
            payload = b""
            if change.record is None:
                headers |= {"KV-Operation": "DEL", "Nats-TTL": TOMBSTONE_TTL}
            else:
                payload = encode(change.record)
            try:
                append_nowait(
                    self._bus,
                    self.bucket.subject(change.id),
                    payload,
                    lambda ack, index=index: finish(index, ack),  # type: ignore[misc]
                    headers=headers,
                )
            except FoundationError as error:
                finish(index, error)
        await done
        return [result for result in results if result is not None]

    async def write(self, change: Change) -> int:
        """Apply one change; returns the new revision.

        Raises:
            StaleRevisionError: the record has changed.
            BusTimeoutError: outcome unknown.
        """
        (result,) = await self.write_many([change])
        if isinstance(result, FoundationError):
            raise result
        return result

    def tombstone(self, agent: str) -> int:
        """The revision to expect when creating a record that was deleted in this view; else 0."""
        return self._gone.get(agent, 0)


def ids(held: Iterable[Held]) -> list[str]:
    """The agents' ids."""
    return [item.record.id for item in held]
