"""Which running agents should change their node, and to which: to even nodes out, and to empty one.

Pure: it proposes moves and carries out none. `rebalance` takes one agent after
the other from the fullest node to the emptiest that may have it, as long as
that pays; `drain_moves` says where the agents of one node would go.

Guaranteed, of every proposal:

- only agents that run as they are wished are moved: none that is pending,
  starting, moving, stopping or about to be restarted with another spec;
- every rule of placement holds at every step, if the moves are made in order;
  and what was only preferred (`prefer`, `spread`) is not given up for a lower load;
- an agent whose place was not chosen by load stays: `leader_only`,
  `local_preferred`, `pack`, strategies of other packages, ``on_node_loss:
  unavailable``. `consistent_hash` goes where the ring wants it, and nowhere else;
- on a node, agents that are not critical go first, then those without stored
  state, then those that take the least;
- planning again once the moves are made gives nothing, unless the budget ended
  the proposal (`Rebalance.is_complete`).

Hysteresis: a move must leave its target below its source by more than
`threshold` of the source's load, so that two nodes never send agents to and
fro, and a difference of one agent is none. Each move makes the larger of two
loads smaller, so that the loads, sorted, only go down: that is why it ends.

What comes first, whatever the strategy: deployments whose must-skew is broken,
as after a zone came back, are put right; there the threshold doesn't count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.control.planner import History, is_bound
from foundation_nats.placement.constraints import Tally, Usage, crowded, full, needs, unfit
from foundation_nats.placement.place import Placement, Placer, Wanted
from foundation_nats.placement.score import LoadSteps, counted
from foundation_nats.placement.strategies import Ring, Strategy, match_rank
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    NodeStatus,
)

BUDGET = 1000
THRESHOLD = 0.1

_HOLDING = frozenset({AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING})
_BY_LOAD = frozenset(
    {Strategy.LOAD_BALANCED, Strategy.SPREAD, Strategy.RANDOM, Strategy.CAPABILITY_MATCHED}
)
_ROUNDING = 1e-9


class Balance(StrEnum):
    """What is to be better afterwards."""

    EVEN_DISTRIBUTION = "even_distribution"
    """The agents per worker."""
    LOAD_BASED = "load_based"
    """The pressure: agents per worker, weighed with declared resources and reported load."""
    CAPABILITY_BASED = "capability_based"
    """The match of agents and nodes: preferred capabilities, and specialists kept free."""


@dataclass(frozen=True, slots=True)
class Move:
    """One agent and where it should go."""

    agent: str
    source: str
    target: str
    why: str


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Moves in the order in which they may be made."""

    moves: tuple[Move, ...]
    before: Mapping[str, float]
    """What each node that takes part bears, in the strategy's measure."""
    after: Mapping[str, float]
    is_complete: bool = True
    """False: the budget ended it, and there is more to do."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Where the agents of a node would go."""

    moves: tuple[Move, ...]
    stuck: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Agents that nobody else can take, to the reason per node."""


@dataclass(slots=True)
class _Group:
    """A deployment whose agents may be moved."""

    name: str
    spec: AgentSpec
    needed: dict[str, float]
    open_nodes: frozenset[str]
    """Nodes that qualify, room aside, and are not overloaded."""
    open_values: frozenset[str]
    """Of the spread's label."""
    match: dict[str, tuple[int, ...]]
    """How well each node's capabilities match; lower is better."""
    cost: tuple[bool, bool, float, str]

    @property
    def strategy(self) -> str:
        return self.spec.placement.strategy


def rebalance(
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    nodes: Mapping[str, NodeView],
    *,
    strategy: Balance = Balance.EVEN_DISTRIBUTION,
    budget: int = BUDGET,
    threshold: float = THRESHOLD,
    history: History | None = None,
    reserved: Mapping[str, Usage] | None = None,
) -> Rebalance:
    """Propose moves.

    Args:
        budget: at most so many moves.
        threshold: what a move must gain, as a share of the source's load.
        history: the reconciler's, so that load counts as it does for placing.
        reserved: what is taken on nodes by other than agents.
    """
    made = _Rebalancer(desired, held, nodes, strategy, budget, threshold, history, reserved)
    return made.run()


