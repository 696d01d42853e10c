"""Agents that sleep when they have nothing to do."""

from __future__ import annotations

import gc
from weakref import WeakSet

from pydantic import Field

from foundation_nats import Agent, RecoveredFrom, Signal, State, on
from foundation_nats.agent.skills import Skill


class Sleepy(Agent):
    """Counts, and remembers how it was started and stopped."""

    hibernate_after = 0.3

    class State(State):
        """All of it."""

        total: int = 0
        starts: list[str] = Field(default_factory=list)
        stops: list[str] = Field(default_factory=list)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        self.state.starts.append("first" if recovered_from is None else recovered_from.reason)

    async def on_stop(self, reason: str) -> None:
        self.state.stops.append(reason)
        self.emit("slept", {"who": self.id}, to="agent:diary")

    @on("add")
    async def add(self, signal: Signal[int]) -> int:
        """Add so many."""
        self.state.total += signal.data
        return int(self.state.total)


class Plain(Agent):
    """As small as can be."""

    hibernate_after = 0.3

    class State(State):
        """All of it."""

        total: int = 0

    @on("add")
    async def add(self, signal: Signal[int]) -> int:
        """Add so many."""
        self.state.total += signal.data
        return int(self.state.total)


_BODIES: WeakSet[Agent] = WeakSet()


class Dreamer(Plain):
    """Can be seen to leave nothing in its worker, although nobody collects garbage there."""

    skills = (Skill("habit"),)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        gc.disable()
        assert self.skill["habit"].agent is self
        _BODIES.add(self)

    @on("bodies")
    async def bodies(self, signal: Signal[None]) -> int:
        """How many of them are in this process's memory, this one included."""
        return len(_BODIES)


class Diary(Agent):
    """Hears who slept."""

    class State(State):
        """How often each did."""

        slept: dict[str, int] = Field(default_factory=dict)

    @on("slept")
    async def slept(self, signal: Signal[dict[str, str]]) -> None:
        """One more."""
        who = signal.data["who"]
        self.state.slept[who] = self.state.slept.get(who, 0) + 1
