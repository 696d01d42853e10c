"""Agents that are members of a group with a leader."""

from __future__ import annotations

from typing import Any

from foundation_nats import Agent, Signal, on
from foundation_nats.coordination import leader_follower
from foundation_nats.coordination.leader_follower import Group
from foundation_nats.errors import NotLeaderError


def add(total: int, value: int) -> int:
    """What the entries make together."""
    return total + value


class Member(Agent):
    """Takes part from its start to its stop; adds what it is told while it leads."""

    group: Group

    async def on_start(self, recovered: object) -> None:
        self.group = leader_follower(
            self.ctx, "team", member=self.id, apply=add, initial=0, ttl_s=2.0
        )
        await self.group.open()

    async def on_stop(self, reason: str) -> None:
        await self.group.close()

    @on("add")
    async def add(self, signal: Signal[int]) -> dict[str, Any]:
        try:
            entry = await self.group.append(signal.data, id=f"{signal.id}")
        except NotLeaderError as error:
            return {"refused": error.details["leader"]}
        return {"index": entry.index, "term": entry.term}

    @on("look")
    async def look(self, signal: Signal) -> dict[str, Any]:
        view = await self.group.read()
        return {"value": view.value, "index": view.index, "leads": self.group.is_leader}
