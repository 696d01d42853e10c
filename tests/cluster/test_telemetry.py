"""Telemetry is told of what really happens to nodes and agents, under the names that are documented."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from foundation_nats import Config, Node, NodeOptions
from foundation_nats.base import telemetry
from foundation_nats.errors import ConfigError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

Told = list[tuple[str, Mapping[str, float], Mapping[str, Any]]]


@pytest.fixture
def told() -> Iterator[Told]:
    """Everything that is executed, in order."""
    found: Told = []
    telemetry.attach("test", telemetry.EVENTS, lambda *event: found.append(event))
    yield found
    telemetry.detach("test")


def test_handlers_are_attached_by_name_and_leave_when_they_raise() -> None:
    """Only those of that name are called; one that raises is detached and harms nobody."""
    seen: list[str] = []

    def broken(name: str, _measurements: Mapping[str, float], _metadata: Mapping[str, Any]) -> None:
        seen.append(f"broken {name}")
        raise RuntimeError("no disk for metrics")

    telemetry.attach("broken", ["a.b", "a.c"], broken)
    telemetry.attach("well", "a.b", lambda name, m, d: seen.append(f"{name} {m['n']} {d['k']}"))
    with pytest.raises(ValueError, match="attached already"):
        telemetry.attach("well", "a.d", broken)
    with pytest.raises(ValueError, match="at least one event"):
        telemetry.attach("none", [], broken)
    telemetry.execute("a.b", {"n": 1}, {"k": "v"})
    telemetry.execute("a.b", {"n": 2}, {"k": "v"})
    telemetry.execute("a.d", {"n": 3})
    assert seen == ["broken a.b", "a.b 1 v", "a.b 2 v"]
    assert not telemetry.is_attached("a.c")
    assert not telemetry.detach("broken")
    assert telemetry.detach("well")
    assert not telemetry.is_attached("a.b")


@pytest.mark.cluster
@pytest.mark.timeout(60)
async def test_a_client_is_told_of_nodes_agents_and_a_failover(told: Told) -> None:
    """Each once, with what it is about."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.telemetry()
        await cluster.telemetry()

        def of(event: str) -> list[tuple[Mapping[str, float], Mapping[str, Any]]]:
            return [(measured, about) for name, measured, about in told if name == event]

        def nodes_of(event: str) -> list[str]:
            return [about["node"] for _, about in of(event)]

        await eventually(lambda: sorted(nodes_of(telemetry.NODE_CONNECTED)) == ["n1", "n2"])
        await cluster.agents.start("fleet:Counter", id="a", critical=True)
        await eventually(lambda: of(telemetry.AGENT_REGISTERED))
        ((measured, about),) = of(telemetry.AGENT_REGISTERED)
        assert (measured["agents"], about["agent"]) == (1, "a")
        info = await cluster.agents.get("a")
        victim = info.node
        assert victim is not None
        nodes.nodes[victim].kill_all()
        await eventually(lambda: of(telemetry.FAILOVER_COMPLETED), timeout=20)
        ((measured, about),) = of(telemetry.FAILOVER_COMPLETED)
        assert measured["agents"] == 1
        assert about["node"] == victim
        assert about["to"] == {({"n1", "n2"} - {victim}).pop(): 1}
        await eventually(lambda: nodes_of(telemetry.NODE_DISCONNECTED) == [victim], timeout=10)
        await cluster.agents.stop("a")
        await eventually(lambda: of(telemetry.AGENT_UNREGISTERED))
        ((measured, about),) = of(telemetry.AGENT_UNREGISTERED)
        assert (measured["agents"], about["agent"]) == (0, "a")
        assert len(of(telemetry.AGENT_REGISTERED)) == 1


