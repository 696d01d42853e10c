"""What keeps failover from doing harm: quarantine, distrust of nodes that flap, the storm brake."""

from __future__ import annotations

import asyncio

import pytest

from foundation_cli.doctor import check_brake
from foundation_cli.status import brake_text, overview
from foundation_nats.api.refs import AgentInfo
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import encode
from foundation_nats.errors import ConflictError
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import BrakeReply, NodeRecord
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def test_an_agent_that_never_starts_is_quarantined_and_can_be_released() -> None:
    """It is not tried again by itself, says why, and the others go on."""
    settings = {"control": {"quarantine_after": 3, "failed_backoff_s": 0.05}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="well")
        await cluster.agents.start("fleet:Picky", id="ill", config={"broken": True}, wait=False)

        async def quarantined() -> bool:
            info = await cluster.agents.get("ill")
            return (info.reason or "").startswith("quarantined after 3 failed starts")

        await eventually(quarantined, timeout=15, message="it is quarantined")
        assert "this version is broken" in ((await cluster.agents.get("ill")).reason or "")
        epoch = (await cluster.agents.get("ill")).epoch
        assert await cluster.ask("well", "counter.get") == 0
        assert (await cluster.agents.get("ill")).epoch == epoch, "it was tried again"
        with pytest.raises(ConflictError, match=r"has not failed"):
            await cluster.agents.release("well")
        await cluster.agents.release("ill")

        async def tried() -> bool:
            return (await cluster.agents.get("ill")).epoch > epoch

        await eventually(tried, timeout=10, message="it is tried again")
        # A spec that works ends it, too.
        await cluster.agents.start("fleet:Picky", id="ill", config={"version": 2}, timeout=20)
        assert await cluster.ask("ill", "version") == "2"


async def lost(nodes: TestCluster, *agents: tuple[str, object]) -> str:
    """Start agents of these ids and policies on a node that doesn't lead, and kill it; its name."""
    cluster = nodes.client
    lease = await eventually(cluster.leader, message="somebody leads")
    await cluster.nodes.cordon(lease.holder)
    for id, policy in agents:
        await cluster.agents.start("fleet:Counter", id=id, on_node_loss=policy)
        await cluster.send(id, "counter.add", {"amount": 3})
    await cluster.nodes.uncordon(lease.holder)
    (victim,) = {info.node for info in await cluster.agents.list()}
    assert victim is not None
    nodes.nodes[victim].kill_all()
    return victim


async def reaches(nodes: TestCluster, id: str, status: str) -> AgentInfo:
    """Wait until the agent is so."""

    async def is_so() -> AgentInfo | None:
        info = await nodes.client.agents.get(id)
        return info if info.status == status else None

    return await eventually(is_so, timeout=20, message=f"{id} is {status}")


async def test_an_agent_is_stopped_with_its_node_at_once_or_after_a_grace() -> None:
    """It runs nowhere else and says why; its neighbour with another policy is started elsewhere."""
    policies = (
        ("at-once", "stop"),
        ("later", {"policy": "stop", "grace_s": 1.5}),
        ("elsewhere", {"policy": "unavailable", "grace_s": 1.0}),
    )
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        victim = await lost(nodes, *policies)
        info = await reaches(nodes, "at-once", "stopped")
        assert info.node is None
        assert f"node {victim} is down, and on_node_loss is stop" in (info.reason or "")
        waiting = await reaches(nodes, "later", "unavailable")
        assert "waits 1.5 s for its return, and is stopped then" in (waiting.reason or "")
        assert (await reaches(nodes, "later", "stopped")).node is None
        info = await reaches(nodes, "elsewhere", "running")
        assert info.node not in (None, victim)
        assert await nodes.client.ask("elsewhere", "counter.get") == 3
        # A node of that name does not bring back what was stopped with it.
        nodes.start_node(victim)
        await nodes.wait_up([victim])
        assert (await nodes.client.agents.get("at-once")).status == "stopped"


async def test_a_node_that_returns_within_the_grace_gets_its_agent_back() -> None:
    """Where it was, with its state, although it would have been stopped, or placed elsewhere, later."""
    policies = (
        ("stops", {"policy": "stop", "grace_s": 60}),
        ("waits", {"policy": "restart", "grace_s": 60}),
    )
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        victim = await lost(nodes, *policies)
        for id, _ in policies:
            await reaches(nodes, id, "unavailable")
        nodes.start_node(victim)
        for id, _ in policies:
            info = await reaches(nodes, id, "running")
            assert info.node == victim
            assert info.recovered_from is not None
            assert await nodes.client.ask(id, "counter.get") == 3


