"""Agents that sleep: they wake for signals and questions, and nothing is lost or handled twice."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest

from foundation_nats.testing import AgentHarness, TestCluster, eventually
from tests.agents.sleepy import Sleepy
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def _slept(nodes: TestCluster, id: str, times: int) -> None:
    async def so_often() -> bool:
        record = await nodes.client.agents.state(id)
        return record is not None and len(record["state"]["stops"]) == times

    await eventually(so_often, timeout=15, message=f"it sleeps for the {times}th time")


async def _asleep(nodes: TestCluster, *ids: str) -> None:
    async def all_sleep() -> bool:
        infos = {info.id: info.status for info in await nodes.client.agents.list()}
        return all(infos[id] == "hibernated" for id in ids)

    await eventually(all_sleep, timeout=15, message="they sleep")


async def test_a_signal_and_a_question_wake_an_agent_that_sleeps() -> None:
    """With the state it had; its hooks are told, and what it emits on the way is kept."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("sleepy:Diary", id="diary")
        await client.agents.start("sleepy:Sleepy", id="s")
        assert await client.ask("s", "add", 1) == 1
        epoch = (await client.agents.get("s")).epoch
        await _asleep(nodes, "s")
        (node,) = await client.nodes.list()
        assert node.agents == 2, "it counts all the same"
        assert await client.ask("s", "add", 2) == 3
        await _slept(nodes, "s", 2)
        await client.send("s", "add", 4)

        async def added() -> bool:
            record = await client.agents.state("s")
            return record is not None and record["state"]["total"] == 7

        await eventually(added, message="the signal woke it")
        await _slept(nodes, "s", 3)
        record = await client.agents.state("s")
        assert record is not None
        assert record["state"]["starts"] == ["first", "hibernated", "hibernated"]
        assert record["state"]["stops"] == ["hibernated"] * 3
        assert record["epoch"] == epoch
        diary = await client.agents.state("diary")
        assert diary is not None
        assert diary["state"]["slept"] == {"s": 3}
        await client.agents.stop("s")
        events = [event.what for event in await client.events.list(topic="agent")]
        assert events.count("started") == 2


async def test_an_agent_that_sleeps_leaves_its_workers_memory_at_once() -> None:
    """By counting references: a circle would keep its state till a full collection, which is rare."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        names = [f"d{number}" for number in range(5)]
        for name in names:
            await client.agents.start("sleepy:Dreamer", id=name)
            assert await client.ask(name, "add", 1) == 1
        await _asleep(nodes, *names)
        assert await client.ask(names[0], "bodies") == 1
        await client.agents.start("sleepy:Dreamer", id="short")
        await client.agents.stop("short")
        await _asleep(nodes, *names)
        assert await client.ask(names[1], "bodies") == 1, "nor does one that ends stay"


async def test_a_sleeper_whose_node_dies_is_recovered_and_loses_nothing() -> None:
    """It is as much on its node as one that is awake."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("sleepy:Plain", id="s", critical=True)
        await client.ask("s", "add", 5)
        await _asleep(nodes, "s")
        node = (await client.agents.get("s")).node
        assert node is not None
        nodes.nodes[node].kill_all()
        await client.send("s", "add", 6)

        async def added() -> bool:
            record = await client.agents.state("s")
            return record is not None and record["state"]["total"] == 11

        await eventually(added, timeout=20, message="it goes on elsewhere")
        assert (await client.agents.get("s")).epoch == 2


async def test_signals_at_every_moment_of_falling_asleep_take_effect_once() -> None:
    """Under load that comes and goes, with workers killed: totals are exact."""
    chance = random.Random(7)
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        ids = [f"p{n}" for n in range(20)]
        await asyncio.gather(
            *(client.agents.start("sleepy:Plain", id=id, critical=True) for id in ids)
        )
        sent = dict.fromkeys(ids, 0)

        async def feed(id: str) -> None:
            for _ in range(12):
                await asyncio.sleep(chance.uniform(0.0, 1.2))
                await client.send(id, "add", 1, timeout=20)
                sent[id] += 1

        async def kill() -> None:
            for _ in range(3):
                await asyncio.sleep(chance.uniform(1.0, 2.5))
                node = chance.choice(list(nodes.nodes.values()))
                for worker in node.workers():
                    worker.send_signal(signal.SIGKILL)

        await asyncio.gather(kill(), *(feed(id) for id in ids))

        async def exact() -> bool:
            for id in ids:
                record = await client.agents.state(id)
                if record is None or record["state"]["total"] != sent[id]:
                    return False
            return True

        await eventually(exact, timeout=30, message="every total is exact")
        await _asleep(nodes, *ids)


async def test_a_sleeper_can_be_moved_and_scaled() -> None:
    """Whoever moves it need not know that it sleeps."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("sleepy:Plain", id="s")
        await client.ask("s", "add", 5)
        await _asleep(nodes, "s")
        node = (await client.agents.get("s")).node
        assert node is not None
        await client.nodes.drain(node)

        async def moved() -> bool:
            return (await client.agents.get("s")).node != node

        await eventually(moved, timeout=20, message="it leaves the drained node")
        assert await client.ask("s", "add", 1, timeout=10) == 6


async def test_the_harness_lets_an_agent_sleep_too() -> None:
    """Private fields are gone, the state is not."""
    async with AgentHarness(Sleepy) as sleepy:
        await sleepy.ask("add", 3)
        await sleepy.hibernate()
        assert await sleepy.ask("add", 3) == 6
        assert sleepy.state.starts == ["first", "hibernated"]
        assert sleepy.state.stops == ["hibernated"]


@pytest.mark.parametrize("point", ["sleep.before", "wake.read"])
async def test_a_worker_that_dies_while_an_agent_lies_down_or_wakes_loses_nothing(
    point: str,
) -> None:
    """What is half asleep is recovered as anything else."""
    crashes = {"FOUNDATION_FAILPOINTS": f"{point}=after(3,kill)"}
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)], environment=crashes) as nodes:
        client = nodes.client
        await client.agents.start("sleepy:Plain", id="s")
        (node,) = nodes.nodes.values()
        first = [worker.pid for worker in node.workers()]
        for number in range(6):
            await client.send("s", "add", 1)
            await asyncio.sleep(0.9 if number < 4 else 0.0)

        async def exact() -> bool:
            record = await client.agents.state("s")
            return record is not None and record["state"]["total"] == 6

        await eventually(exact, timeout=20, message="the total is exact")
        assert first != [worker.pid for worker in node.workers()], "nothing has crashed"
