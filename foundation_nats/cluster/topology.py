"""Which nodes there are, where, how far from each other, and which of them have parted.

Pure. `topology` makes one picture of what was heard and measured;
`PartitionWatch` says when a partition lasts long enough to be told.

Between nodes there is a broker, so that "A hears B" means: B's heartbeats came
to A within the last `suspect_after_s`, as A itself says. Two nodes are in one
group if there is a way from each to the other along who hears whom, over
others if need be (strongly connected components: Tarjan 1972). More than one
group among nodes that are not down is a partition.

A ping that was answered just now counts like a heartbeat, both ways.

Down is who was given up by a leader that answers or by its record, or is surely
not there. Whom only the observer has given up is suspect: it may be the observer
that is cut off, and then the partition is in the picture for as long as it lasts.

What a node said is fresh if it answered just now, or is heard. Of a node from
which nothing fresh has come it is taken that it hears whoever hears it; and of
two such nodes, that between them all is as they last said. So those from which
nothing comes form groups by what was known before: `Group.is_known` tells them.

Not guaranteed: that a group that is silent lives. From one side, a partition
and nodes that stand still look the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_schemas import LeaseRecord, Load, NodeStatus, RttReply

Reports = Mapping[str, Collection[str]]
"""Node to the others that it says it hears."""

NO_ZONE = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that hear each other, directly or by others."""

    nodes: tuple[str, ...]
    is_known: bool
    """Whether any of them said so just now; else it is what was known before."""


@dataclass(frozen=True, slots=True)
class OneWay:
    """A link that works in one direction only, as both ends say."""

    speaker: str
    listener: str
    """It hears the speaker, which doesn't hear it."""


@dataclass(frozen=True, slots=True)
class TopologyNode:
    """One node."""

    name: str
    status: NodeStatus
    incarnation: int
    leader: bool
    zone: str
    """The value of the label that makes the zones; empty: it has none."""
    agents: int
    workers: int
    load: Load
    capacity: Mapping[str, float]
    labels: Mapping[str, str]
    capabilities: tuple[str, ...]
    host: str
    answered: bool
    """Whether it answered in time; what it would have measured is missing else."""
    server: str | None
    """The name of the NATS server that it is connected to; None: unknown."""
    server_rtt_ms: float | None
    hears: tuple[str, ...] | None
    """The others whose heartbeats reach it, as it last said; None: it never did."""


@dataclass(frozen=True, slots=True)
class TopologyServer:
    """A NATS server that nodes are connected to."""

    name: str
    cluster: str
    """Of the NATS servers; empty: it stands alone."""
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TopologyLeader:
    """Who leads."""

    node: str
    term: int
    incarnation: int
    confirmed: bool
    """Whether the lease could be read just now; else it is what the nodes last saw."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Whoever asked."""

    server: str
    rtt_ms: float | None
    hears: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The cluster at one moment, as one observer sees it."""

    cluster: str
    at: str
    revision: int
    """Of the observer's view of the nodes: a picture with a higher one is newer."""
    observer: Observer
    leader: TopologyLeader | None
    partitioned: bool
    groups: tuple[Group, ...]
    """Of the nodes that are not down; one, if all is well. The largest known one comes first."""
    one_way: tuple[OneWay, ...]
    nodes: tuple[TopologyNode, ...]
    zones: Mapping[str, tuple[str, ...]]
    servers: tuple[TopologyServer, ...]
    matrix: Mapping[str, Mapping[str, float | None]]
    """Who asks, who is asked: milliseconds until the answer; None: there was none in time."""
    totals: Mapping[str, int]

    def node(self, name: str) -> TopologyNode | None:
        """The node of this name; None if there is none."""
        return next((node for node in self.nodes if node.name == name), None)