@pytest.mark.cluster
@pytest.mark.timeout(60)
async def test_a_program_that_runs_a_node_is_told_by_it(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the other nodes, and of the failover that it decides as the leader."""
    monkeypatch.setenv("PYTHONPATH", str(AGENTS))

    def of(event: str) -> list[tuple[Mapping[str, float], Mapping[str, Any]]]:
        return [(measured, about) for name, measured, about in told if name == event]

    async with (
        TestCluster(nodes=0, path=[str(AGENTS)]) as nodes,
        Node(NodeOptions(name="own", workers=1), nodes.config),
    ):
        nodes.start_node("other")
        await nodes.wait_up(["own", "other"])
        await eventually(lambda: of(telemetry.NODE_CONNECTED))
        ((_, about),) = of(telemetry.NODE_CONNECTED)
        assert (about["node"], about["observer"]) == ("other", "own")
        await nodes.client.nodes.cordon("own")
        await nodes.client.agents.start("fleet:Counter", id="a", critical=True)
        await nodes.client.nodes.uncordon("own")
        nodes.nodes["other"].kill_all()
        await eventually(lambda: of(telemetry.FAILOVER_COMPLETED), timeout=20)
        ((measured, about),) = of(telemetry.FAILOVER_COMPLETED)
        assert (measured["agents"], about["node"], about["to"]) == (1, "other", {"own": 1})
        assert measured["ms"] > 0


def test_handlers_are_loaded_by_name_and_a_wrong_name_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All or none are attached; one that is loaded twice is called once, until both are done."""
    monkeypatch.setenv("FOUNDATION_TELEMETRY__HANDLERS", "tests.agents.measuring:fail, a.b:c")
    config = Config.load()
    assert config.telemetry.handlers == ("tests.agents.measuring:fail", "a.b:c")
    for name, text in config.to_environment().items():
        monkeypatch.setenv(name, text)
    assert Config.load() == config
    good = "tests.agents.measuring:fail"
    for name, said in {
        "measuring": "not of the form",
        "no_such_module:count": "can't be imported: No module named 'no_such_module'",
        "tests.agents.measuring:fial": "has no fial",
        "tests.agents.measuring:os.name": "is no function",
        "tests.agents.measuring:Path": "is no function",
        "tests.agents.measuring:wait": "waits",
    }.items():
        with pytest.raises(ConfigError, match=said) as wrong:
            telemetry.load([good, name])
        assert name in str(wrong.value)
        assert not telemetry.is_attached(telemetry.NODE_CONNECTED)
    first, second = telemetry.load([good]), telemetry.load([good])
    first()
    first()
    assert telemetry.is_attached(telemetry.NODE_CONNECTED)
    second()
    assert not telemetry.is_attached(telemetry.NODE_CONNECTED)


@pytest.mark.cluster
@pytest.mark.timeout(60)
async def test_a_node_process_loads_the_handlers_that_are_set(tmp_path: Path) -> None:
    """Its manager calls them, one that raises is detached, and a wrong name ends the start."""
    lines = tmp_path / "measured"
    handlers = {
        "FOUNDATION_TELEMETRY__HANDLERS": "measuring:fail,measuring:write_down",
        "MEASURED": str(lines),
    }

    def told(event: str) -> list[dict[str, Any]]:
        if not lines.exists():
            return []
        found = [json.loads(line) for line in lines.read_text().splitlines()]
        return [item for item in found if item["event"] == event]

    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        own = nodes.start_node("own", environment=handlers)
        await nodes.wait_up(["own"])
        nodes.start_node("other", "--label", "zone=b")
        await nodes.wait_up(["other"])
        await eventually(lambda: told(telemetry.NODE_CONNECTED), message="told of the node")
        (node,) = told(telemetry.NODE_CONNECTED)
        assert (node["node"], node["observer"], node["nodes"]) == ("other", "own", 1)
        assert (node["labels"], node["pid"]) == ({"zone": "b"}, own.pid)
        await nodes.client.agents.start("fleet:Counter", id="a", critical=True)
        await eventually(lambda: told(telemetry.AGENT_REGISTERED), message="told of the agent")
        assert "no disk for metrics" in own.log_tail()
        assert "handler raised and was detached" in own.log_tail()

        wrong = {"FOUNDATION_TELEMETRY__HANDLERS": "measuring:wriet_down"}
        node_of_none = nodes.start_node("wrong", environment=wrong)
        assert await node_of_none.wait() == 2
        assert "measuring has no wriet_down" in node_of_none.log_tail()
        assert "'write_down'" in node_of_none.log_tail()
        del nodes.nodes["wrong"]
