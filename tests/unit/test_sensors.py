"""Sensors without a server: what is declared, what the clock does, and how a test drives them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from foundation_nats import Agent, Payload, RecoveredFrom, Signal, State, on
from foundation_nats.agent.sensors import (
    Cron,
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
    declared,
    has_sensors,
    sensor,
)
from foundation_nats.agent.sensors.door import Request
from foundation_nats.agent.sensors.http import read_body
from foundation_nats.agent.skills import Skill
from foundation_nats.errors import ConfigError, SensorError
from foundation_nats.testing import AgentHarness


class Sum(Payload, type="sum"):
    """How much."""

    amount: int


class Dice(Sensor):
    """Three throws."""

    async def events(self) -> AsyncIterator[Any]:
        for eyes in (3, 5, 6):
            await self.here.sleep(3600)
            yield Event({"eyes": eyes}, position=eyes)


class Pulse(Skill):
    """A skill that senses."""

    sensors = (Timer(30, emit="beat"),)

    class State(State):
        """What it has felt."""

        beats: int = 0

    @on("beat")
    def beat(self, signal: Signal[Any]) -> None:
        """Count."""
        self.state.beats += 1


class House(Agent):
    """Has sensors of all kinds."""

    sensors = (
        Timer(every=10, emit="tick"),
        Cron("0 * * * *", emit="hour"),
        Dice(emit="dice"),
        Webhook("/sum", port=1, emit=Sum),
        Timer(60, emit="alarm", to="agent:guard"),
    )
    skills = (Pulse("pulse"),)

    class State(State):
        """What it has seen."""

        ticks: list[str] = Field(default_factory=list)
        hours: int = 0
        eyes: int = 0
        sum: int = 0
        warmth: int = 0
        sources: list[str] = Field(default_factory=list)

    @sensor(emit="warm")
    async def thermometer(self) -> AsyncIterator[int]:
        """As it is configured."""
        yield int(self.config.get("warmth", 20))

    @on("tick")
    def tick(self, signal: Signal[Any]) -> None:
        """Note when."""
        self.state.ticks.append(signal.data["due"])
        self.state.sources.append(signal.source)

    @on("hour")
    def hour(self, signal: Signal[Any]) -> None:
        """Count."""
        self.state.hours += 1

    @on("dice")
    def dice(self, signal: Signal[dict[str, int]]) -> None:
        """Add."""
        self.state.eyes += signal.data["eyes"]

    @on("warm")
    def warm(self, signal: Signal[int]) -> None:
        """Note."""
        self.state.warmth = signal.data

    @on(Sum)
    def add(self, signal: Signal[Sum]) -> None:
        """Add."""
        self.state.sum += signal.data.amount

    @on("watch")
    def watch(self, signal: Signal[str]) -> None:
        """Start or stop one more."""
        if signal.data == "stop":
            self.ctx.stop_sensor("extra")
        else:
            self.ctx.start_sensor(Timer(1, emit="tick", name="extra"))
        if signal.data == "fail":
            raise RuntimeError("no")


class Plain(Agent):
    """Has none."""


async def test_a_timer_follows_the_clock_of_the_harness_and_does_not_drift() -> None:
    """Also over a crash: the row of moments is the same one."""
    async with AgentHarness(House) as house:
        began = house.now
        await house.advance(25)
        await house.crash()
        await house.advance(20)
        due = [datetime.fromisoformat(text) for text in house.state.ticks]
        assert [(moment - began).total_seconds() for moment in due] == [10, 20, 30, 40]
        assert set(house.state.sources) == {"sensor:agent/tick"}


async def test_cron_and_timers_fire_in_order_and_to_others() -> None:
    """An hour, a minute, a skill's half minute."""
    async with AgentHarness(House) as house:
        await house.advance(3600)
        assert house.state.hours == 1
        assert len(house.state.ticks) == 360
        assert house.state.pulse.beats == 120
        alarms = house.take("alarm")
        assert len(alarms) == 60
        assert {alarm.to for alarm in alarms} == {"agent:guard"}


async def test_of_missed_moments_one_is_made_up_for() -> None:
    """And none, where the sensor says so."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    last = (now - timedelta(seconds=35)).isoformat()
    timer = Timer(10, emit="tick")
    due = timer.begin(last, now)
    assert due == now - timedelta(seconds=25)
    assert timer.after(due, now) == now + timedelta(seconds=5)
    assert Timer(10, emit="tick", catch_up=False).begin(last, now) == now + timedelta(seconds=5)
    assert Timer(10, emit="tick").begin("nonsense", now) == now + timedelta(seconds=10)
    assert Timer(10, emit="tick", at_once=True).begin(None, now) == now
    berlin = Cron("30 9 * * *", zone="Europe/Berlin", emit="report")
    assert berlin.begin(None, now) == datetime(2026, 1, 1, 8, 30, tzinfo=UTC)
    missed = berlin.begin("2025-12-30T08:30:00+00:00", now)
    assert missed == datetime(2025, 12, 31, 8, 30, tzinfo=UTC)


async def test_a_test_senses_in_place_of_the_outside() -> None:
    """Data, a typed payload, an event with an id; and a custom sensor itself."""
    async with AgentHarness(House, config={"warmth": 23}) as house:
        assert await house.sense("sum", Sum(amount=4))
        assert await house.sense("sum", Event({"amount": 5}, id="order-1"))
        assert not await house.sense("sum", Event({"amount": 5}, id="order-1"))
        assert house.state.sum == 9
        assert await house.sense("dice")
        assert house.state.eyes == 3
        assert await house.sense("thermometer")
        assert house.state.warmth == 23
        assert await house.sense("tick")
        assert not await house.sense("sum", {"amount": "many"})
        assert house.dead[-1].error.code == "agent.payload_invalid"
        with pytest.raises(ConfigError, match="no sensor 'dise'; there are: alarm, dice"):
            await house.sense("dise")


async def test_sensors_are_started_and_stopped_with_the_commit() -> None:
    """A handler that raises starts none; one that ends with its activation is gone after a crash."""
    async with AgentHarness(House) as house:
        await house.send("watch", "fail")
        await house.advance(5)
        assert house.state.ticks == []
        await house.send("watch", "start")
        await house.advance(3)
        assert len(house.state.ticks) == 3
        await house.send("watch", "stop")
        await house.advance(1)
        assert len(house.state.ticks) == 3
        await house.send("watch", "start")
        await house.crash()
        await house.advance(1)
        assert len([source for source in house.state.sources if "extra" in source]) == 3


async def test_a_sensor_started_in_on_start_runs_in_every_activation() -> None:
    """With what the agent's configuration says."""

    class Own(Agent):
        class State(State):
            ticks: int = 0

        async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
            self.ctx.start_sensor(Timer(self.config["every"], emit="tick"))

        @on("tick")
        def tick(self, signal: Signal[Any]) -> None:
            self.state.ticks += 1

    async with AgentHarness(Own, config={"every": 2}) as own:
        await own.advance(4)
        await own.crash()
        await own.advance(4)
        assert own.state.ticks == 4


