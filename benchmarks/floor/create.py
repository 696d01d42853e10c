"""1,000 agents, each with a record and a subscription, until each has answered once.

A client process tells a worker process to create the agents; the worker creates
every record (only if it is not there), subscribes every agent and says so; the
client asks them all. Processes and connections are up before the clock starts.

Figures: ``create_seconds``: from the client's order to the last answer;
``created_seconds``: of this, until the worker has created and subscribed all.
"""

from __future__ import annotations

import asyncio
import time

import orjson
from nats.aio.msg import Msg

from foundation_nats.bus.floor.child import Child, Parent
from foundation_nats.bus.floor.client import (
    Mux,
    connected,
    forget_stream,
    fresh_bucket,
    is_unanswered,
    stored_at,
)
from foundation_nats.bus.floor.server import FloorError, main

AGENTS = 1_000
BUCKET = "floor_create"
ORDER = "floor.create.order"
ASK = "floor.create.agent."
FIRST = {"Nats-Expected-Last-Subject-Sequence": "0"}
EMPTY = orjson.dumps({"epoch": 1, "cursor": 0, "state": {"counter": 0}, "outbox": []})


async def work(parent: Parent, url: str) -> None:
    """The worker process: creates agents when told to."""
    async with connected(url) as connection:
        mux = Mux(connection)
        await mux.start()
        counters: dict[str, int] = {}
        revisions: dict[str, int] = {}

        async def on_ask(message: Msg) -> None:
            name = message.subject[len(ASK) :]
            counters[name] += 1
            await connection.publish(message.reply, b"%d" % counters[name])

        async def create(name: str) -> None:
            revisions[name] = stored_at(await mux.ask(f"$KV.{BUCKET}.{name}", EMPTY, FIRST))
            counters[name] = 0
            await connection.subscribe(f"{ASK}{name}", cb=on_ask)

        async def on_order(message: Msg) -> None:
            async with asyncio.timeout(30):
                await asyncio.gather(*(create(name) for name in message.data.decode().split()))
                await connection.flush()
            await connection.publish(message.reply, b"created")

        await connection.subscribe(ORDER, cb=on_order)
        await connection.flush()
        parent.report(ready=True)
        await parent.hear()


async def call(parent: Parent, url: str) -> None:
    """The client process: orders the agents and asks each of them."""
    async with connected(url) as connection:
        mux = Mux(connection)
        await mux.start()
        names = [f"a{index}" for index in range(AGENTS)]
        started_at = time.monotonic_ns()
        async with asyncio.timeout(60):
            order = await mux.ask(ORDER, " ".join(names).encode())
            created_at = time.monotonic_ns()
            answers = await asyncio.gather(*(mux.ask(f"{ASK}{name}") for name in names))
        answered_at = time.monotonic_ns()
        if is_unanswered(order) or any(answer.data != b"1" for answer in answers):
            raise FloorError("not every agent answered its first question with 1")
        parent.report(
            create_seconds=(answered_at - started_at) / 1e9,
            created_seconds=(created_at - started_at) / 1e9,
        )
        await parent.hear()


ROLES = {"call": call, "work": work}


async def run(url: str) -> dict[str, float]:
    """Measure once on the server at `url`.

    Raises:
        FloorError: an agent did not answer.
    """
    module = "benchmarks.floor.create"
    async with connected(url, strict=False) as connection:
        js = connection.jetstream()
        await fresh_bucket(js, BUCKET)
        async with Child(module, "work", url) as worker:
            await worker.hear()
            async with Child(module, "call", url) as caller:
                figures = await caller.hear()
        await forget_stream(js, f"KV_{BUCKET}")
    return {key: float(value) for key, value in figures.items()}


if __name__ == "__main__":
    main(run)
