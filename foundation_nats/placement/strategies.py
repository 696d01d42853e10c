"""Which of the nodes that qualify is best: one ranking per strategy, lower is better.

Pure, except that `find_custom` and `known_strategies` look at the installed
packages, once per process. The score of `load_balanced` is in `placement.score`.

Packages add strategies by an entry point of the group ``foundation_nats.placement``,
whose object is a `PlacementStrategy`, a class that makes one without arguments,
or a plain function. What is built in can't be replaced. A strategy that can't
be loaded, raises, or answers anything but a tuple of numbers places nothing:
its agents are pending with that reason, and the leader goes on.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol

from foundation_nats.cluster.view import NodeView
from foundation_nats.errors import PlacementError
from foundation_nats.placement.constraints import Usage
from foundation_nats.placement.score import LoadSteps
from foundation_schemas import AgentSpec

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "foundation_nats.placement"
"""The entry points' group."""

_POINTS = 64


class Strategy(StrEnum):
    """How to choose among the nodes that qualify."""

    LOAD_BALANCED = "load_balanced"
    """The least pressure."""
    CAPABILITY_MATCHED = "capability_matched"
    """The most preferred capabilities, then the fewest others, then the least pressure."""
    LEADER_ONLY = "leader_only"
    """The leader's node at the time of placing, or none."""
    RANDOM = "random"
    """Any, each as likely."""
    LOCAL_PREFERRED = "local_preferred"
    """Where it ran last, else the leader's node, else the least pressure."""
    SPREAD = "spread"
    """The fewest agents of its deployment, then the least pressure."""
    PACK = "pack"
    """The fullest node that has room."""
    CONSISTENT_HASH = "consistent_hash"
    """By the agent's id on a ring of nodes: it moves only when its own node comes or goes."""


STRATEGIES = tuple(strategy.value for strategy in Strategy)


def match_rank(spec: AgentSpec, node: NodeView) -> tuple[int, int]:
    """For `capability_matched`: a closer match is lower, and a specialist is kept free."""
    offered = set(node.record.capabilities)
    wanted = {*spec.placement.require, *spec.placement.prefer}
    return (-len(offered.intersection(spec.placement.prefer)), len(offered - wanted))


Rank = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RankContext:
    """What else a strategy may want to know about a node."""

    group: str | None
    """The deployment."""
    replicas: int
    """How many of it the node holds."""
    leader: str | None
    """The leader's node."""
    load: LoadSteps
    """The node's load as it counts, without the noise of heartbeats."""
    pressure: float
    """The score of `load_balanced`."""


class PlacementStrategy(Protocol):
    """A user's way to choose among the nodes that qualify.

    `rank` must be pure: the same arguments give the same answer, and nothing
    that it is given may be changed. It is asked again for a node whenever the
    node got an agent, and about nodes only: it can't tell agents of one
    deployment apart.
    """

    def rank(
        self, spec: AgentSpec, node: NodeView, usage: Usage, context: RankContext
    ) -> tuple[float, ...]:
        """How good *node* is for one more agent of *spec*: the least tuple wins, then the name."""
        ...


@dataclass(frozen=True, slots=True)
class Custom:
    """A strategy of another package, or why it can't be used."""

    name: str
    rank: Callable[[AgentSpec, NodeView, Usage, RankContext], tuple[float, ...]] | None
    error: str | None = None


class CustomError(Exception):
    """A strategy of another package failed; the text says how."""


@cache
def _installed() -> dict[str, EntryPoint]:
    # Here, because most processes never ask, and it takes a while to import.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def find_custom(name: str) -> Custom | None:
    """The strategy of this name that an installed package brings; None if none does."""
    point = None if name in STRATEGIES else _installed().get(name)
    if point is None:
        return None
    try:
        found = point.load()
        if isinstance(found, type):
            found = found()
    except Exception as error:  # whatever a foreign module does when it is imported
        return Custom(name, None, f"can't be loaded: {type(error).__name__}: {error}")
    rank = getattr(found, "rank", found)
    if not callable(rank):
        return Custom(name, None, f"can't be used: {point.value} has no rank()")
    return Custom(name, rank)


def known_strategies() -> tuple[str, ...]:
    """The names of all strategies that can be used here."""
    return (*STRATEGIES, *sorted(set(_installed()) - set(STRATEGIES)))


def check_strategy(name: str, owner: str) -> None:
    """Refuse a strategy that nobody knows here, for the deployment *owner*.

    Raises:
        PlacementError: lists the known ones and names the nearest.
    """
    if name in STRATEGIES or name in (known := known_strategies()):
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise PlacementError(
        f"{owner}: there is no placement strategy {name!r}; known are {', '.join(known)}.",
        hint=f"Did you mean {near[0]!r}?"
        if near
        else f"Install the package that brings it (entry points {GROUP}), here and on the nodes.",
        strategy=name,
    )


def custom_rank(
    custom: Custom, spec: AgentSpec, node: NodeView, usage: Usage, context: RankContext
) -> Rank:
    """Ask a user's strategy.

    Raises:
        CustomError: it can't be used, raised, or answered nonsense.
    """
    if custom.rank is None:
        raise CustomError(custom.error)
    try:
        found = custom.rank(spec, node, usage, context)
    except Exception as error:  # a foreign strategy must not stop the leader
        raise CustomError(f"failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, tuple) or not all(
        isinstance(part, int | float) and math.isfinite(part) for part in found
    ):
        raise CustomError(f"answered {str(found)[:60]}, not a tuple of numbers")
    return found


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=4096)
def _points(name: str) -> tuple[int, ...]:
    return tuple(_point(f"{name}#{i}") for i in range(_POINTS))


class Ring:
    """A consistent-hash ring of node names."""

    def __init__(self, nodes: Iterable[str]) -> None:
        points = sorted((point, name) for name in nodes for point in _points(name))
        self._points = [point for point, _ in points]
        self._names = [name for _, name in points]
        self._size = len(points) // _POINTS

    def walk(self, agent: str) -> Iterator[str]:
        """The nodes in the order in which *agent* prefers them, each once."""
        names, seen = self._names, set[str]()
        start = bisect_left(self._points, _point(agent))
        for index in range(start, start + len(names)):
            name = names[index % len(names)]
            if name not in seen:
                yield name
                seen.add(name)
                if len(seen) == self._size:
                    return
