"""Five jobs share two graphics cards: never more than two run at a time, whichever processes they are in."""

import asyncio
import sys

from foundation_nats import Cluster

CARDS = 2


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    running = most = 0
    tokens: list[int] = []

    async def train(cluster: Cluster, job: int) -> None:
        nonlocal running, most
        async with cluster.leases.semaphore("gpu", CARDS, owner=f"job-{job}") as permit:
            tokens.append(permit.check())
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.05)  # work; permit.lost is set if it must stop
            running -= 1

    async with Cluster.connect(url) as cluster:
        await asyncio.gather(*(train(cluster, job) for job in range(5)))
    print(len(tokens), "jobs, at most", most, "at a time")
    print("each had a fencing token of its own:", len(set(tokens)) == len(tokens))


asyncio.run(main(*sys.argv[1:]))
