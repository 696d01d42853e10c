"""`ctx.breaker`, `ctx.limiter`, `ctx.bulkhead`, `ctx.retrying`: calls to the outside that may fail.

A guard is named, and shared by all agents of one worker process: what does not answer one
doesn't answer the other. A client has its own (`cluster.guards`). It is in memory only; each process
learns by itself, and tells by events what its breakers do. The decisions are
in `base/resilience.py`. How a guard is set is said where it is first used.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

from foundation_nats.agent.breaking import Emit, Watched
from foundation_nats.base.clock import monotonic
from foundation_nats.base.resilience import Breaker, BreakerState, TokenBucket, backoff_s
from foundation_nats.errors import BreakerOpenError, ConfigError, OverloadError

R = TypeVar("R")
G = TypeVar("G")

GUARDS_MAX = 10_000


class Guard:
    """One call through a breaker: ``async with self.ctx.breaker("mail"): await send()``."""

    def __init__(self, name: str, breaker: Watched) -> None:
        self.name = name
        self._breaker = breaker
        self._permit: int | None = None

    @property
    def state(self) -> BreakerState:
        """Closed, open or half open."""
        return self._breaker.state(monotonic())

    async def __aenter__(self) -> None:
        """Raises `BreakerOpenError`: what follows is not run."""
        self._permit = self._breaker.begin(monotonic())
        if self._permit is None:
            wait = self._breaker.retry_in(monotonic())
            raise BreakerOpenError(
                f"{self.name} has failed too often and is not called for {wait:.1f} s.",
                name=self.name,
                retry_in_s=wait,
            )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._permit is not None
        if error is None or isinstance(error, Exception):
            self._breaker.end(self._permit, monotonic(), ok=error is None)
        else:
            self._breaker.abandon(self._permit)


class Limiter:
    """So many a second: ``await self.ctx.limiter("mail", rate=10).wait(timeout=1)``."""

    def __init__(self, name: str, bucket: TokenBucket) -> None:
        self.name = name
        self._bucket = bucket

    async def wait(self, *, timeout: float = 0.0) -> None:
        """Return when the next call may be made.

        Raises:
            OverloadError: that is not within *timeout*; it is not counted.
        """
        pause = self._bucket.take(monotonic(), within_s=timeout)
        if pause is None:
            raise OverloadError(f"{self.name} is called too often.", name=self.name)
        if pause:
            await asyncio.sleep(pause)


class Bulkhead:
    """So many at once: ``async with self.ctx.bulkhead("db", limit=4): …``; the rest wait, or are refused."""

    def __init__(self, name: str, room: asyncio.Semaphore, wait_s: float) -> None:
        self.name = name
        self._room = room
        self._wait_s = wait_s

    async def __aenter__(self) -> None:
        """Raises `OverloadError`: no place within the time."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._room.acquire()
        except TimeoutError:
            raise OverloadError(
                f"{self.name} had no place within {self._wait_s:g} s.", name=self.name
            ) from None

    async def __aexit__(self, *_: object) -> None:
        self._room.release()


class Guards:
    """The guards of one worker process, or of one client, by kind and name."""

    def __init__(self, emit: Emit | None = None) -> None:
        """*emit* is told what the breakers do."""
        self._emit = emit
        self._breakers: dict[str, Watched] = {}
        self._buckets: dict[str, TokenBucket] = {}
        self._rooms: dict[str, asyncio.Semaphore] = {}

    def watched(self) -> list[Watched]:
        """All breakers, by name."""
        return [breaker for _, breaker in sorted(self._breakers.items())]

    def breaker(
        self,
        name: str,
        *,
        failures: int = 5,
        window_s: float = 30.0,
        pause_s: float = 5.0,
        probes: int = 1,
    ) -> Guard:
        """A circuit breaker: ``async with guards.breaker("mail"): …``.

        After *failures* within *window_s* it raises `BreakerOpenError` at once for *pause_s*, then lets
        *probes* calls through. Made as said where it is first used.

        Raises:
            ConfigError: a number is wrong.
        """

        def make() -> Watched:
            breaker = Breaker(failures=failures, window_s=window_s, pause_s=pause_s, probes=probes)
            return Watched(name, breaker, self._emit, kind="call")

        return Guard(name, _known(self._breakers, name, make))

    def limiter(self, name: str, *, rate: float, burst: float | None = None) -> Limiter:
        """*rate* calls a second, *burst* at once: ``await guards.limiter("mail", rate=10).wait(timeout=1)``.

        Raises:
            ConfigError: a number is wrong.
        """
        return Limiter(name, _known(self._buckets, name, lambda: TokenBucket(rate, burst)))

    def bulkhead(self, name: str, *, limit: int, wait_s: float = 5.0) -> Bulkhead:
        """At most *limit* at once, the rest wait *wait_s*: ``async with guards.bulkhead("db", limit=4): …``.

        Raises:
            ConfigError: *limit* is below 1.
        """
        if limit < 1:
            raise ConfigError(f"bulkhead {name!r}: limit must be at least 1, not {limit}.")
        return Bulkhead(name, _known(self._rooms, name, lambda: asyncio.Semaphore(limit)), wait_s)

    async def retrying(
        self,
        function: Callable[[], Awaitable[R]],
        *,
        attempts: int = 3,
        first_s: float = 0.1,
        most_s: float = 10.0,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> R:
        """Await *function* again while it raises *on*, with doubling pauses and jitter.

        The error of the last attempt, or of an open breaker, is raised.
        """
        return await retrying(function, attempts=attempts, first_s=first_s, most_s=most_s, on=on)


def _known(guards: dict[str, G], name: str, make: Callable[[], G]) -> G:
    found = guards.get(name)
    if found is None:
        if len(guards) >= GUARDS_MAX:
            raise ConfigError(
                f"There are {GUARDS_MAX} guards already: name them after what is called, "
                "not after each call."
            )
        try:
            found = guards[name] = make()
        except ValueError as error:
            raise ConfigError(f"guard {name!r}: {error}.") from error
    return found


async def retrying(
    function: Callable[[], Awaitable[R]],
    *,
    attempts: int,
    first_s: float,
    most_s: float,
    on: type[Exception] | tuple[type[Exception], ...],
) -> R:
    """Await *function* again while it raises *on*, with doubling pauses and jitter; the last error counts.

    A breaker that is open is not waited for.
    """
    attempt = 1
    while True:
        try:
            return await function()
        except on as error:
            if attempt >= attempts or isinstance(error, BreakerOpenError):
                raise
        await asyncio.sleep(backoff_s(attempt, random.random(), first_s=first_s, most_s=most_s))
        attempt += 1
