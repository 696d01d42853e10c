"""Chooses a node for each of many agents in one pass: filter, then rank; or says per node why none will do.

Pure; randomness comes in as an argument. Decisions of a pass count at once, so
that a burst spreads evenly and a node's declared capacity is never exceeded,
and cost O(log nodes) each: agents with equal demands share one heap.

There is no fallback to a node that doesn't qualify. Two soft rules only order
the qualified: overloaded nodes (memory at 95 % or more) come last, and
``placement.spread`` puts label values with fewer replicas first.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from foundation_nats.cluster.view import NodeView
from foundation_nats.placement.constraints import Usage, full, is_overloaded, needs, unfit
from foundation_nats.placement.strategies import (
    STRATEGIES,
    Ring,
    Strategy,
    base_pressure,
    match_rank,
    pressure,
)
from foundation_schemas import AgentSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """One agent that needs a node."""

    agent: str
    spec: AgentSpec
    group: str | None = None
    """Its deployment, for spreading."""
    prefer: str | None = None
    """Taken whatever the strategy says, if it qualifies and has room."""
    only: str | None = None
    """No other node will do."""


@dataclass(frozen=True, slots=True)
class Placement:
    """This node it is."""

    node: str


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No node qualifies; `reasons` has one for each node."""

    reasons: Mapping[str, str]

    def text(self) -> str:
        """The reasons as one line for people; equal for equal reasons."""
        if not self.reasons:
            return "no node is known"
        by_reason: dict[str, list[str]] = {}
        for node in sorted(self.reasons):
            by_reason.setdefault(self.reasons[node], []).append(node)
        return "; ".join(f"{', '.join(nodes)} {reason}" for reason, nodes in by_reason.items())


Rank = tuple[float, ...]


