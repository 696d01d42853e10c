"""Rollouts: when a change is done, when it has failed, and what is gone back to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats.control.rollouts import (
    FAILURES_MAX,
    Decision,
    Finish,
    GiveUp,
    Phase,
    RollBack,
    adopted,
    decide,
    rollout_of,
    succeeding,
    target_of,
    with_replicas_kept,
)
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Autoscale,
    Deployment,
    RevisionOutcome,
    UpdatePolicy,
)
from foundation_schemas.deployment import REVISIONS_MAX

AT = "2026-01-01T00:00:00Z"


def spec(version: int) -> AgentSpec:
    """One of many specs."""
    return AgentSpec(run="m:C", config={"version": version})


def wish(version: int = 1, replicas: int = 4, **fields: Any) -> Deployment:
    """A deployment of this version."""
    return Deployment(name="a", replicas=replicas, spec=spec(version), **fields)


def record(number: int, version: int, status: str = "running", **fields: Any) -> AgentRecord:
    """The record of one replica."""
    return AgentRecord(
        id=f"a-{number}",
        deployment="a",
        status=AgentStatus(status),
        node="n1",
        spec=spec(version),
        digest=spec(version).digest(),
        **fields,
    )


CHANGED = succeeding(wish(1), wish(2).model_copy(update={"revision": 1}), at=AT)
"""From version 1 to version 2."""


def test_a_changed_spec_begins_a_rollout_and_is_remembered() -> None:
    """The revision grows, the earlier spec is kept."""
    assert CHANGED.revision == CHANGED.spec_revision == 2
    assert CHANGED.rolling
    (old,) = CHANGED.history
    assert (old.revision, old.spec, old.outcome) == (1, spec(1), RevisionOutcome.SUPERSEDED)


def test_other_changes_begin_none() -> None:
    """Scaling and pausing keep the history, the phase and the spec's revision."""
    scaled = succeeding(CHANGED, CHANGED.model_copy(update={"replicas": 9}), at=AT)
    assert scaled.revision == 3
    assert scaled.spec_revision == 2
    assert scaled.history == CHANGED.history
    paused = succeeding(scaled, scaled.model_copy(update={"paused": True}), at=AT)
    assert paused.paused
    assert paused.rolling


def test_a_wish_from_outside_keeps_what_has_become_of_the_one_before() -> None:
    """A manifest knows nothing of histories."""
    again = succeeding(CHANGED, adopted(CHANGED, wish(2, replicas=5)), at=AT)
    assert again.replicas == 5
    assert again.history == CHANGED.history
    assert again.spec_revision == 2


def test_the_history_is_bounded() -> None:
    """The oldest specs are forgotten."""
    current = wish(0)
    for version in range(1, REVISIONS_MAX + 5):
        current = succeeding(current, adopted(current, wish(version)), at=AT)
    assert len(current.history) == REVISIONS_MAX
    assert current.history[-1].spec == spec(REVISIONS_MAX + 3)


def test_a_deployment_that_scales_itself_keeps_its_replicas() -> None:
    """Within the new limits; one that does not gets what is wished for."""
    scaling = Autoscale(min=2, max=8, backlog=10)
    before = wish(1, replicas=6, autoscale=scaling)
    assert with_replicas_kept(before, wish(1, 3, autoscale=scaling)).replicas == 6
    narrow = Autoscale(min=2, max=5, backlog=10)
    assert with_replicas_kept(before, wish(1, 3, autoscale=narrow)).replicas == 5
    assert with_replicas_kept(before, wish(1, 3)).replicas == 3


@pytest.mark.parametrize(
    ("records", "phase", "updated", "outdated"),
    [
        ([record(i, 2) for i in range(4)], Phase.COMPLETE, 4, 0),
        ([record(0, 2), *(record(i, 1) for i in range(1, 4))], Phase.PROGRESSING, 1, 3),
        ([record(i, 2) for i in range(3)], Phase.PROGRESSING, 3, 0),
        ([record(i, 2, desired="stop") for i in range(4)], Phase.PROGRESSING, 0, 0),
        (
            [record(0, 2, "failed", failures=1, reason="no"), record(1, 1)],
            Phase.STUCK,
            0,
            1,
        ),
        ([record(7, 2)], Phase.PROGRESSING, 0, 0),
    ],
    ids=["all", "one of four", "one not there", "being stopped", "failing", "left over"],
)
def test_where_a_rollout_stands(
    records: list[AgentRecord], phase: Phase, updated: int, outdated: int
) -> None:
    """By the records of its agents."""
    found = rollout_of(CHANGED, records)
    assert (found.phase, found.updated, found.outdated) == (phase, updated, outdated)


