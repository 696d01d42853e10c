"""Desired state: `Deployment`, what people asked for, one key each in the ``desired`` bucket.

Pure.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from foundation_schemas.agent import AgentSpec
from foundation_schemas.base import NAME_LENGTH_MAX, Name, WireModel

REPLICAS_MAX = 1_000_000


class Deployment(WireModel):
    """The wish for one agent, or for N agents of one class."""

    name: Name
    spec: AgentSpec
    replicas: int | None = Field(default=None, ge=0, le=REPLICAS_MAX)
    """None: one agent whose id is the name; else ids ``NAME-0`` … ``NAME-(n-1)``."""
    standalone: bool = False
    """Started by itself (`agents.start`), not through a manifest."""
    revision: int = 1
    """Grows with every applied change."""

    @model_validator(mode="after")
    def _names_fit(self) -> Deployment:
        if self.replicas is not None and len(self.name) > NAME_LENGTH_MAX - 8:
            raise ValueError(f"name {self.name!r} is too long to number its replicas")
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
