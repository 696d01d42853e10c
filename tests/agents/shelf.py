"""A small MCP server, made with the official SDK; run as a command it speaks over stdin and stdout."""

from __future__ import annotations

import asyncio
import os

from mcp.server.mcpserver import MCPServer
from mcp_types import ToolAnnotations


def make() -> MCPServer:
    """The server."""
    server = MCPServer("shelf", log_level="CRITICAL")
    notes: list[str] = []

    @server.tool()
    def note(text: str) -> int:
        """Keep a note; how many there are."""
        notes.append(text)
        return len(notes)

    @server.tool(name="look.up", annotations=ToolAnnotations(read_only_hint=True))
    def look_up(number: int = 1) -> str:
        """Read a note."""
        return notes[number - 1]

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    async def sleep() -> str:
        """Never answer."""
        await asyncio.sleep(3600)
        return ""

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def big(size: int) -> str:
        """Say a lot."""
        return "x" * size

    @server.tool()
    def die() -> None:
        """End the server."""
        os._exit(3)

    return server


if __name__ == "__main__":
    make().run("stdio")
