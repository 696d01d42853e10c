"""Trucks bid for a parcel; the cheapest is busy and declines, so the next one gets it."""

import asyncio
import sys

from foundation_nats import Agent, Cluster, Signal, State, on
from foundation_nats.coordination import auction


class Truck(Agent):
    class State(State):
        job: str = ""

    @on("auction.announce")
    async def bid(self, signal: Signal) -> float:
        return self.config["rate"] * signal.data["task"]["km"]

    @on("auction.offer")
    async def offer(self, signal: Signal) -> bool:
        return not self.config.get("busy", False)

    @on("auction.award")
    async def award(self, signal: Signal) -> None:
        self.state.job = signal.data["auction"]


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        trucks = {f"truck-{rate}": {"rate": rate, "busy": rate == 1} for rate in (1, 2, 3)}
        for truck, config in trucks.items():
            await cluster.agents.start("examples.contract:Truck", id=truck, config=config)
        found = await auction(cluster, "parcel-7", {"km": 10}, list(trucks))
        print(found.winner, "gets it for", found.bid)
        print(*(f"{truck}: {why}" for truck, why in found.refused.items()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
