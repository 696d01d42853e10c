"""What barriers, votes, auctions and sagas decide, without a server."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation_nats.coordination.auction import moved_on, ranked, read_bid
from foundation_nats.coordination.barrier import arrived, lapsed, left, missing, was_in
from foundation_nats.coordination.desk import Answer
from foundation_nats.coordination.saga import answered, begun, freed, present, settled
from foundation_nats.coordination.vote import counted, decided, read_ballot
from foundation_schemas.coordination import (
    AuctionRecord,
    Ballot,
    BarrierRecord,
    Bid,
    SagaRecord,
    SagaStep,
    StepProgress,
    VoteRecord,
)

# ---- barriers -------------------------------------------------------------------------


def test_a_generation_lapses_at_the_earliest_deadline_and_is_remembered() -> None:
    """64 of them; an older one is said to be forgotten."""
    record = BarrierRecord(parties=3)
    record = arrived(record, "a", "t1", now=0, timeout=10)
    record = arrived(record, "b", "t2", now=1, timeout=2)
    assert (record.deadline, missing(record)) == (3, ["1 of 3"])
    assert lapsed(record, 2.9) is record
    record = lapsed(record, 3)
    assert (record.generation, record.broken, record.arrived) == (2, {1: ["1 of 3"]}, {})
    assert lapsed(record, 100) is record
    for now in range(100):
        record = lapsed(arrived(record, "a", "t", now=now, timeout=0.5), now + 1)
    assert len(record.broken) == 64
    assert record.forgotten == min(record.broken) - 1


def test_an_arrival_counts_once_and_can_be_taken_back() -> None:
    """Only by whoever made it, and only in its generation."""
    record = arrived(BarrierRecord(parties=2), "a", "t1", now=0, timeout=1)
    record = arrived(record, "a", "t2", now=0, timeout=1)
    assert record.generation == 1
    noted = left(record, 1, "a", "t1")
    assert noted is not None
    assert (noted.arrived, noted.gone) == ({"a": "t2"}, ["t1"])
    assert left(noted, 1, "a", "t1") is None
    empty = left(record, 1, "a", "t2")
    assert empty is not None
    assert (empty.arrived, empty.deadline) == ({}, None)
    ended = arrived(record, "b", "t3", now=0, timeout=1)
    assert (ended.generation, ended.deadline) == (2, None)
    assert left(ended, 1, "b", "t3") is None
    assert was_in(ended, 1, "t3")
    assert not was_in(ended, 1, "t9")
    assert not was_in(record, 1, "t2")


# ---- votes ------------------------------------------------------------------------------


def _vote(voters: dict[str, float], quorum: str, choices: list[str]) -> VoteRecord:
    return VoteRecord(choices=choices, voters=voters, quorum=quorum, opened=0, deadline=10)


@given(
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=7),
    quorum=st.sampled_from(["majority", "all", "1", "3"]),
    said=st.lists(st.sampled_from(["x", "y", "z", None, "away"]), min_size=7, max_size=7),
    order=st.randoms(use_true_random=False),
)
def test_an_early_decision_is_the_one_at_the_end(
    weights: list[int], quorum: str, said: list[str | None], order: Any
) -> None:
    """Whatever the order: ballots that were not waited for could not have changed it."""
    voters = {f"v{n}": float(weight) for n, weight in enumerate(weights)}
    if quorum.isdigit() and float(quorum) > sum(weights):
        return
    ballots = {
        voter: Ballot(unavailable="away") if choice == "away" else Ballot(choice=choice)
        for voter, choice in zip(voters, said, strict=False)
    }
    everything = decided(
        _vote(voters, quorum, ["x", "y", "z"]).model_copy(update={"ballots": ballots}), 10
    )
    assert everything.result is not None
    record: VoteRecord | None = _vote(voters, quorum, ["x", "y", "z"])
    names = list(voters)
    order.shuffle(names)
    for voter in names:
        assert record is not None
        if record.result is None:
            record = counted(record, {voter: ballots[voter]}, 1)
    assert record is not None
    assert record.result is not None, "all have voted"
    assert record.result.choice == everything.result.choice


def test_a_ballot_counts_once_and_a_voter_that_was_away_may_come_back() -> None:
    """The first real one stands."""
    record = counted(_vote({"a": 1, "b": 1, "c": 1}, "all", ["x"]), {"a": Ballot(choice="x")}, 1)
    assert record is not None
    assert counted(record, {"a": Ballot()}, 1) is None
    assert decided(record, 10).result is not None
    two = _vote({"a": 1, "b": 1}, "1", ["x"])
    away = counted(two, {"a": Ballot(unavailable="?")}, 1)
    assert away is not None
    assert away.result is None
    back = counted(away, {"a": Ballot(choice="x")}, 1)
    assert back is not None
    assert back.result is not None
    assert back.result.choice == "x"


@pytest.mark.parametrize(
    ("answer", "choice", "unavailable"),
    [
        (Answer(ok="x"), "x", False),
        (Answer(ok=None), None, False),
        (Answer(ok={"choice": "x", "reason": "because"}), "x", False),
        (Answer(ok="q"), None, True),
        (Answer(ok=["x"]), None, True),
        (Answer(code="agent.handler", message="no"), None, True),
    ],
)
def test_answers_are_read_as_ballots(answer: Answer, choice: str | None, unavailable: bool) -> None:
    """What is no choice is no vote."""
    ballot = read_ballot(answer, ["x", "y"])
    assert (ballot.choice, bool(ballot.unavailable)) == (choice, unavailable)


# ---- auctions -----------------------------------------------------------------------------


def test_bids_are_ranked_by_their_key() -> None:
    """The lowest first, equals by name; what has no number is no bid."""
    said = {"c": {"cost": 2}, "b": 2, "a": {"cost": 3.5}, "d": {"load": 0}, "e": True, "f": None}
    bids = {name: read_bid(Answer(ok=value), "cost") for name, value in said.items()}
    assert ranked(bids, "cost") == ["b", "c", "a"]
    free = {"a": Bid(value="x"), "b": Bid(value="yyy")}
    assert ranked(free, lambda _, bid: -len(bid)) == ["b", "a"]


def test_the_award_is_recorded_once() -> None:
    """A second process that comes late with the same or another answer changes nothing."""
    bids = {"a": Bid(value=1), "b": Bid(value=2), "c": Bid(refused="no")}
    record = AuctionRecord(bidders=["a", "b", "c"], opened=0, deadline=1, bids=bids)
    record = record.model_copy(update={"ranking": ["a", "b"]})
    second = moved_on(record, 0, "declined", now=5)
    assert second is not None
    assert (second.turn, second.offered, second.result) == (1, 5, None)
    assert moved_on(second, 0, "", now=6) is None, "the first one's answer came too late"
    awarded = moved_on(second, 1, "", now=6)
    assert awarded is not None
    assert awarded.result is not None
    assert awarded.result.winner == "b"
    assert awarded.result.refused == {"a": "declined", "c": "no"}
    assert not awarded.delivered
    assert moved_on(awarded, 1, "declined", now=7) is None
    nobody = moved_on(second, 1, "declined", now=6)
    assert nobody is not None
    assert nobody.result is not None
    assert nobody.result.winner is None


# ---- sagas ----------------------------------------------------------------------------------


def _saga(*undo: str | None) -> SagaRecord:
    steps = [
        SagaStep(name=f"s{n}", agent="a", type="do", undo=type_) for n, type_ in enumerate(undo)
    ]
    return SagaRecord(steps=steps, progress=[StepProgress() for _ in steps])


@given(
    undo=st.lists(st.sampled_from(["undo", None]), min_size=1, max_size=5),
    fails=st.integers(0, 6),
    how=st.sampled_from(["error", "silence"]),
    undo_fails=st.integers(-1, 5),
)
def test_a_saga_is_done_or_undone_in_reverse(
    undo: list[str | None], fails: int, how: str, undo_fails: int
) -> None:
    """For every step that fails, and every compensation that fails once."""
    record = _saga(*undo)
    asked: list[tuple[str, int]] = []
    refused = False
    for _ in range(50):
        index = present(record)
        if index is None:
            if record.state != "stuck":
                break
            again = freed(record)
            assert again is not None
            record = again
            continue
        first = begun(record, index, now=1.0)
        assert first is not None
        record = first
        if record.progress[index].state == "kept":
            continue
        assert begun(record, index, now=2.0) is None
        answer: Answer | None = Answer(ok=index)
        if record.state == "running":
            asked.append(("do", index))
            if index == fails:
                answer = Answer(code="e", message="m") if how == "error" else None
        else:
            asked.append(("undo", index))
            if index == undo_fails and not refused:
                refused = True
                answer = Answer(code="e", message="m")
        after = answered(record, index, answer)
        assert after is not None
        record = after
    assert record.is_over
    count = len(undo)
    if fails >= count:
        assert record.state == "done"
        assert asked == [("do", n) for n in range(count)]
        assert record.results() == {f"s{n}": n for n in range(count)}
        return
    assert record.state == "undone"
    last = fails if how == "silence" else fails - 1
    back = [n for n in range(last, -1, -1) if undo[n] is not None]
    undone = [n for n in back for _ in range(2 if n == undo_fails else 1)]
    assert asked == [("do", n) for n in range(fails + 1)] + [("undo", n) for n in undone]


def test_what_is_over_stays_over() -> None:
    """No late answer changes it."""
    record = settled(_saga())
    assert record.state == "done"
    assert freed(record) is None
    running = _saga("undo")
    assert answered(running, 0, Answer(ok=1)) is None, "it was not asked"
