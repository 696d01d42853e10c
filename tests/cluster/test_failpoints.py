"""Crash at named points: whatever the instant, every receipted signal takes effect exactly once.

Each point of `foundation_nats.base.failpoint` is armed here or in the test that
`tests/unit/test_catalogue.py` finds; the default suite has those at the heart, --chaos all.
"""

from __future__ import annotations

import asyncio

import pytest

from foundation_nats import Cluster
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.cluster.children import Children
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

# Point to how often it is passed before the crash. The first ones belong to the
# default suite; --chaos runs them all.
ALWAYS = {
    "commit.before_cas": 40,
    "commit.after_cas_before_outbox": 40,
    "outbox.mid": 40,
    "claim.after_cas": 1,
}
CHAOS = {
    "handle.before": 60,
    "handle.after": 60,
    "outbox.after": 40,
    "claim.read": 1,
    "claim.after_subscribe": 1,
    "claim.after_outbox": 1,
    "catchup.page": 5,
    "report_running": 3,
    "live.received": 60,
    "trim.before": 1,
    "trim.after": 1,
    "plan.computed": 1,
    "start.sent": 1,
    "lease.acquired": 1,
    "lease.renew": 1,
}
# What must go wrong so that the point is reached at all.
BESIDES = {
    "claim.after_outbox": "outbox.mid=after(40,kill)",
    "catchup.page": "live.received=1in3(raise)",
}


# Point to the passing at which the whole node stands still, for longer than it has a right to.
FREEZES = {
    "handle.after": 60,
    "commit.before_cas": 40,
    "commit.after_cas_before_outbox": 40,
    "outbox.mid": 40,
    "claim.read": 1,
    "claim.after_cas": 1,
    "claim.after_subscribe": 1,
    "plan.computed": 1,
    "start.sent": 1,
    "lease.renew": 2,
}
FROZEN_S = 9.0
# Who has just joined gives no verdicts for the time of the grace, and claims come early.
QUICK = {"suspect_after_s": 1.0, "down_after_s": 2.0, "bus_grace_s": 3.0}


async def crashes(cluster: Cluster) -> int:
    """How many workers and nodes have died."""
    events = await cluster.events.list(limit=1000)
    died = [e for e in events if (e.topic, e.what) in (("worker", "died"), ("node", "down"))]
    return len(died)


