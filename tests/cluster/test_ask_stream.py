"""Answers of many items: in order, no further ahead than asked for, ended by either side, kept or not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from foundation_nats import AgentRef, Cluster
from foundation_nats.api.breakers import BreakerRule
from foundation_nats.base.clock import monotonic
from foundation_nats.base.resilience import BreakerState
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BreakerOpenError,
    BusError,
    ConfigError,
    HandlerError,
    UnhandledSignalError,
)
from foundation_nats.testing import AgentHarness, TestCluster, eventually
from tests.agents.talker import Talker
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node, and an agent that talks."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as running:
        await running.client.agents.start("talker:Talker", id="t")
        yield running


async def _all(cluster: Cluster, data: dict[str, Any], **options: Any) -> list[Any]:
    return [item async for item in cluster.ask_stream("t", "count", data, **options)]


async def test_items_come_in_order_and_the_effects_at_the_end(nodes: TestCluster) -> None:
    """More items than the window; a plain ask gets a list, a plain handler gives one item."""
    cluster = nodes.client
    assert await _all(cluster, {"to": 500}, window=8) == list(range(500))
    await eventually(lambda: _has(cluster, finished=101))
    assert (await cluster.ask("t", "look"))["said"] == 500
    assert await cluster.ask("t", "count", {"to": 3}) == [0, 1, 2]
    assert await _all(cluster, {"to": 0}) == []
    (looked,) = [item async for item in cluster.ask_stream("t", "look")]
    assert looked["said"] == 503
    await cluster.send("t", "count", {"to": 2})
    await eventually(lambda: _has(cluster, said=505))


async def _has(cluster: Cluster, **expected: int) -> bool:
    found = await cluster.ask("t", "look")
    return all(found[name] == value for name, value in expected.items())


async def test_who_reads_slowly_holds_the_generator_back(nodes: TestCluster) -> None:
    """It runs a window ahead, no more; leaving early ends it, and nothing of it is kept."""
    cluster = nodes.client
    async with aclosing(
        cluster.ask_stream("t", "count", {"to": 100_000}, window=10, timeout=10)
    ) as items:
        first = [await anext(items) for _ in range(5)]
        assert first == [0, 1, 2, 3, 4]
        await asyncio.sleep(0.3)
        waiting = asyncio.create_task(cluster.ask("t", "look", timeout=10))
        await asyncio.sleep(0)
    found = await waiting
    assert found["closed"] == 1
    assert found["said"] == 0, "what was said in vain is kept"
    assert found["ahead"] <= 5 + 10 + 5


async def test_a_question_that_nobody_waits_for_any_more_is_not_begun(nodes: TestCluster) -> None:
    """Its asker has left while the agent was busy."""
    cluster = nodes.client
    busy = cluster.ask_stream("t", "count", {"to": 100_000}, window=1)
    assert await anext(busy) == 0
    with pytest.raises(AskTimeoutError, match="before it began"):
        await _all(cluster, {"to": 5}, timeout=0.3)
    await busy.aclose()
    assert (await cluster.ask("t", "look"))["closed"] == 1


async def test_errors_are_told_and_leave_no_trace(nodes: TestCluster) -> None:
    """What the generator raises, after some items; a time-out ends the handler, too."""
    cluster = nodes.client
    seen = []
    with pytest.raises(HandlerError, match="no 3"):
        async for item in cluster.ask_stream("t", "count", {"to": 9, "fail_at": 3}):
            seen.append(item)
    assert seen == [0, 1, 2]
    with pytest.raises(AskTimeoutError, match=r"nothing came for 0\.5 s, in the middle"):
        await _all(cluster, {"to": 9, "hang_at": 2}, timeout=0.5)
    assert await _has(cluster, said=0, closed=2)
    with pytest.raises(UnhandledSignalError):
        [item async for item in cluster.ask_stream("t", "sing")]
    with pytest.raises(AgentNotFoundError):
        [item async for item in cluster.ask_stream("nobody", "count")]
    with pytest.raises(ConfigError, match="window"):
        await _all(cluster, {"to": 1}, window=0)


async def test_an_agent_that_dies_in_the_middle_is_noticed(nodes: TestCluster) -> None:
    """Its worker ends; the asker learns of it long before its time-out, and the agent is back."""
    cluster = nodes.client
    began = monotonic()
    seen = []
    with pytest.raises(AskTimeoutError, match=r"recovered|the agent is") as caught:
        async for item in cluster.ask_stream("t", "count", {"to": 9, "die_at": 3}, timeout=60):
            seen.append(item)
    assert monotonic() - began < 20
    assert seen == [0, 1, 2][: len(seen)]
    assert caught.value.details["items"] == len(seen)
    await eventually(lambda: _has(cluster, said=0), timeout=20)


async def test_an_agent_that_is_stopped_ends_its_answer(nodes: TestCluster) -> None:
    """A drain does not wait for who reads slowly."""
    cluster = nodes.client
    items = cluster.ask_stream("t", "count", {"to": 100_000}, window=2, timeout=20)
    assert await anext(items) == 0
    stopping = asyncio.create_task(cluster.agents.stop("t"))
    with pytest.raises((AgentUnavailableError, AskTimeoutError)):
        async for _ in items:
            pass
    await stopping


async def test_a_broker_that_dies_in_the_middle_truncates_nothing(nodes: TestCluster) -> None:
    """Either all items come, or an error; what is kept is what was said to the end."""
    cluster = nodes.client
    seen: list[int] = []
    agent = AgentRef(cluster, "t")
    try:
        async for item in agent.ask_stream("count", {"to": 400}, window=4, timeout=20):
            seen.append(item)
            if len(seen) == 50:
                nodes.server.kill()
                await nodes.server.restart()
    except (AskTimeoutError, AgentUnavailableError, BusError):
        assert seen == list(range(len(seen)))
    else:
        assert seen == list(range(400))

    async def works_again() -> bool:
        found = await cluster.ask("t", "look", timeout=5)
        assert found["said"] in (0, 400)
        assert found["said"] == (400 if found["finished"] else 0)
        return True

    await eventually(works_again, timeout=20)
    assert [n async for n in agent.ask_stream("count", {"to": 3})] == [0, 1, 2]


@pytest.mark.usefixtures("chaos")
async def test_a_node_that_dies_in_the_middle_is_noticed() -> None:
    """The asker gets an error, nothing of the answer is kept, and the next one comes from elsewhere."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        agent = await cluster.agents.start("talker:Talker", id="t", critical=True)
        home = (await cluster.agents.get("t")).node
        seen: list[int] = []
        with pytest.raises((AskTimeoutError, AgentUnavailableError)):
            async for item in agent.ask_stream("count", {"to": 100_000}, window=4, timeout=60):
                seen.append(item)
                if len(seen) == 50:
                    nodes.nodes[home or ""].kill_all()
        assert seen == list(range(len(seen)))

        async def elsewhere() -> bool:
            items = [n async for n in agent.ask_stream("count", {"to": 3}, timeout=5)]
            assert (await cluster.agents.get("t")).node != home
            return items == [0, 1, 2]

        await eventually(elsewhere, timeout=30)
        assert (await agent.ask("look"))["said"] == 3


