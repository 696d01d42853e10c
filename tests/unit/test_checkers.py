"""Each checker calls sound histories sound, and finds what was planted into others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.chaos.checkers import (
    check_answers,
    check_assignments,
    check_capacity,
    check_conserved,
    check_cut,
    check_drift,
    check_effects,
    check_exclusion,
    check_false_downs,
    check_fencing,
    check_leadership,
    check_ledgers,
    check_linearizable,
    check_order,
    check_records,
    check_reservations,
    check_tallies,
)
from foundation_nats.chaos.checkers.drift import Allowance, Series
from foundation_nats.chaos.checkers.exclusion import Guarded, Holding
from foundation_nats.chaos.checkers.leadership import Disturbance, DownSeen, LeaseSeen
from foundation_nats.chaos.checkers.linearizable import REGISTER, search
from foundation_nats.chaos.checkers.money import Account, Cut
from foundation_nats.chaos.checkers.records import AssignmentSeen, RecordSeen
from foundation_nats.chaos.checkers.reservations import Claim, LedgerSeen
from foundation_nats.chaos.checkers.tallies import Tally
from foundation_nats.chaos.history import History, Operation
from foundation_nats.errors import AgentUnavailableError, BusTimeoutError

BOTH = {"a": ["a", "mirror-a"]}


def send(key: str, outcome: str = "ok", process: str = "p") -> Operation:
    """A send of *key* to a."""
    return Operation(process, "send", "a", key, 1, 2, outcome)  # type: ignore[arg-type]


def test_sound_effects_are_sound() -> None:
    """What is unknown may be applied or not."""
    sent = [send("1"), send("2", "unknown"), send("3", "unknown"), send("4", "fail"), send("5")]
    applied = {"a": ["1", "2", "5"], "mirror-a": ["1", "2", "5"]}
    assert check_effects(sent, applied, BOTH).is_clean
    assert check_order(sent, applied, BOTH).is_clean


@pytest.mark.parametrize(
    ("applied", "word"),
    [
        ({"a": ["1", "2"], "mirror-a": ["1"]}, "lost: mirror-a"),
        ({"a": ["1", "2", "1"], "mirror-a": ["1", "2"]}, "repeated: a"),
        ({"a": ["1", "2", "9"], "mirror-a": ["1", "2"]}, "ghost: a"),
        ({"a": ["1", "2", "3"], "mirror-a": ["1", "2"]}, "ghost: a"),
    ],
)
def test_planted_effects_are_found(applied: dict[str, list[str]], word: str) -> None:
    """Lost, repeated, never sent, refused and applied all the same."""
    sent = [send("1"), send("2"), send("3", "fail")]
    judgement = check_effects(sent, applied, BOTH)
    assert judgement.violations_count == 1
    assert judgement.violations[0].startswith(word)


def test_a_dead_letter_answers_for_a_signal_once() -> None:
    """Applied and dead is a violation; dead alone is not."""
    sent = [send("1")]
    receivers = {"a": ["a"]}
    assert check_effects(sent, {"a": []}, receivers, dead={"a": {"1"}}).is_clean
    both = check_effects(sent, {"a": ["1"]}, receivers, dead={"a": {"1"}})
    assert both.violations[0].startswith("both")


def test_a_sender_overtaken_by_itself_is_found() -> None:
    """Order is per sender: two senders may interleave."""
    sent = [send("p1"), send("q1", process="q"), send("p2"), send("q2", process="q")]
    receivers = {"a": ["a"]}
    assert check_order(sent, {"a": ["q1", "p1", "p2", "q2"]}, receivers).is_clean
    judgement = check_order(sent, {"a": ["p2", "q1", "p1", "q2"]}, receivers)
    assert judgement.violations == ["a applied p1 of p after p2"]


def record(revision: int, epoch: int, commit: int, cursor: int, writer: str = "w/1") -> RecordSeen:
    """One revision of a's record."""
    return RecordSeen("a", revision, epoch, commit, cursor, writer)


