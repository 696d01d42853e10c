"""`MCPTools`: the tools of an external MCP server as actions of an agent.

A skill. When the agent starts the server is connected to and asked for its tools; each becomes an action
``<mount>_<tool>``, to be run by handlers, by ``action.<mount>_<tool>`` signals, and by models
(`foundation_nats.agent.tools`). Arguments are checked against the tool's schema before they leave.

Agents of one worker that mount the same server share one connection to it, which is made again with pauses
when it breaks. A call has a time-out; after several in a row without an answer the server is left alone
for a while (`BreakerOpenError`).

A tool that does not say that it only reads is called in a step of ``ctx.once``: a handler that is tried again
does not call it again once its answer is stored. What is not known to be done is called again, unless
`on_doubt` says ``fail``. What a server says of its tools is believed: mount only servers that you trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import re
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, Literal
from weakref import WeakValueDictionary

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from foundation_nats.agent.actions.action import Action
from foundation_nats.agent.actions.catalogue import PREFIX
from foundation_nats.agent.actions.running import ActionContext
from foundation_nats.agent.handling import Handling
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.skills import Skill, SkillConfig
from foundation_nats.agent.steps import Doubt
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.resilience import Breaker, backoff_s
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ActionError, BreakerOpenError, ConfigError, StepNotDoneError
from foundation_schemas import RecoveredFrom

if TYPE_CHECKING:
    import mcp_types as types
    from mcp import Client

_NAME_MAX = 64
_BEHIND = 30
_CLOSE_S = 3.0
_RETRY_FIRST_S = 0.2
_RETRY_MOST_S = 15.0


class MCPConfig(SkillConfig):
    """How a server is reached, and how far it is trusted."""

    url: str | None = None
    """Of a server that speaks streamable HTTP …"""
    command: list[str] | None = Field(default=None, min_length=1)
    """… or a command that starts one, which speaks over stdin and stdout."""
    env: dict[str, str] = Field(default_factory=dict)
    """For the command."""
    headers: dict[str, str] = Field(default_factory=dict)
    """For each HTTP request."""
    token_env: str | None = None
    """The variable, of the worker's environment, that holds a bearer token."""
    only: list[str] | None = None
    """The tools that are mounted; None: all."""
    tools_max: int = Field(default=64, ge=1, le=1000)
    """A server that has more is refused."""
    required: bool = True
    """Whether the agent needs it to start; else its tools are there once it can be reached."""
    start_timeout_s: float = Field(default=10.0, gt=0)
    timeout_s: float = Field(default=30.0, gt=0)
    """For one call."""
    retries: int = Field(default=0, ge=0)
    on_doubt: Literal["rerun", "fail"] = "rerun"
    """What becomes of a call of which nobody knows whether it was made; `fail`: a person decides."""
    result_max: int = Field(default=64 * 1024, ge=1)
    """Bytes of one result."""
    breaker_failures: int = Field(default=5, ge=1)
    """So many calls in a row without an answer, within `breaker_window_s`, and it is left alone …"""
    breaker_window_s: float = Field(default=60.0, gt=0)
    breaker_pause_s: float = Field(default=30.0, gt=0)
    """… for so long."""

    @model_validator(mode="after")
    def _one_way(self) -> MCPConfig:
        if (self.url is None) == (self.command is None):
            raise ValueError("give either url or command")
        return self


