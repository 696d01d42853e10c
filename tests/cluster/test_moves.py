"""Agents are moved under load, whoever dies meanwhile: nothing is lost, repeated or left behind."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
from collections.abc import Awaitable, Callable

import pytest

from foundation_nats import FoundationError
from foundation_nats.api.moves import MovedAgent
from foundation_nats.errors import NotSettledError
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

FEW_AT_A_TIME = {"control": {"moves_max": 2, "moves_per_node_max": 2}}
"""So that a drain lasts long enough to be disturbed."""

SLOW_HAND_OVER = {"FOUNDATION_FAILPOINTS": "move.before_handover=sleep(0.15)"}
"""So that there is surely something left to do when the leader dies: eight agents have left in 0.1 s else."""


async def under_load(
    nodes: TestCluster, trouble: Callable[[], Awaitable[None]], *, minimum: int = 200
) -> None:
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


def show(what: str, moved: list[MovedAgent]) -> None:
    """Print how long agents were away, at most."""
    times = sorted(item.ms for item in moved)
    if times:
        print(f"{what}: {len(times)} moved, {statistics.median(times):.0f} ms, {times[-1]:.0f} max")


async def empty(nodes: TestCluster, name: str, timeout: float = 30) -> None:
    """Wait until no agent is on the node."""

    async def none_left() -> bool:
        return not await nodes.client.agents.list(node=name)

    await eventually(none_left, timeout=timeout, every=0.05, message=f"{name} is empty")


async def someone_moves(nodes: TestCluster) -> str:
    """Wait for a move in flight; the id of the agent."""
    registry = await nodes.client._open_registry()
    moving: list[str] = []
    registry.subscribe(
        lambda agent, held: moving.append(agent) if held and held.record.move else None
    )
    await eventually(lambda: moving, timeout=15, every=0.002, message="an agent is moving")
    return moving[0]


async def test_a_drain_under_load_loses_and_repeats_nothing_and_the_node_stays_up() -> None:
    """Every agent leaves; the cordon keeps new ones away until it is taken back; asks get through."""
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        errors: list[FoundationError] = []

        async def trouble() -> None:
            asking = True

            async def ask() -> None:
                while asking:
                    for number in range(workload.LEDGERS):
                        try:
                            await cluster.ask(f"ledger-{number}", "ledger.length", timeout=5)
                        except FoundationError as error:
                            errors.append(error)

            asker = asyncio.create_task(ask())
            before = {info.id for info in await cluster.agents.list(node="n2")}
            report = await cluster.nodes.drain("n2", timeout=30, reason="new disk")
            show("drain", report.moved)
            assert before
            assert {item.agent for item in report.moved} == before
            assert not await cluster.agents.list(node="n2")
            (node,) = [node for node in await cluster.nodes.list() if node.name == "n2"]
            assert (node.status, node.cordoned, node.cordon_reason) == ("up", True, "new disk")
            asking = False
            await asker
            origins = [(await cluster.agents.get(agent)).recovered_from for agent in before]
            assert all(origin is not None and origin.reason == "moved" for origin in origins)

        await under_load(nodes, trouble)
        assert not errors, errors[:3]
        whats = [(event.topic, event.what) for event in await cluster.events.list(limit=500)]
        assert {("node", "cordoned"), ("node", "drained"), ("agent", "moved")} <= set(whats)
        assert whats.count(("node", "drained")) == 1


async def test_a_cordon_outlives_its_node() -> None:
    """A new life of the same name is cordoned, too; uncordoned it gets what waited."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.nodes.cordon("n2", reason="old disk")
        await cluster.nodes.cordon("n2")
        nodes.nodes["n2"].terminate()
        assert await nodes.nodes["n2"].wait() == 0
        nodes.start_node("n2")
        await nodes.wait_up(["n2"])
        for number in range(3):
            await cluster.agents.start("fleet:Counter", id=f"c{number}")
        assert {info.node for info in await cluster.agents.list()} == {"n1"}
        await cluster.nodes.cordon("n1")
        with pytest.raises(NotSettledError, match="old disk"):
            await cluster.agents.start("fleet:Counter", id="late", timeout=1)
        await cluster.nodes.uncordon("n2")
        await cluster.nodes.uncordon("n2")

        async def placed() -> bool:
            return (await cluster.agents.get("late")).node == "n2"

        await eventually(placed, timeout=5, message="what waited runs on the uncordoned node")