def test_what_is_declared_is_found_by_class_skills_and_methods() -> None:
    """Who has none pays nothing."""
    names = sorted(item.name for item in declared(House))
    assert names == ["alarm", "dice", "hour", "pulse.beat", "sum", "thermometer", "tick"]
    assert next(item.type for item in declared(House) if item.name == "pulse.beat") == "pulse.beat"
    assert has_sensors(House)
    assert not has_sensors(Plain)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Timer(0), "every must be at least"),
        (lambda: Timer(1, jitter=2), "jitter must be"),
        (lambda: Timer(1, overflow="burn"), "burn"),
        (lambda: Timer(1, queue_max=0), "queue_max"),
        (lambda: Timer(1, name="a b"), "can't be a sensor's name"),
        (lambda: Timer(1, to="nonsense:x:y"), "nonsense"),
        (lambda: Cron("often"), "no cron expression"),
        (lambda: Cron("* * * * *", zone="Mars/North"), "no time zone"),
        (lambda: Webhook("orders"), "must begin with /"),
        (lambda: Webhook("/orders", port=70000), "no port"),
        (lambda: Webhook("/orders", secret=""), "secret is empty"),
        (lambda: HttpPoll("ftp://x"), "no http or https URL"),
        (lambda: HttpPoll("http://x", every=0), "must be positive"),
        (lambda: FileWatch(".", poll_s=0), "poll_s"),
        (lambda: HostMetrics(every=0), "every must be positive"),
        (lambda: NatsSubject("a b"), "no subject"),
        (lambda: NatsStream("A.B"), "no stream"),
        (lambda: NatsStream("A", start="now"), "start must be"),
        (lambda: KvWatch("A", "..x"), "no subject"),
    ],
)
def test_a_wrong_argument_is_named(make: Any, says: str) -> None:
    """At the declaration, before anything runs."""
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_wrong_declaration_is_named() -> None:
    """A class instead of an instance, two of one name, a method that does not yield."""

    class Wrong(Agent):
        sensors = (Timer,)  # type: ignore[assignment]

    class Twice(Agent):
        sensors = (Timer(1, emit="tick"), Timer(2, emit="tick"))

    with pytest.raises(ConfigError, match="write instances"):
        declared(Wrong)
    with pytest.raises(ConfigError, match="two sensors are called 'tick'"):
        declared(Twice)
    with pytest.raises(ConfigError, match="async def and yield"):

        @sensor(emit="x")
        async def no_generator(self: Any) -> int:  # type: ignore[type-var]
            return 1


def test_a_body_is_json_where_it_says_so() -> None:
    """Else text, and what is neither is refused."""
    assert read_body(b'{"a":1}', "application/json; charset=utf-8") == {"a": 1}
    assert read_body(b'{"a":1}', "application/vnd.x+json") == {"a": 1}
    assert read_body(b'{"a":1}', "text/plain") == '{"a":1}'
    assert read_body(b"", "application/json") is None
    for body, kind in ((b"{", "application/json"), (b"\xff", "")):
        with pytest.raises(SensorError):
            read_body(body, kind)


def test_a_signature_is_of_the_body_and_the_secret() -> None:
    """With or without a prefix, in either case; nothing else."""
    hook = Webhook("/x", port=1, secret="s3cret")
    right = hmac.new(b"s3cret", b"body", sha256).hexdigest()

    def signed(header: str, body: bytes = b"body") -> bool:
        request = Request("POST", "/x", "", {"x-hub-signature-256": header}, body)
        return hook._is_signed(b"s3cret", request)

    assert signed(f"sha256={right}")
    assert signed(right.upper())
    assert not signed(right, b"Body")
    assert not signed("")
    assert not signed("sha256=ä")


def test_this_file_tests_what_the_page_tells() -> None:
    """Every kind of sensor is on it."""
    page = (Path(__file__).parents[2] / "docs" / "sensors.md").read_text()
    for kind in (Timer, Cron, FileWatch, HttpPoll, Webhook, NatsSubject, NatsStream, KvWatch):
        assert kind.__name__ in page
