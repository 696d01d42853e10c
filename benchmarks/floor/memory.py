"""Resident memory of an idle agent in a worker process, at 1,000 and 10,000 agents.

A fresh worker process per figure connects, notes its resident set, makes the
agents (name, cursor, revision, state) and notes it again; the difference divided
by the number of agents. Twice: with a subscription of nats-py for each agent (a
task and a queue), and with all agents behind one wildcard subscription.

Figures, in bytes: ``own_subscription_1000_bytes``, ``own_subscription_10000_bytes``,
``shared_handler_1000_bytes``, ``shared_handler_10000_bytes``.
"""

from __future__ import annotations

import asyncio
import gc

import psutil  # type: ignore[import-untyped]
from nats.aio.msg import Msg

from foundation_nats.bus.floor.child import Child, Parent
from foundation_nats.bus.floor.client import connected
from foundation_nats.bus.floor.server import main

COUNTS = (1_000, 10_000)
WARM_UP = 50
ASK = "floor.memory.agent."


class Agent:
    """The least an agent is: a name, a position, and state of its own."""

    __slots__ = ("cursor", "name", "revision", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.cursor = 0
        self.revision = 0
        self.state = {"counter": 0}


async def work(parent: Parent, url: str, count: int, shared: bool) -> None:
    """The worker process."""
    async with connected(url) as connection:
        agents: dict[str, Agent] = {}

        async def on_ask(message: Msg) -> None:
            agent = agents[message.subject[len(ASK) :]]
            agent.state["counter"] += 1
            await connection.publish(message.reply, b"%d" % agent.state["counter"])

        async def make(first: int, amount: int) -> None:
            for index in range(first, first + amount):
                name = f"a{index}"
                agents[name] = Agent(name)
                if not shared:
                    await connection.subscribe(f"{ASK}{name}", cb=on_ask)
            async with asyncio.timeout(30):
                await connection.flush()

        if shared:
            await connection.subscribe(f"{ASK}*", cb=on_ask)
        # The first few pay for code, buffers and arenas that are not theirs.
        await make(-WARM_UP, WARM_UP)
        before = _resident()
        await make(0, count)
        after = _resident()
        parent.report(bytes_each=(after - before) / count)
        await parent.hear()


def _resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


ROLES = {"work": work}


async def run(url: str) -> dict[str, float]:
    """Measure once on the server at `url`."""
    figures: dict[str, float] = {}
    for name, shared in (("own_subscription", False), ("shared_handler", True)):
        for count in COUNTS:
            async with Child(
                "benchmarks.floor.memory", "work", url, count=count, shared=shared
            ) as worker:
                figures[f"{name}_{count}_bytes"] = float((await worker.hear())["bytes_each"])
    return figures


if __name__ == "__main__":
    main(run)