FAILED = [record(0, 2, "failed", failures=FAILURES_MAX, reason="boom"), record(1, 1)]


@pytest.mark.parametrize(
    ("deployment", "records", "idle_s", "kind"),
    [
        (CHANGED, [record(i, 2) for i in range(4)], 0.0, Finish),
        (CHANGED, [record(0, 2), record(1, 1)], 1.0, type(None)),
        (CHANGED, [record(0, 2), record(1, 1)], 120.0, RollBack),
        (CHANGED, FAILED, 0.0, RollBack),
        (CHANGED, [record(0, 1, "failed", failures=9), record(1, 2)], 0.0, type(None)),
        (CHANGED.model_copy(update={"paused": True}), FAILED, 500.0, type(None)),
        (CHANGED.model_copy(update={"history": []}), FAILED, 0.0, GiveUp),
        (CHANGED.model_copy(update={"rolled_back": "why"}), FAILED, 0.0, GiveUp),
        (CHANGED.model_copy(update={"update": UpdatePolicy(rollback=False)}), FAILED, 0.0, GiveUp),
        (CHANGED.model_copy(update={"history": [], "stuck": "why"}), FAILED, 0.0, type(None)),
    ],
    ids=[
        "done", "under way", "no progress", "failures", "failures of the old spec", "paused",
        "nothing before", "the way back fails", "not wanted", "told already",
    ],
)  # fmt: skip
def test_what_is_done_about_it(
    deployment: Deployment, records: list[AgentRecord], idle_s: float, kind: type[Decision]
) -> None:
    """Finish, go back, give up, or go on."""
    found = decide(deployment, rollout_of(deployment, records), records, idle_s=idle_s)
    assert type(found) is kind
    if isinstance(found, RollBack):
        assert found.to.spec == spec(1)
        assert found.reason


def test_a_failed_spec_is_not_gone_back_to() -> None:
    """1 → 2 fails → 1 → 3 fails: back to 1, not to 2."""
    back = succeeding(CHANGED, CHANGED.model_copy(update={"spec": spec(1)}), at=AT, failed="boom")
    assert back.rolled_back == "boom"
    assert back.history[-1].outcome is RevisionOutcome.FAILED
    third = succeeding(back, adopted(back, wish(3)), at=AT)
    assert third.rolled_back is None
    target = target_of(third)
    assert target is not None
    assert target.spec == spec(1)
    named = target_of(third, 2)
    assert named is not None
    assert named.spec == spec(2)
    assert target_of(third, 77) is None


@given(
    versions=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30),
)
def test_revisions_grow_and_history_tells_every_earlier_spec(
    versions: list[tuple[int, bool]],
) -> None:
    """Whatever is wished for, and whatever fails."""
    current = wish(0)
    specs = [0]
    for version, failed in versions:
        after = succeeding(
            current, adopted(current, wish(version)), at=AT, failed="no" if failed else None
        )
        assert after.revision == current.revision + 1
        if version != specs[-1]:
            assert after.history[-1].spec == spec(specs[-1])
            specs.append(version)
        else:
            assert after.history == current.history
        target = target_of(after)
        assert target is None or target.spec != after.spec
        current = after


@pytest.mark.parametrize(
    ("limit", "replicas", "budget"),
    [(1, 10, 1), (3, 10, 3), ("25%", 10, 2), ("25%", 3, 1), ("100%", 7, 7)],
)
def test_how_many_may_be_away(limit: int | str, replicas: int, budget: int) -> None:
    """A number, or a share of all, rounded down; at least one."""
    assert UpdatePolicy(max_unavailable=limit).budget(replicas) == budget
