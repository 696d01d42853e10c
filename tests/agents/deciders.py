"""Agents that decide together, by a replicated domain."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from foundation_nats import Agent, Domain, Signal, State, on


class Book(BaseModel):
    """Take a seat."""

    seat: str
    by: str
    fail_first: bool = False
    """For the handler: raise after the proposal, once."""


class Plan(BaseModel):
    """Who has which seat, and everything that was tried."""

    taken: dict[str, str] = Field(default_factory=dict)
    order: list[str] = Field(default_factory=list)


class Seats(Domain[Plan, Book]):
    """Each seat is taken once."""

    name, State, Operation = "seats", Plan, Book

    def validate(self, state: Plan, operation: Book) -> str | None:
        """A seat that is taken stays taken."""
        return f"{operation.seat} is taken" if operation.seat in state.taken else None

    def apply(self, state: Plan, operation: Book) -> Plan:
        """Take it."""
        state.taken[operation.seat] = operation.by
        state.order.append(operation.seat)
        return state


_FAILED: set[str] = set()


class Decider(Agent):
    """Books seats."""

    class State(State):
        accepted: list[str] = Field(default_factory=list)
        rejected: list[str] = Field(default_factory=list)

    @on("seats.book")
    async def book(self, signal: Signal[Book]) -> None:
        found = await self.ctx.consensus.propose(Seats, signal.data)
        if signal.data.fail_first and signal.id not in _FAILED:
            _FAILED.add(signal.id)
            raise RuntimeError("after the proposal, before the commit")
        (self.state.accepted if found.accepted else self.state.rejected).append(signal.data.seat)

    @on("seats.view")
    async def view(self, signal: Signal) -> dict[str, Any]:
        replica = await self.ctx.consensus.open(Seats)
        return {
            "taken": (await self.ctx.consensus.read(Seats)).taken,
            "seen": (await self.ctx.consensus.view(Seats)).order,
            "replica": id(replica),
        }
