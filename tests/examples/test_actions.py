"""The examples of actions and of the loop with a model say what their pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from foundation_nats.testing import TestCluster

REPOSITORY = Path(__file__).parents[2]


def _run(example: str, nodes: TestCluster) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", nodes.server.url],
        cwd=REPOSITORY,
        env={**os.environ, "FOUNDATION_CLUSTER": nodes.client.name},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def test_the_examples_of_actions() -> None:
    """On one node."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as nodes:
        assert _run("refunds", nodes) == [
            "receipt of o-1",
            "refunded 5",
            "Plan cancel failed at restock: Action restock failed: ValueError: it is broken "
            "(examples/refunds.py:27 in restock); undone: refund.",
            "refunded 5",
            "refunded 5",
            "charged 5 again",
        ]
        assert _run("assistant", nodes) == [
            'Vienna has "rain", Rome has "sun".',
            "user assistant tool tool assistant",
        ]
