"""Two hosts may do the nightly work: one is elected and does it, under a lock that people may hold too."""

import asyncio
import sys

from foundation_nats import Cluster
from foundation_nats.errors import LockTimeoutError


async def host(cluster: Cluster, name: str, done: list[int]) -> None:
    async with cluster.leases.election("nightly", candidate=name, ttl_s=2) as leader:
        async with cluster.leases.lock("report", owner=name) as held:
            # Whatever stores the report refuses a token that is lower than one it has seen.
            done.append(held.check())
            print(name, "leads and writes the report")
        try:
            await cluster.leases.lock("archive", owner=name).acquire(timeout=0.3)
        except LockTimeoutError as error:
            print(name, "leaves the archive alone:", error.message.split(" for ")[0])
        assert leader.is_leader


async def main(url: str = "nats://127.0.0.1:4222") -> None:
    async with Cluster.connect(url) as cluster:
        done: list[int] = []
        async with cluster.leases.lock("archive", owner="an operator"):
            await host(cluster, "host-1", done)
            await host(cluster, "host-2", done)
        print("fencing tokens grow:", done == sorted(set(done)))


asyncio.run(main(*sys.argv[1:]))
