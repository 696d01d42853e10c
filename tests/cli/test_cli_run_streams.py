"""`foundation run pipeline` and `map-reduce` against a real cluster: lines in, lines out, exit codes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from foundation_nats.testing import TestCluster
from tests.conftest import AGENTS


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node that can run stages and mappers."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as running:
        yield running


async def _run(nodes: TestCluster, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "foundation_cli.main", "run"]
    where = ["-s", nodes.server.url, "-c", nodes.client.name]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *where, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = await asyncio.to_thread(call)
    return done.returncode, done.stdout, done.stderr


async def test_lines_pass_stages(nodes: TestCluster) -> None:
    """A line per item with its number; 1 if one has failed; a second time there is nothing left."""
    for agent, config in {"a": {}, "b": {"refuse": ["2"]}}.items():
        await nodes.client.agents.start("stages:Stage", id=agent, config=config)
    stages = ["--stage", "first=a:step", "--stage", '{"name": "2nd", "agent": "b", "type": "step"}']
    lines = "".join(f"[{n}]\n" for n in range(4))
    code, out, err = await _run(nodes, "pipeline", "p", *stages, "-o", "json", stdin=lines)
    assert code == 1, err
    lines_out = [json.loads(line) for line in out.splitlines()]
    # The place in the user's code follows in parentheses.
    lines_out[2]["error"] = lines_out[2]["error"].partition(" (")[0]
    assert lines_out == [
        {"item": 0, "value": [0, "a", "b"]},
        {"item": 1, "value": [1, "a", "b"]},
        {"item": 2, "stage": "2nd", "error": "agent.handler: RuntimeError: no 2"},
        {"item": 3, "value": [3, "a", "b"]},
    ]
    code, out, err = await _run(nodes, "pipeline", "p", *stages, stdin=lines)
    assert (code, out, err) == (0, "", "4 items done, 1 failed\n")
    code, _, err = await _run(nodes, "pipeline", "q", "--stage", "first", "[1]")
    assert code == 2
    assert "write NAME=AGENT" in err
    code, _, err = await _run(nodes, "pipeline", "q", "--stage", "x=a:step", stdin="\n[1\n")
    assert code == 2, err
    assert "Line 2 of stdin: The payload is not JSON" in err


async def test_a_stage_without_agents_is_named_and_waited_for(nodes: TestCluster) -> None:
    """By what they are; the run goes on when one comes."""
    where = ["-s", nodes.server.url, "-c", nodes.client.name]
    stage = ["--stage", "s=capability:scans:step", "--retries", "2", "--retry-late"]
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "foundation_cli.main",
            "run",
            *where,
            "pipeline",
            "w",
            "[[1]]",
            *stage,
            "--backoff",
            "1s",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    said = await asyncio.to_thread(running.stderr.readline)
    assert said == "waiting at s: there is no agent of capability:scans\n"
    await nodes.client.agents.start("stages:Stage", id="a", capabilities=["scans"])
    out, err = await asyncio.to_thread(running.communicate, timeout=30)
    assert (running.returncode, out) == (0, '0: [1,"a"]\n'), err


async def test_lines_are_mapped_and_reduced(nodes: TestCluster) -> None:
    """One line with the result, and with --partial those on the way."""
    for agent in ("m0", "m1"):
        await nodes.client.agents.start("stages:Mapper", id=agent, capabilities=["adds"])
    lines = "".join(f"{n}\n" for n in range(50))
    given = ["map-reduce", "j", "--mapper", "adds", "--chunk", "10", "-o", "json", "--partial"]
    code, out, err = await _run(nodes, *given, stdin=lines)
    assert code == 0, err
    *partial, last = [json.loads(line) for line in out.splitlines()]
    assert last["job"] == "j"
    assert (last["result"]["sum"], last["result"]["count"]) == (sum(range(50)), 50)
    assert partial[-1]["partial"] == last["result"]
    code, out, _ = await _run(nodes, "map-reduce", "k", "--mapper", "none", "--wait", "1s", "[1]")
    assert (code, out) == (5, "")
    code, _, err = await _run(
        nodes, "map-reduce", "k", "--mapper", "adds", "--reduce", "mean", "[]"
    )
    assert code == 2
    assert "'mean' does not reduce" in err
