"""A frozen node that comes back: none of its writes is accepted, none of its answers is given."""

from __future__ import annotations

import asyncio

import pytest

from foundation_nats import FoundationError
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.links import Link
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

QUICK = {
    "liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0},
}


@pytest.mark.parametrize("leads", [False, True])
async def test_a_frozen_node_is_fenced_and_drops_its_copies(leads: bool) -> None:
    """SIGSTOP until its agents have moved, SIGCONT: it writes nothing, answers nothing, joins anew."""
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)], settings=QUICK) as nodes:
        cluster = nodes.client
        await workload.deploy(nodes)
        epochs = workload.EpochWatch()
        await epochs.open(cluster)
        load = workload.Load(cluster)
        load.start()
        await eventually(lambda: load.receipts > 100, message="load flows")
        leader = await nodes.leader()
        victim = next(node for node in nodes.nodes.values() if (node is leader) == leads)
        incarnation = (await cluster.nodes.get(victim.name)).incarnation
        held = {info.id: info.epoch for info in await cluster.agents.list(node=victim.name)}
        assert held, "void: the victim hosts nothing"
        victim.pause()

        async def moved() -> bool:
            infos = {info.id: info for info in await cluster.agents.list()}
            return all(
                infos[id].node != victim.name and infos[id].status == "running" for id in held
            )

        await eventually(moved, timeout=30, message="its agents run elsewhere")
        lengths = {
            id: await cluster.ask(id, "ledger.length", timeout=5)
            for id in held
            if id.startswith("ledger")
        }
        victim.resume()
        # Ask as fast as we can while the zombie wakes up: nobody may answer with old state.
        stale = []

        async def ask_on(id: str) -> None:
            for _ in range(30):
                try:
                    length = await cluster.ask(id, "ledger.length", timeout=5)
                except FoundationError:
                    continue
                if length < lengths[id]:
                    stale.append((id, length, lengths[id]))

        await asyncio.gather(*(ask_on(id) for id in lengths))
        assert not stale, stale

        async def back() -> bool:
            node = await cluster.nodes.get(victim.name)
            return node.status == "up" and node.incarnation > incarnation

        await eventually(back, timeout=20, message="it joins again under a new incarnation")
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)
        epochs.check()
        for id, epoch in held.items():
            stored = await cluster.agents.state(id)
            assert stored is not None
            assert stored["epoch"] > epoch
            assert stored["writer"]["node"] != victim.name or (
                stored["writer"]["incarnation"] > incarnation
            ), f"{id}: the zombie's write was accepted"


async def test_a_frozen_worker_is_killed_and_its_agents_recovered() -> None:
    """SIGSTOP of a worker alone: its manager notices, kills it, and re-claims its agents."""
    settings = {"worker": {"hang_after_s": 1.5}}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="visits", critical=True)
        await cluster.send("visits", "counter.add", {"amount": 2})
        import signal

        (worker,) = nodes.nodes["n1"].workers()
        worker.send_signal(signal.SIGSTOP)
        await cluster.send("visits", "counter.add", {"amount": 3})

        async def answers() -> bool:
            return bool(await cluster.ask("visits", "counter.get", timeout=0.5) == 5)

        await eventually(answers, timeout=20, message="it answers with both signals applied")
        assert (await cluster.agents.get("visits")).epoch == 2


async def test_a_node_cut_off_in_silence_is_replaced_and_comes_back() -> None:
    """Packets are swallowed, nothing is closed: it fences itself, is replaced, and heals (R-14)."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)], settings=QUICK) as nodes:
        cluster = nodes.client
        host, port = nodes.server.url.removeprefix("nats://").split(":")
        async with await Link.open(host, int(port)) as link:
            nodes.start_node("far", environment={"FOUNDATION_BUS__SERVERS": link.url})
            await nodes.wait_up(["n1", "n2", "far"])
            await workload.deploy(nodes)
            load = workload.Load(cluster)
            load.start()
            await eventually(lambda: load.receipts > 100, message="load flows")
            incarnation = (await cluster.nodes.get("far")).incarnation
            held = {info.id for info in await cluster.agents.list(node="far")}
            assert held, "void: the far node hosts nothing"
            link.hold()

            async def moved() -> bool:
                infos = {info.id: info for info in await cluster.agents.list()}
                return all(infos[id].node != "far" and infos[id].status == "running" for id in held)

            await eventually(moved, timeout=30, message="its agents run elsewhere")
            assert nodes.nodes["far"].is_running
            link.release()

            async def back() -> bool:
                node = await cluster.nodes.get("far")
                return node.status == "up" and node.incarnation > incarnation

            await eventually(back, timeout=40, message="it joins again under a new incarnation")
            history = await load.stop()
            await workload.verdict(nodes, history)
            await workload.everyone_runs_once(nodes)
            nodes.nodes["far"].kill_all()
