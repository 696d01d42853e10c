"""A cluster as an MCP server, used by the official client: over stdio and over HTTP, read-only and not."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from mcp import Client, MCPError, StdioServerParameters

from foundation_nats.errors import ConfigError
from foundation_nats.gateways.agent_tools import tool_name
from foundation_nats.gateways.tools import cluster_tools
from foundation_nats.gateways.web import Web, read_address
from foundation_nats.testing import TestCluster
from tests.agents.shelf import make
from tests.conftest import AGENTS
from tests.gateways.serving import command, served

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

LOOKING = {
    "cluster_agent",
    "cluster_agents",
    "cluster_dead_letters",
    "cluster_deployments",
    "cluster_events",
    "cluster_nodes",
    "cluster_status",
    "cluster_tap",
    "cluster_topology",
    "cluster_why",
}
CHANGING = {
    "cluster_ask",
    "cluster_cordon",
    "cluster_delete",
    "cluster_deploy",
    "cluster_drain",
    "cluster_rebalance",
    "cluster_scale",
    "cluster_send",
    "cluster_uncordon",
}


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node, and an agent that counts."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as running:
        await running.client.agents.start("fleet:Counter", id="visits")
        yield running


def over_stdio(nodes: TestCluster, *arguments: str) -> Client:
    """As an assistant has it: the command as a child process."""
    return Client(
        StdioServerParameters(command=sys.executable, args=command(nodes, "mcp", *arguments)),
        read_timeout_seconds=30,
    )


async def call(client: Client, name: str, /, **arguments: Any) -> Any:
    """What a tool returns; its text and its structure say the same."""
    result = await client.call_tool(name, arguments)
    (content,) = result.content
    assert content.type == "text"
    assert not result.is_error, content.text
    assert json.loads(content.text) == result.structured_content
    return result.structured_content


async def refused(client: Client, name: str, /, **arguments: Any) -> str:
    """What a tool says that went wrong."""
    result = await client.call_tool(name, arguments)
    assert result.is_error
    (content,) = result.content
    assert content.type == "text"
    return content.text


def test_the_names_of_tools_are_a_contract() -> None:
    """And each says what it is for, and what it takes."""
    assert {tool.name for tool in cluster_tools()} == LOOKING
    assert {tool.name for tool in cluster_tools(writes=True)} == LOOKING | CHANGING
    for tool in cluster_tools(writes=True):
        assert len(tool.description) > 20
        schema = tool.schema()
        assert schema["type"] == "object"
        assert schema["additionalProperties"] is False
        assert all(item.get("description") for item in schema["properties"].values()), tool.name


def test_addresses_are_read_and_open_ones_need_a_token() -> None:
    """Nobody opens a cluster to a network by a slip."""

    async def app(*_: Any) -> None: ...

    assert read_address("8080") == ("127.0.0.1", 8080)
    assert read_address("[::1]:1") == ("::1", 1)
    with pytest.raises(ConfigError, match="is no address"):
        read_address("here:there")
    with pytest.raises(ConfigError, match="needs a token"):
        Web(app, ("0.0.0.0", 0), token=None)
    assert Web(app, ("0.0.0.0", 0), token="x").url == "http://0.0.0.0:0"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to install it."""
    monkeypatch.setitem(sys.modules, "mcp_types", None)
    monkeypatch.delitem(sys.modules, "foundation_nats.gateways.mcp_server", raising=False)
    with pytest.raises(ConfigError, match=r"needs mcp_types.*'foundation-nats\[mcp\]'"):
        importlib.import_module("foundation_nats.gateways.mcp_server")


async def test_an_assistant_looks_at_a_cluster_over_stdio(nodes: TestCluster) -> None:
    """Everything that looks; nothing that changes; mistakes are told."""
    async with over_stdio(nodes) as client:
        tools = (await client.list_tools()).tools
        assert {tool.name for tool in tools} == LOOKING
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
        status = await call(client, "cluster_status")
        assert (status["cluster"], status["leader"], status["nodes"]["up"]) == ("test", "n1", 1)
        assert status["agents"]["running"] == 1
        assert (await call(client, "cluster_nodes"))["nodes"][0]["name"] == "n1"
        listed = await call(client, "cluster_agents", status="running", limit=1)
        assert (listed["total"], listed["agents"][0]["id"]) == (1, "visits")
        await nodes.client.ask("visits", "counter.add", {"amount": 3})
        one = await call(client, "cluster_agent", id="visits")
        assert one["agent"]["node"] == "n1"
        assert one["record"]["state"]["total"] == 3
        assert "salt" not in one["record"]
        assert (await call(client, "cluster_deployments"))["deployments"][0]["settled"] is True
        story = await call(client, "cluster_why", name="visits")
        assert "n1" in story["story"]["sentences"][-1]["text"]
        events = await call(client, "cluster_events", topic="agent", limit=5)
        assert events["events"][0]["topic"] == "agent"
        topology = await call(client, "cluster_topology")
        assert [node["name"] for node in topology["topology"]["nodes"]] == ["n1"]
        assert (await call(client, "cluster_dead_letters"))["letters"] == []
        await nodes.client.send("visits", "counter.add", {"amount": 1})
        seen = await call(
            client, "cluster_tap", seconds=20, limit=1, type="counter.add", replay_s=60
        )
        assert (seen["ended_by"], seen["items"][0]["agent"]) == ("limit", "visits")
        nothing = await call(client, "cluster_tap", seconds=0.1, type="no.such")
        assert (nothing["ended_by"], nothing["items"]) == ("time", [])
        assert "There is no agent 'nobody'" in await refused(client, "cluster_agent", id="nobody")
        assert "seconds: Input should be" in await refused(client, "cluster_tap", seconds=3600)
        assert "limt: Extra inputs" in await refused(client, "cluster_agents", limt=1)
        with pytest.raises(MCPError, match="read-only"):
            await client.call_tool("cluster_send", {"target": "visits", "type": "counter.add"})
        with pytest.raises(MCPError, match="There is no tool 'cluster_fly'"):
            await client.call_tool("cluster_fly", {})


