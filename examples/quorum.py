"""A price is asked of everybody who sells; two answers are enough, the slow shop is not waited for."""

import asyncio
import sys

from foundation_nats import Agent, Cluster, Signal, State, on


class Shop(Agent):
    capabilities = ("selling",)

    class State(State):
        asked: int = 0

    @on("price")
    async def price(self, signal: Signal[str]) -> float:
        self.state.asked += 1
        await asyncio.sleep(self.config["seconds"])
        return float(self.config["price"])


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        for name, price, seconds in (("ann", 3.5, 0), ("bob", 2.5, 0), ("slow", 1.0, 20)):
            config = {"price": price, "seconds": seconds}
            await cluster.agents.start(Shop, id=name, config=config)
        answers = await cluster.signals.ask_all(
            "capability:selling", "price", "tea", quorum=2, timeout=10
        )
        for shop, price in sorted(answers.results.items()):
            print(shop, price)
        print("without", *answers.missing)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
