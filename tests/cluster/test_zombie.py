"""A frozen node that comes back: none of its writes is accepted, none of its answers is given."""

from __future__ import annotations

import asyncio
import signal
from functools import partial
from uuid import uuid4

import orjson
import pytest

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.clock import monotonic
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import error_body
from foundation_nats.bus.wire import Message
from foundation_nats.errors import AgentUnavailableError, AskTimeoutError, BusError
from foundation_nats.signaling.envelope import encode_envelope
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.links import Link
from foundation_schemas import AgentRecord, AgentStatus, Echo, InspectReply, NodeStatus
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

QUICK = {
    "liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0},
}


async def _loaded(nodes: TestCluster) -> tuple[workload.Load, workload.EpochWatch]:
    """Deploy, watch the epochs, and let signals flow."""
    await workload.deploy(nodes)
    epochs = workload.EpochWatch()
    await epochs.open(nodes.client)
    load = workload.Load(nodes.client)
    load.start()
    await eventually(lambda: load.receipts > 100, message="load flows")
    return load, epochs


@pytest.mark.parametrize("leads", [False, True])
async def test_a_frozen_node_is_fenced_and_drops_its_copies(leads: bool) -> None:
    """SIGSTOP until its agents have moved, SIGCONT: it writes nothing, answers nothing, joins anew."""
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)], settings=QUICK) as nodes:
        cluster = nodes.client
        load, epochs = await _loaded(nodes)
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


async def _a_successor_of_the_name(count: int) -> None:
    """Freeze a node, start another process of its name, thaw the first: it ends, nothing is doubled."""
    async with TestCluster(nodes=count, workers=1, path=[str(AGENTS)], settings=QUICK) as nodes:
        cluster = nodes.client
        load, epochs = await _loaded(nodes)
        old = nodes.nodes["n1"]
        incarnation = (await cluster.nodes.get("n1")).incarnation
        assert await cluster.agents.list(node="n1"), "void: the victim hosts nothing"
        old.pause()
        try:
            new = nodes.start_node("n1")

            async def joined() -> bool:
                assert new.is_running, new.said()
                node = await cluster.nodes.get("n1")
                return node.status == "up" and node.incarnation > incarnation

            await eventually(joined, timeout=90, message="the new process has the name")
            before = load.receipts
            await eventually(
                lambda: load.receipts > before + 100, timeout=60, message="load goes on"
            )
            old.resume()
            assert await old.wait() != 0
        finally:
            old.kill_all()
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)
        epochs.check()
        assert new.is_running


async def test_a_node_may_start_though_one_of_its_name_is_frozen() -> None:
    """Once the others have declared that one over; a machine that lost its power looks the same."""
    await _a_successor_of_the_name(3)


@pytest.mark.usefixtures("chaos")
async def test_a_node_may_start_though_one_of_its_name_is_frozen_and_nobody_else_is_there() -> None:
    """Nobody can declare it over: its record expires, which it would have refreshed."""
    await _a_successor_of_the_name(1)


async def test_a_frozen_worker_is_killed_and_its_agents_recovered() -> None:
    """SIGSTOP of a worker alone: its manager notices, kills it, and re-claims its agents."""
    settings = {"worker": {"hang_after_s": 1.5}}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="visits", critical=True)
        await cluster.send("visits", "counter.add", {"amount": 2})
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


