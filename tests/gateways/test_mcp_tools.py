"""The tools of an MCP server as actions of an agent: found, checked, called once, left alone when it is silent."""

from __future__ import annotations

from typing import Any

import pytest

from foundation_nats import Agent
from foundation_nats.agent.mcp_tools import MCPTools, action_name
from foundation_nats.agent.tools import Tool
from foundation_nats.errors import (
    ActionError,
    ActionInvalidError,
    ActionNotFoundError,
    BreakerOpenError,
    ConfigError,
    HandlerError,
    StepNotDoneError,
)
from foundation_nats.gateways.web import Web
from foundation_nats.testing import AgentHarness, TestCluster, eventually
from tests.agents.reader import SHELF, Reader, Remote
from tests.agents.shelf import make
from tests.conftest import AGENTS

pytestmark = [pytest.mark.timeout(60)]


class Picky(Agent):
    """Wants what the server does not have."""

    skills = (MCPTools("shelf", command=SHELF, only=["note", "fly"]),)


class Small(Agent):
    """Takes few tools."""

    skills = (MCPTools("shelf", command=SHELF, tools_max=2),)


class Lost(Agent):
    """Its server does not exist."""

    skills = (MCPTools("shelf", command=["/no/such/program"]),)


async def test_tools_are_found_checked_and_called() -> None:
    """By signals, by handlers, as tools of models; a handler that is tried again does not call twice."""
    async with AgentHarness(Reader, id="r") as agent:
        told = [Tool.model_validate(item) for item in await agent.ask("foundation.actions")]
        assert [tool.name for tool in told] == [
            "shelf_note",
            action_name("shelf", "look.up"),
            "shelf_sleep",
            "shelf_big",
            "shelf_die",
        ]
        assert told[0].description == "Keep a note; how many there are."
        assert told[0].params["required"] == ["text"]
        assert await agent.ask("action.shelf_note", {"text": "a"}) == {"result": 1}
        assert await agent.send("note", "twice")
        assert agent.state.notes == 2, "it was called again"
        look = "action." + action_name("shelf", "look.up")
        assert await agent.ask(look, {"number": 2}) == {"result": "twice"}
        with pytest.raises(ActionInvalidError, match="'text' is a required property"):
            await agent.ask("action.shelf_note", {})
        with pytest.raises(ActionError, match=r"Error executing tool look\.up"):
            await agent.ask(look, {"number": 9})
        with pytest.raises(ActionError, match="bytes; 99 may be"):
            await agent.ask("action.shelf_big", {"size": 1000})
        with pytest.raises(ActionNotFoundError, match="no action 'shelf_fly'"):
            await agent.ask("action.shelf_fly", {})
        assert agent.steps == []


async def test_a_server_that_dies_or_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls fail in time, then at once; it is connected to again."""
    async with AgentHarness(Reader, id="r") as agent:
        skill = agent.agent.skill["shelf"]
        monkeypatch.setattr(
            skill.line, "_config", skill.config.model_copy(update={"timeout_s": 0.1})
        )
        with pytest.raises(ActionError, match=r"did not answer within 0\.1 s"):
            await agent.ask("action.shelf_sleep", {})
        with pytest.raises(ActionError, match="did not answer"):
            await agent.ask("action.shelf_sleep", {})
        with pytest.raises(BreakerOpenError, match="left alone"):
            await agent.ask("action.shelf_note", {"text": "x"})
        monkeypatch.undo()

        async def answers() -> bool:
            try:
                return bool(await agent.ask("action.shelf_note", {"text": "x"}))
            except (BreakerOpenError, StepNotDoneError):
                return False

        await eventually(answers)
        with pytest.raises(ActionError, match="did not answer"):
            await agent.ask("action.shelf_die", {})
        await eventually(answers)


async def test_what_can_not_be_mounted_says_why() -> None:
    """At the start of the agent; wrong configuration at once."""
    for kind, why in (
        (Picky, "has no tool fly"),
        (Small, "more than 2 tools"),
        (Lost, r"shelf can't be used: .*/no/such/program"),
    ):
        with pytest.raises((ConfigError, HandlerError), match=why):
            await AgentHarness(kind).start()
    with pytest.raises(ConfigError, match="either url or command"):
        MCPTools("shelf")
    with pytest.raises(ConfigError, match="colour"):
        MCPTools("shelf", url="http://x", colour="red")


async def test_a_server_over_http_may_come_later() -> None:
    """Not required, it does not hold up its agent; two agents share one connection."""
    web: Web | None = None
    try:
        app: Any = make().streamable_http_app()
        web = Web(app, ("127.0.0.1", 0), token=None)
        await web.open()
        config = {"shelf": {"url": web.url + "/mcp"}}
        async with AgentHarness(Remote, id="a", config=config) as one:
            assert "shelf_note" in await one.ask("tools")
            async with AgentHarness(Remote, id="b", config=config) as two:
                assert one.agent.skill["shelf"].line is two.agent.skill["shelf"].line
                assert await two.ask("action.shelf_note", {"text": "x"}) == {"result": 1}
            assert await one.ask("action.shelf_note", {"text": "y"}) == {"result": 2}
    finally:
        if web is not None:
            await web.close()
    async with AgentHarness(Remote, id="c") as alone:
        assert await alone.ask("tools") == []
        with pytest.raises(ActionNotFoundError):
            await alone.ask("action.shelf_note", {"text": "x"})


def test_names_of_actions_are_allowed_and_differ() -> None:
    """Whatever a server calls its tools."""
    assert action_name("a", "b") == "a_b"
    names = {action_name("a", tool) for tool in ("b.c", "b/c", "b_c", "x" * 80, "x" * 81)}
    assert len(names) == 5
    assert all(len(name) <= 64 and "." not in name for name in names)


@pytest.mark.cluster
@pytest.mark.usefixtures("chaos")
async def test_in_a_cluster_too() -> None:
    """An agent on a node, asked and killed: its server ends with the worker, and is there again."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        await nodes.client.agents.start("reader:Reader", id="r")
        assert await nodes.client.ask("r", "action.shelf_note", {"text": "a"}) == {"result": 1}
        assert await nodes.client.ask("r", "note", "b") == 2
        for worker in nodes.nodes["n1"].workers():
            if "shelf.py" not in " ".join(worker.cmdline()):
                worker.kill()

        async def again() -> bool:
            try:
                said = await nodes.client.ask("r", "action.shelf_note", {"text": "a"})
            except Exception:
                return False
            return bool(said == {"result": 1})

        await eventually(again, timeout=15)
        await nodes.client.agents.stop("r")

        def no_server() -> bool:
            return not any("shelf.py" in " ".join(w.cmdline()) for w in nodes.nodes["n1"].workers())

        await eventually(no_server)
