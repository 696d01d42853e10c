"""Three brokers, three copies: a broker's death is a pause of the writes and no node's death."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import api
from foundation_nats.config import BusConfig
from foundation_nats.errors import BusError
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.brokers import Brokers
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


async def stream_leader(cluster: Cluster, stream: str) -> str:
    """The name of the server that leads *stream*."""
    info = await api(cluster.bus, "STREAM.INFO", stream)
    return str(info["cluster"]["leader"])


def meta_leader(brokers: Brokers) -> TestServer:
    """The server that decides about streams, by what it said when it was elected."""
    said = "Self is new JetStream cluster metadata leader"
    return next(server for server in brokers.servers if said in server.log_tail(2000))


@asynccontextmanager
async def replicated(nodes: int = 3) -> AsyncIterator[tuple[Brokers, TestCluster]]:
    """Three brokers, and nodes whose streams have three copies."""
    async with Brokers() as brokers:
        probe = await Bus.connect(BusConfig(servers=tuple(brokers.urls)), "probe")
        try:
            await eventually(lambda: api(probe, "INFO"), timeout=30, message="they have a leader")
        finally:
            await probe.close()
        async with TestCluster(
            nodes=nodes, path=[str(AGENTS)], urls=brokers.urls, settings={"replicas": 3}
        ) as running:
            yield brokers, running


async def under_load(
    nodes: TestCluster, trouble: Callable[[workload.Load], Awaitable[None]]
) -> None:
    """Run *trouble* while signals flow; nothing lost or repeated, nobody down, nobody moved."""
    cluster = nodes.client
    await workload.deploy(nodes)
    homes = {info.id: (info.node, info.epoch) for info in await cluster.agents.list()}
    load = workload.Load(cluster)
    load.start()
    await eventually(lambda: load.receipts > 100, message="load flows")
    await trouble(load)
    history = await load.stop()
    await workload.verdict(nodes, history)
    await workload.everyone_runs_once(nodes, timeout=60)
    after = {info.id: (info.node, info.epoch) for info in await cluster.agents.list()}
    assert after == homes, "an agent was moved although no node had died"
    events = await eventually(lambda: cluster.events.list(topic="node"), timeout=30)
    assert not [event for event in events if event.what == "down"]


async def writes_again(load: workload.Load, *, timeout: float = 60) -> None:
    """Wait until signals are stored again, and say how long that took."""
    before, since = load.receipts, monotonic()
    await eventually(lambda: load.receipts > before + 50, timeout=timeout, message="writes go on")
    print(f"writes back after {monotonic() - since:.1f} s")


async def asks_again(cluster: Cluster) -> None:
    """An ask is answered."""
    for _ in range(20):
        try:
            await cluster.ask("ledger-0", "ledger.length", timeout=2)
        except FoundationError:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("no ask was answered")


@pytest.mark.slow
async def test_a_dead_stream_leader_stalls_writes_and_moves_nobody() -> None:
    """SIGKILL of the broker that leads the mailboxes: asks go on, no node is declared down (F1-F3)."""
    async with replicated() as (brokers, nodes):
        cluster = nodes.client

        async def trouble(load: workload.Load) -> None:
            victim = brokers.named(await stream_leader(cluster, cluster.subjects.signals_stream))
            victim.kill()
            await writes_again(load, timeout=40)
            await victim.restart()
            await asks_again(cluster)

        await under_load(nodes, trouble)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("led", ["state", "leases", "agents", "meta"])
async def test_a_dead_leader_of_anything_else_moves_nobody(led: str) -> None:
    """The same for the states, the lease, the registry, and the servers' own cluster (R-25)."""
    async with replicated() as (brokers, nodes):
        cluster = nodes.client

        async def trouble(load: workload.Load) -> None:
            if led == "meta":
                victim = meta_leader(brokers)
            else:
                stream = cluster.subjects.bucket_stream(led)
                victim = brokers.named(await stream_leader(cluster, stream))
            victim.kill()
            await writes_again(load)
            await victim.restart()

        await under_load(nodes, trouble)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
# nats-py leaves it to the garbage collector to close a connection to a server that says nothing.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_frozen_stream_leader_that_comes_back_changes_nothing() -> None:
    """SIGSTOP for 20 s, SIGCONT: it leads no more, and what it held back is not stored twice (R-26)."""
    async with replicated() as (brokers, nodes):
        cluster = nodes.client

        async def trouble(load: workload.Load) -> None:
            victim = brokers.named(await stream_leader(cluster, cluster.subjects.signals_stream))
            victim.freeze()
            try:
                await asyncio.sleep(20)
            finally:
                victim.thaw()
            await writes_again(load)

        await under_load(nodes, trouble)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_a_rolling_restart_of_all_brokers_fails_nothing() -> None:
    """One after the other is stopped in good order and started again (R-27)."""
    async with replicated() as (brokers, nodes):

        async def trouble(load: workload.Load) -> None:
            for server in brokers.servers:
                await server.end()
                await server.restart()
                await writes_again(load)

        await under_load(nodes, trouble)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_without_a_majority_everything_waits_and_nobody_is_declared_dead() -> None:
    """Two of three brokers die for a minute: senders get explicit errors; all resumes by itself (R-19, R-28)."""
    async with replicated(nodes=2) as (brokers, nodes):
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="aside")

        async def trouble(load: workload.Load) -> None:
            victims = brokers.servers[1:]
            for victim in victims:
                victim.kill()
            lost_at = monotonic()
            with pytest.raises(BusError):
                await cluster.send("aside", "counter.add", {"amount": 1}, timeout=2)
            assert monotonic() - lost_at < 5, "an error, not a hang"
            await asyncio.sleep(60)
            for victim in victims:
                await victim.restart()
            await writes_again(load)

        await under_load(nodes, trouble)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_a_broker_whose_store_was_wiped_catches_up() -> None:
    """Its disk is empty when it comes back; then another one dies, and nothing is missing (R-29)."""
    async with replicated(nodes=2) as (brokers, nodes):

        async def trouble(load: workload.Load) -> None:
            first, second, _ = brokers.servers
            first.kill()
            await writes_again(load)
            shutil.rmtree(first.store / "jetstream")
            await first.restart()

            async def caught_up() -> bool:
                info = await api(
                    nodes.client.bus, "STREAM.INFO", nodes.client.subjects.signals_stream
                )
                return all(
                    replica.get("current") and not replica.get("offline")
                    for replica in info["cluster"]["replicas"]
                )

            await eventually(caught_up, timeout=60, every=0.5, message="three copies again")
            second.kill()
            await writes_again(load)
            await second.restart()

        await under_load(nodes, trouble)
