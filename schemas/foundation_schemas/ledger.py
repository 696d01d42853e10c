"""`LedgerRecord`: what of a node's capacity is taken, by agents and by reservations; one key per node.

Pure. It is the one place where capacity is given away: whoever takes some
replaces the record by compare-and-set, so that two can't take the same.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from foundation_schemas.base import NodeId, WireModel


class ReservationState(StrEnum):
    """How firm a reservation is."""

    HELD = "held"
    """Until its time is over."""
    CONFIRMED = "confirmed"
    """Until it is released, or until its time is over if it has one."""


class ReservationRecord(WireModel):
    """A part of a node's capacity that somebody has taken and no agent uses yet."""

    id: str
    """``<random>@<node>``."""
    needs: dict[str, float]
    holder: str = ""
    """Who that is, for people."""
    state: ReservationState = ReservationState.HELD
    expires_at: float | None = None
    """Seconds since 1970 by the NATS server's clock; None: it lasts until it is released."""
    since: str = ""
    """When it was made, for people."""
    agent: str | None = None
    """The agent that it is for, for people."""


class LedgerRecord(WireModel):
    """The books of one node."""

    node: NodeId
    incarnation: int
    """The life of the node that `capacity` and `agents` are about."""
    capacity: dict[str, float] = Field(default_factory=dict)
    agents: dict[str, float] = Field(default_factory=dict)
    """What the node's agents take; only its manager changes that."""
    reservations: list[ReservationRecord] = Field(default_factory=list)
