"""`Watched`: a circuit breaker that counts what it does and tells of each change once.

What it tells are the events ``breaker.opened``, ``breaker.half_open`` and ``breaker.closed``. That it is
half open is found out, and told, when the first call is let through again: nothing watches the clock.
The decisions are in `base/resilience.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from foundation_nats.base.resilience import Breaker, BreakerState

Emit = Callable[..., None]
"""As `foundation_nats.cluster.events.Events.emit`."""
_SAYS = {
    BreakerState.OPEN: ("opened", "{} fails: it is not called for {:g} s."),
    BreakerState.HALF_OPEN: ("half_open", "{} is tried again."),
    BreakerState.CLOSED: ("closed", "{} works again."),
}


class Watched:
    """One breaker of what is called *name*."""

    __slots__ = ("_breaker", "_emit", "_shown", "kind", "name", "opened", "refused")

    def __init__(self, name: str, breaker: Breaker, emit: Emit | None, *, kind: str) -> None:
        """*kind*: ``ask`` where an agent is asked, ``call`` for calls of the user's own."""
        self.name = name
        self.kind = kind
        self._breaker = breaker
        self._emit = emit
        self._shown = BreakerState.CLOSED
        self.refused = 0
        """Calls that it has not let through."""
        self.opened = 0
        """How often it has opened."""

    def state(self, now: float) -> BreakerState:
        """Closed, open or half open."""
        return self._breaker.state(now)

    def retry_in(self, now: float) -> float:
        """Seconds until a call may be tried again; 0 if now."""
        return self._breaker.retry_in(now)

    def begin(self, now: float) -> int | None:
        """As `Breaker.begin`."""
        permit = self._breaker.begin(now)
        if permit is None:
            self.refused += 1
        self._look(now)
        return permit

    def end(self, permit: int, now: float, *, ok: bool) -> None:
        """As `Breaker.end`."""
        self._breaker.end(permit, now, ok=ok)
        self._look(now)

    def abandon(self, permit: int) -> None:
        """As `Breaker.abandon`."""
        self._breaker.abandon(permit)

    def _look(self, now: float) -> None:
        state = self._breaker.state(now)
        if state is self._shown:
            return
        self._shown = state
        self.opened += state is BreakerState.OPEN
        if self._emit is None:
            return
        what, text = _SAYS[state]
        wait = self._breaker.retry_in(now)
        self._emit(
            "breaker",
            what,
            text.format(self.name, wait),
            target=self.name,
            kind=self.kind,
            refused=self.refused,
            opened=self.opened,
            retry_in_s=round(wait, 3),
        )
