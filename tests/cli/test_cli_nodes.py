"""`foundation nodes add` and `remove`: real nodes by real commands, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from foundation_nats import Cluster
from foundation_nats.base.process import process_start
from foundation_nats.launch.ledger import Ledger
from foundation_nats.testing import TestCluster, eventually
from foundation_nats.testing.brokers import free_ports
from tests.agents.deciders import Book, Seats
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_MANIFEST = """
version: 1
agents:
  - {name: counters, run: "fleet:Counter", replicas: 6, critical: true}
"""


@dataclass(slots=True)
class Shell:
    """A terminal at one cluster."""

    env: dict[str, str]
    cwd: Path

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """Run a command to its end: exit code, stdout, stderr."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "foundation_cli.main",
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env,
            cwd=self.cwd,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), 60)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def json(self, *arguments: str) -> Any:
        """Run a command that must succeed; its one JSON document."""
        code, out, err = await self.run(*arguments, "-o", "json")
        assert code == 0, err
        return json.loads(out)


@asynccontextmanager
async def running(
    folder: Path, *, nodes: int = 1, environment: dict[str, str] | None = None
) -> AsyncIterator[tuple[TestCluster, Shell]]:
    """A cluster and a terminal at it; what the terminal has started is ended."""
    async with TestCluster(nodes=nodes, path=[str(AGENTS)]) as cluster:
        env = {
            **os.environ,
            **cluster.config.to_environment(),
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONPATH": str(AGENTS),
            **(environment or {}),
        }
        try:
            yield cluster, Shell(env, folder)
        finally:
            for path in (folder / "state").rglob("*.json"):
                with contextlib.suppress(psutil.NoSuchProcess, ValueError):
                    pid = json.loads(path.read_text())["pid"]
                    if pid:
                        psutil.Process(pid).kill()


async def names(cluster: Cluster, status: str = "up") -> list[str]:
    """The nodes in this condition."""
    return [node.name for node in await cluster.nodes.list() if node.status == status]


async def all_running(cluster: Cluster) -> bool:
    """Whether every agent runs."""
    return all(agent.status == "running" for agent in await cluster.agents.list())


async def test_nodes_are_added_and_removed_and_no_agent_is_lost(tmp_path: Path) -> None:
    """They come up with what was asked for, take agents, hand them over, and leave nothing."""
    async with running(tmp_path) as (cluster, shell):
        client = cluster.client
        added = await shell.json(
            *("nodes", "add", "2", "--workers", "1", "--label", "zone=b b", "--capability", "gpu"),
            *("--capacity", "slots=50", "--import", "fleet"),
        )
        assert [node["name"] for node in added["added"]] == ["node-1", "node-2"]
        for node in added["added"]:
            assert node["labels"] == {"zone": "b b"}
            assert node["capabilities"] == ["gpu"]
            assert node["capacity"]["slots"] == 50.0
        assert await names(client) == ["n1", "node-1", "node-2"]
        assert [node["name"] for node in await shell.json("nodes")] == ["n1", "node-1", "node-2"]
        await client.deployments.apply(_MANIFEST)
        await client.deployments.wait_settled(["counters"], timeout=15)
        for number in range(6):
            await client.ask(f"counters-{number}", "counter.add", {"amount": number})
        pids = [node["pid"] for node in added["added"]]

        plan = await shell.json("nodes", "remove", "node-1", "node-2", "--plan")
        there = [agent.node for agent in await client.agents.list()]
        assert plan["moves"] == len(there) - there.count("n1") > 0
        assert {item["target"] for item in plan["agents"]} == {"n1"}
        assert await names(client) == ["n1", "node-1", "node-2"]

        gone = await shell.json("nodes", "remove", "node-1", "node-2")
        assert [(item["node"], item["drained"]) for item in gone["removed"]] == [
            ("node-1", True),
            ("node-2", True),
        ]
        assert await names(client) == ["n1"]
        assert not any(map(process_start, pids))
        assert not list((tmp_path / "state").rglob("*.json"))
        await client.deployments.wait_settled(["counters"], timeout=15)
        totals = [await client.ask(f"counters-{number}", "counter.get") for number in range(6)]
        assert totals == list(range(6))


