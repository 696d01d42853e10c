"""Agents that have children, and those children."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_nats import Agent, RecoveredFrom, Signal, State, on
from foundation_nats.agent.kin import ChildExited, ChildStarted, Orphaned, Supervision


class Kid(Agent):
    """Counts, ends when it is told to, and remembers what became of its parent."""

    class State(State):
        """What it was told."""

        total: int = 0
        starts: int = 0
        parent: str = ""
        orphaned: list[str] = Field(default_factory=list)

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Its parent, as it is told."""
        self.state.starts += 1
        self.state.parent = "" if self.ctx.parent is None else self.ctx.parent.id
        if self.config.get("broken"):
            raise RuntimeError("broken")

    @on("add")
    async def add(self, signal: Signal[int]) -> int:
        """Count."""
        self.state.total += signal.data
        return self.state.total

    @on("done")
    async def done(self, signal: Signal[Any]) -> None:
        """It has nothing more to do."""
        self.ctx.stop("done")

    @on(Orphaned)
    async def left_alone(self, signal: Signal[Orphaned]) -> None:
        """Its parent is no more."""
        self.state.orphaned.append(signal.data.parent)


class Errand(Agent):
    """Ends as soon as it has begun."""

    restart = "transient"

    class State(State):
        """How often it has begun."""

        starts: int = 0

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """And done."""
        self.state.starts += 1
        self.ctx.stop("done")


class Boss(Agent):
    """Has children as it is told, and writes down what it hears of them."""

    class State(State):
        """What it heard."""

        started: list[str] = Field(default_factory=list)
        exited: list[str] = Field(default_factory=list)

    @on("have")
    async def have(self, signal: Signal[dict[str, Any]]) -> str:
        """One child more."""
        return self.ctx.spawn(Kid, **signal.data)

    @on("send_out")
    async def send_out(self, signal: Signal[str]) -> str:
        """One child for a moment."""
        return self.ctx.spawn(Errand, tag=signal.data, restart="transient")

    @on("end")
    async def end(self, signal: Signal[str]) -> bool:
        """One child less."""
        return self.ctx.stop_child(signal.data)

    @on("adopt")
    async def take(self, signal: Signal[str]) -> str:
        """Somebody else's child."""
        return self.ctx.adopt(signal.data)

    @on("children")
    async def known(self, signal: Signal[Any]) -> dict[str, str]:
        """Its children."""
        return {tag: child.status for tag, child in self.ctx.children().items()}

    @on("leave")
    async def leave(self, signal: Signal[Any]) -> None:
        """Stop."""
        self.ctx.stop("left")

    @on(ChildStarted)
    async def has_started(self, signal: Signal[ChildStarted]) -> None:
        """One runs."""
        self.state.started.append(signal.data.tag)

    @on(ChildExited)
    async def has_exited(self, signal: Signal[ChildExited]) -> None:
        """One has ended."""
        self.state.exited.append(f"{signal.data.tag} {signal.data.status}")


class Team(Boss):
    """All for one."""

    supervision = Supervision(strategy="one_for_all", max_restarts=2, on_exhausted="stop")


class Listener(Agent):
    """Writes down what happens to the cluster."""

    restart_limit = None

    class State(State):
        """What it heard."""

        heard: list[str] = Field(default_factory=list)
        told: list[dict[str, Any]] = Field(default_factory=list)

    async def handle_cluster_signal(self, signal: Signal[Any]) -> None:
        """Anything."""
        about = signal.data.get("node") or signal.data.get("leader") or ""
        self.state.heard.append(f"{signal.type.partition('.')[2]} {about}")
        self.state.told.append({"type": signal.type, "data": signal.data})
