"""What makes a round void, who does not run once, what a kept round says again, and how a plan is cut down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from foundation_nats.api.refs import AgentInfo
from foundation_nats.base.failpoint import KILLED
from foundation_nats.chaos.campaign import rejudge, who_is_not_once
from foundation_nats.chaos.checkers import (
    ExitSeen,
    Judgement,
    check_exits,
    count_exits,
    explain,
)
from foundation_nats.chaos.checkers.leadership import DownSeen, LeaseSeen
from foundation_nats.chaos.checkers.records import AssignmentSeen, RecordSeen
from foundation_nats.chaos.checkers.reservations import LedgerSeen
from foundation_nats.chaos.faults import Fault
from foundation_nats.chaos.history import History, Operation
from foundation_nats.chaos.judging import SLACK_S, Kept, judge, plain, why_void
from foundation_nats.chaos.nemesis import Done
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.plans import Plan, ddmin, signature
from foundation_nats.errors import ConfigError
from foundation_schemas import AgentSpec, AgentStatus, Deployment

PLANS = Path(__file__).parents[1] / "chaos" / "plans"
_S = 1_000_000_000


# ---- void -------------------------------------------------------------------------


def busy(count: int = 40, process: str = "fanout.0.0", f: str = "send") -> History:
    """So many operations that ended well, one each 100 ms."""
    return History(
        Operation(
            process,
            f,
            "deployment:listener",
            f"{process}.{n}",
            n * _S // 10,
            n * _S // 10 + 5,
            "ok",
        )
        for n in range(count)
    )


def kept(**changes: Any) -> Kept:
    """A round of one workload, with one fault in its middle."""
    fault = Done(Fault(1.0, "worker.kill", 0, 0.0, 0.5), "n1", 1 * _S, 1 * _S)
    return replace(Kept(1, ["fanout"], operations_min=20, faults=[fault]), **changes)


SHOWN = [Judgement("effects", 1, looked_at=40)]


def void(round: Kept, history: History, judgements: Sequence[Judgement] = SHOWN) -> str:
    """Why it is void."""
    return why_void(round, round.works(), history, judgements)


def test_a_busy_round_is_not_void() -> None:
    """Enough was done, under a fault, and judged."""
    assert void(kept(), busy()) == ""


@pytest.mark.parametrize(
    ("round", "history", "judgements", "says"),
    [
        (kept(), busy(19), SHOWN, "only 19 operations ended well"),
        (kept(faults=[]), busy(), SHOWN, "no fault did anything"),
        (
            kept(faults=[Done(Fault(1, "worker.kill", 0, 0, 0), skipped="nobody there")]),
            busy(),
            SHOWN,
            "no fault did anything",
        ),
        (
            kept(faults=[Done(Fault(1, "worker.kill", 0, 0, 0), "n1", 90 * _S, 91 * _S)]),
            busy(),
            SHOWN,
            "no operation overlapped a fault",
        ),
        (
            kept(workloads=["fanout", "lock"]),
            busy(),
            SHOWN,
            "only 0 operations of lock ended well",
        ),
        # What another did in its name, or what is not its own work, is no work of it.
        (kept(), busy(f="read"), SHOWN, "only 0 operations of fanout ended well"),
        (kept(), busy(process="bank.0"), SHOWN, "only 0 operations of fanout ended well"),
        (kept(), busy(), [*SHOWN, Judgement("records", 3)], "records was shown nothing"),
    ],
)
def test_what_proves_nothing_is_void(
    round: Kept, history: History, judgements: Sequence[Judgement], says: str
) -> None:
    """And says which part of it."""
    assert void(round, history, judgements) == says


def test_operations_that_failed_do_not_count() -> None:
    """Only what ended well shows that the system worked."""
    failed = History(replace(item, outcome="unknown") for item in busy().operations)
    assert "only 0 operations ended well" in void(kept(), failed)


def test_a_judge_that_may_be_idle_makes_nothing_void() -> None:
    """That nobody was declared down is what a good round is like."""
    idle = [item for item in judge(*empty()) if item.checker == "false downs"]
    assert idle[0].looked_at == 0
    assert void(kept(), busy(), [*SHOWN, *idle]) == ""


def empty() -> tuple[Kept, list[Any], History, Seen]:
    """A round in which nothing was seen."""
    return kept(workloads=[]), [], History(), Seen()


def test_every_other_judge_that_saw_nothing_is_named() -> None:
    """Records, assignments, leases, capacity; records only where they were watched."""
    nothing = judge(*empty())
    assert {item.checker for item in nothing} == {
        "records", "assignments", "leadership", "capacity", "false downs", "exits",
    }  # fmt: skip
    why = void(kept(), busy(), nothing)
    assert why.count("was shown nothing") == 4
    unwatched = judge(kept(workloads=[]), [], History(), Seen(watch_state=False))
    assert "records" not in {item.checker for item in unwatched}


# ---- nodes that end by themselves ---------------------------------------------------

SAID = """2026-01-01T00:00:00 info node is up
{}
"""


@pytest.mark.parametrize(
    ("code", "said", "sort", "why"),
    [
        (-9, KILLED.format(name="lease.renew", pid=7), "crash point", "lease.renew"),
        # What a worker of it did to itself, or one that had the name before, is no reason.
        (-9, KILLED.format(name="commit.before_cas", pid=77), "killed", "SIGKILL"),
        (-9, "", "killed", "SIGKILL"),
        (-11, KILLED.format(name="lease.renew", pid=7), "failed", "SIGSEGV"),
        (0, "node has stopped", "left", "good order"),
        (1, "error node ends reason='its workers died 6 times'", "gave up", "6 times"),
        (3, "\x1b[31merror:\x1b[0m No server answers.", "gave up", "No server answers."),
        (1, "error node ends reason=\"a service failed: KeyError('a')\"", "failed", "KeyError"),
        (1, "node ends reason='a service failed: FailpointError()'", "crash point", "Failpoint"),
        (1, "error: This should not have happened: TypeError: x.", "failed", "TypeError"),
        (1, "", "failed", "did not say"),
    ],
)
def test_the_reason_of_an_end_is_found(code: int, said: str, sort: str, why: str) -> None:
    """By the exit code, and by what the node said before."""
    found, reason = explain(code, 7, SAID.format(said))
    assert found == sort
    assert why in reason


def ended(code: int, said: str = "", node: str = "n1", begin_s: float = 5.0) -> ExitSeen:
    """One end, after which the node was started again."""
    return ExitSeen(node, code, *explain(code, 7, said), begin_s, begin_s + 0.5)


def test_an_end_that_nothing_explains_is_no_passed_round() -> None:
    """A crash is a violation, a kill by somebody unknown undecided; a crash point is what was wanted."""
    crash_point = ended(-9, KILLED.format(name="expand.mid", pid=7))
    gave_up = ended(1, "node ends reason='too many deaths'")
    assert check_exits([]).may_be_idle
    fine = check_exits([crash_point, gave_up])
    assert fine.is_clean
    assert fine.looked_at == 2
    assert check_exits([crash_point, ended(-11)]).violations == [
        "n1 ended by itself (failed, exit code -11): it was ended by SIGSEGV"
    ]
    assert "n1 ended by itself (killed" in check_exits([ended(-9)]).undecided[0]
    assert check_exits([ended(0)]).undecided
    assert count_exits([crash_point, crash_point, gave_up]) == {
        "crash point expand.mid": 2, "gave up": 1,
    }  # fmt: skip


def test_a_node_that_ended_by_itself_was_not_declared_down_in_error() -> None:
    """It alone, and only for as long as it may take to notice."""
    down = DownSeen("n1", 7.0, "silent")

    def false_downs(exits: list[ExitSeen]) -> int:
        round = kept(workloads=[], faults=[], exits=exits)
        found = judge(round, [], History(), Seen(downs=[down]))
        return sum(j.violations_count for j in found if j.checker == "false downs")

    assert false_downs([]) == 1
    assert false_downs([ended(-9)]) == 0
    assert false_downs([ended(-9, node="n2")]) == 1
    assert false_downs([ended(-9, begin_s=8.0)]) == 1
    assert false_downs([ended(-9, begin_s=7.0 - SLACK_S - 1)]) == 1


# ---- once -------------------------------------------------------------------------


def agent(id: str, status: AgentStatus = AgentStatus.RUNNING, **fields: Any) -> AgentInfo:
    """One of the registry."""
    known: dict[str, Any] = {
        "node": "n1", "epoch": 3, "deployment": "a", "capabilities": [], "critical": False,
        "durable": True, "run": "m:A",
    }  # fmt: skip
    return AgentInfo(id=id, status=status, **{**known, **fields})


WISHES = [Deployment(name="a", spec=AgentSpec(run="m:A"), replicas=2)]
BOTH = {("a-0", 3): 1, ("a-1", 3): 1}


@pytest.mark.parametrize(
    ("infos", "hosted"),
    [
        ([agent("a-0"), agent("a-1")], BOTH),
        ([agent("a-0"), agent("a-1", AgentStatus.HIBERNATED)], BOTH),
        ([agent("a-0"), agent("a-1", AgentStatus.PENDING, reason="no room")], {("a-0", 3): 1}),
        ([agent("a-0"), agent("a-1", AgentStatus.FAILED, reason="it raised")], {("a-0", 3): 1}),
    ],
    ids=["awake", "asleep", "pending", "failed"],
)
def test_who_runs_once_or_says_why_not_is_settled(
    infos: list[AgentInfo], hosted: dict[tuple[str, int], int]
) -> None:
    """Who sleeps is in its worker's memory, too."""
    assert who_is_not_once(infos, WISHES, Counter(hosted)) is None


