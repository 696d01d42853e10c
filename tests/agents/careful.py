"""Agents whose steps outside must not be repeated; what happens outside is a line in a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from foundation_nats import Agent, Signal, State, on


class Teller(Agent):
    """Writes to its sink, by steps."""

    class State(State):
        """What it has paid."""

        paid: int = 0

    async def write(self, word: str, pause: float, idempotency_key: str) -> str:
        """The effect, and a moment in which nobody knows that it happened."""
        with Path(self.config["sink"]).open("a") as sink:
            sink.write(f"{word} {idempotency_key}\n")
        await asyncio.sleep(pause)
        return word.upper()

    @on("pay")
    async def pay(self, signal: Signal[int]) -> None:
        """Three steps; the third is where the test ends the worker."""
        pause = float(self.config.get("pause", 0))
        for word in ("first", "second"):
            assert await self.ctx.once(word, self.write, word, 0.0) == word.upper()
        await self.ctx.once("third", self.write, "third", pause)
        self.state.paid += signal.data

    @on("pay.careful")
    async def careful(self, signal: Signal[int]) -> None:
        """One step, and a person for its doubts."""
        pause = float(self.config.get("pause", 0))
        await self.ctx.once("only", self.write, "only", pause, on_doubt="fail")
        self.state.paid += signal.data
