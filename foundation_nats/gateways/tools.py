"""What a model may look at in a cluster, and what it may change, as tools: name, params, what it does.

Independent of any protocol. Each is bounded: in what it returns, and in how long it takes. Names are part of
the contract: ``cluster_…``; none is renamed, none goes. What changes something is marked, for whoever serves
them to leave out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation_nats.api.cluster import Cluster
from foundation_nats.errors import ConfigError
from foundation_schemas import AgentStatus, NodeStatus

_TAP_MAX_S = 30.0
_NO_SEQUENCE = 1 << 62


class Params(BaseModel):
    """What a tool takes: nothing that it does not know."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class ClusterTool:
    """One tool."""

    name: str
    description: str
    params: type[Params]
    run: Callable[[Cluster, Any], Awaitable[Mapping[str, Any]]]
    """Returns an object of JSON values."""
    writes: bool = False
    destroys: bool = False
    """Whether it ends something that was there."""

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the params."""
        found = self.params.model_json_schema()
        found.pop("title", None)
        found.pop("description", None)
        for item in found.get("properties", {}).values():
            item.pop("title", None)
        return found

    async def call(self, cluster: Cluster, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do it.

        Raises:
            ConfigError: the arguments don't fit; says where.
            FoundationError: as what it does.
        """
        try:
            params = self.params.model_validate(dict(arguments))
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'it'}: {item['msg']}"
                for item in error.errors(include_url=False)[:5]
            )
            raise ConfigError(f"The arguments of {self.name} are not valid: {found}.") from error
        return dict(await self.run(cluster, params))


_TOOLS: dict[str, ClusterTool] = {}


def _tool(
    params: type[Params], *, writes: bool = False, destroys: bool = False
) -> Callable[[Callable[[Cluster, Any], Awaitable[Mapping[str, Any]]]], Any]:
    def add(function: Callable[[Cluster, Any], Awaitable[Mapping[str, Any]]]) -> Any:
        name = f"cluster_{function.__name__.strip('_')}"
        doc = " ".join((function.__doc__ or "").split())
        _TOOLS[name] = ClusterTool(name, doc, params, function, writes, destroys)
        return function

    return add


def cluster_tools(*, writes: bool = False) -> list[ClusterTool]:
    """All that look; with *writes* those that change something, too."""
    return [tool for tool in _TOOLS.values() if writes or not tool.writes]


def plain(value: Any) -> Any:
    """Models, dataclasses and what holds them as JSON values."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    return value.value if isinstance(value, Enum) else value


# ---- looking ----------------------------------------------------------------------------


class Nothing(Params):
    """No params."""


class Limit(Params):
    """How much."""

    limit: int = Field(100, ge=1, le=1000, description="At most so many.")


@_tool(Nothing)
async def _status(cluster: Cluster, _: Nothing) -> Mapping[str, Any]:
    """The cluster at a glance: its leader, how many nodes and agents in which condition, and what has not settled."""
    nodes, agents, deployments, leader = await asyncio.gather(
        cluster.nodes.list(), cluster.agents.list(), cluster.deployments.list(), cluster.leader()
    )
    by_node = Counter(str(node.status) for node in nodes)
    by_agent = Counter(str(agent.status) for agent in agents)
    unsettled = [item for item in deployments if not item.settled]
    return {
        "cluster": cluster.name,
        "server": cluster.url,
        "leader": None if leader is None else leader.holder,
        "nodes": {str(word): by_node.get(word, 0) for word in NodeStatus},
        "agents": {str(word): by_agent.get(word, 0) for word in AgentStatus},
        "deployments": {"total": len(deployments), "unsettled": plain(unsettled[:50])},
    }


@_tool(Nothing)
async def _nodes(cluster: Cluster, _: Nothing) -> Mapping[str, Any]:
    """Every node: status, load, capacity, labels, agents, cordon."""
    return {"nodes": plain(await cluster.nodes.list())}


class Agents(Limit):
    """Which agents."""

    node: str | None = Field(None, description="Only those on this node.")
    capability: str | None = Field(None, description="Only those that provide it.")
    status: str | None = Field(None, description="Only those in this condition.")
    deployment: str | None = Field(None, description="Only those of this deployment.")


@_tool(Agents)
async def _agents(cluster: Cluster, asked: Agents) -> Mapping[str, Any]:
    """Agents with their status, node, epoch and, where they don't run, the reason."""
    found = await cluster.agents.list(
        node=asked.node,
        capability=asked.capability,
        status=asked.status,
        deployment=asked.deployment,
    )
    return {"total": len(found), "agents": plain(found[: asked.limit])}


