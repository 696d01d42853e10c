"""Real partitions: servers and nodes with networks of their own, whose cables are pulled.

Packets are lost below TCP here, which a proxy can't do; see `foundation_nats.testing.namespaces`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.clock import monotonic
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.links import Link
from foundation_nats.testing.namespaces import PORT, Lan, LanServer, can_part
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(180),
    pytest.mark.skipif(can_part() is not None, reason=can_part() or ""),
]

QUICK = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0}}
REPLICATED = {
    "liveness": {"suspect_after_s": 1.0, "down_after_s": 3.0, "bus_grace_s": 12.0},
    "replicas": 3,
}


@dataclass
class Site:
    """A cluster whose every server and node has a network of its own."""

    lan: Lan
    nodes: TestCluster
    servers: list[LanServer] = field(default_factory=list)

    def start(self, name: str, servers: Sequence[LanServer]) -> None:
        """Start a node that knows these servers."""
        urls = ",".join(server.lan_url for server in servers)
        self.nodes.start_node(
            name,
            environment={"FOUNDATION_BUS__SERVERS": urls},
            prefix=self.lan.host(name).prefix,
        )

    def door(self, server: LanServer, name: str) -> AbstractAsyncContextManager[Cluster]:
        """A client at one server, by a way that no trouble closes."""
        return Cluster.connect(server.url, config=self.nodes.config, name=name)

    async def downs(self) -> list[str]:
        """Which nodes were declared down."""
        events = await self.nodes.client.events.list(topic="node", limit=1000)
        return [str(event.data.get("node")) for event in events if event.what == "down"]


@asynccontextmanager
async def site(names: Sequence[str], *, brokers: int = 1) -> AsyncIterator[Site]:
    """Servers b1, … and nodes of these names; with several servers each node prefers its own."""
    async with AsyncExitStack() as stack:
        lan = stack.enter_context(Lan())
        hosts = [lan.host(f"b{number}") for number in range(1, brokers + 1)]
        peers = hosts if brokers > 1 else []
        servers = [LanServer(host, peers=peers) for host in hosts]
        await asyncio.gather(*(stack.enter_async_context(server) for server in servers))
        # The test's own client is with the majority.
        urls = [server.url for server in servers[1:] or servers]
        nodes = TestCluster(
            nodes=0,
            path=[str(AGENTS)],
            settings=QUICK if brokers == 1 else REPLICATED,
            urls=urls,
        )
        await stack.enter_async_context(nodes)
        found = Site(lan, nodes, servers)
        for number, name in enumerate(names):
            first = number % brokers
            found.start(name, servers if brokers == 1 else [servers[first]])
        await nodes.wait_up(names, timeout=40)
        try:
            yield found
        finally:
            lan.heal()
            for node in nodes.nodes.values():
                node.kill_all()


async def loaded(site: Site) -> tuple[workload.Load, workload.EpochWatch]:
    """Ledgers and mirrors on all nodes, and signals that flow to them."""
    await workload.deploy(site.nodes)
    epochs = workload.EpochWatch()
    await epochs.open(site.nodes.client)
    load = workload.Load(site.nodes.client)
    load.start()
    await eventually(lambda: load.receipts > 100, timeout=30, message="load flows")
    return load, epochs


async def judge(site: Site, load: workload.Load, epochs: workload.EpochWatch) -> None:
    """Everything receipted took effect once, and everybody runs once."""
    history = await load.stop()

    async def holds() -> bool:
        # A broker that comes back makes the others elect anew, which takes reads some seconds.
        await workload.verdict(site.nodes, history)
        return True

    await eventually(holds, timeout=60, every=0.5)
    await workload.everyone_runs_once(site.nodes, timeout=60)
    epochs.check()


async def runs_elsewhere(site: Site, name: str, held: set[str], timeout: float = 40) -> None:
    """Wait until these agents run on other nodes."""

    async def moved() -> bool:
        infos = {info.id: info for info in await site.nodes.client.agents.list()}
        return all(infos[id].node != name and infos[id].status == "running" for id in held)

    await eventually(moved, timeout=timeout, message=f"the agents of {name} run elsewhere")


async def is_back(site: Site, name: str, incarnation: int) -> None:
    """Wait until the node has joined again under a new incarnation."""

    async def back() -> bool:
        node = await site.nodes.client.nodes.get(name)
        return node.status == "up" and node.incarnation > incarnation

    await eventually(back, timeout=60, message=f"{name} joins again")


async def test_a_node_whose_cable_is_pulled_is_replaced_fenced_and_comes_back() -> None:
    """No packet passes and nothing is closed: its agents run elsewhere, it writes nothing more (R-14)."""
    async with site(["n1", "n2"]) as found:
        cluster = found.nodes.client
        leader = (await found.nodes.leader()).name
        far = "n2" if leader == "n1" else "n1"
        load, epochs = await loaded(found)
        incarnation = (await cluster.nodes.get(far)).incarnation
        held = {info.id for info in await cluster.agents.list(node=far)}
        assert held, "void: it hosts nothing"
        found.lan.partition(far)
        await runs_elsewhere(found, far, held)
        assert found.nodes.nodes[far].is_running
        found.lan.heal()
        await is_back(found, far, incarnation)
        await judge(found, load, epochs)
        for id in held:
            stored = await cluster.agents.state(id)
            assert stored is not None
            writer = stored["writer"]
            assert (writer["node"], writer["incarnation"]) != (far, incarnation), (
                "it was not fenced"
            )


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_node_that_only_hears_or_only_speaks_is_no_member(direction: str) -> None:
    """What it sends is lost, or what it should receive: nobody takes it for well (R-15)."""
    async with site(["n1", "n2", "n3"]) as found:
        cluster = found.nodes.client
        leader = (await found.nodes.leader()).name
        far = next(name for name in ("n1", "n2", "n3") if name != leader)
        load, epochs = await loaded(found)
        incarnation = (await cluster.nodes.get(far)).incarnation
        held = {info.id for info in await cluster.agents.list(node=far)}
        assert held, "void: it hosts nothing"
        if direction == "up":
            found.lan.silence(far, "b1")
        else:
            found.lan.silence("b1", far)
        await runs_elsewhere(found, far, held)
        found.lan.heal()
        await is_back(found, far, incarnation)
        await judge(found, load, epochs)


@pytest.mark.usefixtures("chaos")
async def test_a_narrow_line_that_drops_packets_moves_nobody() -> None:
    """Full queues for eight times the limit of silence: late, not dead (R-17)."""
    async with site(["n1", "n2"]) as found:
        load, epochs = await loaded(found)
        for name in ("n1", "n2"):
            found.lan.narrow(name, 1000)
        before = load.receipts
        await asyncio.sleep(16)
        dropped = sum(found.lan.dropped(name) for name in ("n1", "n2"))
        assert dropped > 0, "void: the line was wide enough"
        assert load.receipts > before
        found.lan.heal()
        await judge(found, load, epochs)
        assert await found.downs() == []


@pytest.mark.usefixtures("chaos")
async def test_a_split_of_one_broker_and_its_node_from_the_others_commits_on_one_side_alone() -> (
    None
):
    """The minority receipts nothing, the majority goes on with all agents, and it heals (R-18)."""
    async with site(["n1", "n2", "n3"], brokers=3) as found:
        cluster = found.nodes.client
        load, epochs = await loaded(found)
        incarnation = (await cluster.nodes.get("n1")).incarnation
        held = {info.id for info in await cluster.agents.list(node="n1")}
        assert held, "void: it hosts nothing"
        async with found.door(found.servers[0], "minority") as alone:
            found.lan.split({"b1", "n1"}, {"b2", "b3", "n2", "n3"})
            # Long enough for the servers themselves to find out that they are parted.
            await runs_elsewhere(found, "n1", held, timeout=60)
            for number in range(3):
                with pytest.raises(FoundationError):
                    await alone.send("nobody", "note", number, timeout=2)
            before = load.receipts
            await eventually(lambda: load.receipts > before + 50, timeout=30, message="it goes on")
            found.lan.heal()
        await is_back(found, "n1", incarnation)
        await judge(found, load, epochs)


@pytest.mark.usefixtures("chaos")
async def test_a_broker_whose_cable_is_pulled_costs_its_node_and_nothing_else() -> None:
    """One of three brokers is gone from the network: writes pause and go on (R-18, R-25)."""
    async with site(["n1", "n2", "n3"], brokers=3) as found:
        load, epochs = await loaded(found)
        held = {info.id for info in await found.nodes.client.agents.list(node="n1")}
        assert held, "void: it hosts nothing"
        found.lan.partition("b1")
        before = load.receipts
        await eventually(lambda: load.receipts > before + 200, timeout=30, message="it goes on")
        await runs_elsewhere(found, "n1", held)
        found.lan.heal()
        await judge(found, load, epochs)


@pytest.mark.usefixtures("chaos")
async def test_who_sits_at_a_broker_whose_cable_is_pulled_goes_to_another() -> None:
    """A client that knows all three notices by its pings and is served by another (R-23, R-25)."""
    async with site(["n1", "n2", "n3"], brokers=3) as found, AsyncExitStack() as stack:
        await workload.deploy(found.nodes)
        here = found.lan.host("client")
        ways = {}
        for server in found.servers:
            address = server.host.address
            link = await stack.enter_async_context(await Link.open(address, PORT, dial=here.dial))
            ways[link.url] = server.host.name
        client = await stack.enter_async_context(
            Cluster.connect(list(ways), config=found.nodes.config, name="far")
        )
        config = found.nodes.config.bus
        broker = ways[client.bus.url]
        found.lan.partition(broker)
        began = monotonic()
        await eventually(
            lambda: client.bus.is_connected and ways[client.bus.url] != broker,
            timeout=30,
            message="it is connected to another",
        )
        took = monotonic() - began
        assert took < 4 * config.ping_interval_s + config.connect_timeout_s, f"{took:.1f} s"
        await eventually(
            lambda: client.send("ledger-1", "ledger.length", timeout=2),
            timeout=30,
            message="it sends",
        )
        found.lan.heal()


@pytest.mark.usefixtures("chaos")
async def test_three_sides_of_one_broker_each_commit_nothing_and_declare_nobody_dead() -> None:
    """No two brokers reach each other: all wait, and when they do all goes on by itself (R-19)."""
    async with site(["n1", "n2", "n3"], brokers=3) as found:
        load, epochs = await loaded(found)
        before = await found.downs()
        lives = {node.name: node.incarnation for node in await found.nodes.client.nodes.list()}
        async with AsyncExitStack() as stack:
            doors = [
                await stack.enter_async_context(found.door(server, f"side-{number}"))
                for number, server in enumerate(found.servers)
            ]
            found.lan.split({"b1", "n1"}, {"b2", "n2"}, {"b3", "n3"})
            began = monotonic()

            async def stands() -> bool:
                receipts = load.receipts
                await asyncio.sleep(2)
                return load.receipts == receipts

            await eventually(stands, timeout=60, message="nothing is receipted any more")
            standing = load.receipts
            while monotonic() - began < 30:
                for number, door in enumerate(doors):
                    with pytest.raises(FoundationError):
                        await door.send("nobody", "note", number, timeout=1)
            assert load.receipts == standing
            found.lan.heal()
            await eventually(
                lambda: load.receipts > standing + 100, timeout=60, message="it goes on"
            )
        await judge(found, load, epochs)
        assert await found.downs() == before == []
        await found.nodes.wait_up(["n1", "n2", "n3"], timeout=30)
        after = {node.name: node.incarnation for node in await found.nodes.client.nodes.list()}
        assert after == lives, "a node was taken for dead"
