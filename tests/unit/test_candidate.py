"""The candidate's stories (``scripts/candidate_*.txt``), and a race of two over a model of the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.consensus.candidate import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Candidate,
    Doubt,
    Effect,
    Event,
    HolderBack,
    HolderGone,
    LeaseSeen,
    LeaseVacant,
    LostLeadership,
    ReadLease,
    Release,
    Renew,
    RenewResult,
    Resign,
    Role,
    Tick,
)
from foundation_nats.testing.scripts import Command, ScriptError, run_script
from tests.unit.lease_model import Race

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("candidate_*.txt"))


class _Even(Random):
    """No jitter: the middle of every range."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class _Player:
    """Plays a script's commands on node ``me``, incarnation 1; ``new`` begins another story."""

    def __init__(self) -> None:
        self._begin({})

    def _begin(self, options: dict[str, float]) -> None:
        self.candidate = Candidate("me", 1, random=_Even(), **options)  # type: ignore[arg-type]
        self.now = 0.0

    def perform(self, command: Command) -> Iterator[str]:
        if command.name == "new":
            self._begin({key: float(value) for key, value in command.options.items()})
            yield "ok"
            return
        now = command.number("t")
        assert now >= self.now, "time runs forwards"
        self.now = now
        for effect in self.candidate.step(_event(command), now):
            yield _show(effect)
        due = self.candidate.deadline()
        yield f"{self.candidate.role}, next: {'never' if due is None else f'{due:g}'}"


def _event(command: Command) -> Event:
    def number(key: str) -> int:
        return int(command.number(key, 0))

    match command.name:
        case "seen":
            holder, _, incarnation = command.argument().partition("@")
            return LeaseSeen(holder, int(incarnation), number("term"), number("rev"))
        case "vacant":
            return LeaseVacant(number("rev"))
        case "gone":
            holder, _, incarnation = command.argument().partition("@")
            return HolderGone(holder, int(incarnation))
        case "acquired":
            ok = {"yes": True, "no": False, "unknown": None}[command.argument(1)]
            attempt = int(command.argument().removeprefix("#"))
            return AcquireResult(attempt, ok, number("term"), number("rev"))
        case "renewed":
            attempt = int(command.argument().removeprefix("#"))
            match command.argument(1):
                case "ok" | "lost" | "unknown" as outcome:
                    return RenewResult(attempt, outcome, number("rev"))
                case other:
                    raise ScriptError(f"{other!r} is no outcome")
        case "back":
            holder, _, incarnation = command.argument().partition("@")
            return HolderBack(holder, int(incarnation))
        case "doubt":
            return Doubt()
        case "resign":
            return Resign()
        case "tick":
            return Tick()
        case other:
            raise ScriptError(f"unknown command {other!r}")


def _show(effect: Effect) -> str:
    match effect:
        case Acquire(attempt, expected, term):
            return f"acquire #{attempt} term {term} over {expected}"
        case Renew(attempt, expected, term):
            return f"renew #{attempt} term {term} over {expected}"
        case Release(expected, term):
            return f"release term {term} over {expected}"
        case ReadLease():
            return "read the lease"
        case BecameLeader(term):
            return f"leads in term {term}"
        case LostLeadership(term, reason):
            return f"leads no more in term {term}: {reason}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_stories_end_as_told(script: Path) -> None:
    """Each transcript is played and compared."""
    run_script(script, _Player().perform)


def test_there_are_stories() -> None:
    """A glob that finds nothing would pass for ever."""
    assert len(SCRIPTS) >= 3


def test_a_lease_shorter_than_its_margins_is_refused() -> None:
    """A leader must stop before its lease can end."""
    with pytest.raises(AssertionError):
        Candidate("me", 1, ttl_s=10.0, stop_after_s=10.0)


def test_the_memory_of_the_dead_is_bounded() -> None:
    """Nodes that come and go for ever don't fill it; the newest dead is never forgotten first."""
    candidate = Candidate("me", 1)
    for incarnation in range(1, 1000):
        candidate.step(HolderGone("other", incarnation), 0.0)
    assert len(candidate._gone) <= 64
    effects = candidate.step(LeaseSeen("other", 999, 4, 7), 0.0)
    assert effects == [Acquire(1, 7, 5)]


def test_the_jitter_comes_from_the_random_that_was_given() -> None:
    """The same seed gives the same story, another seed another one."""

    def deadline(seed: int) -> float | None:
        candidate = Candidate("me", 1, random=Random(seed))
        candidate.step(LeaseVacant(0), 0.0)
        candidate.step(AcquireResult(1, False, 0, 0), 0.1)
        return candidate.deadline()

    assert deadline(1) == deadline(1) != deadline(2)


_SEEDS = st.integers(0, 2**32 - 1)
_FAULTS = st.sampled_from([0.0, 0.05, 0.3])


@settings(max_examples=150, deadline=None)
@given(seed=_SEEDS, loss=_FAULTS, is_early=st.booleans())
def test_no_term_is_led_by_two(seed: int, loss: float, is_early: bool) -> None:
    """Over lost, late and repeated answers, lagging watches, wrong death notices and restarts."""
    race = Race(Random(seed), loss=loss, takes_over_early=is_early)
    race.run(120.0)
    for term, leaders in race.leaders_of_term.items():
        assert len(leaders) == 1, f"seed {seed}: term {term} was led by {leaders}"


@settings(max_examples=100, deadline=None)
@given(seed=_SEEDS, loss=_FAULTS)
def test_without_early_take_over_there_is_one_leader_at_a_time(seed: int, loss: float) -> None:
    """Time alone separates them: one stops before the lease can end."""
    race = Race(Random(seed), loss=loss, takes_over_early=False)
    race.run(120.0)
    assert race.leaders_at_once_max <= 1, f"seed {seed}"


@settings(max_examples=100, deadline=None)
@given(seed=_SEEDS, is_early=st.booleans())
def test_after_any_trouble_there_is_a_leader_again(seed: int, is_early: bool) -> None:
    """When answers come again, so does exactly one leader, and it stays."""
    race = Race(Random(seed), loss=0.5, takes_over_early=is_early)
    race.run(60.0)
    race.calm()
    race.run(40.0)
    leaders = [name for name, one in race.candidates.items() if one.role is Role.LEADER]
    assert len(leaders) == 1, f"seed {seed}"
    changes = race.changes
    race.run(30.0)
    assert race.changes == changes, f"seed {seed}"


def test_the_race_is_a_race() -> None:
    """A model in which nothing happens proves nothing: it must see take-overs and losses."""
    races = [Race(Random(seed), loss=0.3, takes_over_early=True) for seed in range(20)]
    for race in races:
        race.run(120.0)
    assert sum(len(race.leaders_of_term) for race in races) > 60
    assert sum(race.lost_messages for race in races) > 200
    assert max(race.leaders_at_once_max for race in races) == 2


def test_the_shell_can_ask_who_leads_and_since_when() -> None:
    """The age of a leadership counts from when its last good write was sent, not answered."""
    candidate = Candidate("me", 1)
    candidate.step(LeaseVacant(0), 5.0)
    assert not candidate.is_leader
    candidate.step(AcquireResult(1, True, 1, 1), 6.0)
    assert candidate.is_leader
    assert candidate.renewed_at == 5.0
