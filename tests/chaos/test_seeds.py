"""Seeds that once showed a bug, each as it was run then; with `--chaos`."""

from __future__ import annotations

import pytest

from tests.chaos.test_slice import report

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

SEEDS = {
    "a signal for many was copied twice after its acknowledgement was lost": ("--seed", "1003"),
    "a burial was not stored before the next signal; a deaf manager killed its workers; a child "
    "that had come and gone was had again by a parent that was recovered": (
        "--seed", "33", "--brokers", "3", "--rate", "0.5",
    ),
    "whoever is connected to a broker that is cut off is parted from the others": (
        "--seed", "1004", "--brokers", "3", "--rate", "0.5",
    ),
    "a worker that agents had ended came back ever later, so that convergence took too long": (
        "--seed", "3013",
    ),
    "what a node left behind, and what it no longer ran, counted against its capacity": (
        "--seed", "3018",
    ),
    "who was on its way to another node got nothing of what was sent to all": ("--seed", "5001"),
    "an old activation refused a question that its successor handled, so it was asked twice": (
        "--seed", "5003",
    ),
    "agents that emit compared all with all": (
        "--seed", "5", "--seconds", "15", "--rate", "20", "--workload", "counters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("found", SEEDS)
def test_a_seed_that_found_a_bug_passes(found: str, request: pytest.FixtureRequest) -> None:
    """The plan is the same; the timing is not, so passing once proves little, failing much."""
    if not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    report("--seconds", "20", "--edition", "1", *SEEDS[found])
