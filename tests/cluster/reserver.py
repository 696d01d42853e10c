"""A child process that reserves once, says what it got, and gives it back.

``python -m tests.cluster.reserver URL CLUSTER GPUS TTL``.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats import Cluster


async def main(url: str, cluster: str, gpus: str, ttl: str) -> None:
    """Until it has, or is killed."""
    async with Cluster.connect(url, cluster=cluster, name="reserver") as client:
        found = await client.resources.reserve({"gpu": float(gpus)}, ttl=float(ttl))
        print("got", found.id, flush=True)
        await client.resources.release(found)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
