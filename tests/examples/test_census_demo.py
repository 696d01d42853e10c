"""The demo runs, loses a node half-way, and proves its result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).parents[2]


def test_the_census_is_equal_to_the_digit_although_a_node_was_killed() -> None:
    """`make demo` on this repository's own sources."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "examples.census.demo",
            "--path",
            str(REPOSITORY / "foundation_nats"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the digit" in done.stdout
    assert "killed with SIGKILL" in done.stdout
    assert "0 lost" in done.stdout
    assert "0 counted twice" in done.stdout
