"""Agents for tests: they write down what happened to them."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from pydantic import BaseModel, Field

from foundation_nats import Agent, RecoveredFrom, Signal, State, on


class Add(BaseModel):
    amount: int


class Counter(Agent):
    """Counts what it is told about."""

    class State(State):
        total: int = 0

    @on("counter.add")
    async def add(self, signal: Signal[Add]) -> int:
        self.state.total += signal.data.amount
        return self.state.total

    @on("counter.get")
    async def get(self, signal: Signal) -> int:
        return self.state.total


class Entry(BaseModel):
    key: str


class Ledger(Agent):
    """Appends every key it is sent to a list, and tells its mirror because of it.

    A list shows for ever what a counter hides: what came twice, and in which order.
    """

    class State(State):
        applied: list[str] = Field(default_factory=list)
        starts: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        self.state.starts += 1

    @on("ledger.append")
    async def append(self, signal: Signal[Entry]) -> int:
        self.state.applied.append(signal.data.key)
        self.emit(
            "ledger.append", {"key": signal.data.key}, to=self.config["mirror"].format(self.id)
        )
        return len(self.state.applied)

    @on("ledger.length")
    async def length(self, signal: Signal) -> int:
        return len(self.state.applied)


class Mirror(Agent):
    """Appends what a ledger tells it."""

    class State(State):
        applied: list[str] = Field(default_factory=list)

    @on("ledger.append")
    async def append(self, signal: Signal[Entry]) -> None:
        self.state.applied.append(signal.data.key)


class Recorder(Agent):
    """Writes down the id of every signal, and sets timers for itself."""

    class State(State):
        applied: list[str] = Field(default_factory=list)

    @on("record")
    async def record(self, signal: Signal) -> None:
        self.state.applied.append(signal.id)

    @on("note")
    async def note(self, signal: Signal[Entry]) -> None:
        self.state.applied.append(signal.data.key)

    @on("set")
    async def set(self, signal: Signal[dict[str, object]]) -> str:
        return self.ctx.schedule("note", {"key": "rang"}, **signal.data)

    @on("unset")
    async def unset(self, signal: Signal[str]) -> None:
        self.ctx.cancel(signal.data)

    @on("set_and_fail")
    async def set_and_fail(self, signal: Signal) -> None:
        self.ctx.schedule("note", {"key": "never"}, after=0)
        raise RuntimeError("so it must not ring")

    @on("hand_on")
    async def hand_on(self, signal: Signal[Entry]) -> None:
        await asyncio.sleep(0.3)
        self.emit("note", signal.data, to=self.config["to"], deadline=signal.deadline)

    @on("sleep")
    async def sleep(self, signal: Signal[float]) -> float:
        await asyncio.sleep(signal.data)
        return signal.data

    @on("clock")
    async def clock(self, signal: Signal) -> float:
        return self.ctx.now().timestamp()


class Hearer(Agent):
    """Writes what it hears into a file at once, whether or not it can tell anybody."""

    class State(State):
        count: int = 0

    @on("hear")
    async def hear(self, signal: Signal[str]) -> str:
        with Path(self.config["sink"]).open("a") as sink:
            sink.write(f"{signal.data}\n")
        self.state.count += 1
        return signal.data


class SlowMirror(Mirror):
    """Takes its time for each."""

    @on("ledger.append")
    async def append(self, signal: Signal[Entry]) -> None:
        await asyncio.sleep(self.config["seconds"])
        await super().append(signal)


class Difficult(Agent):
    """Does what agents should not do."""

    class State(State):
        good: int = 0
        blob: str = ""
        recovered: str | None = None
        stopped: str | None = None

    async def on_start(self, recovered: RecoveredFrom | None) -> None:
        if self.config.get("fail_start"):
            raise RuntimeError("no start today")
        self.state.recovered = None if recovered is None else recovered.reason

    async def on_stop(self, reason: str) -> None:
        self.state.stopped = reason

    @on("good")
    async def good(self, signal: Signal) -> int:
        self.state.good += 1
        return self.state.good

    @on("poison")
    async def poison(self, signal: Signal) -> None:
        self.state.good += 1000
        self.emit("good", to=self.id)
        raise RuntimeError("poisoned")

    @on("grow")
    async def grow(self, signal: Signal[int]) -> None:
        self.state.blob = "x" * signal.data

    @on("exit")
    async def exit(self, signal: Signal) -> None:
        os._exit(7)

    @on("block")
    async def block(self, signal: Signal[float]) -> None:
        time.sleep(signal.data)

    @on("wait")
    async def wait(self, signal: Signal[float]) -> None:
        await asyncio.sleep(signal.data)

    @on("config")
    async def get_config(self, signal: Signal) -> dict[str, object]:
        return self.config

    @on("key")
    async def key(self, signal: Signal) -> list[str]:
        return [self.ctx.idempotency_key, self.ctx.idempotency_key]

    @on("not_json")
    async def not_json(self, signal: Signal) -> object:
        return object()


class Forgetful(Agent):
    """Keeps nothing."""

    durable = False
    capabilities = ("forgetting",)

    class State(State):
        seen: int = 0

    @on("hello")
    async def hello(self, signal: Signal) -> int:
        self.state.seen += 1
        return self.state.seen


class NoAgent:
    """Not an agent at all."""


class Breeder(Agent):
    """Tells itself more than it can hold."""

    class State(State):
        bred: int = 0

    @on("breed")
    async def breed(self, signal: Signal) -> None:
        self.state.bred += 1
        if self.state.bred < self.config["most"]:
            for _ in range(self.config["litter"]):
                self.emit("breed", to=self.id)


class Picky(Agent):
    """Runs one version; says when it is ready, or why it never will be."""

    class State(State):
        handled: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None = None) -> None:
        if self.config.get("broken"):
            raise RuntimeError("this version is broken")
        await asyncio.sleep(self.config.get("slow_s", 0))

    async def ready(self) -> bool:
        return not self.config.get("unready")

    @on("version")
    async def version(self, signal: Signal) -> str:
        self.state.handled += 1
        return str(self.config.get("version"))


class Work(BaseModel):
    seconds: float


class Gauge(BaseModel):
    value: float


class Slow(Agent):
    """Takes its time, and says how much it has to do."""

    class State(State):
        done: int = 0

    @on("slow.work")
    async def work(self, signal: Signal[Work]) -> None:
        await asyncio.sleep(signal.data.seconds)
        self.state.done += 1

    @on("slow.gauge")
    async def gauge(self, signal: Signal[Gauge]) -> None:
        self.ctx.gauge("jobs", signal.data.value)
