"""A short campaign on every run: the command, the lab, the nemesis and all checkers, as users run them.

Seeds that once found a bug are repeated here; `make chaos` goes through new ones.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from foundation_nats.chaos.workloads import WORKLOADS
from foundation_nats.testing import TestCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


def chaos(*arguments: str, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "foundation_cli.main", "chaos", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode in codes, (ended.returncode, ended.stdout[-3000:], ended.stderr[-3000:])
    return ended


def report(*arguments: str) -> dict[str, Any]:
    """One round that passes; its report."""
    found: dict[str, Any] = json.loads(chaos(*arguments, "-o", "json").stdout)
    assert found["passed"], found["runs"]
    assert found["lost"] == found["repeated"] == found["violations"] == 0
    assert found["faults"] > 0
    return found


def test_every_promise_is_kept_under_trouble() -> None:
    """All workloads, whatever faults the seed draws."""
    # A drain waits for 8 s, as long as this round: where its node dies, or its broker, and on a busy
    # machine, not one may end well, and the round is void. It has a round of its own below, whose
    # faults leave nodes and broker alone; `make chaos` has it beside all others, in longer rounds.
    works = [name for name in WORKLOADS if name != "maintenance"]
    chosen = [word for name in works for word in ("--workload", name)]
    found = report("--seconds", "8", "--seed", "11", "--rate", "0.7", *chosen)
    checkers = {name.partition("/")[0] for name, count in found["checked"].items() if count}
    assert checkers >= {*works} - {"churn"}, "a workload was not judged"


def test_nodes_are_emptied_and_filled_while_workers_die() -> None:
    """Moves of whatever runs there, by somebody who drains and rebalances without end."""
    found = report(
        "--seconds", "5", "--seed", "2", "--rate", "1",
        "--workload", "maintenance", "--workload", "counters", "--fault", "worker.kill",
    )  # fmt: skip
    assert found["checked"]["maintenance/assignments"] > 0
    assert found["faults_by_kind"].keys() == {"worker.kill"}


def test_a_flood_of_signals_survives_trouble() -> None:
    """Seed 5 found that emitting agents compared all with all; what it takes is a full mailbox."""
    found = report("--seconds", "6", "--seed", "5", "--rate", "15", "--workload", "counters")
    assert found["receipts"] > 2000


def test_three_brokers_keep_every_promise() -> None:
    """Replicated streams, brokers among the victims."""
    found = report(
        "--seconds", "6", "--seed", "31", "--brokers", "3", "--rate", "0.5",
        "--workload", "counters", "--workload", "register",
        "--fault", "broker.kill", "--fault", "node.kill", "--fault", "link.cut",
    )  # fmt: skip
    assert found["receipts"] > 300


async def test_a_running_cluster_is_broken_and_left_as_it_was() -> None:
    """--attach: workloads beside what runs there, faults that its nodes survive, nothing left."""
    async with TestCluster(nodes=2) as nodes:
        cluster = nodes.client
        await cluster.agents.start("foundation_nats.chaos.agents:Tally", id="resident")
        url = nodes.config.bus.servers[0]
        found = await asyncio.to_thread(
            report, "--attach", "--server", url, "--cluster", nodes.config.cluster, "--seconds", "4", "--seed", "3",
            "--workload", "counters", "--fault", "worker.kill", "--rate", "3",
        )  # fmt: skip
        assert found["faults_by_kind"].keys() == {"worker.kill"}
        assert [info.id for info in await cluster.agents.list()] == ["resident"]


def test_the_plan_is_shown_and_nothing_is_done() -> None:
    """The same seed gives the same plan."""
    arguments = ("--plan", "--seed", "7", "--seconds", "30", "-o", "json")
    first, second = chaos(*arguments).stdout, chaos(*arguments).stdout
    assert first == second
    assert json.loads(first)[0].keys() >= {"at_s", "kind", "duration_s"}


def test_faults_and_workloads_are_listed() -> None:
    """With what they do."""
    rows = json.loads(chaos("--list", "-o", "json").stdout)
    assert {f"workload {name}" for name in WORKLOADS} <= {row["kind"] for row in rows}
    assert all(row["what"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--fault", "node.kil"), "node.kil"),
        (("--workload", "banks"), "There is no workload banks"),
        (("--attach", "--minimise", "3"), "a lab of its own"),
        (("--attach", "--workload", "steps"), "would leave traces"),
        (("--rejudge", "/nowhere"), "holds no kept round"),
        (("--plan-file", "/nowhere.json"), "can't be read"),
        (("--fault", "broker.roll"), "so few brokers"),
        (("--attach", "--fault", "clock.jump"), "clock.jump: not possible"),
        (("--seed", "1", "--edition", "9"), "no edition 9"),
    ],
)
def test_what_does_not_exist_is_a_clear_error(arguments: tuple[str, ...], says: str) -> None:
    """And lists what does."""
    ended = chaos("--plan", *arguments, codes=(2,))
    assert says in ended.stderr


def test_a_round_too_quiet_to_mean_anything_is_not_passed() -> None:
    """Few operations: void, and exit code 1."""
    ended = chaos(
        "--seconds", "1", "--seed", "1", "--rate", "0.02", "--workload", "counters",
        "--fault", "worker.kill", "-o", "json", codes=(1,),
    )  # fmt: skip
    assert json.loads(ended.stdout)["verdicts"] == {"void": 1}
