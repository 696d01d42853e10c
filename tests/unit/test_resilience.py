"""Breakers, buckets and back-off: when a call may be made."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats import Agent, Signal, State, on
from foundation_nats.base.resilience import Breaker, BreakerState, TokenBucket, backoff_s
from foundation_nats.errors import BreakerOpenError, ConfigError, HandlerError, OverloadError
from foundation_nats.testing import AgentHarness


def _call(breaker: Breaker, now: float, *, ok: bool) -> bool:
    permit = breaker.begin(now)
    if permit is None:
        return False
    breaker.end(permit, now, ok=ok)
    return True


def test_a_breaker_opens_probes_and_closes() -> None:
    """Closed until enough failures within the window; then a pause, one probe, longer or closed."""
    breaker = Breaker(failures=3, window_s=10, pause_s=5)
    assert [_call(breaker, t, ok=False) for t in (0, 1, 2)] == [True] * 3
    assert breaker.state(2) is BreakerState.OPEN
    assert not _call(breaker, 6.9, ok=True)
    assert breaker.retry_in(4) == 3
    probe = breaker.begin(7)
    assert probe is not None
    assert breaker.begin(7) is None, "one probe at a time"
    breaker.end(probe, 8, ok=False)
    assert not _call(breaker, 17.9, ok=True), "twice the pause"
    assert _call(breaker, 18, ok=True)
    assert breaker.state(18) is BreakerState.CLOSED
    assert breaker.retry_in(18) == 0


def test_failures_that_are_far_apart_open_nothing() -> None:
    """Only those within the window count."""
    breaker = Breaker(failures=3, window_s=10, pause_s=5)
    assert all(_call(breaker, t, ok=False) for t in range(0, 100, 6))


def test_what_ends_late_or_is_cancelled_says_nothing() -> None:
    """A call from before the opening neither closes it nor prolongs it; a cancelled probe frees its place."""
    breaker = Breaker(failures=1, pause_s=5)
    early = breaker.begin(0)
    assert early is not None
    assert _call(breaker, 1, ok=False)
    breaker.end(early, 2, ok=True)
    assert breaker.state(2) is BreakerState.OPEN
    probe = breaker.begin(6)
    assert probe is not None
    breaker.abandon(probe)
    assert breaker.begin(6) is not None


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60))
def test_an_open_breaker_lets_at_most_its_probes_through(steps: list[tuple[float, bool]]) -> None:
    """Whatever happens, no two calls are let through while it is not closed and one is under way."""
    breaker, now = Breaker(failures=2, window_s=5, pause_s=1), 0.0
    for pause, ok in steps:
        now += pause
        permit = breaker.begin(now)
        if permit is None:
            assert breaker.retry_in(now) > 0
            continue
        if breaker.state(now) is BreakerState.HALF_OPEN:
            assert breaker.begin(now) is None
        breaker.end(permit, now, ok=ok)


@given(st.floats(0.1, 100), st.floats(1, 50), st.lists(st.floats(0, 1), max_size=100))
def test_a_bucket_is_never_exceeded(rate: float, burst: float, pauses: list[float]) -> None:
    """Calls that go at once within any time are at most the burst and what has flown in."""
    bucket, now, taken = TokenBucket(rate, burst), 0.0, 0
    for pause in pauses:
        now += pause
        if bucket.take(now) is not None:
            taken += 1
    assert taken <= burst + rate * now + 1e-6


def test_who_may_wait_is_told_how_long() -> None:
    """And who waits too long is not counted."""
    bucket = TokenBucket(2, 1)
    assert bucket.take(0) == 0
    assert bucket.take(0, within_s=0.4) is None
    assert bucket.take(0, within_s=0.5) == 0.5
    with pytest.raises(ValueError):
        TokenBucket(0)


@given(st.integers(1, 200), st.floats(0, 1, exclude_max=True))
def test_pauses_double_and_are_bounded(attempt: int, chance: float) -> None:
    """With jitter, and never none."""
    assert 0.01 <= backoff_s(attempt, chance) <= min(10, 0.1 * 2.0 ** min(attempt - 1, 60))


class Caller(Agent):
    """Calls what fails."""

    class State(State):
        called: int = 0

    @on("call")
    async def call(self, signal: Signal[bool]) -> str:
        async with self.ctx.breaker("out", failures=2, pause_s=60):
            if signal.data:
                raise OSError("down")
        return "called"

    @on("often")
    async def often(self, signal: Signal) -> None:
        await self.ctx.limiter("rare", rate=0.001).wait()

    @on("retry")
    async def retry(self, signal: Signal[int]) -> int:
        tries = 0

        async def attempt() -> int:
            nonlocal tries
            tries += 1
            if tries < signal.data:
                raise OSError("not yet")
            return tries

        return await self.ctx.retrying(attempt, attempts=3, first_s=0.001, on=OSError)

    @on("together")
    async def together(self, signal: Signal[int]) -> None:
        async def one() -> None:
            async with self.ctx.bulkhead("room", limit=1, wait_s=0.01):
                await asyncio.sleep(0.05)

        await asyncio.gather(*(one() for _ in range(signal.data)))

    @on("wrong")
    async def wrong(self, signal: Signal) -> None:
        self.ctx.breaker("wrong", failures=0)


async def test_handlers_use_them() -> None:
    """By name, through the context."""
    async with AgentHarness(Caller) as agent:
        assert await agent.ask("call", False) == "called"
        for _ in range(2):
            with pytest.raises(HandlerError):
                await agent.ask("call", True)
        with pytest.raises(BreakerOpenError, match="out has failed too often"):
            await agent.ask("call", False)
        await agent.ask("often")
        with pytest.raises(OverloadError):
            await agent.ask("often")
        assert await agent.ask("retry", 3) == 3
        with pytest.raises(HandlerError):
            await agent.ask("retry", 4)
        await agent.ask("together", 1)
        with pytest.raises(OverloadError):
            await agent.ask("together", 2)
        with pytest.raises(ConfigError, match="wrong"):
            await agent.ask("wrong")
