"""What an operator wants of nodes: `Cordon` and `RebalanceRecord`, in the bucket ``settings``.

Pure. A cordon belongs to the node's name, not to one of its lives. A rebalance
is a list of moves, written down before the first is made: who carries it out
reads off the agents' records how far it has come, so that any leader finishes it.
"""

from __future__ import annotations

from pydantic import Field

from foundation_schemas.base import AgentId, NodeId, WireModel


class Cordon(WireModel):
    """The node gets no new agents; with `drain` it loses those it has, too."""

    node: NodeId
    reason: str = ""
    at: str = ""
    drain: bool = False
    force: bool = False
    """Agents that fit nowhere else are stopped and wait, instead of staying."""
    drained_at: str | None = None
    """When the node was first seen to be empty."""


class PlannedMove(WireModel):
    """One agent of a rebalance."""

    agent: AgentId
    source: NodeId
    target: NodeId
    epoch: int
    """Under which it runs on its source: under any other one the move is out of date."""
    why: str = ""


class RebalanceRecord(WireModel):
    """One rebalance, from its plan to its result."""

    id: str
    strategy: str
    by: str = ""
    at: str = ""
    moves: list[PlannedMove] = Field(default_factory=list)
    finished_at: str | None = None
    moved: int = 0
    skipped: dict[str, str] = Field(default_factory=dict)
    """Agents that were not moved after all, to the reason; the first few."""
