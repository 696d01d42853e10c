"""Whether a call may be made now: `Breaker`, `TokenBucket`, and how long to wait before the next try.

Pure: the time and the chance are arguments. A breaker is closed while calls succeed; too many
failures within a window open it, and calls are refused at once instead of waiting for what
does not answer; after a while it lets a few probes through (half open), and closes on
success or opens again for longer. The states are those of M. Nygard, *Release It!*.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

_ROUNDING = 1e-9
"""Of a token: who has waited as long as was said may go."""
_LONGEST = 8
"""Times the first pause: an open breaker never rests longer."""


class BreakerState(StrEnum):
    """What a breaker does with calls."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Stops calls to what fails."""

    def __init__(
        self, *, failures: int = 5, window_s: float = 30.0, pause_s: float = 5.0, probes: int = 1
    ) -> None:
        """*failures* within *window_s* open it for *pause_s*, which doubles with each failed probe.

        Raises:
            ValueError: one of them is not positive.
        """
        if failures < 1 or probes < 1 or window_s <= 0 or pause_s <= 0:
            raise ValueError("failures, probes, window_s and pause_s must be positive")
        self._failures_max = failures
        self._window_s = window_s
        self._first_s = pause_s
        self._probes_max = probes
        self._failed_at: deque[float] = deque(maxlen=failures)
        self._opened_at: float | None = None
        self._pause_s = pause_s
        self._probing = 0
        self._era = 0
        """Counts openings and closings: a call that ends in a later one says nothing."""

    def state(self, now: float) -> BreakerState:
        """What it does with a call that comes now."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        if now - self._opened_at < self._pause_s:
            return BreakerState.OPEN
        return BreakerState.HALF_OPEN

    def begin(self, now: float) -> int | None:
        """A permit for one call, to be given back by `end` or `abandon`; None: don't call."""
        match self.state(now):
            case BreakerState.CLOSED:
                return self._era
            case BreakerState.OPEN:
                return None
            case BreakerState.HALF_OPEN:
                if self._probing >= self._probes_max:
                    return None
                self._probing += 1
                return self._era

    def end(self, permit: int, now: float, *, ok: bool) -> None:
        """The call for which *permit* was given has ended."""
        if permit != self._era:
            return
        if self._opened_at is None:
            if not ok:
                self._failed_at.append(now)
                is_full = len(self._failed_at) == self._failures_max
                if is_full and now - self._failed_at[0] <= self._window_s:
                    self._turn(now)
        elif ok:
            self._pause_s = self._first_s
            self._turn(None)
        else:
            self._pause_s = min(self._pause_s * 2, self._first_s * _LONGEST)
            self._turn(now)

    def _turn(self, opened_at: float | None) -> None:
        self._opened_at = opened_at
        self._era += 1
        self._probing = 0
        self._failed_at.clear()

    def abandon(self, permit: int) -> None:
        """The call was cancelled: it says nothing about what it called."""
        if permit == self._era and self._probing:
            self._probing -= 1

    def retry_in(self, now: float) -> float:
        """Seconds until a call may be tried again; 0 if now."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._pause_s - now)


class TokenBucket:
    """At most *rate* a second on average, and *burst* at once."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        """*burst* is *rate*, at least 1, unless given.

        Raises:
            ValueError: *rate* is not positive, or *burst* below 1.
        """
        self._burst = max(1.0, rate) if burst is None else burst
        if rate <= 0 or self._burst < 1:
            raise ValueError("rate must be positive and burst at least 1")
        self._rate = rate
        self._tokens = self._burst
        self._at: float | None = None

    def take(self, now: float, *, within_s: float = 0.0) -> float | None:
        """How long to wait before the call, which is counted; None: longer than *within_s*, not counted."""
        wait = self.wait_s(now)
        if wait > within_s:
            return None
        self._tokens -= 1.0
        return wait

    def wait_s(self, now: float) -> float:
        """How long a call must wait; it is not counted."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now
        missing = 1.0 - self._tokens
        return 0.0 if missing <= _ROUNDING else missing / self._rate


def backoff_s(attempt: int, chance: float, *, first_s: float = 0.1, most_s: float = 10.0) -> float:
    """The pause after try number *attempt* (from 1): doubling up to *most_s*, with full jitter.

    *chance* is random in [0, 1). At least a tenth of the doubled pause, so that it is never none.
    """
    pause = min(most_s, first_s * 2.0 ** min(attempt - 1, 60))
    return pause * (0.1 + 0.9 * chance)
