"""Agents that sense; what their sensors do outside is a line in a file."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from pydantic import Field

from foundation_nats import Agent, RecoveredFrom, Signal, State, on
from foundation_nats.agent.sensors import (
    EXIT,
    Cron,
    Emit,
    Event,
    FileWatch,
    HostMetrics,
    HttpPoll,
    KvWatch,
    NatsStream,
    NatsSubject,
    Sensor,
    Timer,
    Webhook,
    sensor,
)


class Seen(State):
    """All that came, in order."""

    seen: list[Any] = Field(default_factory=list)


class Counting(Sensor):
    """Senses 1, 2, 3 … as fast as it is stored, and says of each attempt who made it."""

    async def run(self, emit: Emit) -> None:
        here = self.here
        sink = Path(here.config["sink"])
        number = 0
        while True:
            number += 1
            with sink.open("a") as lines:
                lines.write(f"{os.getpid()} {here.agent.ctx.epoch} {number}\n")
            await emit([here.agent.ctx.epoch, number])
            with sink.with_suffix(".stored").open("a") as lines:
                lines.write(f"{here.agent.ctx.epoch} {number}\n")
            await here.sleep(0.01)


class Counter(Agent):
    """Notes what its sensor counts."""

    State = Seen
    critical = True
    sensors = (Counting(emit="count"),)

    @on("count")
    def count(self, signal: Signal[list[int]]) -> None:
        """Note it."""
        self.state.seen.append(signal.data)


class Still(Counter):
    """Notes what was counted before, and counts no more."""

    sensors = ()

    @on("look")
    def look(self, signal: Signal[Any]) -> int:
        """How much it has noted."""
        return len(self.state.seen)


class Ticking(Agent):
    """Has a clock."""

    State = Seen
    critical = True
    sensors = (Timer(0.1, emit="tick"), Cron("* * * * * *", emit="second"))

    @on("tick")
    def tick(self, signal: Signal[Any]) -> None:
        """Note when."""
        self.state.seen.append(signal.data["due"])

    @on("second")
    def second(self, signal: Signal[Any]) -> None:
        """Nothing."""


class Hooked(Agent):
    """Takes orders over HTTP."""

    State = Seen
    critical = True

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Listen as configured."""
        self.ctx.start_sensor(
            Webhook(
                "/orders/{agent}",
                emit="order",
                secret="config:secret" if "secret" in self.config else None,
                bytes_max=1000,
                timeout=1.5,
            )
        )

    @on("order")
    def order(self, signal: Signal[Any]) -> None:
        """Note it."""
        self.state.seen.append(signal.data)


class Streaming(Agent):
    """Reads a stream and a bucket."""

    State = Seen
    critical = True
    sensors = (
        NatsStream("LINES", emit="line", start="all"),
        KvWatch("settings", "ui.*", emit="setting"),
        NatsSubject("plant.*", emit="plant", whole=True),
    )

    @on("line")
    def line(self, signal: Signal[Any]) -> None:
        """Note it."""
        self.state.seen.append(signal.data)

    @on("setting")
    def setting(self, signal: Signal[Any]) -> None:
        """Note key, value and what was done."""
        self.state.seen.append([signal.data["op"], signal.data["key"], signal.data["value"]])

    @on("plant")
    def plant(self, signal: Signal[Any]) -> None:
        """Note it."""
        self.state.seen.append([signal.data["subject"], signal.data["data"]])


class Filing(Agent):
    """Watches a directory, and would sleep if it could."""

    State = Seen
    critical = True
    hibernate_after = 0.2

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Watch what is configured."""
        path = self.config["path"]
        self.ctx.start_sensor(FileWatch(path, match="*.csv", remember=True, emit="file"))

    @on("file")
    def file(self, signal: Signal[Any]) -> None:
        """Note what happened to it."""
        self.state.seen.append([signal.data["change"], Path(signal.data["path"]).name])


class Polling(Agent):
    """Looks at a URL."""

    State = Seen
    critical = True

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Look where it is configured."""
        self.ctx.start_sensor(HttpPoll(self.config["url"], every=0.1, emit="page"))

    @on("page")
    def page(self, signal: Signal[Any]) -> None:
        """Note it."""
        self.state.seen.append(signal.data)


class Flood(Sensor):
    """A hundred at once, which nobody can store in between."""

    async def run(self, emit: Emit) -> None:
        for number in range(100):
            emit.nowait(Event(number))
        await self.here.sleep(3600)


class Patient(Sensor):
    """A hundred, each when there is room."""

    async def events(self) -> AsyncIterator[int]:
        for number in range(100):
            yield number


class Failing(Sensor):
    """Never works."""

    async def run(self, emit: Emit) -> None:
        raise RuntimeError("the probe is broken")


class Zoo(Agent):
    """All that needs nothing from outside."""

    class State(State):
        """By type."""

        oldest: list[int] = Field(default_factory=list)
        newest: list[int] = Field(default_factory=list)
        slow: list[int] = Field(default_factory=list)
        metrics: int = 0
        exits: list[Any] = Field(default_factory=list)
        method: int = 0
        extra: int = 0

    sensors = (
        Flood(emit="oldest", overflow="drop_newest", queue_max=5),
        Flood(emit="newest", overflow="drop_oldest", queue_max=5),
        Patient(emit="slow", queue_max=3),
        Failing(name="broken", retry_first_s=0.02, retry_most_s=0.1),
        HostMetrics(every=0.1, emit="metrics"),
    )

    @sensor(emit="method")
    async def own(self) -> AsyncIterator[int]:
        """One, and its end."""
        yield 7

    @on("oldest")
    def on_oldest(self, signal: Signal[int]) -> None:
        """Note it."""
        self.state.oldest.append(signal.data)

    @on("newest")
    def on_newest(self, signal: Signal[int]) -> None:
        """Note it."""
        self.state.newest.append(signal.data)

    @on("slow")
    def on_slow(self, signal: Signal[int]) -> None:
        """Note it."""
        self.state.slow.append(signal.data)

    @on("metrics")
    def on_metrics(self, signal: Signal[Any]) -> None:
        """Count."""
        self.state.metrics += 1

    @on("method")
    def on_method(self, signal: Signal[int]) -> None:
        """Note it."""
        self.state.method = signal.data

    @on(EXIT)
    def on_exit(self, signal: Signal[Any]) -> None:
        """Note whose."""
        self.state.exits.append([signal.data["sensor"], signal.data["reason"]])

    @on("extra")
    def on_extra(self, signal: Signal[Any]) -> None:
        """Count."""
        self.state.extra += 1

    @on("more")
    def more(self, signal: Signal[str]) -> None:
        """Start or stop one more."""
        if signal.data == "stop":
            self.ctx.stop_sensor("extra")
        else:
            self.ctx.start_sensor(Timer(0.05, emit="extra"))
        if signal.data == "fail":
            raise RuntimeError("no")


class Broken(Agent):
    """Its sensor can't be found out about before it runs."""

    sensors = (Webhook("/x", port=1, secret="env:NO_SUCH_SECRET_AT_ALL"),)
