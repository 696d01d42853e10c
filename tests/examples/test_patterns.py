"""The examples of the coordination patterns say what their pages say, in less than 40 lines each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundation_nats.testing import TestCluster, TestServer

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = [
    "rendezvous", "ballot", "contract", "trip", "jobs", "labels", "wordcount", "ledger",
    "nightly", "gpu", "hits",
]  # fmt: skip


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """A node that can run the examples' agents."""
    async with TestCluster(nodes=1, path=[str(REPOSITORY)]) as running:
        yield running


def _run(example: str, url: str, cluster: str = "default") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}", url],
        cwd=REPOSITORY,
        env={**os.environ, "FOUNDATION_CLUSTER": cluster},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_is_short(example: str) -> None:
    """Or nobody reads it."""
    assert len((REPOSITORY / "examples" / f"{example}.py").read_text().splitlines()) < 40


async def test_nobody_is_through_a_phase_before_all_are_there(server: TestServer) -> None:
    """Three phases together, and a fourth that breaks for the two that are left."""
    lines = _run("rendezvous", server.url)
    phases = [int(line.split()[-1]) for line in lines if "through" in line]
    assert phases == sorted([1, 2, 3] * 3)
    assert sorted(lines[-2:]) == [f"{n} goes home: ['cy'] did not come" for n in ("ann", "bob")]


async def test_the_ballot_is_decided_by_two_of_three(server: TestServer) -> None:
    """And a second run gets the recorded result."""
    lines = _run("ballot", server.url)
    assert "the result: pizza, the quorum is reached" in lines
    assert _run("ballot", server.url)[-1] == "the result: pizza, the quorum is reached"


async def test_the_contract_goes_to_the_cheapest_that_is_not_busy(nodes: TestCluster) -> None:
    """One truck declines; the award reaches the next one once."""
    lines = _run("contract", nodes.server.url, nodes.client.name)
    assert lines == ["truck-2 gets it for 20", "truck-1: declined"]


async def test_the_trip_is_given_back_in_reverse(nodes: TestCluster) -> None:
    """And a second run tells the recorded outcome."""
    first = _run("trip", nodes.server.url, nodes.client.name)
    assert first[0].startswith("undone because of hotel: agent.handler: ValueError: no room left")
    assert first[1] == "flight: undone car: undone hotel: failed"


async def test_jobs_of_a_customer_stay_in_order(server: TestServer) -> None:
    """A bad one is dead after three attempts and lets the next one go."""
    letter, done = _run("jobs", server.url)
    assert letter == "dead: bob-2 after 3 attempts: ValueError: bob's second job is bad"
    assert done == "{'ann': [1, 2, 3], 'bob': [1, 3]}"


async def test_photos_pass_the_stages_in_order(nodes: TestCluster) -> None:
    """The broken one says where and why; a second run has nothing left to do."""
    lines = _run("labels", nodes.server.url, nodes.client.name)
    assert lines == [
        "0 sea.jpg fetch shrink label",
        "1 failed at shrink: agent.handler: ValueError: not a photo (examples/labels.py:17 in Stage.work)",
        "2 sky.jpg fetch shrink label",
        "3 done, 1 failed",
    ]
    assert _run("labels", nodes.server.url, nodes.client.name) == ["3 done, 1 failed"]


async def test_words_are_counted_once(nodes: TestCluster) -> None:
    """And a second run tells the recorded result."""
    expected = ["a: 1000 fish: 1000 red: 1000 sea: 2000 sky: 2000 the: 4000"]
    for _ in range(2):
        assert _run("wordcount", nodes.server.url, nodes.client.name) == expected


async def test_another_leads_and_the_sum_goes_on(server: TestServer) -> None:
    """Followers have what the leader has appended, and one of them goes on behind it."""
    assert _run("ledger", server.url) == [
        "bob reads 12; ann leads",
        "cy reads 12; ann leads",
        "entry 3 in a later term: True",
        "the sum is 42",
    ]


async def test_one_host_after_the_other_leads_and_has_the_lock(server: TestServer) -> None:
    """A lock that somebody else holds is left alone, and says whose it is."""
    archive = "leaves the archive alone: The lock archive was held by an operator"
    assert _run("nightly", server.url) == [
        "host-1 leads and writes the report",
        f"host-1 {archive}",
        "host-2 leads and writes the report",
        f"host-2 {archive}",
        "fencing tokens grow: True",
    ]


async def test_two_jobs_run_at_a_time(server: TestServer) -> None:
    """Of five."""
    assert _run("gpu", server.url) == [
        "5 jobs, at most 2 at a time",
        "each had a fencing token of its own: True",
    ]


async def test_hits_of_three_servers_add_up(server: TestServer) -> None:
    """A second run repeats the same increments: they count once."""
    for _ in range(2):
        assert _run("hits", server.url) == ["60 hits", "  web-1 10", "  web-2 20", "  web-3 30"]
