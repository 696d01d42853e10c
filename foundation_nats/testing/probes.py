"""`eventually`: wait for a condition with a deadline instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

from foundation_nats.base.clock import monotonic

T = TypeVar("T")


@overload
async def eventually(
    probe: Callable[[], Awaitable[T]],
    *,
    timeout: float = ...,
    every: float = ...,
    message: str = ...,
) -> T: ...


@overload
async def eventually(
    probe: Callable[[], T], *, timeout: float = ..., every: float = ..., message: str = ...
) -> T: ...


async def eventually(
    probe: Callable[[], Any],
    *,
    timeout: float = 10.0,
    every: float = 0.02,
    message: str = "",
) -> Any:
    """Call *probe* until it returns something true, and return that.

    An `AssertionError` or a library error in the probe counts as not yet.

    Raises:
        AssertionError: not within *timeout* seconds; says what came last.
    """
    deadline = monotonic() + timeout
    last: object = None
    while True:
        try:
            found = probe()
            result: Any = await found if inspect.isawaitable(found) else found
            if result:
                return result
            last = result
        except (AssertionError, _library_error()) as error:
            last = error
        if monotonic() >= deadline:
            raise AssertionError(f"not within {timeout:g} s: {message} (last: {last!r})")
        await asyncio.sleep(every)


def _library_error() -> type[Exception]:
    from foundation_nats.errors import FoundationError

    return FoundationError
