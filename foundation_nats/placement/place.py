"""Chooses a node for each of many agents in one pass: filter, then rank; or says per node why none will do.

Pure; randomness comes in as an argument. Decisions of a pass count at once, so
that a burst spreads evenly and no limit is ever exceeded, and cost O(log nodes)
each: agents with equal demands share one queue of nodes, and each decision
ranks anew the one node that it changed.

There is no fallback to a node that doesn't qualify. Two soft rules only order
the qualified: overloaded nodes (memory at 95 % or more) and those that flap come last, and
``placement.spread`` puts label values with fewer replicas first; where its
skew is a must, it goes before the overload. `random` and `consistent_hash`
heed the must, but not the order.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from foundation_nats.cluster.view import NodeView
from foundation_nats.placement.constraints import (
    Tally,
    Usage,
    crowded,
    full,
    needs,
    skewed,
    unfit,
)
from foundation_nats.placement.score import LoadSteps, base_pressure, counted, pressure
from foundation_nats.placement.strategies import (
    STRATEGIES,
    Custom,
    CustomError,
    Rank,
    RankContext,
    Ring,
    Strategy,
    custom_rank,
    find_custom,
    match_rank,
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


@dataclass(slots=True)
class _Bucket:
    """Nodes of a class that differ in their own rank only."""

    late: bool
    value: str
    """Of the spread's label."""
    heap: list[tuple[Rank, str]] = field(default_factory=list)
    """An entry counts if it is what `_Class.ranks` says."""
    key: Rank | None = None
    """What counts among the entries of `_Class.order`; None: it is empty."""


@dataclass(slots=True)
class _Class:
    """All agents with equal demands: one queue of candidates."""

    spec: AgentSpec
    strategy: Strategy | Custom
    group: str | None
    needed: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the nodes that are out are out; a node that is full stays so for the pass."""
    fit: dict[str, float] = field(default_factory=dict)
    """Nodes still in, to their base pressure."""
    buckets: list[_Bucket] = field(default_factory=list)
    home: dict[str, _Bucket] = field(default_factory=dict)
    by_value: dict[str, list[int]] = field(default_factory=dict)
    """Which buckets a change of a label value's count concerns."""
    order: list[tuple[Rank, str, int]] = field(default_factory=list)
    """Buckets by key; only if there are several."""
    ranks: dict[str, Rank] = field(default_factory=dict)
    matches: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: int = 0
    """How much of the placer's log is in the ranks."""
    counts: dict[str, int] | None = None
    """Replicas of the group per value of the spread's label."""
    values: dict[str, str] = field(default_factory=dict)
    """Node to its value of that label."""
    open_values: frozenset[str] = frozenset()
    """Of the nodes that qualify, room aside."""
    is_strict: bool = False
    """The skew is a must."""
    is_crowded: bool = False
    """The number of replicas per node or label value is limited."""
    shuffled: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    refused: tuple[int, Unplaceable] | None = None


