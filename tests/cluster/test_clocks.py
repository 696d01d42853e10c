"""Wall clocks that are wrong: they change what people meant by a time, and nothing else."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.clocks import SHIM, WallClock
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

HOUR = 3600.0


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    """The clock of the nodes that are started with it."""
    return WallClock(tmp_path / "clock")


async def applied(cluster: Cluster, agent: str) -> list[str]:
    """What an agent has stored."""
    stored = await cluster.agents.state(agent)
    return [] if stored is None or stored["state"] is None else list(stored["state"]["applied"])


async def test_clocks_that_jump_and_stand_still_are_no_verdict(clock: WallClock) -> None:
    """An hour off, steps of ten minutes, a clock that stands, two on one machine: nobody notices (R-58)."""
    async with TestCluster(nodes=1, path=[str(AGENTS), SHIM]) as nodes:
        cluster = nodes.client
        nodes.start_node("skewed", environment=clock.environment)
        nodes.start_node("n3")
        await nodes.wait_up(["n1", "skewed", "n3"])
        await workload.deploy(nodes)
        epochs = {info.id: info.epoch for info in await cluster.agents.list()}
        load = workload.Load(cluster)
        load.start()
        await eventually(lambda: load.receipts > 50, message="load flows")
        for offset in (HOUR, -HOUR, 600, -600):
            clock.move(offset)
            await asyncio.sleep(0.5)
        began = monotonic()
        while (standing := monotonic() - began) < 1:
            clock.move(-standing)
            await asyncio.sleep(0.02)
        clock.set_right()
        # A manager and its worker that do not agree on the time, either way round.
        manager, worker = nodes.nodes["skewed"].family()
        for offset in (HOUR, -HOUR):
            clock.move(offset, pid=manager.pid)
            clock.move(-offset, pid=worker.pid)
            await asyncio.sleep(0.5)
        history = await load.stop()
        await workload.verdict(nodes, history)
        await workload.everyone_runs_once(nodes)
        assert {info.id: info.epoch for info in await cluster.agents.list()} == epochs
        events = await cluster.events.list(topic="node")
        assert not [event for event in events if event.what in ("down", "suspect")]


async def test_a_wrong_clock_shifts_deadlines_and_timers_of_its_own_machine_alone(
    clock: WallClock,
) -> None:
    """What is set fires by the server's clock, once; deadlines are judged by the one who handles (R-48, R-58)."""
    async with TestCluster(
        nodes=1, path=[str(AGENTS), SHIM], environment=clock.environment
    ) as nodes:
        cluster = nodes.client
        for agent in ("r", "t"):
            await cluster.agents.start("fleet:Recorder", id=agent)
        await cluster.signals.schedule("t", "record", every=0.5, after=0, id="tick")
        await cluster.signals.schedule("t", "record", after=1.0, id="once")

        clock.move(HOUR)
        await moved(cluster, "r", HOUR)
        # By its own clock it came too late.
        await cluster.send("r", "record", id="too-late", ttl=60)

        async def buried() -> bool:
            letters = [item.letter.signal or {} for item in await cluster.dead.list()]
            return [letter.get("id") for letter in letters] == ["too-late"]

        await eventually(buried, message="what its clock says is over is a dead letter")
        # And what it sets is an hour late, because `after` is reckoned by the clock of its sender.
        name = await cluster.ask("r", "set", {"after": 1.0, "name": "bell"})

        async def is_set() -> bool:
            infos = [item for item in await cluster.signals.schedules() if item.name == f"r/{name}"]
            dues = [datetime.fromisoformat(str(item.due)) for item in infos]
            return any(abs((due - datetime.now(UTC)).total_seconds() - HOUR) < 60 for due in dues)

        await eventually(is_set, message="its timer is an hour off")

        clock.move(-HOUR)
        await moved(cluster, "r", -HOUR)
        busy = asyncio.create_task(cluster.ask("r", "sleep", 0.5))
        await asyncio.sleep(0.1)
        # Over before it is handled, but not by the clock of who handles it.
        await cluster.send("r", "record", id="not-yet", ttl=0.2)
        await busy

        async def rang() -> bool:
            found = await applied(cluster, "t")
            return "once" in found and len(found) >= 6 and "not-yet" in await applied(cluster, "r")

        await eventually(rang, message="timers fire all the while")
        clock.set_right()
        found = await applied(cluster, "t")
        assert found.count("once") == 1
        ticks = [item.partition(".")[2] for item in found if item.startswith("tick")]
        moments = [datetime.strptime(text, "%Y%m%dT%H%M%S%f") for text in ticks]
        gaps = [(b - a).total_seconds() for a, b in pairwise(moments)]
        assert all(abs(gap - 0.5) < 0.01 for gap in gaps), "each moment once, none left out"
        assert len(await cluster.dead.list()) == 1


async def moved(cluster: Cluster, agent: str, offset: float) -> None:
    """Wait until the agent's own process shows the moved time."""

    async def shows() -> bool:
        seen = await cluster.ask(agent, "clock")
        return abs(seen - datetime.now(UTC).timestamp() - offset) < 60

    await eventually(shows, message="its clock has moved")
