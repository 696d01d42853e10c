"""State machines and behaviour trees on real nodes: each signal moves them once, whatever is killed."""

from __future__ import annotations

from typing import Any

import pytest

from foundation_nats.errors import TransitionError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = pytest.mark.cluster


async def _state(nodes: TestCluster, id: str) -> dict[str, Any]:
    record = await nodes.client.agents.state(id)
    return {} if record is None else dict(record["state"])


async def test_phases_and_trees_go_on_where_they_stood_when_their_worker_was_killed() -> None:
    """Six passages, an illegal one, eight parcels of three floors; two SIGKILLs in the middle."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("strategists:Lock", id="lock")
        await client.agents.start("strategists:Porter", id="porter")
        with pytest.raises(TransitionError, match="no 'shut' now"):
            await client.ask("lock", "shut")
        for parcel in range(8):
            await client.send("porter", "parcel", parcel)
        for number in range(24):
            await client.send("porter", "tree.tick", id=f"tick-{number}")
            if number < 12:
                await client.send("lock", "open" if number % 2 == 0 else "shut", id=f"go-{number}")
            if number in (5, 16):
                for worker in nodes.nodes["n1"].workers():
                    worker.kill()

        async def all_delivered() -> bool:
            return len((await _state(nodes, "porter"))["delivered"]) == 8

        await eventually(all_delivered, timeout=30, message="all parcels are delivered")
        porter = await _state(nodes, "porter")
        assert (porter["delivered"], porter["floor"], porter["parcels"]) == (list(range(8)), 0, [])

        async def all_passed() -> bool:
            lock = await _state(nodes, "lock")
            return (lock["opened"], lock["phase"]) == (6, "shut")

        await eventually(all_passed, timeout=30, message="six times open, then shut")
        await client.send("lock", "open")

        async def is_retired() -> bool:
            return (await _state(nodes, "lock"))["phase"] == "retired"

        await eventually(is_retired, timeout=20, message="it retires by itself")
        assert await client.dead.list() == []