class _Rebalancer:
    def __init__(
        self,
        desired: Mapping[str, Deployment],
        held: Mapping[str, Held],
        nodes: Mapping[str, NodeView],
        strategy: Balance,
        budget: int,
        threshold: float,
        history: History | None,
        reserved: Mapping[str, Usage] | None,
    ) -> None:
        self._nodes = nodes
        self._strategy = strategy
        self._budget = budget
        self._threshold = threshold
        history = history or History()
        self._steps = _steps(nodes, history)
        self._used = usage_of(held, nodes, reserved)
        self._tally = Tally(nodes, self._used)
        self._groups: dict[str, _Group] = {}
        self._agents: dict[str, dict[str, list[str]]] = {name: {} for name in nodes}
        """Node to deployment to agents that may be moved, in the order of leaving."""
        for name in sorted(desired):
            self._take_in(desired[name], held, history)
        self._ring = Ring(nodes)
        self._first: dict[str, tuple[str, str]] = {}
        """Agents that were moved, to their deployment and where they were."""
        self._made: list[Move] = []
        self._loads = {name: self._load(name) for name in self._taking_part()}

    def _take_in(self, deployment: Deployment, held: Mapping[str, Held], history: History) -> None:
        spec, name = deployment.spec, deployment.name
        movable = _BY_LOAD | {Strategy.CONSISTENT_HASH}
        if spec.placement.strategy not in movable:
            return
        if is_bound(spec):
            return
        digest = history.digest(deployment)
        found = False
        for agent in deployment.agent_ids():
            item = held.get(agent)
            if item is None or not _runs_as_wished(item.record, digest):
                continue
            view = self._nodes.get(item.record.node or "")
            if (
                view is None
                or view.status is not NodeStatus.UP
                or view.incarnation != item.record.incarnation
            ):
                continue
            self._agents[view.name].setdefault(name, []).append(agent)
            found = True
        if not found:
            return
        fit = frozenset(n for n, view in self._nodes.items() if unfit(spec, view) is None)
        label = spec.placement.spread_label or ""
        matched = spec.placement.strategy == Strategy.CAPABILITY_MATCHED
        self._groups[name] = _Group(
            name,
            spec,
            needs(spec),
            frozenset(n for n in fit if not self._steps[n].overloaded),
            frozenset(self._nodes[n].record.labels.get(label, "") for n in fit),
            {n: match_rank(spec, view)[: 2 if matched else 1] for n, view in self._nodes.items()},
            (spec.critical, spec.durable, sum(spec.resources.values()), name),
        )

    def run(self) -> Rebalance:
        before = dict(self._loads)
        complete = self._improve()
        moves = self._net()
        return Rebalance(tuple(moves), before, dict(self._loads), complete)

    def _improve(self) -> bool:
        """Move until nothing pays any more; False: until the budget was spent."""
        passes = [self._put_right, self._by_capability]
        if self._strategy is not Balance.CAPABILITY_BASED:
            passes = [self._put_right, self._onto_ring, self._even_out]
        while True:
            moved = 0
            for work in passes:
                for _ in work():
                    moved += 1
                    if len(self._made) > self._budget:
                        # One too many shows that there is more to do.
                        self._undo()
                        return False
            if not moved:
                return True

    # ---- the ways to improve --------------------------------------------------------

    def _put_right(self) -> Iterator[None]:
        """Move replicas from the fullest values of the label to the emptiest."""
        for group in self._by_cost(self._groups):
            policy = group.spec.placement
            most, label = policy.skew_max, policy.spread_label
            if most is None or label is None:
                continue
            while self._less_skewed(group, label, most):
                yield

    def _less_skewed(self, group: _Group, label: str, most: int) -> bool:
        counts = self._tally.values(group.name, label)
        least = min((counts.get(value, 0) for value in group.open_values), default=0)
        for value in sorted(counts, key=lambda value: (-counts[value], value)):
            if counts[value] - least <= most:
                return False
            if self._out_of(group, label, value, counts, most):
                return True
        return False

    def _out_of(
        self, group: _Group, label: str, value: str, counts: Mapping[str, int], most: int
    ) -> bool:
        sources = [name for name in self._holding(group.name) if self._value(name, label) == value]
        targets = sorted(
            (name for name in group.open_nodes if name in self._loads),
            key=lambda name: (counts[self._value(name, label)], self._loads[name], name),
        )
        for source in sorted(sources, key=lambda name: (-self._loads[name], name)):
            for target in targets:
                other = self._value(target, label)
                if counts[other] + 1 >= counts[value]:
                    break
                why = f"{label}={value} has {counts[value]}, {label}={other} has {counts[other]}"
                why += f" (max_skew {most})"
                if self._move(group, source, target, why, is_repair=True):
                    return True
        return False

    def _onto_ring(self) -> Iterator[None]:
        """Move agents by consistent hash to the first node on their ring that may have them."""
        for group in self._by_cost(self._groups):
            if group.strategy != Strategy.CONSISTENT_HASH:
                continue
            for source in self._holding(group.name):
                for agent in list(self._agents[source].get(group.name, ())):
                    for target in self._ring.walk(agent):
                        if target == source:
                            break
                        if target in group.open_nodes:
                            why = f"its place by consistent hash is {target}"
                            if self._move(group, source, target, why, agent):
                                yield
                                break

    def _even_out(self) -> Iterator[None]:
        stuck: set[str] = set()
        moved = False
        while True:
            order = sorted(self._loads, key=lambda name: (self._loads[name], name))
            source = next((name for name in reversed(order) if name not in stuck), None)
            if source is None:
                if not moved:
                    return
                stuck.clear()
                moved = False
            elif self._relieve(source, order):
                moved = True
                yield
            else:
                stuck.add(source)

    def _relieve(self, source: str, targets: list[str]) -> bool:
        bound = self._loads[source] * (1.0 - self._threshold) - _ROUNDING
        groups = [
            group
            for group in self._by_cost(self._agents[source])
            if group.strategy != Strategy.CONSISTENT_HASH
        ]
        for target in targets:
            if self._loads[target] >= bound:
                return False
            for group in groups:
                if target not in group.open_nodes or target == source:
                    continue
                why = f"{source} bears {self._shown(source)}, {target} {self._shown(target)}"
                if self._move(group, source, target, why, bound=bound):
                    return True
        return False

    def _by_capability(self) -> Iterator[None]:
        for group in self._by_cost(self._groups):
            matched = group.strategy == Strategy.CAPABILITY_MATCHED
            if group.strategy not in _BY_LOAD or not (matched or group.spec.placement.prefer):
                continue
            for source in self._holding(group.name):
                while self._agents[source].get(group.name):
                    better = sorted(
                        (n for n in group.open_nodes if group.match[n] < group.match[source]),
                        key=lambda n: (group.match[n], self._loads.get(n, 0.0), n),
                    )
                    if not any(
                        self._move(group, source, n, self._closer(group, n)) for n in better
                    ):
                        break
                    yield

    def _closer(self, group: _Group, target: str) -> str:
        offered = set(self._nodes[target].record.capabilities)
        liked = [name for name in group.spec.placement.prefer if name in offered]
        return f"{target} offers {', '.join(liked)}" if liked else f"{target} is less special"

    # ---- one move -------------------------------------------------------------------

    def _move(
        self,
        group: _Group,
        source: str,
        target: str,
        why: str,
        agent: str | None = None,
        *,
        bound: float | None = None,
        is_repair: bool = False,
    ) -> bool:
        """Make a move in the books if every rule allows it, and the target ends below *bound*."""
        waiting = self._agents[source].get(group.name)
        if not waiting or not self._may(group, source, target, self._tally, is_repair):
            return False
        self._tally.count(source, group.needed, group.name, -1)
        self._tally.count(target, group.needed, group.name)
        if bound is not None and self._load(target) >= bound:
            self._tally.count(target, group.needed, group.name, -1)
            self._tally.count(source, group.needed, group.name)
            return False
        if agent is None:
            agent = waiting[0]
        waiting.remove(agent)
        self._agents[target].setdefault(group.name, []).append(agent)
        self._first.setdefault(agent, (group.name, source))
        self._made.append(Move(agent, source, target, why))
        for name in (source, target):
            if name in self._loads:
                self._loads[name] = self._load(name)
        return True

    def _undo(self) -> None:
        """Take back the last move."""
        last = self._made.pop()
        group = self._groups[self._first[last.agent][0]]
        self._tally.count(last.target, group.needed, group.name, -1)
        self._tally.count(last.source, group.needed, group.name)
        for name in (last.source, last.target):
            if name in self._loads:
                self._loads[name] = self._load(name)

    def _may(
        self, group: _Group, source: str, target: str, tally: Tally, is_repair: bool = False
    ) -> bool:
        """Whether every rule allows a move; a repair may cost what was only preferred."""
        if not is_repair and group.match[target] > group.match[source]:
            return False
        node, policy = self._nodes[target], group.spec.placement
        if full(group.needed, node, tally.used[target]) is not None:
            return False
        tally.count(source, group.needed, group.name, -1)
        refused = crowded(policy, group.name, node, tally) is not None
        tally.count(source, group.needed, group.name)
        if refused:
            return False
        if policy.strategy == Strategy.SPREAD and not is_repair:
            here = tally.used[source].groups.get(group.name, 0)
            if tally.used[target].groups.get(group.name, 0) + 1 > here:
                return False
        label = policy.spread_label
        if label is None:
            return True
        old, new = self._value(source, label), self._value(target, label)
        if old == new:
            return True
        counts = tally.values(group.name, label)
        if counts[new] + 1 <= counts[old]:
            return True  # more even than before, whatever the skew
        if policy.skew_max is None:
            return False
        after = {**counts, old: counts[old] - 1, new: counts[new] + 1}
        least = min((after.get(value, 0) for value in group.open_values), default=0)
        return max(after.values()) - least <= policy.skew_max

    def _net(self) -> list[Move]:
        """The moves without detours, in an order in which each may be made."""
        last: dict[str, Move] = {}
        for move in self._made:
            last.pop(move.agent, None)
            last[move.agent] = move
        if len(last) == len(self._made):
            return self._made
        waiting = [
            Move(agent, origin, move.target, move.why)
            for agent, move in last.items()
            if (origin := self._first[agent][1]) != move.target
        ]
        tally = Tally(self._nodes, self._used)
        ordered: list[Move] = []
        while waiting:
            later: list[Move] = []
            for move in waiting:
                group = self._groups[self._first[move.agent][0]]
                if self._may(group, move.source, move.target, tally, is_repair=True):
                    tally.count(move.source, group.needed, group.name, -1)
                    tally.count(move.target, group.needed, group.name)
                    ordered.append(move)
                else:
                    later.append(move)
            if len(later) == len(waiting):
                break  # they wait for each other; another pass may find a way
            waiting = later
        return ordered

    # ---- measuring ------------------------------------------------------------------

    def _taking_part(self) -> list[str]:
        """The nodes that may give or take."""
        return [
            name
            for name, view in self._nodes.items()
            if view.status is NodeStatus.UP and (not view.record.cordoned or self._agents[name])
        ]

    def _load(self, name: str) -> float:
        node, usage = self._nodes[name], self._tally.used[name]
        per_worker = usage.agents / max(1, len(node.record.workers))
        if self._strategy is not Balance.LOAD_BASED:
            return per_worker
        fullest = max(
            (
                usage.resources.get(resource, 0.0) / offered
                for resource, offered in node.record.capacity.items()
                if offered > 0
            ),
            default=0.0,
        )
        return per_worker * self._steps[name].busy * (1.0 + fullest)

    def _shown(self, name: str) -> str:
        what = "agents per worker" if self._strategy is not Balance.LOAD_BASED else "pressure"
        return f"{self._loads[name]:.3g} {what}"

    def _value(self, name: str, label: str) -> str:
        return self._nodes[name].record.labels.get(label, "")

    def _holding(self, group: str) -> list[str]:
        return [name for name in sorted(self._agents) if self._agents[name].get(group)]

    def _by_cost(self, names: Mapping[str, object]) -> list[_Group]:
        return sorted(
            (self._groups[name] for name in names if name in self._groups),
            key=lambda group: group.cost,
        )