@dataclass(slots=True)
class _Class:
    """All agents with equal demands: one list of candidates."""

    spec: AgentSpec
    strategy: Strategy
    group: str | None
    needed: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the nodes that are out are out; a node that is full stays so for the pass."""
    fit: dict[str, float] = field(default_factory=dict)
    """Nodes still in, to their base pressure."""
    heap: list[tuple[Rank, str]] = field(default_factory=list)
    zones: dict[str, int] | None = None
    """Replicas of the group per value of the spread label; shared by classes of one group."""
    ring: Ring | None = None


class Placer:
    """One pass of placing."""

    def __init__(
        self,
        nodes: Mapping[str, NodeView],
        used: Mapping[str, Usage],
        leader: str | None,
        rng: random.Random,
    ) -> None:
        self._nodes = nodes
        self._used = {name: used[name].copy() if name in used else Usage() for name in nodes}
        self._leader = leader
        self._rng = rng
        self._late = {name for name, node in nodes.items() if is_overloaded(node)}
        self._classes: dict[object, _Class] = {}
        self._keys: dict[int, tuple[AgentSpec, tuple[object, ...]]] = {}
        self._zones: dict[tuple[str, str], dict[str, int]] = {}

    def place(self, wanted: Wanted) -> Placement | Unplaceable:
        """Choose a node and count the agent on it."""
        kind = self._class(wanted)
        if kind is None:
            reason = f"can't be ranked: no strategy {wanted.spec.placement.strategy!r}"
            return Unplaceable(dict.fromkeys(self._nodes, reason))
        if wanted.only is not None:
            if self._has_room(kind, wanted.only):
                return self._take(kind, wanted.only)
            return Unplaceable({wanted.only: kind.reasons.get(wanted.only, "is not known")})
        if wanted.prefer is not None and self._has_room(kind, wanted.prefer):
            return self._take(kind, wanted.prefer)
        chosen = self._choose(kind, wanted.agent)
        return Unplaceable(kind.reasons) if chosen is None else self._take(kind, chosen)

    def _class(self, wanted: Wanted) -> _Class | None:
        spec, policy = wanted.spec, wanted.spec.placement
        # Holding the spec keeps its id from being reused within the pass.
        known = self._keys.get(id(spec))
        if known is None:
            known = self._keys[id(spec)] = (
                spec,
                (
                    policy.strategy,
                    tuple(policy.require),
                    tuple(policy.prefer),
                    tuple(policy.labels.items()),
                    policy.spread,
                    tuple(spec.resources.items()),
                ),
            )
        grouped = policy.spread is not None or policy.strategy == Strategy.SPREAD
        key = (known[1], wanted.group) if grouped else known[1]
        kind = self._classes.get(key)
        if kind is None and policy.strategy in STRATEGIES:
            group = wanted.group if grouped else None
            kind = self._classes[key] = self._open(spec, Strategy(policy.strategy), group)
        return kind

    def _open(self, spec: AgentSpec, strategy: Strategy, group: str | None) -> _Class:
        kind = _Class(spec, strategy, group, needs(spec))
        for name, node in self._nodes.items():
            reason = unfit(spec, node)
            if reason is None and strategy is Strategy.LEADER_ONLY and name != self._leader:
                reason = "is not the leader's node"
            if reason is None:
                kind.fit[name] = base_pressure(spec, node)
            else:
                kind.reasons[name] = reason
        label = spec.placement.spread
        if label is not None and group is not None:
            kind.zones = self._zones.get((group, label))
            if kind.zones is None:
                kind.zones = self._zones[(group, label)] = {}
                for name, node in self._nodes.items():
                    value = node.record.labels.get(label, "")
                    count = self._used[name].groups.get(group, 0)
                    kind.zones[value] = kind.zones.get(value, 0) + count
        if strategy is Strategy.CONSISTENT_HASH:
            kind.ring = Ring({name: self._nodes[name] for name in kind.fit})
        elif strategy not in (Strategy.RANDOM, Strategy.PACK):
            kind.heap = [(self._rank(kind, name), name) for name in kind.fit]
            heapq.heapify(kind.heap)
        return kind

    def _has_room(self, kind: _Class, name: str) -> bool:
        if name not in kind.fit:
            return False
        reason = full(kind.needed, self._nodes[name], self._used[name])
        if reason is None:
            return True
        del kind.fit[name]
        kind.reasons[name] = reason
        return False

    def _take(self, kind: _Class, name: str) -> Placement:
        usage = self._used[name]
        usage.agents += 1
        for resource, amount in kind.needed.items():
            usage.resources[resource] = usage.resources.get(resource, 0.0) + amount
        if kind.group is not None:
            usage.groups[kind.group] = usage.groups.get(kind.group, 0) + 1
            if kind.zones is not None:
                value = self._nodes[name].record.labels.get(kind.spec.placement.spread or "", "")
                kind.zones[value] = kind.zones.get(value, 0) + 1
        return Placement(name)

    def _rank(self, kind: _Class, name: str) -> Rank:
        node, usage = self._nodes[name], self._used[name]
        press = pressure(kind.fit[name], node, usage)
        late = 1.0 if name in self._late else 0.0
        zone = 0.0
        if kind.zones is not None:
            zone = kind.zones.get(node.record.labels.get(kind.spec.placement.spread or "", ""), 0)
        if kind.strategy is Strategy.CAPABILITY_MATCHED:
            return (late, zone, *match_rank(kind.spec, node), press)
        if kind.strategy is Strategy.SPREAD:
            return (late, zone, usage.groups.get(kind.group or "", 0), press)
        if kind.strategy is Strategy.PACK:
            return (late, zone, -press)
        return (late, zone, press)

    def _choose(self, kind: _Class, agent: str) -> str | None:
        match kind.strategy:
            case Strategy.RANDOM:
                return self._first_with_room(kind, self._shuffled(kind))
            case Strategy.CONSISTENT_HASH:
                assert kind.ring is not None
                order = list(kind.ring.walk(agent))
                return self._first_with_room(kind, self._late_last(order))
            case Strategy.PACK:
                # Its ranks improve as nodes fill up, so that a heap would be out of date.
                while kind.fit:
                    best = min(kind.fit, key=lambda name: (self._rank(kind, name), name))
                    if self._has_room(kind, best):
                        return best
                return None
            case Strategy.LOCAL_PREFERRED:
                leader = self._leader
                if leader and leader not in self._late and self._has_room(kind, leader):
                    return leader
        return self._top(kind)

    def _top(self, kind: _Class) -> str | None:
        heap = kind.heap
        while heap:
            rank, name = heap[0]
            if not self._has_room(kind, name):
                heapq.heappop(heap)
                continue
            now = self._rank(kind, name)
            if now == rank:
                return name
            heapq.heapreplace(heap, (now, name))
        return None

    def _shuffled(self, kind: _Class) -> list[str]:
        order = sorted(kind.fit)
        self._rng.shuffle(order)
        return self._late_last(order)

    def _late_last(self, order: list[str]) -> list[str]:
        return sorted(order, key=self._late.__contains__) if self._late else order

    def _first_with_room(self, kind: _Class, order: Iterable[str]) -> str | None:
        return next((name for name in order if self._has_room(kind, name)), None)


def place(
    specs: Iterable[Wanted],
    nodes: Mapping[str, NodeView],
    used: Mapping[str, Usage],
    leader: str | None,
    rng: random.Random,
) -> list[Placement | Unplaceable]:
    """Choose a node for each of *specs*, in order; earlier choices count for later ones."""
    placer = Placer(nodes, used, leader, rng)
    return [placer.place(wanted) for wanted in specs]