class Agent(Params):
    """Which agent."""

    id: str = Field(description="The agent's id.")
    state: bool = Field(True, description="Whether to show its stored state.")


@_tool(Agent)
async def _agent(cluster: Cluster, asked: Agent) -> Mapping[str, Any]:
    """One agent: where it is, how it does, and what is stored of it (state, cursor, outbox)."""
    info = await cluster.agents.get(asked.id)
    record = await cluster.agents.state(asked.id) if asked.state else None
    return {"agent": plain(info), "record": record}


@_tool(Limit)
async def _deployments(cluster: Cluster, asked: Limit) -> Mapping[str, Any]:
    """Wish and fact of every deployment: how many agents are wanted, run, wait or have failed, and why."""
    found = await cluster.deployments.list()
    return {"total": len(found), "deployments": plain(found[: asked.limit])}


class Why(Params):
    """Whose story."""

    name: str = Field(
        description="An agent, deployment or node; or agent:NAME, deployment:NAME, node:NAME."
    )


@_tool(Why)
async def _why(cluster: Cluster, asked: Why) -> Mapping[str, Any]:
    """Why an agent, a deployment or a node is as it is: what led there, told from events, and what would change it."""
    return {"story": plain(await cluster.why(asked.name))}


class Events(Limit):
    """Which events."""

    since_s: float | None = Field(None, gt=0, description="Only those of the last so many seconds.")
    topic: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_-]+$", description="Such as node, agent, leader, deployment."
    )


@_tool(Events)
async def _events(cluster: Cluster, asked: Events) -> Mapping[str, Any]:
    """What happened in the cluster, oldest first: the newest events that fit."""
    found = await cluster.events.list(since_s=asked.since_s, topic=asked.topic, limit=asked.limit)
    return {"events": plain(found)}


class Tap(Params):
    """What to look at."""

    seconds: float = Field(5.0, gt=0, le=_TAP_MAX_S, description="How long to look.")
    limit: int = Field(50, ge=1, le=500, description="It ends earlier after so many.")
    pattern: str | None = Field(
        None, description="A subject or type; * is one word, > the rest: counter.*"
    )
    type: str | None = Field(None, description="Only this type of signal.")
    agent: str | None = Field(None, description="Only this agent.")
    where: str | None = Field(None, description="Only where it holds: data.amount > 10")
    replay_s: float | None = Field(
        None, gt=0, description="Begin with what happened in the last so many seconds."
    )


@_tool(Tap)
async def _tap(cluster: Cluster, asked: Tap) -> Mapping[str, Any]:
    """Look at signals, questions, events and dead letters as they pass, for some seconds; changes nothing."""
    items: list[dict[str, Any]] = []
    ended = "limit"
    opened = cluster.taps.open(
        asked.pattern,
        type=asked.type,
        agent=asked.agent,
        where=asked.where,
        replay_s=asked.replay_s,
    )
    async with opened as tap:
        try:
            async with asyncio.timeout(asked.seconds):
                async for item in tap:
                    sequence = None if item.sequence >= _NO_SEQUENCE else item.sequence
                    items.append({**plain(item), "type": item.type, "sequence": sequence})
                    if len(items) >= asked.limit:
                        break
        except TimeoutError:
            ended = "time"
    return {"items": items, "ended_by": ended, "dropped": opened.dropped}


@_tool(Nothing)
async def _topology(cluster: Cluster, _: Nothing) -> Mapping[str, Any]:
    """One picture of the cluster: nodes, zones, distances, who hears whom, partitions."""
    return {"topology": plain(await cluster.topology())}


class Dead(Limit):
    """Whose."""

    agent: str | None = Field(None, description="Only this agent's.")


@_tool(Dead)
async def _dead_letters(cluster: Cluster, asked: Dead) -> Mapping[str, Any]:
    """Signals that were given up, each with the reason."""
    return {"letters": plain(await cluster.dead.list(asked.agent, limit=asked.limit))}


# ---- changing ---------------------------------------------------------------------------


class Send(Params):
    """What to whom."""

    target: str = Field(
        description="ID, capability:NAME, any:NAME, deployment:NAME, label:EXPR, topic:NAME or everyone."
    )
    type: str = Field(description="The type of the signal, such as counter.add")
    data: Any = Field(None, description="The payload, as the handler wants it.")
    id: str | None = Field(
        None, description="A repeat with the same id takes effect once: give one where it matters."
    )


