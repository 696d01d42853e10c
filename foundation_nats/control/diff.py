"""What applying wishes would change, and where new agents would go: the text of ``--plan``.

Pure. `diff` compares wishes with wishes. `preview` also asks the planner, so
that what is shown is what the leader would decide with the same view; by the
time it is applied the view may be another one.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import Assign, MarkPending
from foundation_nats.control.planner import plan
from foundation_nats.control.rollouts import with_replicas_kept
from foundation_schemas import Deployment, NodeStatus, ReservationRecord


class ChangeKind(StrEnum):
    """What happens to a deployment."""

    ADDED = "+"
    REMOVED = "-"
    CHANGED = "~"
    SAME = "="


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field of a deployment that differs; None: absent."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class DeploymentChange:
    """One deployment and what happens to it."""

    name: str
    kind: ChangeKind
    fields: tuple[FieldChange, ...] = ()
    before: Deployment | None = None
    after: Deployment | None = None

    @property
    def restarts(self) -> bool:
        """Whether its running agents are restarted, a quarter at a time."""
        return any(change.name not in _NO_RESTART for change in self.fields)


@dataclass(frozen=True, slots=True)
class Preview:
    """Changes, and where the agents that need a node would go."""

    changes: tuple[DeploymentChange, ...]
    placements: Mapping[str, str] = field(default_factory=dict)
    """Agent to node."""
    unplaceable: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Agent to the reason per node."""
    restarting: Mapping[str, str] = field(default_factory=dict)
    """Agents that get another spec, to the node on which they run: they are restarted there."""
    leaving: Mapping[str, str] = field(default_factory=dict)
    """Agents that nobody would want any more, to the node on which they run."""
    nodes_up: int = 0
    """How many nodes are up …"""
    min_nodes: int = 0
    """… and how many a deploy would wait for."""
    dropped: tuple[str, ...] = ()
    """Deployments that the manifest had applied and names no more; they stay, as it isn't to prune."""


_KEPT = {
    "name", "manifest", "revision", "spec", "spec_revision", "rolling", "paused", "rolled_back", "stuck", "history",
}  # fmt: skip
"""Not wished for, but whose wishes they are, and what has become of them."""
_NO_RESTART = ("replicas", "standalone", "update", "autoscale", "tier")


def _flat(deployment: Deployment) -> dict[str, Any]:
    values = deployment.model_dump(mode="json", exclude=_KEPT)
    for key, value in deployment.spec.model_dump(mode="json").items():
        if key == "placement":
            values.update({f"placement.{name}": item for name, item in value.items()})
        else:
            values[key] = value
    return values


def changed_fields(before: Deployment, after: Deployment) -> tuple[FieldChange, ...]:
    """The fields in which two wishes differ, in the order of the model."""
    old, new = _flat(before), _flat(after)
    return tuple(
        FieldChange(name, old.get(name), new.get(name))
        for name in new
        if old.get(name) != new.get(name)
    )


def taken_over(changes: Sequence[DeploymentChange]) -> list[Deployment]:
    """What is as it was wished already, by another manifest: from now on it is this one's."""
    return [
        change.after
        for change in changes
        if change.kind is ChangeKind.SAME
        and change.before is not None
        and change.after is not None
        and change.before.manifest != change.after.manifest
    ]


def diff(
    current: Mapping[str, Deployment],
    wanted: Sequence[Deployment],
    *,
    prune: Collection[str] = (),
) -> list[DeploymentChange]:
    """What changes if *wanted* is applied, in its order, removals last.

    A deployment that *wanted* doesn't name stays, unless the manifest that applied it is one of
    *prune*. What was started by itself (`agents.start`) stays in any case.
    """
    changes: list[DeploymentChange] = []
    for wish in wanted:
        before = current.get(wish.name)
        if before is None:
            changes.append(DeploymentChange(wish.name, ChangeKind.ADDED, (), None, wish))
            continue
        after = with_replicas_kept(before, wish)
        fields = changed_fields(before, after)
        kind = ChangeKind.CHANGED if fields else ChangeKind.SAME
        changes.append(DeploymentChange(after.name, kind, fields, before, after))
    changes += [
        DeploymentChange(name, ChangeKind.REMOVED, (), current[name], None)
        for name in dropped(current, wanted, prune)
    ]
    return changes


def dropped(
    current: Mapping[str, Deployment], wanted: Sequence[Deployment], manifests: Collection[str]
) -> list[str]:
    """What these manifests had applied and *wanted* doesn't name, by name."""
    names = {deployment.name for deployment in wanted}
    return [
        name
        for name in sorted(current)
        if name not in names
        and not current[name].standalone
        and current[name].manifest in manifests
    ]


def preview(
    current: Mapping[str, Deployment],
    wanted: Sequence[Deployment],
    held: Mapping[str, Held],
    nodes: Mapping[str, NodeView],
    config: ControlConfig,
    *,
    prune: Collection[str] = (),
    leader: str | None = None,
    seed: int = 0,
    min_nodes: int = 0,
    reservations: Mapping[str, Sequence[ReservationRecord]] | None = None,
) -> Preview:
    """`diff`, and for each agent that it concerns the node that it would get, keep or leave.

    *reservations*, node to those that count, are taken from what the nodes have to give.
    """
    changes = diff(current, wanted, prune=prune)
    after = dict(current)
    for change in changes:
        if change.after is None:
            after.pop(change.name, None)
        else:
            after[change.name] = change.after
    found = plan(
        after,
        held,
        nodes,
        0.0,
        config,
        leader,
        random.Random(seed),
        commands_max=None,
        reservations=reservations,
    )
    placements: dict[str, str] = {}
    unplaceable: dict[str, Mapping[str, str]] = {}
    for command in found.commands:
        if isinstance(command, Assign) and command.record.node is not None:
            placements[command.agent] = command.record.node
        elif isinstance(command, MarkPending):
            unplaceable[command.agent] = command.reasons
    wished = {agent for wish in after.values() for agent in wish.agent_ids()}
    leaving: dict[str, str] = {}
    restarting: dict[str, str] = {}
    restarted = {change.name for change in changes if change.restarts}
    for agent, item in held.items():
        node, owner = item.record.node, item.record.deployment or agent
        if node is None or agent in placements:
            continue
        if agent not in wished:
            leaving[agent] = node
        elif owner in restarted:
            restarting[agent] = node
    up = sum(node.status is NodeStatus.UP for node in nodes.values())
    return Preview(tuple(changes), placements, unplaceable, restarting, leaving, up, min_nodes)
