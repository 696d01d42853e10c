"""What one process believes about the nodes now: a snapshot to ask by id, capability and status.

Pure. A view may be old: it says what this process has heard, not what is. Its
revision grows with every change of a status or a record, so that two views of
one process can be put in order; views of two processes can't.
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


class ClusterView:
    """The nodes at one moment."""

    __slots__ = ("nodes", "revision")

    def __init__(self, nodes: Mapping[str, NodeView], revision: int) -> None:
        self.nodes = nodes
        self.revision = revision

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
