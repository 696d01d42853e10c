"""Prompts: what handlers get and may say, the same in a unit test as behind a gateway."""

from __future__ import annotations

import pytest

from foundation_nats import Agent, Attachment, Prompt, Reply, Signal, on, on_prompt
from foundation_nats.agent.agent import provided
from foundation_nats.agent.prompts import as_reply
from foundation_nats.errors import HandlerError, PayloadInvalidError
from foundation_nats.testing import AgentHarness
from tests.agents.talkative import Clerk, Guide, Mute


class ByHand(Agent):
    """Answers prompts, and marks the handler as it would any other."""

    capabilities = ("zoo",)

    @on("prompt")
    def answer(self, signal: Signal[Prompt]) -> str:
        return signal.data.text.upper()


async def test_prompts_are_answered_in_the_harness() -> None:
    """Piece by piece or whole; text alone is a prompt, too; what fails leaves no trace."""
    async with AgentHarness(Guide, id="g") as agent:
        assert [x async for x in agent.ask_stream(Prompt(text="a b"))] == ["1:a", "1:b"]
        assert await agent.ask("prompt", "c") == ["2:c"]
        assert await agent.ask("prompt", {"text": "d"}) == ["3:d"]
        with pytest.raises(HandlerError, match="no such word"):
            await agent.ask("prompt", "fail")
        with pytest.raises(PayloadInvalidError, match="text"):
            await agent.ask("prompt", {"text": ""})
        with pytest.raises(PayloadInvalidError, match="base64"):
            file = {"filename": "f", "content": "no base64"}
            await agent.ask("prompt", {"text": "x", "attachments": [file]})
        assert agent.state.said == ["a b", "c", "d"]
    async with AgentHarness(Clerk) as agent:
        files = [Attachment.of("a", b"\x00\xff")]
        said = await agent.ask(Prompt(text="x", attachments=files))
        reply = as_reply(said)
        assert reply is not None
        assert reply.attachments[0].data() == b"\xff\x00"


def test_who_answers_prompts_provides_them() -> None:
    """By whatever mark; nobody else."""
    assert [provided(cls) for cls in (Guide, Clerk, ByHand, Mute)] == [
        ["prompt"],
        ["prompt"],
        ["prompt", "zoo"],
        [],
    ]
    assert callable(on_prompt(timeout=3))


def test_what_a_handler_says_becomes_a_reply() -> None:
    """Text, a reply, or JSON."""
    assert as_reply("x") == Reply(text="x")
    assert as_reply("") is None
    assert as_reply(None) is None
    assert as_reply({"text": "x"}) == Reply(text="x")
    assert as_reply({"text": 3}) == Reply(text='{"text":3}')
    assert as_reply([1, {"a": None}]) == Reply(text='[1,{"a":null}]')
    assert as_reply({}) == Reply(text="{}")
