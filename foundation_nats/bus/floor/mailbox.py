"""Durable signals with persisted exactly-once effects: signals/s of the hand-written loop.

One producer process sends 50,000 signals of 100 B to 1,000 agents; one worker
process counts them per agent and writes every effect to a key-value record;
server, producer and worker share the machine. The clock runs from the first
publish until the last effect is committed.

- A signal is stored in a stream (file, de-duplicated by ``Nats-Msg-Id``) and its
  live copy is republished to the worker, which has one wildcard subscription.
- A copy at or below the agent's cursor is skipped. A copy whose predecessor is
  above the cursor shows a gap; the gap is read by Direct Get. A sweep finds a
  lost copy with nothing behind it.
- A commit writes {epoch, cursor, state, outbox} by compare-and-set. While it is
  in flight further signals are handled, and then one commit covers them.

The run fails unless the records say afterwards that every signal was counted
exactly once. Not covered: a worker that dies; see `failover`.

Figures: ``signals_per_s``; ``seconds``; ``commits`` (how many writes covered the
50,000 effects); ``producer_seconds`` (until the last signal was acknowledged);
``gaps`` (live copies that had to be read from the stream).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import RePublish, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from foundation_nats.bus.floor.child import Child, Parent
from foundation_nats.bus.floor.client import (
    Mux,
    connected,
    forget_stream,
    fresh_bucket,
    fresh_stream,
    last_of_each,
    stored_at,
)
from foundation_nats.bus.floor.server import FloorError, main

SIGNALS = 50_000
AGENTS = 1_000
PAYLOAD = b"x" * 100
STREAM = "fnd-floor-mailbox"
BUCKET = "fnd-floor-state"
SIGNAL = "fnd-floor.signal."
LIVE = "fnd-floor.live."

PUBLISHES_IN_FLIGHT_MAX = 2_000
COMMITS_IN_FLIGHT_MAX = 64
SWEEP_AFTER_S = 1.0
EPOCH = 1


class Agent:
    """What the worker remembers of one agent."""

    __slots__ = ("committing", "counter", "covered", "cursor", "dirty", "name", "revision")

    def __init__(self, name: str, revision: int) -> None:
        self.name = name
        self.revision = revision
        self.cursor = 0
        self.counter = 0
        self.covered = 0
        self.committing = False
        self.dirty = False

    def record(self) -> bytes:
        """The agent as it is stored: state and position in one value."""
        return orjson.dumps(
            {
                "epoch": EPOCH,
                "cursor": self.cursor,
                "state": {"counter": self.counter},
                "outbox": [],
            }
        )


class Worker:
    """Handles the signals of all agents and commits their effects."""

    def __init__(self, connection: Client, expected: int, drop_every: int) -> None:
        self._connection = connection
        self._js = connection.jetstream()
        self._expected = expected
        self._drop_every = drop_every
        self._agents: dict[str, Agent] = {}
        self._ready: deque[Agent] = deque()
        self._in_flight = 0
        self._inbox = connection.new_inbox()
        self._inbox_prefix = len(self._inbox) + 1
        self._seen = 0
        self._covered = 0
        self._finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.commits = 0
        self.gaps = 0

    async def claim(self, names: list[str]) -> None:
        """Create every agent's record under our epoch, then listen."""
        mux = Mux(self._connection)
        await mux.start()
        empty = Agent("", 0).record()
        first = {"Nats-Expected-Last-Subject-Sequence": "0"}
        async with asyncio.timeout(30):
            answers = await asyncio.gather(
                *(mux.ask(f"$KV.{BUCKET}.{name}", empty, first) for name in names)
            )
        for name, answer in zip(names, answers, strict=True):
            self._agents[name] = Agent(name, stored_at(answer))
        await self._connection.subscribe(f"{self._inbox}.*", cb=self._on_committed)
        await self._connection.subscribe(f"{LIVE}*", cb=self._on_live)
        await self._connection.flush()

    async def _on_live(self, message: Msg) -> None:
        headers = message.headers
        assert headers is not None
        self._seen += 1
        if self._drop_every and self._seen % self._drop_every == 0:
            return
        agent = self._agents[message.subject[len(LIVE) :]]
        sequence = int(headers["Nats-Sequence"])
        if sequence <= agent.cursor:
            return
        before = int(headers["Nats-Last-Sequence"])
        if before > agent.cursor:
            await self._catch_up(agent, before)
        if sequence > agent.cursor:
            await self._handle(agent, sequence)

    async def _catch_up(self, agent: Agent, until: float = math.inf) -> None:
        """Read the agent's mailbox from its cursor on."""
        while agent.cursor < until:
            try:
                message = await self._js.get_msg(
                    STREAM,
                    seq=agent.cursor + 1,
                    subject=SIGNAL + agent.name,
                    next=True,
                    direct=True,
                )
            except NotFoundError:
                return
            assert message.seq is not None
            # While we waited the live subscription may have brought this one.
            if message.seq > agent.cursor:
                self.gaps += 1
                await self._handle(agent, message.seq)

    async def _handle(self, agent: Agent, sequence: int) -> None:
        agent.counter += 1
        agent.cursor = sequence
        if not agent.dirty:
            agent.dirty = True
            if not agent.committing:
                if self._in_flight < COMMITS_IN_FLIGHT_MAX:
                    await self._commit(agent)
                else:
                    self._ready.append(agent)

    async def _commit(self, agent: Agent) -> None:
        agent.dirty = False
        agent.committing = True
        self._covered += agent.counter - agent.covered
        agent.covered = agent.counter
        self._in_flight += 1
        self.commits += 1
        await self._connection.publish(
            f"$KV.{BUCKET}.{agent.name}",
            agent.record(),
            reply=f"{self._inbox}.{agent.name}",
            headers={"Nats-Expected-Last-Subject-Sequence": str(agent.revision)},
        )

    async def _on_committed(self, message: Msg) -> None:
        agent = self._agents[message.subject[self._inbox_prefix :]]
        agent.revision = stored_at(message)
        agent.committing = False
        self._in_flight -= 1
        if agent.dirty:
            self._ready.append(agent)
        while self._ready and self._in_flight < COMMITS_IN_FLIGHT_MAX:
            await self._commit(self._ready.popleft())
        if not self._in_flight and self._covered >= self._expected:
            self._finished.set_result(time.monotonic_ns())

    async def finish(self) -> int:
        """Wait until every effect is committed; the moment that was, in nanoseconds."""
        counted = -1
        while not self._finished.done():
            await asyncio.wait([self._finished], timeout=SWEEP_AFTER_S)
            progress = sum(agent.counter for agent in self._agents.values())
            if progress == counted:
                for agent in list(self._agents.values()):
                    await self._catch_up(agent)
            counted = progress
        return self._finished.result()


