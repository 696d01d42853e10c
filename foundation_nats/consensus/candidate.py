"""Follower, candidate or leader: when to take, renew and give up a fenced lease.

Pure. ``now`` is this process's monotonic time. The lease is one key, taken and
renewed by compare-and-set over its last sequence; what became of each attempt
comes back as an event that carries the attempt's number, so that a late answer
to an old attempt changes nothing. A leader that has not renewed for
`stop_after_s`, counted from when its last successful renewal was *sent*, stops
leading by itself, before anybody else may take over by time. For the same
reason nobody begins to lead under a write that was sent longer ago than that.

A term is never higher than the revision it was written at. The marker of a
deleted or expired lease names no term, hence a lease taken over a marker gets a
term above the marker's revision: no term is ever led by two.

It does not guarantee that only one believes to lead: whoever is taken over
early (`HolderGone`) may not know it yet. Obligations of the caller: perform
every effect, answer it with the event that names its attempt, report the lease
as it is seen (`LeaseSeen`, `LeaseVacant`), and call `step` no later than
`deadline`. An answer that never comes costs time, not safety. Who was reported
gone must come back under a higher incarnation, or be reported back: two that
hold each other for dead would take the lease from each other for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import assert_never

from foundation_nats.consensus.candidacy import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Doubt,
    Effect,
    Event,
    HolderBack,
    HolderGone,
    LeaseSeen,
    LeaseVacant,
    LostLeadership,
    ReadLease,
    Release,
    Renew,
    RenewResult,
    Resign,
    Role,
    Tick,
)

__all__ = [
    "Acquire",
    "AcquireResult",
    "BecameLeader",
    "Candidate",
    "Doubt",
    "Effect",
    "Event",
    "HolderBack",
    "HolderGone",
    "LeaseSeen",
    "LeaseVacant",
    "LostLeadership",
    "ReadLease",
    "Release",
    "Renew",
    "RenewResult",
    "Resign",
    "Role",
    "Tick",
]

_RETRY_S = 0.5
_ANSWER_S = 4 * _RETRY_S
_GONE_MAX = 64


@dataclass(frozen=True, slots=True)
class _Try:
    """What was last attempted, and when it was first."""

    expected: int
    term: int
    first_sent_at: float


@dataclass(frozen=True, slots=True)
class _Renewal:
    expected: int
    sent_at: float


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
    """The highest term seen; over a marker, which names none, the highest it can have been."""
    holder: tuple[str, int] | None = None
    _revision: int = 0
    _seen_at: float | None = None
    """When the key was last seen to change."""
    _attempt: int = 0
    _tried: _Try | None = None
    _sent_at: float | None = None
    """When the acquisition in flight was sent."""
    _renewals: dict[int, _Renewal] = field(default_factory=dict)
    """The renewals of this leadership that were not answered yet, by attempt."""
    _leads_in: int = 0
    """The term it leads in, or last led in."""
    _renewed_at: float = 0.0
    """When the last successful write of ours was sent."""
    _next_at: float | None = None
    """When to renew (a leader) or to read the lease again (anybody else)."""
    _retry_at: float = float("-inf")
    """No second attempt over the same revision before this."""
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
        """When `step` must be called next, if nothing happens before; later than the last step."""
        if self._resigned:
            return None
        times = [self._next_at]
        if self.role is Role.LEADER:
            times.append(self._renewed_at + self.stop_after_s)
        elif self.role is Role.FOLLOWER:
            times.append(self._abandoned_at())
        known = [time for time in times if time is not None]
        return min(known) if known else None

    def _abandoned_at(self) -> float | None:
        """When the lease has not changed for so long that its holder can't be leading."""
        if self.holder is None or self._seen_at is None:
            return None
        return self._seen_at + self.ttl_s + self.renew_every_s

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take note of *event* and of the time; return what to do."""
        match event:
            case LeaseSeen():
                effects = self._seen(event, now)
            case LeaseVacant(revision):
                effects = self._vacant(revision, now)
            case HolderGone(holder, incarnation):
                effects = self._holder_gone((holder, incarnation), now)
            case HolderBack(holder, incarnation):
                self._gone.discard((holder, incarnation))
                effects = []
            case AcquireResult():
                effects = self._acquired(event, now)
            case RenewResult():
                effects = self._renewed(event, now)
            case Doubt():
                effects = self._doubt(now)
            case Resign():
                effects = self._resign()
            case Tick():
                effects = []
            case _:
                assert_never(event)
        return effects if self._resigned else effects + self._expire(now)

    # ---- what is seen -----------------------------------------------------------

    def _seen(self, lease: LeaseSeen, now: float) -> list[Effect]:
        if lease.revision < self._revision:
            return []
        is_new = lease.revision > self._revision or self._seen_at is None
        if is_new:
            self._seen_at = now
        self._revision = lease.revision
        self.term = max(self.term, lease.term)
        self.holder = (lease.holder, lease.incarnation)
        if self.holder == (self.me, self.incarnation):
            return self._seen_mine(lease, now)
        effects: list[Effect] = []
        if self.role is Role.LEADER:
            effects = self._lose(f"{lease.holder} holds the lease")
        elif self.role is Role.CANDIDATE and self._is_in_flight(now) and not is_new:
            return []
        self.role = Role.FOLLOWER
        self._sent_at = self._next_at = None
        if self.holder in self._gone:
            effects += self._want(now)
        return effects

    def _seen_mine(self, lease: LeaseSeen, now: float) -> list[Effect]:
        if self.role is Role.LEADER:
            return []
        tried = self._tried
        if (
            self.role is Role.CANDIDATE
            and tried is not None
            and lease.term == tried.term
            and lease.revision > tried.expected
            and now < tried.first_sent_at + self.stop_after_s
        ):
            # The answer was lost, but the write was ours. Several attempts were
            # alike, perhaps, and the first may be the one that was carried out.
            return self._lead(lease.term, tried.first_sent_at, now)
        # A leadership of ours that is over: nobody is robbed by beginning another.
        return [] if self._is_in_flight(now) else self._want(now)

    def _vacant(self, revision: int, now: float) -> list[Effect]:
        # Revision 0: the key and its marker are gone (or it is old news). A leader
        # waits for what its renewal says, anybody else has nothing to lose by trying.
        is_old = revision < self._revision
        if is_old and (revision != 0 or self.role is Role.LEADER):
            return []
        self._revision = revision
        self._seen_at = now
        self.term = max(self.term, revision)
        self.holder = None
        effects: list[Effect] = []
        if self.role is Role.LEADER:
            effects = self._lose("the lease expired")
        return effects if self._is_in_flight(now) else effects + self._want(now)

    def _holder_gone(self, holder: tuple[str, int], now: float) -> list[Effect]:
        if len(self._gone) >= _GONE_MAX:
            self._gone.clear()
        self._gone.add(holder)
        if self.holder == holder and self.role is Role.FOLLOWER:
            return self._want(now)
        return []

    # ---- own attempts -----------------------------------------------------------

    def _is_in_flight(self, now: float) -> bool:
        # An answer later than `stop_after_s` couldn't make us the leader any more.
        return self._sent_at is not None and now < self._sent_at + self.stop_after_s

    def _want(self, now: float) -> list[Effect]:
        """Try to acquire: at once, or later where the same was just refused."""
        if self._resigned:
            return []
        self.role = Role.CANDIDATE
        tried = self._tried
        if tried is not None and tried.expected == self._revision and now < self._retry_at:
            self._next_at = self._retry_at
            return []
        self._attempt += 1
        self._sent_at = now
        self._next_at = now + _ANSWER_S * self.random.uniform(0.8, 1.2)
        term = self.term + 1
        if tried is None or (tried.expected, tried.term) != (self._revision, term):
            self._tried = _Try(self._revision, term, now)
        return [Acquire(self._attempt, self._revision, term)]

    def _acquired(self, result: AcquireResult, now: float) -> list[Effect]:
        if result.attempt != self._attempt:
            return []
        if self._resigned:
            return [Release(result.revision, result.term)] if result.ok else []
        sent_at, self._sent_at = self._sent_at, None
        if self.role is not Role.CANDIDATE or sent_at is None:
            return []
        if result.ok and result.revision >= self._revision:
            self._revision = result.revision
            self._seen_at = now
            self.term = max(self.term, result.term)
            self.holder = (self.me, self.incarnation)
            if now < sent_at + self.stop_after_s:
                return self._lead(result.term, sent_at, now)
            return self._want(now)
        self._retry_at = self._next_at = now + self._jitter()
        return [ReadLease()]

    def _lead(self, term: int, sent_at: float, now: float) -> list[Effect]:
        self.role = Role.LEADER
        self._leads_in = term
        self._renewed_at = sent_at
        self._seen_at = now
        self._sent_at = None
        self._renewals = {}
        self._next_at = sent_at + self.renew_every_s
        return [BecameLeader(term)]

    def _renewed(self, result: RenewResult, now: float) -> list[Effect]:
        if self._resigned:
            is_ours = result.attempt == self._attempt and result.outcome == "ok"
            return [Release(result.revision, self._leads_in)] if is_ours else []
        renewal = self._renewals.pop(result.attempt, None)
        if renewal is None:
            return []
        match result.outcome:
            case "ok":
                # Also of an attempt that was repeated meanwhile: it was written after it was sent.
                self._revision = max(self._revision, result.revision)
                self._renewed_at = max(self._renewed_at, renewal.sent_at)
                self._renewals = {
                    attempt: other
                    for attempt, other in self._renewals.items()
                    if other.sent_at > renewal.sent_at
                }
                self._seen_at = now
                self._next_at = self._renewed_at + self.renew_every_s
                return []
            case "lost" if renewal.expected == self._revision:
                self._next_at = now + self._jitter()
                return [*self._lose("the lease was taken by someone else"), ReadLease()]
            case "lost" | "unknown":
                # "Lost" over a revision that we have replaced ourselves says nothing.
                self._next_at = now + self._jitter()
                return [ReadLease()]
            case _:
                assert_never(result.outcome)

    def _doubt(self, now: float) -> list[Effect]:
        """Only a renewal proves that it still leads: as soon as the last one had its chance."""
        if self.role is Role.LEADER:
            sent_at = [renewal.sent_at for renewal in self._renewals.values()]
            due = max(now, max(sent_at, default=self._renewed_at) + _RETRY_S)
            self._next_at = due if self._next_at is None else min(self._next_at, due)
        return []

    def _lose(self, reason: str) -> list[Effect]:
        self.role = Role.FOLLOWER
        self._renewals = {}
        return [LostLeadership(self._leads_in, reason)]

    def _resign(self) -> list[Effect]:
        self._resigned = True
        if self.role is Role.LEADER:
            return [*self._lose("resigned"), Release(self._revision, self._leads_in)]
        self.role = Role.FOLLOWER
        return []

    def _jitter(self) -> float:
        return _RETRY_S * self.random.uniform(0.5, 1.5)

    # ---- time -------------------------------------------------------------------

    def _expire(self, now: float) -> list[Effect]:
        is_due = self._next_at is not None and now >= self._next_at
        match self.role:
            case Role.LEADER:
                if now >= self._renewed_at + self.stop_after_s:
                    self._next_at = now + _RETRY_S
                    lost = self._lose("the lease could not be renewed in time")
                    # So late a step, perhaps, that the lease is up for anybody by now.
                    return [*lost, ReadLease(), *self._expire(now)]
                if is_due:
                    self._attempt += 1
                    self._renewals[self._attempt] = _Renewal(self._revision, now)
                    self._next_at = now + _ANSWER_S
                    return [Renew(self._attempt, self._revision, self._leads_in)]
            case Role.CANDIDATE:
                if is_due:
                    self._next_at = now + _ANSWER_S * self.random.uniform(0.8, 1.2)
                    return [ReadLease()]
            case Role.FOLLOWER:
                abandoned_at = self._abandoned_at()
                if abandoned_at is not None and now >= abandoned_at:
                    self._seen_at = now
                    return self._want(now)
                if is_due:
                    self._next_at = None
                    return [ReadLease()]
            case _:
                assert_never(self.role)
        return []
