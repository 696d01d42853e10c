"""Connections that flap, are late, stay open and silent, or swallow what was promised."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig
from foundation_nats.errors import BusTimeoutError
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.links import Link
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

QUICK = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0}}


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """The choices of this run; its seed is printed, and repeated with --seed."""
    chosen = request.config.getoption("--seed")
    seed = random.randrange(1 << 32) if chosen is None else int(chosen)
    print(f"seed={seed}")
    return random.Random(seed)


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the full time is taken, as under --chaos."""
    return bool(request.config.getoption("--chaos"))


@pytest.fixture
def chaos(is_long: bool) -> None:
    """Only under --chaos."""
    if not is_long:
        pytest.skip("needs --chaos")


async def link_to(server: TestServer) -> Link:
    """A link that a test can break, to a server."""
    host, _, port = server.url.removeprefix("nats://").partition(":")
    return await Link.open(host, int(port))


@asynccontextmanager
async def far_nodes(*names: str) -> AsyncIterator[tuple[TestCluster, dict[str, Link]]]:
    """A node n1 at the server, and others that reach it through a link each."""
    async with (
        AsyncExitStack() as stack,
        TestCluster(nodes=1, path=[str(AGENTS)], settings=QUICK) as nodes,
    ):
        links = {}
        for name in names:
            links[name] = await stack.enter_async_context(await link_to(nodes.server))
            nodes.start_node(name, environment={"FOUNDATION_BUS__SERVERS": links[name].url})
        await nodes.wait_up(["n1", *names])
        try:
            yield nodes, links
        finally:
            for name in names:
                nodes.nodes[name].kill_all()


async def under_load(nodes: TestCluster, trouble: Callable[[], Awaitable[None]]) -> None:
    """Run *trouble* while signals flow, then judge."""
    await workload.deploy(nodes)
    epochs = workload.EpochWatch()
    await epochs.open(nodes.client)
    load = workload.Load(nodes.client)
    load.start()
    await eventually(lambda: load.receipts > 50, message="load flows")
    await trouble()
    history = await load.stop()
    await workload.verdict(nodes, history)
    await workload.everyone_runs_once(nodes)
    epochs.check()


async def downs(cluster: Cluster) -> list[str]:
    """Which nodes were declared down."""
    events = await cluster.events.list(topic="node", limit=1000)
    return [str(event.data.get("node")) for event in events if event.what == "down"]


async def test_a_flapping_node_is_no_storm(is_long: bool) -> None:
    """200 ms on, 200 ms off: no agent moves more than once, and none for nothing (R-16)."""
    async with far_nodes("far") as (nodes, links):
        cluster = nodes.client

        async def flap() -> None:
            before = {info.id: info.epoch for info in await cluster.agents.list()}
            end = monotonic() + (60 if is_long else 3)
            while monotonic() < end:
                links["far"].cut()
                await asyncio.sleep(0.2)
                links["far"].heal()
                await asyncio.sleep(0.2)
            await workload.everyone_runs_once(nodes)
            after = {info.id: info.epoch for info in await cluster.agents.list()}
            moves = {id: after[id] - before[id] for id in after}
            assert max(moves.values()) <= 1, moves

        await under_load(nodes, flap)


@pytest.mark.usefixtures("chaos")
async def test_a_slow_node_is_not_declared_down(chance: random.Random) -> None:
    """200 ms ± 100 ms each way for longer than the limit of silence: all go on (R-17)."""
    async with far_nodes("far") as (nodes, links):
        cluster = nodes.client

        async def be_slow() -> None:
            end = monotonic() + 60
            while monotonic() < end:
                links["far"].delay(chance.uniform(0.1, 0.3))
                await asyncio.sleep(0.1)
            links["far"].delay(0)

        await under_load(nodes, be_slow)
        assert await downs(cluster) == []


@pytest.mark.usefixtures("chaos")
async def test_links_that_clog_one_after_the_other_lose_nothing(chance: random.Random) -> None:
    """Swizzle: clog one by one in a random order, unclog in another (R-20)."""
    async with far_nodes("far", "farther") as (nodes, links):

        async def swizzle() -> None:
            for _ in range(8):
                for links_in_order, verb in (
                    (chance.sample(list(links.values()), len(links)), Link.hold),
                    (chance.sample(list(links.values()), len(links)), Link.release),
                ):
                    for link in links_in_order:
                        await asyncio.sleep(chance.uniform(0.1, 3.0))
                        verb(link)

        await under_load(nodes, swizzle)


