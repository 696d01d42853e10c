"""Desired state: `Deployment`, what people asked for, one key each in the ``desired`` bucket.

Pure.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, field_validator, model_validator

from foundation_schemas.agent import AgentSpec
from foundation_schemas.base import NAME_LENGTH_MAX, Name, WireModel

REPLICAS_MAX = 1_000_000
REVISIONS_MAX = 10
"""How many earlier specs a deployment remembers."""


class UpdatePolicy(WireModel):
    """How agents pass from one spec to the next."""

    max_unavailable: int | str = "25%"
    """How many may not be running because of it, or which share of them (``25%``, rounded down);
    at least one."""
    progress_deadline_s: float = Field(default=120.0, gt=0)
    """Without another agent that got ready for so long, the change has failed."""
    rollback: bool = True
    """Go back to the spec before when the change has failed."""

    @field_validator("max_unavailable")
    @classmethod
    def _check_max_unavailable(cls, value: int | str) -> int | str:
        if isinstance(value, str):
            share = value.removesuffix("%")
            if not (value.endswith("%") and share.isdigit() and 0 < int(share) <= 100):
                raise ValueError(f"{value!r} is neither a number nor a share such as 25%")
        elif value < 1:
            raise ValueError(f"{value} is less than 1")
        return value

    def budget(self, replicas: int) -> int:
        """How many of *replicas* may not be running."""
        value = self.max_unavailable
        if isinstance(value, str):
            return max(1, replicas * int(value.removesuffix("%")) // 100)
        return value


class Autoscale(WireModel):
    """How many replicas there shall be, by what they have to do."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1, le=REPLICAS_MAX)
    backlog: float | None = Field(default=None, gt=0)
    """Unhandled signals per replica to aim at."""
    cpu: float | None = Field(default=None, gt=0, le=1)
    """Share of the cpu of the nodes that host them to aim at."""
    metric: str | None = None
    """A gauge that the agents set (`ctx.gauge`) …"""
    target: float | None = Field(default=None, gt=0)
    """… and its mean per replica to aim at."""
    cooldown_s: float = Field(default=60.0, ge=0)
    """Fewer replicas only when fewer have been enough for so long."""

    @model_validator(mode="after")
    def _check(self) -> Autoscale:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        if (self.metric is None) != (self.target is None):
            raise ValueError("metric and target belong together")
        if self.backlog is None and self.cpu is None and self.metric is None:
            raise ValueError("says nothing to go by: give backlog, cpu, or metric and target")
        return self


class Tier(StrEnum):
    """When a deploy applies a deployment among the others of its manifest."""

    CORE = "core"
    """First, as a service that the others use: they come once it runs."""
    APP = "app"
    """Once the core of the manifest runs."""


class RevisionOutcome(StrEnum):
    """What became of an earlier spec."""

    SUPERSEDED = "superseded"
    FAILED = "failed"


class Revision(WireModel):
    """An earlier spec of a deployment."""

    revision: int
    spec: AgentSpec
    outcome: RevisionOutcome = RevisionOutcome.SUPERSEDED
    reason: str | None = None
    at: str | None = None
    """UTC of when it was replaced."""


class Ending(WireModel):
    """That a child has ended or shall end: its wish is withdrawn once its parent was told."""

    status: str = "stopped"
    """``stopped``, or ``failed``."""
    reason: str = ""


class Deployment(WireModel):
    """The wish for one agent, or for N agents of one class."""

    name: Name
    spec: AgentSpec
    replicas: int | None = Field(default=None, ge=0, le=REPLICAS_MAX)
    """None: one agent whose id is the name; else ids ``NAME-0`` … ``NAME-(n-1)``."""
    standalone: bool = False
    """Started by itself (`agents.start`), not through a manifest."""
    manifest: str = ""
    """The name of the manifest that applied it last; empty: one without a name, or a program."""
    revision: int = 1
    """Grows with every applied change."""
    update: UpdatePolicy = UpdatePolicy()
    autoscale: Autoscale | None = None
    tier: Tier = Tier.APP
    """Whether a deploy sees it through before it applies the others of its manifest."""
    spec_revision: int = 1
    """The revision in which the spec changed last."""
    rolling: bool = False
    """Its agents pass to the spec; the leader takes it back when all have, or it has failed."""
    paused: bool = False
    """No further agent is restarted for a changed spec."""
    rolled_back: str | None = None
    """Why the spec is an earlier one again."""
    stuck: str | None = None
    """Why its agents don't get to the spec, where there is nothing to go back to."""
    history: list[Revision] = Field(default_factory=list)
    """Earlier specs, the last one last."""
    ending: Ending | None = None
    """Of a child: it is wished for no more."""
    orphaned: bool = False
    """Of a child: it was told that its parent has ended."""

    @model_validator(mode="after")
    def _names_fit(self) -> Deployment:
        if self.replicas is not None and len(self.name) > NAME_LENGTH_MAX - 8:
            raise ValueError(f"name {self.name!r} is too long to number its replicas")
        if self.autoscale is not None and self.replicas is None:
            raise ValueError("autoscale needs replicas: a single agent can't be scaled")
        return self

    def agent_ids(self) -> list[str]:
        """The ids of the agents this wish stands for, in order."""
        if self.replicas is None:
            return [self.name]
        return [f"{self.name}-{i}" for i in range(self.replicas)]

    def size(self) -> int:
        """How many agents it stands for."""
        return 1 if self.replicas is None else self.replicas


class DeploymentStatus(WireModel):
    """Wish and fact side by side, as shown to people."""

    name: str
    run: str
    desired: int
    running: int = 0
    pending: int = 0
    failed: int = 0
    other: int = 0
    revision: int = 1
    critical: bool = False
    settled: bool = False
    """Every wished agent runs the wished spec, and none is left over."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Agent id to why it does not run; at most 20."""
    updated: int = 0
    """How many run the wished spec."""
    rolling: bool = False
    """Its agents are passing to the wished spec …"""
    paused: bool = False
    """… or would, were it not paused."""
    stuck: str | None = None
    """Why they don't get there."""
    rolled_back: str | None = None
    """Why the spec is an earlier one again."""
    autoscale: Autoscale | None = None
    """By what it scales itself, and how far."""
    manifest: str = ""
    """The manifest that applied it last."""
