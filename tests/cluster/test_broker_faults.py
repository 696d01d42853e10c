"""One server that is away for long, or comes back with many mailboxes."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from foundation_nats.base.clock import monotonic
from foundation_nats.bus.streams import StreamReader
from foundation_nats.errors import BusError
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

_MIB = 1024**2


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the full time and size are taken, as under --chaos."""
    return bool(request.config.getoption("--chaos"))


async def test_a_bus_that_is_away_for_long_costs_no_memory_and_repeats_nothing(
    is_long: bool,
) -> None:
    """Nodes live on and keep trying; senders are told; afterwards all goes on by itself (R-30)."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await workload.deploy(nodes)
        epochs = {info.id: info.epoch for info in await cluster.agents.list()}
        load = workload.Load(cluster)
        load.start()
        await eventually(lambda: load.receipts > 200, message="load flows")
        family = [member for node in nodes.nodes.values() for member in node.family()]
        nodes.server.kill()
        with pytest.raises(BusError):
            await cluster.send("aside", "counter.add", {"amount": 1}, timeout=0.5)
        before = {member.pid: member.memory_info().rss for member in family}
        end = monotonic() + (60 if is_long else 2)
        busy = {member.pid: member.cpu_times() for member in family}
        began = monotonic()
        while monotonic() < end:
            await asyncio.sleep(0.2)
        took = monotonic() - began
        for member in family:
            grown = member.memory_info().rss - before[member.pid]
            assert grown < 8 * _MIB, f"{member.pid} grew by {grown / _MIB:.1f} MiB"
            spent = member.cpu_times()
            share = (spent.user + spent.system - sum(busy[member.pid][:2])) / took
            assert share < 0.3, f"{member.pid} spins: {share:.0%} of a core"
        await nodes.server.restart()
        receipts = load.receipts
        await eventually(lambda: load.receipts > receipts + 100, timeout=30, message="it flows on")
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)
        assert {info.id: info.epoch for info in await cluster.agents.list()} == epochs
        assert all(member.is_running() for member in family)
        events = await cluster.events.list(topic="node")
        assert not [event for event in events if event.what == "down"]


async def test_a_server_that_comes_back_with_many_mailboxes_serves_them_soon(
    is_long: bool,
) -> None:
    """Signals for agents that nobody runs, a restart, and the cluster takes up its work (R-61)."""
    many = 20_000 if is_long else 1_000
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="c")

        async def fill(first: int) -> None:
            for number in range(first, many, 50):
                await cluster.send(f"absent-{number}", "counter.add", {"amount": 1}, timeout=30)

        await asyncio.gather(*(fill(first) for first in range(50)))
        nodes.server.kill()
        began = monotonic()
        await nodes.server.restart()

        async def answers() -> bool:
            await cluster.send("c", "counter.add", {"amount": 1}, timeout=1)
            return bool(await cluster.ask("c", "counter.get", timeout=1) >= 1)

        await eventually(answers, timeout=60, message="the agent works")
        took = monotonic() - began
        rss = psutil.Process(nodes.server.pid).memory_info().rss / _MIB
        print(f"{many:,} mailboxes: {took:.2f} s until an agent has counted; broker {rss:.0f} MiB")
        assert took < (30 if is_long else 10)
        info = await StreamReader(cluster.bus, cluster.subjects.signals_stream).info()
        assert info["state"]["num_subjects"] > many
        assert rss < 1024
