"""Plans of faults are decided by their seed; what is mangled on a link is whole messages."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from foundation_nats.base import failpoint
from foundation_nats.chaos import failover, faults, report
from foundation_nats.chaos.attached import SAFE_KINDS, Attached, chosen_kinds
from foundation_nats.chaos.nemesis import Nemesis
from foundation_nats.chaos.report import BEGIN, END, markdown, replaced, summary
from foundation_nats.config import Config
from foundation_nats.errors import ConfigError
from foundation_nats.testing.mangling import Mangler, Mangling, Splitter


def test_a_seed_is_a_plan() -> None:
    """The same twice, another for another seed, and within its time."""
    assert faults.plan(7, 60) == faults.plan(7, 60)
    assert faults.plan(7, 60) != faults.plan(8, 60)
    found = faults.plan(7, 60)
    assert found
    for fault in found:
        kind = faults.KINDS[fault.kind]
        assert 0 < fault.at_s < 60
        assert kind.shortest_s <= fault.duration_s <= kind.longest_s
        assert kind.brokers == 1


OF_3018 = [("node.stop", 0.512), ("node.freeze", 3.785), ("worker.kill", 12.176)]
"""How the plan of that seed began when it found something."""


def test_seeds_leave_kinds_out_and_together_reach_all() -> None:
    """Swarm testing: each story has its own sorts of trouble."""
    seen = [frozenset(fault.kind for fault in faults.plan(s, 300, brokers=3)) for s in range(60)]
    assert frozenset().union(*seen) == faults.KINDS.keys()
    assert max(len(kinds) for kinds in seen) < len(faults.KINDS)


def test_an_old_seed_does_what_it_did_then() -> None:
    """New kinds change what a seed draws, unless it is repeated in its edition."""
    old = faults.plan(3018, 20, edition=1)
    assert all(faults.KINDS[fault.kind].edition == 1 for fault in old)
    assert old != faults.plan(3018, 20)
    assert [(fault.kind, fault.at_s) for fault in old[:3]] == OF_3018
    with pytest.raises(ValueError, match="no edition 0"):
        faults.plan(1, 60, edition=0)


def test_a_campaign_chooses_seeds_with_what_has_not_happened_yet() -> None:
    """Twelve short rounds reach every kind; drawn blindly they leave a fourth of them out."""

    def reached(choose: Callable[[random.Random, list[str]], int]) -> int:
        chance, happened = random.Random(1), list[str]()
        for _ in range(12):
            seed = choose(chance, happened)
            happened += [fault.kind for fault in faults.plan(seed, 20, brokers=3)]
        return len(set(happened))

    def plan_of(seed: int) -> list[faults.Fault]:
        return faults.plan(seed, 20, brokers=3)

    blind = reached(lambda chance, _: chance.randrange(1 << 32))
    chosen = reached(
        lambda chance, happened: faults.next_seed(
            lambda: chance.randrange(1 << 32), happened, plan_of
        )
    )
    assert chosen == len(faults.KINDS)
    assert blind < chosen


def test_a_running_cluster_is_not_said_to_suffer_what_it_can_not() -> None:
    """A clock that is not ours doesn't jump; that is refused, not counted."""
    assert chosen_kinds(None, start=None) == SAFE_KINDS
    assert "node.kill" in chosen_kinds(None, start="systemctl start {node}")
    assert chosen_kinds(["agent.hang", "node.stop"], start=None) == ("agent.hang", "node.stop")
    for kind in (
        "clock.jump",
        "clock.split",
        "broker.kill",
        "broker.roll",
        "link.cut",
        "disk.full",
    ):
        with pytest.raises(ConfigError, match=kind):
            chosen_kinds(["worker.kill", kind], start=None)
    attached = Attached(Config.load())
    for wrong in (attached.set_clock, attached.split_clock):
        with pytest.raises(ConfigError, match="clock"):
            wrong("n1", 1.0)


def test_every_kind_has_its_verb() -> None:
    """A kind that nobody carries out would end a round with an error."""
    nemesis = Nemesis(Attached(Config.load()), [])
    assert nemesis.verbs() == faults.KINDS.keys()


def test_a_plan_of_chosen_kinds_has_no_others() -> None:
    """And unknown ones are named."""
    found = faults.plan(1, 60, kinds=["node.kill", "broker.cut"], brokers=1)
    assert {fault.kind for fault in found} == {"node.kill"}
    with pytest.raises(ValueError, match="unknown fault nodekill"):
        faults.plan(1, 60, kinds=["nodekill"])
    with pytest.raises(ValueError, match="few brokers"):
        faults.plan(1, 60, kinds=["broker.cut"], brokers=1)


FRAMES = [
    b"INFO {}\r\n",
    b"MSG fnd.C.agent.a.live 1 5\r\nhe\r\no\r\n",
    b"HMSG fnd.C.agent.b.live 2 12 17\r\nNATS/1.0\r\n\r\nworld\r\n",
    b"PING\r\n",
    b"MSG _INBOX.x 3 2\r\nok\r\n",
]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_frames_are_found_however_the_bytes_come(size: int) -> None:
    """Payloads may hold line ends of their own."""
    stream = b"".join(FRAMES)
    splitter = Splitter()
    found = []
    for start in range(0, len(stream), size):
        found += splitter.feed(stream[start : start + size])
    assert [frame for _, frame in found] == FRAMES
    subjects = [subject for subject, _ in found]
    assert subjects == ["", "fnd.C.agent.a.live", "fnd.C.agent.b.live", "", "_INBOX.x"]