async def work(parent: Parent, url: str, expected: int, agents: int, drop_every: int) -> None:
    """The worker process."""
    async with connected(url) as connection:
        worker = Worker(connection, expected, drop_every)
        await worker.claim([f"a{index}" for index in range(agents)])
        parent.report(ready=True)
        finished_at = await worker.finish()
        parent.report(finished_at=finished_at, commits=worker.commits, gaps=worker.gaps)
        await parent.hear()


async def produce(parent: Parent, url: str, count: int, agents: int) -> None:
    """The producer process: acknowledgements are counted, at most a window is missing."""
    async with connected(url) as connection:
        acknowledged = 0
        resume_at = 0
        room = asyncio.Event()

        async def on_acknowledged(message: Msg) -> None:
            nonlocal acknowledged
            stored_at(message)
            acknowledged += 1
            if acknowledged >= resume_at:
                room.set()

        inbox = connection.new_inbox()
        await connection.subscribe(inbox, cb=on_acknowledged)
        await connection.flush()
        subjects = [f"{SIGNAL}a{index}" for index in range(agents)]
        parent.report(ready=True)
        await parent.hear()

        started_at = time.monotonic_ns()
        for number in range(count):
            if number - acknowledged >= PUBLISHES_IN_FLIGHT_MAX:
                # Resume at half a window: waking up once per signal would cost more.
                resume_at = number - PUBLISHES_IN_FLIGHT_MAX // 2
                room.clear()
                await room.wait()
            await connection.publish(
                subjects[number % agents],
                PAYLOAD,
                reply=inbox,
                headers={"Nats-Msg-Id": f"producer-{number}"},
            )
        resume_at = count
        if acknowledged < count:
            room.clear()
            await room.wait()
        parent.report(started_at=started_at, finished_at=time.monotonic_ns())
        await parent.hear()


ROLES = {"produce": produce, "work": work}


async def run(
    url: str, *, drop_every: int = 0, signals: int = SIGNALS, agents: int = AGENTS
) -> dict[str, float]:
    """Measure once on the server at `url`; `drop_every` loses live copies on purpose.

    *signals* must be a multiple of *agents*, of which there are 1,000 at most.

    Raises:
        FloorError: an effect was lost or counted twice.
    """
    module = "foundation_nats.bus.floor.mailbox"
    async with connected(url, strict=False) as connection:
        js = connection.jetstream()
        await fresh_bucket(js, BUCKET)
        await fresh_stream(
            js,
            StreamConfig(
                name=STREAM,
                subjects=[f"{SIGNAL}*"],
                storage=StorageType.FILE,
                republish=RePublish(src=f"{SIGNAL}*", dest=f"{LIVE}{{{{wildcard(1)}}}}"),
                allow_direct=True,
            ),
        )
        async with (
            Child(
                module, "work", url, expected=signals, agents=agents, drop_every=drop_every
            ) as worker,
            Child(module, "produce", url, count=signals, agents=agents) as producer,
        ):
            await worker.hear()
            await producer.hear()
            producer.tell(go=True)
            sent = await producer.hear()
            done = await worker.hear()
        await _verify(connection, signals, agents)
        await forget_stream(js, STREAM)
        await forget_stream(js, f"KV_{BUCKET}")
    seconds = (done["finished_at"] - sent["started_at"]) / 1e9
    return {
        "signals_per_s": signals / seconds,
        "seconds": seconds,
        "producer_seconds": (sent["finished_at"] - sent["started_at"]) / 1e9,
        "commits": float(done["commits"]),
        "gaps": float(done["gaps"]),
    }


async def _verify(connection: Client, signals: int, agents: int) -> None:
    """The records, read back from the store, must hold every signal exactly once."""
    records = await last_of_each(connection, f"KV_{BUCKET}", f"$KV.{BUCKET}.*")
    counters = [orjson.loads(record.data)["state"]["counter"] for record in records]
    if counters != [signals // agents] * agents:
        raise FloorError(f"{len(records)} agents counted {sum(counters)} signals of {signals}")


if __name__ == "__main__":
    main(run)
