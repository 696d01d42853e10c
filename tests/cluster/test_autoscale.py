"""A deployment that scales itself: up when work piles up, down when it is done, nothing lost."""

from __future__ import annotations

import subprocess
import sys

import orjson
import pytest

from foundation_cli import render
from foundation_cli.status import deployment_state
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


async def test_it_follows_the_cpu_of_its_nodes() -> None:
    """One that aims at next to nothing grows while cpu is used; one that aims at all of it does not."""
    low, high = manifest(cpu=0.01, cooldown_s=60), manifest(cpu=1.0, cooldown_s=60)
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=SETTINGS) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(low)
        await cluster.deployments.apply(high.replace('"slow"', '"calm"'))
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:

            async def grown() -> bool:
                return (await cluster.deployments.wishes())["slow"].replicas == 4

            await eventually(grown, timeout=20, message="it grows with the cpu that is used")
        finally:
            busy.kill()
            busy.wait()
        assert (await cluster.deployments.wishes())["calm"].replicas == 1
        status = await cluster.deployments.status("slow")
        assert status.autoscale is not None
        assert deployment_state(render.plain(status)) == "scales 1-4 by cpu 0.01"
        scaled = [e for e in await cluster.events.list(topic="deployment") if e.what == "scaled"]
        assert {event.data["name"] for event in scaled} == {"slow"}
        assert scaled[0].data["why"].startswith("autoscale: cpu ")
