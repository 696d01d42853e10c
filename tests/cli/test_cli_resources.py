"""`foundation resources`: what it shows, where it says that something fits, and what it takes and gives back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from foundation_cli.main import run
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

Shell = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs `foundation resources …` in this process: exit code, stdout, stderr."""

    async def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(run, ["resources", *arguments])
        return code, *capsys.readouterr()

    return call


async def as_json(shell: Shell, *arguments: str) -> Any:
    """The one document of a command that succeeds."""
    code, out, err = await shell(*arguments, "-o", "json")
    assert code == 0, err
    return json.loads(out)


@asynccontextmanager
async def connected(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    """A cluster without nodes that commands are connected to."""
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as cluster:
        for name, value in cluster.config.to_environment().items():
            monkeypatch.setenv(name, value)
        yield cluster


async def is_open(shell: Shell) -> bool:
    """Whether a node has opened its books."""
    code, _, _ = await shell("check", "gpu=2")
    return code == 0


async def test_capacity_is_shown_checked_reserved_and_given_back(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command in turn: tables, JSON, YAML and exit codes."""
    async with connected(monkeypatch) as cluster:
        cluster.start_node("n1", "--capacity", "gpu=2", "--capacity", "cpu=4")
        cluster.start_node("n2", "--capacity", "cpu=8", "--capability", "fast")
        await cluster.wait_up(["n1", "n2"])
        await eventually(lambda: is_open(shell), timeout=15, message="the books are open")

        found = await as_json(shell, "check", "cpu=2,gpu=1")
        assert (found["fits"], found["verdict"]) == (True, "fits")
        verdicts = {item["node"]: item["verdict"] for item in found["nodes"]}
        assert verdicts == {"n1": "fits", "n2": "infeasible"}
        code, out, _ = await shell("check", "cpu=5", "gpu=1")
        assert code == 1
        assert "offers 4 cpu in all (needs 5)" in out
        assert "does not offer gpu" in out
        code, out, _ = await shell("check", "cpu=1", "--require", "fast")
        assert code == 0
        assert [line.split()[:2] for line in out.splitlines()[1:]] == [
            ["n1", "never"],
            ["n2", "yes"],
        ]

        held = await as_json(shell, "reserve", "gpu=1,cpu=1", "--for", "2m", "--holder", "me")
        assert (held["node"], held["state"], held["holder"]) == ("n1", "held", "me")
        code, out, _ = await shell("confirm", held["id"])
        assert code == 0
        assert held["id"] in out
        assert "when released" in out
        await cluster.client.agents.start("fleet:Counter", id="a", resources={"gpu": 1})
        ref = await cluster.client.agents.start(
            "fleet:Counter", id="b", resources={"gpu": 1}, wait=False
        )

        async def waits() -> bool:
            return (await cluster.client.agents.get(ref.id)).status == "pending"

        await eventually(waits, message="the second agent finds no room")

        report = await as_json(shell)
        gpu = report["total"]["gpu"]
        assert gpu == {"capacity": 2, "used": 1, "reserved": 1, "free": 0, "utilisation": 1}
        (unmet,) = report["unmet"]
        assert (unmet["deployment"], unmet["agents"], unmet["verdict"]) == ("b", 1, "busy")
        code, out, _ = await shell()
        assert code == 0
        rows = [line.split() for line in out.splitlines()]
        assert ["n1", "gpu", "2", "1", "1", "0", "100%"] in rows
        assert ["total", "cpu", "12", "0", "1", "11", "9%"] in rows
        assert held["id"] in out
        assert "WAITING" in out
        code, out, _ = await shell("-o", "yaml")
        assert code == 0
        assert out.startswith("schema: foundation/v1/resources\n")

        code, _, err = await shell("reserve", "gpu=1")
        assert code == 1
        assert "n1: has too little gpu left" in err
        code, _, err = await shell("reserve", "gpu=3")
        assert code == 1
        assert "could ever take gpu=3" in err

        released = await as_json(shell, "release", held["id"])
        assert released["released"] is True
        assert (await as_json(shell, "release", held["id"]))["released"] is False
        code, _, err = await shell("confirm", held["id"])
        assert code == 1
        assert "not yours" in err or "expired" in err


async def test_what_is_typed_wrong_is_told(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage errors are 2, unknown nodes 4, no server 3."""
    async with connected(monkeypatch) as cluster:
        cluster.start_node("node-1")
        await cluster.wait_up(["node-1"])
        for arguments, says in (
            (("check", "cpu"), "KEY=VALUE"),
            (("check", "cpu=many"), "number"),
            (("check", "cpu=0"), "above 0"),
            (("check", "cpu=1,cpu=2"), "twice"),
            (("check",), "Missing argument"),
            (("reserve", "cpu=1", "--for", "soon"), "duration"),
            (("reserve", "cpu=1", "--for", "10ms"), "ttl"),
            (("reserve", "cpu=1", "--strategy", "best"), "load_balanced"),
            (("confirm", "nonsense"), "looks like"),
        ):
            code, _, err = await shell(*arguments)
            assert (code, says in err) == (2, True), (arguments, err)
        code, _, err = await shell("check", "cpu=1", "--node", "nod-1")
        assert code == 4
        assert "Did you mean 'node-1'?" in err
        code, _, _ = await shell("--server", "nats://127.0.0.1:1")
        assert code == 3
