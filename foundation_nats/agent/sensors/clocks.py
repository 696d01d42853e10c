"""`Timer` and `Cron`: signals by the time; pure but for the waiting.

For what must be sent also while the agent is down, or outlive it, use ``ctx.schedule`` and
``cluster.signals.schedule``: those timers are kept by the broker.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from foundation_nats.agent.sensors.sensor import Clockwork
from foundation_nats.errors import ConfigError
from foundation_nats.signaling.schedules import next_of

_EVERY_MIN_S = 0.01


class Timer(Clockwork):
    """A signal every so many seconds: ``Timer(every=5, emit="tick")``; its data is ``{"due": …}``.

    The moments form a row that does not drift, and that is kept when the agent moves.

    Args:
        every: seconds, or a duration.
        jitter: up to so many seconds later each time.
        at_once: whether the first is sent when the agent first starts; else after *every*.
        catch_up: whether one of several that were missed is made up for.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        every: float | timedelta,
        *,
        jitter: float = 0.0,
        at_once: bool = False,
        catch_up: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(catch_up=catch_up, **options)
        self.every = every if isinstance(every, timedelta) else timedelta(seconds=every)
        if self.every.total_seconds() < _EVERY_MIN_S:
            raise ConfigError(f"Timer {self.name}: every must be at least {_EVERY_MIN_S:g} s")
        if not 0 <= jitter <= self.every.total_seconds():
            raise ConfigError(f"Timer {self.name}: jitter must be between 0 and every")
        self.jitter = jitter
        self.at_once = at_once

    def first(self, now: datetime) -> datetime:
        return now if self.at_once else now + self.every

    def after(self, due: datetime, now: datetime) -> datetime:
        missed = max(0, (now - due) // self.every)
        return due + self.every * (missed + 1)

    def spread(self, chance: float) -> float:
        return self.jitter * chance


class Cron(Clockwork):
    """A signal by a cron expression: ``Cron("30 9 * * MON-FRI", zone="Europe/Berlin", emit="report")``.

    Five fields, or six with seconds first. The data is ``{"due": …}``, in UTC.

    Raises:
        ConfigError: it is no cron expression, or there is no such zone.
    """

    def __init__(
        self, expression: str, *, zone: str = "UTC", catch_up: bool = True, **options: Any
    ) -> None:
        super().__init__(catch_up=catch_up, **options)
        self.expression = expression
        self.zone = zone
        try:
            next_of(expression, zone, datetime.fromisoformat("2026-01-01T00:00:00+00:00"))
        except ValueError as error:
            raise ConfigError(f"Cron {self.name}: {error}") from error

    def first(self, now: datetime) -> datetime:
        return next_of(self.expression, self.zone, now)

    def after(self, due: datetime, now: datetime) -> datetime:
        return next_of(self.expression, self.zone, max(due, now))


__all__ = ["Cron", "Timer"]
