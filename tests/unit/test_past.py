"""What an agent keeps of its past: when a base is due, which one counts, how far may be trimmed."""

from __future__ import annotations

import random

import pytest

from foundation_nats.agent.past import Past
from foundation_schemas import BaseRecord, PastRecord


def store(past: Past, cursor: int) -> BaseRecord | None:
    """One commit, acknowledged, and its base, if one was due."""
    place = past.next_place()
    base = None if place is None else past.begin(place, cursor)
    past.committed(past.mark())
    if base is not None:
        past.end(base, is_stored=True)
    return base


def test_the_first_base_is_due_at_once_and_the_next_after_so_many() -> None:
    past = Past(3, None)
    assert store(past, 0) == BaseRecord(place=0, cursor=0)
    made = []
    for cursor in range(1, 10):
        past.done()
        base = store(past, cursor)
        if base is not None:
            made.append((base.place, base.cursor))
    assert made == [(1, 3), (0, 6), (1, 9)]


def test_at_least_so_many_handled_ones_stay_behind_the_boundary() -> None:
    """And behind the boundary there is always a base that the record names."""
    for keep in (1, 2, 7, 50):
        past = Past(keep, None)
        rng = random.Random(keep)
        store(past, 0)
        handled = 0
        for _ in range(400):
            for _ in range(rng.randrange(3)):
                handled += 1
                past.done()
            store(past, handled)
            found = past.boundary()
            if found is not None:
                cursor, count = found
                assert cursor == count
                assert handled - cursor >= keep or cursor == 0
                assert cursor in [base.cursor for base in past.bases]
        last = past.boundary()
        assert last is not None
        assert handled - last[0] <= 3 * keep + 6


def test_a_base_counts_once_a_record_names_it() -> None:
    past = Past(1, None)
    store(past, 0)
    past.done()
    assert past.boundary() is None  # stored, but no record says so yet
    past.committed(past.mark())
    assert past.boundary() == (0, 0)


def test_a_base_whose_fate_is_unknown_is_not_named() -> None:
    past = Past(2, None)
    store(past, 0)
    for cursor in (1, 2):
        past.done()
        assert past.next_place() is (None if cursor == 1 else 1)
    base = past.begin(1, 2)
    assert past.next_place() is None  # one at a time
    past.end(base, is_stored=False)
    assert [known.cursor for known in past.bases] == [0]
    assert past.next_place() == 1  # tried again


def test_when_the_stream_goes_back_what_it_numbered_counts_no_more() -> None:
    past = Past(2, None)
    store(past, 10)
    past.took_no_effect(11)
    late = past.begin(1, 12)
    past.restart()
    past.end(late, is_stored=True)
    assert (past.bases, past.void) == ([], [])
    past.committed(past.mark())
    assert past.boundary() is None
    assert past.next_place() == 0


def test_another_activation_goes_on_where_the_record_says() -> None:
    past = Past(2, None)
    store(past, 0)
    for cursor in (1, 2, 3):
        past.done()
        store(past, cursor)
    past.took_no_effect(3)
    heir = Past(2, PastRecord.model_validate(past.encoded()))
    assert heir.bases == past.bases
    assert heir.void == [3]
    heir.done()
    heir.committed(heir.mark())
    assert heir.boundary() == (2, 0)  # counted since the claim, never less than nothing


@pytest.mark.parametrize("count", [10, 1500])
def test_what_took_no_effect_is_bounded_and_what_is_forgotten_is_counted(count: int) -> None:
    past = Past(5000, None)
    for number in range(count):
        past.took_no_effect(number)
    assert len(past.void) == min(count, 1000)
    assert past.asides == max(0, count - 1000)


def test_a_commit_of_too_many_does_not_fill_the_mailbox_for_ever() -> None:
    """All that was handled in one commit may go once a base lies behind it, and is named alone."""
    past = Past(5, None, most=32)
    store(past, 0)
    for _ in range(64):
        past.done()
    store(past, 64)
    past.committed(past.mark())
    assert [base.cursor for base in past.bases] == [64]
    assert past.boundary() == (64, 64)
