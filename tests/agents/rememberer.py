"""Agents that keep what they have handled, for `history` and `replay`."""

from __future__ import annotations

import socket
from pathlib import Path

from pydantic import BaseModel

from foundation_nats import Agent, Signal, State, on


class Add(BaseModel):
    amount: int


class Tally(Agent):
    """Adds up, and remembers at least its last five signals."""

    class State(State):
        total: int = 0
        count: int = 0
        paid: int = 0
        luck: float = 0.0

    history = 5

    @on("tally.add")
    async def add(self, signal: Signal[Add]) -> int:
        self.state.total += signal.data.amount
        self.state.count += 1
        self.state.luck = self.ctx.random.random()
        self.emit("tally.added", {"total": self.state.total}, to="agent:mirror")
        return self.state.total

    @on("tally.boom")
    async def boom(self, signal: Signal) -> None:
        self.state.total = -1
        raise RuntimeError("boom")

    @on("tally.pay")
    async def pay(self, signal: Signal[Add]) -> None:
        self.state.paid += await self.ctx.once("pay", self._pay, signal.data.amount)

    async def _pay(self, amount: int) -> int:
        return amount

    @on("tally.call")
    async def call(self, signal: Signal) -> None:
        """Tries to reach outside, and makes do if it can't."""
        try:
            with socket.socket() as line:
                line.connect(("127.0.0.1", 9))
        except OSError:
            self.state.count += 1000

    @on("tally.write")
    async def write(self, signal: Signal) -> None:
        Path(self.config["file"]).write_text("was here")
        self.state.count += 1
