"""Latency and throughput of bare messages: publish to live handler, ask, 100 callers.

A client process talks to a worker process through the server; 100 B each way.

Figures, in microseconds: ``live_p50_us``/``live_p99_us``: from a JetStream
publish until the worker's handler has the republished copy, one at a time.
``ask_p50_us``/``ask_p99_us``: 2,000 sequential requests over a hand-written mux
(`client.Mux`); ``request_p50_us``/``request_p99_us``: the same with
``Client.request`` of nats-py. ``asks_per_s``/``requests_per_s``: 100 concurrent
callers in the client process, 100 agents in the worker, with either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import RePublish, StorageType, StreamConfig

from foundation_nats.bus.floor.child import Child, Parent
from foundation_nats.bus.floor.client import (
    Mux,
    connected,
    forget_stream,
    fresh_stream,
    is_unanswered,
    stored_at,
)
from foundation_nats.bus.floor.server import FloorError, main

STREAM = "fnd-floor-latency"
LIVE = "fnd-floor.latency.live"
SEEN = "fnd-floor.latency.seen"
ASK = "fnd-floor.latency.ask."
PAYLOAD = b"x" * 100
SEQUENTIAL = 2_000
WARM_UP = 200
CALLERS = 100
ASKS_PER_CALLER = 300

Ask = Callable[[str, bytes], Awaitable[Msg]]


async def work(parent: Parent, url: str) -> None:
    """The worker process: 100 agents behind one wildcard, and one live handler."""
    async with connected(url) as connection:
        counters = {str(index): 0 for index in range(CALLERS)}

        async def on_ask(message: Msg) -> None:
            counters[message.subject[len(ASK) :]] += 1
            await connection.publish(message.reply, message.data)

        async def on_live(message: Msg) -> None:
            # Both processes read the machine's one monotonic clock.
            await connection.publish(SEEN, str(time.monotonic_ns()).encode())

        await connection.subscribe(f"{ASK}*", cb=on_ask)
        await connection.subscribe(f"{LIVE}.*", cb=on_live)
        await connection.flush()
        parent.report(ready=True)
        await parent.hear()


async def call(parent: Parent, url: str) -> None:
    """The client process: all measurements, one after the other."""
    async with connected(url) as connection:
        mux = Mux(connection)
        await mux.start()

        async def request(subject: str, payload: bytes) -> Msg:
            return await connection.request(subject, payload, timeout=5)

        async def ask(subject: str, payload: bytes) -> Msg:
            answer = await mux.ask(subject, payload)
            if is_unanswered(answer):
                raise FloorError("the worker is not there")
            return answer

        figures: dict[str, float] = {}
        async with asyncio.timeout(60):
            figures |= percentiles("live", await _live(connection, mux))
            figures |= percentiles("ask", await _sequential(ask))
            figures |= percentiles("request", await _sequential(request))
            figures["asks_per_s"] = await _throughput(ask)
            figures["requests_per_s"] = await _throughput(request)
        parent.report(**figures)
        await parent.hear()


async def _live(connection: Client, mux: Mux) -> list[int]:
    """Nanoseconds from publish to handler; the next one starts when both ends are done."""
    loop = asyncio.get_running_loop()
    seen: asyncio.Future[int] = loop.create_future()

    async def on_seen(message: Msg) -> None:
        seen.set_result(int(message.data))

    await connection.subscribe(SEEN, cb=on_seen)
    await connection.flush()
    samples = []
    for number in range(WARM_UP + SEQUENTIAL):
        seen = loop.create_future()
        started_at = time.monotonic_ns()
        stored_at(
            await mux.ask(
                "fnd-floor.latency.signal.a", PAYLOAD, {"Nats-Msg-Id": f"latency-{number}"}
            )
        )
        samples.append(await seen - started_at)
    return samples[WARM_UP:]


async def _sequential(ask: Ask) -> list[int]:
    samples = []
    for _ in range(WARM_UP + SEQUENTIAL):
        started_at = time.monotonic_ns()
        await ask(f"{ASK}0", PAYLOAD)
        samples.append(time.monotonic_ns() - started_at)
    return samples[WARM_UP:]


async def _throughput(ask: Ask) -> float:
    async def caller(index: int, count: int) -> None:
        subject = f"{ASK}{index}"
        for _ in range(count):
            await ask(subject, PAYLOAD)

    await asyncio.gather(*(caller(index, 5) for index in range(CALLERS)))
    started_at = time.monotonic_ns()
    await asyncio.gather(*(caller(index, ASKS_PER_CALLER) for index in range(CALLERS)))
    return CALLERS * ASKS_PER_CALLER / (time.monotonic_ns() - started_at) * 1e9


def percentiles(name: str, samples_ns: list[int]) -> dict[str, float]:
    """p50 and p99 in microseconds."""
    ordered = sorted(samples_ns)
    return {
        f"{name}_p50_us": ordered[len(ordered) // 2] / 1e3,
        f"{name}_p99_us": ordered[len(ordered) * 99 // 100] / 1e3,
    }


ROLES = {"call": call, "work": work}


async def run(url: str) -> dict[str, float]:
    """Measure once on the server at `url`."""
    module = "foundation_nats.bus.floor.latency"
    async with connected(url, strict=False) as connection:
        js = connection.jetstream()
        await fresh_stream(
            js,
            StreamConfig(
                name=STREAM,
                subjects=["fnd-floor.latency.signal.*"],
                storage=StorageType.FILE,
                republish=RePublish(
                    src="fnd-floor.latency.signal.*", dest=f"{LIVE}.{{{{wildcard(1)}}}}"
                ),
                allow_direct=True,
            ),
        )
        async with Child(module, "work", url) as worker:
            await worker.hear()
            async with Child(module, "call", url) as caller:
                figures = await caller.hear()
        await forget_stream(js, STREAM)
    return {key: float(value) for key, value in figures.items()}


if __name__ == "__main__":
    main(run)