async def test_a_node_that_flaps_gets_agents_only_if_no_other_can() -> None:
    """Three short lives in a row; the record says so, and survives the next start."""
    settings = {
        "control": {"flapping_after": 2, "stable_after_s": 300},
        "liveness": {"bus_grace_s": 1, "storm_fraction": 0.9},
    }
    async with TestCluster(nodes=3, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        lease = await eventually(cluster.leader, message="somebody leads")
        flapping = next(name for name in nodes.nodes if name != lease.holder)
        for life in range(2):
            # Something must be lost with it, or nobody needs to write down that it is over.
            bait = f"bait-{life}"
            for number in range(6):
                await cluster.agents.start(
                    "fleet:Counter", id=f"{bait}-{number}", critical=True, timeout=20
                )

            async def hosts() -> bool:
                return bool(await cluster.agents.list(node=flapping))

            await eventually(hosts, timeout=10, message="it hosts something")
            nodes.nodes[flapping].kill_all()

            async def emptied() -> bool:
                return not await cluster.agents.list(node=flapping)

            await eventually(emptied, timeout=30, message="its agents are elsewhere")
            nodes.start_node(flapping)
            await nodes.wait_up([flapping])
        assert (await cluster.nodes.get(flapping)).distrusted
        told = await cluster.events.list(topic="node")
        assert [event.data["node"] for event in told if event.what == "distrusted"] == [flapping]
        for number in range(8):
            await cluster.agents.start("fleet:Counter", id=f"new-{number}", timeout=20)
        assert await cluster.agents.list(node=flapping) == []
        for name in list(nodes.nodes):
            if name != flapping:
                nodes.nodes[name].terminate()

        async def all_there() -> bool:
            infos = await cluster.agents.list(status="running")
            return len(infos) >= 8 and {info.node for info in infos} == {flapping}

        await eventually(all_there, timeout=40, message="nobody else is left: it gets them")


async def test_a_node_that_flapped_is_trusted_again_once_it_was_stable() -> None:
    """Plans, the listing and its story know; the change is told once in each direction."""
    settings = {"control": {"stable_after_s": 4, "resync_every_s": 0.5}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        before = NodeRecord(name="n2", incarnation=1, ended=True, short_lives=4)
        await Bucket(cluster.bus, cluster.subjects, "nodes").create("n2", encode(before))
        nodes.start_node("n2")
        await nodes.wait_up(["n2"])
        info = await cluster.nodes.get("n2")
        assert (info.distrusted, info.short_lives) == (True, 4)
        plan = await cluster.deployments.plan(
            '{version: 1, agents: [{name: c, run: "fleet:Counter", replicas: 6}]}'
        )
        assert set(plan.placements.values()) == {"n1"}
        story = await cluster.why("node:n2")
        assert "its last 4 lives were short" in story.sentences[-1].text

        async def told() -> list[str]:
            events = await cluster.events.list(topic="node")
            return [e.what for e in events if e.data.get("node") == "n2" and "trusted" in e.what]

        async def trusted() -> bool:
            return "trusted" in await told()

        await eventually(trusted, timeout=10, message="it is trusted again")
        assert await told() == ["distrusted", "trusted"]
        info = await cluster.nodes.get("n2")
        assert (info.distrusted, info.short_lives) == (False, 4)


async def test_the_brake_holds_when_the_leader_is_among_the_many_that_die() -> None:
    """Its successor raises the alarm, says what it holds, and goes on when a person says so."""
    settings = {"liveness": {"storm_hold_s": 60}}
    async with TestCluster(nodes=5, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        lease = await eventually(cluster.leader, message="somebody leads")
        for number in range(10):
            await cluster.agents.start("fleet:Counter", id=f"c-{number}", critical=True)
        victims = [lease.holder, *[name for name in nodes.nodes if name != lease.holder][:2]]
        lost = {info.id for name in victims for info in await cluster.agents.list(node=name)}
        for name in victims:
            nodes.nodes[name].kill_all()

        async def held() -> BrakeReply | None:
            found = await cluster.nodes.brake()
            return found if found is not None and found.held_for_s is not None else None

        brake = await eventually(held, timeout=20, message="a new leader holds the failover back")
        assert brake.node not in victims
        assert set(brake.held) < set(victims)
        assert 0 < brake.held_for_s <= 60
        assert brake.paced_for_s is not None
        (finding,) = await check_brake(cluster)
        assert finding.level == "critical"
        assert "is held back for" in brake_text((await overview(cluster))["brake"])
        where = {(await cluster.agents.get(agent)).node for agent in lost}
        assert where & set(victims)
        assert brake.node in await cluster.nodes.force_failover()

        async def moved() -> bool:
            infos = await asyncio.gather(*(cluster.agents.get(agent) for agent in lost))
            return all(i.status == "running" and i.node not in victims for i in infos)

        await eventually(moved, timeout=20, message="they run elsewhere")
        after = await cluster.nodes.brake()
        assert (after.held_for_s, after.paced_for_s) == (None, None)
        (finding,) = await check_brake(cluster)
        assert finding.level == "ok"


async def test_a_storm_waits_until_a_person_says_that_it_is_real() -> None:
    """Two of five die at once: the second one's agents stay, until the brake is overridden."""
    settings = {"liveness": {"storm_hold_s": 60}}
    async with TestCluster(nodes=5, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        lease = await eventually(cluster.leader, message="somebody leads")
        for number in range(10):
            await cluster.agents.start("fleet:Counter", id=f"c-{number}", critical=True)
        victims = [name for name in nodes.nodes if name != lease.holder][:2]
        lost = {info.id for name in victims for info in await cluster.agents.list(node=name)}
        assert lost
        for name in victims:
            nodes.nodes[name].kill_all()

        async def stormy() -> bool:
            events = await cluster.events.list(topic="cluster")
            return any(event.what == "storm" for event in events)

        await eventually(stormy, timeout=20, message="the alarm is raised")
        # The first verdict may have been given before the second node seemed dead.
        where = {(await cluster.agents.get(agent)).node for agent in lost}
        assert where & set(victims)
        assert lease.holder in await cluster.nodes.force_failover()

        async def moved() -> bool:
            infos = await asyncio.gather(*(cluster.agents.get(agent) for agent in lost))
            return all(i.status == "running" and i.node not in victims for i in infos)

        await eventually(moved, timeout=20, message="they run elsewhere")
