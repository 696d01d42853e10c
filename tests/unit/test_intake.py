"""Limits on intake as pure decisions, and what an emission inherits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from foundation_nats import Agent, Context, Signal
from foundation_nats.agent.intake import SENDERS_MAX, Intake, is_urgent, source_of
from foundation_nats.base.resilience import TokenBucket
from foundation_nats.signaling.receivers import Given
from foundation_schemas import AgentSpec, RateLimit


def test_what_must_wait_is_not_counted() -> None:
    """However often it is asked for; then it may."""
    intake = Intake(RateLimit(per_s=10, burst=2))
    assert [intake.wait_s("a", 0.0) for _ in range(2)] == [0, 0]
    waits = [intake.wait_s("a", 0.0) for _ in range(5)]
    assert waits == pytest.approx([0.1] * 5)
    assert intake.wait_s("b", 0.1) == 0
    assert intake.wait_s("b", 0.1) == pytest.approx(0.1)


def test_a_wait_that_is_waited_for_is_over() -> None:
    """Whatever floating point makes of it."""
    bucket = TokenBucket(3, 1)
    now = 1000.1
    for _ in range(1000):
        if wait := bucket.wait_s(now):
            now += wait
            assert bucket.wait_s(now) == 0
        assert bucket.take(now) == 0


def test_a_sender_has_its_own_share() -> None:
    """One that is refused costs the others nothing, and what is refused to it counts for nobody."""
    intake = Intake(RateLimit(per_s=3, per_sender=1))
    assert intake.wait_s("a", 0.0) == 0
    assert [intake.wait_s("a", 0.0) > 0 for _ in range(9)] == [True] * 9
    assert [intake.wait_s(name, 0.0) for name in "bc"] == [0, 0]
    assert intake.wait_s("d", 0.0) > 0, "all together have no more"


def test_senders_are_forgotten() -> None:
    """Memory is bounded, and the one heard of longest ago goes first."""
    intake = Intake(RateLimit(per_sender=0.001))
    for number in range(3 * SENDERS_MAX):
        assert intake.wait_s(str(number), 0.0) == 0
        assert number == 0 or intake.wait_s(str(number - 1), 0.0) > 0
    assert len(intake._senders) == SENDERS_MAX


def test_a_limit_says_something() -> None:
    """And one that is not there changes no digest."""
    for wrong in ({}, {"burst": 2}, {"per_s": 0}, {"per_s": 1, "burst": 0.5}, {"per_sender": -1}):
        with pytest.raises(ValueError):
            RateLimit(**wrong)
    plain = AgentSpec(run="a:B")
    assert plain.digest() == AgentSpec(run="a:B", rate=None).digest()
    assert plain.digest() != AgentSpec(run="a:B", rate=RateLimit(per_s=1)).digest()


def test_what_says_that_it_is_urgent() -> None:
    """At the top of the envelope, not in the data."""
    assert is_urgent(b'{"urgent": true, "source": "a"}')
    for not_urgent in (
        b"{}",
        b'{"data":{"urgent":true}}',
        b'{"urgent":"true"}',
        b'["urgent"]',
        b'"urgent"{',
    ):
        assert not is_urgent(not_urgent)
    assert [source_of(data) for data in (b'{"source":"a"}', b"{}", b"x", b"[]")] == [
        "a",
        "",
        "",
        "",
    ]


def test_what_was_given_lately_fades() -> None:
    """By half in five seconds."""
    given = Given()
    for _ in range(4):
        given.add("a", 10.0)
    assert given.lately("a", 10.0) == 4
    assert given.lately("a", 15.0) == 2
    assert given.lately("b", 15.0) == 0


def test_the_earlier_deadline_counts() -> None:
    """Where it is asked for, by the class or by one emission."""
    now = datetime.now(UTC)
    deadline = now + timedelta(seconds=60)

    def emitted(cls: type[Agent], cause: datetime | None, **more: object) -> datetime | None:
        agent = cls()
        agent.ctx = Context("a")
        text = None if cause is None else cause.isoformat()
        agent.ctx._begin(Signal(id="1", source="client:x", type="t", data=None, deadline=text))
        agent.emit("next", to="b", **more)  # type: ignore[arg-type]
        (emission,) = agent.ctx._emissions
        return None if emission.deadline is None else datetime.fromisoformat(emission.deadline)

    class Plain(Agent):
        """Inherits nothing by itself."""

    class Heir(Agent):
        """Always does."""

        inherit_deadline = True

    soon = timedelta(milliseconds=5)
    assert emitted(Plain, deadline) is None
    assert emitted(Heir, None) is None
    assert emitted(Heir, deadline, inherit_deadline=False) is None
    for cls, more in ((Plain, {"inherit_deadline": True}), (Heir, {}), (Heir, {"ttl": 3600})):
        found = emitted(cls, deadline, **more)
        assert found is not None
        assert abs(found - deadline) < soon
    found = emitted(Heir, deadline, ttl=1)
    assert found is not None
    assert found < now + timedelta(seconds=2)
