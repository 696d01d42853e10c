"""The durable mailbox in every order of events: it keeps its promises, and none of its safeguards is idle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import pytest

from tests.model.checker import UNSETTLED, Move, Result, explore
from tests.model.protocol import (
    LOST,
    NO_CAUSE,
    ORDER,
    STALE_ANSWER,
    STALE_COMMIT,
    TWICE,
    TWO_COMMITTERS,
    UNBACKED_ANSWER,
    Bounds,
    Late,
    Protocol,
    Safeguards,
    World,
)

STATES_MAX = 400_000
STATES_MAX_CHAOS = 4_000_000

# ---- the checker, on a model whose answers are known ------------------------------


class Mutex(NamedTuple):
    """Two processes and a lock: 0 outside, 1 has found the lock free (broken model only), 2 inside."""

    first: int = 0
    second: int = 0
    is_locked: bool = False


def _mutex(*, is_atomic: bool, releases: bool = True) -> Result[Mutex]:
    """Search a lock that is tested and set by one move, or by two."""

    def steps(world: Mutex, name: str, place: int) -> Iterator[Move[Mutex]]:
        def at(stage: int, is_locked: bool) -> Mutex:
            stages = [world.first, world.second]
            stages[place] = stage
            return Mutex(stages[0], stages[1], is_locked)

        stage = world[place]
        if stage == 0 and not world.is_locked:
            if is_atomic:
                yield Move(f"{name} enters", at(2, True))
            else:
                yield Move(f"{name} finds it free", at(1, False))
        elif stage == 1:
            yield Move(f"{name} enters", at(2, True))
        elif stage == 2 and releases:
            yield Move(f"{name} leaves", at(3, False))

    def successors(world: Mutex) -> Iterator[Move[Mutex]]:
        yield from steps(world, "one", 0)
        yield from steps(world, "two", 1)

    return explore(
        Mutex(),
        successors,
        {"mutual exclusion": lambda world: (world.first, world.second) != (2, 2)},
        {"both were inside": lambda world: (world.first, world.second) == (3, 3)},
        states_max=1000,
    )


def test_the_checker_exhausts_a_correct_lock() -> None:
    """Test-and-set by one move: eight states, one of them quiet, and no violation."""
    result = _mutex(is_atomic=True)
    assert result.violation is None
    assert result.is_exhausted
    assert (result.states, result.quiet, result.depth) == (8, 1, 4)


def test_the_checker_finds_the_shortest_way_into_a_broken_lock() -> None:
    """Test, then set: four steps are needed, and four are shown, in an order that works."""
    result = _mutex(is_atomic=False)
    assert result.violation is not None
    assert result.violation.name == "mutual exclusion"
    assert sorted(result.violation.trace[:2]) == ["one finds it free", "two finds it free"]
    assert sorted(result.violation.trace[2:]) == ["one enters", "two enters"]
    assert not result.is_exhausted


def test_the_checker_judges_quiet_states() -> None:
    """A lock that is never released excludes well, and its second user never gets in."""
    result = _mutex(is_atomic=True, releases=False)
    assert result.violation is not None
    assert result.violation.name == "both were inside"
    assert len(result.violation.trace) == 1


def test_the_checker_finds_what_runs_in_circles() -> None:
    """A circle that only a fault can leave is a violation; one that can end by itself is none."""

    def circle(leaving_is_a_fault: bool) -> Result[int]:
        def successors(number: int) -> Iterator[Move[int]]:
            if number < 3:
                yield Move("turn", (number + 1) % 3)
            if number == 1:
                yield Move("leave", 3, leaving_is_a_fault)

        return explore(0, successors, {}, {}, states_max=100)

    assert circle(leaving_is_a_fault=False).violation is None
    violation = circle(leaving_is_a_fault=True).violation
    assert violation is not None
    assert (violation.name, violation.trace) == (UNSETTLED, ())


def test_the_checker_says_when_it_gave_up() -> None:
    """An endless model is not called exhausted."""
    result = explore(0, lambda number: [Move("up", number + 1)], {}, {}, states_max=50)
    assert result.violation is None
    assert not result.is_exhausted
    assert result.states == 50


# ---- the protocol -----------------------------------------------------------------


def _search(safeguards: Safeguards, bounds: Bounds, states_max: int = STATES_MAX) -> Result[World]:
    protocol = Protocol(safeguards, bounds)
    return explore(
        protocol.initial,
        protocol.successors,
        protocol.invariants(),
        protocol.final(),
        states_max=states_max,
    )


TWO_SIGNALS = Bounds()
LATE_RECOVERY = Bounds(losses=0, windows=1)
THREE_EPOCHS = Bounds(signals=1, epochs=3, crashes=2, windows=1)


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(TWO_SIGNALS, id="two-signals"),
        pytest.param(LATE_RECOVERY, id="late-recovery"),
        pytest.param(THREE_EPOCHS, id="three-epochs"),
    ],
)
def test_the_protocol_keeps_its_promises_in_every_order_of_events(bounds: Bounds) -> None:
    """All safeguards on: every reachable state is seen, every one can settle, none is wrong."""
    result = _search(Safeguards(), bounds)
    print(f"\n{result.states:,} states, {result.moves:,} moves, {result.quiet} quiet: {bounds}")
    assert result.violation is None, f"\n{result.violation}"
    assert result.is_exhausted
    assert result.states > 10_000, "void: the model has become trivial"
    assert result.quiet > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(Bounds(losses=2, windows=1), id="two-losses"),
        pytest.param(Bounds(signals=3, losses=0), id="three-signals"),
        pytest.param(Bounds(epochs=3, crashes=2), id="two-signals-three-epochs"),
    ],
)
def test_the_protocol_keeps_its_promises_within_larger_bounds(
    bounds: Bounds, request: pytest.FixtureRequest
) -> None:
    """The same with more of everything: a minute or two, and up to a gigabyte."""
    if not request.config.getoption("--chaos"):
        pytest.skip("only with --chaos")
    result = _search(Safeguards(), bounds, STATES_MAX_CHAOS)
    print(f"\n{result.states:,} states, {result.moves:,} moves, {result.quiet} quiet: {bounds}")
    assert result.violation is None, f"\n{result.violation}"
    assert result.is_exhausted


KINDS = """
An claims
An claims, the answer is lost
An compares its recovered outbox
An dies
An handles n
An publishes n
An publishes n, the answer is lost
An reads the record to claim it
An reads the record: fenced
An reads the record: its claim is stored
An reads the record: stored
An reads the record: unchanged, sends again
An sees a gap before n and reads the stream
An sends a commit
An sweeps
An takes live copy n
client sends n
client sends n, the receipt is lost
epoch n is assigned
epoch n is assigned while An lives, its right at an end
live copy n to An is lost
the claim of An is refused
the commit of An is late
the commit of An is lost
the commit of An is refused
the commit of An is stored
the commit of An is stored, the answer lost
the duplicate window passes
the late commit of An is stored
the mailbox is trimmed up to n for An
"""


def test_every_kind_of_move_occurs() -> None:
    """A protocol in which the hard cases can't come up would keep every promise."""
    kinds: set[str] = set()
    for bounds in (Bounds(signals=1, windows=1), Bounds(epochs=1)):
        protocol = Protocol(Safeguards(), bounds)

        def successors(world: World, protocol: Protocol = protocol) -> Iterator[Move[World]]:
            for move in protocol.successors(world):
                kinds.add(re.sub(r"\d+", "n", move.name))
                yield move

        explore(protocol.initial, successors, {}, {}, states_max=STATES_MAX)
    assert sorted(kinds) == KINDS.strip().splitlines()


