"""A child process of parties that wait at a barrier, generation after generation, and say how each ended.

``python -m tests.cluster.party URL PARTY=FIRST[,PARTY=FIRST…] PARTIES LAST``; it says ``begins GENERATION PARTY``
before each, and ``ended GENERATION PARTY``. Whether a party has arrived in its first generation is not known:
a former process of it may have.
"""

from __future__ import annotations

import asyncio
import sys

from foundation_nats import Cluster, FoundationError
from foundation_nats.coordination import barrier
from foundation_nats.errors import BusError
from tests.cluster.children import connect


async def take_part(
    cluster: Cluster, party: str, parties: list[str], first: int, last: int
) -> None:
    """Wait, and again where the outcome is not known."""
    phase = barrier(cluster, "phase", parties, party=party, timeout=60)
    for generation in range(first, last + 1):
        print("begins", generation, party, flush=True)
        in_doubt = generation == first
        while True:
            try:
                print(
                    "ended",
                    await phase.wait(generation=generation if in_doubt else None),
                    party,
                    flush=True,
                )
                await asyncio.sleep(0.02)
                break
            except BusError:
                in_doubt = True
            except FoundationError as error:
                print("broken", generation, party, error.message, flush=True)
                return


async def main(url: str, mine: str, parties: str, last: str) -> None:
    """All of them at once."""
    begin = dict(item.split("=") for item in mine.split(","))
    cluster = await connect(url, next(iter(begin)))
    names = parties.split(",")
    await asyncio.gather(
        *(take_part(cluster, name, names, int(first), int(last)) for name, first in begin.items())
    )
    await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