async def test_a_right_that_lapsed_comes_back_only_for_what_the_registry_still_gives() -> None:
    """A leader that returns confirms a node whose agent was given away meanwhile.

    The manager stands still, so that nobody but the worker itself can end the old
    activation; without the look at the records it would answer again at once.
    """
    settings = {
        "liveness": {"suspect_after_s": 1.0, "down_after_s": 60.0, "fence_after_s": 1.5},
    }
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        leader = await nodes.leader()
        victim = next(node for node in nodes.nodes.values() if node is not leader)
        for number in range(6):
            await cluster.agents.start("fleet:Counter", id=f"visits-{number}")
            await cluster.send(f"visits-{number}", "counter.add", {"amount": 1})
        held = sorted(info.id for info in await cluster.agents.list(node=victim.name))
        assert len(held) >= 2, "void: the victim hosts too little"
        moved, kept = held[:2]
        subjects = cluster.subjects
        inspect = subjects.control_worker(f"{victim.name}-w0", "inspect")

        async def held_by_worker() -> InspectReply:
            return await rpc.call(cluster.bus, inspect, None, InspectReply, timeout=5)

        async def answers(agent: str) -> int | None:
            try:
                return int(await cluster.ask(agent, "counter.get", timeout=0.5))
            except FoundationError:
                return None

        async def count_answers(agent: str) -> int:
            """How many processes answer one question."""
            found = 0

            def on_reply(reply: Message | BusError) -> None:
                nonlocal found
                found += isinstance(reply, Message) and b'"error"' not in reply.data

            question = encode_envelope(
                id=uuid4().hex,
                source="test",
                type="counter.get",
                target=f"agent:{agent}",
                data=None,
            )
            token = cluster.bus.request_nowait(subjects.ask(agent), question, on_reply, many=True)
            await asyncio.sleep(0.2)  # all that answer within
            cluster.bus.forget(token)
            return found

        async def lapsed() -> bool:
            return await answers(moved) is None

        async def is_one(agent: str) -> bool:
            return await answers(agent) == 1

        for agent in held:
            await eventually(partial(is_one, agent), message="it has its signal")
        victim.process.send_signal(signal.SIGSTOP)
        try:
            await eventually(lapsed, message="the right has lapsed, after 1.5 s")
            # As a leader does that gave the node up.
            bucket = Bucket(cluster.bus, subjects, "agents")
            entry = await bucket.read(moved)
            assert entry is not None
            assert entry.value is not None
            record = rpc.decode(AgentRecord, entry.value)
            incarnation = (await cluster.nodes.get(leader.name)).incarnation
            await bucket.replace(
                moved,
                rpc.encode(
                    record.model_copy(
                        update={
                            "status": AgentStatus.STARTING,
                            "node": leader.name,
                            "incarnation": incarnation,
                            "epoch": record.epoch + 1,
                        }
                    )
                ),
                expected=entry.revision,
            )
            await eventually(lambda: is_one(moved), message="its successor answers")
            # As a leader does that returns and does not know.
            victim_incarnation = (await cluster.nodes.get(victim.name)).incarnation

            def confirm() -> None:
                echo = Echo(
                    node=victim.name,
                    incarnation=victim_incarnation,
                    beat=1,
                    sent_at=monotonic(),
                    verdict=NodeStatus.UP,
                    leader="returned",
                    term=1,
                )
                cluster.bus.publish(subjects.echo(victim.name), rpc.encode(echo))

            confirm()

            async def answers_again() -> bool:
                confirm()
                return await is_one(kept)

            await eventually(answers_again, message="what is still its own it answers for")
            for _ in range(5):
                confirm()
                assert await count_answers(moved) == 1
            inspected = await held_by_worker()
            assert moved not in inspected.agents
            assert kept in inspected.agents
        finally:
            victim.process.send_signal(signal.SIGCONT)

        async def settled() -> bool:
            infos = {info.id: info for info in await cluster.agents.list()}
            return all(info.status == "running" for info in infos.values()) and (
                infos[moved].node == leader.name and infos[kept].node == victim.name
            )

        await eventually(settled, timeout=20, message="all run, where the records say")
        assert (await cluster.agents.get(moved)).epoch == record.epoch + 1


async def test_a_refusal_of_an_old_activation_makes_nobody_ask_twice() -> None:
    """One that is back after its end hears questions, too, and refuses before the owner answers."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="visits")
        epoch = (await cluster.agents.get("visits")).epoch
        async with Cluster.connect(nodes.server.url, cluster=cluster.name) as old:
            refused = AgentUnavailableError("not sure", refused=epoch - 1, sure=False)
            body = orjson.dumps(error_body(refused))
            route = old.bus.subscribe(
                cluster.subjects.ask("visits"),
                lambda message: old.bus.publish(message.reply, body),
            )
            # Its refusal is first now and then; what is seen first is not decided here.
            for number in range(1, 101):
                assert await cluster.ask("visits", "counter.add", {"amount": 1}) == number
            # Where nobody else was asked, it is an unknown outcome, and not a new try.
            for worker in nodes.nodes["n1"].workers():
                worker.send_signal(signal.SIGSTOP)
            with pytest.raises(AskTimeoutError):
                await cluster.ask("visits", "counter.add", {"amount": 1}, timeout=0.5)
            for worker in nodes.nodes["n1"].workers():
                worker.send_signal(signal.SIGCONT)
            old.bus.unsubscribe(route)
        assert await cluster.ask("visits", "counter.get") in (100, 101)
