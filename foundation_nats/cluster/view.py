"""What one process believes about the nodes now: a snapshot to ask by id, capability and status.

Pure. A view may be old: it says what this process has heard, not what is. Its
revision grows with every change of a status, of a record or of who hears whom,
so that two views of one process can be put in order; views of two processes can't.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foundation_schemas import Load, NodeRecord, NodeStatus

_IDLE = Load()


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as this process knows it."""

    record: NodeRecord
    status: NodeStatus
    load: Load = _IDLE
    heard: bool = True
    """Whether this incarnation was heard itself, not only read about."""
    flaps: bool = False
    """Its last lives were short, and this one is young: it gets agents only if no other can."""
    hears: frozenset[str] | None = None
    """The other nodes that this one last said it hears; None: it said nothing yet."""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.record.name

    @property
    def incarnation(self) -> int:
        """The node's life."""
        return self.record.incarnation

    @property
    def is_alive(self) -> bool:
        """Whether its activations must be taken to be running: anything but DOWN."""
        return self.status is not NodeStatus.DOWN


@dataclass(frozen=True, slots=True, eq=False)
class ClusterView:
    """The nodes at one moment; it never changes."""

    nodes: Mapping[str, NodeView]
    revision: int

    def get(self, name: str) -> NodeView | None:
        """The node of this name; None if there is none."""
        return self.nodes.get(name)

    def having(self, capability: str) -> list[NodeView]:
        """The nodes that offer *capability*, by name."""
        return [
            self.nodes[name]
            for name in sorted(self.nodes)
            if capability in self.nodes[name].record.capabilities
        ]

    def with_status(self, status: NodeStatus) -> list[NodeView]:
        """The nodes in this condition, by name."""
        return [
            self.nodes[name] for name in sorted(self.nodes) if self.nodes[name].status is status
        ]


def missing_node(name: str, incarnation: int) -> NodeView:
    """The view of a node that records name and nobody has heard of: it is down."""
    return NodeView(NodeRecord(name=name, incarnation=incarnation), NodeStatus.DOWN, heard=False)
