"""`ToolLoop`: a model that is asked again and again, with the agent's actions as its tools, until it answers.

The loop of ReAct: the model says which tools it wants, they are run, their results go back to it. It runs
in one handler. Each answer of the model and each run of a tool is a step of the signal's ledger: after a
retry, a crash or a move the loop goes on behind the last one that is stored, with the same words, and
neither the model nor a tool is called again for it. What is not known to be done is done again with the same
idempotency key, or waits for a person, as the action's `on_doubt` says.

The conversation is part of the agent's state, so it changes with the handler's commit or not at all.

Bounded by rounds and tokens; tokens are counted by the endpoint, after each answer, so a loop may go over
by one answer. What a tool gives is cut to `answer_max` characters. A model can call nothing but the
agent's actions, and of those only `tools`; it sees their errors as text. Not bounded: what the tools do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, Field

from foundation_nats.agent.actions.catalogue import actions_of, found_actions
from foundation_nats.agent.actions.running import ActionContext, context_in
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.steps import Doubt
from foundation_nats.agent.strategies.chat import Call, ChatModel, Completion
from foundation_nats.agent.tools import ToolAnswer, call_tool, tool_of
from foundation_nats.errors import BudgetError, ConfigError


class Conversation(BaseModel):
    """What was said, as a part of an agent's state."""

    messages: list[dict[str, Any]] = Field(default_factory=list)
    """In the form of chat completions, without the system's."""
    tokens: int = 0
    """Spent in all."""

    def forget(self, keep: int) -> None:
        """Drop the oldest, so that at most *keep* messages stay; begins with one of the user."""
        rest = self.messages[-keep:] if keep > 0 else []
        while rest and rest[0]["role"] != "user":
            rest = rest[1:]
        self.messages = rest


class ToolLoop:
    """A loop, to be put into the class of an agent.

    Args:
        model: which is asked; ``config: {model: {url: …}}`` of the agent goes before it.
        system: what the model is told first.
        tools: names of the agent's actions that it may use; None: all.
        rounds: how often the model is asked at most, for one `run`.
        tokens: how many may be spent, for one `run`; None: any number.
        parallel: tools at once, of those that one answer asks for.
        answer_max: characters of a tool's result that the model is given.
        strict: whether arguments must be as the schemas say, where that can be said.
        name: begins the keys of its steps.

    Example:
        >>> class Assistant(Agent):
        ...     actions = (weather,)
        ...     loop = ToolLoop(ChatModel(model="gpt-5"), system="Be brief.", rounds=6)
        ...
        ...     class State(State):
        ...         chat: Conversation = Field(default_factory=Conversation)
        ...
        ...     @on("say")
        ...     async def say(self, signal: Signal[str]) -> str:
        ...         return await self.loop.run(self, signal.data, self.state.chat)
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        system: str = "",
        tools: Collection[str] | None = None,
        rounds: int = 10,
        tokens: int | None = None,
        parallel: int = 4,
        answer_max: int = 8_000,
        strict: bool = True,
        name: str = "loop",
    ) -> None:
        if rounds < 1 or parallel < 1 or answer_max < 1 or (tokens is not None and tokens < 1):
            raise ConfigError("ToolLoop: rounds, tokens, parallel and answer_max must be positive")
        self.model = model
        self.system = system
        self.tools = None if tools is None else tuple(tools)
        self.rounds = rounds
        self.tokens = tokens
        self.parallel = parallel
        self.answer_max = answer_max
        self.strict = strict
        self.name = name

    async def run(self, agent: AnyAgent, text: str, conversation: Conversation) -> str:
        """Say *text*, and return what the model answers in the end.

        Raises:
            BudgetError: it has no answer within its rounds or tokens; *conversation* has what was said.
            ActionError: the model does not answer.
            ConfigError: *tools* names an action that the agent has not.
            StepInDoubtError: a tool was interrupted whose `on_doubt` is ``fail``.
        """
        ctx = context_in(agent, self.name)
        model = self.model.of(agent.config)
        allowed = self._allowed(agent)
        offered = [tool_of(item).openai(strict=self.strict) for item in allowed.values()]
        conversation.messages.append({"role": "user", "content": text})
        spent = 0
        for number in range(1, self.rounds + 1):
            if self.tokens is not None and spent >= self.tokens:
                raise BudgetError(
                    f"The model has used {spent:,} tokens without an answer; "
                    f"the limit is {self.tokens:,}.",
                    tokens=spent,
                )
            said = await self._ask(ctx, model, conversation, offered, number)
            spent += said.tokens
            conversation.tokens += said.tokens
            conversation.messages.append(said.message())
            if not said.calls:
                return said.text
            answers = await self._use(ctx, allowed, said.calls, number)
            conversation.messages += [
                {"role": "tool", "tool_call_id": call.id, "content": answer.text}
                for call, answer in zip(said.calls, answers, strict=True)
            ]
        raise BudgetError(
            f"The model has no answer after {self.rounds} rounds.", rounds=self.rounds, tokens=spent
        )

    def _allowed(self, agent: AnyAgent) -> dict[str, Any]:
        known = {**found_actions(agent), **actions_of(type(agent))}
        if self.tools is None:
            return known
        missing = sorted(set(self.tools) - set(known))
        if missing:
            raise ConfigError(
                f"ToolLoop of {type(agent).__qualname__}: it has no action {', '.join(missing)}"
            )
        return {name: known[name] for name in self.tools}

    async def _ask(
        self,
        ctx: ActionContext,
        model: ChatModel,
        conversation: Conversation,
        offered: list[dict[str, Any]],
        number: int,
    ) -> Completion:
        messages = list(conversation.messages)
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})

        async def ask(idempotency_key: str) -> Completion:
            return await model.complete(messages, offered, idempotency_key=idempotency_key)

        found: Completion = await ctx.once(f"model-{number}", ask, returns=Completion)
        return found

    async def _use(
        self, ctx: ActionContext, allowed: dict[str, Any], calls: list[Call], number: int
    ) -> list[ToolAnswer]:
        """Run the tools side by side; the results in the order of the calls."""
        room = asyncio.Semaphore(self.parallel)

        async def use(index: int, call: Call) -> ToolAnswer:
            async with room:
                return await self._use_one(ctx, allowed, call, f"tool-{number}-{index}")

        tasks = [asyncio.ensure_future(use(index, call)) for index, call in enumerate(calls, 1)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _use_one(
        self, ctx: ActionContext, allowed: dict[str, Any], call: Call, key: str
    ) -> ToolAnswer:
        action = allowed.get(call.name)
        if action is None:
            known = ", ".join(allowed) or "none"
            return ToolAnswer(
                text=f"There is no tool {call.name!r}; there are: {known}.", is_error=True
            )
        inner = ctx._child(f"{ctx.path}/{key}", action)

        async def act() -> ToolAnswer:
            found = await call_tool(inner, action, call.arguments)
            return ToolAnswer(text=self._cut(found.text), is_error=found.is_error)

        doubt = action.on_doubt if action.on_doubt == Doubt.FAIL else Doubt.RERUN
        found: ToolAnswer = await ctx.once(key, act, on_doubt=doubt, returns=ToolAnswer)
        return found

    def _cut(self, text: str) -> str:
        if len(text) <= self.answer_max:
            return text
        return f"{text[: self.answer_max]}… ({len(text):,} characters in all)"


__all__ = ["Conversation", "ToolLoop"]
