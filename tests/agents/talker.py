"""Agents whose answers are many items."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from foundation_nats import Agent, Signal, State, on


class Talker(Agent):
    """Counts, and remembers how far it got; what it has said in vain it does not remember."""

    class State(State):
        said: int = 0
        finished: int = 0

    ahead = 0
    """How far the generator has run, whatever is kept."""
    closed = 0

    @on("count")
    async def count(self, signal: Signal[dict[str, Any]]) -> AsyncIterator[int]:
        try:
            for number in range(signal.data["to"]):
                if number == signal.data.get("fail_at"):
                    raise ValueError(f"no {number}")
                if number == signal.data.get("die_at"):
                    os._exit(9)
                if number == signal.data.get("hang_at"):
                    await asyncio.sleep(signal.data.get("hang_s", 3600))
                self.state.said += 1
                self.ahead = number + 1
                yield number
            self.state.finished += 1
            self.emit("talk.over", to=f"agent:{self.id}")
        finally:
            self.closed += 1

    @on("talk.over")
    async def over(self, signal: Signal) -> None:
        self.state.finished += 100

    @on("look")
    async def look(self, signal: Signal) -> dict[str, int]:
        return {**self.state.model_dump(), "ahead": self.ahead, "closed": self.closed}
