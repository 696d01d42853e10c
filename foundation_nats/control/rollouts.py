"""How far a changed spec has come, and whether to call it done, or to go back.

Pure. The planner restarts agents a few at a time (`planner._roll`); this looks at
the result. A change is *complete* when every wished agent runs the wished spec. It has
*failed* when an agent of the new spec failed to start several times, or when no
further agent got ready for `UpdatePolicy.progress_deadline_s`. Then the wish goes
back to the newest earlier spec that had not failed itself, once: a way back that
fails, too, stays as it is, for a person to look at.

Who restarts the agents of a rolled-back wish is the planner again: going back is a
change like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    Deployment,
    Revision,
    RevisionOutcome,
)
from foundation_schemas.deployment import REVISIONS_MAX

FAILURES_MAX = 3
"""Failed starts in a row of one agent under the new spec."""
REASONS_MAX = 10


class Phase(StrEnum):
    """Where a rollout stands."""

    COMPLETE = "complete"
    PROGRESSING = "progressing"
    PAUSED = "paused"
    STUCK = "stuck"
    """Some of the new spec don't start."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A deployment's passage to its present spec."""

    name: str
    revision: int
    """In which the spec changed."""
    phase: Phase
    desired: int
    updated: int
    """Agents that run the wished spec."""
    outdated: int
    """Agents that run another one."""
    failing: dict[str, str] = field(default_factory=dict)
    """Agent of the new spec to why it does not start; the first few."""
    rolled_back: str | None = None
    stuck: str | None = None


def rollout_of(deployment: Deployment, records: Iterable[AgentRecord]) -> Rollout:
    """Look at the records of *deployment*'s agents."""
    digest = deployment.spec.digest()
    wanted = set(deployment.agent_ids())
    updated = outdated = 0
    failing: dict[str, str] = {}
    for record in records:
        if record.id not in wanted:
            continue
        runs = record.status in (AgentStatus.RUNNING, AgentStatus.HIBERNATED)
        finished = record.status is AgentStatus.STOPPED and deployment.spec.restart != "permanent"
        if record.digest != digest:
            outdated += runs
        elif (runs and record.desired == "run") or finished:
            updated += 1
        elif record.failures and len(failing) < REASONS_MAX:
            failing[record.id] = record.reason or f"is {record.status}"
    if updated >= deployment.size():
        phase = Phase.COMPLETE
    elif deployment.paused:
        phase = Phase.PAUSED
    else:
        phase = Phase.STUCK if failing else Phase.PROGRESSING
    return Rollout(
        deployment.name,
        deployment.spec_revision,
        phase,
        deployment.size(),
        updated,
        outdated,
        failing,
        deployment.rolled_back,
        deployment.stuck,
    )


@dataclass(frozen=True, slots=True)
class Finish:
    """Every agent runs the wished spec."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """The change has failed: wish for an earlier spec again."""

    to: Revision
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The change has failed, and there is nothing to go back to, or nobody wants to."""

    reason: str


Decision = Finish | RollBack | GiveUp | None


def decide(
    deployment: Deployment,
    rollout: Rollout,
    records: Iterable[AgentRecord],
    *,
    idle_s: float,
) -> Decision:
    """What to do about a rolling deployment now; None: go on.

    Args:
        idle_s: since when no further agent has got ready, in seconds.
    """
    if rollout.phase is Phase.COMPLETE:
        return Finish()
    if deployment.paused:
        return None
    digest = deployment.spec.digest()
    worst = max(
        (record for record in records if record.digest == digest),
        key=lambda record: record.failures,
        default=None,
    )
    if worst is not None and worst.failures >= FAILURES_MAX:
        why = f"{worst.id} failed to start {worst.failures} times: {worst.reason or 'no reason'}"
    elif idle_s >= deployment.update.progress_deadline_s:
        left = rollout.desired - rollout.updated
        first = next(iter(rollout.failing.items()), None)
        why = f"{left} of {rollout.desired} agents did not get ready within {idle_s:.0f} s"
        if first is not None:
            why += f" ({first[0]}: {first[1]})"
    else:
        return None
    target = target_of(deployment)
    if not deployment.update.rollback or deployment.rolled_back is not None or target is None:
        return None if deployment.stuck is not None else GiveUp(why)
    return RollBack(target, why)


def target_of(deployment: Deployment, revision: int | None = None) -> Revision | None:
    """The earlier spec to go back to: *revision*, or the newest that had not failed."""
    for item in reversed(deployment.history):
        if revision is None:
            if item.outcome is not RevisionOutcome.FAILED and item.spec != deployment.spec:
                return item
        elif item.revision == revision:
            return item
    return None


def adopted(before: Deployment, wish: Deployment) -> Deployment:
    """A wish from outside with what has become of the wish before it."""
    kept = (
        "revision", "spec_revision", "rolling", "paused", "rolled_back", "stuck", "history",
    )  # fmt: skip
    return wish.model_copy(update={name: getattr(before, name) for name in kept})


def succeeding(
    before: Deployment, after: Deployment, *, at: str, failed: str | None = None
) -> Deployment:
    """*after*, made of *before*, with the next revision, and with its history if the spec differs.

    Args:
        failed: why the spec of *before* is given up; None: it is superseded.
    """
    revision = before.revision + 1
    if before.spec == after.spec:
        return after.model_copy(update={"revision": revision})
    old = Revision(
        revision=before.spec_revision,
        spec=before.spec,
        outcome=RevisionOutcome.SUPERSEDED if failed is None else RevisionOutcome.FAILED,
        reason=failed,
        at=at,
    )
    return after.model_copy(
        update={
            "revision": revision,
            "spec_revision": revision,
            "rolling": True,
            "paused": False,
            "rolled_back": failed,
            "stuck": None,
            "history": [*before.history, old][-REVISIONS_MAX:],
        }
    )


def with_replicas_kept(before: Deployment, after: Deployment) -> Deployment:
    """*after* with the replicas that *before* has, if it scales itself: within the new limits."""
    limits = after.autoscale
    if limits is None or before.autoscale is None or before.replicas is None:
        return after
    kept = min(limits.max, max(limits.min, before.replicas))
    return after.model_copy(update={"replicas": kept})
