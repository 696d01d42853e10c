"""Runs a handler of an agent: a function, a coroutine or a generator, observed by the black box.

What the handler has changed is still in the agent and its context when `call` returns:
`effects.py` keeps it or takes it back. Should the handler end the process, the black box
tells that it was this one.

When cancelled: the handler is, and what it has changed is the caller's to take back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from typing import Any

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.directives import apply_result, are_directives
from foundation_nats.agent.handling import Handling
from foundation_nats.agent.kin import hear, is_of_kin
from foundation_nats.agent.middleware import layered
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.streaming import Ended, collected, ending
from foundation_nats.base.failpoint import failpoint
from foundation_nats.errors import FoundationError, HandlerError


async def call(activation: Activation, handling: Handling | None, signal: Signal[Any]) -> Any:
    failpoint("handle.before")
    agent = activation.agent
    agent.ctx._begin(signal)
    if is_of_kin(signal.type) and not hear(agent, signal):
        return None
    timeout = activation.runtime.handler_timeout_s
    sequence = signal.sequence or 0
    if handling is not None and handling.timeout is not None:
        timeout = handling.timeout
    if agent._layers and handling is not None:
        handling = layered(handling, agent._layers)
    if handling is None:
        if not signal.type.startswith("cluster."):
            return None
        result = await observed(activation, agent.handle_cluster_signal(signal), sequence)
    elif not handling.is_async:
        result = activation.runtime.blackbox.call(
            handling.function, agent, signal, agent=activation.id, sequence=sequence
        )
    elif timeout is None:
        result = await observed(activation, handling.function(agent, signal), sequence)
    else:
        try:
            async with asyncio.timeout(timeout):
                result = await observed(activation, handling.function(agent, signal), sequence)
        except TimeoutError as error:
            raise HandlerError(
                f"The handler of {signal.type} took longer than {timeout:g} s."
            ) from error
    if isinstance(result, AsyncGenerator):
        result = await _drain(activation, result, signal.type, sequence, timeout)
    failpoint("handle.after")
    return apply_result(agent, result) if are_directives(result) else result


async def _drain(
    activation: Activation,
    generator: AsyncGenerator[Any, None],
    type_: str,
    sequence: int,
    timeout: float | None,
) -> Any:
    """Run a handler that is a generator to its end; its items go to who asked for them."""
    replies = activation.replies
    try:
        async with asyncio.timeout(timeout):
            if replies is None:
                return await observed(activation, collected(generator), sequence)
            await replies.send(
                generator,
                observed=lambda work: observed(activation, work, sequence),
                may_go_on=partial(_may_go_on, activation),
            )
            return Ended()
    except TimeoutError as error:
        raise HandlerError(f"The handler of {type_} took longer than {timeout} s.") from error


def _may_go_on(activation: Activation) -> FoundationError | None:
    if activation.stopping is not None or activation.failure is not None:
        return ending(activation.id, "it is being stopped or moved")
    if not activation.runtime.is_valid():
        return ending(activation.id, "its node is not sure that it still holds it")
    return None


async def observed(
    activation: Activation, coroutine: Coroutine[Any, Any, Any], sequence: int
) -> Any:
    """Await a handler; should it end the process, the black box tells that it was this one."""
    box = activation.runtime.blackbox
    is_done, result = box.step(coroutine, activation.id, sequence)
    return result if is_done else await box.rest(coroutine, result, activation.id, sequence)
