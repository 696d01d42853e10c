"""A deployment that scales itself: up when work piles up, down when it is done, nothing lost."""

from __future__ import annotations

import orjson
import pytest

from foundation_nats.errors import ConfigError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

SETTINGS = {"control": {"autoscale_every_s": 0.3}}


def manifest(**autoscale: object) -> str:
    """Slow workers, one at first."""
    return orjson.dumps(
        {
            "version": 1,
            "agents": [
                {
                    "name": "slow",
                    "run": "fleet:Slow",
                    "replicas": 1,
                    "capabilities": ["slow-work"],
                    "autoscale": {"min": 1, "max": 4, **autoscale},
                }
            ],
        }
    ).decode()


async def test_it_grows_with_the_backlog_and_shrinks_after_the_cool_down() -> None:
    """The leader dies in between; applying the manifest again does not undo what was scaled."""
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=SETTINGS) as nodes:
        cluster = nodes.client
        text = manifest(backlog=5, cooldown_s=2)
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["slow"], timeout=20)
        for _ in range(60):
            await cluster.send("slow-0", "slow.work", {"seconds": 0.1})

        async def has(replicas: int) -> bool:
            return (await cluster.deployments.wishes())["slow"].replicas == replicas

        await eventually(lambda: has(4), timeout=15, message="it grows to its limit")
        changes = await cluster.deployments.apply(text)
        assert [change.kind.name for change in changes] == ["SAME"]
        lease = await cluster.leader()
        assert lease is not None
        nodes.nodes[lease.holder].kill_all()
        nodes.start_node(lease.holder)
        await eventually(lambda: has(1), timeout=40, message="it shrinks when all is done")

        async def done() -> bool:
            stored = await cluster.agents.state("slow-0")
            return stored is not None and stored["state"]["done"] == 60

        await eventually(done, timeout=20, message="every signal is handled once")


async def test_it_follows_a_gauge_of_its_agents() -> None:
    """The mean per replica is brought to the target."""
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=SETTINGS) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(manifest(metric="jobs", target=2, cooldown_s=1))
        await cluster.deployments.wait_settled(["slow"], timeout=20)
        await cluster.ask("slow-0", "slow.gauge", {"value": 6})

        async def has() -> int | None:
            return (await cluster.deployments.wishes())["slow"].replicas

        async def three() -> bool:
            return await has() == 3

        await eventually(three, timeout=15, message="three replicas")


async def test_a_person_does_not_scale_it_beyond_its_limits() -> None:
    """It would be undone within seconds: refused, with the limits; within them it is done."""
    async with TestCluster(nodes=0) as nodes:
        deployments = nodes.client.deployments
        await deployments.apply(manifest(backlog=5), validate=False)
        for replicas in (0, 5):
            with pytest.raises(ConfigError, match="between 1 and 4 replicas") as caught:
                await deployments.scale("slow", replicas)
            assert "autoscale" in (caught.value.hint or "")
        assert (await deployments.scale("slow", 3)).replicas == 3
