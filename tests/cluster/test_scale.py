"""Sizes: mass failover, fast growth, one hot agent, slow observers; small here, larger with --chaos."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack

import psutil
import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the full size is taken, as under --chaos."""
    return bool(request.config.getoption("--chaos"))


def counters(replicas: int) -> str:
    """A manifest of critical counters."""
    return f"""
version: 1
agents: [{{name: c, run: "fleet:Counter", replicas: {replicas}, critical: true}}]
"""


async def all_run(cluster: Cluster, count: int) -> bool:
    """Whether so many run, and no others are there."""
    infos = await cluster.agents.list()
    return len(infos) == count and all(info.status == "running" for info in infos)


async def probe(cluster: Cluster, agent: str, count: int = 100) -> list[float]:
    """Seconds of so many asks, one after the other."""
    found = []
    for _ in range(count):
        began = monotonic()
        await cluster.ask(agent, "counter.get", timeout=10)
        found.append(monotonic() - began)
    return sorted(found)


async def test_half_of_the_nodes_die_at_once(is_long: bool) -> None:
    """Two of five at once: verdicts are held for a while, then all runs elsewhere (R-59)."""
    agents = 3_000 if is_long else 300
    settings = {"liveness": {"storm_hold_s": 1.0}}
    async with TestCluster(nodes=5, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(counters(agents))
        await cluster.deployments.wait_settled(["c"], timeout=60)
        leader = await nodes.leader()
        victims = [node for node in nodes.nodes.values() if node is not leader][:2]
        began = monotonic()
        for victim in victims:
            victim.kill_all()
        names = {victim.name for victim in victims}

        async def moved() -> bool:
            infos = await cluster.agents.list()
            return all(info.status == "running" and info.node not in names for info in infos)

        await eventually(moved, timeout=90, every=0.1, message="all run elsewhere")
        print(f"{agents} agents, 2 of 5 nodes: {monotonic() - began:.2f} s")
        await workload.everyone_runs_once(nodes)
        downs = [e for e in await cluster.events.list(topic="node") if e.what == "down"]
        assert {str(event.data.get("node")) for event in downs} <= names, "a cascade"


async def test_a_deployment_grows_from_nothing_and_shrinks_to_nothing(is_long: bool) -> None:
    """0, many, 0, many: each replica once, and nothing is left (R-60)."""
    many = 10_000 if is_long else 500
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(counters(0))
        for wanted in (many, 0, many // 2, 0):
            began = monotonic()
            await cluster.deployments.scale("c", wanted)
            await eventually(
                lambda count=wanted: all_run(cluster, count),
                timeout=120,
                every=0.05,
                message=f"{wanted} run",
            )
            print(f"to {wanted:,}: {monotonic() - began:.2f} s")
            if wanted:
                await workload.everyone_runs_once(nodes)
        for node in await cluster.nodes.list():
            assert await workload.inspect(cluster, node.name) == {}


async def test_ten_nodes_of_two_workers_hold_ten_thousand_agents(is_long: bool) -> None:
    """On one machine: all answer, also after the leader has died, and idle they cost little."""
    if not is_long:
        pytest.skip("needs --chaos")
    if psutil.virtual_memory().available < 6e9:
        pytest.skip("needs 6 GB of memory")
    agents = 10_000
    async with TestCluster(nodes=10, workers=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        began = monotonic()
        report = await cluster.deployments.deploy(counters(agents), timeout=120)
        print(f"deployed in {monotonic() - began:.1f} s")
        assert [str(phase.state) for phase in report.phases] == ["passed"] * 4

        async def all_answer() -> None:
            gate = asyncio.Semaphore(200)

            async def one(number: int) -> None:
                async with gate:
                    assert await cluster.ask(f"c-{number}", "counter.get", timeout=60) == 0

            began = monotonic()
            await asyncio.gather(*(one(number) for number in range(agents)))
            print(f"all have answered in {monotonic() - began:.1f} s")

        await all_answer()
        counts = [node.agents for node in await cluster.nodes.list()]
        assert max(counts) - min(counts) <= agents // 50, counts
        await asyncio.sleep(8)  # until nobody has anything to say any more
        family = [process for node in nodes.nodes.values() for process in node.family()]

        def used() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in family)

        before, at = used(), monotonic()
        await asyncio.sleep(10)
        share = (used() - before) / (monotonic() - at)
        resident = sum(process.memory_info().rss for process in family) / 1e6
        print(f"idle: {share:.1%} of a core, {resident:,.0f} MB")
        assert share < 0.3
        leader = await nodes.leader()
        leader.kill_all()

        async def elsewhere() -> bool:
            infos = await cluster.agents.list()
            return all(info.status == "running" and info.node != leader.name for info in infos)

        began = monotonic()
        await eventually(elsewhere, timeout=60, every=0.2, message="all run elsewhere")
        print(f"the leader's agents run elsewhere after {monotonic() - began:.1f} s")
        await all_answer()


async def test_a_hot_agent_slows_its_neighbours_little(is_long: bool) -> None:
    """One agent with all the traffic that it can take, among idle ones in its worker (R-62)."""
    idle = 3_000 if is_long else 100
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(counters(idle))
        await cluster.agents.start("fleet:Counter", id="hot")
        await cluster.deployments.wait_settled(["c"], timeout=60)
        calm = await probe(cluster, "c-7")
        stopping = asyncio.Event()
        sent = 0

        async def heat() -> None:
            nonlocal sent
            while not stopping.is_set():
                await cluster.send("hot", "counter.add", {"amount": 1}, timeout=10)
                sent += 1

        heating = [asyncio.create_task(heat()) for _ in range(20)]
        await eventually(lambda: sent > 500, message="it is hot")
        hot = await probe(cluster, "c-7")
        stopping.set()
        await asyncio.gather(*heating)
        calm_ms, hot_ms = statistics.median(calm) * 1e3, statistics.median(hot) * 1e3
        print(f"ask of a neighbour: {calm_ms:.2f} ms calm, {hot_ms:.2f} ms beside a hot one")
        # The sender shares this process, so its own queueing is in the figure, too.
        assert hot[-1] < 1.0
        assert hot_ms < calm_ms * 20 + 20

        async def all_counted() -> bool:
            return bool(await cluster.ask("hot", "counter.get") == sent)

        await eventually(all_counted, timeout=20, message="nothing is lost")


async def test_twenty_taps_that_nobody_reads_slow_no_agent() -> None:
    """Their queues are bounded, and the agent does not know of them (R-46)."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes, AsyncExitStack() as stack:
        cluster = nodes.client
        observer = await stack.enter_async_context(
            Cluster.connect(config=nodes.config, name="observer")
        )
        await cluster.agents.start("fleet:Counter", id="c")
        calm = await probe(cluster, "c")
        taps = [await stack.enter_async_context(observer.taps.open(agent="c")) for _ in range(20)]
        for _ in range(300):
            await cluster.send("c", "counter.add", {"amount": 1, "pad": "x" * 2000})
        watched = await probe(cluster, "c")
        print(f"median ask: {calm[50] * 1e3:.2f} ms, with taps {watched[50] * 1e3:.2f} ms")
        assert watched[50] < calm[50] * 10 + 0.01
        assert watched[-1] < 1.0
        assert (await cluster.agents.get("c")).epoch == 1
        item = await anext(aiter(taps[0]))
        assert item is not None