class Placer:
    """One pass of placing."""

    def __init__(
        self,
        nodes: Mapping[str, NodeView],
        used: Mapping[str, Usage],
        leader: str | None,
        rng: random.Random,
        *,
        loads: Mapping[str, LoadSteps] | None = None,
    ) -> None:
        """Begin a pass.

        Args:
            loads: how the nodes' load counts; without it, as reported now, in steps.
        """
        self._nodes = nodes
        self._tally = Tally(nodes, used)
        self._leader = leader
        self._rng = rng
        self._loads = {
            name: found if loads and (found := loads.get(name)) else counted(node)
            for name, node in nodes.items()
        }
        self._late = {
            name for name, steps in self._loads.items() if steps.overloaded or nodes[name].flaps
        }
        self._classes: dict[object, _Class] = {}
        self._asked: dict[tuple[int, str | None], tuple[AgentSpec, _Class | None]] = {}
        self._answers = {name: Placement(name) for name in nodes}
        self._log: list[str] = []
        """The nodes that got an agent, in order."""
        self._ring: Ring | None = None

    def place(self, wanted: Wanted) -> Placement | Unplaceable:
        """Choose a node and count the agent on it.

        Equal refusals in a row are one and the same object.
        """
        kind = self._class(wanted)
        if kind is None:
            reason = f"can't be ranked: no strategy {wanted.spec.placement.strategy!r}"
            return Unplaceable(dict.fromkeys(self._nodes, reason))
        group = wanted.group
        if wanted.only is not None:
            why = self._why_not(kind, wanted.only)
            if why is None:
                return self._take(kind, wanted.only, group)
            return Unplaceable({wanted.only: why})
        if wanted.prefer is not None and self._why_not(kind, wanted.prefer) is None:
            return self._take(kind, wanted.prefer, group)
        chosen = self._choose(kind, wanted.agent)
        return self._refusal(kind) if chosen is None else self._take(kind, chosen, group)

    def move(self, wanted: Wanted, source: str) -> Placement | Unplaceable:
        """Choose another node for an agent that *source* holds, which doesn't qualify for it."""
        needed = needs(wanted.spec)
        self._tally.count(source, needed, wanted.group, -1)
        self._log.append(source)
        found = self.place(wanted)
        if isinstance(found, Unplaceable):
            self._tally.count(source, needed, wanted.group)
            self._log.append(source)
        return found

    # ---- classes ------------------------------------------------------------------

    def _class(self, wanted: Wanted) -> _Class | None:
        spec = wanted.spec
        # Holding the spec keeps its id from being reused within the pass.
        asked = (id(spec), wanted.group)
        known = self._asked.get(asked)
        if known is None:
            known = self._asked[asked] = (spec, self._find_class(spec, wanted.group))
        return known[1]

    def _find_class(self, spec: AgentSpec, group: str | None) -> _Class | None:
        policy = spec.placement
        grouped = (
            policy.spread is not None
            or policy.anti_affinity is not False
            or policy.max_per_node is not None
            or policy.strategy not in STRATEGIES
            or policy.strategy == Strategy.SPREAD
        )
        key = (_key(spec), group if grouped else None)
        kind = self._classes.get(key)
        if kind is None:
            strategy: Strategy | Custom | None = find_custom(policy.strategy)
            if policy.strategy in STRATEGIES:
                strategy = Strategy(policy.strategy)
            if strategy is not None:
                kind = self._classes[key] = self._open(spec, strategy, key[1])
        return kind

    def _open(self, spec: AgentSpec, strategy: Strategy | Custom, group: str | None) -> _Class:
        kind = _Class(spec, strategy, group, needs(spec))
        label = spec.placement.spread_label
        if label is not None and group is not None:
            kind.counts = self._tally.values(group, label)
            kind.values = {
                name: node.record.labels.get(label, "") for name, node in self._nodes.items()
            }
            kind.is_strict = spec.placement.skew_max is not None
        if group is not None:
            policy = spec.placement
            kind.is_crowded = policy.max_per_node is not None or policy.anti_affinity is not False
        kind.seen = len(self._log)
        for name, node in self._nodes.items():
            reason = unfit(spec, node)
            if reason is None and strategy is Strategy.LEADER_ONLY and name != self._leader:
                reason = "is not the leader's node"
            if reason is not None:
                kind.reasons[name] = reason
                continue
            kind.fit[name] = base_pressure(spec, node, self._loads[name])
        kind.open_values = frozenset(kind.values.get(name, "") for name in kind.fit)
        if strategy is Strategy.CONSISTENT_HASH:
            if self._ring is None:
                self._ring = Ring(self._nodes)
        elif strategy is Strategy.RANDOM:
            for name in sorted(kind.fit):
                kind.shuffled[name in self._late].append(name)
        else:
            self._line_up(kind)
        return kind

    def _line_up(self, kind: _Class) -> None:
        buckets: dict[tuple[bool, str], _Bucket] = {}
        for name in list(kind.fit):
            if kind.strategy is Strategy.CAPABILITY_MATCHED:
                kind.matches[name] = match_rank(kind.spec, self._nodes[name])
            rank = self._rank(kind, name)
            if rank is None:
                continue
            kind.ranks[name] = rank
            place = (name in self._late, kind.values.get(name, ""))
            bucket = buckets.get(place)
            if bucket is None:
                bucket = buckets[place] = _Bucket(*place)
                kind.by_value.setdefault(place[1], []).append(len(kind.buckets))
                kind.buckets.append(bucket)
            bucket.heap.append((rank, name))
            kind.home[name] = bucket
        for index, bucket in enumerate(kind.buckets):
            heapq.heapify(bucket.heap)
            self._settle(kind, bucket, index)

    # ---- rules ----------------------------------------------------------------------

    def _has_room(self, kind: _Class, name: str) -> bool:
        """Whether a node is in; one that has got full is out for the pass."""
        if name not in kind.fit:
            return False
        node = self._nodes[name]
        reason = full(kind.needed, node, self._tally.used[name])
        if reason is None and kind.is_crowded and kind.group is not None:
            reason = crowded(kind.spec.placement, kind.group, node, self._tally)
        if reason is None:
            return True
        del kind.fit[name]
        kind.reasons[name] = reason
        return False

    def _skew(self, kind: _Class, name: str) -> str | None:
        """Why a node is out until its label value's turn comes."""
        if not kind.is_strict or kind.counts is None:
            return None
        return skewed(kind.spec.placement, kind.values[name], kind.counts, kind.open_values)

    def _why_not(self, kind: _Class, name: str) -> str | None:
        if not self._has_room(kind, name):
            return kind.reasons.get(name, "is not known")
        return self._skew(kind, name)

    def _may(self, kind: _Class, name: str) -> bool:
        return self._has_room(kind, name) and self._skew(kind, name) is None

    def _refusal(self, kind: _Class) -> Unplaceable:
        if kind.refused is None or kind.refused[0] != len(self._log):
            reasons = {name: self._why_not(kind, name) or "" for name in self._nodes}
            kind.refused = (len(self._log), Unplaceable(reasons))
        return kind.refused[1]

    def _take(self, kind: _Class, name: str, group: str | None) -> Placement:
        self._tally.count(name, kind.needed, group)
        self._log.append(name)
        return self._answers[name]

    # ---- ranking --------------------------------------------------------------------

    def _rank(self, kind: _Class, name: str) -> Rank | None:
        """A node's rank within its bucket; None: it can't be ranked, and is out."""
        node, usage = self._nodes[name], self._tally.used[name]
        press = pressure(kind.fit[name], node, usage)
        match kind.strategy:
            case Strategy.CAPABILITY_MATCHED:
                return (*kind.matches[name], press)
            case Strategy.SPREAD:
                return (usage.groups.get(kind.group or "", 0), press)
            case Strategy.PACK:
                return (-press,)
            case Custom():
                replicas = usage.groups.get(kind.group or "", 0)
                context = RankContext(kind.group, replicas, self._leader, self._loads[name], press)
                try:
                    return custom_rank(kind.strategy, kind.spec, node, usage, context)
                except CustomError as error:
                    del kind.fit[name]
                    kind.reasons[name] = f"can't be ranked: strategy {kind.strategy.name!r} {error}"
                    return None
        return (press,)

    def _settle(self, kind: _Class, bucket: _Bucket, index: int) -> None:
        """Drop what doesn't count from the top of a bucket, and queue it by what does."""
        heap, ranks, fit = bucket.heap, kind.ranks, kind.fit
        while heap and (heap[0][1] not in fit or ranks[heap[0][1]] != heap[0][0]):
            heapq.heappop(heap)
        if len(kind.buckets) == 1:
            return
        if not heap:
            bucket.key = None
            return
        count = 0 if kind.counts is None else kind.counts.get(bucket.value, 0)
        late = 1.0 if bucket.late else 0.0
        rank, name = heap[0]
        key = (count, late, *rank) if kind.is_strict else (late, count, *rank)
        if key != bucket.key:
            bucket.key = key
            heapq.heappush(kind.order, (key, name, index))

    def _catch_up(self, kind: _Class) -> None:
        """Rank the nodes anew that got an agent since the last look, whoever's it was."""
        log = self._log
        if kind.seen == len(log):
            return
        fresh: Iterable[str] = log[kind.seen :]
        if len(log) - kind.seen > 1:
            fresh = dict.fromkeys(fresh)
        kind.seen = len(log)
        touched: list[int] = []
        for name in fresh:
            # Of an ungrouped class every node has the value "".
            concerned = kind.by_value.get(kind.values.get(name, ""), ())
            touched.extend(concerned)
            if name not in kind.fit:
                continue
            rank = self._rank(kind, name)
            if rank is None or rank == kind.ranks[name]:
                continue
            kind.ranks[name] = rank
            heap = kind.home[name].heap
            if heap and heap[0][1] == name:
                heapq.heapreplace(heap, (rank, name))
            else:
                heapq.heappush(heap, (rank, name))
        if len(touched) > 2:
            touched = list(dict.fromkeys(touched))
        for index in touched:
            self._settle(kind, kind.buckets[index], index)

    # ---- choosing -------------------------------------------------------------------

    def _choose(self, kind: _Class, agent: str) -> str | None:
        if not kind.fit:
            return None
        match kind.strategy:
            case Strategy.RANDOM:
                return self._draw(kind, kind.shuffled[0]) or self._draw(kind, kind.shuffled[1])
            case Strategy.CONSISTENT_HASH:
                return self._along_ring(kind, agent)
            case Strategy.LOCAL_PREFERRED:
                leader = self._leader
                if leader and leader not in self._late and self._may(kind, leader):
                    return leader
        return self._top(kind)

    def _top(self, kind: _Class) -> str | None:
        self._catch_up(kind)
        if len(kind.buckets) > 1:
            return self._top_of_many(kind)
        for bucket in kind.buckets:
            while bucket.heap:
                name = bucket.heap[0][1]
                if self._has_room(kind, name):
                    return name if self._skew(kind, name) is None else None
                self._settle(kind, bucket, 0)
        return None

    def _top_of_many(self, kind: _Class) -> str | None:
        order = kind.order
        while order:
            key, _, index = order[0]
            bucket = kind.buckets[index]
            if bucket.key != key:
                heapq.heappop(order)
                continue
            name = bucket.heap[0][1]
            if self._has_room(kind, name):
                # Label values with fewer replicas come first: if this one has its share, all have.
                return name if self._skew(kind, name) is None else None
            self._settle(kind, bucket, index)
        return None

    def _draw(self, kind: _Class, names: list[str]) -> str | None:
        tried = 0
        while tried < len(names):
            drawn = self._rng.randrange(tried, len(names))
            names[tried], names[drawn] = names[drawn], names[tried]
            name = names[tried]
            if not self._has_room(kind, name):
                names[tried] = names[-1]
                names.pop()
            elif self._skew(kind, name) is None:
                return name
            else:
                tried += 1
        return None

    def _along_ring(self, kind: _Class, agent: str) -> str | None:
        assert self._ring is not None
        overloaded: list[str] = []
        for name in self._ring.walk(agent):
            if name in self._late:
                overloaded.append(name)
            elif self._may(kind, name):
                return name
        return next((name for name in overloaded if self._may(kind, name)), None)


def _key(spec: AgentSpec) -> tuple[object, ...]:
    """Equal for specs with equal demands."""
    policy = spec.placement
    spread = policy.spread
    return (
        policy.strategy,
        tuple(policy.require),
        tuple(policy.prefer),
        tuple(policy.labels.items()),
        tuple(policy.expressions),
        spread if spread is None or isinstance(spread, str) else spread.model_dump_json(),
        # True is not 1 here, and a label named "True" neither.
        repr(policy.anti_affinity),
        policy.max_per_node,
        tuple(spec.resources.items()),
        None if policy.strategy in STRATEGIES else id(spec),
    )


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
