"""The chat session streams, and remembers what was said before its worker was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.chat import Session
from foundation_nats.testing import AgentHarness, TestCluster, eventually
from tests.examples.test_sensors import run

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.cluster
async def test_the_talk_goes_on_after_a_crash() -> None:
    """SIGKILL of the worker between two calls of the program."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as nodes:
        lines = await run("chat", nodes.server.url, "I like tea")
        assert lines == ["Hello. I will remember that."]
        for worker in nodes.nodes["n1"].workers():
            worker.kill()

        async def runs() -> bool:
            info = await nodes.client.agents.get("chat-ann")
            return info.status == "running" and info.epoch > 1

        await eventually(runs, timeout=20, message="it runs again")
        lines = await run("chat", nodes.server.url, "And cake", "Bye")
        assert lines == ["You said 'I like tea' before.", "You said 'And cake' before."]


async def test_it_sleeps_and_an_answer_that_nobody_wanted_was_not_given() -> None:
    """Without a server."""
    async with AgentHarness(Session) as session:
        words = session.ask_stream("say", "hi", window=1)
        assert await anext(words) == "Hello."
        await words.aclose()
        assert session.state.turns == []
        assert await session.ask("say", "hi") == ["Hello.", "I", "will", "remember", "that."]
        await session.hibernate()
        assert [word async for word in session.ask_stream("say", "ho")][-2:] == ["'hi'", "before."]


def test_the_example_is_short() -> None:
    """Or nobody reads it."""
    assert len((REPOSITORY / "examples" / "chat.py").read_text().splitlines()) <= 45
