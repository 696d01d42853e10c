"""An agent's stored record never goes back, and no epoch has two writers (invariants 3 and 4).

What a watch saw may skip revisions, so only what holds between any two is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foundation_nats.chaos.checkers.judgement import Judgement


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """One revision of an agent's state record."""

    agent: str
    revision: int
    epoch: int
    commit: int
    cursor: int
    writer: str
    """Worker and incarnation."""


@dataclass(frozen=True, slots=True)
class AssignmentSeen:
    """One revision of an agent's registry record; a deleted one has epoch 0."""

    agent: str
    revision: int
    epoch: int
    node: str | None
    incarnation: int
    status: str
    resources: tuple[tuple[str, float], ...] = ()
    at_ns: int = 0


def check_records(seen: Iterable[RecordSeen]) -> Judgement:
    """State records of all agents, each agent's in order of revision."""
    judgement = Judgement("records", 3)
    last: dict[str, RecordSeen] = {}
    for now in seen:
        judgement.looked_at += 1
        before = last.get(now.agent)
        last[now.agent] = now
        if before is None:
            continue
        where = f"{now.agent} at revision {now.revision}"
        if now.epoch < before.epoch:
            judgement.violated(f"{where}: epoch {before.epoch} became {now.epoch}")
        if now.cursor < before.cursor:
            judgement.violated(f"{where}: cursor {before.cursor} became {now.cursor}")
        if now.commit <= before.commit:
            judgement.violated(f"{where}: commit {before.commit} was followed by {now.commit}")
        if now.epoch == before.epoch and now.writer != before.writer:
            judgement.violated(
                f"{where}: {before.writer} and {now.writer} both wrote in epoch {now.epoch}"
            )
    return judgement


def check_assignments(seen: Iterable[AssignmentSeen]) -> Judgement:
    """Registry records: an epoch never goes back, and names one node for good."""
    judgement = Judgement("assignments", 4)
    epochs: dict[str, int] = {}
    homes: dict[tuple[str, int], tuple[str, int]] = {}
    for now in seen:
        judgement.looked_at += 1
        if now.epoch == 0:
            continue  # deleted; if it comes back, then above its old epoch
        before = epochs.get(now.agent, 0)
        if now.epoch < before:
            judgement.violated(f"{now.agent}: epoch {before} became {now.epoch}")
        epochs[now.agent] = max(before, now.epoch)
        if now.node is None:
            continue
        home = homes.setdefault((now.agent, now.epoch), (now.node, now.incarnation))
        if home != (now.node, now.incarnation):
            judgement.violated(
                f"{now.agent}: epoch {now.epoch} was given to {home} and to "
                f"{(now.node, now.incarnation)}"
            )
    return judgement
