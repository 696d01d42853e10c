"""A gateway of the command line, served over HTTP at a port that is free."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from foundation_nats.testing import TestCluster


def command(nodes: TestCluster, *words: str) -> list[str]:
    """The arguments of Python that run `foundation` with *words* against this cluster."""
    return ["-m", "foundation_cli.main", *words, "-s", nodes.server.url, "-c", "test"]


@asynccontextmanager
async def served(
    nodes: TestCluster, *words: str
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Its URL and its process; SIGTERM ends it with 0, unless the test has ended it before."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command(nodes, *words, "--http", "0"), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        line = (await asyncio.wait_for(process.stderr.readline(), 20)).decode()
        found = re.search(r"http://[^\s;]+", line)
        assert found, line
        yield found[0], process
    finally:
        if process.returncode is None:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 10) == 0
