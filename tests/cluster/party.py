"""A child process that waits at a barrier, generation after generation, and says how each ended.

``python -m tests.cluster.party URL PARTY PARTIES FIRST LAST``; it says ``begins`` before each.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats import FoundationError
from foundation_nats.coordination import barrier
from foundation_nats.errors import BusError
from tests.cluster.children import connect


async def main(url: str, party: str, parties: str, first: str, last: str) -> None:
    """Wait."""
    cluster = await connect(url, party)
    phase = barrier(cluster, "phase", parties.split(","), party=party, timeout=60)
    for generation in range(int(first), int(last) + 1):
        print("begins", generation, flush=True)
        while True:
            try:
                print("ended", await phase.wait(generation=generation), flush=True)
                await asyncio.sleep(0.02)
                break
            except BusError:
                continue
            except FoundationError as error:
                print("broken", generation, error.message, flush=True)
                return
    await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
