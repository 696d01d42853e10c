"""Completes agent ids, node and deployment names from the live cluster.

At most 200 ms are spent on the network; every failure is silent, because a
shell's prompt is no place for an error.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import typer

from foundation_cli.connection import Shared, collect, connected, run

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

LIMIT_S = 0.2


def _ask(shared: Shared, question: Callable[[Cluster], Awaitable[list[str]]]) -> list[str]:
    import asyncio

    async def main() -> list[str]:
        import foundation_nats.api.cluster  # noqa: F401  outside the limit: it is no network

        async def inner() -> list[str]:
            async with connected(shared) as cluster:
                return await question(cluster)

        return await asyncio.wait_for(inner(), LIMIT_S)

    try:
        return run(main)
    except Exception:  # completion must never disturb the shell it runs in
        return []


def _matching(ctx: typer.Context, incomplete: str, question: Any) -> list[str]:
    return sorted(name for name in _ask(collect(ctx), question) if name.startswith(incomplete))


def agents(ctx: typer.Context, incomplete: str) -> list[str]:
    """Agent ids."""

    async def question(cluster: Cluster) -> list[str]:
        return [agent.id for agent in await cluster.agents.list()]

    return _matching(ctx, incomplete, question)


def targets(ctx: typer.Context, incomplete: str) -> list[str]:
    """Agent ids, and the other kinds of target."""
    kinds = ["everyone", "capability:", "any:", "deployment:", "label:", "topic:"]
    return agents(ctx, incomplete) + [kind for kind in kinds if kind.startswith(incomplete)]


def nodes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Node names."""

    async def question(cluster: Cluster) -> list[str]:
        return [node.name for node in await cluster.nodes.list()]

    return _matching(ctx, incomplete, question)


def reservations(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of reservations."""

    async def question(cluster: Cluster) -> list[str]:
        return [item.id for item in await cluster.resources.list()]

    return _matching(ctx, incomplete, question)


def deployments(ctx: typer.Context, incomplete: str) -> list[str]:
    """Deployment names."""

    async def question(cluster: Cluster) -> list[str]:
        return [deployment.name for deployment in await cluster.deployments.list()]

    return _matching(ctx, incomplete, question)


def anything(ctx: typer.Context, incomplete: str) -> list[str]:
    """Agents, deployments and nodes."""

    async def question(cluster: Cluster) -> list[str]:
        agents = [agent.id for agent in await cluster.agents.list()]
        wishes = await cluster.deployments.wishes()
        return sorted({*agents, *wishes, *(node.name for node in await cluster.nodes.list())})

    return _matching(ctx, incomplete, question)


def domains(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of replicated domains."""

    async def question(cluster: Cluster) -> list[str]:
        return [domain.name for domain in await cluster.consensus.list()]

    return _matching(ctx, incomplete, question)
