"""Hundreds of small clusters under faults in simulated time; every failing seed can be told again.

``pytest tests/simulation --seed N`` begins with seed N (and tells only that one);
``--chaos`` tells many thousands. ``python -m tests.simulation N`` prints a run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.minimise import (
    STORIES,
    keep_failing,
    load,
    minimise,
    save,
    transcript,
)
from tests.simulation.story import Kind, Story, generate
from tests.simulation.world import Bug, Invariant, Report, ViolationError, World, broken, run

_SEEDS = 300
_CHAOS_SEEDS = 20_000
_STORIES = sorted(STORIES.glob("*.json"))
_STILL_BREAKING = [path for path in _STORIES if load(path).without]
"""The others ended badly once, and now end well whatever single safeguard is missing."""


def _told(story: Story) -> Report:
    """Tell a story; a failure says how to repeat it."""
    try:
        return run(story)
    except ViolationError as error:
        kept = keep_failing(story, error)
        pytest.fail(
            f"seed {story.seed} breaks an invariant: {error}\n"
            f"cut down and kept: {kept} (move it to {STORIES} to repeat it on every run)\n"
            f"see it with: python -m tests.simulation {kept}\n"
            f"repeat the whole with: pytest tests/simulation --seed {story.seed}\n\n"
            f"{load(kept).text()}\n\n{transcript(load(kept))}",
            pytrace=False,
        )


@pytest.mark.timeout(3600)
def test_every_invariant_holds_in_every_seed(request: pytest.FixtureRequest) -> None:
    """Leaders, epochs, rights to answer, verdicts, convergence: whatever befalls the cluster."""
    seed = request.config.getoption("--seed")
    count = _CHAOS_SEEDS if request.config.getoption("--chaos") else _SEEDS
    seeds = range(count) if seed is None else range(seed, seed + 1)
    began = time.perf_counter()
    reports = [_told(generate(seed)) for seed in seeds]
    took = time.perf_counter() - began
    total = Counter[str]()
    for report in reports:
        total["events"] += report.events
        total["leaders"] += report.leaders
        total["downs"] += report.downs
        total["claims"] += report.claims
        total["over capacity"] += len(report.over_capacity)
    sys.stdout.write(
        f"{len(reports)} seeds, {len(reports) / took * 60:.0f} a minute: {dict(total)}\n"
    )
    if seed is None:
        # A campaign in which little happened would prove little.
        assert total["downs"] > count / 10
        assert total["leaders"] > count
        assert total["claims"] > 5 * count
        assert any(report.leaders_at_once > 1 for report in reports)


@pytest.mark.parametrize("path", _STORIES, ids=lambda path: path.stem)
def test_stories_that_once_broke_an_invariant_end_well(path: Path) -> None:
    """Each was cut down from a failing seed; the text beside it says what was wrong."""
    _told(load(path))


@pytest.mark.parametrize("path", _STILL_BREAKING, ids=lambda path: path.stem)
def test_stories_still_break_what_they_once_broke_without_the_safeguard(path: Path) -> None:
    """A story that would end well without its safeguard proves nothing any more."""
    story = load(path)
    bugs = frozenset(Bug[name] for name in story.without)
    assert broken(story, missing=bugs) is not None
    _needs_all(story, bugs)


def _needs_all(story: Story, bugs: frozenset[Bug]) -> None:
    """With any one of the safeguards back in its place the story ends well."""
    for bug in bugs:
        error = broken(story, missing=bugs - {bug})
        assert error is None, f"{bug.name} makes no difference to seed {story.seed}: {error}"


def test_the_same_story_ends_the_same_way() -> None:
    """Nothing but the story and its seed decides."""
    for seed in (3, 17, 40):
        lines: list[list[str]] = [[], []]
        for told in lines:
            run(generate(seed), trace=told.append)
        assert lines[0] == lines[1]
        assert len(lines[0]) > 30


def test_a_calm_world_is_quiet() -> None:
    """Without faults there is one leader, one claim for each agent, and nobody is declared down."""
    for seed in range(10):
        calm = replace(generate(seed), faults=(), core_loss=0.0, repeats=0.0, kv_loss=0.0)
        report = run(replace(calm, late_s=0.02, watch_late_s=0.05))
        assert report.leaders == 1
        assert report.downs == 0
        assert report.claims == sum(wish.replicas or 1 for wish in calm.wishes)


_PLANTED = [
    (Invariant.ONE_ANSWERS, 80, {Bug.LONG_FENCE}),
    (Invariant.ONE_LEADER_PER_TERM, 0, {Bug.TRUSTS_REFUSED_LEASE}),
    (Invariant.ONE_NODE_PER_EPOCH, 0, {Bug.KEEPS_EPOCH}),
    (Invariant.ONE_NODE_PER_EPOCH, 915, {Bug.BLIND_WRITES}),
    (Invariant.EPOCHS_GROW, 330, {Bug.SKIPS_EPOCH_CHECK}),
    (Invariant.CONVERGES, 30, {Bug.RETURNS_AS_BEFORE}),
    (Invariant.ONE_ANSWERS, 375, {Bug.STOP_MISSES_CLAIM}),
    (Invariant.NO_SPINNING, 0, {Bug.SPINS}),
    (Invariant.NO_SLANDER, 0, {Bug.NO_PATIENCE}),
    (Invariant.CAPACITY, 0, {Bug.OVERBOOKS}),
    # One safeguard covers for the other: only without both it goes wrong soon.
    (Invariant.ONE_ANSWERS, 0, {Bug.ECHOES_FOR_EVER, Bug.RESTORES_UNREAD}),
    (Invariant.EPOCHS_GROW, 986, {Bug.LATE_MOVES, Bug.SKIPS_EPOCH_CHECK}),
]
"""What is noticed, from which seed on to look (to save time), and what is taken away."""


def test_every_safeguard_is_put_to_the_test() -> None:
    """By seeds, or, where luck would take too long, by a story that was kept; and every invariant."""
    by_seeds = {bug for _, _, bugs in _PLANTED for bug in bugs}
    by_stories = {Bug[name] for path in _STILL_BREAKING for name in load(path).without}
    assert by_seeds | by_stories == set(Bug)
    assert {invariant for invariant, _, _ in _PLANTED} == set(Invariant)


@pytest.mark.parametrize(
    ("invariant", "first", "bugs"),
    _PLANTED,
    ids=[min(bug.name for bug in bugs).lower() for _, _, bugs in _PLANTED],
)
def test_planted_bugs_are_found(invariant: Invariant, first: int, bugs: set[Bug]) -> None:
    """Each safeguard that is taken away is missed by a named invariant within a few hundred seeds."""
    for seed in range(first, first + 500):
        story = generate(seed)
        error = broken(story, missing=frozenset(bugs))
        if error is not None and error.invariant is invariant:
            _needs_all(story, frozenset(bugs))
            return
    pytest.fail(f"500 seeds went well without {', '.join(bugs)}")


def test_a_failing_story_is_cut_down_to_what_it_needs(tmp_path: Path) -> None:
    """The shortened story is smaller, breaks the same invariant, and survives being stored."""
    story = next(
        story
        for story in map(generate, range(100))
        if len(story.faults) >= 6
        and (error := broken(story, missing=frozenset({Bug.KEEPS_EPOCH}))) is not None
        and error.invariant is Invariant.ONE_NODE_PER_EPOCH
    )
    found = minimise(story, Invariant.ONE_NODE_PER_EPOCH, missing=frozenset({Bug.KEEPS_EPOCH}))
    assert len(found.story.faults) <= 2
    path = save("cut", found.story, "why it is kept", folder=tmp_path)
    assert load(path) == found.story
    error = broken(load(path), missing=frozenset({Bug.KEEPS_EPOCH}))
    assert error is not None
    assert error.invariant is Invariant.ONE_NODE_PER_EPOCH
    assert "why it is kept" in path.with_suffix(".txt").read_text()
    assert broken(found.story) is None


def test_a_failing_seed_is_kept_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut down, in a folder that outlives the run, with what it broke."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    missing = frozenset({Bug.KEEPS_EPOCH})
    story = next(s for s in map(generate, range(50)) if broken(s, missing=missing) is not None)
    error = broken(story, missing=missing)
    assert error is not None
    path = keep_failing(story, error, missing=missing)
    assert path.is_relative_to(tmp_path)
    assert len(load(path).faults) <= len(story.faults)
    again = broken(load(path), missing=missing)
    assert again is not None
    assert again.invariant is error.invariant
    assert f"seed {story.seed}" in path.with_suffix(".txt").read_text()


def test_a_story_that_ends_well_can_not_be_cut_down() -> None:
    """The minimiser says so instead of looping."""
    with pytest.raises(ValueError, match="does not break"):
        minimise(replace(generate(1), faults=()), Invariant.ONE_ANSWERS)


def test_stories_survive_being_stored() -> None:
    """What is read is what was written, for every kind of event."""
    seen: set[Kind] = set()
    for seed in range(60):
        story = generate(seed, pairs=True)
        seen.update(fault.kind for fault in story.faults)
        assert Story.from_json(story.to_json()) == story
    assert seen == set(Kind)


def test_a_broken_invariant_is_named_with_its_time() -> None:
    """The message says which promise, when, and whose."""
    error = next(
        error
        for seed in range(50)
        if (error := broken(generate(seed), missing=frozenset({Bug.TRUSTS_REFUSED_LEASE})))
        is not None
    )
    assert str(error).startswith("at ")
    assert error.invariant.value in str(error)


def test_a_world_can_be_told_step_by_step() -> None:
    """`World` is what `run` wraps; its report counts what happened."""
    report = World(generate(2)).run()
    assert report.passes > 0
    assert report.simulated_s >= generate(2).until