async def test_a_lost_receipt_is_fetched_again_and_the_signal_counts_once() -> None:
    """The server stores it, and what it says never arrives: `send` repeats it by itself (R-22)."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        near = nodes.client
        await near.agents.start("fleet:Counter", id="c")
        async with (
            await link_to(nodes.server) as link,
            Cluster.connect(link.url, config=nodes.config, name="far") as far,
        ):
            stored = near.bus

            async def last() -> int:
                from foundation_nats.bus.streams import StreamReader

                info = await StreamReader(stored, near.subjects.signals_stream).info()
                return int(info["state"]["last_seq"])

            for number in range(8):
                before = await last()
                link.hold("down")
                sending = asyncio.create_task(
                    far.send("c", "counter.add", {"amount": 1}, id=f"s{number}", timeout=15)
                )

                async def is_stored(sequence: int = before) -> bool:
                    return await last() > sequence

                await eventually(is_stored, message="it is stored")
                assert not sending.done(), "void: the receipt was not lost"
                link.cut()
                await asyncio.sleep(0)
                link.heal()
                receipt = await sending
                assert receipt.duplicate, "the first one was stored, and this is its repeat"
            # A sender that gives up meanwhile is told that it does not know.
            link.hold("down")
            with pytest.raises(BusTimeoutError, match="same id"):
                await far.send("c", "counter.add", {"amount": 1}, id="last", timeout=0.5)
            link.cut()
            link.heal()
            again = await far.send("c", "counter.add", {"amount": 1}, id="last", timeout=15)
            assert again.duplicate

            async def counted() -> bool:
                return bool(await near.ask("c", "counter.get") == 9)

            await eventually(counted, message="each once")


@pytest.mark.usefixtures("chaos")
async def test_a_node_that_does_not_hear_its_own_commits_repeats_no_effect() -> None:
    """Its commits are stored and it never hears of it; the connection drops and is made anew (R-22)."""
    async with far_nodes("far") as (nodes, links):

        async def deafen() -> None:
            for _ in range(20):
                links["far"].hold("down")
                await asyncio.sleep(0.15)
                links["far"].cut()
                await asyncio.sleep(0.05)
                links["far"].heal()
                await asyncio.sleep(0.4)

        await under_load(nodes, deafen)


async def test_fifty_clients_that_are_cut_at_once_are_back_soon() -> None:
    """With the pauses that the client's jitter makes; nobody is declared down (R-21)."""
    async with (
        TestCluster(nodes=2, path=[str(AGENTS)]) as nodes,
        await link_to(nodes.server) as link,
        AsyncExitStack() as stack,
    ):
        config = BusConfig(servers=(link.url,))
        clients = []
        for number in range(50):
            client = await Bus.connect(config, f"client-{number}")
            stack.push_async_callback(client.close)
            clients.append(client)
        began = monotonic()
        link.cut()
        await eventually(lambda: not any(c.is_connected for c in clients), message="all are cut")
        link.heal()
        healed = monotonic()
        await eventually(lambda: all(c.is_connected for c in clients), message="all are back")
        print(f"cut for {healed - began:.2f} s; back after {monotonic() - healed:.2f} s")
        assert monotonic() - healed < 5
        assert await downs(nodes.client) == []
        assert {node.status for node in await nodes.client.nodes.list()} == {"up"}


async def test_a_connection_that_is_open_and_silent_is_found_and_replaced(
    server: TestServer,
) -> None:
    """As behind a router that forgot it: three pings without an answer; 6 s by default (R-23)."""
    async with await link_to(server) as link:
        bus = await Bus.connect(
            BusConfig(servers=(link.url,), ping_interval_s=0.4, connect_timeout_s=1.0), "client"
        )
        try:
            link.hold()
            began = monotonic()
            await eventually(lambda: not bus.is_connected, timeout=10, message="it is found")
            assert monotonic() - began <= 3 * 0.4 + 0.6
            link.release()
            await eventually(lambda: bus.is_connected, message="it is replaced")
        finally:
            await bus.close()
