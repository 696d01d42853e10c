"""One side of a measurement, in a process of its own: ``python -m foundation_nats.bench.drive``.

It reads one line of JSON (what to do) and prints one with what it measured; where to connect is in
its environment (`Config.load`).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import Any

from foundation_nats.api.cluster import Cluster
from foundation_nats.base.tasks import run
from foundation_nats.bus.floor import latency as floor_latency
from foundation_nats.bus.floor import mailbox as floor_mailbox
from foundation_nats.config import Config

CALLERS = 100
CALLS = 20_000
SEQUENTIAL = 2000
SENDERS = 500


def percentile(values: list[float], share: float) -> float:
    """The value below which *share* of them lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def produce(
    cluster: Cluster, *, signals: int, agents: int, prefix: str = "c"
) -> dict[str, float]:
    """Durable signals of 100 B to the agents ``PREFIX-n``; returns when every receipt is there."""
    data = {"amount": 1, "pad": "x" * 78}
    numbers = iter(range(signals))

    async def sender() -> None:
        for number in numbers:
            await cluster.send(f"{prefix}-{number % agents}", "add", data, timeout=30)

    started_at = time.monotonic()
    await asyncio.gather(*(sender() for _ in range(SENDERS)))
    return {"started_at": started_at, "producer_seconds": time.monotonic() - started_at}


async def latency(cluster: Cluster, *, prefix: str = "c", stamp: str = "stamp") -> dict[str, float]:
    """Send to the agent *stamp*, ask one after the other, and ask 100 agents at once."""
    for _ in range(SEQUENTIAL):
        await cluster.send(stamp, "stamp", time.monotonic_ns())
    notes = [note / 1000 for note in await cluster.ask(stamp, "read")][SEQUENTIAL // 10 :]
    asks = []
    for _ in range(SEQUENTIAL):
        began = time.perf_counter_ns()
        await cluster.ask(f"{prefix}-0", "get")
        asks.append((time.perf_counter_ns() - began) / 1000)
    asks = asks[SEQUENTIAL // 10 :]
    numbers = iter(range(CALLS))

    async def caller(name: str) -> None:
        for _ in numbers:
            await cluster.ask(name, "get")

    began_s = time.perf_counter()
    await asyncio.gather(*(caller(f"{prefix}-{index}") for index in range(CALLERS)))
    return {
        "live_p50_us": statistics.median(notes),
        "live_p99_us": percentile(notes, 0.99),
        "ask_p50_us": statistics.median(asks),
        "ask_p99_us": percentile(asks, 0.99),
        "asks_per_s": CALLS / (time.perf_counter() - began_s),
    }


async def main(what: str, options: dict[str, Any]) -> dict[str, float]:
    """Do one of the above, or the floor's side of it."""
    config = Config.load()
    url = config.bus.servers[0]
    if what == "floor.mailbox":
        return await floor_mailbox.run(url, **options)
    if what == "floor.latency":
        return await floor_latency.run(url)
    async with Cluster.connect(config=config, name="bench") as cluster:
        if what == "produce":
            return await produce(cluster, **options)
        return await latency(cluster, **options)


if __name__ == "__main__":
    orders = json.loads(sys.stdin.readline())
    sys.stdout.write(json.dumps(run(lambda: main(orders["what"], orders["options"]))) + "\n")
