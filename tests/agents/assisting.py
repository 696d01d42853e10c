"""An assistant whose tool's effect is a line in a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pydantic import Field

from foundation_nats import ActionContext, Agent, Signal, State, action, on
from foundation_nats.agent.strategies import ChatModel, Conversation, ToolLoop


@action
async def pay(amount: int, ctx: ActionContext) -> str:
    """Pay."""

    async def write(idempotency_key: str) -> str:
        with Path(ctx.agent.config["sink"]).open("a") as sink:
            sink.write(f"{amount} {idempotency_key}\n")
        return f"paid {amount}"

    done = await ctx.once("write", write)
    if amount == ctx.agent.config.get("slow"):
        await asyncio.sleep(1)
    return str(done)


class Assistant(Agent):
    """Answers by a model."""

    actions = (pay,)
    loop = ToolLoop(ChatModel(model="scripted"), system="Be brief.")

    class State(State):
        """What was said."""

        chat: Conversation = Field(default_factory=Conversation)
        answers: list[str] = Field(default_factory=list)

    @on("say")
    async def say(self, signal: Signal[str]) -> Any:
        """Ask the model."""
        found = await self.loop.run(self, signal.data, self.state.chat)
        self.state.answers = [*self.state.answers, found]
        return found
