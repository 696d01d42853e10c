"""A child process that takes a permit of a semaphore, says so, and holds it until it is killed.

``python -m tests.cluster.holder URL NAME PERMITS TTL_S``.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats import Cluster


async def main(url: str, name: str, permits: str, ttl_s: str) -> None:
    """Hold."""
    async with Cluster.connect(url, name=name) as cluster:
        permit = cluster.leases.semaphore("gpu", int(permits), ttl_s=float(ttl_s), owner=name)
        print("holds", await permit.acquire(timeout=30), flush=True)
        await permit.lost.wait()
        print("lost", permit.token, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