def topology(
    view: ClusterView,
    *,
    cluster: str,
    at: str,
    observer: Observer,
    leader: LeaseRecord | None,
    is_leader_confirmed: bool = True,
    measured: Mapping[str, RttReply],
    absent: Collection[str] = (),
    zone_label: str = "zone",
) -> Topology:
    """One picture of what is known.

    Args:
        view: the nodes as the observer knows them; `NodeView.hears` is what they last said.
        leader: who holds the lease.
        measured: what nodes answered just now.
        absent: nodes that are surely not there, since nobody listens.
        zone_label: the label that makes the zones.
    """
    views = [view.nodes[name] for name in sorted(view.nodes)]
    answers = {
        node.name: measured[node.name]
        for node in views
        if node.name in measured and measured[node.name].incarnation >= node.incarnation
    }
    gone = set(absent) | {
        node.name
        for node in views
        if node.record.ended
        or any(answer.gave_up.get(node.name, -1) >= node.incarnation for answer in answers.values())
    }
    statuses = {
        node.name: _status(node, answers.get(node.name), observer.hears, gone) for node in views
    }
    alive = [name for name, status in statuses.items() if status is not NodeStatus.DOWN]
    fresh: dict[str, Collection[str]] = {name: answers[name].hears for name in answers}
    stale: dict[str, Collection[str]] = {}
    for node in views:
        if node.name not in fresh and node.hears is not None:
            is_heard = node.heard and node.name in observer.hears
            (fresh if is_heard else stale)[node.name] = node.hears
    linked = _with_pings(fresh, answers)
    groups = groups_of(alive, linked, stale)
    nodes = tuple(
        _node(
            node,
            statuses[node.name],
            answers.get(node.name),
            fresh.get(node.name, stale.get(node.name)),
            leader,
            zone_label,
        )
        for node in views
    )
    zones: dict[str, list[str]] = {}
    servers: dict[tuple[str, str], list[str]] = {}
    for shown in nodes:
        zones.setdefault(shown.zone, []).append(shown.name)
        if shown.server is not None:
            key = (answers[shown.name].server_cluster, shown.server)
            servers.setdefault(key, []).append(shown.name)
    by_status = [statuses[node.name] for node in views]
    totals = {str(status): by_status.count(status) for status in NodeStatus}
    totals |= {
        "nodes": len(nodes),
        "answered": len(answers),
        "agents": sum(node.agents for node in nodes if node.status is not NodeStatus.DOWN),
        "workers": sum(node.workers for node in nodes if node.status is not NodeStatus.DOWN),
        "servers": len(servers),
        "zones": len(zones),
        "groups": len(groups),
    }
    return Topology(
        cluster=cluster,
        at=at,
        revision=view.revision,
        observer=observer,
        leader=None
        if leader is None
        else TopologyLeader(leader.holder, leader.term, leader.incarnation, is_leader_confirmed),
        partitioned=len(groups) > 1,
        groups=groups,
        one_way=one_way_links(alive, linked),
        nodes=nodes,
        zones={name: tuple(zones[name]) for name in sorted(zones, key=lambda z: (z == NO_ZONE, z))},
        servers=tuple(
            TopologyServer(name, of, tuple(servers[of, name])) for of, name in sorted(servers)
        ),
        matrix={
            here: {
                there: answers[here].peers.get(there) if here in answers else None
                for there in alive
                if there != here
            }
            for here in alive
        },
        totals=totals,
    )


def _with_pings(fresh: Reports, answers: Mapping[str, RttReply]) -> Mapping[str, Collection[str]]:
    """Who hears whom, where an answered ping counts for both ways, like a heartbeat.

    Who has just joined was not sent a heartbeat yet.
    """
    linked = {name: set(names) for name, names in fresh.items()}
    for here, answer in answers.items():
        for there, ms in answer.peers.items():
            if ms is not None:
                linked[here].add(there)
                if there in linked:
                    linked[there].add(here)
    return linked


def _status(
    node: NodeView, answer: RttReply | None, heard: Collection[str], gone: Collection[str]
) -> NodeStatus:
    """What it answers goes before what others think; that we don't hear it ends nobody."""
    if answer is not None:
        return NodeStatus.DRAINING if answer.draining else NodeStatus.UP
    if node.name in gone:
        return NodeStatus.DOWN
    is_heard = node.is_alive and node.heard and node.name in heard
    return node.status if is_heard else NodeStatus.SUSPECT


def _node(
    node: NodeView,
    status: NodeStatus,
    answer: RttReply | None,
    hears: Collection[str] | None,
    leader: LeaseRecord | None,
    zone_label: str,
) -> TopologyNode:
    record, load = node.record, node.load if answer is None else answer.load
    return TopologyNode(
        name=node.name,
        status=status,
        incarnation=node.incarnation if answer is None else answer.incarnation,
        leader=leader is not None and leader.holder == node.name,
        zone=record.labels.get(zone_label, NO_ZONE),
        agents=load.agents,
        workers=len(record.workers),
        load=load,
        capacity=record.capacity,
        labels=record.labels,
        capabilities=tuple(record.capabilities),
        host=record.host,
        answered=answer is not None,
        server=None if answer is None else answer.server,
        server_rtt_ms=None if answer is None else answer.server_rtt_ms,
        hears=None if hears is None else tuple(sorted(hears)),
    )


