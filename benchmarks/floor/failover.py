"""kill -9 of a worker with 1,000 agents until all of them answer in another one.

Worker A hosts 1,000 agents with state in a bucket; worker B stands by and probes
A by request every 10 ms. When A is killed its probe answers "no responders", B
reads all records by one Direct Get, re-claims each under the next epoch by
compare-and-set, and subscribes each agent once its claim holds. A client asks
throughout; it counts an agent only if its state and epoch are the right ones.

Not covered: a node that hangs or is cut off (the kernel closes A's socket here),
and the doubt whether A is really gone: one silent probe is enough for this B.

Figures, in seconds from the kill: ``failover_seconds``: all 1,000 have answered;
``noticed_seconds``: B saw it; ``claimed_seconds``: B holds and hosts all.
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
    last_of_each,
    stored_at,
)
from foundation_nats.bus.floor.server import FloorError, main

AGENTS = 1_000
BUCKET = "floor_failover"
ALIVE = "floor.failover.alive.a"
ASK = "floor.failover.agent."
RECORD = f"$KV.{BUCKET}."
PROBE_INTERVAL_S = 0.01
PROBE_TIMEOUT_S = 0.02
ANSWER_TIMEOUT_S = 0.1
RETRY_INTERVAL_S = 0.002
FAILOVER_TIMEOUT_S = 30.0


class Host:
    """The agents of one worker process."""

    def __init__(self, connection_url: str) -> None:
        self.url = connection_url
        self.records: dict[str, dict[str, object]] = {}

    async def live(self, parent: Parent, *, watch: bool) -> None:
        """Host the agents: at once, or with `watch` after the other worker's death."""
        async with connected(self.url) as connection:
            mux = Mux(connection)
            await mux.start()

            async def on_ask(message: Msg) -> None:
                record = self.records[message.subject[len(ASK) :]]
                await connection.publish(message.reply, orjson.dumps(record))

            async def claim(name: str, record: dict[str, object], revision: int) -> None:
                fence = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
                stored_at(await mux.ask(f"{RECORD}{name}", orjson.dumps(record), fence))
                self.records[name] = record
                await connection.subscribe(f"{ASK}{name}", cb=on_ask)

            if watch:
                parent.report(ready=True)
                while await _is_alive(mux):
                    await asyncio.sleep(PROBE_INTERVAL_S)
                noticed_at = time.monotonic_ns()
                claims = []
                for message in await last_of_each(connection, f"KV_{BUCKET}", f"{RECORD}*"):
                    headers = message.headers or {}
                    record = orjson.loads(message.data)
                    record["epoch"] += 1
                    name = headers["Nats-Subject"][len(RECORD) :]
                    claims.append(claim(name, record, int(headers["Nats-Sequence"])))
            else:
                claims = [
                    claim(
                        f"a{index}",
                        {"epoch": 1, "cursor": 0, "state": {"counter": index}, "outbox": []},
                        0,
                    )
                    for index in range(AGENTS)
                ]
            async with asyncio.timeout(FAILOVER_TIMEOUT_S):
                await asyncio.gather(*claims)
                await connection.flush()
            if watch:
                parent.report(noticed_at=noticed_at, claimed_at=time.monotonic_ns())
            else:

                async def on_probe(message: Msg) -> None:
                    await connection.publish(message.reply, b"alive")

                await connection.subscribe(ALIVE, cb=on_probe)
                await connection.flush()
                parent.report(ready=True)
            await parent.hear()


async def _is_alive(mux: Mux) -> bool:
    """Whether somebody is subscribed to A's probe; silence alone is no proof of death."""
    try:
        return not is_unanswered(await asyncio.wait_for(mux.ask(ALIVE), PROBE_TIMEOUT_S))
    except TimeoutError:
        # The question reached a process that died before it could answer.
        return True


async def host(parent: Parent, url: str) -> None:
    """Worker A."""
    await Host(url).live(parent, watch=False)


async def stand_by(parent: Parent, url: str) -> None:
    """Worker B."""
    await Host(url).live(parent, watch=True)


ROLES = {"host": host, "stand_by": stand_by}


async def run(url: str) -> dict[str, float]:
    """Measure once on the server at `url`.

    Raises:
        FloorError: an agent did not come back, or came back with other state.
    """
    module = "benchmarks.floor.failover"
    async with connected(url, strict=False) as connection:
        js = connection.jetstream()
        await fresh_bucket(js, BUCKET)
        mux = Mux(connection)
        await mux.start()
        async with Child(module, "host", url) as first:
            await first.hear()
            async with Child(module, "stand_by", url) as second:
                await second.hear()
                await _ask_until_all_answer(mux, epoch=1)
                killed_at = time.monotonic_ns()
                first.kill()
                await _ask_until_all_answer(mux, epoch=2)
                answered_at = time.monotonic_ns()
                moments = await second.hear()
        await forget_stream(js, f"KV_{BUCKET}")
    return {
        "failover_seconds": (answered_at - killed_at) / 1e9,
        "noticed_seconds": (moments["noticed_at"] - killed_at) / 1e9,
        "claimed_seconds": (moments["claimed_at"] - killed_at) / 1e9,
    }


async def _ask_until_all_answer(mux: Mux, epoch: int) -> None:
    """Ask every agent until it answers under `epoch` with the state it had.

    Until the first one answers only that one is asked: a thousand fruitless
    questions every few milliseconds would slow down the recovery they wait for.
    """
    pending = {f"a{index}": index for index in range(AGENTS)}

    async def ask(name: str) -> None:
        try:
            answer = await asyncio.wait_for(mux.ask(f"{ASK}{name}"), ANSWER_TIMEOUT_S)
        except TimeoutError:
            return
        if is_unanswered(answer):
            return
        record = orjson.loads(answer.data)
        if record["epoch"] == epoch and record["state"]["counter"] != pending.pop(name):
            raise FloorError(f"{name} lost its state: {record}")

    async with asyncio.timeout(FAILOVER_TIMEOUT_S):
        while len(pending) == AGENTS:
            await ask("a0")
            await asyncio.sleep(RETRY_INTERVAL_S)
        while pending:
            await asyncio.gather(*(ask(name) for name in list(pending)))
            await asyncio.sleep(RETRY_INTERVAL_S)


if __name__ == "__main__":
    main(run)
