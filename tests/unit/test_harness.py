"""The harness keeps what an agent is promised, and the same test passes on it and on real clusters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import BaseModel, Field

from foundation_nats import Agent, RecoveredFrom, Signal, State, on
from foundation_nats.errors import (
    AgentUnavailableError,
    HandlerError,
    PayloadInvalidError,
    StateInvalidError,
    UnhandledSignalError,
)
from foundation_nats.testing import AgentHarness, TestCluster, eventually


class Add(BaseModel):
    """How much."""

    amount: int = Field(le=100)


class Till(Agent):
    """Adds up, tells an auditor, and fails when it is told to."""

    class State(State):
        """What it has."""

        total: int = 0
        starts: int = 0
        fails: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Count the starts."""
        self.state.starts += 1

    async def on_stop(self, reason: str) -> None:
        """Say goodbye."""
        self.emit("till.closed", {"why": reason}, to="agent:auditor")

    @on("till.add")
    async def add(self, signal: Signal[Add]) -> int:
        """Add."""
        self.state.total += signal.data.amount
        self.emit("till.added", {"amount": signal.data.amount}, to="agent:auditor")
        return int(self.state.total)

    @on("till.get")
    def get(self, signal: Signal[Any]) -> int:
        """The sum."""
        return int(self.state.total)

    @on("till.fail")
    async def fail(self, signal: Signal[Any]) -> None:
        """Change everything, then fail."""
        self.state.total = -1
        self.emit("till.never", to="agent:auditor")
        raise RuntimeError("told to")

    @on("till.flaky")
    async def flaky(self, signal: Signal[Any]) -> None:
        """Works at the third try."""
        if signal.attempt < 3:
            raise RuntimeError("not yet")
        self.state.total += 1000

    @on("till.spoil")
    async def spoil(self, signal: Signal[Any]) -> None:
        """Leave a state that does not fit."""
        self.state.total = "much"

    @on("till.quit")
    async def quit(self, signal: Signal[Any]) -> None:
        """Stop itself."""
        self.ctx.stop("enough")


async def scenario(
    send: Callable[..., Awaitable[Any]],
    ask: Callable[..., Awaitable[Any]],
    crash: Callable[[], Awaitable[None]],
    total: Callable[[], Awaitable[int]],
) -> None:
    """What must hold on the harness and on a cluster alike."""
    await send("till.add", {"amount": 3}, id="one")
    await send("till.add", {"amount": 3}, id="one")
    assert await ask("till.add", {"amount": 4}) == 7
    await send("till.flaky")
    with pytest.raises(HandlerError, match="told to"):
        await ask("till.fail")
    with pytest.raises(PayloadInvalidError, match="amount"):
        await ask("till.add", {"amount": 1000})
    with pytest.raises(UnhandledSignalError, match=r"till\.nothing"):
        await ask("till.nothing")
    with pytest.raises((StateInvalidError, HandlerError)):
        await ask("till.spoil")
    await crash()
    assert await ask("till.get") == 1007
    assert await total() == 1007


async def test_an_agent_alone() -> None:
    """No server, no process."""
    async with AgentHarness(Till, id="till") as agent:

        async def total() -> int:
            return int(agent.state.total)

        await scenario(agent.send, agent.ask, agent.crash, total)
        assert [item.type for item in agent.take()] == ["till.added", "till.added"]
        assert agent.state.starts == 2
    assert [(item.type, item.data, item.to) for item in agent.emitted] == [
        ("till.closed", {"why": "stopped"}, "agent:auditor")
    ]


@pytest.mark.cluster
@pytest.mark.parametrize("count", [1, 3])
async def test_the_same_on_nodes(count: int) -> None:
    """On one node and on three, whose worker is killed for the crash."""
    async with TestCluster(nodes=count, path=["."]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("tests.unit.test_harness:Till", id="till")

        async def send(type: str, data: Any = None, *, id: str | None = None) -> None:
            await cluster.send("till", type, data, id=id)

        async def ask(type: str, data: Any = None) -> Any:
            return await cluster.ask("till", type, data, timeout=5)

        async def crash() -> None:
            await eventually(lambda: at(1007), message="all signals are handled")
            info = await cluster.agents.get("till")
            assert info.node is not None
            for worker in nodes.nodes[info.node].workers():
                worker.kill()

            async def back() -> bool:
                now = await cluster.agents.get("till")
                return now.status == "running" and now.epoch > info.epoch

            await eventually(back, timeout=20, message="it is back")

        async def at(wanted: int) -> bool:
            return await total() == wanted

        async def total() -> int:
            stored = await cluster.agents.state("till")
            assert stored is not None
            return int(stored["state"]["total"])

        await scenario(send, ask, crash, total)


async def test_what_a_failed_handler_did_is_undone_and_it_becomes_a_dead_letter() -> None:
    """Four tries; wrong payloads get one."""
    async with AgentHarness(Till) as agent:
        assert not await agent.send("till.fail", id="bad")
        assert not await agent.send("till.add", {"amount": "x"})
        assert not await agent.send("till.unknown")
        assert [(dead.type, dead.attempts, dead.error.code) for dead in agent.dead] == [
            ("till.fail", 4, "agent.handler"),
            ("till.add", 1, "agent.payload_invalid"),
            ("till.unknown", 1, "agent.unhandled_signal"),
        ]
        assert agent.state.total == 0
        assert agent.emitted == []


async def test_it_may_stop_itself_and_go_on_from_a_state() -> None:
    """A stopped agent handles nothing; an earlier state is taken up."""
    agent = AgentHarness(Till, state={"total": 41})
    await agent.start()
    assert await agent.ask("till.add", {"amount": 1}) == 42
    await agent.send("till.quit")
    assert agent.stopped == "enough"
    with pytest.raises(AgentUnavailableError, match="not running"):
        await agent.ask("till.get")
    await agent.start()
    assert await agent.ask("till.get") == 42
    with pytest.raises(StateInvalidError, match="total"):
        AgentHarness(Till, state={"total": "many"})