# ---- groups ---------------------------------------------------------------------------


def groups_of(
    alive: Iterable[str], fresh: Reports, stale: Reports | None = None
) -> tuple[Group, ...]:
    """The strongly connected components of who hears whom among *alive*.

    Largest known group first, groups of which nothing is known last.

    Args:
        fresh: what nodes say now.
        stale: what nodes said before nothing came from them any more.
    """
    nodes = sorted(set(alive))
    everybody = frozenset(nodes)
    said = {name: frozenset(fresh[name]) for name in nodes if name in fresh}
    if len(said) == len(nodes) and all(everybody - {name} <= said[name] for name in nodes):
        return (Group(tuple(nodes), True),) if nodes else ()
    before = {name: frozenset(names) for name, names in (stale or {}).items()}
    hears = {
        here: [there for there in nodes if there != here and _hears(here, there, said, before)]
        for here in nodes
    }
    found = [
        Group(tuple(sorted(part)), any(name in said for name in part)) for part in components(hears)
    ]
    return tuple(
        sorted(found, key=lambda group: (not group.is_known, -len(group.nodes), group.nodes))
    )


def _hears(
    here: str,
    there: str,
    said: Mapping[str, frozenset[str]],
    before: Mapping[str, frozenset[str]],
) -> bool:
    if here in said:
        return there in said[here]
    if there in said:
        return here in said[there]
    return here not in before or there in before[here]


def one_way_links(alive: Iterable[str], fresh: Reports) -> tuple[OneWay, ...]:
    """Who is heard by whom without hearing them, where both have said so now."""
    said = {name: frozenset(fresh[name]) for name in sorted(set(alive)) if name in fresh}
    return tuple(
        OneWay(speaker, listener)
        for speaker, its in said.items()
        for listener, hears in said.items()
        if speaker != listener and speaker in hears and listener not in its
    )


def components(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components of a graph whose edges lead to its own vertices."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[list[str]] = []
    for root in edges:
        if root in index:
            continue
        # Without recursion: a chain of nodes may be longer than the interpreter's stack.
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            here, rest = work[-1]
            for there in rest:
                if there not in index:
                    index[there] = low[there] = len(index)
                    stack.append(there)
                    on_stack.add(there)
                    work.append((there, iter(edges[there])))
                    break
                if there in on_stack:
                    low[here] = min(low[here], index[there])
            else:
                work.pop()
                if work:
                    above = work[-1][0]
                    low[above] = min(low[above], low[here])
                if low[here] == index[here]:
                    cut = stack.index(here)
                    part = stack[cut:]
                    del stack[cut:]
                    on_stack.difference_update(part)
                    found.append(part)
    return found


# ---- telling --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parted:
    """The nodes have been in these groups for long enough."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Healed:
    """Those that had parted hear each other again, or are forgotten."""

    groups: tuple[tuple[str, ...], ...]
    """As they were told."""
    gone: tuple[str, ...]
    """Those of them that are no more."""


class PartitionWatch:
    """When a partition is worth telling, and when it is over.

    It is told once its groups have stayed the same for `after_s`, and again if they change.
    Nodes that were given up don't heal it: they are still away, until they are heard among
    the others again, or forgotten.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._told: tuple[tuple[str, ...], ...] = ()
        self._pending: object = None
        self._since: float | None = None

    def pause(self) -> None:
        """What is seen now proves nothing: begin to count anew."""
        self._since = None

    def reset(self) -> None:
        """Forget everything: somebody else tells from now on."""
        self._told, self._pending, self._since = (), None, None

    def step(
        self, groups: Iterable[Group], known: Collection[str], now: float
    ) -> Parted | Healed | None:
        """What to tell now.

        Args:
            groups: of the nodes that are not down.
            known: the names of all nodes.
        """
        parts = tuple(sorted(group.nodes for group in groups))
        shape = parts if len(parts) > 1 else ()
        told = self._told
        cut = [name for group in told for name in group]
        present = {name for part in parts for name in part}
        away = tuple(name for name in cut if name in known and name not in present)
        if self._since is None or (shape, away) != self._pending:
            self._pending, self._since = (shape, away), now
        if now - self._since < self._after_s or shape == told or (away and not shape):
            return None
        if shape:
            self._told = shape
            return Parted(shape)
        self._told = ()
        return Healed(told, tuple(name for name in cut if name not in known))
