"""Kill a worker, a node, the leading node or the broker under load: nothing is lost or repeated."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run; printed, so that a failure can be repeated with --seed."""
    chosen = request.config.getoption("--seed")
    value = random.randrange(1 << 32) if chosen is None else int(chosen)
    print(f"seed={value}")
    return value


async def under_load(nodes: TestCluster, trouble, *, minimum: int = 200) -> None:
    """Run *trouble* while signals flow, then judge."""
    await workload.deploy(nodes)
    epochs = workload.EpochWatch()
    await epochs.open(nodes.client)
    load = workload.Load(nodes.client)
    load.start()
    await eventually(lambda: load.receipts > 50, message="load flows")
    await trouble()
    await eventually(lambda: load.receipts > minimum, timeout=30, message="load flows on")
    history = await load.stop()
    await workload.verdict(nodes, history, minimum=minimum)
    await workload.everyone_runs_once(nodes)
    epochs.check()


async def test_a_killed_worker_loses_and_repeats_nothing(seed: int) -> None:
    """SIGKILL of worker processes at random moments: their manager restarts them."""
    chance = random.Random(seed)
    async with TestCluster(nodes=2, workers=2, path=[str(AGENTS)]) as nodes:

        async def trouble() -> None:
            for _ in range(3):
                await asyncio.sleep(chance.uniform(0.05, 0.4))
                victim = chance.choice(chance.choice(list(nodes.nodes.values())).workers())
                victim.send_signal(signal.SIGKILL)
                await asyncio.sleep(chance.uniform(0.3, 0.8))

        await under_load(nodes, trouble)


async def test_a_killed_node_loses_and_repeats_nothing(seed: int) -> None:
    """SIGKILL of a node that does not lead, manager and workers at once."""
    chance = random.Random(seed)
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)]) as nodes:

        async def trouble() -> None:
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            leader = await nodes.leader()
            victim = chance.choice([n for n in nodes.nodes.values() if n is not leader])
            killed_at = time.monotonic()
            victim.kill_all()

            async def moved() -> bool:
                return not await nodes.client.agents.list(node=victim.name)

            await eventually(moved, timeout=15, message="agents leave the dead node")
            await workload.everyone_runs_once(nodes)
            print(f"failover took {time.monotonic() - killed_at:.2f} s")

        await under_load(nodes, trouble)


async def test_a_killed_manager_takes_its_workers_with_it() -> None:
    """SIGKILL of the manager alone: no worker survives, the agents move."""
    async with TestCluster(nodes=2, workers=2, path=[str(AGENTS)]) as nodes:

        async def trouble() -> None:
            leader = await nodes.leader()
            victim = next(n for n in nodes.nodes.values() if n is not leader)
            workers = victim.workers()
            assert len(workers) == 2
            victim.kill()
            await eventually(
                lambda: not any(w.is_running() and w.status() != "zombie" for w in workers),
                timeout=5,
                message="workers end with their manager",
            )

        await under_load(nodes, trouble)


async def test_the_leading_node_may_die_too(seed: int) -> None:
    """SIGKILL of the node that leads: another takes over and finishes the failover."""
    chance = random.Random(seed)
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)]) as nodes:

        async def trouble() -> None:
            leader = await nodes.leader()
            term = (await nodes.client.leader()).term
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            leader.kill_all()

            async def succeeded() -> bool:
                lease = await nodes.client.leader()
                return lease is not None and lease.holder != leader.name and lease.term > term

            await eventually(succeeded, timeout=15, message="another node leads")

        await under_load(nodes, trouble)


async def test_the_broker_may_be_killed_and_restarted(seed: int) -> None:
    """SIGKILL of the broker under load, and a restart on the same store, several times."""
    chance = random.Random(seed)
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:

        async def trouble() -> None:
            for _ in range(3):
                await asyncio.sleep(chance.uniform(0.1, 0.6))
                nodes.server.kill()
                await asyncio.sleep(chance.uniform(0.0, 0.3))
                await nodes.server.restart()

        await under_load(nodes, trouble)
        # A broker outage is no node failure: nobody was declared down.
        downs = [
            event for event in await nodes.client.events.list(topic="node") if event.what == "down"
        ]
        assert not downs, downs
