"""The client side of our benchmarks, in a process of its own: ``python -m benchmarks.drive WHAT URL``.

Prints one line of JSON with what it measured.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

from foundation_nats import Cluster, FoundationError
from foundation_nats.base.tasks import run
from foundation_nats.bench.drive import latency, percentile, produce
from foundation_nats.coordination import map_reduce

AGENTS = 1000
SIGNALS = 50_000
MOVERS = 60
NUMBERS = 1_000_000
CLUSTER = "bench"


async def all_answer(cluster: Cluster, expected: int, count: int) -> dict[str, float]:
    """Until each of *count* agents has answered *expected*; the moment that was."""
    # Few at a time: the asking must not be what the recovery waits for.
    gate = asyncio.Semaphore(20)

    async def one(name: str) -> None:
        async with gate:
            while True:
                try:
                    if await cluster.ask(name, "get", timeout=5) != expected:
                        raise SystemExit(f"{name} has lost state")
                except FoundationError:
                    await asyncio.sleep(0.02)
                else:
                    return

    await asyncio.gather(*(one(f"c-{index}") for index in range(count)))
    return {"answered_at": time.monotonic()}


async def beat(cluster: Cluster) -> dict[str, float]:
    """A signal to each of 60 agents every 20 ms until a line comes; how many got a receipt."""
    line = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    sent = 0

    async def sender(name: str) -> None:
        nonlocal sent
        while not line.done():
            await cluster.send(name, "add", {"amount": 1}, timeout=30)
            sent += 1
            await asyncio.sleep(0.02)

    print("ready", flush=True)
    await asyncio.gather(*(sender(f"c-{index}") for index in range(MOVERS)))
    return {"sent": float(sent)}


def peak_rss_mb() -> float:
    """The most that this process has ever held.

    Of the program, not of whoever has started it, which `getrusage` counts in.
    """
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1e3
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


async def numbers(cluster: Cluster) -> dict[str, float]:
    """1,000,000 small items mapped in chunks of 1,000 and added up; verified."""
    await map_reduce(cluster, "warm", range(1000), "add", "sum")
    before = peak_rss_mb()
    began = time.monotonic()
    total = await map_reduce(cluster, "bench", range(NUMBERS), "add", "sum")
    seconds = time.monotonic() - began
    if total != sum(range(NUMBERS)):
        raise SystemExit(f"the sum is {total}")
    peak = peak_rss_mb()
    return {
        "items_per_s": NUMBERS / seconds,
        "driver_peak_mb": peak,
        "driver_growth_mb": peak - before,
    }


async def main(what: str, url: str, expected: int = 0, count: int = AGENTS) -> dict[str, float]:
    """Connect and do one of the above."""
    async with Cluster.connect(url, cluster=CLUSTER) as cluster:
        if what == "produce":
            return await produce(cluster, signals=SIGNALS, agents=AGENTS)
        if what == "latency":
            return await latency(cluster)
        if what == "numbers":
            return await numbers(cluster)
        if what == "beat":
            return await beat(cluster)
        # The connection is up: say so, and begin when told.
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        return await all_answer(cluster, expected, count)


__all__ = ["AGENTS", "CLUSTER", "MOVERS", "SIGNALS", "percentile"]

if __name__ == "__main__":
    result = run(lambda: main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))
    print(json.dumps(result), flush=True)
