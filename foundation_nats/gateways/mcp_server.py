"""A cluster as an MCP server: its tools, over stdin and stdout or streamable HTTP, by the official SDK.

Read-only unless writes are allowed. What goes wrong in a tool is told in its result, for the model to see: what
happened, what to do now, and whether it may have taken effect all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from foundation_nats.api.cluster import Cluster
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ConfigError, FoundationError
from foundation_nats.gateways.tools import ClusterTool, cluster_tools
from foundation_nats.gateways.web import App, missing, read_address

try:
    import mcp_types as types
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.shared.exceptions import MCPError
except ImportError as error:
    raise missing("mcp", error) from error

RESULT_MAX = 256 * 1024
"""Bytes of one result: what is larger helps no model."""
PATH = "/mcp"
_INSTRUCTIONS = """A foundation_nats cluster: stateful agents on nodes. Begin with cluster_status; \
cluster_why tells why an agent, a deployment or a node is as it is."""
_INSTRUCTIONS_WRITE = """ Tools that change something wait until it is done. An error that says that the \
outcome is unknown means that it may have happened: look before you repeat it."""


class MoreTools(Protocol):
    """Tools besides the cluster's own."""

    async def list(self) -> Sequence[Mapping[str, Any]]:
        """As MCP lists them."""

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the tool *name* returns.

        Raises:
            KeyError: there is none.
            FoundationError: it went wrong.
        """


class McpServer:
    """The server; `serve_stdio` or `app`."""

    def __init__(
        self, cluster: Cluster, *, writes: bool = False, more: MoreTools | None = None
    ) -> None:
        """*writes*: also tools that change something; *more*: further tools."""
        self._cluster = cluster
        self._tools = {tool.name: tool for tool in cluster_tools(writes=writes)}
        self._more = more
        self._log = get_logger("gateway").bind(protocol="mcp")
        self.server: Server[Any] = Server(
            "foundation_nats",
            version=version("foundation-nats"),
            title=f"foundation_nats: {cluster.name}",
            instructions=_INSTRUCTIONS + (_INSTRUCTIONS_WRITE if writes else ""),
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
        )

    async def serve_stdio(self) -> None:
        """Serve whoever has started this process, until it closes stdin."""
        async with stdio_server() as (reading, writing):
            await self.server.run(reading, writing, self.server.create_initialization_options())

    def app(self, host: str = "127.0.0.1") -> App:
        """An ASGI application that serves streamable HTTP at ``/mcp``.

        For a *host* that is this machine's own, requests of foreign origins are refused.
        """
        found: App = self.server.streamable_http_app(streamable_http_path=PATH, host=host)
        return found

    # ---- tools ----------------------------------------------------------------------

    async def _list_tools(self, _ctx: Any, _params: Any) -> types.ListToolsResult:
        found = [_listed(tool) for tool in self._tools.values()]
        if self._more is not None:
            found += [types.Tool.model_validate(item) for item in await self._more.list()]
        return types.ListToolsResult(tools=found)

    async def _call_tool(
        self, _ctx: Any, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        arguments = params.arguments or {}
        try:
            tool = self._tools.get(params.name)
            if tool is not None:
                return _result(await tool.call(self._cluster, arguments))
            if self._more is not None:
                return _result(await self._more.call(params.name, arguments))
        except KeyError:
            pass
        except FoundationError as error:
            self._log.info("tool failed", tool=params.name, code=error.code)
            return _failed(error)
        raise MCPError(
            code=types.INVALID_PARAMS,
            message=f"There is no tool {params.name!r}."
            + (
                " It changes something: this server is read-only."
                if params.name in _WRITING
                else ""
            ),
        )


_WRITING = {tool.name for tool in cluster_tools(writes=True) if tool.writes}


def _listed(tool: ClusterTool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        description=tool.description,
        input_schema=tool.schema(),
        annotations=types.ToolAnnotations(
            read_only_hint=not tool.writes,
            destructive_hint=tool.destroys if tool.writes else None,
            open_world_hint=False,
        ),
    )


def _result(found: Any) -> types.CallToolResult:
    text = to_json(found)
    if len(text) > RESULT_MAX:
        raise ConfigError(
            f"The result has {len(text):,} bytes; {RESULT_MAX:,} may be told.",
            hint="Ask for less: a lower limit, or a filter.",
        )
    structured = found if isinstance(found, dict) else None
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=text.decode())], structured_content=structured
    )


def _failed(error: FoundationError) -> types.CallToolResult:
    text = f"{error} ({error.code}"
    if error.outcome == "unknown":
        text += "; the outcome is unknown: it may have happened"
    elif error.retryable:
        text += "; nothing has happened, and it may be tried again"
    content = types.TextContent(type="text", text=text + ")")
    return types.CallToolResult(content=[content], is_error=True)


__all__ = ["PATH", "McpServer", "MoreTools", "read_address"]
