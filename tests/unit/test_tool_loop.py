"""The loop of a model and its tools: what is said, what is bounded, what a crash repeats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
from pydantic import Field

from foundation_nats import ActionContext, Agent, Signal, State, action, on
from foundation_nats.agent.skills import Skill
from foundation_nats.agent.strategies import ChatModel, Conversation, ToolLoop
from foundation_nats.errors import ActionError, BudgetError, ConfigError, HandlerError
from foundation_nats.testing import AgentHarness, ScriptedModel, Use, eventually
from foundation_nats.testing.models import complaint

PAID: list[str] = []


@action
async def pay(amount: int, ctx: ActionContext, note: str = "") -> str:
    """Pay."""
    if amount < 0:
        raise ValueError("too little")

    def outside(idempotency_key: str) -> None:
        PAID.append(f"{amount}{note} {idempotency_key}")

    await ctx.once("out", outside)
    return f"paid {amount}"


@action
async def look(where: str) -> str:
    """Look somewhere."""
    return where * 10


class Assistant(Agent):
    """Answers by a model."""

    actions = (pay, look)
    loop = ToolLoop(ChatModel(model="none", retries=1), system="Be brief.", rounds=4)
    others: ClassVar[dict[str, ToolLoop]] = {}

    class State(State):
        """What was said."""

        chat: Conversation = Field(default_factory=Conversation)

    @on("say")
    async def say(self, signal: Signal[str]) -> str:
        """Ask the model."""
        return await self.loop.run(self, signal.data, self.state.chat)

    @on("other.*")
    async def other(self, signal: Signal[str]) -> str:
        """By another loop."""
        loop = self.others[signal.type]
        return await loop.run(self, signal.data, self.state.chat)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    PAID.clear()


def _config(model: ScriptedModel) -> dict[str, Any]:
    return {"model": {"url": model.url, "model": "scripted"}}


async def test_a_model_uses_tools_until_it_answers() -> None:
    """Several at once, in the order of its calls; the conversation stays and is told again."""
    turns = [
        [Use("pay", {"amount": 1, "note": None}), Use("look", {"where": "a"})],
        Use("pay", {"amount": 2, "note": "!"}),
        lambda messages: f"I know {len(messages)} messages.",
    ]
    async with (
        ScriptedModel(turns) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        assert await agent.ask("say", "pay") == "I know 7 messages."
        assert [item.split()[0] for item in PAID] == ["1", "2!"]
        roles = [message["role"] for message in agent.state.chat.messages]
        assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
        assert [m["content"] for m in agent.state.chat.messages if m["role"] == "tool"] == [
            '"paid 1"',
            f'"{"a" * 10}"',
            '"paid 2"',
        ]
        assert agent.state.chat.tokens > 0
        await agent.crash()
        assert await agent.ask("say", "again") == "I know 14 messages."
        first = model.requests[0]
        assert first["messages"][0] == {"role": "system", "content": "Be brief."}
        assert [tool["function"]["name"] for tool in first["tools"]] == ["pay", "look"]
        assert all(tool["function"]["strict"] for tool in first["tools"])
        assert agent.steps == []
        agent.agent.state.chat.forget(3)
        assert agent.agent.state.chat.messages == []


async def test_a_model_is_told_what_it_did_wrong() -> None:
    """And goes on."""
    turns = [
        Use("pay", '{"amount": "much"'),
        Use("pay", {"amount": "much", "note": None}),
        [Use("steal", {}), Use("pay", {"amount": -1, "note": None})],
        "Sorry.",
    ]
    async with (
        ScriptedModel(turns) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        assert await agent.ask("say", "pay") == "Sorry."
        told = [m["content"] for m in agent.state.chat.messages if m["role"] == "tool"]
        assert "no JSON" in told[0]
        assert "amount: Input should be a valid integer" in told[1]
        assert told[2:] == [
            "There is no tool 'steal'; there are: pay, look.",
            "ValueError: too little",
        ]
        assert PAID == []


KEYS = ("loop/model-1", "loop/tool-1-1/pay/out", "loop/tool-1-1", "loop/model-2")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("point", ["begun", "happened", "done"])
async def test_a_crash_calls_neither_model_nor_tool_again_but_for_what_is_in_doubt(
    key: str, point: str
) -> None:
    """With the same idempotency key."""
    turns = [Use("pay", {"amount": 1, "note": None}), "Done."]
    async with (
        ScriptedModel(turns) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        agent.crash_in_step(key, point)
        assert await agent.send("say", "pay", id="s1")
        assert agent.state.chat.messages[-1]["content"] == "Done."
        in_doubt = point == "happened"
        asked = 3 if in_doubt and "model" in key else 2
        assert len(model.requests) == asked
        assert set(model.keys) == {"agent.s1.loop/model-1", "agent.s1.loop/model-2"}
        paid = 2 if in_doubt and key.endswith("out") else 1
        assert ["1 agent.s1.loop/tool-1-1/pay/out"] * paid == PAID


async def test_a_handler_that_fails_after_the_loop_does_not_ask_again() -> None:
    """What was said is stored until the signal has taken effect."""

    class Clumsy(Assistant):
        fails: ClassVar[list[int]] = [1, 1]

        @on("say")
        async def say(self, signal: Signal[str]) -> str:
            found = await super().say(signal)
            if self.fails:
                self.fails.pop()
                raise RuntimeError("clumsy")
            return found

    async with (
        ScriptedModel([Use("look", {"where": "a"}), "Seen."]) as model,
        AgentHarness(Clumsy, config=_config(model)) as agent,
    ):
        assert await agent.send("say", "look")
        assert len(model.requests) == 2
        assert len(agent.state.chat.messages) == 4


async def test_rounds_and_tokens_are_bounded() -> None:
    """The signal is given up at once."""
    forever: list[Any] = [Use("look", {"where": "a"})] * 50
    Assistant.others["other.poor"] = ToolLoop(ChatModel(model="m"), tokens=20, rounds=40)
    async with (
        ScriptedModel(forever) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        with pytest.raises(BudgetError, match="no answer after 4 rounds"):
            await agent.ask("say", "look")
        assert len(model.requests) == 4
        assert not await agent.send("other.poor", "look")
        assert "the limit is 20" in str(agent.dead[0].error)
        assert agent.dead[0].attempts == 1
        assert agent.state.chat.messages == []


async def test_results_are_cut_and_tools_may_be_chosen() -> None:
    """What a loop may not use it is not offered, and can't call."""
    Assistant.others["other.small"] = ToolLoop(
        ChatModel(model="m"), tools=["look"], answer_max=10, strict=False
    )
    Assistant.others["other.wrong"] = ToolLoop(ChatModel(model="m"), tools=["fly"])
    turns = [[Use("look", {"where": "ab"}), Use("pay", {"amount": 1})], "Cut."]
    async with (
        ScriptedModel(turns) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        assert await agent.ask("other.small", "look") == "Cut."
        told = [m["content"] for m in agent.state.chat.messages if m["role"] == "tool"]
        assert told == [
            '"ababababa… (22 characters in all)',
            "There is no tool 'pay'; there are: look.",
        ]
        assert [tool["function"]["name"] for tool in model.requests[0]["tools"]] == ["look"]
        assert PAID == []
        with pytest.raises(ConfigError, match="no action fly"):
            await agent.ask("other.wrong", "x")
    with pytest.raises(ConfigError, match="must be positive"):
        ToolLoop(ChatModel(model="m"), rounds=0)


async def test_a_tool_in_doubt_waits_for_a_person() -> None:
    """Where it says so; the model is not asked about it."""

    class Careful(Assistant):
        actions = (action(name="launch", on_doubt="fail")(_launch),)

    async with (
        ScriptedModel([Use("launch"), "Launched."]) as model,
        AgentHarness(Careful, config=_config(model)) as agent,
    ):
        agent.crash_in_step("loop/tool-1-1", "happened")
        assert not await agent.send("say", "launch")
        assert agent.dead[0].error.code == "agent.step_in_doubt"
        assert len(model.requests) == 1


async def _launch() -> str:
    return "launched"


class Finder(Skill):
    """Finds out what it can do when it is started."""

    def found_actions(self) -> Mapping[str, Any]:
        return {"find": action(name="find")(_find)}


async def _find(what: str, where: str = "here") -> str:
    return f"{what} is {where}"


async def test_tools_that_a_skill_has_found_are_offered_too() -> None:
    """And take nulls for what is not given, as all do."""

    class Searcher(Assistant):
        skills = (Finder(),)

    turns = [Use("find", {"what": "it", "where": None}), "Found."]
    async with (
        ScriptedModel(turns) as model,
        AgentHarness(Searcher, config=_config(model)) as agent,
    ):
        assert await agent.ask("say", "find") == "Found."
        told = [m["content"] for m in agent.state.chat.messages if m["role"] == "tool"]
        assert told == ['"it is here"']
        names = [tool["function"]["name"] for tool in model.requests[0]["tools"]]
        assert sorted(names) == ["find", "look", "pay"]


# ---- the endpoint ---------------------------------------------------------------------


async def test_a_model_that_does_not_answer_is_asked_again(monkeypatch: Any) -> None:
    """As it says, and not for ever; what is wrong with the question is told at once."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    async with ScriptedModel(["Hello."]) as model:
        chat = ChatModel(url=model.url, model="m", retries=1)
        messages = [{"role": "user", "content": "hi"}]
        model.fail(429, headers={"Retry-After": "0"})
        assert (await chat.complete(messages)).text == "Hello."
        model.fail(503, times=2, headers={"Retry-After": "0"})
        with pytest.raises(ActionError, match="answers 503: as told"):
            await chat.complete(messages)
        asked = len(model.requests)
        with pytest.raises(ActionError, match="answers 400: 'nobody' is no role"):
            await chat.complete([{"role": "nobody"}])
        assert len(model.requests) == asked + 1
        with pytest.raises(ActionError, match="answers more than 10 bytes"):
            await chat.model_copy(update={"answer_max_bytes": 10}).complete(messages)
        url = model.url
        release = model.hold()
        with pytest.raises(ActionError, match="does not answer"):
            await ChatModel(url=url, model="m", retries=0, timeout=0.05).complete(messages)
        release()
    with pytest.raises(ActionError, match="does not answer"):
        await ChatModel(url=url, model="m", retries=0).complete([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("answer", ["[]", '{"choices": []}', '{"choices": [{"message": 3}]}', "no"])
async def test_what_is_no_chat_completion_is_said(answer: str) -> None:
    """And nothing of it is used."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n"
        writer.write((head + answer).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        chat = ChatModel(url=f"http://127.0.0.1:{port}/v1", model="m", retries=0)
        with pytest.raises(ActionError, match="no chat completion"):
            await chat.complete([{"role": "user", "content": "x"}])


async def test_a_wrong_configuration_of_the_model_is_named() -> None:
    """By the agent's configuration."""
    for config, match in (({"url": "ftp://x"}, "no http"), ({"speed": 1}, "speed")):
        async with AgentHarness(Assistant, config={"model": config}) as agent:
            with pytest.raises((ConfigError, HandlerError), match=match):
                await agent.ask("say", "x")


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "model is missing"),
        ({"model": "m", "messages": []}, "messages is missing"),
        (
            {"model": "m", "messages": [{"role": "tool", "tool_call_id": "a"}]},
            "answers no call",
        ),
        (
            {
                "model": "m",
                "messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            },
            "not answered: a",
        ),
        (
            {
                "model": "m",
                "messages": [{"role": "user"}],
                "tools": [
                    {
                        "function": {
                            "name": "t",
                            "strict": True,
                            "parameters": {"type": "object", "properties": {"a": {}}},
                        }
                    }
                ],
            },
            "tool t: additionalProperties",
        ),
    ],
)
def test_the_scripted_model_is_as_strict_as_a_real_one(request_: Any, match: str) -> None:
    """Or tests would pass that fail outside."""
    assert match in complaint(request_)


async def test_the_loop_ends_when_its_handler_is_cancelled() -> None:
    """And the scripted model when it is stopped, whoever waits."""
    async with (
        ScriptedModel(["Late."]) as model,
        AgentHarness(Assistant, config=_config(model)) as agent,
    ):
        release: Callable[[], None] = model.hold()
        task = asyncio.ensure_future(agent.ask("say", "x"))
        await eventually(lambda: len(model.requests) == 1, message="it is asked")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release()
        assert agent.state.chat.messages == []
