"""The domains that the tests of consensus replicate, here and in child processes."""

from __future__ import annotations

from pydantic import BaseModel, Field

from foundation_nats.chaos.workloads.domains import ChaosCells
from foundation_nats.consensus.domain import Domain


class Store(ChaosCells):
    """What the fault tests propose to: the registers and the list of the campaigns, snapshots more often."""

    name = "store"
    snapshot_every = 25


class Put(BaseModel):
    """Write under a fencing token."""

    token: int
    by: str


class Guarded(BaseModel):
    """What was written, under which tokens."""

    token: int = 0
    writes: list[tuple[int, str]] = Field(default_factory=list)


class FencedResource(Domain[Guarded, Put]):
    """A resource that refuses tokens lower than one it has seen."""

    name = "fenced"
    State = Guarded
    Operation = Put

    def validate(self, state: Guarded, operation: Put) -> str | None:
        """The rule of fencing."""
        if operation.token < state.token:
            return f"token {operation.token} is older than {state.token}"
        return None

    def apply(self, state: Guarded, operation: Put) -> Guarded:
        """Remember the write."""
        state.token = operation.token
        state.writes.append((operation.token, operation.by))
        return state
