"""`cluster.signals.journal`: which signal caused which: the tree that a signal belongs to.

Every signal carries the id of its cause and the trace that began it all (W3C trace context), so the
streams themselves are the journal: all that belongs to one trace is put together when somebody asks.

It is as good as what is there: handled signals are known while their mailbox keeps them as evidence
(`mailbox.trim_min_age_s`), dead letters until they are discarded. Where a cause is gone its effects hang
from the root, and the node says that its cause is not known any more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from pydantic import Field

from foundation_nats.api.tracking import SEARCHED_MAX, parsed, read_all
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_schemas import DeadLetter
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster


class JournalNode(WireModel):
    """One signal of a tree; several receivers of one signal for many are one node."""

    id: str
    type: str
    source: str
    target: str
    time: str | None = None
    cause: str | None = None
    is_known: bool = True
    """False: it is only known by its effects."""
    agents: list[str] = Field(default_factory=list)
    """In whose mailboxes it is."""
    dead: list[str] = Field(default_factory=list)
    """Who has given it up."""
    effects: list[JournalNode] = Field(default_factory=list)
    """What was emitted because of it, by time."""

    def walk(self, depth: int = 0) -> list[tuple[int, JournalNode]]:
        """This node and all below, with their depths, in the order in which one reads a tree."""
        found = [(depth, self)]
        for effect in self.effects:
            found += effect.walk(depth + 1)
        return found


async def read_journal(cluster: Cluster, id: str) -> JournalNode | None:
    """The tree of the trace that the signal *id* belongs to, from its first cause on; None: not known."""
    subjects, bus = cluster.subjects, cluster.bus
    signals = StreamReader(bus, subjects.signals_stream)
    state = (await signals.info())["state"]
    start = max(int(state["first_seq"]), int(state["last_seq"]) - SEARCHED_MAX + 1)
    readers = (
        (signals, start),
        (StreamReader(bus, subjects.routes_stream), 1),
        (StreamReader(bus, subjects.dead_stream), 1),
    )

    async def holding(needle: bytes) -> list[list[StoredMessage]]:
        return await asyncio.gather(
            *(read_all(reader, None, needle, first) for reader, first in readers)
        )

    trace = _trace_of(id, await holding(id.encode()))
    if trace is None:
        return None
    stored, routes, letters = await holding(trace.encode())
    bodies = [(parsed(message), message.subject.rpartition(".")[2]) for message in stored]
    bodies += [(parsed(message), "") for message in routes]
    dead = []
    for message in letters:
        letter = DeadLetter.model_validate_json(message.data)
        if letter.signal is not None:
            dead.append((letter.signal, letter.agent))
    return build_tree(bodies, dead, id)


def _trace_of(id: str, found: list[list[StoredMessage]]) -> str | None:
    for messages in found:
        for message in messages:
            body = parsed(message)
            body = body.get("signal") or body
            if body.get("id") == id or body.get("cause") == id:
                words = str(body.get("traceparent", "")).split("-")
                if len(words) == 4:
                    return words[1]
    return None


def build_tree(
    stored: list[tuple[dict[str, Any], str]], dead: list[tuple[dict[str, Any], str]], id: str
) -> JournalNode | None:
    """The tree that holds *id*, from envelopes and the agents that have them. Pure."""
    nodes: dict[str, JournalNode] = {}
    for body, agent in [*stored, *((body, "") for body, _ in dead)]:
        key = str(body.get("id"))
        node = nodes.get(key)
        if node is None:
            node = nodes[key] = JournalNode(
                id=key,
                type=str(body.get("type")),
                source=str(body.get("source")),
                target=str(body.get("subject")),
                time=body.get("time"),
                cause=body.get("cause"),
            )
        if agent and agent not in node.agents:
            node.agents.append(agent)
    for body, agent in dead:
        nodes[str(body.get("id"))].dead.append(agent)
    for node in list(nodes.values()):
        if node.cause is not None and node.cause not in nodes:
            nodes[node.cause] = JournalNode(
                id=node.cause, type="?", source="?", target="?", is_known=False
            )
    roots = []
    for node in sorted(nodes.values(), key=lambda item: (item.time or "", item.id)):
        if node.cause is None or _is_within(nodes, node.cause, node.id):
            roots.append(node)
        else:
            nodes[node.cause].effects.append(node)
    return next((root for root in roots if any(n.id == id for _, n in root.walk())), None)


def _is_within(nodes: dict[str, JournalNode], cause: str | None, id: str) -> bool:
    """Whether *id* is among the causes of its own cause: envelopes that others have written may lie."""
    seen = set()
    while cause is not None and cause not in seen:
        if cause == id:
            return True
        seen.add(cause)
        node = nodes.get(cause)
        cause = None if node is None else node.cause
    return False
