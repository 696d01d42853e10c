"""Pipelines and map-reduce through the public API; there is no floor for them.

The driver of a pipeline runs in this process, that of map-reduce in one of its own, whose memory is
measured; the agents run in the worker of one node.
"""

from __future__ import annotations

import time

from benchmarks.drive import CLUSTER
from benchmarks.ours import ROOT, drive, settled_nodes
from foundation_nats.coordination import pipeline
from foundation_nats.testing import TestCluster

STAGES = 5
ITEMS = 5_000
MAPPERS = 4


async def through_stages() -> dict[str, float]:
    """5,000 items through five stages with state, each item exactly once at each; verified."""
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        names = [f"stage-{number}" for number in range(STAGES)]
        for name in names:
            await nodes.client.agents.start("benchmarks.agents:Stage", id=name, critical=True)
        await settled_nodes(nodes)
        stages = [{"name": name, "agent": name, "type": "step"} for name in names]
        began = time.monotonic()
        async with pipeline(nodes.client, "bench", stages, range(ITEMS)) as run:
            wrong = [result async for result in run if result.get() != result.item + STAGES]
        seconds = time.monotonic() - began
        counts = [await nodes.client.ask(name, "get") for name in names]
        if wrong or counts != [ITEMS] * STAGES:
            raise RuntimeError(f"{counts} effects of {ITEMS} items, {len(wrong)} wrong results")
        return {"items_per_s": ITEMS / seconds}


async def in_chunks() -> dict[str, float]:
    """1,000,000 small items in chunks of 1,000 by four mappers, each counted once; verified."""
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        for number in range(MAPPERS):
            await nodes.client.agents.start(
                "benchmarks.agents:Adder", id=f"adder-{number}", capabilities=["add"]
            )
        await settled_nodes(nodes)
        return await drive(nodes, "numbers")
