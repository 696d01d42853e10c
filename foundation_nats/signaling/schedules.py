"""When a signal for later is due: `Timer`, its headers on the wire, and the firing after this one.

Pure. A timer is one message of the stream TIMERS: a schedule of the server for one
moment (``Nats-Schedule: @at …``), whose payload is the signal's envelope. What repeats is
armed anew by whoever fires it (`timekeeper.py`), reckoned from the moment it was due and not
from when it fired, so it does not drift; what was missed while everything was down fires once.
The server's own repeating schedules are not used, because they leave out what was due while
the server was down.

Facts verified on nats-server 2.15.1:

- ``Nats-Schedule: @at <RFC 3339>`` fires at the moment or within 250 ms after it, survives
  ``kill -9``, and fires at once if the moment has passed meanwhile; a native cron schedule goes on
  with the next moment instead.
- One schedule per subject: a later one replaces it (``Nats-Rollup: sub`` is added), also one that is
  due. ``Nats-Expected-Last-Subject-Sequence`` is checked; a fired ``@at`` leaves the subject empty,
  that is sequence 0. Its ``Nats-Msg-Id`` is remembered, and not on the fired message.
- The fired message is stored on ``Nats-Schedule-Target``, in the same stream, with the other
  headers, and ``Nats-Scheduler``: the schedule's subject.
- A stream with schedules can't have ``discard: new`` (10052), and with a limit would drop the oldest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from zoneinfo import ZoneInfo

from foundation_schemas.base import is_name

AHEAD_MAX_S = 50 * 365 * 86400.0
EVERY_MIN_S = 0.5
_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"

SIGNALS = "~client"
"""The owner of timers that clients have set; agents own theirs."""


@dataclass(frozen=True, slots=True)
class Timer:
    """When a signal is sent, and when again."""

    due: datetime
    every_s: float | None = None
    cron: str | None = None
    zone: str = "UTC"
    ttl_s: float | None = None
    """So long after each firing it may be handled."""
    generation: int = 0
    """Grows with each timer of the same name; a cancellation ends the smaller ones."""
    is_cancel: bool = False
    """It sends nothing, but ends the timers of its name with a smaller generation."""

    @property
    def repeats(self) -> bool:
        """Whether it fires more than once."""
        return self.every_s is not None or self.cron is not None

    def after(self, now: datetime) -> datetime:
        """The first moment after *now* when it is due again, reckoned from `due`."""
        if self.every_s is not None:
            missed = max(0.0, (now - self.due).total_seconds()) // self.every_s
            return self.due + timedelta(seconds=self.every_s * (missed + 1))
        assert self.cron is not None
        return next_of(self.cron, self.zone, max(now, self.due))


def next_of(cron: str, zone: str, after: datetime) -> datetime:
    """The first moment after *after* that the expression means, in UTC.

    Raises:
        ValueError: it is no cron expression, or there is no such zone or moment.
    """
    from cronsim import CronSim, CronSimError

    try:
        place = ZoneInfo(zone)
    except (LookupError, ValueError, OSError) as error:
        raise ValueError(f"{zone!r} is no time zone: write one such as Europe/Berlin") from error
    try:
        return next(CronSim(cron, after.astimezone(place))).astimezone(UTC)
    except CronSimError as error:
        raise ValueError(
            f"{cron!r} is no cron expression ({str(error).lower()}): write minute, hour, day, month, "
            "weekday, such as '30 9 * * MON-FRI'"
        ) from error
    except StopIteration:
        raise ValueError(f"{cron!r} never comes") from None


def timer_of(
    now: datetime,
    *,
    at: datetime | str | None = None,
    after: float | timedelta | None = None,
    every: float | timedelta | None = None,
    cron: str | None = None,
    zone: str = "UTC",
    ttl: float | None = None,
    generation: int = 0,
) -> Timer:
    """What people say as a timer: one of *at*, *after*, *cron*, *every*; *every* may go with the first two.

    Raises:
        ValueError: says what is wrong.
    """
    if sum(item is not None for item in (at, after, cron)) > 1 or (cron and every is not None):
        raise ValueError(
            "say only one of at, after, cron and every (at or after may go with every)"
        )
    period = every.total_seconds() if isinstance(every, timedelta) else every
    if period is not None and not EVERY_MIN_S <= period <= AHEAD_MAX_S:
        raise ValueError(f"every must be at least {EVERY_MIN_S:g} s, not {period:g}")
    if ttl is not None and ttl <= 0:
        raise ValueError(f"the time to live must be positive, not {ttl:g}")
    if cron is not None:
        due = next_of(cron, zone, now)
    elif at is not None:
        due = _moment(at)
    elif after is not None or period is not None:
        wait = after.total_seconds() if isinstance(after, timedelta) else after
        due = now + timedelta(seconds=_checked_wait(wait if wait is not None else period or 0.0))
    else:
        raise ValueError("say when: at, after, cron or every")
    if (due - now).total_seconds() > AHEAD_MAX_S:
        raise ValueError(f"{due.isoformat()} is too far away")
    return Timer(due, period, cron, zone, ttl, generation)


def _checked_wait(seconds: float) -> float:
    if not 0 <= seconds <= AHEAD_MAX_S:
        raise ValueError(f"after must not be negative or over 50 years, not {seconds:g} s")
    return seconds


def _moment(at: datetime | str) -> datetime:
    if isinstance(at, str):
        try:
            at = datetime.fromisoformat(at)
        except ValueError:
            raise ValueError(f"{at!r} is no time: write 2030-01-31T12:00:00Z") from None
    if at.tzinfo is None:
        raise ValueError(f"{at.isoformat()} has no time zone: append Z, or +01:00")
    return at.astimezone(UTC)


def timer_name(signal_id: str) -> str:
    """What the timer of a client's signal is called: its id, or a hash of it where that is no name."""
    if is_name(signal_id):
        return signal_id
    return blake2b(signal_id.encode(), digest_size=16).hexdigest()


