"""`Sensing`: the sensors of an agent under test, run by the test instead of by the outside.

`AgentHarness` uses it: `Timer` and `Cron` follow the harness's clock, every other sensor senses when the
test says so, by ``harness.sense(name, data)``. No IO, but for a sensor that is asked to sense by itself.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Any, Final

import orjson

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.sensors.sensor import (
    KEEP,
    Clockwork,
    Event,
    Sensor,
    Surroundings,
    declared,
)
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ConfigError

_PATIENCE_S = 5.0
Deliver = Callable[[Sensor, Event], Awaitable[bool]]


class _Unset:
    """Nothing was given."""


UNSET: Final = _Unset()


class _Here(Surroundings):
    """With the test's clock; to sleep takes no time."""

    def __init__(self, agent: Agent, *, position: Any, clock: Callable[[], datetime]) -> None:
        super().__init__(agent, position=position)
        self._clock = clock

    def now(self) -> datetime:
        return self._clock()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)

    async def sleep_until(self, moment: datetime) -> None:
        await asyncio.sleep(0)

    def random(self) -> float:
        return 0.5


class _Enough(Exception):
    """The first event is there."""


class _First:
    """Takes the first event of a sensor (`Emit`)."""

    def __init__(self) -> None:
        self.event: Event | None = None
        self._over = asyncio.get_running_loop().create_future()

    @property
    def is_full(self) -> bool:
        return False

    def nowait(self, event: Event) -> bool:
        if self.event is not None:
            return False
        self.event = event
        self._over.set_result(None)
        return True

    async def soon(self, event: Event) -> asyncio.Future[str]:
        self.nowait(event)
        raise _Enough

    async def keep(self, position: Any) -> None:
        """Not before there is an event."""

    async def __call__(
        self,
        data: Any = None,
        *,
        type: str | None = None,
        id: str | None = None,
        position: Any = KEEP,
        traceparent: str | None = None,
    ) -> str:
        self.nowait(Event(data, type, id, position, traceparent))
        raise _Enough

    async def take(self, running: Awaitable[None]) -> Event | None:
        """Wait for it, or for the end of the sensor."""
        task = asyncio.ensure_future(running)
        await asyncio.wait(
            [task, self._over], timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not task.done():
            task.cancel()
        outcome = await asyncio.gather(task, return_exceptions=True)
        error = outcome[0]
        if isinstance(error, Exception) and not isinstance(error, _Enough) and self.event is None:
            raise error
        return self.event


class Sensing:
    """The sensors of one agent, and how far each has come."""

    def __init__(self, deliver: Deliver, clock: Callable[[], datetime]) -> None:
        self._deliver = deliver
        self._clock = clock
        self._agent: Agent | None = None
        self._running: dict[str, Sensor] = {}
        self._due: dict[str, datetime] = {}
        self.positions: dict[str, Any] = {}
        """As the record would hold them."""

    def begin(self, agent: Agent) -> None:
        """An activation runs: so do its sensors."""
        orders = agent.ctx._sensor_orders
        self._agent = agent
        self._running, self._due = {}, {}
        self.order([*declared(type(agent)), *(orders or ())])

    def end(self) -> None:
        """It has stopped."""
        self._agent = None
        self._running, self._due = {}, {}

    def commit(self, agent: Agent) -> None:
        """Start and stop what the handler has asked for."""
        if self._agent is agent and agent.ctx._sensor_orders:
            self.order(agent.ctx._sensor_orders)
            agent.ctx._sensor_orders = None

    def order(self, orders: Iterable[Sensor | str]) -> None:
        """Start these, or stop those of these names."""
        for order in orders:
            if isinstance(order, str):
                self._running.pop(order, None)
                self._due.pop(order, None)
                continue
            self._running[order.name] = order
            if isinstance(order, Clockwork):
                self._due[order.name] = order.begin(self.positions.get(order.name), self._clock())

    @property
    def names(self) -> list[str]:
        """Of those that run."""
        return sorted(self._running)

    def due(self) -> datetime | None:
        """When the next one that goes by the clock emits."""
        return min(self._due.values(), default=None)

    async def fire(self) -> None:
        """Let the next one emit."""
        name = min(self._due, key=lambda item: self._due[item])
        sensor, due = self._running[name], self._due[name]
        assert isinstance(sensor, Clockwork)
        self._due[name] = sensor.after(due, max(due, self._clock()))
        await self._emit(sensor, sensor.event(due))

    async def sense(self, name: str, data: Any) -> bool:
        """Let a sensor emit *data*; if that is `UNSET`, what it senses first by itself.

        Raises:
            ConfigError: there is no such sensor; or it senses nothing.
        """
        sensor = self._running.get(name)
        if sensor is None or self._agent is None:
            known = ", ".join(self.names) or "none"
            raise ConfigError(f"There is no sensor {name!r}; there are: {known}.")
        if not isinstance(data, _Unset):
            return await self._emit(sensor, data if isinstance(data, Event) else Event(data))
        if isinstance(sensor, Clockwork):
            return await self._emit(sensor, sensor.event(self._clock()))
        mine = copy.copy(sensor)
        mine.here = _Here(self._agent, position=self.positions.get(name), clock=self._clock)
        first = _First()
        event = await first.take(mine.run(first))
        if event is None:
            raise ConfigError(f"The sensor {name!r} has sensed nothing within {_PATIENCE_S:g} s.")
        return await self._emit(sensor, event)

    async def _emit(self, sensor: Sensor, event: Event) -> bool:
        if event.position is not KEEP:
            self.positions[sensor.name] = orjson.loads(to_json(event.position))
        return await self._deliver(sensor, event)


__all__ = ["UNSET", "Sensing"]
