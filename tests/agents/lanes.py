"""Agents that write down in which order they were told things."""

from __future__ import annotations

import asyncio

from pydantic import Field

from foundation_nats import Agent, Signal, State, on


class Lane(Agent):
    """Takes its time for each."""

    class State(State):
        keys: list[str] = Field(default_factory=list)

    @on("key")
    async def key(self, signal: Signal[str]) -> int:
        if self.config.get("seconds"):
            await asyncio.sleep(self.config["seconds"])
        self.state.keys.append(signal.data)
        return len(self.state.keys)

    @on("hold")
    async def hold(self, signal: Signal[float]) -> None:
        await asyncio.sleep(signal.data)

    @on("break")
    async def give_up(self, signal: Signal) -> None:
        raise RuntimeError("as it was told")

    @on("hand_on")
    async def hand_on(self, signal: Signal) -> None:
        self.emit("key", "urgent", to=self.id, urgent=True)


class Limited(Lane):
    """Takes in no more than so much."""

    rate = {"per_s": 20, "burst": 2}  # noqa: RUF012


class Caller(Agent):
    """Calls something that fails for nought, behind a breaker."""

    class State(State):
        calls: int = 0

    @on("call")
    async def call(self, signal: Signal[int]) -> None:
        async with self.ctx.breaker("peer", failures=1, pause_s=1.0):
            if not signal.data:
                raise OSError("it fails")
        self.state.calls += 1

    @on("calls")
    async def calls(self, signal: Signal) -> int:
        return self.state.calls