async def test_agents_that_fit_nowhere_else_stay_unless_forced() -> None:
    """They are listed with the reason per node; with force they are stopped and wait."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        nodes.start_node("special", "--capability", "gpu")
        await nodes.wait_up(["special"])
        await cluster.agents.start("fleet:Counter", id="bound", placement={"require": ["gpu"]})
        await cluster.ask("bound", "counter.add", {"amount": 3})
        plan = await cluster.nodes.plan_drain("special")
        assert dict(plan.stuck) == {"bound": {"n1": "lacks the capability gpu"}}
        with pytest.raises(NotSettledError, match="lacks the capability gpu") as caught:
            await cluster.nodes.drain("special", timeout=20)
        assert caught.value.details["left"] == ["bound"]
        assert await cluster.ask("bound", "counter.get") == 3
        await cluster.nodes.drain("special", timeout=10, force=True)

        async def waits() -> bool:
            info = await cluster.agents.get("bound")
            return info.status == "pending" and "cordoned" in (info.reason or "")

        await eventually(waits, timeout=5, message="it waits and says for what")
        await cluster.nodes.uncordon("special")

        async def runs() -> bool:
            return (await cluster.agents.get("bound")).status == "running"

        await eventually(runs, timeout=5, message="it runs again")
        assert await cluster.ask("bound", "counter.get") == 3


async def test_a_rebalance_fills_a_new_node_and_a_second_one_has_nothing_to_do() -> None:
    """As planned, within the number of moves allowed."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client

        async def trouble() -> None:
            nodes.start_node("n3")
            await nodes.wait_up(["n3"])
            plan = await cluster.plan_rebalance()
            assert len(plan.moves) == 8
            first = await cluster.rebalance(max_moves=2, timeout=30)
            assert len(first.moved) == 2
            rest = await cluster.rebalance(timeout=30)
            show("rebalance", rest.moved)
            away = [item.ms for item in [*first.moved, *rest.moved]]
            assert statistics.median(away) < 500, away
            assert len(rest.moved) == 6
            assert not rest.skipped
            counts = [node.agents for node in await cluster.nodes.list()]
            assert sorted(counts) == [8, 8, 8]
            again = await cluster.rebalance()
            assert (again.id, again.plan.moves) == (None, ())

        await under_load(nodes, trouble)


async def test_a_new_node_is_filled_by_the_leader_where_that_is_wished() -> None:
    """With `rebalance_on_join`, once the node has been up for a while."""
    settings = {"control": {"rebalance_on_join": True, "rebalance_after_s": 0.5}}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        await workload.deploy(nodes)
        nodes.start_node("n2")

        async def even() -> bool:
            # A difference that is within the threshold is left alone.
            return len(await nodes.client.agents.list(node="n2", status="running")) >= 11

        await eventually(even, timeout=20, message="the new node has its share")
        await workload.everyone_runs_once(nodes)


async def test_a_rebalance_is_offered_once_when_a_node_has_joined_and_one_would_pay() -> None:
    """By the leader's event and by the listing; nothing moves by itself."""
    settings = {"control": {"rebalance_after_s": 0.5}}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await workload.deploy(nodes)
        nodes.start_node("n2")
        await nodes.wait_up(["n2"])

        async def offers() -> list[dict[str, object]]:
            events = await cluster.events.list(topic="cluster", limit=500)
            return [event.data for event in events if event.what == "rebalance_offered"]

        (offer,) = await eventually(offers, timeout=10, message="it is offered")
        planned = len((await cluster.plan_rebalance()).moves)
        assert (offer["nodes"], offer["moves"]) == (["n2"], planned)
        assert await cluster.mover.offer(await cluster.nodes.list()) == planned > 0
        assert not await cluster.agents.list(node="n2")
        await cluster.rebalance(timeout=30)
        assert await cluster.mover.offer(await cluster.nodes.list()) == 0
        assert len(await offers()) == 1


async def test_a_node_that_is_told_to_end_moves_everything_away_first() -> None:
    """SIGTERM under load: its agents run elsewhere before it has gone, and nobody fails over."""
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client

        async def trouble() -> None:
            leader = await nodes.leader()
            other = next(n for n in nodes.nodes.values() if n is not leader)
            for victim in (other, leader):
                before = await cluster.agents.list(node=victim.name)
                victim.terminate()
                assert await victim.wait() == 0
                for info in before:
                    now = await cluster.agents.get(info.id)
                    assert now.recovered_from is not None
                    assert now.recovered_from.reason == "moved"
                    assert now.node not in (None, victim.name)

        await under_load(nodes, trouble)
        events = await cluster.events.list(limit=500)
        assert not [event for event in events if event.what == "failed_over"]


