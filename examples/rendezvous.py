"""Three workers wait for each other after each phase; a fourth phase breaks, because one has left."""

import asyncio
import sys

from foundation_nats import Cluster
from foundation_nats.coordination import barrier
from foundation_nats.errors import BarrierBrokenError

NAMES = ["ann", "bob", "cy"]


async def worker(cluster: Cluster, name: str, phases: int) -> None:
    rendezvous = barrier(cluster, "phases", NAMES, party=name)
    for phase in range(1, phases + 1):
        await asyncio.sleep(0.01 * len(name))  # work
        try:
            await rendezvous.wait(timeout=10 if phase < 4 else 1)
        except BarrierBrokenError as error:
            print(name, "goes home:", error.details["missing"], "did not come")
            return
        print(name, "is through phase", phase)


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        await asyncio.gather(*(worker(cluster, n, 3 if n == "cy" else 4) for n in NAMES))


asyncio.run(main(*sys.argv[1:]))
