"""Agents with the tools of an MCP server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from foundation_nats import Agent, Signal, State, on
from foundation_nats.agent.mcp_tools import MCPTools

SHELF = [sys.executable, str(Path(__file__).parent / "shelf.py")]


class Reader(Agent):
    """Keeps notes on a shelf that is not its own."""

    class State(State):
        notes: int = 0

    skills = (
        MCPTools(
            "shelf",
            command=SHELF,
            timeout_s=2,
            breaker_failures=2,
            breaker_pause_s=0.3,
            result_max=99,
        ),
    )

    @on("note")
    async def note(self, signal: Signal[str]) -> int:
        """Keep a note; fails the first time, after it was kept."""
        said = await self.ctx.run("shelf_note", {"text": signal.data})
        self.state.notes = said["result"]
        if signal.attempt == 1 and signal.data == "twice":
            raise RuntimeError("now of all times")
        return self.state.notes


class Remote(Agent):
    """The same over HTTP; its URL is in its configuration."""

    skills = (MCPTools("shelf", url="http://127.0.0.1:1/mcp", required=False, timeout_s=2),)

    @on("tools")
    def tools(self, signal: Signal[Any]) -> list[str]:
        return sorted(self.skill["shelf"].found_actions())
