"""When timers are due, and due again: no drift, no missed firing twice, clear errors."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats.signaling.schedules import (
    Timer,
    deadline_text,
    next_of,
    read_timer,
    timer_headers,
    timer_name,
    timer_of,
)
from foundation_nats.signaling.timekeeper import fired_envelope

NOW = datetime(2026, 11, 23, 13, 0, 1, 500_000, tzinfo=UTC)


def test_what_people_say_becomes_a_moment() -> None:
    """At, after, cron, every, and every with a first time."""
    assert timer_of(NOW, after=1.5).due == NOW + timedelta(seconds=1.5)
    assert timer_of(NOW, at="2026-12-01T00:00:00+01:00").due.hour == 23
    assert timer_of(NOW, every=10).due == NOW + timedelta(seconds=10)
    assert timer_of(NOW, every=10, after=0).due == NOW
    assert timer_of(NOW, cron="*/5 * * * *").due.minute == 5
    assert timer_of(NOW, cron="*/2 * * * * *").due.second == 2


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "say when"),
        ({"at": "2030-01-01T00:00:00Z", "after": 3}, "only one"),
        ({"cron": "* * * * *", "every": 3}, "only one"),
        ({"at": "tomorrow"}, "no time"),
        ({"at": "2030-01-01T00:00:00"}, "no time zone"),
        ({"after": -1}, "negative"),
        ({"every": 0.1}, "at least"),
        ({"cron": "61 * * * *"}, "bad minute"),
        ({"cron": "* * *"}, "wrong number of fields"),
        ({"cron": "* * * * *", "zone": "Mars/Base"}, "no time zone"),
        ({"cron": "0 0 30 2 *"}, "30 2"),
        ({"after": 1, "ttl": 0}, "positive"),
        ({"at": "3030-01-01T00:00:00Z"}, "too far"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(said: dict[str, object], why: str) -> None:
    """The error names what was wrong."""
    with pytest.raises(ValueError, match=why):
        timer_of(NOW, **said)  # type: ignore[arg-type]


@given(st.floats(0.5, 1e6), st.floats(0, 1e7))
def test_a_period_stays_on_its_grid(every: float, late: float) -> None:
    """However late it fires, the next moment is a whole number of periods after this one, and ahead."""
    timer = Timer(NOW, every_s=every)
    now = NOW + timedelta(seconds=late)
    after = timer.after(now)
    periods = (after - NOW).total_seconds() / every
    assert abs(periods - round(periods)) < 1e-3
    assert after > now - timedelta(milliseconds=1)
    assert (after - now).total_seconds() <= every + 1e-3


def test_cron_follows_its_zone_through_summer_time() -> None:
    """Nine o'clock in Berlin is another hour in UTC in March and in April."""
    before = next_of("0 9 * * *", "Europe/Berlin", datetime(2027, 3, 20, tzinfo=UTC))
    after = next_of("0 9 * * *", "Europe/Berlin", datetime(2027, 4, 1, tzinfo=UTC))
    assert (before.hour, after.hour) == (8, 7)


@given(
    st.one_of(st.none(), st.floats(0.5, 1e6)),
    st.one_of(st.none(), st.floats(0.1, 1e6)),
    st.integers(0, 2**53),
    st.booleans(),
)
def test_headers_say_the_whole_timer(
    every: float | None, ttl: float | None, generation: int, is_cancel: bool
) -> None:
    """What is read back is what was written."""
    timer = Timer(NOW, every_s=every, ttl_s=ttl, generation=generation, is_cancel=is_cancel)
    assert read_timer(timer_headers(timer, "x")) == timer
    with_cron = Timer(NOW, cron="0 9 * * *", zone="Asia/Tokyo")
    assert read_timer(timer_headers(with_cron, "x")) == with_cron


def test_each_firing_has_an_id_of_its_own_and_the_same_at_each_repeat() -> None:
    """One moment, one id; a signal that is sent once keeps its own."""
    body = {"id": "a", "subject": "agent:x"}
    timer = Timer(NOW, every_s=1.0, ttl_s=2.0)
    first, again = fired_envelope(body, timer), fired_envelope(body, timer)
    assert first["id"] == again["id"] != "a"
    assert first["deadline"] == "2026-11-23T13:00:03.500000Z"
    assert fired_envelope(body, Timer(timer.after(NOW), every_s=1.0))["id"] != first["id"]
    assert fired_envelope(body, Timer(NOW))["id"] == "a"


def test_names_and_deadlines() -> None:
    """Any id has a timer's name; the earlier end counts."""
    assert timer_name("order-17") == "order-17"
    assert len(timer_name("an id, with everything")) == 32
    assert deadline_text(NOW) is None
    soon = NOW + timedelta(seconds=1)
    assert deadline_text(NOW, ttl=60, deadline=soon) == "2026-11-23T13:00:02.500000Z"
    with pytest.raises(ValueError, match="positive"):
        deadline_text(NOW, ttl=-1)
