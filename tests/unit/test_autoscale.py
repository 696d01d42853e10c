"""How many replicas a deployment should have: by formula, within limits, down only after a cool-down."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foundation_nats.control.autoscale import Recommendation, Sample, Stabilizer, recommend
from foundation_schemas import AgentSpec, Autoscale, Deployment


def policy(**fields: Any) -> Autoscale:
    """One to ten replicas."""
    return Autoscale(**{"min": 1, "max": 10, **fields})


@pytest.mark.parametrize(
    ("wanted", "sample", "replicas"),
    [
        (policy(backlog=10), Sample(2, backlog=100), 10),
        (policy(backlog=10), Sample(4, backlog=61), 7),
        (policy(backlog=10), Sample(4, backlog=0), 1),
        (policy(backlog=10, min=3), Sample(4, backlog=0), 3),
        (policy(backlog=10), Sample(4, backlog=42), 4),
        (policy(backlog=10), Sample(4, backlog=36.5), 4),
        (policy(backlog=10, max=5), Sample(4, backlog=1e6), 5),
        (policy(cpu=0.5), Sample(4, cpu=0.9), 8),
        (policy(cpu=0.5), Sample(4, cpu=0.25), 2),
        (policy(cpu=0.5), Sample(4), None),
        (policy(metric="jobs", target=3), Sample(2, gauges={"jobs": 9}), 6),
        (policy(metric="jobs", target=3), Sample(2, gauges={"other": 9}), None),
        (policy(cpu=0.5, backlog=10), Sample(4, backlog=0, cpu=0.9), 8),
        (policy(backlog=10), Sample(0, backlog=0), 1),
    ],
)
def test_the_number_that_brings_each_measure_to_its_target(
    wanted: Autoscale, sample: Sample, replicas: int | None
) -> None:
    """The largest counts; nothing within a tenth; nothing without a measure."""
    found = recommend(wanted, sample, current=4)
    assert (None if found is None else found.replicas) == replicas


def test_more_at_once_fewer_after_the_cool_down() -> None:
    """The most that was recommended within the cool-down stands."""
    stable = Stabilizer()

    def settle(now: float, to: int, current: int) -> int | None:
        found = stable.settle(now, Recommendation(to, "why"), current, 60)
        return None if found is None else found.replicas

    assert settle(0, 8, 4) == 8
    assert settle(10, 2, 8) is None
    assert settle(50, 3, 8) is None
    assert settle(61, 2, 8) == 3, "the recommendation of 8 has left the window"
    assert settle(62, 2, 3) is None, "that of 3 has not"
    assert settle(111, 2, 3) == 2
    assert settle(112, 9, 2) == 9


def test_nothing_is_taken_away_before_a_whole_cool_down_was_seen() -> None:
    """A new leader begins anew."""
    stable = Stabilizer()
    assert stable.settle(0, Recommendation(1, "why"), 5, 60) is None
    assert stable.settle(59, Recommendation(1, "why"), 5, 60) is None
    found = stable.settle(60, Recommendation(1, "why"), 5, 60)
    assert found is not None
    assert found.replicas == 1


@given(
    st.integers(1, 20), st.floats(0, 1e6), st.integers(1, 30), st.integers(1, 8), st.integers(8, 40)
)
def test_a_recommendation_is_within_the_limits_and_stands_when_followed(
    running: int, backlog: float, target: int, least: int, most: int
) -> None:
    """With as many replicas as recommended and the same work, nothing else is recommended."""
    wanted = Autoscale(min=least, max=most, backlog=target)
    found = recommend(wanted, Sample(running, backlog=backlog), running)
    assert found is not None
    assert least <= found.replicas <= most
    again = recommend(wanted, Sample(found.replicas, backlog=backlog), found.replicas)
    assert again is not None
    if abs(backlog / running / target - 1) > 0.1:
        assert again.replicas == found.replicas


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min": 5, "max": 2, "cpu": 0.5}, "more than max"),
        ({"max": 5}, "nothing to go by"),
        ({"max": 5, "metric": "jobs"}, "belong together"),
        ({"max": 5, "cpu": 50}, "less than or equal to 1"),
        ({"max": 5, "cpu": 0.5, "min": 0}, "greater than or equal to 1"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], says: str) -> None:
    """And says why."""
    with pytest.raises(ValidationError, match=says):
        Autoscale(**fields)


def test_a_single_agent_does_not_scale() -> None:
    """Its id has no number."""
    with pytest.raises(ValidationError, match="needs replicas"):
        Deployment(name="a", spec=AgentSpec(run="m:C"), autoscale=policy(cpu=0.5))
