"""A client process for tests: sends numbered signals, and says when each is receipted.

``python -m tests.cluster.sender URL CLUSTER AGENT COUNT`` prints ``receipted N`` and at last
``done``. Started again it sends the same ids under the same name.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats import Cluster


async def main(url: str, cluster: str, agent: str, count: int) -> None:
    """Send them one after the other."""
    async with Cluster.connect(url, cluster=cluster, name="sender") as client:
        for number in range(count):
            await client.send(
                agent, "ledger.append", {"key": f"k{number}"}, id=f"k{number}", timeout=10
            )
            print("receipted", number, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
