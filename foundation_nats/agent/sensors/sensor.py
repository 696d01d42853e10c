"""`Sensor`: what turns something of the outside into durable signals, as its author sees it.

A sensor is declared on an agent's class. It runs where the agent runs, from the moment the agent is
reported running until it stops; `host.py` runs it and states what is guaranteed. What is declared is
a template: each activation runs copies of its own, so attributes set while running are not shared.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar

from foundation_nats.agent.context import as_target, checked_type
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Payload
from foundation_nats.base.clock import utc_now
from foundation_nats.errors import ConfigError, SensorError
from foundation_schemas import Target

if TYPE_CHECKING:
    from foundation_nats.bus.connection import Bus
    from foundation_nats.bus.subjects import Subjects

_NAME_MAX = 100
_CLOCK_STEP_S = 60.0
"""The wall clock may be set while we sleep: look at it this often."""


class Overflow(StrEnum):
    """What happens when a sensor senses faster than its signals can be stored."""

    SLOW = "slow"
    """It waits. What can't wait, such as a subscription, drops the newest."""
    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"


class _Keep:
    """The position stays as it is."""


KEEP: Final = _Keep()


@dataclass(frozen=True, slots=True)
class Event:
    """One thing sensed, where the data alone does not say it all."""

    data: Any = None
    type: str | None = None
    """None: the sensor's own."""
    id: str | None = None
    """Derived from what was sensed: a repeat within the duplicate window takes no effect."""
    position: Any = KEEP
    """JSON: how far the sensor has come; stored in one step with the signal, and given to its successor."""
    traceparent: str | None = None


class Emit(Protocol):
    """What a sensor is given to emit with."""

    async def __call__(
        self,
        data: Any = None,
        *,
        type: str | None = None,
        id: str | None = None,
        position: Any = KEEP,
        traceparent: str | None = None,
    ) -> str:
        """Emit a signal; returns its id once it is stored, under `Overflow.SLOW`. Else at once.

        Raises:
            TypeError: *data* is not JSON.
            PayloadTooLargeError: it is too large; nothing was stored.
        """

    async def soon(self, event: Event) -> asyncio.Future[str]:
        """Wait for room in the queue only; the future has the id once it is stored."""

    def nowait(self, event: Event) -> bool:
        """Queue it without waiting, for callbacks; False if it was dropped."""

    async def keep(self, position: Any) -> None:
        """Store a position without a signal; returns when it is stored."""

    @property
    def is_full(self) -> bool:
        """Whether the queue has no room now."""


class Surroundings:
    """What a running sensor may know and use: `Sensor.here`."""

    def __init__(self, agent: AnyAgent, *, position: Any = None) -> None:
        self.agent = agent
        """Its agent. Read its `id` and `config`; the state belongs to handlers."""
        self.position = position
        """What was stored last as the position; None: nothing yet."""

    @property
    def id(self) -> str:
        """The agent's name."""
        return self.agent.id

    @property
    def config(self) -> dict[str, Any]:
        """The agent's configuration."""
        return self.agent.config

    @property
    def node(self) -> str:
        """Where it runs."""
        return self.agent.ctx.node

    @property
    def bus(self) -> Bus:
        """The worker's connection; not there in plain tests."""
        return self.agent.ctx.bus

    @property
    def subjects(self) -> Subjects:
        """With `bus`."""
        return self.agent.ctx.subjects

    @property
    def is_valid(self) -> bool:
        """Whether what it emits now would be stored at once, as far as this node knows."""
        return True

    def now(self) -> datetime:
        """The wall clock, in UTC; the test's own in an `AgentHarness`."""
        return utc_now()

    async def sleep(self, seconds: float) -> None:
        """Wait; in an `AgentHarness` not really."""
        await asyncio.sleep(seconds)

    async def sleep_until(self, moment: datetime) -> None:
        """Wait until the wall clock shows *moment*, also if it is set meanwhile."""
        while (left := (moment - self.now()).total_seconds()) > 0:
            await self.sleep(min(left, _CLOCK_STEP_S))

    def random(self) -> float:
        """Chance in [0, 1)."""
        return random.random()


