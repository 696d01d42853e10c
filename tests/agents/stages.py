"""Agents that are stages of pipelines, mappers and reducers; they count what happened to them."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import Field

from foundation_nats import Agent, Signal, State, on
from foundation_nats.coordination import map_reduce, pipeline


class Stage(Agent):
    """Appends its id to each item; refuses what its configuration says, so many times."""

    class State(State):
        seen: dict[str, int] = Field(default_factory=dict)

    refused: dict[str, int]

    async def on_start(self, recovered: object) -> None:
        self.refused = {}

    @on("step")
    async def step(self, signal: Signal[list[Any]]) -> list[Any]:
        await asyncio.sleep(self.config.get("slow", 0))
        item = str(signal.data[0])
        if item in self.config.get("refuse", []):
            self.refused[item] = self.refused.get(item, 0) + 1
            if self.refused[item] <= self.config.get("times", 10**9):
                raise RuntimeError(f"no {item}")
        self.state.seen[item] = self.state.seen.get(item, 0) + 1
        return [*signal.data, self.id]

    @on("seen")
    async def get(self, signal: Signal) -> dict[str, int]:
        return self.state.seen


class Mapper(Agent):
    """Says the sum, the number, and in their order the first items of each chunk."""

    @on("map")
    async def map(self, signal: Signal[dict[str, Any]]) -> dict[str, Any]:
        await asyncio.sleep(self.config.get("slow", 0))
        items = signal.data["items"]
        if self.config.get("refuse") in items:
            raise RuntimeError(f"no {self.config['refuse']}")
        return {"sum": sum(items), "count": len(items), "firsts": items[:1]}


class Reducer(Agent):
    """Adds the chunks up, and notes which they were."""

    class State(State):
        total: int = 0
        chunks: list[int] = Field(default_factory=list)

    @on("reduce")
    async def reduce(self, signal: Signal[dict[str, Any]]) -> dict[str, Any]:
        self.state.total += signal.data["value"]["sum"]
        self.state.chunks.append(signal.data["chunk"])
        return {"total": self.state.total, "chunks": len(self.state.chunks)}

    @on("chunks")
    async def get(self, signal: Signal) -> list[int]:
        return self.state.chunks


class Boss(Agent):
    """Runs both from its handlers, under ids that are the same when a handler is repeated."""

    @on("run")
    async def run(self, signal: Signal[list[Any]]) -> list[Any]:
        stages = [{"name": "a", "agent": "a", "type": "step"}]
        async with pipeline(self.ctx, f"run-{signal.id}", stages, signal.data) as going:
            return [result.get() async for result in going]

    @on("job")
    async def job(self, signal: Signal[list[int]]) -> Any:
        return await map_reduce(self.ctx, f"job-{signal.id}", signal.data, "adds", "merge", chunk=2)
