"""The domains that the tests of consensus replicate, here and in child processes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from foundation_nats.consensus.domain import Domain


class Write(BaseModel):
    """Set a key, whatever it holds."""

    kind: Literal["write"] = "write"
    key: str
    value: str


class Cas(BaseModel):
    """Set a key that holds *expected*; rejected if it doesn't."""

    kind: Literal["cas"] = "cas"
    key: str
    expected: str | None
    value: str


class Append(BaseModel):
    """Add to the list."""

    kind: Literal["append"] = "append"
    item: str


class Registers(BaseModel):
    """Registers and a list."""

    values: dict[str, str] = Field(default_factory=dict)
    items: list[str] = Field(default_factory=list)


class Store(Domain[Registers, Write | Cas | Append]):
    """What the fault tests propose to; snapshots often."""

    name = "store"
    snapshot_every = 25
    State = Registers
    Operation = Annotated[Write | Cas | Append, Field(discriminator="kind")]

    def validate(self, state: Registers, operation: Any) -> str | None:
        """A `Cas` must find what it expects; a repeated item would show."""
        match operation:
            case Cas(key=key, expected=expected) if state.values.get(key) != expected:
                return f"{key} is {state.values.get(key)!r}"
        return None

    def apply(self, state: Registers, operation: Any) -> Registers:
        """Write."""
        match operation:
            case Write(key=key, value=value) | Cas(key=key, value=value):
                state.values[key] = value
            case Append(item=item):
                state.items.append(item)
        return state


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
