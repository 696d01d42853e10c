"""Plans that once showed a bug, cut down to the faults that it took; with `--chaos`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foundation_nats.chaos.plans import Plan, signature
from tests.chaos.test_slice import chaos

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]

PLANS = sorted((Path(__file__).parent / "plans").glob("*.json"))


MISSING = [path for path in PLANS if Plan.load(path).without]


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_that_found_a_bug_passes(path: Path) -> None:
    """What it is kept for is written in it; a round of so few faults may be void, but not violated."""
    ended = chaos("--plan-file", str(path), "-o", "json", codes=(0, 1))
    assert json.loads(ended.stdout)["verdicts"].keys() <= {"passed", "void"}


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("path", MISSING, ids=lambda path: path.stem)
def test_a_plan_still_shows_what_it_once_showed_without_the_safeguard(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same checker, within a few rounds."""
    plan = Plan.load(path)
    monkeypatch.setenv("FOUNDATION_TEST_BUG", plan.without)
    seen = []
    for _ in range(4):
        found = json.loads(
            chaos("--plan-file", str(path), "--settle", "5", "-o", "json", codes=(0, 1)).stdout
        )
        texts = [text for run in found["runs"] for text in run["violations"]]
        if signature(texts, "") == signature([plan.why], ""):
            return
        seen.append(texts[:2])
    pytest.fail(f"not shown again: {seen}")
