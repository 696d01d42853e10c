"""Signals for later: each firing takes effect once, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime

import pytest

from foundation_nats import Cluster
from foundation_nats.errors import ConfigError, SignalNotFoundError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def applied(cluster: Cluster, agent: str) -> list[str]:
    """What an agent has stored."""
    stored = await cluster.agents.state(agent)
    return [] if stored is None or stored["state"] is None else stored["state"]["applied"]


async def test_what_is_set_comes_and_what_is_cancelled_does_not() -> None:
    """Once, again and again, by cron, for many, and cancelled before it is due."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        signals = cluster.signals
        for name in ("a", "b"):
            await cluster.agents.start("fleet:Recorder", id=name, capabilities=["rec"])
        receipt = await signals.schedule("a", "record", after=0.3, id="once")
        assert receipt.stream.endswith("_TIMERS")
        assert (await signals.schedule("a", "record", after=0.3, id="once")).duplicate
        await signals.schedule("capability:rec", "record", after=0.2, id="both")
        await signals.schedule("a", "record", after=1.0, id="not this")
        await signals.schedule("b", "record", every=0.5, after=0, id="tick")
        await signals.schedule("b", "record", cron="* * * * * *", id="cron", ttl=5)
        listed = {info.name: info for info in await signals.schedules()}
        assert listed["cron"].cron == "* * * * * *"
        assert listed["not this"].target == "agent:a"
        assert (await signals.cancel("not this")).id == "not this"
        with pytest.raises(SignalNotFoundError):
            await signals.cancel("not this")
        with pytest.raises(ConfigError, match="cron"):
            await signals.schedule("a", "record", cron="* *")

        async def arrived() -> bool:
            found = Counter(item.partition(".")[0] for item in await applied(cluster, "b"))
            assert found["tick"] >= 4
            assert found["cron"] >= 2
            return True

        await eventually(arrived, timeout=15)
        assert (await signals.cancel("tick")).every_s == 0.5
        await signals.cancel("cron")
        assert sorted(await applied(cluster, "a")) == ["both", "once"]
        assert (await applied(cluster, "b")).count("both") == 1
        assert [i for i in await signals.schedules() if i.name in ("tick", "cron")] == []
        await asyncio.sleep(0.6)  # a firing that was under way may have come
        before = await applied(cluster, "b")
        # Set again under the name that was cancelled.
        await signals.schedule("a", "record", after=0.1, id="not this")
        await eventually(lambda: _has(cluster, "a", "not this"), timeout=5)
        assert await applied(cluster, "b") == before
        assert len(set(before)) == len(before)


async def _has(cluster: Cluster, agent: str, key: str) -> bool:
    return key in await applied(cluster, agent)


async def test_an_agent_sets_and_ends_timers_with_its_state() -> None:
    """They are part of the commit: a handler that raises sets none; they outlive the worker."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Recorder", id="r")
        await cluster.send("r", "set_and_fail", ttl=0.5)
        # An ask's answer comes with the commit; the timer leaves right after it.
        name = await cluster.ask("r", "set", {"after": 1.0, "name": "bell"})
        assert name == "bell"
        await cluster.ask("r", "set", {"every": 0.5, "name": "tick"})
        await cluster.ask("r", "set", {"after": 0.9, "name": "ended"})
        await cluster.ask("r", "unset", "ended")
        for worker in nodes.nodes["n1"].workers():
            worker.kill()

        async def rang() -> bool:
            return (await applied(cluster, "r")).count("rang") >= 4

        await eventually(rang, timeout=20)
        assert {i.name for i in await cluster.signals.schedules("r")} <= {"r/tick"}
        await eventually(lambda: cluster.signals.cancel("r/tick"), timeout=5)
        await asyncio.sleep(0.6)
        before = await applied(cluster, "r")
        await asyncio.sleep(1.0)
        assert await applied(cluster, "r") == before
        assert "never" not in before
        # Whoever is forgotten sets nothing off any more.
        await cluster.ask("r", "set", {"every": 60.0, "name": "later"})
        await eventually(lambda: cluster.signals.schedules("r"), message="it is armed")
        await cluster.agents.stop("r")
        assert await cluster.deployments.purge("r") == ["r"]
        assert not await cluster.signals.schedules("r")


async def storm(environment: dict[str, str], *, kill_broker: bool, kill_node: bool) -> None:
    """Many timers become due while what serves them dies."""
    count, every = 30, 0.5
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        nodes.start_node("stays")
        await nodes.wait_up(["stays"])
        dying = nodes.start_node("dies", environment=environment)
        await nodes.wait_up(["dies"])
        cluster = nodes.client
        for name in ("a", "b"):
            await cluster.agents.start("fleet:Recorder", id=name, capabilities=["r"], critical=True)
        begun = datetime.now(UTC)
        once = [f"once-{number}" for number in range(count)]
        for number, key in enumerate(once):
            target = "a" if number % 2 else "capability:r"
            await cluster.signals.schedule(target, "record", after=0.1 * number, id=key)
        await cluster.signals.schedule("b", "record", every=every, after=0, id="tick")
        await asyncio.sleep(0.8)
        if kill_broker:
            nodes.server.kill()
            await asyncio.sleep(1.2)
            await nodes.server.restart()
        if kill_node:
            dying.kill_all()

        async def all_there() -> bool:
            for agent, wanted in (("a", once), ("b", once[0::2])):
                found = await applied(cluster, agent)
                missing = set(wanted) - set(found)
                assert not missing, (agent, sorted(missing))
            ticks = [item for item in await applied(cluster, "b") if item.startswith("tick")]
            assert len(ticks) >= 6
            return True

        await eventually(all_there, timeout=40, message="everything that was due arrives")
        if environment:
            await eventually(lambda: not dying.is_running, timeout=10, message="void: none died")
            await asyncio.sleep(11)  # what it had taken comes again after the ack wait
        for agent in ("a", "b"):
            found = Counter(await applied(cluster, agent))
            assert max(found.values()) == 1, found.most_common(3)
        ticks = [item for item in await applied(cluster, "b") if item.startswith("tick")]
        moments = [datetime.strptime(t, "tick.%Y%m%dT%H%M%S%f").timestamp() for t in ticks]
        grid = [round((moment - moments[0]) / every, 3) for moment in moments]
        assert grid == sorted(grid)
        assert all(step == int(step) for step in grid), grid
        assert (datetime.now(UTC) - begun).total_seconds() < 60
        assert not await cluster.dead.list()


async def test_timers_survive_the_broker() -> None:
    """kill -9 of the broker amid firings: each takes effect once, and none drifts."""
    await storm({}, kill_broker=True, kill_node=False)


@pytest.mark.usefixtures("chaos")
async def test_timers_survive_the_broker_and_a_node() -> None:
    """Both at once."""
    await storm({}, kill_broker=True, kill_node=True)


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", ["timer.before", "timer.after_publish", "timer.before_ack"])
async def test_a_node_that_dies_while_it_fires_repeats_nothing(point: str) -> None:
    """Another one does it again, under the same ids."""
    await storm(
        {"FOUNDATION_FAILPOINTS": f"{point}=after(4,kill)"}, kill_broker=False, kill_node=False
    )
