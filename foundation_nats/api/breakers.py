"""`Breakers`: a client's circuit breakers, one for each target that it asks with one.

In memory of this client alone. What counts as a failure is that nobody answers: no answer in
time, or an agent that does not run. An error that the agent has answered with is an answer, and what
fails at the server says nothing about the agent. The decisions are in `base/resilience.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foundation_nats.agent.breaking import Emit, Watched
from foundation_nats.base.clock import monotonic
from foundation_nats.base.resilience import Breaker, BreakerState
from foundation_nats.errors import (
    AgentError,
    AgentUnavailableError,
    AskTimeoutError,
    BreakerOpenError,
    ConfigError,
)
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

KEPT_MAX = 10_000
"""Targets; the one that was asked longest ago is forgotten first."""

_EVENTS_MAX = 2000
_STATES = {
    "opened": BreakerState.OPEN,
    "half_open": BreakerState.HALF_OPEN,
    "closed": BreakerState.CLOSED,
}


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """When a breaker opens, and for how long."""

    failures: int = 5
    """So many within `window_s` open it."""
    window_s: float = 30.0
    pause_s: float = 5.0
    """So long nothing is asked; twice as long after each probe that fails, at most eight times."""
    probes: int = 1
    """So many questions are let through after that, to find out."""


@dataclass(frozen=True, slots=True)
class BreakerInfo:
    """One breaker, as `Cluster.breakers` shows it."""

    target: str
    state: BreakerState
    retry_in_s: float
    """Until a question is let through; 0: now."""
    refused: int
    """Questions that it has not let through."""
    opened: int
    """How often it has opened."""


class ReportedBreaker(WireModel):
    """A breaker as its process has last told of it; the JSON of ``foundation breakers``."""

    source: str
    """The client, or the worker."""
    target: str
    """Who is not asked, or what is not called."""
    kind: str
    """``ask`` where agents are asked, ``call`` for `ctx.breaker` and `cluster.guards`."""
    state: BreakerState
    since: str
    opened: int
    """How often it has opened."""
    refused: int
    """What it has not let through, by then."""


class Breakers:
    """The breakers of one client, by target."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._known: OrderedDict[str, tuple[BreakerRule, Watched]] = OrderedDict()

    def list(self) -> list[BreakerInfo]:
        """All, by target."""
        now = monotonic()
        return [
            BreakerInfo(target, one.state(now), one.retry_in(now), one.refused, one.opened)
            for target, (_, one) in sorted(self._known.items())
        ]

    @contextmanager
    def around(self, target: str, rule: BreakerRule) -> Iterator[None]:
        """Let one question to *target* through, and learn from how it ends.

        Raises:
            BreakerOpenError: it is not let through.
            ConfigError: a number of *rule* is wrong.
        """
        one = self._one(target, rule)
        permit = one.begin(monotonic())
        if permit is None:
            wait = one.retry_in(monotonic())
            raise BreakerOpenError(
                f"{target} has not answered too often and is not asked for {wait:.1f} s.",
                hint="`cluster.breakers()` shows it. Signals sent with `send` wait for the agent.",
                name=target,
                retry_in_s=wait,
            )
        try:
            yield
        except (AskTimeoutError, AgentUnavailableError):
            one.end(permit, monotonic(), ok=False)
            raise
        except AgentError:
            one.end(permit, monotonic(), ok=True)
            raise
        except BaseException:
            one.abandon(permit)
            raise
        else:
            one.end(permit, monotonic(), ok=True)

    def _one(self, target: str, rule: BreakerRule) -> Watched:
        known = self._known.get(target)
        if known is None or known[0] != rule:
            try:
                breaker = Breaker(
                    failures=rule.failures,
                    window_s=rule.window_s,
                    pause_s=rule.pause_s,
                    probes=rule.probes,
                )
            except ValueError as error:
                raise ConfigError(f"A breaker of {target}: {error}.") from error
            known = self._known[target] = rule, Watched(target, breaker, self._emit, kind="ask")
            if len(self._known) > KEPT_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(target)
        return known[1]


async def reported(cluster: Cluster) -> list[ReportedBreaker]:
    """What clients and workers have told of their breakers, the newest word of each; by name.

    Raises:
        BusTimeoutError, BusUnavailableError
    """
    found: dict[tuple[str, str, str], ReportedBreaker] = {}
    for event in await cluster.events.list(topic="breaker", limit=_EVENTS_MAX):
        state = _STATES.get(event.what)
        if state is None:
            continue
        data = event.data
        one = ReportedBreaker(
            source=event.source,
            target=str(data.get("target")),
            kind=str(data.get("kind", "ask")),
            state=state,
            since=event.at,
            opened=int(data.get("opened", 0)),
            refused=int(data.get("refused", 0)),
        )
        found[one.source, one.kind, one.target] = one
    return [one for _, one in sorted(found.items())]


def rule_of(breaker: bool | BreakerRule | None) -> BreakerRule | None:
    """What `ask` was given as a rule."""
    if isinstance(breaker, BreakerRule):
        return breaker
    return BreakerRule() if breaker else None
