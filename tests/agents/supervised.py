"""Agents that fail as they are told, and hear of those that failed them."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field

from foundation_nats import Agent, GivenUp, Signal, State, on


class Worker(Agent):
    """Counts its tries in memory, and fails the first ones."""

    capabilities = ("labouring",)

    class State(State):
        done: list[str] = Field(default_factory=list)

    def __init__(self) -> None:
        self.tries: dict[str, int] = {}

    @on("job")
    async def job(self, signal: Signal[dict[str, Any]]) -> int:
        key = str(signal.data["key"])
        self.tries[key] = self.tries.get(key, 0) + 1
        if signal.data.get("sleep"):
            await asyncio.sleep(signal.data["sleep"])
        if self.tries[key] <= signal.data.get("failures", 0):
            raise RuntimeError(f"try {self.tries[key]} of {key}")
        self.state.done.append(key)
        return self.tries[key]


class Boss(Agent):
    """Gives work to others, and writes down which was given up."""

    class State(State):
        failed: list[dict[str, Any]] = Field(default_factory=list)

    @on("give")
    async def give(self, signal: Signal[dict[str, Any]]) -> None:
        order = dict(signal.data)
        self.emit(
            "job",
            {"key": order["key"], "failures": order.get("failures", 99)},
            to=order["to"],
            attempts=order.get("attempts"),
            on_error="job.failed",
            ttl=order.get("ttl"),
        )

    @on("job.failed")
    async def failed(self, signal: Signal[GivenUp]) -> None:
        self.state.failed.append(signal.data.model_dump())
