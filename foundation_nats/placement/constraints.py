"""May this agent run on that node? If not, why: in words that don't change while the answer doesn't.

Pure. Three kinds of questions: what a node *is* (status, cordon, capabilities,
labels), which holds for a whole pass (`unfit`); what is *left* of its declared
capacity (`full`) and of its share of a deployment (`crowded`), which shrinks
with each placement of the pass; and whether a replica more would *skew* a
deployment over the values of a label (`skewed`), which a placement elsewhere
can put right.

A resource that an agent needs and a node doesn't declare is not there: the
node doesn't qualify. ``slots`` is the exception: every agent takes one unless
it says otherwise, and only nodes that declare ``slots`` count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from foundation_nats.cluster.view import NodeView
from foundation_schemas import AgentSpec, NodeStatus, PlacementPolicy, parse_expression

SLOTS = "slots"
_ROUNDING = 1e-9


@dataclass(slots=True)
class Usage:
    """What records take of one node; `place` counts its own decisions into it."""

    agents: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    """Agents of each deployment on the node."""

    def add(self, spec: AgentSpec, group: str | None, count: int = 1) -> None:
        """Count *count* agents of *spec*."""
        self.agents += count
        for name, amount in needs(spec).items():
            self.resources[name] = self.resources.get(name, 0.0) + amount * count
        if group is not None:
            self.groups[group] = self.groups.get(group, 0) + count

    def copy(self) -> Usage:
        """A usage that can be counted on without changing this one."""
        return Usage(self.agents, dict(self.resources), dict(self.groups))


class Tally:
    """What nodes hold while decisions are made: per node, and per deployment and label value.

    It copies what it is given, and counts up and down.
    """

    __slots__ = ("_nodes", "_values", "used")

    def __init__(self, nodes: Mapping[str, NodeView], used: Mapping[str, Usage]) -> None:
        self._nodes = nodes
        self.used = {name: used[name].copy() if name in used else Usage() for name in nodes}
        self._values: dict[str, dict[str, dict[str, int]]] = {}

    def values(self, group: str, label: str) -> dict[str, int]:
        """Agents of *group* per value of *label*; kept up to date, not to be changed."""
        labels = self._values.setdefault(group, {})
        counts = labels.get(label)
        if counts is None:
            counts = labels[label] = {}
            for name, node in self._nodes.items():
                value = node.record.labels.get(label, "")
                counts[value] = counts.get(value, 0) + self.used[name].groups.get(group, 0)
        return counts

    def count(self, name: str, needed: Mapping[str, float], group: str | None, by: int = 1) -> None:
        """Count an agent of *group* that takes *needed* on the node *name*; −1: it is gone."""
        usage = self.used[name]
        usage.agents += by
        for resource, amount in needed.items():
            usage.resources[resource] = usage.resources.get(resource, 0.0) + amount * by
        if group is None:
            return
        usage.groups[group] = usage.groups.get(group, 0) + by
        labels = self._values.get(group)
        if labels:
            carried = self._nodes[name].record.labels
            for label, counts in labels.items():
                value = carried.get(label, "")
                counts[value] = counts.get(value, 0) + by


def needs(spec: AgentSpec) -> dict[str, float]:
    """What an agent takes of its node: its resources, and one slot unless it says otherwise."""
    return {SLOTS: 1.0, **spec.resources}


def unfit(spec: AgentSpec, node: NodeView) -> str | None:
    """Why *node* can't host *spec*, however empty it is; None if it can."""
    if node.status is not NodeStatus.UP:
        return f"is {node.status}"
    record, policy = node.record, spec.placement
    if record.cordoned:
        return f"is cordoned ({record.cordon_reason})" if record.cordon_reason else "is cordoned"
    missing = [name for name in policy.require if name not in record.capabilities]
    if missing:
        return f"lacks the capability {', '.join(missing)}"
    for label, wanted in policy.labels.items():
        found = record.labels.get(label)
        if found is None:
            return f"has no label {label} (needs {label}={wanted})"
        if found != wanted:
            return f"has {label}={found} (needs {label}={wanted})"
    for text in policy.expressions:
        reason = parse_expression(text).why_not(record.labels)
        if reason is not None:
            return reason
    apart = policy.anti_affinity
    if isinstance(apart, str) and apart not in record.labels:
        return f"has no label {apart} (anti_affinity is by {apart})"
    spread = policy.spread_label
    if policy.skew_max is not None and spread not in record.labels:
        return f"has no label {spread} (spread is by {spread})"
    for name, amount in spec.resources.items():
        if name == SLOTS or amount <= 0:
            continue
        if name not in record.capacity:
            return f"does not offer {name} (needs {amount:g})"
    for name, amount in needs(spec).items():
        capacity = record.capacity.get(name)
        if capacity is not None and amount > capacity + _ROUNDING:
            return f"offers {capacity:g} {name} in all (needs {amount:g})"
    return None


def full(needed: Mapping[str, float], node: NodeView, usage: Usage) -> str | None:
    """Which resource of *node* is used up for an agent that takes *needed*; None if there is room."""
    capacity = node.record.capacity
    if not capacity:
        return None
    for name, amount in needed.items():
        offered = capacity.get(name)
        if offered is None or amount <= 0:
            continue
        if usage.resources.get(name, 0.0) + amount > offered + _ROUNDING:
            return f"has too little {name} left of {offered:g} (needs {amount:g})"
    return None


def crowded(policy: PlacementPolicy, group: str, node: NodeView, tally: Tally) -> str | None:
    """Why *node* can't take one more replica of *group*; None if it can."""
    if policy.max_per_node is None and policy.anti_affinity is False:
        return None
    held = tally.used[node.name].groups.get(group, 0)
    if policy.max_per_node is not None and held >= policy.max_per_node:
        return f"has its {policy.max_per_node} of the deployment (max_per_node)"
    apart = policy.anti_affinity
    if apart is True and held:
        return "has a replica of the deployment (anti_affinity)"
    if isinstance(apart, str):
        value = node.record.labels.get(apart, "")
        if tally.values(group, apart).get(value, 0):
            return f"is in {apart}={value}, which has a replica of the deployment (anti_affinity)"
    return None


def skewed(
    policy: PlacementPolicy, value: str, counts: Mapping[str, int], open_values: Iterable[str]
) -> str | None:
    """Why one more replica may not go to this *value* of the spread's label; None if it may.

    The fullest value may exceed the emptiest by the policy's skew. Only values
    of which some node qualifies count as the emptiest: a zone that is down
    must not keep the agents that it lost from starting elsewhere.
    """
    most = policy.skew_max
    if most is None:
        return None
    least = min([counts.get(other, 0) for other in open_values], default=0)
    if counts.get(value, 0) + 1 - least <= most:
        return None
    label = policy.spread_label
    return f"is in {label}={value}, which has its share of the deployment (max_skew {most})"