class Removal(NamedTuple):
    """What goes wrong without a safeguard, and how soon."""

    safeguard: str
    violation: str
    steps: int
    needs: str
    """A move without which it could not have happened."""
    bounds: Bounds = TWO_SIGNALS


REMOVALS = [
    Removal("cas", STALE_COMMIT, 5, "A2 claims"),
    Removal("raise_epoch", TWO_COMMITTERS, 5, "A2 claims"),
    Removal("epoch_check", STALE_COMMIT, 5, "A2 claims"),
    Removal("claim_rewrites", STALE_COMMIT, 9, "A2 runs"),
    Removal("one_record", TWICE, 12, "A1 stores the state and dies before the cursor"),
    Removal("outbox", LOST, 13, "A1 dies"),
    Removal("publish_after_commit", NO_CAUSE, 5, "A1 publishes 1"),
    Removal("recover_stored_only", NO_CAUSE, 14, "A2 compares its recovered outbox"),
    Removal("outbox_in_order", ORDER, 10, "A1 publishes 2"),
    Removal("dedupe_ids", TWICE, 8, "A1 publishes 1, the answer is lost"),
    Removal("search_late", TWICE, 13, "the duplicate window passes", LATE_RECOVERY),
    Removal("outbox_since", TWICE, 14, "the duplicate window passes", THREE_EPOCHS),
    Removal("resolve_unknown", NO_CAUSE, 8, "the commit of A1 is lost"),
    Removal("gap_rule", LOST, 9, "live copy 1 to A1 is lost"),
    Removal("sweep", LOST, 6, "live copy 2 to A1 is lost"),
    Removal("trim_behind_cursor", LOST, 8, "the mailbox is trimmed up to 2 for A1"),
    Removal("validity", STALE_ANSWER, 10, "the commit of A2 is stored"),
    Removal("reply_after_commit", UNBACKED_ANSWER, 5, "A1 handles 1"),
]


def test_every_safeguard_is_put_to_the_test() -> None:
    """A safeguard that is added to the model can't be forgotten here."""
    assert [removal.safeguard for removal in REMOVALS] == [f.name for f in fields(Safeguards)]


@pytest.mark.parametrize("removal", REMOVALS, ids=[removal.safeguard for removal in REMOVALS])
def test_without_any_one_safeguard_a_promise_breaks(removal: Removal) -> None:
    """The rest does not make up for it; the shortest story is the one that we expect."""
    safeguards = replace(Safeguards(), **{removal.safeguard: False})
    violation = _search(safeguards, removal.bounds).violation
    assert violation is not None, f"{removal.safeguard} is not needed within {removal.bounds}"
    assert violation.name == removal.violation, f"\n{violation}"
    assert len(violation.trace) == removal.steps, f"\n{violation}"
    assert removal.needs in violation.trace, f"\n{violation}"


@pytest.mark.parametrize(("late", "steps"), [(Late.RETRY, 9), (Late.ZOMBIE, 10), (Late.COMMIT, 17)])
def test_what_outlasts_the_duplicate_window_is_published_twice(late: Late, steps: int) -> None:
    """Known limits of exactly once: nothing looks for earlier copies but a recovery, once."""
    violation = _search(Safeguards(), Bounds(losses=0, windows=1, late=late)).violation
    assert violation is not None, f"{late} is safe now: make it a safeguard"
    assert violation.name == TWICE, f"\n{violation}"
    assert len(violation.trace) == steps, f"\n{violation}"
    assert "the duplicate window passes" in violation.trace