def _runs_as_wished(record: AgentRecord, digest: str) -> bool:
    return (
        record.status is AgentStatus.RUNNING
        and record.desired == "run"
        and record.move is None
        and record.digest == digest
        and record.node is not None
    )


def _steps(nodes: Mapping[str, NodeView], history: History) -> dict[str, LoadSteps]:
    found: dict[str, LoadSteps] = {}
    for name, node in nodes.items():
        incarnation, before = history.loads.get(name, (-1, None))
        found[name] = counted(node, before if incarnation == node.incarnation else None)
    return found


def usage_of(
    held: Mapping[str, Held],
    nodes: Mapping[str, NodeView],
    reserved: Mapping[str, Usage] | None = None,
) -> dict[str, Usage]:
    """What the records take of each node that is not down."""
    used = {name: usage.copy() for name, usage in (reserved or {}).items()}
    known: dict[int, dict[str, float]] = {}
    for agent, item in held.items():
        record = item.record
        if record.status not in _HOLDING or record.node is None:
            continue
        needed = known.get(id(record.spec))
        if needed is None:
            needed = known[id(record.spec)] = needs(record.spec)
        places = [(record.node, record.incarnation)]
        if record.move is not None and record.move.to is not None:
            # On its way it takes its place on both.
            places.append((record.move.to, record.move.incarnation))
        for place, incarnation in places:
            view = nodes.get(place)
            if view is None or not view.is_alive or view.incarnation != incarnation:
                continue
            usage = used.setdefault(place, Usage())
            usage.agents += 1
            for name, amount in needed.items():
                usage.resources[name] = usage.resources.get(name, 0.0) + amount
            group = record.deployment or agent
            usage.groups[group] = usage.groups.get(group, 0) + 1
    return used


