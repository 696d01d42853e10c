"""The examples of topics and of asking many do what they say, in 40 lines each."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from foundation_nats.testing import TestCluster, eventually

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.cluster]


async def run(example: str, url: str) -> list[str]:
    """What the example prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"examples.{example}",
        url,
        cwd=REPOSITORY,
        env={"FOUNDATION_CLUSTER": "test", "PATH": ""},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 40)
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines()


async def test_topics() -> None:
    """All ledgers hear everything, the bakers share it."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as nodes:
        await run("topics", nodes.server.url)

        async def heard() -> bool:
            cakes = {}
            for name in ("ann", "bob", "book", "copy"):
                stored = await nodes.client.agents.state(name)
                assert stored is not None
                cakes[name] = stored["state"].get("cakes", [])
            everything = ["apple", "lemon", "plum"]
            assert sorted(cakes["book"]) == sorted(cakes["copy"]) == everything
            assert sorted(cakes["ann"] + cakes["bob"]) == everything
            return True

        await eventually(heard, timeout=15)


async def test_quorum() -> None:
    """Two answer, the third is left out."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as nodes:
        assert await run("quorum", nodes.server.url) == ["ann 3.5", "bob 2.5", "without slow"]


async def test_search() -> None:
    """Five hits are enough for the first reader, and only the second's effects are kept."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as nodes:
        out = await run("search", nodes.server.url)
        assert out == [
            *(f"maps on shelf {shelf}" for shelf in (0, 7, 14, 21, 28)),
            "8 in all",
            "finished 1",
        ]


@pytest.mark.parametrize("name", ["topics", "quorum", "search"])
def test_the_examples_are_short(name: str) -> None:
    """Or nobody reads them."""
    assert len((REPOSITORY / "examples" / f"{name}.py").read_text().splitlines()) <= 40
