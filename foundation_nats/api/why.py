"""`explain`: gathers what `observe.why` tells a story from: records, wishes, nodes, the newest events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from foundation_nats.base.clock import utc_now
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.cluster.registry import Held
from foundation_nats.control.status import deployment_status, records_of
from foundation_nats.errors import ConfigError, NotFoundError
from foundation_nats.observe.why import Kind, NodeNow, Story, tell
from foundation_schemas import AgentRecord, Deployment

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

EVENTS_MAX = 20_000
"""How many of the newest events are looked at."""


async def explain(cluster: Cluster, name: str) -> Story:
    """See `Cluster.why`."""
    kinds, name = _asked(name)
    bucket = Bucket(cluster.bus, cluster.subjects, "agents")
    entries, wishes, infos, (events, is_cut) = await asyncio.gather(
        bucket.read_all(),
        cluster.deployments.wishes(),
        cluster.nodes.list(),
        cluster.events.numbered(limit=EVENTS_MAX),
    )
    held = {
        id: Held(rpc.decode(AgentRecord, entry.value), entry.revision)
        for id, entry in entries.items()
        if entry.value is not None
    }
    nodes = {
        info.name: NodeNow(
            info.status,
            info.agents,
            info.cordon_reason if info.cordoned else None,
            info.leader,
            info.short_lives if info.distrusted else None,
        )
        for info in infos
    }
    # What is there goes before what only was.
    for kind in sorted(kinds, key=lambda kind: not _is_there(kind, name, held, wishes, nodes)):
        wish = wishes.get(name) if kind is Kind.DEPLOYMENT else _wish_of(name, held, wishes)
        match kind:
            case Kind.AGENT:
                records = [held[name].record] if name in held else []
            case Kind.DEPLOYMENT:
                records = [] if wish is None else records_of(wish, held.values())
            case Kind.NODE:
                records = [item.record for item in held.values() if item.record.node == name]
        story = tell(
            kind,
            name,
            records=records,
            events=events,
            status=None if wish is None else deployment_status(wish, held.values()),
            nodes=nodes,
            now=utc_now(),
            is_cut=is_cut,
        )
        if story is not None:
            return story
    known = [*held, *wishes, *nodes]
    raise NotFoundError(
        f"There is no {' or '.join(kinds)} {name!r}, and no event tells of one.",
        hint=_near(name, known) or "See `foundation agents`, `deployments` and `nodes`.",
    )


def _asked(name: str) -> tuple[list[Kind], str]:
    word, colon, rest = name.partition(":")
    if not colon:
        return list(Kind), name
    if word not in set(Kind):
        raise ConfigError(f"{name!r}: write NAME, agent:NAME, deployment:NAME or node:NAME.")
    return [Kind(word)], rest


def _is_there(
    kind: Kind,
    name: str,
    held: dict[str, Held],
    wishes: dict[str, Deployment],
    nodes: dict[str, NodeNow],
) -> bool:
    match kind:
        case Kind.AGENT:
            return name in held or _wish_of(name, held, wishes) is not None
        case Kind.DEPLOYMENT:
            return name in wishes
    return name in nodes


def _wish_of(agent: str, held: dict[str, Held], wishes: dict[str, Deployment]) -> Deployment | None:
    """The deployment that wants the agent."""
    record = held[agent].record if agent in held else None
    if record is not None and record.deployment in wishes:
        return wishes[record.deployment]
    for name in (agent, agent.rpartition("-")[0]):
        wish = wishes.get(name)
        if wish is not None and agent in wish.agent_ids():
            return wish
    return None


def _near(name: str, known: list[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else None
