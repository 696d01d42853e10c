"""An agent that carries out a plan; what happens outside is a line in a file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from foundation_nats import ActionContext, Agent, Plan, Signal, State, action, on, ref
from foundation_nats.errors import PlanFailedError


async def _write(ctx: ActionContext, text: str, pause: float) -> None:
    with Path(ctx.agent.config["sink"]).open("a") as sink:
        sink.write(f"{text} {ctx.idempotency_key}\n")
    await asyncio.sleep(pause)


async def _release(params: Any, result: str, ctx: ActionContext) -> None:
    pause = float(ctx.agent.config.get("undo_pause", 0)) if params.what == "car" else 0.0
    await _write(ctx, f"un{params.what}", pause)


@action(undo=_release)
async def book(what: str, ctx: ActionContext, then: str = "") -> str:
    """Book something; the hotel may be full, the car may take long."""
    if what == ctx.agent.config.get("full"):
        raise ValueError("no room left")
    slow = what == ctx.agent.config.get("slow")
    await _write(ctx, what, float(ctx.agent.config.get("pause", 0)) if slow else 0.0)
    return f"{what}-1"


trip = (
    Plan("trip")
    .step("flight", book, {"what": "flight"})
    .step("car", book, {"what": "car", "then": ref("flight")})
    .step("hotel", book, {"what": "hotel", "then": ref("car")})
)


class Traveller(Agent):
    """Books, or stays at home."""

    actions = (book, trip)

    class State(State):
        """What came of it."""

        trips: int = 0
        told: str = ""

    @on("go")
    async def go(self, signal: Signal[Any]) -> None:
        """The plan, and what becomes of it."""
        try:
            await self.ctx.run(trip)
            self.state.trips += 1
        except PlanFailedError as error:
            self.state.told = str(error)
