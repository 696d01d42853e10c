"""What a node says about itself: `NodeRecord` in the ``nodes`` bucket, `Heartbeat` and its echo on core subjects.

Pure. A restarted node is a new node: every identity carries its incarnation,
higher is newer.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from foundation_schemas.base import Capability, NodeId, WireModel


class NodeStatus(StrEnum):
    """The words for a node's condition; part of the contract."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"
    DRAINING = "draining"


class Load(WireModel):
    """How busy a node is, as of its last heartbeat."""

    cpu: float = 0.0
    """Share of the machine in use, 0 to 1."""
    memory: float = 0.0
    """Share of the machine in use, 0 to 1."""
    agents: int = 0
    backlog: int = 0
    """Signals received and not yet handled."""
    lag_ms: float = 0.0
    """Worst event-loop lag of its workers."""


class NodeRecord(WireModel):
    """A member of the cluster."""

    name: NodeId
    incarnation: int
    workers: list[str] = Field(default_factory=list)
    """Ids of its worker processes, each answering on its own control subject."""
    capabilities: list[Capability] = Field(default_factory=list)
    """What the node offers."""
    labels: dict[str, str] = Field(default_factory=dict)
    capacity: dict[str, float] = Field(default_factory=dict)
    host: str = ""
    pid: int = 0
    version: str = ""
    started_at: str = ""
    ended: bool = False
    """This life was declared over: it comes back under a higher incarnation or not at all."""
    short_lives: int = 0
    """How many lives in a row ended soon after they had begun, the last one included."""
    cordoned: bool = False
    """It keeps the agents it has and gets no new ones."""
    cordon_reason: str = ""
    """Who or what wants it so, for people."""


class Heartbeat(WireModel):
    """Proof of life, twice a second."""

    node: NodeId
    incarnation: int
    beat: int
    sent_at: float
    """The sender's own monotonic clock, handed back by the echo; nobody else may compare it."""
    draining: bool = False
    left: bool = False
    """The last words of a node that stops in good order."""
    load: Load = Load()
    distrusted: bool = False
    """Said when asked for: its last lives were short, and this one is young."""
    hears: list[str] | None = None
    """The other nodes whose heartbeats reach the sender; None: as it last said."""


class Echo(WireModel):
    """The leader's answer to a heartbeat: what an activation's right to answer rests on."""

    node: NodeId
    incarnation: int
    beat: int
    sent_at: float
    verdict: NodeStatus
    leader: NodeId
    term: int