async def test_an_assistant_operates_a_cluster_over_http(nodes: TestCluster) -> None:
    """With --allow-write: send, ask, deploy, scale, drain; errors say what is known of the outcome."""
    async with (
        served(nodes, "mcp", "--allow-write") as (url, process),
        Client(url, read_timeout_seconds=30) as client,
    ):
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == LOOKING | CHANGING
        destructive = {
            n for n, t in tools.items() if t.annotations and t.annotations.destructive_hint
        }
        assert destructive == {"cluster_delete"}
        say = {"target": "visits", "type": "counter.add", "data": {"amount": 2}}
        first = await call(client, "cluster_send", **say, id="once")
        again = await call(client, "cluster_send", **say, id="once")
        assert (first["receipt"]["duplicate"], again["receipt"]["duplicate"]) == (False, True)
        assert (await call(client, "cluster_ask", **say))["answer"] == 4
        manifest = "version: 1\nagents: [{name: more, run: 'fleet:Counter', replicas: 1}]"
        deployed = await call(client, "cluster_deploy", manifest=manifest)
        assert deployed["report"]
        scaled = await call(client, "cluster_scale", name="more", replicas=3)
        assert scaled["deployment"]["running"] == 3
        assert "more" in await refused(
            client, "cluster_deploy", manifest="version: 1\nagents: [more]"
        )
        assert "no deployment 'less'" in await refused(
            client, "cluster_scale", name="less", replicas=1
        )
        assert (await call(client, "cluster_cordon", node="n1"))["cordoned"] == "n1"
        told = await refused(client, "cluster_drain", node="n1", timeout_s=1)
        assert "not_settled" in told
        assert (await call(client, "cluster_uncordon", node="n1"))["uncordoned"] == "n1"
        assert (await call(client, "cluster_delete", name="more"))["deleted"] == "more"
        told = await refused(
            client, "cluster_ask", target="visits", type="counter.sleep", timeout_s=0.01
        )
        assert "agent" in told
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0


def test_tool_names_are_stable_and_never_the_same() -> None:
    """However long, and whatever is in the names."""
    assert tool_name("tills", "add") == "agent__tills__add"
    names = [tool_name("a__b", "c"), tool_name("a", "b__c"), tool_name("x" * 60, "y" * 60)]
    assert len({*names}) == 3
    assert all(len(name) <= 64 for name in names)


async def test_the_actions_of_agents_are_tools(nodes: TestCluster) -> None:
    """Of a deployment and of one that stands alone, without any other writing tool."""
    deployed = "version: 1\nagents: [{name: tills, run: 'talkative:Teller', replicas: 2}]"
    await nodes.client.deployments.deploy(deployed)
    await nodes.client.agents.start("talkative:Teller", id="alone")
    async with over_stdio(nodes, "--actions", "capability:double") as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) - LOOKING == {
            "agent__alone__add",
            "agent__alone__double",
            "agent__tills__add",
            "agent__tills__double",
        }
        add = tools["agent__tills__add"]
        assert add.description == "Add to the till."
        assert set(add.input_schema["properties"]) == {"amount", "agent", "agent_id"}
        assert add.output_schema is not None
        assert add.output_schema["properties"]["total"]["type"] == "integer"
        assert set(tools["agent__alone__double"].input_schema["properties"]) == {"number"}
        assert await call(client, "agent__tills__add", amount=3, agent_id="tills-1") == {"total": 3}
        assert await call(client, "agent__tills__add", amount=4, agent_id="tills-1") == {"total": 7}
        assert (await nodes.client.agents.state("tills-0") or {})["state"]["total"] == 0
        assert await call(client, "agent__alone__double", number=21) == {"result": 42}
        assert (await call(client, "agent__tills__double", number=1)) == {"result": 2}
        assert "less than or equal to 100" in await refused(client, "agent__alone__add", amount=101)
        assert "'alone' is not of deployment:tills" in await refused(
            client, "agent__tills__add", amount=1, agent_id="alone"
        )
        with pytest.raises(MCPError, match="no tool"):
            await client.call_tool("agent__tills__steal", {})


async def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one is set; foreign pages get nowhere in any case, and bodies have a limit."""
    web = Web(make().streamable_http_app(), ("127.0.0.1", 0), token="secret")
    await web.open()
    url = f"{web.url}/mcp"
    try:
        async with httpx.AsyncClient() as http:

            async def status(content: Any = b"{}", **headers: str) -> int:
                return (await http.post(url, content=content, headers=headers)).status_code

            async def pieces() -> AsyncIterator[bytes]:
                yield b"{}"

            right = {"authorization": "Bearer secret"}
            assert await status() == 401
            assert await status(authorization="Bearer wrong") == 401
            right["accept"] = "application/json, text/event-stream"
            right["content-type"] = "application/json"
            assert await status(**right, origin="http://evil.example") == 403
            assert await status(**right) == 400
            assert await status(pieces(), **right) == 411
            monkeypatch.setattr("foundation_nats.gateways.web.BODY_MAX", 10)
            assert await status(b"x" * 11, **right) == 413
    finally:
        await web.close()
