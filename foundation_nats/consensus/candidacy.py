"""What a candidate for a lease is told, what it asks for, and the three roles it can have.

Pure data; the decisions are in `foundation_nats.consensus.candidate`, which
also exports these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """What this candidate believes to be."""

    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """The key holds a lease."""

    holder: str
    incarnation: int
    term: int
    revision: int


@dataclass(frozen=True, slots=True)
class LeaseVacant:
    """The key is absent, released or expired; *revision* is what to write over, 0 for nothing."""

    revision: int


@dataclass(frozen=True, slots=True)
class HolderGone:
    """The holder was declared down: its lease may be taken over early."""

    holder: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class HolderBack:
    """What was said by `HolderGone` is not so (any more)."""

    holder: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class AcquireResult:
    """What became of `Acquire`; *ok* None: unknown."""

    attempt: int
    ok: bool | None
    term: int
    revision: int


@dataclass(frozen=True, slots=True)
class RenewResult:
    """What became of `Renew`."""

    attempt: int
    outcome: Literal["ok", "lost", "unknown"]
    revision: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something happened after which a leader may have been replaced: it should renew now."""


@dataclass(frozen=True, slots=True)
class Resign:
    """This process stops: give the lease back and take it no more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    LeaseSeen
    | LeaseVacant
    | HolderGone
    | HolderBack
    | AcquireResult
    | RenewResult
    | Doubt
    | Resign
    | Tick
)


@dataclass(frozen=True, slots=True)
class Acquire:
    """Write the lease under *term* over *expected_revision*."""

    attempt: int
    expected_revision: int
    term: int


@dataclass(frozen=True, slots=True)
class Renew:
    """Write the lease again over *expected_revision*."""

    attempt: int
    expected_revision: int
    term: int


@dataclass(frozen=True, slots=True)
class Release:
    """Delete the lease at *expected_revision*."""

    expected_revision: int
    term: int


@dataclass(frozen=True, slots=True)
class ReadLease:
    """Read the key from the stream's leader and report what it holds."""


@dataclass(frozen=True, slots=True)
class BecameLeader:
    """Begin to lead."""

    term: int


@dataclass(frozen=True, slots=True)
class LostLeadership:
    """Stop leading at once."""

    term: int
    reason: str


Effect = Acquire | Renew | Release | ReadLease | BecameLeader | LostLeadership