def drain_moves(
    node: str,
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    nodes: Mapping[str, NodeView],
    *,
    leader: str | None = None,
    rng: random.Random | None = None,
    history: History | None = None,
    reserved: Mapping[str, Usage] | None = None,
) -> Drain:
    """Where each wanted agent that *node* holds would go, critical ones first, and who can't go.

    An agent that runs nowhere else by its own wish (``on_node_loss: unavailable``) is stuck.
    """
    view = nodes.get(node)
    if view is None:
        return Drain(())
    status = NodeStatus.DRAINING if view.status is NodeStatus.UP else view.status
    others = {**nodes, node: NodeView(view.record, status, view.load, view.heard)}
    placer = Placer(
        others,
        usage_of(held, others, reserved),
        leader,
        rng or random.Random(0),
        loads=_steps(nodes, history or History()),
    )
    moves: list[Move] = []
    stuck: dict[str, Mapping[str, str]] = {}
    for deployment in sorted(desired.values(), key=lambda d: (not d.spec.critical, d.name)):
        pinned = is_bound(deployment.spec)
        for agent in deployment.agent_ids():
            item = held.get(agent)
            if item is None or item.record.node != node or item.record.desired != "run":
                continue
            if item.record.status not in _HOLDING:
                continue
            if item.record.incarnation != view.incarnation or not view.is_alive:
                continue  # it is lost already, and the planner's business
            if pinned:
                why = "is not its node (on_node_loss is unavailable)"
                stuck[agent] = {name: why for name in nodes if name != node}
                continue
            found = placer.move(Wanted(agent, deployment.spec, deployment.name), node)
            if isinstance(found, Placement):
                moves.append(Move(agent, node, found.node, f"{node} is being emptied"))
            else:
                stuck[agent] = {
                    name: reason for name, reason in found.reasons.items() if name != node
                }
    return Drain(tuple(moves), stuck)
