"""Deploys seen through, phase after phase, whoever dies; what goes and comes back with the replicas."""

from __future__ import annotations

import json

import pytest

from foundation_nats import Cluster
from foundation_nats.api.deploying import DeployReport, PhaseName, PhaseState
from foundation_nats.errors import NotSettledError
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def counters(replicas: int) -> str:
    """A manifest of critical counters, and one agent that is no replica."""
    return f"""
version: 1
agents:
  - {{name: c, run: "fleet:Counter", replicas: {replicas}, critical: true}}
  - {{name: one, run: "fleet:Counter", critical: true}}
"""


def states(report: DeployReport) -> list[str]:
    """How far each phase is."""
    return [str(phase.state) for phase in report.phases]


async def test_a_deploy_goes_through_its_phases_and_says_what_it_found() -> None:
    """In their order, each begun after the one before; a second deploy changes nothing."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        seen: list[list[str]] = []

        def note(report: DeployReport) -> None:
            if not seen or seen[-1] != states(report):
                seen.append(states(report))

        report = await nodes.client.deployments.deploy(counters(20), on_progress=note)
        order = {"ahead": 0, "under_way": 1, "passed": 2}
        for line in seen:
            steps = [order[word] for word in line]
            assert steps == sorted(steps, reverse=True)
        assert seen[-1] == ["passed"] * 4
        texts = {phase.name: phase.text for phase in report.phases}
        assert texts[PhaseName.CLUSTER].startswith("2 nodes up, n")
        assert texts[PhaseName.AGENTS].startswith("21 of 21 running: n1 ")
        assert texts[PhaseName.HEALTH] == "21 agents ready, as 2 nodes confirmed"
        assert all(phase.ms is not None for phase in report.phases)
        epochs = {info.id: info.epoch for info in await nodes.client.agents.list()}
        again = await nodes.client.deployments.deploy(counters(20))
        assert [change.kind.name for change in again.changes] == ["SAME", "SAME"]
        assert {info.id: info.epoch for info in await nodes.client.agents.list()} == epochs


async def test_a_deploy_without_nodes_says_in_which_phase_it_waits_and_is_fulfilled_later() -> None:
    """The wish stands, unchecked; the phases behind are not begun."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        nodes.nodes["n1"].kill_all()
        with pytest.raises(NotSettledError, match="not formed") as caught:
            await nodes.client.deployments.deploy(counters(3), timeout=3)
        found = [(phase["name"], phase["state"]) for phase in caught.value.details["phases"]]
        assert found == [
            ("cluster", "failed"),
            ("services", "ahead"),
            ("agents", "ahead"),
            ("health", "ahead"),
        ]
        assert set(await nodes.client.deployments.wishes()) == {"c", "one"}
        nodes.start_node("n2")
        report = await nodes.client.deployments.deploy(counters(3), timeout=40)
        assert report.phase(PhaseName.HEALTH).state is PhaseState.PASSED


async def test_a_leader_that_is_killed_half_way_is_succeeded_by_one_that_finishes() -> None:
    """SIGKILL of the leading node once a part of some hundred agents runs; the deploy waits on."""
    many = 1500
    slow = {"FOUNDATION_FAILPOINTS": "plan.mid_execute=sleep(0.5)"}  # or it is over before we look
    async with TestCluster(nodes=3, path=[str(AGENTS)], environment=slow) as nodes:
        leader = await nodes.leader()
        killed_at: list[int] = []

        def kill(report: DeployReport) -> None:
            running = sum(status.running for status in report.statuses)
            if not killed_at and 0 < running < many:
                killed_at.append(running)
                leader.kill_all()

        report = await nodes.client.deployments.deploy(counters(many), timeout=60, on_progress=kill)
        print(f"killed at {killed_at} of {many + 1}")
        assert killed_at, "it was over before it could be disturbed"
        assert states(report) == ["passed"] * 4
        assert (await nodes.leader()).name != leader.name
        infos = await nodes.client.agents.list()
        assert len(infos) == many + 1
        assert all(info.status == "running" and info.node != leader.name for info in infos)
        await workload.everyone_runs_once(nodes)


async def totals(cluster: Cluster, count: int) -> list[int]:
    """What each counter says."""
    return [await cluster.ask(f"c-{number}", "counter.get") for number in range(count)]


