"""`Breakers`: a client's circuit breakers, one for each target that it asks with one.

In memory of this client alone. What counts as a failure is that nobody answers: no answer in
time, or an agent that does not run. An error that the agent has answered with is an answer, and what
fails at the server says nothing about the agent. The decisions are in `base/resilience.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from foundation_nats.base.clock import monotonic
from foundation_nats.base.resilience import Breaker, BreakerState
from foundation_nats.errors import (
    AgentError,
    AgentUnavailableError,
    AskTimeoutError,
    BreakerOpenError,
    ConfigError,
)

KEPT_MAX = 10_000
"""Targets; the one that was asked longest ago is forgotten first."""

Emit = Callable[..., None]


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


class _One:
    __slots__ = ("breaker", "opened", "refused", "rule", "shown")

    def __init__(self, rule: BreakerRule) -> None:
        self.rule = rule
        self.breaker = Breaker(
            failures=rule.failures, window_s=rule.window_s, pause_s=rule.pause_s, probes=rule.probes
        )
        self.refused = 0
        self.opened = 0
        self.shown = BreakerState.CLOSED


class Breakers:
    """The breakers of one client, by target."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._known: OrderedDict[str, _One] = OrderedDict()

    def list(self) -> list[BreakerInfo]:
        """All, by target."""
        now = monotonic()
        return [
            BreakerInfo(
                target, one.breaker.state(now), one.breaker.retry_in(now), one.refused, one.opened
            )
            for target, one in sorted(self._known.items())
        ]

    @contextmanager
    def around(self, target: str, rule: BreakerRule) -> Iterator[None]:
        """Let one question to *target* through, and learn from how it ends.

        Raises:
            BreakerOpenError: it is not let through.
            ConfigError: a number of *rule* is wrong.
        """
        one = self._one(target, rule)
        permit = one.breaker.begin(monotonic())
        if permit is None:
            one.refused += 1
            wait = one.breaker.retry_in(monotonic())
            raise BreakerOpenError(
                f"{target} has not answered too often and is not asked for {wait:.1f} s.",
                hint="`cluster.breakers()` shows it. Signals sent with `send` wait for the agent.",
                name=target,
                retry_in_s=wait,
            )
        try:
            yield
        except (AskTimeoutError, AgentUnavailableError):
            one.breaker.end(permit, monotonic(), ok=False)
            raise
        except AgentError:
            one.breaker.end(permit, monotonic(), ok=True)
            raise
        except BaseException:
            one.breaker.abandon(permit)
            raise
        else:
            one.breaker.end(permit, monotonic(), ok=True)
        finally:
            self._tell(target, one)

    def _one(self, target: str, rule: BreakerRule) -> _One:
        one = self._known.get(target)
        if one is None or one.rule != rule:
            try:
                one = self._known[target] = _One(rule)
            except ValueError as error:
                raise ConfigError(f"A breaker of {target}: {error}.") from error
            if len(self._known) > KEPT_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(target)
        return one

    def _tell(self, target: str, one: _One) -> None:
        state = one.breaker.state(monotonic())
        if state is one.shown or state is BreakerState.HALF_OPEN:
            return
        one.shown = state
        data: dict[str, Any] = {"target": target, "refused": one.refused}
        if state is BreakerState.OPEN:
            one.opened += 1
            text = (
                f"{target} does not answer: it is not asked for {one.rule.pause_s:g} s or longer."
            )
            self._emit("breaker", "opened", text, **data)
        else:
            self._emit("breaker", "closed", f"{target} answers again.", **data)


def rule_of(breaker: bool | BreakerRule | None) -> BreakerRule | None:
    """What `ask` was given as a rule."""
    if isinstance(breaker, BreakerRule):
        return breaker
    return BreakerRule() if breaker else None
