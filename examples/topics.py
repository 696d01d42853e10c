"""Orders on a topic: every ledger hears of each, and of two bakers one bakes it."""

import asyncio
import sys

from foundation_nats import Agent, Cluster, Signal, State, on, subscribe


class Listener(Agent):
    class State(State):
        cakes: tuple[str, ...] = ()

    @on("order.new")
    async def hear(self, signal: Signal[str]) -> None:
        self.state.cakes = (*self.state.cakes, signal.data)


@subscribe("orders.*")
class Ledger(Listener): ...


@subscribe("orders.*", mode="one-of-group", group="kitchen")
class Baker(Listener): ...


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        for name, kind in (("ann", Baker), ("bob", Baker), ("book", Ledger), ("copy", Ledger)):
            await cluster.agents.start(kind, id=name)
        for cake in ("apple", "lemon", "plum"):
            await cluster.publish("orders.berlin", "order.new", cake)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
