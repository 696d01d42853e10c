"""Three web servers count hits together and wait for nobody: each adds to a sum of its own, which only grows."""

import asyncio
import sys

from foundation_nats import Cluster


async def serve(cluster: Cluster, name: str, hits: int) -> None:
    counter = cluster.leases.counter("hits", writer=name)
    for number in range(1, hits + 1):
        # With a number of its own an increment counts once, however often it is repeated.
        await counter.add(1, sequence=number)


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        await asyncio.gather(*(serve(cluster, f"web-{n}", 10 * n) for n in (1, 2, 3)))
        total = cluster.leases.counter("hits")
        print(await total.value(), "hits")
        for writer, part in (await total.writers()).items():
            print(" ", writer, part.plus - part.minus)


asyncio.run(main(*sys.argv[1:]))