@_tool(Send, writes=True)
async def _send(cluster: Cluster, asked: Send) -> Mapping[str, Any]:
    """Store a signal for agents: durable once this returns, handled when its receiver runs."""
    receipt = await cluster.send(asked.target, asked.type, asked.data, id=asked.id)
    return {"receipt": plain(receipt)}


class Ask(Params):
    """What of whom."""

    target: str = Field(description="ID, any:NAME, capability:NAME or deployment:NAME.")
    type: str = Field(description="The type of the question, such as counter.get")
    data: Any = Field(None, description="The payload, as the handler wants it.")
    timeout_s: float = Field(10.0, gt=0, le=300, description="How long to wait for the answer.")


@_tool(Ask, writes=True)
async def _ask(cluster: Cluster, asked: Ask) -> Mapping[str, Any]:
    """Ask one agent, and return what its handler says. Handlers may change things, so this may, too."""
    said = await cluster.ask(asked.target, asked.type, asked.data, timeout=asked.timeout_s)
    return {"answer": said}


class Deploy(Params):
    """What."""

    manifest: str = Field(description="The manifest itself, YAML that begins with `version: 1`.")
    timeout_s: float = Field(30.0, gt=0, le=600, description="How long it may take to settle.")


@_tool(Deploy, writes=True)
async def _deploy(cluster: Cluster, asked: Deploy) -> Mapping[str, Any]:
    """Make what a manifest wishes for run, and wait until it does; what it does not name is left alone."""
    report = await cluster.deployments.deploy(asked.manifest, timeout=asked.timeout_s)
    return {"report": plain(report)}


class Scale(Params):
    """What, to how many."""

    name: str = Field(description="The deployment.")
    replicas: int = Field(ge=0, description="How many agents it shall have.")
    timeout_s: float = Field(30.0, gt=0, le=600, description="How long it may take to settle.")


@_tool(Scale, writes=True)
async def _scale(cluster: Cluster, asked: Scale) -> Mapping[str, Any]:
    """Let a deployment have so many agents, and wait until it has; those that go keep their state."""
    await cluster.deployments.scale(asked.name, asked.replicas)
    await cluster.deployments.wait_settled([asked.name], timeout=asked.timeout_s)
    return {"deployment": plain(await cluster.deployments.status(asked.name))}


class Delete(Params):
    """What."""

    name: str = Field(description="The deployment, or a single agent.")


@_tool(Delete, writes=True, destroys=True)
async def _delete(cluster: Cluster, asked: Delete) -> Mapping[str, Any]:
    """Want a deployment no more: its agents stop in good order; their state is kept."""
    await cluster.deployments.delete(asked.name)
    return {"deleted": asked.name}


class Node(Params):
    """Which node."""

    node: str = Field(description="The node's name.")
    reason: str = Field("", description="For people.")


class Drain(Node):
    """How long."""

    timeout_s: float = Field(60.0, gt=0, le=600, description="How long it may take.")


@_tool(Drain, writes=True)
async def _drain(cluster: Cluster, asked: Drain) -> Mapping[str, Any]:
    """Cordon a node and move all its agents away, with their state; it stays up until somebody ends it."""
    report = await cluster.nodes.drain(asked.node, timeout=asked.timeout_s, reason=asked.reason)
    return {"report": plain(report)}


@_tool(Node, writes=True)
async def _cordon(cluster: Cluster, asked: Node) -> Mapping[str, Any]:
    """Let a node have no new agents."""
    await cluster.nodes.cordon(asked.node, reason=asked.reason)
    return {"cordoned": asked.node}


@_tool(Node, writes=True)
async def _uncordon(cluster: Cluster, asked: Node) -> Mapping[str, Any]:
    """Let a node have agents again, and end the wish to drain it."""
    await cluster.nodes.uncordon(asked.node)
    return {"uncordoned": asked.node}


class Rebalance(Params):
    """How."""

    strategy: str = Field(
        "even_distribution", description="even_distribution, load_based or capability_based."
    )
    timeout_s: float = Field(120.0, gt=0, le=600, description="How long it may take.")


@_tool(Rebalance, writes=True)
async def _rebalance(cluster: Cluster, asked: Rebalance) -> Mapping[str, Any]:
    """Move running agents until the nodes are even, a few at a time, with state and signals."""
    report = await cluster.rebalance(asked.strategy, timeout=asked.timeout_s)
    return {"report": plain(report)}


__all__ = ["ClusterTool", "cluster_tools", "plain"]