def live(number: int) -> bytes:
    """One live copy."""
    return b"MSG a.live 1 2\r\n%02d\r\n" % number


def mangled(mangling: Mangling | None) -> list[bytes]:
    """Ten live copies and what came of them, in order."""
    mangler = Mangler(lambda: mangling, lambda s: s.endswith(".live"), random.Random(1))
    out = b"".join(mangler.feed(live(n)) for n in range(10))
    mangling = None
    out += mangler.feed(b"PING\r\n")
    return [out[i : i + 20] for i in range(0, len(out) - 6, 20)]


def test_what_is_chosen_is_dropped_doubled_or_swapped() -> None:
    """And nothing is torn."""
    every = [live(n) for n in range(10)]
    assert mangled(None) == every
    assert mangled(Mangling(drop=1.0)) == []
    assert mangled(Mangling(double=1.0)) == [item for item in every for _ in range(2)]
    swapped = mangled(Mangling(swap=0.5))
    assert sorted(swapped) == every
    assert swapped != every


def test_planted_bugs_are_off_unless_named() -> None:
    """And a typo is an error, at import."""
    assert not any(failpoint.planted(name) for name in failpoint.BUGS)
    assert failpoint.planted_bugs() == frozenset()


def test_a_report_is_told_in_text() -> None:
    """For a terminal, and between the marks of a page."""
    found = {
        "at": "2026-01-01", "version": "0", "commit": "abc", "cores": 2, "rounds": 2,
        "verdicts": {"passed": 1, "void": 1}, "receipts": 1000, "operations": {"ok": 5},
        "faults": 3, "faults_by_kind": {"node.kill": 3}, "kinds_missing": ["clock.jump", "node.stop"],
        "lost": 0, "repeated": 0,
        "exits": {"gave up": 1, "crash point lease.renew": 2},
        "exits_told": ["seed 2: n1 ended by itself (gave up, exit code 1): no worker lives"],
        "violations": 0, "false_downs": 0, "settled_s": {"p50": 1.0, "max": 2.0},
        "failover_s": {"node.kill": {"count": 3, "p50": 0.5, "p99": 0.9, "max": 0.9}},
        "checked": {"order": 10}, "seconds": 60.0, "seeds": [1, 2],
        "runs": [{"seed": 2, "verdict": "void", "failure": "", "void": "quiet",
                  "violations": [], "undecided": []}],
    }  # fmt: skip
    assert "1,000 receipted signals under 3 faults: 0 lost" in summary(found)
    assert "1 of 3 kinds of faults; not: clock.jump, node.stop" in summary(found)
    assert "seed 2: void quiet" in summary(found)
    assert "started again: 2 crash point lease.renew, 1 gave up" in summary(found)
    assert "n1 ended by itself (gave up" in summary(found)
    page = replaced(f"a\n{BEGIN}\nold\n{END}\nb", markdown(found, "make chaos"))
    assert page.startswith("a\n")
    assert page.endswith("\nb")
    assert "old" not in page
    assert "| SIGKILL of a manager and its workers | 0.50 s |" in page
    assert "| 2 crash point lease.renew, 1 gave up |" in page
    with pytest.raises(ValueError, match="has no"):
        replaced("no marks", "x")


def test_a_fault_whose_agents_do_not_come_back_is_counted() -> None:
    """It gives no time, and is not left out."""
    found = failover.summary(
        failover.Measured(
            taken=[
                failover.Taken("node.kill", 2, 0.5, {"a": 0.6, "b": 0.8}, {"a": 0.7, "b": 0.9}),
                failover.Taken("node.kill", 2, 0.7, {"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 2.5}),
                failover.Taken("node.kill", 3, None, {"a": 0.6, "b": 9.0}, {"a": 0.7}),
            ],
            gaps=[
                failover.Gap("broker.kill", 1, 2.0, 1.0, 0),
                failover.Gap("broker.kill", 3, 5.0, 0.1, 2),
            ],
        )
    )
    killed = found["nodes"]["node.kill"]
    assert (killed["faults"], killed["faults_not_back"]) == (3, 1)
    assert (killed["agents"], killed["agents_not_back"]) == (7, 2)
    assert killed["verdict_s"] == {"n": 2, "min": 0.5, "p50": 0.6, "max": 0.7}
    assert killed["answers_s"] == {"n": 2, "min": 0.9, "p50": 1.7, "max": 2.5}
    assert found["brokers"]["broker.kill/3"]["moved"] == 2
    where = {"at": "2026-01-01", "version": "0", "commit": "abc", "cores": 2}
    text = report.failover({**where, **found}, "make chaos")
    assert "| 3 | 0.60 / 0.70 s | 1.40 / 2.00 s | 1.70 / 2.50 s | 2 of 7 |" in text


def test_the_longest_gap_is_found() -> None:
    """Between neighbours, in whatever order they were noted."""
    assert failover.longest_gap([5_000_000_000, 1_000_000_000, 2_000_000_000]) == 3.0
    assert failover.longest_gap([1]) == 0
