"""Coroutines over simulated time: what a shell needs of an event loop, and no more.

Deterministic and without asyncio: a coroutine goes on within the event that
resolves what it waits for, so a dead or frozen node's coroutines stand still.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Sequence
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Later(Generic[T]):
    """A value that is not there yet; one coroutine may wait for it."""

    __slots__ = ("is_done", "value", "waiter")

    def __init__(self) -> None:
        self.is_done = False
        self.value: T | None = None
        self.waiter: Coroutine[Any, Any, None] | None = None

    def __await__(self) -> Generator[Later[T], None, T]:
        if not self.is_done:
            yield self
        return cast("T", self.value)

    def resolve(self, value: T) -> None:
        """The value is there; only the first counts."""
        if self.is_done:
            return
        self.is_done = True
        self.value = value
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            start(waiter)


_unfinished: dict[int, Coroutine[Any, Any, None]] = {}


def start(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run until it waits for something, and on whenever that is there."""
    _unfinished.pop(id(coroutine), None)
    try:
        later: Later[Any] = coroutine.send(None)
    except StopIteration:
        return
    later.waiter = coroutine
    _unfinished[id(coroutine)] = coroutine


def end_all() -> None:
    """A world is over: nothing that waits in it will go on."""
    while _unfinished:
        _unfinished.popitem()[1].close()


async def all_of(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run side by side; the results in order."""
    results: list[Any] = [None] * len(coroutines)
    left = len(coroutines)
    done: Later[None] = Later()

    async def one(index: int, coroutine: Coroutine[Any, Any, T]) -> None:
        nonlocal left
        results[index] = await coroutine
        left -= 1
        if left == 0:
            done.resolve(None)

    for index, coroutine in enumerate(coroutines):
        start(one(index, coroutine))
    if coroutines:
        await done
    return results
