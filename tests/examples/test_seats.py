"""The example of a replicated domain says what its page says, in less than 40 lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from foundation_nats.testing import TestServer

REPOSITORY = Path(__file__).parents[2]


def _run(url: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "examples.seats", url],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


async def test_one_seat_is_sold_once(server: TestServer) -> None:
    """Two bids at once, and both again in a later process."""
    accepted, rejected = _run(server.url)
    assert accepted.strip() == "accepted at revision 1"
    assert rejected == "rejected at revision 1 1A is taken"
    assert [line.split()[0] for line in _run(server.url)] == ["rejected", "rejected"]


def test_the_example_is_short() -> None:
    """Or nobody reads it."""
    assert len((REPOSITORY / "examples" / "seats.py").read_text().splitlines()) < 40
