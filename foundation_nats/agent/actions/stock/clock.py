"""Clocks: `now`, `date_add`, `date_diff`. Times are ISO 8601; what says no zone is UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from foundation_nats.agent.actions.action import action
from foundation_nats.agent.actions.running import ActionContext
from foundation_nats.errors import ActionError


@action
async def now(ctx: ActionContext, zone: str = "UTC") -> str:
    """The time now, in a zone such as ``Europe/Vienna``; another one when it is tried again."""
    try:
        return ctx.now().astimezone(ZoneInfo(zone)).isoformat(timespec="seconds")
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ActionError(f"{zone!r} is no time zone.") from error


@action
async def date_add(
    time: datetime, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0
) -> str:
    """A time so much later, or earlier if the numbers are negative."""
    more = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    try:
        return (_zoned(time) + more).isoformat()
    except OverflowError as error:
        raise ActionError("That is beyond all calendars.") from error


@action
async def date_diff(start: datetime, end: datetime) -> float:
    """Seconds from start to end."""
    return (_zoned(end) - _zoned(start)).total_seconds()


def _zoned(time: datetime) -> datetime:
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


__all__ = ["date_add", "date_diff", "now"]
