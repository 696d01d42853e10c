"""A child process that feeds the items of a work queue to the agents that their keys name.

``python -m tests.cluster.feeder URL CLUSTER QUEUE``.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats.coordination import workqueue
from tests.cluster.initiator import connect


async def main(url: str, name: str, queue: str) -> None:
    """Feed, until it is killed."""
    cluster = await connect(url, name)
    print("begins", flush=True)
    await workqueue(cluster, queue).feed(lambda item: str(item.key), "do", concurrency=3)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