@pytest.mark.parametrize(
    ("second", "word"),
    [
        (record(2, 1, 2, 9, "v/1"), "epoch 2 became 1"),
        (record(2, 2, 2, 1), "cursor 5 became 1"),
        (record(2, 2, 1, 5), "commit 1 was followed by 1"),
        (record(2, 2, 2, 5, "v/1"), "both wrote in epoch 2"),
    ],
)
def test_records_that_go_back_are_found(second: RecordSeen, word: str) -> None:
    """Epoch, cursor, commit number and writer of an epoch."""
    assert check_records([record(1, 2, 1, 5), record(3, 3, 4, 5, "v/2")]).is_clean
    judgement = check_records([record(1, 2, 1, 5), second])
    assert judgement.violations_count == 1
    assert word in judgement.violations[0]


def assignment(
    revision: int, epoch: int, node: str | None, agent: str = "a", incarnation: int = 1
) -> AssignmentSeen:
    """One revision of an agent's registry record, with one gpu."""
    return AssignmentSeen(agent, revision, epoch, node, incarnation, "running", (("gpu", 1.0),))


def test_an_epoch_given_twice_is_found() -> None:
    """To another node, to another life of it; and one that goes back."""
    assert check_assignments([assignment(1, 1, "n1"), assignment(2, 2, "n2")]).is_clean
    assert not check_assignments([assignment(1, 1, "n1"), assignment(2, 1, "n2")]).is_clean
    again = [assignment(1, 1, "n1"), assignment(2, 1, "n1", incarnation=2)]
    assert not check_assignments(again).is_clean
    assert not check_assignments([assignment(1, 2, "n1"), assignment(2, 1, "n1")]).is_clean


def test_capacity_is_counted_at_every_revision() -> None:
    """Three on two is one too many, even if it is mended later."""
    capacity = {"n1": {"gpu": 2.0}}
    two = [assignment(1, 1, "n1", "a"), assignment(2, 1, "n1", "b")]
    moved = [assignment(3, 2, "n2", "b"), assignment(4, 1, "n1", "c")]
    assert check_capacity([*two, *moved], capacity).is_clean
    judgement = check_capacity([*two, assignment(3, 1, "n1", "c"), *moved], capacity)
    assert judgement.violations == ["n1 holds 3 gpu of 2 at revision 3, with c"]


def test_capacity_given_away_twice_is_found() -> None:
    """In the books; by what clients believe; by what left the books, or was refused, too early."""
    one, two = (("gpu", 1.0),), (("gpu", 2.0),)
    sound = [
        LedgerSeen("n1", 1, two, one, (("r", one),), 5),
        LedgerSeen("n1", 2, two, two, (), 20),
        LedgerSeen("n1", 3),
    ]
    assert check_ledgers(sound).is_clean
    over = check_ledgers([*sound, LedgerSeen("n1", 4, two, two, (("x", one),))])
    assert over.violations == ["the books of n1 name 3 gpu of 2 at revision 4"]
    capacity = {"n1": {"gpu": 2.0}}
    claims = [Claim("r", "n1", "a", one, 0, 20), Claim("s", "n1", "b", one, 5, 10)]
    claims += [Claim("t", "n1", "c", one, 10, 15), Claim("u", "n2", "c", two, 0, 99, lost_ns=99)]
    assert check_reservations(claims, sound, capacity).is_clean
    found = check_reservations([*claims, Claim("x", "n1", "d", one, 9, 10)], sound, capacity)
    assert found.violations == ["over: clients hold 3 gpu of 2 on n1 with x of d"]
    early = [Claim("r", "n1", "a", one, 0, 21, lost_ns=20)]
    found = check_reservations(early, sound, capacity)
    assert sorted(found.sorts) == ["lost", "vanished"]


def test_two_leaders_of_a_term_are_found() -> None:
    """So is a term that goes back."""
    first = LeaseSeen(1, "n1", 1, 1)
    assert check_leadership([first, LeaseSeen(2, "n1", 1, 1), LeaseSeen(3, "n2", 1, 2)]).is_clean
    assert not check_leadership([first, LeaseSeen(2, "n2", 1, 1)]).is_clean
    assert not check_leadership([LeaseSeen(1, "n1", 1, 2), LeaseSeen(2, "n2", 1, 1)]).is_clean


def test_a_healthy_node_declared_down_is_found() -> None:
    """The harness knows what it broke, and what follows from that."""
    broken = [Disturbance("n1", 10.0, 12.0), Disturbance(None, 50.0, 51.0)]
    sound = [DownSeen("n1", 13.0), DownSeen("n3", 52.0)]
    assert check_false_downs(sound, broken, slack_s=5).is_clean
    judgement = check_false_downs([DownSeen("n2", 13.0), DownSeen("n1", 30.0)], broken, slack_s=5)
    assert judgement.violations_count == 2


