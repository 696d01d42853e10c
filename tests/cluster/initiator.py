"""A child process that starts (or goes on with) a pattern and says how it ended.

``python -m tests.cluster.initiator URL CLUSTER vote|auction|saga JSON``; it says ``begins`` first.
"""

from __future__ import annotations

import asyncio
import json
import sys

from foundation_nats import Cluster, FoundationError
from foundation_nats.coordination import auction, saga, vote

PATTERNS = {"vote": vote, "auction": auction, "saga": saga}


async def connect(url: str, name: str) -> Cluster:
    """Although the broker may be dying or starting just now."""
    while True:
        try:
            return await Cluster.connect(url, cluster=name, name="initiator")
        except FoundationError:
            await asyncio.sleep(0.05)


async def main(url: str, name: str, pattern: str, arguments: str) -> None:
    """Do it, and again where the outcome is unknown."""
    cluster = await connect(url, name)
    print("begins", flush=True)
    while True:
        try:
            found = await PATTERNS[pattern](cluster, **json.loads(arguments))
            print("result", found.model_dump_json(), flush=True)
            break
        except FoundationError as error:
            if not error.retryable:
                raise
    await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
