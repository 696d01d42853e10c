"""A trip is booked at three agents; the hotel is full, so flight and car are given back, in reverse."""

import asyncio
import sys

from foundation_nats import Agent, Cluster, Signal, State, on
from foundation_nats.coordination import saga


class Desk(Agent):
    class State(State):
        booked: dict[str, str] = {}  # noqa: RUF012  pydantic copies it

    @on("book")
    async def book(self, signal: Signal[str]) -> str:
        if self.config.get("full"):
            raise ValueError("no room left")
        self.state.booked[signal.data] = "yes"
        return f"{self.id}:{signal.data}"

    @on("give_back")
    async def give_back(self, signal: Signal) -> None:
        self.state.booked.pop(signal.data["data"], None)


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        for desk in ("flight", "car", "hotel"):
            config = {"full": desk == "hotel"}
            await cluster.agents.start("examples.trip:Desk", id=desk, config=config)
        step = {"type": "book", "data": "ann", "undo": "give_back"}
        steps = [{"name": desk, "agent": desk, **step} for desk in ("flight", "car", "hotel")]
        found = await saga(cluster, "trip-of-ann", steps)
        print(found.state, "because of", found.error)
        print(*(f"{s.name}: {p.state}" for s, p in zip(found.steps, found.progress, strict=True)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
