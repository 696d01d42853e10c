"""Two workers share a queue; of one customer the order is kept, and a job that always fails is dead."""

import asyncio
import sys

from foundation_nats import Cluster
from foundation_nats.coordination import workqueue
from foundation_nats.coordination.workqueue import Item


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    done: dict[str, list[int]] = {"ann": [], "bob": []}

    async def handle(item: Item) -> None:
        if item.data["number"] == 2 and item.key == "bob":
            raise ValueError("bob's second job is bad")
        done[item.key].append(item.data["number"])

    async def worker(name: str) -> None:
        async with Cluster.connect(url, name=name) as cluster:
            await workqueue(cluster, "jobs").work(handle, drain=True, backoff=0.1)

    async with Cluster.connect(url, name="boss") as cluster:
        jobs = workqueue(cluster, "jobs", attempts=3)
        for number in (1, 2, 3):
            for customer in done:
                await jobs.put({"number": number}, key=customer, id=f"{customer}-{number}")
        await asyncio.gather(worker("one"), worker("two"))
        for letter in await jobs.dead():
            print("dead:", letter.item.id, "after", letter.attempts, "attempts:", letter.reason)
    print(done)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
