"""Remove a safeguard, and a named checker notices: the tester is tested.

Each runs `foundation chaos` in processes of its own, in which
``FOUNDATION_TEST_BUG`` removes one safeguard, under the faults that the
safeguard is there for. The control is the same round with the safeguard in its
place: it must pass, or the checker would prove nothing by what it notices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from foundation_nats.base import failpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

SEEDS = (1, 2, 3, 4)
"""Within so many a bug must be caught."""


@dataclass(frozen=True)
class Planted:
    """A bug, the trouble that brings it out, and who finds it."""

    workload: str
    faults: tuple[str, ...]
    caught_by: str | tuple[str, ...]
    seconds: float = 10.0
    rate: float = 1.0
    failpoints: str = ""
    seeds: tuple[int, ...] = SEEDS
    settle: float = 15.0


BUGS = {
    "drop_outbox": Planted(
        "appends",
        ("worker.kill",),
        "appends/effects: lost: mirror-ledger",
        failpoints="commit.after_cas_before_outbox=1in300(kill)",
    ),
    "ack_before_store": Planted(
        "appends", ("broker.kill",), "appends/effects: lost", seconds=4, settle=2
    ),
    "double_expand": Planted(
        "fanout",
        ("broker.kill", "link.cut"),
        "fanout/effects: repeated",
        failpoints="expand.before_ack=1in200(kill)",
        rate=4,
    ),
    "trim_past_cursor": Planted(
        "appends", ("worker.kill", "worker.freeze"), "appends/effects: lost", seconds=16
    ),
    "skip_epoch_check": Planted(
        "appends", ("node.freeze", "link.cut"), ("records: ", "appends/effects: lost"), seconds=16
    ),
    "answer_after_deadline": Planted(
        "register", ("link.cut",), "register/linearizability", seconds=20, rate=4
    ),
    "reserve_without_cas": Planted(
        "reservations", ("leader.freeze",), "reservations/reservations: ", rate=2
    ),
}


QUICK = "ack_before_store"
"""The one that every run of the tests looks for; the others need --chaos."""


@pytest.fixture(params=sorted(BUGS))
def bug(request: pytest.FixtureRequest) -> str:
    """Each in turn."""
    if request.param != QUICK:
        request.getfixturevalue("chaos")
    return str(request.param)


def chaos(planted: Planted, seed: int, bug: str, *, settle: float) -> dict:
    """One round in processes of its own; *bug* empty: none."""
    environment = {**os.environ, "FOUNDATION_TEST_BUG": bug}
    if planted.failpoints:
        environment["FOUNDATION_FAILPOINTS"] = planted.failpoints
    command = [sys.executable, "-m", "foundation_cli.main", "chaos", "-o", "json"]
    command += ["--seed", str(seed), "--seconds", str(planted.seconds), "--rate", str(planted.rate)]
    command += ["--workload", planted.workload, "--settle", str(settle)]
    for fault in planted.faults:
        command += ["--fault", fault]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode in (0, 1), ended.stderr
    return json.loads(ended.stdout)


def test_every_safeguard_that_can_be_removed_is() -> None:
    """A bug that can be planted and isn't would be a checker that nobody has tested."""
    assert BUGS.keys() == failpoint.BUGS


def test_a_removed_safeguard_is_noticed(bug: str) -> None:
    """By the checker that is there for it."""
    planted = BUGS[bug]
    seen = []
    for seed in planted.seeds:
        found = chaos(planted, seed, bug, settle=planted.settle)
        texts = [text for run in found["runs"] for text in run["violations"]]
        seen.append((found["verdicts"], texts[:2]))
        if any(text.startswith(planted.caught_by) for text in texts):
            print(f"{bug} was caught with seed {seed}: {texts[0]}")
            return
    pytest.fail(f"{bug} was not caught by {planted.caught_by!r}: {seen}")


def test_the_same_round_passes_with_the_safeguard(bug: str) -> None:
    """The faults alone break nothing, and the round is busy enough to say so."""
    planted = BUGS[bug]
    for seed in planted.seeds[:1]:
        found = chaos(planted, seed, "", settle=90)
        assert found["verdicts"] == {"passed": 1}, found["runs"]
