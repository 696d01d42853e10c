"""`Pulse`: one look at how busy a cluster is, and `Pulses`, which takes one after the other.

What is asked costs little: the registry and the wishes are followed by a watch, nodes and workers
are asked for the few agents that matter, and of the streams only the last numbers. Nothing of it
runs while nobody looks. Rates are differences between two looks; the first has none.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from foundation_nats.api.refs import NodeInfo
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.bus import rpc
from foundation_nats.bus.streams import StreamReader
from foundation_nats.control.status import deployment_status
from foundation_nats.errors import BusError, FoundationError
from foundation_nats.node.busiest import together
from foundation_schemas import (
    AgentLoad,
    AgentStatus,
    BusiestReply,
    BusiestRequest,
    Deployment,
    DeploymentStatus,
    NodeStatus,
)
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.cluster.registry import Held

_ASK_S = 1.0


class Rates(WireModel):
    """What happens in a second; None: not known yet."""

    stored: float | None = None
    """Signals that mailboxes have taken."""
    handled: float | None = None
    """Signals that agents have handled or given up."""
    asked: float | None = None
    """Questions that agents have begun to answer."""
    commits: float | None = None
    """Writes of state."""
    events: float | None = None
    dead: float | None = None
    """Signals that were given up."""


class BusyAgent(WireModel):
    """One of the agents that have most to do."""

    id: str
    node: str | None = None
    status: AgentStatus | None = None
    backlog: int = 0
    """Signals and questions in its worker's memory."""
    behind: bool = False
    """There is more, in the stream."""
    handled_s: float | None = None
    asked_s: float | None = None


class Pulse(WireModel):
    """How busy a cluster is; the JSON of ``foundation top -o json``."""

    cluster: str
    server: str
    at: str
    """UTC, RFC 3339, by this machine's clock."""
    leader: str | None = None
    nodes: list[NodeInfo] = Field(default_factory=list)
    agents: dict[str, int] = Field(default_factory=dict)
    """Status to how many agents have it."""
    deployments: list[DeploymentStatus] = Field(default_factory=list)
    busiest: list[BusyAgent] = Field(default_factory=list)
    rates: Rates = Rates()
    kept: dict[str, int] = Field(default_factory=dict)
    """Messages in the streams ``signals`` (handled ones too, until trimmed), ``dead``, ``events``."""


class Pulses:
    """Looks at one cluster, each with the rates since the one before."""

    def __init__(self, cluster: Cluster, *, limit: int = 20) -> None:
        """*limit*: how many of the busiest agents to name, and as many of the fastest."""
        self._cluster = cluster
        self._limit = limit
        self._before: tuple[float, dict[str, int]] | None = None

    async def next(self) -> Pulse:
        """Look now. What does not answer in time is missing, and known by that.

        Raises:
            BusTimeoutError, BusUnavailableError: the registry or the nodes could not be read.
        """
        cluster = self._cluster
        registry = await cluster._open_registry()
        wishes = (await cluster._open_desired()).all()
        nodes, streams = await asyncio.gather(cluster.nodes.list(), self._streams())
        told = await self._busiest(nodes)
        held = registry.all()
        return Pulse(
            cluster=cluster.name,
            server=cluster.url,
            at=utc_text(),
            leader=next((node.name for node in nodes if node.leader), None),
            nodes=nodes,
            agents=_counts(held.values()),
            deployments=_statuses(wishes, held.values()),
            busiest=[_named(item, held.get(item.id)) for item in told.agents],
            rates=self._rates(streams, told),
            kept={name: kept for name, (kept, _) in streams.items() if name != "state"},
        )

    async def _busiest(self, nodes: list[NodeInfo]) -> BusiestReply:
        cluster, request = self._cluster, BusiestRequest(limit=self._limit)

        async def ask(node: str) -> BusiestReply | None:
            subject = cluster.subjects.control_node(node, "busiest")
            try:
                return await rpc.call(cluster.bus, subject, request, BusiestReply, timeout=_ASK_S)
            except FoundationError:
                return None  # gone, late, or of an earlier release

        there = [n.name for n in nodes if n.status in (NodeStatus.UP, NodeStatus.DRAINING)]
        told = await asyncio.gather(*map(ask, there))
        return together([reply for reply in told if reply is not None], self._limit)

    async def _streams(self) -> dict[str, tuple[int, int]]:
        """Of each stream how many messages it has, and the last number."""
        names = self._cluster.subjects
        streams = {
            "signals": names.signals_stream,
            "dead": names.dead_stream,
            "events": names.events_stream,
            "state": names.bucket_stream("state"),
        }

        async def one(stream: str) -> tuple[int, int] | None:
            try:
                state = (await StreamReader(self._cluster.bus, stream).info())["state"]
            except (BusError, FoundationError):
                return None
            return int(state["messages"]), int(state["last_seq"])

        found = await asyncio.gather(*map(one, streams.values()))
        return {name: item for name, item in zip(streams, found, strict=True) if item is not None}

    def _rates(self, streams: dict[str, tuple[int, int]], told: BusiestReply) -> Rates:
        now, lasts = monotonic(), {name: last for name, (_, last) in streams.items()}
        before, self._before = self._before, (now, lasts)
        if before is None or now <= before[0]:
            return Rates(handled=told.handled_s, asked=told.asked_s)
        since = now - before[0]

        def rate(name: str) -> float | None:
            if name not in lasts or name not in before[1]:
                return None
            return max(0, lasts[name] - before[1][name]) / since

        return Rates(
            stored=rate("signals"),
            handled=told.handled_s,
            asked=told.asked_s,
            commits=rate("state"),
            events=rate("events"),
            dead=rate("dead"),
        )


def _counts(held: Iterable[Held]) -> dict[str, int]:
    found = Counter(
        str(AgentStatus.HIBERNATED if item.record.hibernates else item.record.status)
        for item in held
    )
    return {str(word): found.get(str(word), 0) for word in AgentStatus}


def _statuses(wishes: Mapping[str, Deployment], held: Iterable[Held]) -> list[DeploymentStatus]:
    by_name: dict[str, list[Held]] = {}
    for item in held:
        by_name.setdefault(item.record.deployment or item.record.id, []).append(item)
    return [deployment_status(wishes[name], by_name.get(name, [])) for name in sorted(wishes)]


def _named(load: AgentLoad, held: Held | None) -> BusyAgent:
    return BusyAgent(
        id=load.id,
        node=None if held is None else held.record.node,
        status=None if held is None else held.record.status,
        backlog=load.backlog,
        behind=load.behind,
        handled_s=load.handled_s,
        asked_s=load.asked_s,
    )


__all__ = ["BusyAgent", "Pulse", "Pulses", "Rates"]
