"""`Intake`: the numbered items of an iterable or a stream, and how runs over them are written down in spans.

The deciding part is pure: `opened`, `digest_of`. Bounded: of the input no more is held than was asked
for plus one buffer. A source that can't be repeated from its beginning can't be gone on with
after a crash: whoever goes on reads the input again and passes over what is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Iterable, Iterator, Sequence
from hashlib import blake2b
from types import TracebackType
from typing import Any, Self, TypeVar

from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ConfigError
from foundation_schemas.coordination import Span

T = TypeVar("T")

_LINGER_S = 0.02
"""How long is waited for more of a slow stream before what is there is taken."""

Items = Iterable[Any] | AsyncIterable[Any]


# ---- decisions ----------------------------------------------------------------------


def digest_of(items: Sequence[Any]) -> str:
    """What tells *items* from others.

    Raises:
        ConfigError: they are not JSON.
    """
    try:
        return blake2b(to_json(list(items)), digest_size=8).hexdigest()
    except TypeError as error:
        raise ConfigError(f"The items can't be sent: {error}.") from error


def end_of(begin: int, spans: Sequence[Span]) -> int:
    """The number of the first item behind *spans*, the first of which is *begin*."""
    return spans[-1].first + spans[-1].count if spans else begin


def opened(begin: int, spans: Sequence[Span], new: Sequence[Span]) -> list[Span] | None:
    """*spans* and *new* ones behind them; None if others were opened there meanwhile."""
    if not new or new[0].first != end_of(begin, spans):
        return None
    return [*spans, *new]


async def all_of(parts: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all, and only then raise what one of them has raised: nothing is left behind."""
    found = await asyncio.gather(*parts, return_exceptions=True)
    results: list[T] = []
    for one in found:
        if isinstance(one, BaseException):
            raise one
        results.append(one)
    return results


# ---- reading --------------------------------------------------------------------------


class Intake:
    """Enter it to read *items*; `position` is the number of the next one."""

    def __init__(self, items: Items, bound: int) -> None:
        self.position = 0
        self._stream = items if isinstance(items, AsyncIterable) else None
        self._rest: Iterator[Any] = iter(()) if isinstance(items, AsyncIterable) else iter(items)
        self._bound = bound
        self._buffer: deque[Any] = deque()
        self._is_ended = False
        self._failure: BaseException | None = None
        self._more = asyncio.Event()
        self._room = asyncio.Event()
        self._feeding: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._stream is not None:
            self._feeding = asyncio.create_task(self._feed(self._stream))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)

    async def _feed(self, stream: AsyncIterable[Any]) -> None:
        try:
            async for item in stream:
                self._buffer.append(item)
                self._more.set()
                while len(self._buffer) >= self._bound:
                    self._room.clear()
                    await self._room.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the caller's own stream: it is raised where items are taken
            self._failure = error
        self._is_ended = True
        self._more.set()

    async def _fill(self, count: int) -> None:
        """Until *count* are there, or no more come."""
        self._bound = max(self._bound, count)
        while len(self._buffer) < count and not self._is_ended:
            if self._stream is None:
                some = list(itertools.islice(self._rest, count - len(self._buffer)))
                self._buffer.extend(some)
                self._is_ended = not some
                await asyncio.sleep(0)
            else:
                self._more.clear()
                self._room.set()
                await self._more.wait()
        if self._failure is not None and len(self._buffer) < count:
            raise self._failure

    async def peek(self, most: int) -> list[Any]:
        """The next items, at most *most*, without taking them; none: the input has ended."""
        await self._fill(1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self._fill(most)
        return list(itertools.islice(self._buffer, most))

    async def take(self, count: int) -> list[Any]:
        """The next *count* items.

        Raises:
            ConfigError: there are not so many.
        """
        await self._fill(count)
        if len(self._buffer) < count:
            raise ConfigError(
                f"The input ends after {self.position + len(self._buffer)} items, but "
                f"{self.position + count} were taken in before.",
                hint="Who goes on needs the same input, from its beginning.",
            )
        self._room.set()
        self.position += count
        return [self._buffer.popleft() for _ in range(count)]

    async def pass_over(self, until: int) -> None:
        """Take all items before number *until*.

        Raises:
            ConfigError: there are not so many.
        """
        while self.position < until:
            await self.take(min(1000, until - self.position))

    async def take_span(self, span: Span, what: str) -> list[Any]:
        """The items of *span*.

        Raises:
            ConfigError: they are others than those that were taken in before.
        """
        items = await self.take(span.count)
        if digest_of(items) != span.digest:
            raise ConfigError(
                f"{what}: the items {span.first} to {span.first + span.count - 1} are others than "
                "before.",
                hint="Who goes on needs the same input, from its beginning.",
            )
        return items


__all__ = ["Intake", "Items", "all_of", "digest_of", "end_of", "opened"]