def test_a_lock_held_twice_is_found() -> None:
    """By time and by token."""
    sound = [Holding("l", "x", 1, 0, 10), Holding("l", "y", 4, 10, 20), Holding("m", "y", 2, 5, 9)]
    assert check_exclusion(sound).is_clean
    assert not check_exclusion([*sound, Holding("l", "z", 6, 15, 25)]).is_clean
    assert not check_exclusion([*sound, Holding("l", "z", 4, 25, 26)]).is_clean
    assert check_fencing(
        [Guarded("r", "x", 1), Guarded("r", "x", 1), Guarded("r", "y", 4)]
    ).is_clean
    assert not check_fencing([Guarded("r", "y", 4), Guarded("r", "x", 1)]).is_clean
    assert not check_fencing([Guarded("r", "x", 4), Guarded("r", "y", 4)]).is_clean


def test_money_from_nowhere_is_found() -> None:
    """In flight it may be missing, never be there twice."""
    a = Account("a", 100, 70, {"b": 30})
    b = Account("b", 100, 130, {}, {"a": 30})
    early = Account("b", 100, 100)
    assert check_conserved({"a": a, "b": b}).is_clean
    assert check_cut([Cut({"a": a, "b": early}, {"a": a, "b": b})]).is_clean
    assert not check_conserved({"a": a, "b": early}).is_clean
    assert not check_cut([Cut({"b": b}, {"a": Account("a", 100, 100)})]).is_clean
    assert not check_cut([Cut({"a": Account("a", 100, 80, {"b": 30})}, {"b": early})]).is_clean


# ---- linearizability ---------------------------------------------------------------


def op(
    f: str, value: Any, result: Any, begin: int, end: int | None, outcome: str = "ok"
) -> Operation:
    """An operation on k."""
    return Operation("p", f, "k", value, begin, end, outcome, result)  # type: ignore[arg-type]


def test_a_stale_read_is_found() -> None:
    """What was read after a write had ended must be that write, or a later one."""
    write = op("write", 1, None, 0, 10)
    assert check_linearizable([write, op("read", None, 1, 11, 12)]).is_clean
    assert check_linearizable([write, op("read", None, None, 5, 12)]).is_clean
    judgement = check_linearizable([write, op("read", None, None, 11, 12)])
    assert judgement.violations_count == 1
    assert "read" in judgement.violations[0]


def test_values_that_flip_back_are_found() -> None:
    """Two overlapping writes, and readers who see them in different orders."""
    writes = [op("write", 1, None, 0, 100), op("write", 2, None, 0, 100)]
    reads = [op("read", None, 1, 10, 11), op("read", None, 2, 12, 13)]
    assert check_linearizable([*writes, *reads]).is_clean
    assert not check_linearizable([*writes, *reads, op("read", None, 1, 14, 15)]).is_clean


def test_an_unknown_write_may_have_happened_at_any_time_or_never() -> None:
    """Seen late, unseen, but not seen, then unseen."""
    unknown = op("write", 7, None, 0, 5, "unknown")
    assert check_linearizable([unknown, op("read", None, None, 50, 51)]).is_clean
    late = [op("read", None, None, 50, 51), op("read", None, 7, 52, 53)]
    assert check_linearizable([unknown, *late]).is_clean
    assert not check_linearizable([unknown, *late, op("read", None, None, 54, 55)]).is_clean


def test_a_write_that_failed_must_not_be_seen() -> None:
    """``fail`` is a promise."""
    failed = op("write", 7, None, 0, 5, "fail")
    assert not check_linearizable([failed, op("read", None, 7, 10, 11)]).is_clean


def answer(at_ns: int, epoch: int, host: str = "h", outcome: str = "ok") -> Operation:
    """An ask that was answered by an activation at work at that instant."""
    by = {"epoch": epoch, "at_ns": at_ns, "host": host}
    return Operation("p", "read", "k", None, at_ns - 1, at_ns + 1, outcome, None, None, by)  # type: ignore[arg-type]