class Sensor:
    """Subclass it and override `events`, or `run` for more than a stream of data.

    Args:
        emit: the type of its signals, or a `Payload` class; None: its name.
        name: unique within the agent; None: what it emits, or the class's name in lower case.
        to: who gets the signals; None: its own agent.
        overflow: what happens when signals can't be stored as fast as they come.
        queue_max: signals waiting to be stored.
        retry_first_s, retry_most_s: the pauses after a failure, doubling, with jitter.

    Raises:
        ConfigError: an argument is wrong.

    Example:
        >>> class Dice(Sensor):
        ...     async def events(self):
        ...         while True:
        ...             await self.here.sleep(1)
        ...             yield {"eyes": random.randint(1, 6)}
        >>> class Player(Agent):
        ...     sensors = [Dice(emit="dice.thrown")]
    """

    can_wait: ClassVar[bool] = True
    """False: what it listens to does not wait, so under `Overflow.SLOW` the newest is dropped."""
    here: Surroundings

    def __init__(
        self,
        *,
        emit: str | type[Payload] | None = None,
        name: str | None = None,
        to: str | Target | None = None,
        overflow: Overflow | str = Overflow.SLOW,
        queue_max: int = 100,
        retry_first_s: float = 0.5,
        retry_most_s: float = 60.0,
    ) -> None:
        kind = type(self).__name__
        type_ = emit if emit is None or isinstance(emit, str) else emit.signal_type
        self.name = name or type_ or kind.lower()
        if len(self.name) > _NAME_MAX or any(c.isspace() or c == "/" for c in self.name):
            raise ConfigError(f"{kind}: {self.name!r} can't be a sensor's name")
        try:
            self.type = checked_type(type_ or self.name)
            self.target = None if to is None else as_target(to)
            self.overflow = Overflow(overflow)
        except ValueError as error:
            raise ConfigError(f"{kind} {self.name}: {error}") from error
        if queue_max < 1 or not 0 < retry_first_s <= retry_most_s:
            raise ConfigError(
                f"{kind} {self.name}: queue_max must be at least 1, and 0 < retry_first_s <= retry_most_s"
            )
        self.queue_max = queue_max
        self.retry_first_s = retry_first_s
        self.retry_most_s = retry_most_s
        self.mount = ""
        """The skill that it belongs to, if any."""

    async def run(self, emit: Emit) -> None:
        """Sense until cancelled. To raise is to fail: it is run again after a pause. To return is its end."""
        events = self.events()
        try:
            async for item in events:
                if isinstance(item, Event):
                    await emit(
                        item.data,
                        type=item.type,
                        id=item.id,
                        position=item.position,
                        traceparent=item.traceparent,
                    )
                else:
                    await emit(item)
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    def events(self) -> AsyncIterator[Any]:
        """What it senses: data, or an `Event`; an async generator."""
        raise ConfigError(f"{type(self).__name__} overrides neither `events` nor `run`")

    def check(self) -> None:
        """Whether it can run here at all; called when the agent's class is loaded.

        Raises:
            ConfigError: something is missing; names it.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


class Clockwork(Sensor):
    """The base of sensors that depend on nothing but the time, so that tests can drive them.

    Its position is the moment of the last signal. Of several moments that were missed (nothing
    ran) one is made up for, unless ``catch_up=False``.
    """

    def __init__(self, *, catch_up: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.catch_up = catch_up

    def first(self, now: datetime) -> datetime:
        """The first moment, of an agent that is new."""
        raise NotImplementedError

    def after(self, due: datetime, now: datetime) -> datetime:
        """The first moment later than both, of the row that *due* is of."""
        raise NotImplementedError

    def spread(self, chance: float) -> float:
        """By how many seconds a signal is late on purpose."""
        return 0.0

    def begin(self, position: Any, now: datetime) -> datetime:
        """When it is due first, if the last was at *position*."""
        last = read_moment(position)
        if last is None:
            return self.first(now)
        due = self.after(last, last)
        return due if due > now or self.catch_up else self.after(last, now)

    @staticmethod
    def event(due: datetime) -> Event:
        """The signal of one moment."""
        text = due.isoformat()
        return Event({"due": text}, id=text, position=text)

    async def run(self, emit: Emit) -> None:
        here = self.here
        due = self.begin(here.position, here.now())
        while True:
            await here.sleep_until(due)
            late = self.spread(here.random())
            if late:
                await here.sleep(late)
            event = self.event(due)
            await emit(event.data, id=event.id, position=event.position)
            due = self.after(due, here.now())


def read_moment(position: Any) -> datetime | None:
    """A stored moment; None if there is none."""
    try:
        found = datetime.fromisoformat(position)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None else None


class MethodSensor(Sensor):
    """An async generator of the agent itself; see `sensor`."""

    def __init__(self, method: str, **options: Any) -> None:
        super().__init__(**options)
        self._method = method

    def events(self) -> AsyncIterator[Any]:
        agent: Any = self.here.agent
        owner = agent.skill[self.mount] if self.mount else agent
        found: AsyncIterator[Any] = getattr(owner, self._method)()
        return found


F = TypeVar("F", bound=Callable[..., AsyncIterator[Any]])


def sensor(*, emit: str | type[Payload] | None = None, **options: Any) -> Callable[[F], F]:
    """Have an async generator method run as a sensor; what it yields is emitted. Options as of `Sensor`.

    It runs beside the handlers: it may read `self.config`, but not change `self.state`.

    Raises:
        ConfigError: the method is no async generator.

    Example:
        >>> class House(Agent):
        ...     @sensor(emit="temperature")
        ...     async def thermometer(self):
        ...         while True:
        ...             yield await read(self.config["port"])
        ...             await asyncio.sleep(5)
    """

    def mark(function: F) -> F:
        plain: Any = function  # or it would be narrowed to what it is asked for
        if not inspect.isasyncgenfunction(plain):
            raise ConfigError(
                f"{function.__qualname__}: a sensor is an async generator: use async def and yield"
            )
        given = {"name": function.__name__, **options}
        plain.__foundation_sensor__ = lambda: MethodSensor(function.__name__, emit=emit, **given)
        return function

    return mark


def _marked(kind: type[Any]) -> Iterator[Sensor]:
    seen = set()
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if name not in seen and (make := getattr(member, "__foundation_sensor__", None)):
                yield make()
            seen.add(name)


def has_sensors(cls: type[Any]) -> bool:
    """Whether agents of this class always have sensors, so that they never hibernate."""
    return bool(declared(cls))


def declared(cls: type[Any]) -> Sequence[Sensor]:
    """The sensors of *cls* and of its skills, as templates.

    Raises:
        ConfigError: one is none, or two have one name.
    """
    known: Sequence[Sensor] | None = cls.__dict__.get("_foundation_sensors")
    if known is not None:
        return known
    found = [*_listed(cls), *_marked(cls)]
    for skill in getattr(cls, "skills", ()):
        kind = type(skill)
        for item in (*_listed(kind), *_marked(kind)):
            mine = copy.copy(item)
            mine.mount = skill.mount
            mine.name = f"{skill.mount}.{item.name}"
            if kind.prefixed:
                mine.type = f"{skill.mount}.{item.type}"
            found.append(mine)
    names: set[str] = set()
    for item in found:
        if item.name in names:
            raise ConfigError(
                f"{cls.__qualname__}: two sensors are called {item.name!r}: give one a name"
            )
        names.add(item.name)
    result = tuple(found)
    cls._foundation_sensors = result
    return result


def _listed(kind: type[Any]) -> list[Sensor]:
    listed = list(getattr(kind, "sensors", ()))
    for item in listed:
        if not isinstance(item, Sensor):
            raise ConfigError(
                f"{kind.__qualname__}.sensors holds {item!r}: write instances, as in "
                "sensors = [Timer(every=5, emit='tick')]"
            )
    return listed


def check_sensors(cls: type[Any]) -> None:
    """Whether the sensors of *cls* can run here.

    Raises:
        ConfigError: names what is wrong or missing.
    """
    for item in declared(cls):
        item.check()


def needs(library: str, extra: str, kind: str) -> ConfigError:
    """The error for an optional library that is not installed."""
    return ConfigError(
        f"{kind} needs {library}, which is not installed: pip install 'foundation-nats[{extra}]'"
    )


__all__ = [
    "KEEP",
    "Clockwork",
    "Emit",
    "Event",
    "MethodSensor",
    "Overflow",
    "Sensor",
    "SensorError",
    "Surroundings",
    "check_sensors",
    "declared",
    "has_sensors",
    "needs",
    "sensor",
]
