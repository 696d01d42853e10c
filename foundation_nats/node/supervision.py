"""Decide when a child that ended is started again, how late, and when that has gone too far.

Pure. As in OTP: each child has a policy, and all children of one supervisor
share one restart intensity. A child that ends too often for it is not restarted
but handed to whoever stands above (`Escalate`); the others stay supervised, and
the intensity stays spent until its window has passed.

A first restart is immediate, the next ones wait ever longer; `good_life_s`
without an end makes a child new again. Failures count when they happen: in no
window of `window_s` are more than `max_restarts` restarts decided, but for those of ends
that have their cause elsewhere (`Exited.is_blamed`): ending this supervisor, too, would
only take the cause to the next one. They wait at most `blamed_backoff_max_s`, because
whoever deals with the cause slows it down.

Obligations of the caller: say `Started` when a child runs, `Exited` when it
ended or could not be started, `Removed` when it was stopped on purpose; carry
out a `Restart` after its delay, unless the child was removed meanwhile. What is
remembered is one small record per child, until it is removed, given up or
escalated.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never


class Policy(StrEnum):
    """Which ends of a child are followed by a restart."""

    PERMANENT = "permanent"
    """All."""
    TRANSIENT = "transient"
    """Those that are failures."""
    TEMPORARY = "temporary"
    """None."""


@dataclass(frozen=True, slots=True)
class Started:
    """The child runs; the first time this makes it known, later its policy may differ."""

    key: str
    policy: Policy = Policy.PERMANENT


@dataclass(frozen=True, slots=True)
class Exited:
    """The child ended, or a restart of it failed."""

    key: str
    reason: str
    is_normal: bool = False
    is_blamed: bool = False
    """Somebody is known to have ended it, and is dealt with elsewhere."""


@dataclass(frozen=True, slots=True)
class Removed:
    """The child was stopped on purpose: nothing more is done about it."""

    key: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Started | Exited | Removed | Tick


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the child again after *delay_s*."""

    key: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The child's policy wants no restart; it is forgotten."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Escalate:
    """Restarting has gone too far; the child is forgotten here, somebody else must decide."""

    key: str
    reason: str


Effect = Restart | GiveUp | Escalate


@dataclass(slots=True)
class RestartIntensity:
    """At most *max_restarts* in any *window_s*."""

    max_restarts: int
    window_s: float
    _times: deque[float] = field(default_factory=deque)

    def __post_init__(self) -> None:
        assert self.max_restarts >= 0
        assert self.window_s > 0

    def permit(self, now: float) -> bool:
        """Count a restart, unless it would be one too many."""
        if self.spent(now) >= self.max_restarts:
            return False
        self._times.append(now)
        return True

    def spent(self, now: float) -> int:
        """How many restarts count at present."""
        while self._times and now >= self._times[0] + self.window_s:
            self._times.popleft()
        return len(self._times)


@dataclass(slots=True)
class _Child:
    policy: Policy
    started_at: float | None
    """None while it waits for its restart."""
    restarts: int = 0
    """In a row, without a good life in between."""


@dataclass(frozen=True, slots=True)
class SupervisorStatistics:
    """Numbers for debugging."""

    running: int
    waiting: int
    restarts: int
    escalations: int


@dataclass(slots=True)
class Supervisor:
    """The decisions about the children of one supervisor.

    Feed it with `step`; call it again no later than `deadline`.
    """

    max_restarts: int = 10
    window_s: float = 60.0
    backoff_first_s: float = 0.1
    backoff_max_s: float = 30.0
    blamed_backoff_max_s: float = 1.0
    good_life_s: float = 60.0
    _children: dict[str, _Child] = field(default_factory=dict)
    _intensity: RestartIntensity = field(init=False)
    _restarts: int = 0
    _escalations: int = 0

    def __post_init__(self) -> None:
        assert 0 < self.backoff_first_s <= self.backoff_max_s
        assert self.good_life_s > 0
        self._intensity = RestartIntensity(self.max_restarts, self.window_s)

    # ---- asking -----------------------------------------------------------------

    @property
    def keys(self) -> tuple[str, ...]:
        """The children it knows, running or waiting for a restart."""
        return tuple(self._children)

    def statistics(self) -> SupervisorStatistics:
        """Numbers for debugging."""
        waiting = sum(child.started_at is None for child in self._children.values())
        return SupervisorStatistics(
            running=len(self._children) - waiting,
            waiting=waiting,
            restarts=self._restarts,
            escalations=self._escalations,
        )

    def deadline(self) -> float | None:
        """When the next child will have had a good life; later than the last step."""
        return min(
            (
                child.started_at + self.good_life_s
                for child in self._children.values()
                if child.started_at is not None and child.restarts > 0
            ),
            default=None,
        )

    # ---- stepping ---------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take note of *event* and of the time; return what to do."""
        self._pardon(now)
        match event:
            case Started(key, policy):
                self._started(key, policy, now)
                return []
            case Exited():
                return self._exited(event, now)
            case Removed(key):
                self._children.pop(key, None)
                return []
            case Tick():
                return []
            case _:
                assert_never(event)

    def _pardon(self, now: float) -> None:
        for child in self._children.values():
            if child.started_at is not None and now >= child.started_at + self.good_life_s:
                child.restarts = 0

    def _started(self, key: str, policy: Policy, now: float) -> None:
        child = self._children.setdefault(key, _Child(policy, now))
        child.policy = policy
        if child.started_at is None:
            child.started_at = now

    def _exited(self, event: Exited, now: float) -> list[Effect]:
        key, reason = event.key, event.reason
        child = self._children.get(key)
        if child is None:
            return []  # stopped on purpose, or given up: its end is no news
        wants_restart = child.policy is Policy.PERMANENT or (
            child.policy is Policy.TRANSIENT and not event.is_normal
        )
        if not wants_restart:
            del self._children[key]
            return [GiveUp(key, reason)]
        if not event.is_blamed and not self._intensity.permit(now):
            del self._children[key]
            self._escalations += 1
            limit = f"it would take more than {self.max_restarts} restarts in {self.window_s:g} s"
            return [Escalate(key, f"{limit}: {reason}")]
        delay_s = self._backoff(child.restarts)
        if event.is_blamed:
            delay_s = min(delay_s, self.blamed_backoff_max_s)
        child.started_at = None
        child.restarts += 1
        self._restarts += 1
        return [Restart(key, delay_s)]

    def _backoff(self, restarts: int) -> float:
        if restarts == 0:
            return 0.0
        # Far beyond the ceiling the power would overflow.
        return min(self.backoff_max_s, self.backoff_first_s * 2.0 ** min(restarts - 1, 64))
