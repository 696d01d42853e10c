"""`Middleware`: what stands around every handler of a class, and before all that it emits.

Pure. The first in `Agent.middleware` is the outermost; those of skills stand within the agent's own.
What a middleware raises counts as raised by the handler: nothing is kept, and the signal is tried again.
Emitted signals pass them in the same order, before they are stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from foundation_nats.agent.context import Emission
from foundation_nats.agent.handling import Handling
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Signal

Proceed = Callable[[Signal[Any]], Awaitable[Any]]


class Middleware:
    """Subclass it, and put an instance into ``Agent.middleware``; it is shared by all agents of a class.

    Example:
        >>> class Timed(Middleware):
        ...     async def handle(self, agent, signal, proceed):
        ...         began = time.monotonic()
        ...         try:
        ...             return await proceed(signal)
        ...         finally:
        ...             agent.ctx.gauge("took_s", time.monotonic() - began)
    """

    async def handle(self, agent: AnyAgent, signal: Signal[Any], proceed: Proceed) -> Any:
        """Handle the signal, by `proceed` as a rule, and return the reply.

        Not to proceed is to have handled it.
        """
        return await proceed(signal)

    def emit(self, agent: AnyAgent, emission: Emission) -> Emission | None:
        """What shall be sent instead of *emission*; None: nothing."""
        return emission


async def through(
    layers: Sequence[Middleware], agent: AnyAgent, signal: Signal[Any], handler: Proceed
) -> Any:
    """Handle a signal through *layers*, the first outermost."""
    if not layers:
        return await handler(signal)
    first, rest = layers[0], layers[1:]

    async def proceed(passed: Signal[Any]) -> Any:
        return await through(rest, agent, passed, handler)

    return await first.handle(agent, signal, proceed)


def outgoing(
    layers: Sequence[Middleware], agent: AnyAgent, emissions: Sequence[Emission]
) -> list[Emission]:
    """What is left of *emissions* after all layers."""
    left = []
    for emission in emissions:
        found: Emission | None = emission
        for layer in layers:
            if found is None:
                break
            found = layer.emit(agent, found)
        if found is not None:
            left.append(found)
    return left


def layered(handling: Handling, layers: Sequence[Middleware]) -> Handling:
    """The handler with *layers* around it."""
    plain, is_async = handling.function, handling.is_async

    async def function(agent: AnyAgent, signal: Signal[Any]) -> Any:
        async def innermost(passed: Signal[Any]) -> Any:
            result = plain(agent, passed)
            return await result if is_async else result

        return await through(layers, agent, signal, innermost)

    return replace(handling, function=function, is_async=True)
