"""Cuts a failing story down to the events that it needs to break the same invariant, and stores it.

Pure, but for `save`, `keep_failing` and `load`. Dropping an event shifts every later roll of the
dice, so a shorter story is also tried under a few other seeds; what is found is
a story that fails by itself, not a part of the first run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.simulation.story import Story
from tests.simulation.world import Bug, Invariant, ViolationError, broken, run

STORIES = Path(__file__).parent / "stories"
_SEEDS = 8
_KEEP_RUNS_MAX = 500


@dataclass(frozen=True, slots=True)
class Minimised:
    """A story that breaks an invariant and from which nothing more could be left out."""

    story: Story
    error: ViolationError
    runs: int


def _simpler(story: Story) -> Iterator[Story]:
    """Stories with a little less in them, the boldest first."""
    faults = story.faults
    size = len(faults)
    chunk = size // 2
    while chunk >= 1:
        for start in range(0, size, chunk):
            yield replace(story, faults=faults[:start] + faults[start + chunk :])
        chunk //= 2
    if story.nodes > 3:
        names = set(story.names[:-1])
        kept = tuple(
            item
            for item in faults
            if {item.node, item.other} <= names | {"", *(wish.name for wish in story.wishes)}
        )
        yield replace(story, nodes=story.nodes - 1, faults=kept)
    if len(story.wishes) > 1:
        used = {item.node for item in faults}
        for wish in story.wishes:
            if wish.name not in used:
                yield replace(story, wishes=tuple(w for w in story.wishes if w is not wish))
    for change in (
        {"core_loss": 0.0},
        {"repeats": 0.0},
        {"kv_loss": 0.0},
        {"late_s": 0.02},
        {"watch_late_s": 0.05},
    ):
        calmer = replace(story, **change)  # type: ignore[arg-type]
        if calmer != story:
            yield calmer


def minimise(
    story: Story,
    invariant: Invariant,
    *,
    missing: frozenset[Bug] = frozenset(),
    runs_max: int = 2_000,
) -> Minimised:
    """The smallest story found that breaks *invariant*.

    Raises:
        ValueError: the story doesn't break it.
    """
    error = broken(story, missing=missing)
    if error is None or error.invariant is not invariant:
        raise ValueError(f"seed {story.seed} does not break {invariant.value!r}")
    runs = 1
    again = True
    while again and runs < runs_max:
        again = False
        for simpler in _simpler(story):
            for shift in range(_SEEDS):
                candidate = replace(simpler, seed=story.seed + shift)
                found = broken(candidate, missing=missing)
                runs += 1
                if found is not None and found.invariant is invariant:
                    story, error, again = candidate, found, True
                    break
            if again or runs >= runs_max:
                break
    return Minimised(story, error, runs)


def save(name: str, story: Story, note: str, *, folder: Path = STORIES) -> Path:
    """Store *story* to be told again, and beside it, for people, what it is about."""
    path = folder / f"{name}.json"
    path.write_text(story.to_json() + "\n")
    path.with_suffix(".txt").write_text(f"{note}\n\n{story.text()}\n")
    return path


def keep_failing(
    story: Story, error: ViolationError, *, missing: frozenset[Bug] = frozenset()
) -> Path:
    """Store a failing story, cut down as far as a minute allows, in a folder that nobody deletes."""
    found = minimise(story, error.invariant, missing=missing, runs_max=_KEEP_RUNS_MAX)
    folder = Path(tempfile.mkdtemp(prefix="foundation-simulation-"))
    without = tuple(sorted(bug.name for bug in missing))
    note = f"Cut down from seed {story.seed}, where it was:\n{error}\nhere:\n{found.error}"
    return save(f"seed-{story.seed}", replace(found.story, without=without), note, folder=folder)


def load(path: Path) -> Story:
    """A stored story."""
    return Story.from_json(path.read_text())


def transcript(story: Story, *, missing: frozenset[Bug] = frozenset(), lines_max: int = 40) -> str:
    """The last steps of a run, for people."""
    lines: list[str] = []
    try:
        run(story, missing=missing, trace=lines.append)
    except ViolationError as error:
        lines.append(f"BROKEN {error}")
    return "\n".join(lines[-lines_max:])
