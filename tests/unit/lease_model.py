"""A model of the lease's key and of what lies between it and two candidates, for property tests.

The key is a compare-and-set register with a time to live that leaves a marker.
Requests and answers are late by up to some seconds, and may be lost; watches
lag and skip; a candidate may be told, wrongly, that its rival is dead; it may
resign and come back under a new incarnation. The two clocks run alike and are
apart. Everything is drawn from one `Random`: a seed is a story.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Literal

from foundation_nats.consensus.candidate import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Candidate,
    Effect,
    Event,
    HolderGone,
    LeaseSeen,
    LeaseVacant,
    LostLeadership,
    ReadLease,
    Release,
    Renew,
    RenewResult,
    Resign,
    Tick,
)

TTL_S = 15.0


@dataclass(frozen=True, slots=True)
class Stored:
    """What the key holds."""

    holder: str
    incarnation: int
    term: int
    written_at: float


@dataclass(slots=True)
class Key:
    """The register: a value or a marker, and the revision of it."""

    value: Stored | None = None
    revision: int = 0

    def expire(self, now: float) -> None:
        """Let the value end."""
        if self.value is not None and now >= self.value.written_at + TTL_S:
            self.value = None
            self.revision += 1

    def write(self, value: Stored | None, expected: int) -> int | None:
        """The new revision; None: it is not at *expected*."""
        if self.revision != expected:
            return None
        self.value = value
        self.revision += 1
        return self.revision

    def seen(self) -> Event:
        """What a reader is told."""
        if self.value is None:
            return LeaseVacant(self.revision)
        value = self.value
        return LeaseSeen(value.holder, value.incarnation, value.term, self.revision)


@dataclass(slots=True)
class Race:
    """Two candidates for one lease."""

    random: Random
    loss: float
    takes_over_early: bool
    key: Key = field(default_factory=Key)
    now: float = 0.0
    candidates: dict[str, Candidate] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    leading: dict[str, int] = field(default_factory=dict)
    leaders_of_term: dict[int, set[tuple[str, int]]] = field(default_factory=dict)
    leaders_at_once_max: int = 0
    changes: int = 0
    lost_messages: int = 0
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0
    _late_s: float = 4.0
    _slandered: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            self.offsets[name] = self.random.uniform(0.0, 1000.0)
            self.candidates[name] = self._candidate(name, 1)
        for name in self.candidates:
            self._watch(name)
            self._later(partial(self._disturb, name), self.random.uniform(0.0, 20.0))

    def _candidate(self, name: str, incarnation: int) -> Candidate:
        return Candidate(name, incarnation, random=Random(self.random.random()))

    def calm(self) -> None:
        """From now on nothing is lost or late, and nobody is slandered or restarted.

        Who was slandered has learnt of it, and lives anew.
        """
        for name in sorted(self._slandered):
            self._restart(name)
        self.loss = 0.0
        self._late_s = 0.1
        self.takes_over_early = False

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while True:
            name, due = min(
                ((name, self._due(name)) for name in self.candidates), key=lambda pair: pair[1]
            )
            at = min(due, self._queue[0][0])
            if at > end:
                self.now = end
                return
            assert at >= self.now - 1e-6, "a deadline that has passed would make the loop spin"
            self.now = max(self.now, at)
            self.key.expire(self.now)
            if self._queue[0][0] <= due:
                heapq.heappop(self._queue)[2]()
            else:
                self._step(name, Tick(), at_deadline=True)

    # ---- what happens in between ------------------------------------------------------

    def _due(self, name: str) -> float:
        due = self.candidates[name].deadline()
        return float("inf") if due is None else due - self.offsets[name]

    def _later(self, action: Callable[[], None], delay_s: float) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay_s, self._count, action))

    def _send(self, action: Callable[[], None]) -> None:
        if self.random.random() < self.loss:
            self.lost_messages += 1
            return
        is_late = self.random.random() < 0.3
        self._later(action, self.random.uniform(0.0, self._late_s if is_late else 0.05))

    def _watch(self, name: str) -> None:
        """Once in a while the watch delivers what the key held a moment ago."""
        event = self.key.seen()
        self._send(lambda: self._step(name, event))
        self._later(lambda: self._watch(name), self.random.uniform(0.1, 3.0))

    def _disturb(self, name: str) -> None:
        self._later(lambda: self._disturb(name), self.random.uniform(5.0, 20.0))
        if self.loss == 0.0 and self._late_s < 1.0:
            return
        other = self.candidates["b" if name == "a" else "a"]
        if self.takes_over_early and self.random.random() < 0.7:
            self._slandered.add(other.me)
            self._step(name, HolderGone(other.me, other.incarnation))
        elif self.random.random() < 0.2:
            self._restart(name)

    def _restart(self, name: str) -> None:
        self._step(name, Resign())
        self.candidates[name] = self._candidate(name, self.candidates[name].incarnation + 1)

    # ---- candidates -----------------------------------------------------------------------

    def _step(self, name: str, event: Event, *, at_deadline: bool = False) -> None:
        candidate = self.candidates[name]
        due = candidate.deadline()
        # At a deadline the candidate's clock shows exactly that, whatever adding would round to.
        now = due if at_deadline and due is not None else self.now + self.offsets[name]
        for effect in candidate.step(event, now):
            self._perform(name, candidate, effect)
        after = candidate.deadline()
        assert after is None or after > now, "the same deadline again would make the loop spin"

    def _answer(self, name: str, candidate: Candidate, event: Event) -> None:
        """Answers travel, too; and are repeated, sometimes."""
        for _ in range(2 if self.random.random() < 0.1 else 1):
            self._send(
                lambda: self._step(name, event) if self.candidates[name] is candidate else None
            )

    def _perform(self, name: str, candidate: Candidate, effect: Effect) -> None:
        match effect:
            case Acquire():
                self._send(lambda: self._acquire(name, candidate, effect))
            case Renew():
                self._send(lambda: self._renew(name, candidate, effect))
            case Release(expected, _):
                self._send(partial(self._release, expected))
            case ReadLease():
                self._send(lambda: self._answer(name, candidate, self.key.seen()))
            case BecameLeader(term):
                self.changes += 1
                self.leading[name] = term
                self.leaders_of_term.setdefault(term, set()).add((name, candidate.incarnation))
                self.leaders_at_once_max = max(self.leaders_at_once_max, len(self.leading))
            case LostLeadership():
                self.changes += 1
                del self.leading[name]

    def _release(self, expected: int) -> None:
        self.key.write(None, expected)

    def _acquire(self, name: str, candidate: Candidate, effect: Acquire) -> None:
        value = Stored(candidate.me, candidate.incarnation, effect.term, self.now)
        revision = self.key.write(value, effect.expected_revision)
        ok = revision is not None
        self._answer(name, candidate, AcquireResult(effect.attempt, ok, effect.term, revision or 0))
        self._maybe_unknown(name, candidate, AcquireResult(effect.attempt, None, effect.term, 0))

    def _renew(self, name: str, candidate: Candidate, effect: Renew) -> None:
        value = Stored(candidate.me, candidate.incarnation, effect.term, self.now)
        revision = self.key.write(value, effect.expected_revision)
        outcome: Literal["ok", "lost"] = "lost" if revision is None else "ok"
        self._answer(name, candidate, RenewResult(effect.attempt, outcome, revision or 0))
        self._maybe_unknown(name, candidate, RenewResult(effect.attempt, "unknown", 0))

    def _maybe_unknown(self, name: str, candidate: Candidate, event: Event) -> None:
        """The shell gives up waiting, perhaps just before the answer comes."""
        if self.random.random() < self.loss:
            self._answer(name, candidate, event)