class MCPTools(Skill):
    """Mount it by ``skills = [MCPTools("docs", url="http://127.0.0.1:8080/mcp")]``.

    Args:
        name: under which it is mounted; begins the actions' names.
        config: see `MCPConfig`; the agent's own ``config[name]`` goes before it.

    Raises:
        ConfigError: a value is wrong, or the extra ``mcp`` is not installed.
    """

    name = "mcp"
    Config = MCPConfig
    prefixed = False

    def __init__(self, name: str | None = None, **config: Any) -> None:
        if importlib.util.find_spec("mcp") is None:
            raise ConfigError(
                "MCPTools needs mcp, which is not installed: pip install 'foundation-nats[mcp]'"
            )
        super().__init__(name, **config)
        self._line: _Line | None = None
        self._made: tuple[Mapping[str, Any], dict[str, Action]] = {}, {}

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Connect, and learn what tools there are."""
        self._line = line = _line(self.config)
        line.acquire()
        # An activation that is lost has no `on_stop`.
        self._end = weakref.finalize(self, line.release)
        error = await line.settled(self.config.start_timeout_s)
        if error is not None and self.config.required:
            await self.on_stop("failed")
            raise ConfigError(f"The MCP server {self.mount} can't be used: {error}.")

    async def on_stop(self, reason: str) -> None:
        """Let the connection go, if nobody else needs it."""
        line, self._line = self._line, None
        if line is not None:
            self._end()
            await line.closed()

    def more_handlings(self) -> list[Handling]:
        """``action.<mount>_…``, whatever tools there will be."""
        prefix = f"{PREFIX}{self.mount}_"

        async def handle(agent: AnyAgent, signal: Signal[Any]) -> Any:
            return await agent.ctx.run(signal.type.removeprefix(PREFIX), signal.data)

        return [
            Handling(
                f"{PREFIX}*",
                handle,
                True,
                None,
                priority=-_BEHIND,
                when=lambda signal: signal.type.startswith(prefix),
                name=f"{self.mount}.tools",
            )
        ]

    def found_actions(self) -> Mapping[str, Action]:
        """The tools that the server has, as actions."""
        if self._line is None:
            return {}
        tools = self._line.tools
        if tools is not self._made[0]:
            made = [_ToolAction(self.mount, tool, self.config) for tool in tools.values()]
            self._made = tools, {action.name: action for action in made}
        return self._made[1]

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        """Call one of the server's tools, by the name that it has there, at once and without a step.

        Raises:
            BreakerOpenError: it is left alone for a while.
            ActionError: the tool has failed, or there was no answer.
        """
        line = self.line
        return _value_of(await line.call(tool, arguments), tool, self.config.result_max)

    @property
    def line(self) -> _Line:
        """The connection.

        Raises:
            ConfigError: the agent does not run.
        """
        if self._line is None:
            raise ConfigError(
                f"The MCP server {self.mount} is not mounted: the agent does not run."
            )
        return self._line


class _ToolAction(Action):
    """One tool of the server."""

    def __init__(self, mount: str, tool: types.Tool, config: MCPConfig) -> None:
        self.mount = mount
        self.tool = tool.name
        self.name = action_name(mount, tool.name)
        self.description = tool.description or tool.title or f"The tool {tool.name} of {mount}."
        self.retries = config.retries
        self.params_type = _checked_by(tool.input_schema)
        if tool.output_schema is not None:
            self.result_type = Annotated[Any, WithJsonSchema(tool.output_schema)]
        self._config = config
        hints = tool.annotations
        self._only_reads = hints is not None and bool(hints.read_only_hint)
        super().__init__()

    async def run(self, params: Any, ctx: ActionContext) -> Any:
        """Call it, in a step of its own if it may change something."""
        line: _Line = ctx.skill.line
        if self._only_reads:
            said = await line.call(self.tool, params)
        else:
            line.check()
            said = await ctx.once(
                "call", line.call, self.tool, params, on_doubt=Doubt(self._config.on_doubt)
            )
        return _value_of(said, self.tool, self._config.result_max)


# ---- the connection ---------------------------------------------------------------------

_LINES: WeakValueDictionary[tuple[Any, ...], _Line]


class _Line:
    """One connection to a server, for all that mount it in this process."""

    def __init__(self, config: MCPConfig, key: tuple[Any, ...]) -> None:
        self.tools: Mapping[str, types.Tool] = {}
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._users = 0
        self._client: Client | None = None
        self._error: str | None = None
        self._settled = asyncio.Event()
        self._wake = asyncio.Event()
        """It is to be closed, or it is broken."""
        self._task: asyncio.Task[None] | None = None
        self._breaker = Breaker(
            failures=config.breaker_failures,
            window_s=config.breaker_window_s,
            pause_s=config.breaker_pause_s,
        )
        self._log = get_logger("mcp").bind(server=config.url or (config.command or [""])[0])
        self.key = key

    def acquire(self) -> None:
        """One more needs it."""
        self._users += 1
        if self._task is None:
            self._task = self._loop.create_task(self._keep(), name="mcp.line")

    def release(self) -> None:
        """One needs it no more; from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self._users -= 1
        if self._users == 0:
            _LINES.pop(self.key, None)
            self._wake.set()

    async def closed(self) -> None:
        """Wait until it is, if nobody needs it."""
        await asyncio.sleep(0)
        task = self._task
        if task is not None and self._users == 0:
            await asyncio.wait({task}, timeout=_CLOSE_S)
            task.cancel()
            await asyncio.wait({task}, timeout=_CLOSE_S)

    async def settled(self, timeout: float) -> str | None:
        """Wait for the first attempt to connect; None: it has succeeded, else why it has not."""
        try:
            async with asyncio.timeout(timeout):
                await self._settled.wait()
        except TimeoutError:
            return f"no answer within {timeout:g} s"
        return self._error

    async def _keep(self) -> None:
        attempt = 0
        while self._users > 0:
            self._wake.clear()
            try:
                async with AsyncExitStack() as stack:
                    async with asyncio.timeout(self._config.start_timeout_s):
                        client = await stack.enter_async_context(_connect(self._config))
                        self.tools = await self._discover(client)
                    self._client, self._error, attempt = client, None, 0
                    self._settled.set()
                    await self._wake.wait()
            except Exception as error:  # whatever a transport raises
                self._error = _text_of(error)
                self._log.warning("MCP server not connected", error=self._error)
            finally:
                self._client = None
                self._settled.set()
            if self._users > 0:
                attempt += 1
                pause = backoff_s(
                    attempt, random.random(), first_s=_RETRY_FIRST_S, most_s=_RETRY_MOST_S
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._until_unused()

    async def _until_unused(self) -> None:
        while self._users > 0:
            self._wake.clear()
            await self._wake.wait()

    async def _discover(self, client: Client) -> dict[str, types.Tool]:
        found: dict[str, types.Tool] = {}
        cursor: str | None = None
        while True:
            page = await client.list_tools(cursor=cursor, cache_mode="bypass")
            found |= {tool.name: tool for tool in page.tools}
            cursor = page.next_cursor
            if cursor is None or len(found) > self._config.tools_max:
                break
        only = self._config.only
        if only is not None:
            missing = sorted(set(only) - set(found))
            if missing:
                raise ConfigError(f"it has no tool {', '.join(missing)}")
            found = {name: found[name] for name in only}
        if len(found) > self._config.tools_max:
            raise ConfigError(f"it has more than {self._config.tools_max} tools; see tools_max")
        return found

    def check(self) -> None:
        """Whether a call would be made now.

        Raises:
            BreakerOpenError, StepNotDoneError
        """
        pause = self._breaker.retry_in(monotonic())
        if pause > 0:
            raise self._refused(pause)
        if self._client is None:
            raise StepNotDoneError(f"The MCP server is not connected: {self._error or 'not yet'}.")

    def _refused(self, pause: float) -> BreakerOpenError:
        return BreakerOpenError(
            f"The MCP server has not answered too often; it is left alone for {pause:.1f} s.",
            retry_in_s=pause,
        )

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the server says, an error of the tool included; see `_value_of`.

        Raises:
            BreakerOpenError, StepNotDoneError: it was not called.
            ActionError: it did not answer.
        """
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        self.check()
        client = self._client
        assert client is not None
        permit = self._breaker.begin(monotonic())
        if permit is None:
            raise self._refused(self._config.breaker_pause_s)
        limit = self._config.timeout_s
        try:
            async with asyncio.timeout(limit):
                result = await client.call_tool(tool, dict(arguments))
        except asyncio.CancelledError:
            self._breaker.abandon(permit)
            raise
        except TimeoutError as error:
            self._breaker.end(permit, monotonic(), ok=False)
            raise ActionError(
                f"The tool {tool} did not answer within {limit:g} s; it may have been called."
            ) from error
        except MCPError as error:
            lost = error.code in (CONNECTION_CLOSED, REQUEST_TIMEOUT)
            self._breaker.end(permit, monotonic(), ok=not lost)
            if not lost:
                return {"failed": str(error)}
            self._wake.set()
            raise ActionError(f"The tool {tool} did not answer: {error}.") from error
        except Exception as error:  # whatever a transport raises
            self._breaker.end(permit, monotonic(), ok=False)
            self._wake.set()
            raise ActionError(f"The tool {tool} did not answer: {_text_of(error)}.") from error
        self._breaker.end(permit, monotonic(), ok=True)
        return _said(result)


_LINES = WeakValueDictionary()


def _line(config: MCPConfig) -> _Line:
    key = asyncio.get_running_loop(), config.model_dump_json()
    line = _LINES.get(key)
    if line is None:
        line = _LINES[key] = _Line(config, key)
    return line


@asynccontextmanager
async def _connect(config: MCPConfig) -> AsyncIterator[Client]:
    from mcp import Client, StdioServerParameters
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    if config.url is None:
        program, *arguments = config.command or [""]
        server = StdioServerParameters(command=program, args=arguments, env=config.env or None)
        async with Client(server) as client:
            yield client
        return
    headers = dict(config.headers)
    if config.token_env is not None:
        token = os.environ.get(config.token_env)
        if not token:
            raise ConfigError(f"the variable {config.token_env} is not set")
        headers["Authorization"] = f"Bearer {token}"
    async with create_mcp_http_client(headers=headers) as http:
        transport = streamable_http_client(config.url, http_client=http)
        async with Client(transport) as client:
            yield client


# ---- pure -------------------------------------------------------------------------------


def action_name(mount: str, tool: str) -> str:
    """The name of a tool's action: what can't be in one becomes ``_``, what is too long is shortened."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{mount}_{tool}")
    if len(name) <= _NAME_MAX and name == f"{mount}_{tool}":
        return name
    mark = blake2b(tool.encode(), digest_size=4).hexdigest()
    return f"{name[: _NAME_MAX - 9]}_{mark}"


