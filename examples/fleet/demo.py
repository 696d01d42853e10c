"""An IoT fleet: 1,000 device twins under telemetry, a worker killed in the middle, totals exact.

Starts an embedded server and two nodes, deploys a twin for each device and one agent that adds up, sends
each device's readings, kills the worker process that runs the adding agent and half of the twins when half
of the readings are counted, and compares what the fleet has stored with the sum of what was sent: not one
reading lost, none counted twice, each device's in order. Run it with ``python -m examples.fleet.demo``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from examples.fleet.agents import HOT, TELL_EVERY, Telemetry
from foundation_nats import Cluster, FoundationError
from foundation_nats.base.tasks import run
from foundation_nats.testing import TestCluster, eventually

MANIFEST = Path(__file__).with_name("manifest.yaml")
DEVICES = 1000
READINGS = 3 * TELL_EVERY
TIMEOUT_S = 150.0


@dataclass
class Sent:
    """What the simulator has sent, summed up by itself."""

    readings: int = 0
    watt_hours: int = 0
    hottest: float = -273.0
    alarms: int = 0

    def add(self, before: float, reading: Telemetry) -> None:
        """One more, after *before* degrees."""
        self.readings += 1
        self.watt_hours += reading.watt_hours
        self.hottest = max(self.hottest, reading.celsius)
        self.alarms += reading.celsius >= HOT > before


def simulate(seed: int, sent: Sent) -> Iterator[tuple[str, Telemetry]]:
    """The readings of all devices, device by device within each round."""
    chance = Random(seed)
    celsius = [chance.uniform(20, 75) for _ in range(DEVICES)]
    for number in range(1, READINGS + 1):
        for device in range(DEVICES):
            before = celsius[device]
            celsius[device] = round(before + chance.uniform(-10, 12), 1)
            reading = Telemetry(
                number=number, celsius=celsius[device], watt_hours=chance.randrange(50)
            )
            sent.add(before if number > 1 else 0.0, reading)
            yield f"device-{device}", reading


async def stored(cluster: Cluster, agent: str) -> dict[str, Any]:
    """The state of an agent."""
    record = await cluster.agents.state(agent)
    return record["state"] if record is not None and record["state"] is not None else {}


async def counted(cluster: Cluster) -> int:
    """The readings that the fleet knows of."""
    return int((await stored(cluster, "fleet")).get("readings", 0))


async def kill_half_way(nodes: TestCluster) -> str:
    """SIGKILL the worker that adds up, once half is counted; says what was hit."""

    async def is_half() -> bool:
        return await counted(nodes.client) >= DEVICES * READINGS // 2

    await eventually(is_half, timeout=60, every=0.01, message="half is counted")
    home = (await nodes.client.agents.get("fleet")).node
    assert home is not None
    count = await counted(nodes.client)
    for worker in nodes.nodes[home].workers():
        worker.send_signal(signal.SIGKILL)
    lost = len(await nodes.client.agents.list(node=home))
    return f"worker of {home} killed with SIGKILL at {count} readings: {lost} agents with it"


async def send_all(cluster: Cluster, sent: Sent) -> None:
    """Send every reading, and have a receipt for each."""
    signals = ((device, reading) for device, reading in simulate(7, sent))
    for outcome in await cluster.signals.send_many(
        ((device, reading, None) for device, reading in signals), timeout=30
    ):
        if isinstance(outcome, FoundationError):
            raise outcome


async def demo() -> bool:
    """The whole demo; True if the totals are exact."""
    began = time.perf_counter()
    sent = Sent()
    repository = str(Path(__file__).parents[2])
    async with TestCluster(nodes=2, workers=1, path=[repository], cluster="fleet") as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(MANIFEST)
        await cluster.deployments.wait_settled(["fleet", "device"], timeout=60)
        print(f"{DEVICES} twins run on 2 nodes after {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        killing = asyncio.create_task(kill_half_way(nodes))
        await send_all(cluster, sent)
        print(await killing)

        async def all_counted() -> bool:
            return await counted(cluster) >= sent.readings

        await eventually(all_counted, timeout=60, message="all readings are counted")
        print(f"{sent.readings} readings in {time.perf_counter() - began:.1f} s")
        fleet = await stored(cluster, "fleet")
        twins = await asyncio.gather(
            *(stored(cluster, f"device-{device}") for device in range(DEVICES))
        )
        dead = await cluster.dead.list()
    found = Sent(fleet["readings"], fleet["watt_hours"], fleet["hottest"], fleet["alarms"])
    of_twins = sum(twin["watt_hours"] for twin in twins)
    disorder = sum(twin["out_of_order"] for twin in twins)
    print(f"sent:    {sent}")
    print(f"counted: {found}; by the twins {of_twins} Wh, {disorder} out of order")
    exact = found == sent and of_twins == sent.watt_hours and not disorder and not dead
    print("equal to the digit" if exact else f"NOT EQUAL; {len(dead)} dead letters")
    return exact


def main() -> int:
    """Exit code 0 if the totals are exact."""

    async def bounded() -> bool:
        async with asyncio.timeout(TIMEOUT_S):
            return await demo()

    return 0 if run(bounded) else 1


if __name__ == "__main__":
    sys.exit(main())
