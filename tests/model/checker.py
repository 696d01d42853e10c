"""`explore`: breadth-first search through every interleaving of a small model.

Pure. A model is a hashable initial state and a function that gives the moves
possible in a state. What is found is a shortest story: no violation is
reachable in fewer moves. What is exhausted holds for every interleaving
within the model's bounds, and for nothing beyond them.

A state is *quiet* when only faults can move it on: whatever the protocol had
to do is done, and faults need not come. Final conditions are checked there
(and only there), so a story that could go on by itself is not judged early.
When all is exhausted it is also checked that every state can settle: that some
way leads from it to a quiet state without a further fault. So a protocol that
runs in circles does not pass for want of quiet states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)

UNSETTLED = "never settles"
"""The violation that no condition names: from here only faults could lead to a quiet state."""


class Move(NamedTuple, Generic[S]):
    """One atomic step of the model."""

    name: str
    after: S
    is_fault: bool = False
    """Something that may happen but need not: a crash, a loss, a delay."""


@dataclass(frozen=True, slots=True)
class Violation(Generic[S]):
    """A broken condition and a shortest way to it."""

    name: str
    trace: tuple[str, ...]
    state: S

    def __str__(self) -> str:
        steps = "\n".join(f"  {number:2}. {step}" for number, step in enumerate(self.trace, 1))
        return f"{self.name}, after {len(self.trace)} steps:\n{steps}\n  {self.state}"


@dataclass(frozen=True, slots=True)
class Result(Generic[S]):
    """What a search found."""

    states: int
    """Distinct states reached."""
    moves: int
    """Moves taken, those to known states included."""
    quiet: int
    """States in which nothing but a fault can happen."""
    depth: int
    """Length of the longest of the shortest ways to a state."""
    is_exhausted: bool
    """Every reachable state was seen."""
    violation: Violation[S] | None


def explore(
    initial: S,
    successors: Callable[[S], Iterable[Move[S]]],
    invariants: Mapping[str, Callable[[S], bool]],
    final: Mapping[str, Callable[[S], bool]],
    *,
    states_max: int,
) -> Result[S]:
    """Search every reachable state, nearest first, until a condition is broken.

    Args:
        initial: where every story begins.
        successors: the moves out of a state; it must give the same ones each time.
        invariants: conditions of every state, by name; True means that it holds.
        final: conditions of every quiet state, by name.
        states_max: give up, unexhausted, at this many distinct states.
    """
    parents: dict[S, tuple[S, str] | None] = {initial: None}
    before: dict[S, list[S]] = {}  # by moves that are no faults
    settled: list[S] = []
    moves = depth = 0

    def result(name: str | None, at: S, *, is_exhausted: bool) -> Result[S]:
        violation = None if name is None else Violation(name, _trace(parents, at), at)
        return Result(len(parents), moves, len(settled), depth, is_exhausted, violation)

    broken = _broken(invariants, initial)
    if broken is not None:
        return result(broken, initial, is_exhausted=False)
    layer = [initial]
    while layer:
        following: list[S] = []
        for state in layer:
            is_quiet = True
            for name, after, is_fault in successors(state):
                moves += 1
                if not is_fault:
                    is_quiet = False
                    before.setdefault(after, []).append(state)
                if after in parents:
                    continue
                parents[after] = (state, name)
                broken = _broken(invariants, after)
                if broken is not None:
                    depth += 1
                    return result(broken, after, is_exhausted=False)
                if len(parents) >= states_max:
                    return result(None, after, is_exhausted=False)
                following.append(after)
            if is_quiet:
                settled.append(state)
                broken = _broken(final, state)
                if broken is not None:
                    return result(broken, state, is_exhausted=False)
        if following:
            depth += 1
        layer = following
    restless = _first_restless(parents, before, settled)
    if restless is not None:
        return result(UNSETTLED, restless, is_exhausted=True)
    return result(None, initial, is_exhausted=True)


def _first_restless(states: Iterable[S], before: Mapping[S, list[S]], settled: list[S]) -> S | None:
    """The nearest state from which no quiet one can be reached without a fault."""
    reached = set(settled)
    open_ = list(settled)
    while open_:
        for state in before.get(open_.pop(), ()):
            if state not in reached:
                reached.add(state)
                open_.append(state)
    return next((state for state in states if state not in reached), None)


def _broken(conditions: Mapping[str, Callable[[S], bool]], state: S) -> str | None:
    for name, holds in conditions.items():
        if not holds(state):
            return name
    return None


def _trace(parents: Mapping[S, tuple[S, str] | None], state: S) -> tuple[str, ...]:
    steps = []
    link = parents[state]
    while link is not None:
        state, name = link
        steps.append(name)
        link = parents[state]
    return tuple(reversed(steps))
