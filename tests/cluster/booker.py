"""A child process that reserves, confirms and releases, and prints every claim before it can be lost with it.

``python -m tests.cluster.booker URL CLUSTER NAME SEED``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys

import orjson

from foundation_nats import Cluster
from foundation_nats.chaos.checkers.reservations import Claim
from foundation_nats.chaos.history import History
from foundation_nats.chaos.workloads.reservations import SCARCE, Booker


def say(claim: Claim) -> None:
    """One line; it replaces what was said of the claim before."""
    print("claim", orjson.dumps(dataclasses.asdict(claim)).decode(), flush=True)


async def main(url: str, cluster: str, name: str, seed: str) -> None:
    """Until killed."""
    chance, history = random.Random(seed), History()
    booker = Booker(await Cluster.connect(url, cluster=cluster, name=name), name, chance, say)
    while True:
        with history.operation(name, "reserve", SCARCE) as operation:
            needs = {SCARCE: float(chance.randint(1, 2))}
            await booker.book(needs, lambda base: base * chance.random(), operation)
        if history.operations[-1].error is not None:
            print("error", history.operations[-1].error, flush=True)
        await asyncio.sleep(0.1 * chance.random())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