async def test_added_nodes_follow_domains_serve_metrics_and_log_as_they_are_told(
    tmp_path: Path,
) -> None:
    """Everything that `node start` takes; of several nodes each serves at a port of its own."""
    async with running(tmp_path, nodes=0) as (cluster, shell):
        port = free_ports(2)
        added = await shell.json(
            *("nodes", "add", "2", "--workers", "1", "--domain", "deciders:Seats"),
            *("--metrics", str(port), "--log-json", "--log-level", "debug"),
        )
        names = [node["name"] for node in added["added"]]
        accepted = await cluster.client.consensus.propose(Seats, Book(seat="1A", by="me"))

        async def followed() -> bool:
            hosts = await cluster.client.consensus.hosts("seats")
            return hosts == dict.fromkeys(names, accepted.revision)

        await eventually(followed, message="both nodes follow the domain")

        def scrape(number: int) -> str:
            url = f"http://127.0.0.1:{port + number}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())

        for number, name in enumerate(names):
            assert f'foundation_leader{{node="{name}"}}' in await asyncio.to_thread(scrape, number)
            (log,) = (tmp_path / "state").rglob(f"{name}.log")
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert "debug" in {line["level"] for line in lines}
        await shell.json("nodes", "remove", *names, "--force")

        for words, said in (
            (("--metrics", "65535"), "port 65536"),
            (("--domain", "deciders"), "module:Class"),
            (("--log-level", "loud"), "none of debug"),
        ):
            code, _, err = await shell.run("nodes", "add", "2", *words)
            assert (code, said in err) == (2, True), err
        assert not list((tmp_path / "state").rglob("*.json"))


async def test_a_node_started_elsewhere_is_asked_to_drain_and_end(tmp_path: Path) -> None:
    """The launcher knows nothing of it; it ends by itself with exit code 0."""
    async with running(tmp_path, nodes=2) as (cluster, shell):
        await cluster.client.deployments.apply(_MANIFEST)
        await cluster.client.deployments.wait_settled(["counters"], timeout=15)
        gone = await shell.json("nodes", "remove", "n2")
        assert gone["removed"][0]["drained"]
        assert await cluster.nodes["n2"].wait(timeout=10) == 0
        assert await names(cluster.client) == ["n1"]


async def test_the_last_node_is_not_removed_without_force(tmp_path: Path) -> None:
    """It says how many agents would wait."""
    async with running(tmp_path) as (cluster, shell):
        await cluster.client.deployments.apply(_MANIFEST)
        await cluster.client.deployments.wait_settled(["counters"], timeout=15)
        code, _, err = await shell.run("nodes", "remove", "n1", "-o", "json")
        assert code == 1
        error = json.loads(err)["error"]
        assert "6 agents" in error["message"]
        assert "--force" in error["hint"]
        assert await names(cluster.client) == ["n1"]
        plan = await shell.json("nodes", "remove", "n1", "--plan")
        assert (plan["last"], plan["waits"]) == (True, 6)
        gone = await shell.json("nodes", "remove", "n1", "--force")
        assert gone["removed"][0]["drained"]


async def test_a_node_that_is_killed_while_it_drains_is_removed_all_the_same(
    tmp_path: Path,
) -> None:
    """SIGKILL half-way: its agents are recovered elsewhere, and the command says what happened."""
    # Its hand-over stands still, so that the kill comes at the awkward moment.
    async with running(
        tmp_path, environment={"FOUNDATION_FAILPOINTS": "move.before_handover=sleep(30)"}
    ) as (
        cluster,
        shell,
    ):
        client = cluster.client
        added = await shell.json("nodes", "add", "--workers", "1", "--name", "victim")
        (victim,) = added["added"]
        await client.deployments.apply(_MANIFEST)
        await client.deployments.wait_settled(["counters"], timeout=15)
        assert await client.agents.list(node="victim-1")
        removing = asyncio.create_task(shell.run("nodes", "remove", "victim-1", "-o", "json"))

        async def is_draining() -> bool:
            events = await client.events.list(topic="node")
            return any(event.what == "draining" for event in events)

        try:
            await eventually(is_draining, timeout=15, message="the node drains")
            os.kill(victim["pid"], signal.SIGKILL)
            code, out, err = await removing
        finally:
            removing.cancel()
        assert code == 0, err
        (gone,) = json.loads(out)["removed"]
        assert not gone["drained"]
        assert "died" in gone["how"]
        assert not list((tmp_path / "state").rglob("*.json"))
        await eventually(lambda: all_running(client), timeout=15, message="all recovered")
        assert {agent.node for agent in await client.agents.list()} == {"n1"}


