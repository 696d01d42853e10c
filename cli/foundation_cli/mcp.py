"""`foundation mcp`: a cluster as an MCP server, for assistants to look at and, if allowed, to operate."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.gateway import TOKEN, serve_until_told


@with_shared
def mcp(
    shared: Shared,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT", help="Serve streamable HTTP there, instead of stdin and stdout."
        ),
    ] = None,
    allow_write: Annotated[
        bool,
        typer.Option(
            "--allow-write",
            help="Also tools that change something: send, ask, deploy, drain …, and all actions.",
        ),
    ] = False,
    actions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="Also the actions of these agents: ID, deployment:NAME, capability:NAME or all; repeatable.",
        ),
    ] = None,
) -> None:
    """Serve the cluster's tools to an MCP client, such as an assistant.

    Read-only unless --allow-write is given. An assistant starts it itself, over stdin and stdout.

    Example: foundation mcp --http 8080 --allow-write
    """

    async def main() -> None:
        from foundation_nats.gateways.agent_tools import AgentTools
        from foundation_nats.gateways.mcp_server import PATH, McpServer
        from foundation_nats.gateways.web import Web, read_address

        async with connected(shared) as cluster:
            more = None
            if allow_write or actions:
                named = [] if "all" in (actions or ["all"]) else actions or []
                more = AgentTools(cluster, named)
                await more.open()
            server = McpServer(cluster, writes=allow_write, more=more)
            try:
                if http is None:
                    await server.serve_stdio()
                    return
                address = read_address(http)
                web = Web(server.app(address[0]), address, token=os.environ.get(TOKEN) or None)

                async def begin() -> str:
                    await web.open()
                    return f"Serving MCP at {web.url}{PATH}; Ctrl-C ends it."

                await serve_until_told(cluster, begin, web.close)
            finally:
                if more is not None:
                    await more.close()

    run(main)


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(mcp)