def _checked_by(schema: dict[str, Any]) -> Any:
    import jsonschema  # type: ignore[import-untyped]

    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"a tool has a schema that is none: {error.message}") from error
    validator = kind(schema)

    def check(value: Any) -> Any:
        error = next(iter(validator.iter_errors(value)), None)
        if error is not None:
            where = ".".join(str(part) for part in error.absolute_path)
            raise ValueError(f"{where + ': ' if where else ''}{error.message}")
        return value

    return Annotated[dict[str, Any], BeforeValidator(check), WithJsonSchema(schema)]


def _said(result: types.CallToolResult) -> dict[str, Any]:
    """As it is stored: what it returned, or that it failed."""
    texts = [item.text for item in result.content if item.type == "text"]
    if result.is_error:
        return {"failed": "\n".join(texts) or "it does not say why"}
    if result.structured_content is not None:
        return {"value": result.structured_content}
    if len(texts) == len(result.content):
        return {"value": "\n".join(texts)}
    parts = [item.model_dump(mode="json", exclude_none=True) for item in result.content]
    return {"value": parts}


def _value_of(said: Mapping[str, Any], tool: str, limit: int) -> Any:
    if "failed" in said:
        raise ActionError(f"The tool {tool} failed: {said['failed']}")
    size = len(to_json(said["value"]))
    if size > limit:
        raise ActionError(
            f"The tool {tool} returned {size:,} bytes; {limit:,} may be (result_max)."
        )
    return said["value"]


def _text_of(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


__all__ = ["MCPConfig", "MCPTools", "action_name"]
