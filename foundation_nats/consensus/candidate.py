"""Follower, candidate or leader: when to take, renew and give up a fenced lease.

Pure. ``now`` is this process's monotonic time. The lease is one key, taken and
renewed by compare-and-set over its last sequence; what became of each attempt
comes back as an event that carries the attempt's number, so that a late answer
to an old attempt changes nothing. A leader that has not renewed for
`stop_after_s`, counted from when its last successful renewal was *sent*, stops
leading by itself, before anybody else may take over by time.

Obligations of the caller: perform every effect, answer it with the event that
names its attempt, report the lease as it is seen (`LeaseSeen`, `LeaseVacant`),
and call `step` no later than `deadline`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Literal, assert_never

_RETRY_S = 0.5


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
class Resign:
    """This process stops: give the lease back and take it no more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = LeaseSeen | LeaseVacant | HolderGone | AcquireResult | RenewResult | Resign | Tick


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


@dataclass(slots=True)
class Candidate:
    """One candidate for one lease."""

    me: str
    incarnation: int
    ttl_s: float = 15.0
    renew_every_s: float = 3.0
    stop_after_s: float = 10.0
    random: Random = field(default_factory=Random)
    role: Role = Role.FOLLOWER
    term: int = 0
    """The highest term seen."""
    holder: tuple[str, int] | None = None
    _revision: int = 0
    _seen_at: float | None = None
    """When the key was last seen to change."""
    _attempt: int = 0
    _sent_at: float | None = None
    """When the attempt in flight was sent."""
    _renewed_at: float = 0.0
    """When the last successful write of ours was sent."""
    _next_at: float | None = None
    _gone: set[tuple[str, int]] = field(default_factory=set)
    _resigned: bool = False

    def __post_init__(self) -> None:
        assert self.renew_every_s < self.stop_after_s < self.ttl_s

    @property
    def is_leader(self) -> bool:
        """Whether it leads now."""
        return self.role is Role.LEADER

    @property
    def renewed_at(self) -> float:
        """When the last successful write of the lease was sent."""
        return self._renewed_at

    def deadline(self) -> float | None:
        """When `step` must be called next, if nothing happens before."""
        if self.role is Role.LEADER:
            due = self._renewed_at + self.stop_after_s
            return due if self._next_at is None else min(due, self._next_at)
        if self._resigned:
            return None
        if self.role is Role.CANDIDATE:
            return self._next_at
        if self.holder is not None and self._seen_at is not None:
            return self._seen_at + self.ttl_s + self.renew_every_s
        return self._next_at

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take note of *event* and of the time; return what to do."""
        match event:
            case LeaseSeen():
                effects = self._seen(event, now)
            case LeaseVacant(revision):
                effects = self._vacant(revision, now)
            case HolderGone(holder, incarnation):
                effects = self._holder_gone((holder, incarnation), now)
            case AcquireResult():
                effects = self._acquired(event, now)
            case RenewResult():
                effects = self._renewed(event, now)
            case Resign():
                effects = self._resign()
            case Tick():
                effects = []
            case _:
                assert_never(event)
        return effects + self._expire(now)

    # ---- what is seen -----------------------------------------------------------

    def _seen(self, lease: LeaseSeen, now: float) -> list[Effect]:
        if lease.revision < self._revision:
            return []
        if lease.revision > self._revision or self._seen_at is None:
            self._seen_at = now
        self._revision = lease.revision
        self.term = max(self.term, lease.term)
        self.holder = (lease.holder, lease.incarnation)
        mine = self.holder == (self.me, self.incarnation)
        if mine:
            if self.role is Role.CANDIDATE:
                # The answer was lost, but the write was ours.
                return self._lead(lease.term, self._sent_at or now, now)
            return []
        effects: list[Effect] = []
        if self.role is Role.LEADER:
            effects = self._lose(f"{lease.holder} holds the lease")
        self.role = Role.FOLLOWER
        self._sent_at = None
        self._next_at = None
        if self.holder in self._gone:
            effects += self._acquire(now)
        return effects

    def _vacant(self, revision: int, now: float) -> list[Effect]:
        if revision < self._revision:
            return []
        self._revision = revision
        self._seen_at = now
        self.holder = None
        effects: list[Effect] = []
        if self.role is Role.LEADER:
            effects = self._lose("the lease expired")
        if self.role is not Role.CANDIDATE or self._sent_at is None:
            effects += self._acquire(now)
        return effects

    def _holder_gone(self, holder: tuple[str, int], now: float) -> list[Effect]:
        self._gone.add(holder)
        if len(self._gone) > 64:
            self._gone = {holder}
        if self.holder == holder and self.role is Role.FOLLOWER:
            return self._acquire(now)
        return []

    # ---- own attempts -----------------------------------------------------------

    def _acquire(self, now: float) -> list[Effect]:
        if self._resigned:
            return []
        self.role = Role.CANDIDATE
        self._attempt += 1
        self._sent_at = now
        self._next_at = now + _RETRY_S * 4 * self.random.uniform(0.8, 1.2)
        return [Acquire(self._attempt, self._revision, self.term + 1)]

    def _acquired(self, result: AcquireResult, now: float) -> list[Effect]:
        if result.attempt != self._attempt or self.role is not Role.CANDIDATE:
            return []
        sent_at = self._sent_at if self._sent_at is not None else now
        if result.ok:
            self._revision = result.revision
            self.holder = (self.me, self.incarnation)
            return self._lead(result.term, sent_at, now)
        self._sent_at = None
        self._next_at = now + _RETRY_S * self.random.uniform(0.5, 1.5)
        return [ReadLease()]

    def _lead(self, term: int, sent_at: float, now: float) -> list[Effect]:
        self.role = Role.LEADER
        self.term = max(self.term, term)
        self._renewed_at = sent_at
        self._seen_at = now
        self._sent_at = None
        self._next_at = sent_at + self.renew_every_s
        return [BecameLeader(term)]

    def _renewed(self, result: RenewResult, now: float) -> list[Effect]:
        if result.attempt != self._attempt or self.role is not Role.LEADER:
            return []
        sent_at = self._sent_at if self._sent_at is not None else now
        self._sent_at = None
        match result.outcome:
            case "ok":
                self._revision = result.revision
                self._renewed_at = sent_at
                self._seen_at = now
                self._next_at = sent_at + self.renew_every_s
                return []
            case "lost":
                self._next_at = now + _RETRY_S * self.random.uniform(0.5, 1.5)
                return [*self._lose("the lease was taken by someone else"), ReadLease()]
            case "unknown":
                self._next_at = now + _RETRY_S * self.random.uniform(0.5, 1.5)
                return [ReadLease()]
            case _:
                assert_never(result.outcome)

    def _lose(self, reason: str) -> list[Effect]:
        self.role = Role.FOLLOWER
        self._sent_at = None
        return [LostLeadership(self.term, reason)]

    def _resign(self) -> list[Effect]:
        self._resigned = True
        if self.role is not Role.LEADER:
            self.role = Role.FOLLOWER
            return []
        return [*self._lose("resigned"), Release(self._revision, self.term)]

    # ---- time -------------------------------------------------------------------

    def _expire(self, now: float) -> list[Effect]:
        if self.role is Role.LEADER:
            if now >= self._renewed_at + self.stop_after_s:
                self._next_at = now + _RETRY_S
                return [*self._lose("the lease could not be renewed in time"), ReadLease()]
            if self._next_at is not None and now >= self._next_at:
                self._attempt += 1
                self._sent_at = now
                self._next_at = now + _RETRY_S * 4
                return [Renew(self._attempt, self._revision, self.term)]
            return []
        if self._resigned:
            return []
        if self.role is Role.CANDIDATE:
            if self._next_at is not None and now >= self._next_at:
                self._next_at = now + _RETRY_S * 4 * self.random.uniform(0.8, 1.2)
                return [ReadLease()]
            return []
        if self._next_at is not None and now >= self._next_at:
            self._next_at = None
            return [ReadLease()]
        if (
            self.holder is not None
            and self._seen_at is not None
            and now >= self._seen_at + self.ttl_s + self.renew_every_s
        ):
            self._seen_at = now
            return self._acquire(now)
        return []
