"""Actions as tools: schemas in the shapes of OpenAI, Anthropic and MCP, and calls by models."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

import pytest
from pydantic import BaseModel, Field

from foundation_nats import ActionContext, Agent, action
from foundation_nats.agent.actions import CATALOGUE
from foundation_nats.agent.tools import (
    Tool,
    call_tool,
    catalogue,
    strict_schema,
    tool_of,
    without_nulls,
)
from foundation_nats.errors import ConfigError, StepInDoubtError
from foundation_nats.testing import AgentHarness


class Size(StrEnum):
    """Of a cup."""

    SMALL = "small"
    LARGE = "large"


class Extra(BaseModel):
    """What is put into it."""

    what: str
    spoons: int = Field(default=1, ge=0, description="how many")


class Tree(BaseModel):
    """Contains itself."""

    children: list[Tree] = Field(default_factory=list)


class Cup(BaseModel):
    """What was made."""

    text: str


@action
async def brew(
    tea: str, size: Size = Size.SMALL, extras: list[Extra] | None = None, seconds: float = 60.0
) -> Cup:
    """Make tea."""
    found = ",".join(f"{item.spoons} {item.what}" for item in extras or [])
    return Cup(text=f"{size} {tea} {found} {seconds:g}")


@action
async def free(words: dict[str, int]) -> int:
    """Takes free keys."""
    return sum(words.values())


@action
async def count(tree: Tree) -> int:
    """Takes what contains itself."""
    return len(tree.children)


@action
async def doubtful(ctx: ActionContext) -> None:
    """Is in doubt."""
    raise StepInDoubtError("who knows")


@action
async def odd() -> Any:
    """Returns what is no JSON."""
    return object()


class Kitchen(Agent):
    """Has tools."""

    actions = (brew, free, doubtful, odd)


def _objects(schema: Any) -> list[dict[str, Any]]:
    if isinstance(schema, dict):
        mine = [schema] if schema.get("type") == "object" else []
        return mine + [found for value in schema.values() for found in _objects(value)]
    if isinstance(schema, list):
        return [found for value in schema for found in _objects(value)]
    return []


def test_strict_schemas_have_no_references_and_require_all() -> None:
    """What has a default may be null."""
    found = tool_of(brew).openai()["function"]
    assert found["strict"] is True
    text = json.dumps(found["parameters"])
    assert "$ref" not in text
    assert "default" not in text
    for item in _objects(found["parameters"]):
        assert item["additionalProperties"] is False
        assert item["required"] == list(item["properties"])
    properties = found["parameters"]["properties"]
    assert properties["tea"] == {"type": "string"}
    assert properties["seconds"] == {"type": ["number", "null"]}
    assert {"type": "null"} in properties["size"]["anyOf"]
    spoons = properties["extras"]["anyOf"][0]["items"]["properties"]["spoons"]
    assert spoons == {"type": ["integer", "null"], "minimum": 0, "description": "how many"}


@pytest.mark.parametrize("loose", [free, count])
def test_what_strict_mode_cannot_say_makes_a_plain_tool(loose: Any) -> None:
    """Free keys, and what contains itself."""
    tool = tool_of(loose)
    with pytest.raises(ConfigError, match=r"not for strict mode|contains itself"):
        strict_schema(tool.params)
    found = tool.openai()["function"]
    assert (found["strict"], found["parameters"]) == (False, tool.params)


def test_other_shapes() -> None:
    """Of Anthropic and of MCP, with the result's schema where it is an object."""
    tool = tool_of(brew)
    assert tool.anthropic()["input_schema"]["required"] == ["tea"]
    assert tool.mcp()["inputSchema"] == tool.params
    assert tool.mcp()["outputSchema"]["properties"]["text"]["type"] == "string"
    assert "outputSchema" not in tool_of(free).mcp()
    assert Tool.model_validate_json(tool.model_dump_json()) == tool


def test_what_can_be_no_tool_is_refused() -> None:
    """Params that are no object."""

    class Bare(type(brew).__mro__[1]):  # type: ignore[misc]
        """Takes a number."""

        async def run(self, params: int, ctx: ActionContext) -> int:
            return params

    with pytest.raises(ConfigError, match="params are no object"):
        tool_of(Bare)


def test_nulls_that_stand_for_not_given_are_taken_away() -> None:
    """Not those that a type allows."""
    schema = tool_of(brew).params
    given = {"tea": "mint", "size": None, "extras": [{"what": "milk", "spoons": None}]}
    assert without_nulls(schema, given) == {"tea": "mint", "extras": [{"what": "milk"}]}
    assert without_nulls(schema, {"extras": None}) == {"extras": None}
    assert without_nulls(schema, [1]) == [1]


async def test_a_model_calls_tools_and_is_told_what_is_wrong() -> None:
    """By JSON, as models do."""
    async with AgentHarness(Kitchen) as kitchen:
        ctx = kitchen.agent.ctx
        ctx._begin(None)
        good = await call_tool(
            ctx,
            "brew",
            '{"tea": "mint", "size": null, "extras": [{"what": "milk", "spoons": null}], "seconds": 5}',
        )
        assert json.loads(good.text) == {"text": "small mint 1 milk 5"}
        assert not good.is_error
        for name, arguments, words in (
            ("brew", "{", "no JSON"),
            ("brew", '{"size": "huge"}', "tea: Field required; size: Input should be 'small'"),
            ("sing", "{}", "has no action 'sing'; it has: brew"),
            ("odd", "{}", "no JSON"),
        ):
            answer = await call_tool(ctx, name, arguments)
            assert answer.is_error
            assert words in answer.text
        with pytest.raises(StepInDoubtError):
            await call_tool(ctx, "doubtful", {})


async def test_an_agent_lists_its_tools() -> None:
    """As data, for gateways."""
    async with AgentHarness(Kitchen) as kitchen:
        told = await kitchen.ask(CATALOGUE)
        assert [Tool.model_validate(item) for item in told] == catalogue(Kitchen)
    assert [tool.name for tool in catalogue(Kitchen)] == ["brew", "free", "doubtful", "odd"]
