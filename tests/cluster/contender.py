"""A child process that contends for a lock, a permit or a leadership again and again, or adds to a counter.

``python -m tests.cluster.contender URL NAME lock|semaphore|election TTL_S`` prints ``begins``, then
``inside TOKEN NS`` and ``outside TOKEN NS``: since when, and until when at least, it had the right.
``python -m tests.cluster.contender URL NAME counter FIRST LAST`` adds `amount` of each number, and
prints ``added N`` when that has returned.
"""

from __future__ import annotations

import asyncio
import random
import sys

from foundation_nats import Cluster
from foundation_nats.chaos.history import now_ns
from foundation_nats.coordination import Election, Lock, Semaphore
from foundation_nats.errors import BusError, LockTimeoutError
from tests.cluster.children import connect

PERMITS = 2


def amount(number: int) -> int:
    """Of the increment *number*; some are negative."""
    return number * 7 % 13 - 4


def right(cluster: Cluster, name: str, kind: str, ttl_s: float) -> Lock | Semaphore | Election:
    """What is contended for."""
    match kind:
        case "lock":
            return cluster.leases.lock("it", ttl_s=ttl_s, owner=name)
        case "semaphore":
            return cluster.leases.semaphore("it", PERMITS, ttl_s=ttl_s, owner=name)
    return cluster.leases.election("it", candidate=name, ttl_s=ttl_s)


async def hold(cluster: Cluster, name: str, kind: str, ttl_s: str) -> None:
    """Acquire, stay a moment, give back; until killed."""
    dice = random.Random(name)
    mine = right(cluster, name, kind, float(ttl_s))
    print("begins", flush=True)
    while True:
        try:
            if isinstance(mine, Election):
                token = await mine.campaign(timeout=20)
            else:
                token = await mine.acquire(timeout=20)
        except (LockTimeoutError, BusError):
            continue
        begin = end = now_ns()
        print("inside", token, begin, flush=True)
        until = begin + int(dice.uniform(0.01, 0.15) * 1e9)
        while True:
            # First the time, then whether it was ours then.
            at = now_ns()
            if not (mine.is_leader if isinstance(mine, Election) else mine.is_valid()):
                break
            end = at
            if end >= until:
                break
            await asyncio.sleep(0.005)
        print("outside", token, end, flush=True)
        await (mine.resign() if isinstance(mine, Election) else mine.release())
        await asyncio.sleep(dice.uniform(0, 0.02))


async def add(cluster: Cluster, name: str, first: str, last: str) -> None:
    """Each number once, whatever a former process of this name has done of it."""
    hits = cluster.leases.counter("it", writer=name)
    print("begins", flush=True)
    for number in range(int(first), int(last) + 1):
        while True:
            try:
                await hits.add(amount(number), sequence=number, timeout=2)
                break
            except BusError:
                continue
        print("added", number, flush=True)
        await asyncio.sleep(0.002)


async def main(url: str, name: str, kind: str, *more: str) -> None:
    """Do it."""
    cluster = await connect(url, name)
    await (add(cluster, name, *more) if kind == "counter" else hold(cluster, name, kind, *more))
    await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
