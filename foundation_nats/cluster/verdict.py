"""What the failure detector is told, what it answers, and the three verdicts it knows.

Pure data; the decisions are in `foundation_nats.cluster.liveness`, which also
exports these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What is believed of one incarnation of a node."""

    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Heard:
    """A heartbeat (or the first sight of a record) of this incarnation."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Left:
    """The node said good-bye."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Forgot:
    """The node's record is gone: nothing more will be asked about it."""

    node: str


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The answer to `Confirm`; *reachable* None: there was nobody to ask."""

    node: str
    incarnation: int
    reachable: bool | None


@dataclass(frozen=True, slots=True)
class ProbeMissed:
    """Nobody listens: neither the manager nor any worker."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """Somebody listens; no proof that the node is well."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class BusDisturbed:
    """Our connection dropped or came back, a write stalled, or a stream changed its leader."""


@dataclass(frozen=True, slots=True)
class Deaf:
    """This node does not hear its own heartbeats: that it hears nobody else proves nothing."""


@dataclass(frozen=True, slots=True)
class OwnLag:
    """How late our own event loop is: a sick observer is patient with others."""

    lag_s: float


@dataclass(frozen=True, slots=True)
class ForceFailover:
    """A person says that the mass failure is real."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Heard
    | Left
    | Forgot
    | Confirmed
    | ProbeMissed
    | ProbeAnswered
    | BusDisturbed
    | Deaf
    | OwnLag
    | ForceFailover
    | Tick
)


@dataclass(frozen=True, slots=True)
class VerdictChanged:
    """The belief about a node has changed; *old* None: it was unknown."""

    node: str
    incarnation: int
    old: Verdict | None
    new: Verdict
    cause: str
    """``heard``, ``silence``, ``no_responders`` or ``left``."""


@dataclass(frozen=True, slots=True)
class Confirm:
    """Ask another node whether it can reach this one."""

    node: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class StormBegan:
    """Many nodes seem dead at once; no verdicts until *until* (or `ForceFailover`)."""

    nodes: tuple[str, ...]
    until: float


@dataclass(frozen=True, slots=True)
class StormEnded:
    """Verdicts are given again."""


Effect = VerdictChanged | Confirm | StormBegan | StormEnded
