"""Agents with strategies: a lock in phases, and a porter that follows a tree."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_nats import Signal, on
from foundation_nats.agent.strategies import (
    BehaviourTree,
    Do,
    Go,
    Selector,
    Sequence,
    StateMachine,
    Status,
    entering,
)


class Lock(StateMachine):
    """Opens and shuts; closes for good by itself after a while."""

    initial = "shut"
    transitions = (
        Go("open", "shut", "open"),
        Go("shut", "open", "shut"),
        Go("retire", "open", "retired", after=1.0),
    )

    class State(StateMachine.State):
        """How often it was opened, as its hook has counted."""

        opened: int = 0

    @entering("open")
    def count(self, signal: Signal[Any]) -> None:
        """Once for each passage."""
        self.state.opened += 1


class Porter(BehaviourTree):
    """Carries parcels up three floors each; a tick is a floor."""

    tick_every = None
    loops = True
    tree = Selector(
        Sequence(Do("has_parcel"), Do("climb"), Do("deliver")),
        Do("rest"),
    )

    class State(BehaviourTree.State):
        """Parcels to carry, the floor it is on, those delivered in order, and how many ticks it had."""

        parcels: list[int] = Field(default_factory=list)
        floor: int = 0
        delivered: list[int] = Field(default_factory=list)
        ticks: int = 0

    @on("parcel")
    def parcel(self, signal: Signal[int]) -> None:
        """One more."""
        self.state.parcels.append(signal.data)

    def has_parcel(self) -> bool:
        """Anything to do."""
        self.state.ticks += 1
        return bool(self.state.parcels)

    def climb(self) -> Status:
        """One floor with each tick."""
        self.state.floor += 1
        return Status.SUCCESS if self.state.floor >= 3 else Status.RUNNING

    def deliver(self) -> None:
        """And down again."""
        self.state.delivered.append(self.state.parcels.pop(0))
        self.state.floor = 0

    def rest(self) -> None:
        """Nothing to do."""
