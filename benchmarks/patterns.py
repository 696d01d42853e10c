"""Signals for many, barriers and votes through the public API; there is no floor for them.

The clients run in this process, the agents in the workers of one node.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import datetime

import orjson

from benchmarks.drive import AGENTS, CLUSTER
from benchmarks.ours import ROOT, deployment, settled_nodes
from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.coordination import barrier, vote
from foundation_nats.testing import TestCluster, TestServer

PARTIES = 100
GENERATIONS = 10
VOTERS = 100
VOTES = 5
_PATIENCE_S = 60.0


async def fan_out() -> dict[str, float]:
    """One signal to a deployment of 1,000 agents until the last of their commits is stored; verified.

    The end is the latest time at which the server stored one of them, the beginning is before
    the send; it is one machine with one clock.
    """
    async with TestCluster(nodes=2, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(deployment(AGENTS))
        await cluster.deployments.wait_settled(["c"], timeout=_PATIENCE_S)
        await settled_nodes(nodes)
        bucket = Bucket(cluster.bus, cluster.subjects, "state")

        async def stored() -> int:
            return int((await bucket.reader.info())["state"]["last_seq"])

        before = await stored()
        began, sent = time.time(), time.monotonic()
        await cluster.send("deployment:c", "add", {"amount": 1})
        receipt_s = time.monotonic() - sent
        async with asyncio.timeout(_PATIENCE_S):
            while await stored() < before + AGENTS:
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # nobody does it twice, a little later
        entries = await bucket.read_many([f"c-{index}" for index in range(AGENTS)])
        counts = [
            orjson.loads(entry.value or b"{}")["state"]["counter"] for entry in entries.values()
        ]
        if counts != [1] * AGENTS:
            raise RuntimeError(f"{sum(counts)} effects at {len(counts)} of {AGENTS} agents")
        last = max(datetime.fromisoformat(entry.time) for entry in entries.values())
        return {"fan_out_seconds": last.timestamp() - began, "receipt_ms": receipt_s * 1000}


async def meeting() -> dict[str, float]:
    """100 parties, each a client of its own, arrive at once, generation after generation."""
    async with TestServer() as server, AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Cluster.connect(server.url, name=f"p{number}"))
            for number in range(PARTIES)
        ]
        parties = [barrier(client, "bench", PARTIES, timeout=_PATIENCE_S) for client in clients]
        times = []
        for generation in range(1, GENERATIONS + 1):
            began = time.monotonic()
            ended = await asyncio.gather(*(party.wait() for party in parties))
            times.append(time.monotonic() - began)
            if ended != [generation] * PARTIES:
                raise RuntimeError(f"generation {generation} ended as {set(ended)}")
        return {"generation_seconds": sum(times) / len(times), "longest_seconds": max(times)}


async def ballots() -> dict[str, float]:
    """A question to 100 agents until all have answered, the result is recorded, and all are told."""
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        cluster = nodes.client
        text = deployment(VOTERS).replace("Counter", "Voter")
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["c"], timeout=_PATIENCE_S)
        await settled_nodes(nodes)
        voters = [f"c-{index}" for index in range(VOTERS)]
        times = []
        for number in range(VOTES):
            began = time.monotonic()
            found = await vote(
                cluster, f"bench-{number}", number, ["yes", "no"], voters, quorum="all", timeout=30
            )
            times.append(time.monotonic() - began)
            if (found.choice, found.counts["yes"]) != ("yes", VOTERS):
                raise RuntimeError(f"{found.choice} by {found.counts}: {found.reason}")
        return {"vote_seconds": sum(times) / len(times), "longest_seconds": max(times)}
