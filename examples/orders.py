"""A shop that takes orders over HTTP: 202 means that the order is stored; a repeat is no second order."""

import asyncio
import sys

import httpx

from foundation_nats import Agent, Cluster, Payload, RecoveredFrom, Signal, State, on
from foundation_nats.agent.sensors import Webhook


class Order(Payload, type="order"):
    cake: str
    count: int = 1


class Shop(Agent):
    class State(State):
        sold: dict[str, int] = {}  # noqa: RUF012  pydantic copies it

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        self.ctx.start_sensor(Webhook("/orders", port=self.config["port"], emit=Order))

    @on(Order)
    def order(self, signal: Signal[Order]) -> None:
        known = self.state.sold.get(signal.data.cake, 0)
        self.state.sold[signal.data.cake] = known + signal.data.count


async def main(url: str = "nats://127.0.0.1:4222", port: str = "8080") -> None:
    async with Cluster.connect(url) as cluster:
        await cluster.agents.start("examples.orders:Shop", id="shop", config={"port": int(port)})
    transport = httpx.AsyncHTTPTransport(retries=5)
    async with httpx.AsyncClient(transport=transport) as client:
        for id, order in (("1", {"cake": "plum", "count": 2}), ("1", {"cake": "plum"})):
            headers = {"Idempotency-Key": id}
            said = await client.post(f"http://127.0.0.1:{port}/orders", json=order, headers=headers)
            print(said.status_code)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