async def test_a_node_that_hangs_is_killed_after_the_deadline(tmp_path: Path) -> None:
    """It answers nobody: neither on the bus nor to SIGTERM."""
    async with running(tmp_path) as (cluster, shell):
        added = await shell.json("nodes", "add", "--workers", "1")
        pid = added["added"][0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        gone = await shell.json("nodes", "remove", "node-1", "--wait", "3s")
        assert not gone["removed"][0]["drained"]
        assert "killed" in gone["removed"][0]["how"]
        assert process_start(pid) is None
        assert await names(cluster.client) == ["n1"]


async def test_nothing_is_started_when_the_server_is_unreachable(tmp_path: Path) -> None:
    """Exit code 3, and no trace."""
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    shell = Shell(env, tmp_path)
    for words in (("add", "1"), ("remove", "n1")):
        code, _, err = await shell.run("nodes", *words, "-s", "nats://127.0.0.1:1", "-o", "json")
        assert code == 3
        assert "127.0.0.1:1" in json.loads(err)["error"]["message"]
    assert not (tmp_path / "state").exists()


async def test_names_that_are_taken_are_passed_over(tmp_path: Path) -> None:
    """By a node that is up, or by one that somebody else is starting: two commands at a time."""
    async with running(tmp_path) as (cluster, shell):
        cluster.start_node("node-2")
        await cluster.wait_up(["node-2"])
        found = await asyncio.gather(
            shell.json("nodes", "add", "1", "--workers", "1"),
            shell.json("nodes", "add", "1", "--workers", "1"),
        )
        assert sorted(item["added"][0]["name"] for item in found) == ["node-1", "node-3"]
        for name in ("node-1", "node-3"):
            await shell.json("nodes", "remove", name)


async def test_a_node_that_does_not_come_up_is_told_with_its_log(tmp_path: Path) -> None:
    """Exit code 5 with the reason from its log; what has ended is forgotten."""
    async with running(tmp_path) as (cluster, shell):
        code, _, err = await shell.run("nodes", "add", "--import", "no_such_module", "-o", "json")
        assert code == 5
        message = json.loads(err)["error"]["message"]
        assert "node-1 ended before it was up" in message
        assert "no_such_module" in message
        assert not list((tmp_path / "state").rglob("*.json"))
        assert await names(cluster.client) == ["n1"]


async def test_a_node_that_is_late_stays_and_can_be_removed(tmp_path: Path) -> None:
    """Exit code 5 names it; `nodes remove` clears it away whether it has joined or not."""
    async with running(tmp_path) as (_, shell):
        code, _, err = await shell.run(
            "nodes", "add", "--workers", "1", "--wait", "0s", "-o", "json"
        )
        assert code == 5
        error = json.loads(err)["error"]
        assert "node-1" in error["message"]
        assert "nodes remove node-1" in error["hint"]
        await shell.json("nodes", "remove", "node-1")
        assert not list((tmp_path / "state").rglob("*.json"))


async def test_an_unknown_node_is_not_found(tmp_path: Path) -> None:
    """Exit code 4, with the name that was meant."""
    async with running(tmp_path, nodes=2) as (cluster, shell):
        code, _, err = await shell.run("nodes", "remove", "n11", "-o", "json")
        assert code == 4
        assert "'n1'" in json.loads(err)["error"]["hint"]
        assert len(await names(cluster.client)) == 2


async def test_a_command_launches_nodes(tmp_path: Path) -> None:
    """Values arrive whole through a shell of the command's own; remove clears away."""
    async with running(tmp_path) as (cluster, shell):
        log, gone = tmp_path / "node.log", tmp_path / "gone"
        program = f"{sys.executable} -m foundation_cli.main"
        add = (
            f"sh -c 'exec {program} node start --name {{name}} {{options:q}} -s {{servers:q}} "
            f"-c {{cluster}} >{log} 2>&1 </dev/null &'"
        )
        added = await shell.json(
            *("nodes", "add", "--workers", "1", "--label", "note=a b; touch /nowhere"),
            *("--command", add),
        )
        (node,) = added["added"]
        assert node["labels"] == {"note": "a b; touch /nowhere"}
        assert Ledger("test").folder.name == "test"
        remove = f"sh -c 'echo {{name}} >{gone}'"
        removed = await shell.json("nodes", "remove", "node-1", "--command", remove)
        assert removed["removed"][0]["drained"]
        assert gone.read_text() == "node-1\n"
        assert await names(cluster.client) == ["n1"]
        await eventually(lambda: process_start(node["pid"]) is None, timeout=10)


async def test_a_launcher_command_that_fails_says_what_it_said(tmp_path: Path) -> None:
    """Exit code, stderr; not found; too slow: each is told, and no name stays taken."""
    async with running(tmp_path) as (cluster, shell):
        shell.env["FOUNDATION_LAUNCHER__TIMEOUT_S"] = "0.5"
        cases = {
            "sh -c 'echo no room on {name} >&2; exit 7'": ("exit code 7", "no room on node-1"),
            "/no/such/program {command}": ("can't be run", "No such file"),
            "sh -c 'echo waiting; sleep 60'": ("within 0.5 s", "waiting"),
        }
        for template, expected in cases.items():
            code, _, err = await shell.run("nodes", "add", "--command", template, "-o", "json")
            assert code == 1, err
            error = json.loads(err)["error"]
            assert error["code"] == "launch"
            for text in expected:
                assert text in error["message"]
        code, _, err = await shell.run("nodes", "add", "--command", "run {nmae}", "-o", "json")
        assert code == 2
        assert "{name}" in json.loads(err)["error"]["hint"]
        code, _, err = await shell.run("nodes", "add", "--launcher", "nobody")
        assert code == 2
        assert "local" in err
        assert not list((tmp_path / "state").rglob("*.json"))
        assert await names(cluster.client) == ["n1"]