@pytest.mark.parametrize(
    ("infos", "hosted", "says"),
    [
        ([agent("a-0")], {("a-0", 3): 1}, "a-1"),
        ([agent("a-0"), agent("a-1"), agent("b")], BOTH, "'b'"),
        ([agent("a-0"), agent("a-1")], {("a-0", 3): 1}, "('a-1', 3)"),
        ([agent("a-0"), agent("a-1")], {**BOTH, ("a-1", 3): 2}, "('a-1', 3)"),
        ([agent("a-0"), agent("a-1")], {**BOTH, ("a-1", 2): 1}, "('a-1', 2)"),
        ([agent("a-0"), agent("a-1", AgentStatus.HIBERNATED)], {("a-0", 3): 1}, "('a-1', 3)"),
        ([agent("a-0"), agent("a-1", AgentStatus.STARTING)], BOTH, "a-1 is starting"),
        ([agent("a-0"), agent("a-1", AgentStatus.PENDING)], BOTH, "a-1 is pending"),
        ([agent("a-0"), agent("a-1", AgentStatus.PENDING, reason="full")], BOTH, "('a-1', 3)"),
    ],
    ids=[
        "lacking", "not wanted", "nowhere", "twice", "an old one too", "asleep nowhere", "starting",
        "pending for no reason", "pending and there",
    ],
)  # fmt: skip
def test_who_does_not_run_once_is_named(
    infos: list[AgentInfo], hosted: dict[tuple[str, int], int], says: str
) -> None:
    """Planted, one by one."""
    assert says in (who_is_not_once(infos, WISHES, Counter(hosted)) or "")


