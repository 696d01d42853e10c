"""May this agent run on that node? If not, why: in words that don't change while the answer doesn't.

Pure. Two kinds of questions: what a node *is* (status, capabilities, labels),
which holds for a whole pass, and what is *left* of its declared capacity,
which shrinks with each placement of the pass.

A resource that an agent needs and a node doesn't declare is not there: the
node doesn't qualify. ``slots`` is the exception: every agent takes one unless
it says otherwise, and only nodes that declare ``slots`` count them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from foundation_nats.cluster.view import NodeView
from foundation_schemas import AgentSpec, NodeStatus

SLOTS = "slots"
OVERLOADED = 0.95
"""A node whose memory is used to this share comes last, whatever the strategy.

The processor's share only ranks (`strategies.base_pressure`): it swings between two
heartbeats, and a threshold on it would send a whole deployment to one node.
"""

_ROUNDING = 1e-9


@dataclass(slots=True)
class Usage:
    """What records take of one node; `place` counts its own decisions into it."""

    agents: int = 0
    resources: dict[str, float] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    """Agents of each deployment on the node, for spreading."""

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


def needs(spec: AgentSpec) -> dict[str, float]:
    """What an agent takes of its node: its resources, and one slot unless it says otherwise."""
    return {SLOTS: 1.0, **spec.resources}


def is_overloaded(node: NodeView) -> bool:
    """Whether the node should get nothing while another one qualifies."""
    return node.load.memory >= OVERLOADED


def unfit(spec: AgentSpec, node: NodeView) -> str | None:
    """Why *node* can't host *spec*, however empty it is; None if it can."""
    if node.status is not NodeStatus.UP:
        return f"is {node.status}"
    record, policy = node.record, spec.placement
    missing = [name for name in policy.require if name not in record.capabilities]
    if missing:
        return f"lacks the capability {', '.join(missing)}"
    for label, wanted in policy.labels.items():
        found = record.labels.get(label)
        if found is None:
            return f"has no label {label} (needs {label}={wanted})"
        if found != wanted:
            return f"has {label}={found} (needs {label}={wanted})"
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
