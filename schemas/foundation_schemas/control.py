"""Request and reply bodies of the node and worker control API, and `ErrorBody`.

Pure.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_schemas.agent import (
    AgentRecord,
    AgentStatus,
    NodeLoss,
    OnNodeLoss,
    PlacementPolicy,
    RateLimit,
    RestartLimit,
    Subscription,
)
from foundation_schemas.base import AgentId, NodeId, WireModel
from foundation_schemas.lease import LeaseRecord
from foundation_schemas.node import Load


class ErrorBody(WireModel):
    """An error that crossed the bus."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class Pong(WireModel):
    """The answer to a ping: who lives here."""

    name: str
    incarnation: int


class ProbeRequest(WireModel):
    """Can you reach this node? A second opinion before it is called down by silence."""

    node: str
    incarnation: int


class ProbeReply(WireModel):
    """What the asked node found."""

    reachable: bool


class RttRequest(WireModel):
    """How far are the server and these nodes from you?"""

    peers: list[NodeId] = Field(default_factory=list)
    timeout_s: float = 1.0


class RttReply(WireModel):
    """What a node measured just now, and what it believes."""

    node: str
    incarnation: int
    draining: bool = False
    load: Load = Load()
    server: str = ""
    """The name of the NATS server that it is connected to."""
    server_cluster: str = ""
    server_rtt_ms: float | None = None
    peers: dict[str, float | None] = Field(default_factory=dict)
    """Milliseconds until each answered; None: not in time."""
    hears: list[str] = Field(default_factory=list)
    """The other nodes whose heartbeats reach it."""
    leader: LeaseRecord | None = None
    """Who holds the lease, as it last saw."""
    gave_up: dict[str, int] = Field(default_factory=dict)
    """While it leads: the nodes that it holds to be down, and which life of theirs."""


class ValidateRequest(WireModel):
    """Can these classes be imported where you are?"""

    runs: list[str]


class ClassInfo(WireModel):
    """What a node found behind ``module:Class``."""

    run: str
    ok: bool
    error: str | None = None
    capabilities: list[str] = Field(default_factory=list)
    durable: bool = True
    critical: bool = False
    doc: str | None = None
    handles: list[str] = Field(default_factory=list)
    """Signal types it handles."""
    labels: dict[str, str] = Field(default_factory=dict)
    subscribe: list[Subscription] = Field(default_factory=list)
    resources: dict[str, float] = Field(default_factory=dict)
    placement: PlacementPolicy | None = None
    restart: str | None = None
    restart_limit: RestartLimit | None = None
    rate: RateLimit | None = None
    on_node_loss: OnNodeLoss | NodeLoss | None = None


class ValidateReply(WireModel):
    """One `ClassInfo` for each class asked about."""

    classes: list[ClassInfo]


class ReloadRequest(WireModel):
    """Run the workers of this node anew, with the code as it is now; the agents keep their state."""

    runs: list[str] = Field(default_factory=list)
    """Modules and classes (``module:Class``) that must be there: if one isn't, nothing is changed.
    Empty: the modules of the agents here."""
    patience_s: float = 2.0
    """How long a handler may take to its end before its worker is killed."""


class ReloadReply(WireModel):
    """The new workers are up."""

    workers: int
    agents: int
    """How many agents start again in them."""
    forced: list[str] = Field(default_factory=list)
    """Those of them that did not stop in time; a signal that they had in hand is handled again."""


class StartRequest(WireModel):
    """Manager to worker: activate these agents under the epochs their records name."""

    incarnation: int
    agents: list[AgentRecord]


class StopRequest(WireModel):
    """Manager to worker: stop these agents (id to epoch)."""

    agents: dict[str, int]
    reason: str = "stopped"
    targets: dict[str, str] = Field(default_factory=dict)
    """Where those that are moved go, as far as that is known."""


class AgentReport(WireModel):
    """Worker to manager: what became of one agent."""

    id: str
    epoch: int
    status: AgentStatus
    reason: str | None = None


class WorkerReport(WireModel):
    """Worker to manager, twice a second and after every change; repeated until acknowledged."""

    worker: str
    incarnation: int
    number: int
    changes: list[AgentReport] = Field(default_factory=list)
    consumed: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Agent to (cursor, signals consumed by this activation), for trimming; those that moved."""
    fingerprint: int = 0
    """Of what it has in memory, so that the manager sees when that is not what it should be."""
    load: Load = Load()
    counters: dict[str, int] = Field(default_factory=dict)
    """What it has done since it began."""
    breakers: dict[str, str] = Field(default_factory=dict)
    """Circuit breakers that have ever opened, to their states."""


class InspectReply(WireModel):
    """What a node or worker really has in memory, for checkers and `doctor`."""

    name: str
    incarnation: int
    agents: dict[str, int] = Field(default_factory=dict)
    """Agent id to epoch."""
    details: dict[str, Any] = Field(default_factory=dict)


class BrakeReply(WireModel):
    """What holds failover back after many nodes seemed dead at once, or slows it down."""

    node: NodeId
    """Who says so."""
    held: list[NodeId] = Field(default_factory=list)
    """Nodes that would be given up, were it not for the storm brake …"""
    held_for_s: float | None = None
    """… which ends by itself in so many seconds; None: it doesn't hold anything."""
    paced_for_s: float | None = None
    """For so long agents are still given out slowly; None: as fast as usual."""


class BusiestRequest(WireModel):
    """Which of your agents have most to do?"""

    limit: int = Field(default=20, ge=0, le=1000)


class AgentLoad(WireModel):
    """How busy one agent is."""

    id: AgentId
    backlog: int = 0
    """Signals and questions in memory, not yet handled."""
    behind: bool = False
    """There is more, in the stream."""
    handled_s: float | None = None
    """Signals a second since somebody last asked; None: nobody did, lately."""
    asked_s: float | None = None
    """Questions a second."""


class BusiestReply(WireModel):
    """The agents of a node or worker with the longest backlog and those that handle most."""

    agents: list[AgentLoad] = Field(default_factory=list)
    handled_s: float | None = None
    """Signals a second, of all its agents."""
    asked_s: float | None = None
    """Questions a second, of all its agents."""


class MeasureRequest(WireModel):
    """What do the agents of these deployments have to do?"""

    deployments: list[str]


class DeploymentMeasure(WireModel):
    """The part of one deployment that a node or worker hosts."""

    agents: int = 0
    backlog: int = 0
    """Signals taken in and not yet handled."""
    gauges: dict[str, list[float]] = Field(default_factory=dict)
    """What agents set by `ctx.gauge`: name to the value of each."""


class MeasureReply(WireModel):
    """What a node or worker hosts of the deployments that were asked for."""

    deployments: dict[str, DeploymentMeasure] = Field(default_factory=dict)
    cpu: float = 0.0
    """Share of the machine in use, 0 to 1; of a node."""
