"""The agents that are measured."""

from __future__ import annotations

import time

from pydantic import Field

from foundation_nats import Agent, Signal, State, on
from foundation_nats.bench.agents import Add, Counter, Stamp


class Moved(Agent):
    """Notes how long nobody handled its signals while it was moved."""

    class State(State):
        counter: int = 0
        stopped_at: float = 0.0
        pauses: list[float] = Field(default_factory=list)

    async def on_stop(self, reason: str) -> None:
        self.state.stopped_at = time.monotonic()

    @on("add")
    async def add(self, signal: Signal[Add]) -> None:
        self.state.counter += signal.data.amount
        if self.state.stopped_at:
            # One machine, one clock: the first signal after the pause.
            self.state.pauses.append(time.monotonic() - self.state.stopped_at)
            self.state.stopped_at = 0.0


class Stage(Agent):
    """One stage of a pipeline; its effect is a count."""

    class State(State):
        counter: int = 0

    @on("step")
    async def step(self, signal: Signal[int]) -> int:
        self.state.counter += 1
        return signal.data + 1

    @on("get")
    async def get(self, signal: Signal) -> int:
        return self.state.counter


class Adder(Agent):
    """Maps: the sum of a chunk."""

    @on("map")
    async def map(self, signal: Signal) -> int:
        return sum(signal.data["items"])


class Voter(Agent):
    """Votes yes, and counts how often it did."""

    class State(State):
        counter: int = 0

    @on("vote.question")
    async def question(self, signal: Signal) -> str:
        self.state.counter += 1
        return "yes"

    @on("vote.result")
    async def result(self, signal: Signal) -> None:
        """Hears how it ended."""


class Heavy(Agent):
    """Some 20 KB of state."""

    class State(State):
        counter: int = 0
        notes: list[str] = Field(default_factory=list)

    async def on_start(self, recovered: object) -> None:
        if not self.state.notes:
            self.state.notes = [f"{self.id} {n:4} " + "." * 80 for n in range(200)]

    @on("add")
    async def add(self, signal: Signal[Add]) -> int:
        self.state.counter += signal.data.amount
        return self.state.counter


class Sleepy(Heavy):
    """The same, and sleeps as soon as it has nothing to do."""

    hibernate_after = 0.5


__all__ = ["Add", "Adder", "Counter", "Heavy", "Moved", "Sleepy", "Stage", "Stamp"]
