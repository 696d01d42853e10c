"""Actions as tools of language models: their JSON Schemas in the shapes of OpenAI, Anthropic and MCP; `call_tool`.

The schemas are pure. In OpenAI's strict mode a model must give every property, and nothing else; so what
has a default may be null there, and `call_tool` takes a null as not given. What strict mode can't say
(free keys, values of any type, types that contain themselves) makes the tool a plain one (``strict: false``).

What a model gives is validated as any params; what goes wrong is told to it as text, for it to do better.
A step that is in doubt is raised: no model decides about that.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from foundation_nats.agent.actions.action import Action, as_action
from foundation_nats.agent.actions.catalogue import actions_of, find_action
from foundation_nats.agent.actions.running import ActionContext
from foundation_nats.agent.context import Context
from foundation_nats.base import frames
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import (
    ActionError,
    ActionInvalidError,
    ActionNotFoundError,
    ConfigError,
    FencedError,
    FoundationError,
    StepInDoubtError,
    StepTooLargeError,
)

_RAISED = (StepInDoubtError, StepTooLargeError, FencedError)
_DROPPED = (
    "default",
    "discriminator",
    "examples",
    "maxLength",
    "minLength",
    "title",
    "uniqueItems",
)
"""Keywords that strict mode refuses; what they say is checked all the same when the tool is called."""


class Tool(BaseModel):
    """An action as others see it."""

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    params: dict[str, Any]
    """JSON Schema of an object."""
    result: dict[str, Any] | None = None
    """JSON Schema; None: anything."""

    def openai(self, *, strict: bool = True) -> dict[str, Any]:
        """For ``tools`` of chat completions."""
        parameters, is_strict = self.params, False
        if strict:
            with contextlib.suppress(ConfigError):
                parameters, is_strict = strict_schema(self.params), True
        body = {
            "name": self.name,
            "description": self.description,
            "parameters": parameters,
            "strict": is_strict,
        }
        return {"type": "function", "function": body}

    def anthropic(self) -> dict[str, Any]:
        """For ``tools`` of Anthropic's messages."""
        return {
            "name": self.name,
            "description": self.description,
            "input_schema": self.params,
        }

    def mcp(self) -> dict[str, Any]:
        """As an MCP server lists it; a result that is no object is not described."""
        body: dict[str, Any] = {
            "name": self.name,
            "description": self.description,
            "inputSchema": self.params,
        }
        if self.result is not None and self.result.get("type") == "object":
            body["outputSchema"] = self.result
        return body


class ToolAnswer(BaseModel):
    """What a call of a tool has given, as text for a model."""

    model_config = ConfigDict(frozen=True)

    text: str
    """JSON, or what went wrong."""
    is_error: bool = False
    result: Any = Field(default=None)
    """As JSON gives it."""


def tool_of(what: Any) -> Tool:
    """An action as a tool.

    Raises:
        ConfigError: its params are no object, or can't be described.
    """
    action = as_action(what)
    params = _schema(action, action.params_adapter, "validation")
    if params is None:
        params = {"type": "object", "properties": {}, "additionalProperties": True}
    root = _target(params, params)
    if root.get("type") != "object":
        raise ConfigError(
            f"action {action.name} can't be a tool: its params are no object; "
            "let it take a model, or arguments by name"
        )
    if root is not params:
        params = {**root, "$defs": params["$defs"]}
    return Tool(
        name=action.name,
        description=action.description,
        params=params,
        result=_schema(action, action.result_adapter, "serialization"),
    )


def catalogue(of: type[Any] | Iterable[Any]) -> list[Tool]:
    """The tools of an agent's class, or of these actions.

    Actions whose params are no object are not among those of a class: they can't be tools.

    Raises:
        ConfigError: one of the actions given can't be a tool.
    """
    if not isinstance(of, type):
        return [tool_of(item) for item in of]
    return [
        tool_of(action)
        for action in actions_of(of).values()
        if action.params_adapter is None or _is_object(action)
    ]


async def call_tool(
    ctx: Context | ActionContext,
    name: str | Action,
    arguments: str | bytes | Mapping[str, Any] | None,
) -> ToolAnswer:
    """Run an action as a model has asked for it, within the handler in hand.

    Args:
        ctx: of the handler, or of the action in whose place this is called.
        name: of one of the agent's actions (or an action).
        arguments: JSON, or what it says.

    Raises:
        StepInDoubtError, StepTooLargeError, FencedError: not for a model to decide.
    """
    try:
        given = orjson.loads(arguments) if isinstance(arguments, str | bytes) else arguments
    except orjson.JSONDecodeError as error:
        return ToolAnswer(text=f"The arguments are no JSON: {error}.", is_error=True)
    try:
        result = await ctx.run(name, _given(ctx, name, given))
        text = to_json(result)
    except _RAISED:
        raise
    except (ActionInvalidError, ActionNotFoundError) as error:
        return ToolAnswer(text=_complaints(error), is_error=True)
    except ActionError as error:
        cause = error.__cause__
        text_ = str(error) if cause is None else frames.summary(cause).partition(" (")[0]
        return ToolAnswer(text=text_, is_error=True)
    except FoundationError as error:
        return ToolAnswer(text=str(error), is_error=True)
    except TypeError as error:
        return ToolAnswer(text=f"The result is no JSON: {error}.", is_error=True)
    return ToolAnswer(text=text.decode(), result=orjson.loads(text))