async def test_lines_in_a_shell(nodes: TestCluster) -> None:
    """`foundation ask --stream`: one line for each item."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        where = ["-s", nodes.server.url, "-c", nodes.client.name]
        command = [sys.executable, "-m", "foundation_cli.main", "ask", *where, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = await asyncio.to_thread(call, "t", "count", '{"to": 3}', "--stream", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [0, 1, 2]
    done = await asyncio.to_thread(call, "t", "count", '{"to": 3, "fail_at": 1}', "--stream")
    assert (done.returncode, done.stdout) == (1, "0\n")
    assert "no 1" in done.stderr


async def test_the_harness_streams_too() -> None:
    """Effects at the end; leaving early and errors leave no trace."""
    async with AgentHarness(Talker, id="t") as agent:
        assert [n async for n in agent.ask_stream("count", {"to": 5}, window=2)] == list(range(5))
        assert (agent.state.said, len(agent.take("talk.over"))) == (5, 1)
        async with aclosing(agent.ask_stream("count", {"to": 50}, window=2)) as items:
            assert [await anext(items) for _ in range(3)] == [0, 1, 2]
        assert agent.state.said == 5
        assert agent.agent.ahead < 10
        with pytest.raises(HandlerError, match="no 1"):
            [n async for n in agent.ask_stream("count", {"to": 5, "fail_at": 1})]
        assert agent.state.said == 5
        assert agent.agent.closed == 3
        assert await agent.ask("count", {"to": 2}) == [0, 1]
        assert [item async for item in agent.ask_stream("look")] == [await agent.ask("look")]


# ---- breakers ---------------------------------------------------------------------------


async def test_a_breaker_spares_who_does_not_answer(nodes: TestCluster) -> None:
    """Opened by silence, not by errors; refused at once, let through again, told in events."""
    cluster = nodes.client
    rule = BreakerRule(failures=2, pause_s=0.5)
    for _ in range(3):
        with pytest.raises(HandlerError):
            await cluster.ask("t", "count", {"to": 2, "fail_at": 1}, breaker=rule)
    for _ in range(2):
        slow = {"to": 1, "hang_at": 0, "hang_s": 0.5}
        with pytest.raises(AskTimeoutError):
            await cluster.ask("t", "count", slow, timeout=0.2, breaker=rule)
    with pytest.raises(BreakerOpenError, match="agent:t has not answered too often"):
        await cluster.ask("t", "look", breaker=rule)
    (info,) = cluster.breakers()
    assert (info.target, info.state, info.refused) == ("agent:t", BreakerState.OPEN, 1)
    assert (await cluster.ask("t", "look", timeout=10))["said"] == 2, (
        "without a breaker it is asked"
    )
    await eventually(lambda: cluster.breakers()[0].state is BreakerState.HALF_OPEN)
    await cluster.ask("t", "look", breaker=rule)
    assert cluster.breakers()[0].state is BreakerState.CLOSED
    events = [event.what for event in await cluster.events.list(topic="breaker")]
    assert events == ["opened", "half_open", "closed"]
    with pytest.raises(ConfigError, match="must be positive"):
        await cluster.ask("t", "look", breaker=BreakerRule(failures=0))
