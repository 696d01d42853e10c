"""A changed spec reaches every agent, a few at a time, or is taken back; leaders may die meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from foundation_cli import render
from foundation_cli.status import deployment_state
from foundation_nats import Cluster
from foundation_nats.control.rollouts import Phase
from foundation_nats.errors import ConfigError, RolloutFailedError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

REPLICAS = 8


def manifest(version: int, *, update: dict[str, Any] | None = None, **config: Any) -> str:
    """Eight agents of this version."""
    return orjson.dumps(
        {
            "version": 1,
            "agents": [
                {
                    "name": "p",
                    "run": "fleet:Picky",
                    "replicas": REPLICAS,
                    "config": {"version": version, **config},
                    "update": {"max_unavailable": 2, **(update or {})},
                }
            ],
        }
    ).decode()


async def deployed(cluster: Cluster, text: str) -> None:
    """Apply it and wait until it is so."""
    await cluster.deployments.apply(text)
    await cluster.deployments.wait_settled(["p"], timeout=30)


async def versions(cluster: Cluster) -> list[str]:
    """What each agent runs."""
    asked = (cluster.ask(f"p-{number}", "version", timeout=5) for number in range(REPLICAS))
    return list(await asyncio.gather(*asked))


async def test_a_change_takes_a_few_at_a_time_and_ends() -> None:
    """Never more than two away; the history tells the spec before."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await deployed(cluster, manifest(1))
        fewest = REPLICAS
        await cluster.deployments.apply(manifest(2))

        async def done() -> bool:
            nonlocal fewest
            status = await cluster.deployments.status("p")
            fewest = min(fewest, status.running)
            return (await cluster.deployments.rollout("p")).phase is Phase.COMPLETE

        await eventually(done, timeout=30, message="it is rolled out")
        assert fewest >= REPLICAS - 2
        assert await versions(cluster) == ["2"] * REPLICAS
        (before,) = await cluster.deployments.history("p")
        assert before.spec.config == {"version": 1}

        async def told() -> bool:
            events = await cluster.events.list(topic="deployment")
            return any(event.what == "rolled_out" for event in events)

        await eventually(told, message="the end is told")
        assert not (await cluster.deployments.wishes())["p"].rolling


@pytest.mark.parametrize("fault", [{"broken": True}, {"unready": True}])
async def test_a_spec_that_does_not_get_ready_is_taken_back(fault: dict[str, Any]) -> None:
    """It fails to start, or is never ready: most agents go on, and all run the old spec again."""
    settings = {"worker": {"ready_timeout_s": 1.0}, "control": {"failed_backoff_s": 0.1}}
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await deployed(cluster, manifest(1))
        await cluster.deployments.apply(manifest(2, **fault))
        with pytest.raises(RolloutFailedError, match="rolled back"):
            await cluster.deployments.wait_settled(["p"], timeout=40, changed=["p"])
        await cluster.deployments.wait_settled(["p"], timeout=30)
        assert await versions(cluster) == ["1"] * REPLICAS
        found = await cluster.deployments.history("p")
        assert [item.outcome for item in found] == ["superseded", "failed"]
        assert found[-1].reason
        status = await cluster.deployments.status("p")
        assert status.updated == REPLICAS
        assert "rolled back: " in deployment_state(render.plain(status))


async def test_a_pause_holds_it_and_undo_goes_back() -> None:
    """Nobody is restarted while it is paused."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await deployed(cluster, manifest(1))
        with pytest.raises(ConfigError, match="no earlier spec"):
            await cluster.deployments.undo("p")
        await cluster.deployments.apply(manifest(2))
        await cluster.deployments.pause("p")

        async def steady() -> bool:
            before = await cluster.deployments.rollout("p")
            status = await cluster.deployments.status("p")
            return before.phase is Phase.PAUSED and status.running == REPLICAS

        await eventually(steady, message="those that were restarted are back")
        found = await cluster.deployments.rollout("p")
        assert found.updated < REPLICAS
        status = await cluster.deployments.status("p")
        assert (status.rolling, status.paused, status.updated) == (True, True, found.updated)
        assert deployment_state(render.plain(status)) == f"paused {found.updated}/{REPLICAS}"
        await cluster.deployments.resume("p")
        await cluster.deployments.wait_rollout("p", timeout=30)
        assert await versions(cluster) == ["2"] * REPLICAS
        await cluster.deployments.undo("p")
        await cluster.deployments.wait_rollout("p", timeout=30)
        assert await versions(cluster) == ["1"] * REPLICAS


async def test_a_leader_killed_in_the_middle_is_succeeded_by_one_that_finishes() -> None:
    """Signals sent all the while take effect once."""
    settings = {"worker": {"ready_timeout_s": 1.0}, "control": {"unavailable_grace_s": 1.0}}
    async with TestCluster(nodes=3, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await deployed(cluster, manifest(1))
        lease = await cluster.leader()
        assert lease is not None
        text = manifest(2, update={"max_unavailable": 1}, slow_s=0.15)
        await cluster.deployments.apply(text)

        async def begun() -> bool:
            return (await cluster.deployments.rollout("p")).updated >= 2

        await eventually(begun, message="it has begun")
        nodes.nodes[lease.holder].kill_all()
        left = REPLICAS - (await cluster.deployments.rollout("p")).updated
        assert left > 0, "it was finished before the leader died"
        assert (await cluster.deployments.wishes())["p"].rolling
        sent = [f"k{number}" for number in range(40)]
        for number, key in enumerate(sent):
            await cluster.send(f"p-{number % REPLICAS}", "version", {}, id=key, timeout=10)
        await cluster.deployments.wait_rollout("p", timeout=60)

        async def handled() -> bool:
            total = 0
            for number in range(REPLICAS):
                stored = await cluster.agents.state(f"p-{number}")
                total += 0 if stored is None else stored["state"]["handled"]
            return total == len(sent)

        await eventually(handled, timeout=20, message="each signal is handled once")
        after = await cluster.leader()
        assert after is not None
        assert after.holder != lease.holder
        assert after.term > lease.term

        async def finisher() -> str | None:
            events = await cluster.events.list(topic="deployment")
            return next((event.source for event in events if event.what == "rolled_out"), None)

        assert await eventually(finisher, message="its end is told") != lease.holder
        assert await versions(cluster) == ["2"] * REPLICAS