@pytest.mark.parametrize("what", ["drain", "rebalance"])
async def test_a_leader_that_dies_in_the_middle_is_succeeded_by_one_that_finishes(
    what: str,
) -> None:
    """SIGKILL of the leading node while agents are on their way."""
    async with TestCluster(
        nodes=3,
        workers=1,
        path=[str(AGENTS)],
        settings=FEW_AT_A_TIME,
        environment=SLOW_HAND_OVER,
    ) as nodes:
        cluster = nodes.client

        async def trouble() -> None:
            leader = await nodes.leader()
            victim = next(n for n in nodes.nodes.values() if n is not leader)
            if what == "rebalance":
                await cluster.nodes.drain(victim.name, timeout=30)
                await cluster.nodes.uncordon(victim.name)
                work = asyncio.create_task(cluster.rebalance(timeout=60))
            else:
                work = asyncio.create_task(cluster.nodes.drain(victim.name, timeout=60))
            lease = await cluster.leader()
            assert lease is not None
            assert lease.holder == leader.name
            await someone_moves(nodes)
            leader.kill_all()
            where = {info.id: info.node for info in await cluster.agents.list()}
            if what == "drain":
                assert victim.name in where.values(), "it was empty before the leader died"
                report = await work
                assert not await cluster.agents.list(node=victim.name)
                await cluster.nodes.uncordon(victim.name)
            else:
                upkeep = cluster.mover.upkeep
                await upkeep.refresh()
                plan = upkeep.rebalance
                assert plan is not None
                assert plan.finished_at is None
                left = [move for move in plan.moves if where[move.agent] != move.target]
                assert left, "it was finished before the leader died"
                report = await work
                planned = {move.agent for move in report.plan.moves}
                assert planned == {move.agent for move in plan.moves}
                assert {item.agent for item in report.moved} | set(report.skipped) == planned
                assert await cluster.agents.list(node=victim.name)
            show(what, report.moved)
            after = await cluster.leader()
            assert after is not None
            assert after.holder != leader.name
            assert after.term > lease.term
            word = "drained" if what == "drain" else "rebalanced"

            async def finisher() -> str | None:
                events = await cluster.events.list(limit=500)
                ends = [event.source for event in events if event.what == word]
                return ends[-1] if ends else None

            assert await eventually(finisher, message="its end is told") != leader.name

        await under_load(nodes, trouble)


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_either_end_of_a_move_may_die(victim: str) -> None:
    """SIGKILL of the node that gives or of one that takes, with moves in flight."""
    async with TestCluster(nodes=4, workers=1, path=[str(AGENTS)], settings=FEW_AT_A_TIME) as nodes:
        cluster = nodes.client

        async def trouble() -> None:
            leader = await nodes.leader()
            source, *others = [n for n in nodes.nodes.values() if n is not leader]
            work = asyncio.create_task(cluster.nodes.drain(source.name, timeout=60))
            registry = await cluster._open_registry()
            agent = await someone_moves(nodes)
            order = registry.all()[agent].record.move
            target = order.to if order is not None and order.to is not None else others[0].name
            if target == leader.name:
                target = others[0].name
            (source if victim == "source" else nodes.nodes[target]).kill_all()
            await work
            await empty(nodes, source.name)

        await under_load(nodes, trouble)


@pytest.mark.parametrize("point", ["move.before_handover", "move.after_handover"])
async def test_a_source_that_dies_at_the_hand_over_loses_nothing(point: str) -> None:
    """Its agent has stopped, and either nobody or the target has it by its record."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        fragile = nodes.start_node(
            "fragile", environment={"FOUNDATION_FAILPOINTS": f"{point}=kill"}
        )
        await nodes.wait_up(["fragile"])

        async def trouble() -> None:
            assert await nodes.client.agents.list(node="fragile")
            work = asyncio.create_task(nodes.client.nodes.drain("fragile", timeout=30))
            assert await fragile.wait() == -signal.SIGKILL
            await work
            await empty(nodes, "fragile")

        await under_load(nodes, trouble)


async def test_a_leader_that_dies_right_after_its_orders_leaves_nothing_half_done() -> None:
    """The orders are in the records: who runs the agents carries them out without a leader."""
    async with TestCluster(nodes=0, workers=1, path=[str(AGENTS)]) as nodes:
        armed = {"FOUNDATION_FAILPOINTS": "moves.ordered=kill"}
        fragile = nodes.start_node("fragile", environment=armed)
        await nodes.wait_up(["fragile"])
        for name in ("n1", "n2"):
            nodes.start_node(name)
        await nodes.wait_up(["n1", "n2"])

        async def trouble() -> None:
            work = asyncio.create_task(nodes.client.nodes.drain("n1", timeout=60))
            assert await fragile.wait() == -signal.SIGKILL
            await work
            await empty(nodes, "n1")

        await under_load(nodes, trouble)


async def test_the_broker_may_be_killed_while_agents_are_on_their_way() -> None:
    """SIGKILL of the broker and a restart on the same store, in the middle of a drain."""
    chance = random.Random()
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)], settings=FEW_AT_A_TIME) as nodes:
        cluster = nodes.client

        async def trouble() -> None:
            work = asyncio.create_task(cluster.nodes.drain("n2", timeout=60))
            await someone_moves(nodes)
            nodes.server.kill()
            await asyncio.sleep(chance.uniform(0.0, 0.3))
            await nodes.server.restart()
            show("drain", (await work).moved)
            assert not await cluster.agents.list(node="n2")

        await under_load(nodes, trouble)