def _given(ctx: Context | ActionContext, name: str | Action, given: Any) -> Any:
    """*given* without the nulls that strict mode asks for."""
    action = _find(ctx, name) if isinstance(name, str) else name
    schema = None if action is None else _schema(action, action.params_adapter, "validation")
    return given if schema is None else without_nulls(schema, given)


def _find(ctx: Context | ActionContext, name: str) -> Action | None:
    try:
        if isinstance(ctx, ActionContext):
            return ctx._find(name)
        return None if ctx._agent is None else find_action(ctx._agent, name)
    except ActionNotFoundError:
        return None


def _complaints(error: FoundationError) -> str:
    found = error.details.get("errors")
    if not found:
        return str(error)
    lines = [f"{'.'.join(map(str, item['loc'])) or 'it'}: {item['msg']}" for item in found]
    return f"The arguments are not valid. {'; '.join(lines)}."


# ---- schemas --------------------------------------------------------------------------


def _schema(action: Action, adapter: Any, mode: Any) -> dict[str, Any] | None:
    if adapter is None:
        return None
    try:
        found: dict[str, Any] = adapter.json_schema(mode=mode)
    except Exception as error:  # pydantic's own: a type that JSON Schema can't say
        if mode == "serialization":
            return None
        raise ConfigError(
            f"action {action.name} can't be a tool: its params can't be described: {error}"
        ) from error
    found.pop("title", None)
    return found


def _is_object(action: Action) -> bool:
    try:
        tool_of(action)
    except ConfigError:
        return False
    return True


def _target(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference stands for."""
    while "$ref" in schema:
        schema = root["$defs"][str(schema["$ref"]).rpartition("/")[2]]
    return schema


def strict_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """*schema* as OpenAI's strict mode wants it: no references, no other properties, all required.

    Raises:
        ConfigError: strict mode can't say this.
    """
    return _strict(schema, schema, ())


def _strict(
    schema: Mapping[str, Any], root: Mapping[str, Any], within: tuple[str, ...]
) -> dict[str, Any]:
    if "$ref" in schema:
        name = str(schema["$ref"])
        if name in within:
            raise ConfigError(f"{name.rpartition('/')[2]} contains itself")
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return _strict({**_target(schema, root), **rest}, root, (*within, name))
    found = {k: copy.deepcopy(v) for k, v in schema.items() if k not in (*_DROPPED, "$defs")}
    for key in ("anyOf", "oneOf"):
        if key in found:
            found["anyOf"] = [_strict(item, root, within) for item in found.pop(key)]
    if "allOf" in found:
        raise ConfigError("allOf is not for strict mode")
    if "items" in found:
        found["items"] = _strict(found["items"], root, within)
    if "prefixItems" in found:
        raise ConfigError("tuples are not for strict mode")
    if not any(key in found for key in ("type", "anyOf", "enum", "const")):
        raise ConfigError("a value of any type is not for strict mode")
    if found.get("type") == "array" and "items" not in found:
        raise ConfigError("a list of anything is not for strict mode")
    if found.get("type") == "object":
        _close(found, root, within)
    return found


def _close(found: dict[str, Any], root: Mapping[str, Any], within: tuple[str, ...]) -> None:
    if found.get("additionalProperties") not in (None, False) or "patternProperties" in found:
        raise ConfigError("free keys are not for strict mode")
    properties = found.get("properties", {})
    needed = set(found.get("required", ()))
    found["properties"] = {
        name: _strict(item, root, within)
        if name in needed
        else _nullable(_strict(item, root, within))
        for name, item in properties.items()
    }
    found["required"] = list(properties)
    found["additionalProperties"] = False


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if _takes_null(schema):
        return schema
    kind = schema.get("type")
    if isinstance(kind, str) and not any(key in schema for key in ("enum", "const")):
        return {**schema, "type": [kind, "null"]}
    described = {"description": schema.pop("description")} if "description" in schema else {}
    if "anyOf" in schema and len(schema) == 1:
        return {"anyOf": [*schema["anyOf"], {"type": "null"}], **described}
    return {"anyOf": [schema, {"type": "null"}], **described}


def _takes_null(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    return (
        kind == "null"
        or (isinstance(kind, list) and "null" in kind)
        or any(_takes_null(item) for key in ("anyOf", "oneOf") for item in schema.get(key, ()))
        or (not schema)
    )


def without_nulls(
    schema: Mapping[str, Any], value: Any, root: Mapping[str, Any] | None = None
) -> Any:
    """*value* without properties that are null, need not be given and can't be null."""
    root = schema if root is None else root
    schema = _target(schema, root)
    if not isinstance(value, list | Mapping):
        return value
    kind = "array" if isinstance(value, list) else "object"
    branches = [_target(item, root) for key in ("anyOf", "oneOf") for item in schema.get(key, ())]
    fitting = [item for item in branches if item.get("type") == kind]
    if len(fitting) == 1:
        schema = fitting[0]
    if isinstance(value, list):
        items = schema.get("items")
        return value if not items else [without_nulls(items, item, root) for item in value]
    properties = schema.get("properties", {})
    needed = schema.get("required", ())
    return {
        key: without_nulls(properties[key], item, root) if key in properties else item
        for key, item in value.items()
        if not (
            item is None
            and key in properties
            and key not in needed
            and not _takes_null(_target(properties[key], root))
        )
    }


__all__ = ["Tool", "ToolAnswer", "call_tool", "catalogue", "strict_schema", "tool_of"]
