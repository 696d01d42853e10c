"""The agents that are measured."""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.handling import on
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.state import State as Stored


class Add(BaseModel):
    amount: int


class Counter(Agent):
    """Counts; its state is small, as the floor's is."""

    class State(Stored):
        counter: int = 0

    @on("add")
    async def add(self, signal: Signal[Add]) -> Any:
        self.state.counter += signal.data.amount
        return self.state.counter

    @on("get")
    async def get(self, signal: Signal[Any]) -> Any:
        return self.state.counter


class Stamp(Agent):
    """Notes how long each signal took to its handler; the notes are no state."""

    notes: list[int]

    async def on_start(self, recovered: object) -> None:
        self.notes = []

    @on("stamp")
    async def stamp(self, signal: Signal[int]) -> None:
        self.notes.append(time.monotonic_ns() - signal.data)

    @on("read")
    async def read(self, signal: Signal[Any]) -> list[int]:
        return self.notes