# ---- kept rounds ------------------------------------------------------------------


def lists(*, applied: Sequence[str]) -> dict[str, Any]:
    """What `fanout` collects when every listener has applied the same."""
    return {"states": {f"listener-{n}": {"applied": list(applied)} for n in range(6)}, "dead": {}}


def seen() -> Seen:
    """A little of everything."""
    found = Seen(
        assignments=[AssignmentSeen("a", 1, 1, "n1", 7, "running", (("gpu", 1.0),), 5)],
        records=[RecordSeen("a", 1, 1, 1, 0, "w/7")],
        leases=[LeaseSeen(1, "n1", 7, 1)],
        ledgers=[
            LedgerSeen("n1", 1, (("gpu", 6.0),), (("gpu", 1.0),), (("r", (("gpu", 1.0),)),), 3)
        ],
        capacity={"n1": {"gpu": 6.0}},
    )
    return found


def test_what_was_seen_is_saved_and_read_again(tmp_path: Path) -> None:
    """All of it, in its types."""
    seen().save(tmp_path / "seen.jsonl")
    assert asdict(Seen.load(tmp_path / "seen.jsonl")) == asdict(seen())
    Seen(watch_state=False).save(tmp_path / "none.jsonl")
    assert Seen.load(tmp_path / "none.jsonl") == Seen(watch_state=False)