async def test_replicas_that_left_find_their_state_and_mailbox_again_unless_purged() -> None:
    """The highest numbers leave first; what was sent to them meanwhile waits for them."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        deployments = cluster.deployments
        await deployments.deploy(counters(6))
        for number in range(6):
            await cluster.ask(f"c-{number}", "counter.add", {"amount": number})
        await deployments.scale("c", 2)
        await deployments.wait_settled(["c"], timeout=15)
        ids = sorted(info.id for info in await cluster.agents.list(deployment="c"))
        assert ids == ["c-0", "c-1"]
        for number in range(6):
            await cluster.send(f"c-{number}", "counter.add", {"amount": 100})
        await deployments.scale("c", 4)
        await deployments.wait_settled(["c"], timeout=15)

        async def grown(expected: list[int]) -> bool:
            return await totals(cluster, len(expected)) == expected

        await eventually(lambda: grown([100, 101, 102, 103]), message="state and mailboxes")
        assert await deployments.purge("c") == ["c-4", "c-5"]
        assert await deployments.purge("c") == []
        await deployments.scale("c", 6)
        await deployments.wait_settled(["c"], timeout=15)
        await eventually(lambda: grown([100, 101, 102, 103, 0, 0]), message="two begin anew")
        await deployments.delete("c")
        await deployments.wait_settled(["c"], timeout=15)
        assert len(await deployments.purge("c")) >= 4
        stored = await cluster.agents.state("one")
        assert stored is not None, json.dumps(stored)


async def test_what_a_manifest_does_not_name_goes_only_when_that_is_said() -> None:
    """Pruned deployments are gone when the deploy ends; an agent started by itself stays."""
    agent = "{{name: {0}, run: 'fleet:Counter', replicas: 2}}"
    both = "{version: 1, agents: [" + ", ".join(agent.format(n) for n in ("a", "b")) + "]}"
    one = "{version: 1, agents: [" + agent.format("a") + "]}"
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="single")
        await cluster.deployments.deploy(both)
        report = await cluster.deployments.deploy(one)
        assert [change.kind.name for change in report.changes] == ["SAME"]
        found = await cluster.deployments.plan(one, prune=True)
        assert [(c.name, c.kind.name) for c in found.changes] == [("a", "SAME"), ("b", "REMOVED")]
        assert set(found.leaving) == {"b-0", "b-1"}
        assert set(await cluster.deployments.wishes()) == {"a", "b", "single"}
        report = await cluster.deployments.deploy(one, prune=True)
        assert [change.kind.name for change in report.changes] == ["SAME", "REMOVED"]
        assert {info.id for info in await cluster.agents.list()} == {"a-0", "a-1", "single"}


TIERS = """
version: 1
agents:
  - {name: c, run: "fleet:Counter", replicas: 3}
  - {name: base, run: "fleet:Counter", replicas: 2, tier: core, placement: {require: [%s]}}
"""


async def test_the_core_runs_before_the_rest_is_stored_and_nodes_are_waited_for() -> None:
    """Nothing is stored with too few nodes, the core alone while it can't run; others' wishes stay."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        deployments = nodes.client.deployments
        await deployments.deploy('version: 1\nagents: [{name: other, run: "fleet:Counter"}]')
        wanting = (TIERS % "").replace("version: 1", "version: 1\ncluster: {min_nodes: 2}")
        plan = await deployments.plan(wanting)
        assert (plan.nodes_up, plan.min_nodes) == (1, 2)
        with pytest.raises(NotSettledError, match="1 node up of the 2 that are asked for") as late:
            await deployments.deploy(wanting, timeout=0.5)
        assert "Nothing was stored" in str(late.value.hint)
        assert set(await deployments.wishes()) == {"other"}
        with pytest.raises(NotSettledError, match="core: 0 of 2 running") as late:
            await deployments.deploy(TIERS % "gold", timeout=0.5)
        assert "of the rest nothing was stored" in str(late.value.hint)
        assert [phase["state"] for phase in late.value.details["phases"]] == [
            "passed",
            "failed",
            "ahead",
            "ahead",
        ]
        assert "base-0" in late.value.details["reasons"]
        assert set(await deployments.wishes()) == {"other", "base"}
        nodes.start_node("n2")
        running: list[int] = []
        was_core_there: list[bool] = []

        def note(report: DeployReport) -> None:
            if any(change.name == "c" for change in report.changes) and not was_core_there:
                core = next(item for item in report.statuses if item.name == "base")
                was_core_there.append(core.settled)
            running.append(len(report.changes))

        report = await deployments.deploy(wanting, timeout=30, on_progress=note)
        assert was_core_there == [True]
        assert [change.name for change in report.changes] == ["base", "c"]
        assert sorted(set(running)) == [0, 1, 2]
        assert states(report) == ["passed"] * 4
        assert "core: 2 of 2 running" in report.phase(PhaseName.SERVICES).text
        again = await deployments.deploy(wanting)
        assert {change.kind.name for change in again.changes} == {"SAME"}
        pruned = await deployments.deploy(wanting, prune=True)
        assert [change.name for change in pruned.changes] == ["base", "c", "other"]
        assert set(await deployments.wishes()) == {"base", "c"}
