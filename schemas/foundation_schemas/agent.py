"""What to run (`AgentSpec`), where it runs under which epoch (`AgentRecord`), and what it has become (`StateRecord`).

Pure. The `AgentRecord` in the ``agents`` bucket is the truth about placement:
an assignment *is* a record that names a node, and that node acts on it. The
`StateRecord` in the ``state`` bucket is the truth about effects: state, cursor
and outbox are one value, so they change together or not at all.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Any

import orjson
from pydantic import Field, field_validator

from foundation_schemas.base import AgentId, Capability, NodeId, WireModel


class AgentStatus(StrEnum):
    """The words for an agent's condition; part of the contract."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    MOVING = "moving"
    UNAVAILABLE = "unavailable"
    FAILED = "failed"
    STOPPED = "stopped"
    HIBERNATED = "hibernated"


class OnNodeLoss(StrEnum):
    """What becomes of an agent whose node is down."""

    RESTART = "restart"
    UNAVAILABLE = "unavailable"
    STOP = "stop"


class PlacementPolicy(WireModel):
    """Where an agent may and should run."""

    strategy: str = "load_balanced"
    require: list[Capability] = Field(default_factory=list)
    """Capabilities the node must offer."""
    prefer: list[Capability] = Field(default_factory=list)
    """Capabilities that make a node better."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels the node must carry."""
    spread: str | None = None
    """A label (such as ``zone``) over whose values replicas are spread."""


class AgentSpec(WireModel):
    """What to run: the same for all replicas of a deployment."""

    run: str
    """``module:Class``."""
    critical: bool = False
    durable: bool = True
    capabilities: list[Capability] = Field(default_factory=list)
    """What the agent provides to callers."""
    resources: dict[str, float] = Field(default_factory=dict)
    """What it needs of its node; ``slots`` is 1 unless said otherwise."""
    placement: PlacementPolicy = PlacementPolicy()
    on_node_loss: OnNodeLoss | None = None
    """None: `restart` for critical agents, else `unavailable` for a grace and then `restart`."""
    config: dict[str, Any] = Field(default_factory=dict)
    restart: str = "permanent"

    @field_validator("run")
    @classmethod
    def _check_run(cls, value: str) -> str:
        module, colon, name = value.partition(":")
        parts = module.split(".") + name.split(".")
        if not colon or not all(part.isidentifier() for part in parts):
            raise ValueError(f"{value!r} is not of the form 'module:Class'")
        return value

    @field_validator("restart")
    @classmethod
    def _check_restart(cls, value: str) -> str:
        if value not in ("permanent", "transient", "temporary"):
            raise ValueError(f"{value!r} is not one of permanent, transient, temporary")
        return value

    def digest(self) -> str:
        """Twelve hex digits that change when the spec does."""
        raw = orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(raw, digest_size=6).hexdigest()


class RecoveredFrom(WireModel):
    """Which earlier activation an agent continues; handed to `Agent.on_start`."""

    node: NodeId
    epoch: int
    reason: str
    """``node_down``, ``worker_died``, ``moved``, ``restarted``."""
    sequence: int | None = None
    """The signal that was being handled when the worker died; None: another agent's, or none."""


class AgentRecord(WireModel):
    """The registry's entry for one agent; every write is a compare-and-set."""

    id: AgentId
    deployment: str | None = None
    status: AgentStatus = AgentStatus.PENDING
    desired: str = "run"
    """``run`` or ``stop``: what the leader wants of the node that holds it."""
    node: NodeId | None = None
    incarnation: int = 0
    """The life of the node it was assigned to."""
    epoch: int = 0
    spec: AgentSpec
    digest: str = ""
    reason: str | None = None
    """Why it is pending, unavailable or failed."""
    recovered_from: RecoveredFrom | None = None
    failures: int = 0
    """Failed starts in a row, for back-off."""
    since: str | None = None
    """UTC of the last change, for people."""


class OutboxEntry(WireModel):
    """Something to publish once the record that holds it is stored."""

    subject: str
    msg_id: str
    body: Any


class Writer(WireModel):
    """Who wrote a state record, so that an unknown outcome can be resolved by reading it."""

    node: str
    incarnation: int
    worker: str


class StateRecord(WireModel):
    """State, cursor and outbox of one agent: the unit of commit."""

    v: int = 1
    epoch: int
    commit: int
    """Counts the commits of this agent for ever."""
    writer: Writer
    cursor: int
    """The mailbox sequence up to which signals have taken effect."""
    run: str
    schema_version: int = 1
    state: dict[str, Any] | None
    salt: str
    """Random, per agent; ids of emitted signals derive from it."""
    emitted: int = 0
    outbox: list[OutboxEntry] = Field(default_factory=list)
    outbox_since: str = ""
    """The server's time of the record that first held this outbox, while it is being recovered."""
    attempt: list[int] | None = None
    """[sequence, attempts] of a signal whose handling may have killed the worker."""