async def crash_at(point: str, passes: int) -> None:
    """Run the load over a node that crashes at *point*, again and again."""
    room = 40 if point.startswith("trim") else 2000
    settings = {"mailbox": {"trim_every_s": 0.1, "trim_min_age_s": 0.1, "mailbox_max": room}}
    armed = ";".join(filter(None, (f"{point}=after({passes},kill)", BESIDES.get(point))))
    async with TestCluster(nodes=0, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        # Started first, so that it leads and the leader's points are passed too.
        fragile = nodes.start_node("fragile", environment={"FOUNDATION_FAILPOINTS": armed})
        if point != "lease.acquired":
            await nodes.wait_up(["fragile"])
        nodes.start_node("n1")
        await nodes.wait_up(["n1"])
        await workload.deploy(nodes)
        epochs = workload.EpochWatch()
        await epochs.open(nodes.client)
        load = workload.Load(nodes.client)
        load.start()
        await eventually(lambda: load.receipts > 400, timeout=40, message="load flows")
        if point.startswith("lease"):  # which is a matter of seconds, not of load
            await eventually(lambda: not fragile.is_running, timeout=15, message="it dies")
        history = await load.stop()
        await workload.verdict(nodes, history, minimum=400)
        if fragile.is_running:
            assert await crashes(nodes.client), f"void: nothing crashed at {point}"
        fragile.kill_all()
        await workload.everyone_runs_once(nodes)
        await workload.verdict(nodes, history, minimum=400)
        epochs.check()


async def freeze_at(point: str, passing: int) -> None:
    """Run the load over a node that stands still at *point* until it has been replaced, and goes on."""
    armed = f"{point}=once({passing},freeze({FROZEN_S}))"
    settings = {"liveness": QUICK}
    async with TestCluster(nodes=0, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        # Started first, so that it leads and the leader's points are passed too.
        fragile = nodes.start_node("fragile", environment={"FOUNDATION_FAILPOINTS": armed})
        await nodes.wait_up(["fragile"])
        for name in ("n1", "n2"):
            nodes.start_node(name)
        await nodes.wait_up(["n1", "n2"])
        incarnation = (await nodes.client.nodes.get("fragile")).incarnation
        await workload.deploy(nodes)
        epochs = workload.EpochWatch()
        await epochs.open(nodes.client)
        load = workload.Load(nodes.client)
        load.start()
        await eventually(lambda: load.receipts > 400, timeout=40, message="load flows")

        async def replaced() -> bool:
            events = await nodes.client.events.list(topic="node", limit=1000)
            return any(e.what == "down" and e.data.get("node") == "fragile" for e in events)

        await eventually(replaced, timeout=30, message=f"void: nothing stood still at {point}")

        async def back() -> bool:
            node = await nodes.client.nodes.get("fragile")
            return node.status == "up" and node.incarnation > incarnation

        await eventually(back, timeout=40, message="it comes back under a new incarnation")
        history = await load.stop()
        await workload.verdict(nodes, history, minimum=400)
        fragile.kill_all()
        await workload.everyone_runs_once(nodes)
        await workload.verdict(nodes, history, minimum=400)
        epochs.check()


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", sorted(FREEZES))
async def test_a_node_frozen_anywhere_is_replaced_and_writes_nothing_more(point: str) -> None:
    """It stands still at that instant beyond its right to answer, and goes on as if nothing had been."""
    await freeze_at(point, FREEZES[point])


@pytest.mark.parametrize("point", sorted(ALWAYS))
async def test_a_crash_at_the_heart_loses_and_repeats_nothing(point: str) -> None:
    """The instants around the commit, the outbox and the claim."""
    await crash_at(point, ALWAYS[point])


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", sorted(CHAOS))
async def test_a_crash_anywhere_loses_and_repeats_nothing(point: str) -> None:
    """Every other named point that the load passes."""
    await crash_at(point, CHAOS[point])


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", ["send.before_publish", "send.after_publish_before_ack"])
async def test_a_sender_that_is_killed_and_repeats_its_ids_repeats_nothing(point: str) -> None:
    """It dies between its signals; its successor of the same name sends all of them again."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        config = {"mirror": "mirror"}
        await cluster.agents.start("fleet:Ledger", id="ledger", config=config)
        await cluster.agents.start("fleet:Mirror", id="mirror")
        count, lives = 40, 0
        arguments = (nodes.server.url, nodes.config.cluster, "ledger", str(count))
        with Children() as children, pytest.MonkeyPatch.context() as environment:
            while True:
                lives += 1
                if lives <= 4:
                    armed = f"{point}=after({8 * lives},kill)"
                    environment.setenv("FOUNDATION_FAILPOINTS", armed)
                else:
                    environment.delenv("FOUNDATION_FAILPOINTS")
                sender = children.start("tests.cluster.sender", *arguments)
                await eventually(
                    lambda child=sender: child.process.poll() is not None,
                    timeout=20,
                    message="it ends",
                )
                if sender.process.returncode == 0:
                    break
                assert sender.process.returncode == -9, sender.lines()[-5:]
        assert lives == 5, "void: it was not killed"

        async def all_there() -> bool:
            states = [await cluster.agents.state(agent) for agent in ("ledger", "mirror")]
            return all(s is not None and len(s["state"]["applied"]) >= count for s in states)

        await eventually(all_there, message="all have arrived")
        for agent in ("ledger", "mirror"):
            stored = await cluster.agents.state(agent)
            assert stored is not None
            assert stored["state"]["applied"] == [f"k{number}" for number in range(count)]
        assert not await cluster.dead.list()


async def crash_while_expanding(point: str, receivers: int, signals: int) -> None:
    """Signals for many, while the nodes that expand them crash at *point*."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        text = f"""
version: 1
agents:
  - {{name: c, run: "fleet:Counter", replicas: {receivers}, placement: {{labels: {{pin: "yes"}}}}}}
"""
        # The expanders crash; the receivers live on a node that does not take part in expanding.
        nodes.start_node("pinned", "--label", "pin=yes")
        await nodes.wait_up(["pinned"])
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["c"], timeout=30)
        nodes.nodes["n1"].terminate()
        pinned = nodes.nodes["pinned"].process.pid
        for number in range(3):
            armed = {"FOUNDATION_FAILPOINTS": f"{point}=after(2,kill)"}
            nodes.start_node(f"fragile-{number}", environment=armed)
        await nodes.wait_up([f"fragile-{number}" for number in range(3)])
        for number in range(signals):
            await cluster.send("deployment:c", "counter.add", {"amount": 1}, id=f"s{number}")

        async def counted() -> bool:
            asked = (cluster.ask(f"c-{n}", "counter.get", timeout=5) for n in range(receivers))
            return set(await asyncio.gather(*asked)) == {signals}

        await eventually(counted, timeout=60, every=0.2, message="each has counted each once")
        dead = [node for node in nodes.nodes.values() if not node.is_running]
        assert len(dead) >= 2, f"void: no node crashed at {point}"
        assert nodes.nodes["pinned"].process.pid == pinned
        assert await cluster.dead.list() == []


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", ["expand.before", "expand.mid", "expand.before_ack"])
async def test_an_expander_killed_anywhere_reaches_everybody_once(point: str) -> None:
    """One signal for a thousand, cut short, is finished by another node (R-47)."""
    await crash_while_expanding(point, 1_000, 8)


@pytest.mark.usefixtures("chaos")
async def test_a_burial_that_is_cut_short_is_done_once() -> None:
    """deadletter.before_ack: the worker dies while it gives signals up; one dead letter for each."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        armed = {"FOUNDATION_FAILPOINTS": "deadletter.before_ack=after(2,kill)"}
        settings = {"FOUNDATION_WORKER__RESTARTS_MAX": "50"}
        nodes.start_node("fragile", "--label", "pin=yes", environment=armed | settings)
        await nodes.wait_up(["fragile"])
        pin = {"labels": {"pin": "yes"}}
        await cluster.agents.start("fleet:Counter", id="c", placement=pin)
        count = 6
        for number in range(count):
            await cluster.send("c", "counter.unknown", id=f"bad-{number}")
            await cluster.send("c", "counter.add", {"amount": 1}, id=f"good-{number}")

            async def settled(wanted: int = number + 1) -> bool:
                assert len(await cluster.dead.list(limit=100)) >= wanted
                return bool(await cluster.ask("c", "counter.get", timeout=2) == wanted)

            # One by one: of what is buried together, all or nothing is committed.
            await eventually(settled, timeout=20, message="all are handled or buried")
        assert await crashes(cluster) >= count - 1, "void: too few crashes"
        letters = await cluster.dead.list(limit=100)
        buried = [str((item.letter.signal or {}).get("id")) for item in letters]
        assert sorted(buried) == sorted(f"bad-{number}" for number in range(count))


async def crash_while_leaving(point: str) -> None:
    """SIGTERM to a node under load that crashes at *point* instead of leaving in good order."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        nodes.start_node("fragile", environment={"FOUNDATION_FAILPOINTS": f"{point}=kill"})
        await nodes.wait_up(["fragile"])
        await workload.deploy(nodes)
        assert await cluster.agents.list(node="fragile"), "void: it hosts nothing"
        load = workload.Load(cluster)
        load.start()
        await eventually(lambda: load.receipts > 100, message="load flows")
        nodes.nodes["fragile"].terminate()

        async def moved() -> bool:
            return not await cluster.agents.list(node="fragile")

        await eventually(moved, timeout=30, message="its agents leave it")
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)
        assert await crashes(cluster), f"void: nothing crashed at {point}"


async def test_a_node_killed_while_it_drains_loses_and_repeats_nothing() -> None:
    """SIGTERM, and SIGKILL amid the hand-over (R-05)."""
    await crash_while_leaving("drain.mid")


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", ["release.before", "release.after"])
async def test_a_worker_killed_while_it_releases_loses_and_repeats_nothing(point: str) -> None:
    """Between on_stop and the record, and between the record and the report."""
    await crash_while_leaving(point)
