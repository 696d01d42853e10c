"""Agents that answer prompts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated

from pydantic import BaseModel, Field

from foundation_nats import Agent, Attachment, Prompt, Reply, Signal, State, on_prompt
from foundation_nats.agent.actions import ActionContext, action


class Guide(Agent):
    """Repeats what it is told, word by word.

    It is told to misbehave by the first word.
    """

    class State(State):
        said: list[str] = Field(default_factory=list)

    @on_prompt(timeout=60)
    async def answer(self, signal: Signal[Prompt]) -> AsyncIterator[str]:
        first, *_ = words = signal.data.text.split()
        if first == "fail":
            raise ValueError("no such word")
        self.state.said.append(signal.data.text)
        for word in words:
            if word == "die-once" and signal.attempt == 1 and not os.path.exists(words[-1]):
                open(words[-1], "w").close()
                os._exit(9)
            while word == "hold" and not os.path.exists(words[-1]):
                await asyncio.sleep(0.01)
            if word == "big":
                yield "x" * 600_000
            if word == "wait":
                await asyncio.sleep(3600)
            yield f"{len(self.state.said)}:{word}"


class Clerk(Agent):
    """Returns attachments, and counts them."""

    class State(State):
        files: int = 0

    @on_prompt
    async def answer(self, signal: Signal[Prompt]) -> Reply:
        self.state.files += len(signal.data.attachments)
        back = [
            Attachment.of(item.filename.upper(), item.data()[::-1])
            for item in signal.data.attachments
        ]
        return Reply(text=f"{self.state.files} files", attachments=back)


class Sum(BaseModel):
    """What it comes to."""

    total: int


@action
async def add(amount: Annotated[int, Field(le=100)], ctx: ActionContext, agent: str = "") -> Sum:
    """Add to the till."""
    ctx.agent.state.total += amount
    return Sum(total=ctx.agent.state.total)


@action
def double(number: int) -> int:
    """Twice the number."""
    return number * 2


class Teller(Agent):
    """Has actions."""

    class State(State):
        total: int = 0

    actions = (add, double)


class Mute(Agent):
    """Answers no prompts."""