def test_one_activation_after_the_other_answers() -> None:
    """In whatever order the answers arrived; other machines' clocks are not compared."""
    sound = [answer(20, 2), answer(10, 1), answer(21, 2), answer(5, 2, "other")]
    judgement = check_answers([*sound, answer(30, 1, outcome="unknown")])
    assert judgement.is_clean
    assert judgement.looked_at == 4


def test_two_activations_that_answer_at_once_are_found() -> None:
    """The old one was at work after the new one had begun to answer, and its caller got the answer."""
    judgement = check_answers([answer(10, 1), answer(20, 2), answer(25_000_020, 1), answer(30, 2)])
    assert judgement.violations == [
        "k answered under epoch 1 25.0 ms after it had answered under epoch 2"
    ]


def test_compare_and_set_succeeds_once() -> None:
    """Two successes from the same value can't both be."""
    base = op("write", 0, None, 0, 1)
    one, two = op("cas", (0, 1), True, 2, 9), op("cas", (0, 2), True, 2, 9)
    assert check_linearizable([base, one, op("cas", (0, 2), False, 2, 9)]).is_clean
    assert not check_linearizable([base, one, two]).is_clean
    # An unknown one in between that nobody read can still make another fail.
    unknown = op("cas", (0, 5), None, 2, 3, "unknown")
    assert check_linearizable([base, unknown, op("cas", (0, 6), False, 10, 11)]).is_clean
    assert not check_linearizable([base, op("cas", (0, 6), False, 10, 11)]).is_clean


def test_what_takes_too_long_is_undecided() -> None:
    """Never called good."""
    writes = [op("write", n, None, 0, 1000 + n) for n in range(12)]
    reads = [op("read", None, 99, 2000, 2001)]
    judgement = check_linearizable([*writes, *reads], steps_max=500)
    assert judgement.undecided
    assert not judgement.is_clean


def simulated(seed: int, *, stale: bool) -> list[Operation]:
    """Clients of a true register, with unknown outcomes; *stale*: one read lies."""
    chance = random.Random(seed)
    value: int | None = None
    older: list[int | None] = []
    found: list[Operation] = []
    time = 0
    for number in range(60):
        time += chance.randint(1, 5)
        begin, end = time - chance.randint(0, 6), time + chance.randint(1, 6)
        dice = chance.random()
        if dice < 0.5:
            result = value
            if stale and number > 40 and len(set(older)) > 3:
                result, begin, end, stale = older[0], time, time, False
                if result == value:
                    stale = True
            found.append(op("read", None, result, begin, end))
        elif dice < 0.8:
            is_known = chance.random() < 0.8
            found.append(op("write", number, None, begin, end, "ok" if is_known else "unknown"))
            if is_known or chance.random() < 0.5:
                older.append(value)
                value = number
        else:
            expected = value if chance.random() < 0.7 else -1
            done = expected == value
            found.append(op("cas", (expected, number), done, begin, end))
            if done:
                older.append(value)
                value = number
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_what_a_register_did_is_linearizable(seed: int) -> None:
    """Whatever overlapped, and whatever stayed unknown."""
    assert check_linearizable(simulated(seed, stale=False)).is_clean


def brute_force(
    items: Sequence[Operation], state: Any = None, done: frozenset[int] = frozenset()
) -> bool:
    """The definition, without memory: some order explains everything that is known."""
    left = [n for n in range(len(items)) if n not in done]
    if all(items[n].outcome != "ok" for n in left):
        return True
    horizon = min(items[n].completed_ns or 0 for n in left if items[n].outcome == "ok")
    for n in left:
        item = items[n]
        if item.invoked_ns > horizon:
            continue
        possible, after = REGISTER.step(
            state, item.f, item.value, item.result, item.outcome == "ok"
        )
        if possible and brute_force(items, after, done | {n}):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "cas"]),
            st.integers(0, 2),
            st.integers(0, 2),
            st.booleans(),
            st.integers(0, 12),
            st.integers(0, 6),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_the_search_agrees_with_the_definition(drawn: list[Any]) -> None:
    """On every small history, possible or not."""
    items = []
    for f, one, two, flag, begin, length, is_known in drawn:
        value = None if f == "read" else (one, two) if f == "cas" else one
        result = one if f == "read" else flag if f == "cas" else None
        outcome = "ok" if is_known or f == "read" else "unknown"
        items.append(op(f, value, result, begin, begin + length, outcome))
    expected = brute_force(items)
    assert (search(items, REGISTER, 100_000) is True) == expected
    assert check_linearizable(items).is_clean == expected


