"""Agents for tests of trouble: they end their process, never end, or tell a file what they did."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from foundation_nats import Agent, RecoveredFrom, Signal, State, on


class Suicidal(Agent):
    """Ends its worker process while it starts."""

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        if self.config.get("deadly", True):
            os._exit(9)

    @on("ping")
    async def ping(self, signal: Signal) -> str:
        return self.id


class Endless(Agent):
    """Has a handler that never ends, and one that does."""

    class State(State):
        handled: int = 0

    @on("hang")
    async def hang(self, signal: Signal) -> None:
        await asyncio.Event().wait()

    @on("count")
    async def count(self, signal: Signal) -> int:
        self.state.handled += 1
        return self.state.handled


class Payer(Agent):
    """Does something outside that can't be undone: a line in a file, under its idempotency key."""

    class State(State):
        paid: int = 0

    @on("pay")
    async def pay(self, signal: Signal) -> None:
        with Path(self.config["sink"]).open("a") as sink:
            sink.write(f"{signal.id} {self.ctx.idempotency_key}\n")
        self.state.paid += 1
        if self.config.get("slow"):
            await asyncio.sleep(self.config["slow"])
