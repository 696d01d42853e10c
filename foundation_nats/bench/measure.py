"""`measure`: a few figures of one cluster, each beside the floor's, taken in the same run on the same server.

The agents that are measured are deployed under a name that nobody else has, and purged in the end, also
if it fails. Clients run in processes of their own. On a cluster that others use the figures
say what is left for one more; and the load disturbs them for some seconds.

A ratio depends on the machine far less than a figure does: both sides have the same processors, disk
and server. It is still one run: a difference of some percent says nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from secrets import token_hex
from typing import Any

import orjson
from pydantic import Field

from foundation_nats.api.cluster import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.config import Config
from foundation_nats.errors import NotFoundError, ServerError
from foundation_schemas.base import WireModel

DRIVE_TIMEOUT_S = 180.0
AGENTS_MIN, AGENTS_MAX = 100, 1000
_LOOK_EVERY_S = 0.01
_COMMITTED_TIMEOUT_S = 120.0
_TEXT = """
version: 1
agents:
  - {{name: {name}, run: "foundation_nats.bench.agents:Counter", replicas: {agents}, critical: true}}
  - {{name: {name}-stamp, run: "foundation_nats.bench.agents:Stamp"}}
"""


class Figure(WireModel):
    """One measured number."""

    name: str
    unit: str
    ours: float
    floor: float | None = None
    """The same work by hand; None: there is no such thing."""
    ratio: float | None = None
    """Ours divided by the floor's."""
    better: str
    """``more`` or ``less``."""


class Measured(WireModel):
    """What was measured; the JSON of ``foundation bench -o json``."""

    cluster: str
    server: str
    embedded: bool
    nodes: int
    agents: int
    signals: int
    cores: int
    figures: list[Figure] = Field(default_factory=list)


async def measure(
    cluster: Cluster,
    *,
    agents: int,
    signals: int,
    embedded: bool,
    on_step: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measure *cluster*: some 15 seconds with 1,000 agents and 50,000 signals.

    Args:
        agents: 100 to 1,000.
        signals: rounded down to a multiple of *agents*.
        on_step: is told what is done now.

    Raises:
        ServerError: a side lost an effect, or its process failed; says which.
        NotSettledError: the agents did not start.
        ConfigError: the nodes can't import the agents, because they run another release.
    """
    name = f"bench-{token_hex(4)}"
    signals = max(1, signals // agents) * agents
    config = cluster.config
    on_step("the floor: durable signals")
    floor = await _drive(config, "floor.mailbox", signals=signals, agents=agents)
    on_step("the floor: questions")
    floor |= await _drive(config, "floor.latency")
    try:
        on_step(f"deploying {agents} agents")
        deployed_s = await _deploy(cluster, name, agents)
        on_step("durable signals")
        rate = await _signals(cluster, name, agents, signals)
        on_step("questions")
        ours = await _drive(config, "latency", prefix=name, stamp=f"{name}-stamp")
    finally:
        on_step("clearing away")
        await _clear(cluster, name)
    return Measured(
        cluster=cluster.name,
        server=cluster.url,
        embedded=embedded,
        nodes=sum(node.status == "up" for node in await cluster.nodes.list()),
        agents=agents,
        signals=signals,
        cores=os.cpu_count() or 1,
        figures=[
            _figure("durable signals, effects exactly once", "1/s", rate, floor["signals_per_s"]),
            _figure("send to handler, p50", "µs", ours["live_p50_us"], floor["live_p50_us"]),
            _figure("send to handler, p99", "µs", ours["live_p99_us"], floor["live_p99_us"]),
            _figure("ask, p50", "µs", ours["ask_p50_us"], floor["request_p50_us"]),
            _figure("ask, p99", "µs", ours["ask_p99_us"], floor["request_p99_us"]),
            _figure("asks, 100 callers", "1/s", ours["asks_per_s"], floor["requests_per_s"]),
            _figure(f"deploy {agents} agents until all have answered", "s", deployed_s, None),
        ],
    )


def _figure(name: str, unit: str, ours: float, floor: float | None) -> Figure:
    return Figure(
        name=name,
        unit=unit,
        ours=ours,
        floor=floor,
        ratio=None if floor is None else ours / floor,
        better="more" if unit == "1/s" else "less",
    )


async def _drive(config: Config, what: str, **options: Any) -> dict[str, float]:
    """Run one side in a process of its own.

    Raises:
        ServerError: it failed.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "foundation_nats.bench.drive"),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, **config.to_environment()},
    )
    try:
        async with asyncio.timeout(DRIVE_TIMEOUT_S):
            orders = json.dumps({"what": what, "options": options}).encode() + b"\n"
            out, err = await process.communicate(orders)
    except TimeoutError:
        raise ServerError(f"The measurement of {what} takes too long.") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = (err.decode("utf-8", "replace").strip().splitlines() or ["no word"])[-1]
        raise ServerError(f"The measurement of {what} failed: {last}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


async def _deploy(cluster: Cluster, name: str, agents: int) -> float:
    """Seconds from the wish until every agent has answered."""
    began = time.monotonic()
    await cluster.deployments.apply(_TEXT.format(name=name, agents=agents))
    await cluster.deployments.wait_settled([name, f"{name}-stamp"], timeout=60)
    gate = asyncio.Semaphore(100)

    async def one(index: int) -> None:
        async with gate:
            await cluster.ask(f"{name}-{index}", "get", timeout=30)

    await asyncio.gather(*map(one, range(agents)))
    return time.monotonic() - began


async def _signals(cluster: Cluster, name: str, agents: int, signals: int) -> float:
    """Signals a second, from the first send until the last effect is stored; each exactly once.

    Raises:
        ServerError: an effect is missing, or there is one too many.
    """
    produced = await _drive(cluster.config, "produce", signals=signals, agents=agents, prefix=name)
    bucket = Bucket(cluster.bus, cluster.subjects, "state")
    names = [f"{name}-{index}" for index in range(agents)]
    deadline = time.monotonic() + _COMMITTED_TIMEOUT_S
    while True:
        entries = await bucket.read_many(names)
        ended_at = time.monotonic()
        values = [orjson.loads(entry.value) for entry in entries.values() if entry.value]
        total = sum(value["state"]["counter"] for value in values)
        if total == signals:
            return signals / (ended_at - produced["started_at"])
        if total > signals or ended_at > deadline:
            raise ServerError(f"There are {total} effects of {signals} signals.")
        await asyncio.sleep(_LOOK_EVERY_S)


async def _clear(cluster: Cluster, name: str) -> None:
    deployed = []
    for deployment in (name, f"{name}-stamp"):
        try:
            await cluster.deployments.delete(deployment)
        except NotFoundError:
            continue
        deployed.append(deployment)
    await cluster.deployments.wait_settled(deployed, timeout=60)
    for deployment in deployed:
        await cluster.deployments.purge(deployment)
