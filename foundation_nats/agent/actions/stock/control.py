"""Control flow as actions, for plans and instructions that are data: `noop`, `sleep`, `fail`, `branch`, `for_each`.

What `branch` and `for_each` run they name, so it must be an action of the agent, or of the plan.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from pydantic import Field

from foundation_nats.agent.actions.action import action
from foundation_nats.agent.actions.running import ActionContext, Instruction
from foundation_nats.errors import ActionError

ITEMS_MAX = 1_000


@action
async def noop(value: Any = None) -> Any:
    """Do nothing, and return the value."""
    return value


@action
async def sleep(seconds: Annotated[float, Field(ge=0, le=300)]) -> float:
    """Wait. The mailbox waits, too, and a crash begins it anew: for longer take a timer."""
    await asyncio.sleep(seconds)
    return seconds


@action
async def fail(message: str) -> None:
    """Fail, and say why."""
    raise ActionError(message)


@action
async def branch(
    condition: Any,
    ctx: ActionContext,
    then: Instruction | None = None,
    otherwise: Instruction | None = None,
) -> Any:
    """Run one action if the condition is true, or else another; null if there is none."""
    chosen = then if condition else otherwise
    return None if chosen is None else await ctx.run(chosen)


@action
async def for_each(
    items: Annotated[list[Any], Field(max_length=ITEMS_MAX)],
    action: str,
    ctx: ActionContext,
    item: str = "item",
    params: dict[str, Any] | None = None,
) -> list[Any]:
    """Run an action for each item, in order, with the item as its param of that name; returns the results."""
    return [
        await ctx.run(Instruction(action=action, params={**(params or {}), item: each}))
        for each in items
    ]


__all__ = ["branch", "fail", "for_each", "noop", "sleep"]