def check_timer_name(name: str) -> str:
    """Return *name* if a timer may be called so.

    Raises:
        ValueError: it is no name.
    """
    if not is_name(name):
        raise ValueError(f"{name[:40]!r} is no name for a timer: use letters, digits, '-' and '_'")
    return name


def time_text(moment: datetime) -> str:
    """A moment as it is written in headers and envelopes."""
    return moment.astimezone(UTC).strftime(_FORMAT)


def read_time(text: str) -> datetime:
    """The moment in *text*.

    Raises:
        ValueError: it is none.
    """
    return datetime.fromisoformat(text).astimezone(UTC)


def deadline_text(
    now: datetime, *, ttl: float | None = None, deadline: datetime | None = None
) -> str | None:
    """The earlier of a moment and the end of a time to live, as text; None if neither is given.

    Raises:
        ValueError: the time to live is not positive, or the moment has no time zone.
    """
    if ttl is not None and not 0 < ttl <= AHEAD_MAX_S:
        raise ValueError(f"the time to live must be positive, not {ttl:g}")
    ends = [] if deadline is None else [_moment(deadline)]
    if ttl is not None:
        ends.append(now + timedelta(seconds=ttl))
    return time_text(min(ends)) if ends else None


def timer_headers(timer: Timer, target: str) -> dict[str, str]:
    """What makes a message that timer; the server puts it on the subject *target* when it is due."""
    headers = {
        "Nats-Schedule": f"@at {time_text(timer.due)}",
        "Nats-Schedule-Target": target,
        "Fnd-Due": time_text(timer.due),
        "Fnd-Generation": str(timer.generation),
    }
    if timer.every_s is not None:
        headers["Fnd-Every"] = repr(timer.every_s)
    if timer.cron is not None:
        headers |= {"Fnd-Cron": timer.cron, "Fnd-Zone": timer.zone}
    if timer.ttl_s is not None:
        headers["Fnd-Ttl"] = repr(timer.ttl_s)
    if timer.is_cancel:
        headers["Fnd-Cancel"] = "1"
    return headers


def read_timer(headers: Mapping[str, str]) -> Timer:
    """The timer that the headers of an armed or fired message say.

    Raises:
        ValueError: they say none.
    """
    try:
        every, ttl = headers.get("Fnd-Every"), headers.get("Fnd-Ttl")
        return Timer(
            due=read_time(headers["Fnd-Due"]),
            every_s=None if every is None else float(every),
            cron=headers.get("Fnd-Cron"),
            zone=headers.get("Fnd-Zone", "UTC"),
            ttl_s=None if ttl is None else float(ttl),
            generation=int(headers.get("Fnd-Generation", "0")),
            is_cancel="Fnd-Cancel" in headers,
        )
    except KeyError as error:
        raise ValueError(f"no header {error.args[0]}") from error