def test_a_history_is_saved_and_read_again(tmp_path: Path) -> None:
    """As JSON lines, and with each outcome as its error says."""
    history = History()
    with history.operation("p", "send", "a", "1") as operation:
        operation.ok({"x": 1})
    with history.operation("p", "send", "a", "2"):
        raise BusTimeoutError("no receipt")
    with history.operation("p", "send", "a", "3"):
        raise AgentUnavailableError("not running")
    history.invoke("p", "send", "a", "4")
    history.save(tmp_path / "history.jsonl")
    again = History.load(tmp_path / "history.jsonl")
    assert again.operations == history.operations
    assert [item.outcome for item in again.operations] == ["ok", "unknown", "fail", "unknown"]
    assert len(again.of("send")) == 4


def numbered(number: int, outcome: str = "ok") -> Operation:
    """A send of *number* by p to a."""
    return Operation("p", "send", "a", number, 1, 2, outcome)  # type: ignore[arg-type]


def test_sound_tallies_are_sound() -> None:
    """The last one is unknown: counted here, not counted there."""
    sent = [numbered(1), numbered(2), numbered(3, "unknown")]
    tallies = {"a": Tally({"p": 3}, 3), "mirror-a": Tally({"p": 2}, 2)}
    assert check_tallies(sent, tallies, BOTH).is_clean


@pytest.mark.parametrize(
    ("tally", "word"),
    [
        (Tally({"p": 1}, 1), "lost: a stands at 1"),
        (Tally(), "lost: a stands at 0"),
        (Tally({"p": 2}, 3, repeated=1), "repeated: a"),
        (Tally({"p": 2}, 1, skipped=1), "lost: a passed over 1"),
        (Tally({"p": 4}, 4), "ghost: a stands at 4"),
        (Tally({"p": 2}, 5), "sum: a counted 5"),
    ],
)
def test_planted_tallies_are_found(tally: Tally, word: str) -> None:
    """Behind its receipts, twice, passed over, beyond what was sent, forged."""
    sent = [numbered(1), numbered(2), numbered(3, "fail")]
    judgement = check_tallies(sent, {"a": tally, "mirror-a": Tally({"p": 2}, 2)}, BOTH)
    assert [text.startswith(word) for text in judgement.violations] == [True]


ALLOWED = {"MB": Allowance(share=0.1, absolute=5.0)}


def series(gain: float, noise: float = 0.0, warm_up: float = 0.0, count: int = 60) -> Series:
    """100 MB that gain so much in all, with noise, after a rise at the beginning."""
    chance = random.Random(count)
    samples = [
        (
            float(number),
            100
            + gain * number / count
            + chance.uniform(-noise, noise)
            # What rises at first and then stays.
            + warm_up * min(1.0, number / (count / 4)),
        )
        for number in range(count)
    ]
    return Series("node memory", "MB", samples)


@pytest.mark.parametrize(
    "steady",
    [
        series(0),
        series(0, noise=30, count=300),
        series(0, warm_up=80),
        series(8),
        series(90, count=9),
    ],
)
def test_what_does_not_grow_without_end_is_no_drift(steady: Series) -> None:
    """Flat, noisy, a rise at the start, a gain within the allowance, too short to tell."""
    assert check_drift([steady], ALLOWED).is_clean


def test_a_process_that_was_started_late_is_not_said_to_leak() -> None:
    """It rises as the others did at their beginning; one that was there for long enough is judged."""
    steady, late, later = series(0, count=120), series(60, count=40), series(60, count=80)
    assert check_drift([steady, late], ALLOWED).is_clean
    assert not check_drift([steady, later], ALLOWED).is_clean


@pytest.mark.parametrize("leak", [series(60), series(60, noise=20), series(60, warm_up=80)])
def test_steady_growth_is_a_drift(leak: Series) -> None:
    """With and without noise, and behind a rise at the start."""
    judgement = check_drift([leak], ALLOWED)
    assert judgement.violations_count == 1
    assert judgement.violations[0].startswith("grows: node memory was")
