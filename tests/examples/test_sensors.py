"""The examples of sensors do what they say, in 45 lines each."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from foundation_nats.testing import TestCluster, eventually

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.cluster]


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node that can run the examples' agents."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as running:
        yield running


async def run(example: str, *arguments: str) -> list[str]:
    """What the example prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"examples.{example}",
        *arguments,
        cwd=REPOSITORY,
        env={"FOUNDATION_CLUSTER": "test", "PATH": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 40)
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines()


async def has(nodes: TestCluster, agent: str, wanted: dict[str, Any]) -> bool:
    """Whether this is its state."""
    record = await nodes.client.agents.state(agent)
    return record is not None and record["state"] == wanted


async def test_each_file_is_added_up_once(nodes: TestCluster, tmp_path: Path) -> None:
    """One that was there, and one that comes while the worker is down."""
    (tmp_path / "mon.csv").write_text("amount\n1\n2\n")
    await run("inbox", nodes.server.url, str(tmp_path))
    first = {"files": 1, "total": 3.0}
    await eventually(lambda: has(nodes, "inbox", first), message="the first is added up")
    for worker in nodes.nodes["n1"].workers():
        worker.kill()
    (tmp_path / "tue.csv").write_text("amount\n4\n")
    both = {"files": 2, "total": 7.0}
    await eventually(lambda: has(nodes, "inbox", both), timeout=20, message="both are")


async def test_an_order_is_sold_once(nodes: TestCluster) -> None:
    """The second request is a repeat of the first, and is accepted as that."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert await run("orders", nodes.server.url, str(port)) == ["202", "202"]
    sold = {"sold": {"plum": 2}}
    await eventually(lambda: has(nodes, "shop", sold), message="it is sold")


@pytest.mark.parametrize("example", ["inbox", "orders"])
def test_the_example_is_short(example: str) -> None:
    """Or nobody reads it."""
    assert len((REPOSITORY / "examples" / f"{example}.py").read_text().splitlines()) <= 45