def test_a_kept_round_is_judged_again(tmp_path: Path) -> None:
    """It passes again; with a key taken out of a list it is violated, by the checker that knows."""
    history = busy()
    keys = [item.value for item in history.operations]
    exits = [ended(1, "node ends reason='too many deaths'")]
    good = kept(collected=plain({"fanout": lists(applied=keys)}), exits=exits)
    good.save(tmp_path, history, seen())
    again = rejudge(tmp_path)
    assert (again.verdict, again.violations, again.void) == ("passed", [], "")
    assert again.receipts == 40
    assert again.exits == exits
    bad = kept(collected=plain({"fanout": lists(applied=keys[1:])}))
    bad.save(tmp_path, history, seen())
    assert rejudge(tmp_path).violations[0].startswith("fanout/effects: lost: listener-0")


def test_what_is_no_kept_round_is_a_clear_error(tmp_path: Path) -> None:
    """No file, a torn file, a workload of another version."""
    with pytest.raises(ConfigError, match="no kept round"):
        rejudge(tmp_path)
    kept(workloads=["banks"]).save(tmp_path, busy(), seen())
    with pytest.raises(ConfigError, match="no workload banks"):
        rejudge(tmp_path)
    (tmp_path / "round.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        rejudge(tmp_path)


# ---- plans ------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [{3}, {0, 7}, {2, 3, 9}, set(range(12)), set()])
async def test_a_list_is_cut_down_to_what_is_needed(needed: set[int]) -> None:
    """Whatever is needed, and nothing else, in order."""
    runs = []

    async def fails(items: Sequence[int]) -> bool:
        runs.append(items)
        return needed <= set(items)

    assert await ddmin(range(12), fails) == sorted(needed)
    assert len(runs) < 150


async def test_cutting_down_ends_when_the_runs_are_used_up() -> None:
    """With the smallest found so far."""
    runs = 0

    async def fails(items: Sequence[int]) -> bool:
        nonlocal runs
        runs += 1
        return 40 in items

    left = await ddmin(range(64), fails, runs_max=3)
    assert runs == 3
    assert 40 in left
    assert len(left) < 64


def test_failures_are_alike_if_the_same_checker_found_them() -> None:
    """Its first words."""
    assert signature(["appends/effects: lost: a never applied 1"], "late") == "appends/effects"
    assert signature([], "not settled") == "failure"
    assert signature([], "") == ""


def test_a_plan_survives_being_stored(tmp_path: Path) -> None:
    """With what it was made of."""
    plan = Plan((Fault(0.5, "node.kill", 3, 1.0, 0.2),), 7, 5.0, workloads=("bank",), why="lost")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is wrong at"),
        ('{"faults": [], "secconds": 3}', "secconds"),
        ('{"faults": [{"at_s": 1}]}', "faults.0"),
        (
            '{"faults": [{"at_s": 1, "kind": "node.kil", "victim": 0, "duration_s": 0, "strength": 0}]}',
            "no node.kil",
        ),
        (
            '{"faults": [{"at_s": 1, "kind": "broker.roll", "victim": 0, "duration_s": 0, "strength": 0}]}',
            "needs 3 brokers",
        ),
        ('{"faults": [], "workloads": ["banks"]}', "banks"),
    ],
)
def test_a_plan_with_a_slip_is_refused(text: str, says: str, tmp_path: Path) -> None:
    """With the place and what is wrong."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        Plan.load(path)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.json")), ids=lambda path: path.stem)
def test_the_plans_that_are_kept_can_be_read(path: Path) -> None:
    """And say what they are kept for."""
    plan = Plan.load(path)
    assert plan.faults
    assert plan.why
