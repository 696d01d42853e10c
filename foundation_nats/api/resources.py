"""`cluster.resources`: what the nodes have left, and parts of it reserved before they are used.

A reservation is an entry in the ledger of one node (`cluster/ledger.py`), made
by compare-and-set: it never takes what agents or others have. Use what you
reserved once `confirm` has returned; what is only held may end, and `confirm`
says so. Times are the NATS server's, not this machine's.
"""

from __future__ import annotations

import asyncio
import builtins
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from pydantic import Field

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.cluster import ledger as books
from foundation_nats.cluster.ledgers import Ledgers, Read
from foundation_nats.cluster.view import NodeView
from foundation_nats.errors import (
    BusTimeoutError,
    BusyError,
    ConfigError,
    InfeasibleError,
    NodeNotFoundError,
    NotFoundError,
    PlacementError,
    ReservationLostError,
    StaleRevisionError,
)
from foundation_nats.placement.constraints import Usage, full, needs, unfit
from foundation_nats.placement.place import Placer, Unplaceable, Wanted
from foundation_nats.placement.strategies import STRATEGIES, find_custom
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    LedgerRecord,
    NodeStatus,
    PlacementPolicy,
    ReservationRecord,
    ReservationState,
    WireModel,
    is_name,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_RUN = "foundation_nats:Reservation"
_TTL_MIN_S = 1.0
_TTL_MAX_S = 7 * 86400.0
_JITTER_S = 0.01
_JOINING = "is just joining"


class Verdict(StrEnum):
    """Whether requirements fit."""

    FITS = "fits"
    BUSY = "busy"
    """They would, but what they need is taken now."""
    UNAVAILABLE = "unavailable"
    """They would, but the node is not up, or cordoned."""
    INFEASIBLE = "infeasible"
    """They never will, however empty the node is."""


_WORST = (Verdict.FITS, Verdict.BUSY, Verdict.UNAVAILABLE, Verdict.INFEASIBLE)


class NodeVerdict(WireModel):
    """Whether requirements fit on one node, and if not, why."""

    node: str
    verdict: Verdict
    reason: str = ""


class Check(WireModel):
    """The answer of `Resources.can_allocate`; true if they fit somewhere now."""

    requirements: dict[str, float]
    verdict: Verdict
    """The best of the nodes'."""
    nodes: list[NodeVerdict] = Field(default_factory=list)

    def __bool__(self) -> bool:
        return self.verdict is Verdict.FITS


class Reservation(WireModel):
    """A part of a node's capacity that is yours: until `expires_at`, or until it is released."""

    id: str
    node: str
    needs: dict[str, float]
    state: ReservationState = ReservationState.HELD
    expires_at: float | None = None
    """Seconds since 1970 by the NATS server's clock; None: it lasts."""
    holder: str = ""
    agent: str | None = None
    since: str = ""


class Amount(WireModel):
    """One resource of a node, or of all."""

    capacity: float
    used: float = 0.0
    """By agents."""
    reserved: float = 0.0
    free: float = 0.0
    utilisation: float = 0.0
    """Share of the capacity that is used or reserved, 0 to 1."""


class NodeResources(WireModel):
    """What one node has and what of it is taken."""

    node: str
    status: str
    available: bool
    """Whether it gets new work: it is up and not cordoned."""
    agents: int = 0
    resources: dict[str, Amount] = Field(default_factory=dict)
    reservations: list[Reservation] = Field(default_factory=list)


class Demand(WireModel):
    """Pending agents of one deployment, and what each of them needs."""

    deployment: str
    agents: int
    needs: dict[str, float]
    verdict: Verdict
    reason: str = ""


class ResourceReport(WireModel):
    """What the cluster has, what of it is taken, and what is asked for in vain."""

    nodes: list[NodeResources]
    total: dict[str, Amount]
    """Of the nodes that are available."""
    unmet: list[Demand]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The nodes and their books at one moment."""

    views: dict[str, NodeView]
    """With the capacity of the books."""
    reads: dict[str, Read]
    joining: frozenset[str]
    """Nodes whose books are not open yet."""
    now: float

    def ledger(self, node: str) -> LedgerRecord | None:
        read = self.reads.get(node)
        return None if read is None or node in self.joining else read.record

    def used(self) -> dict[str, Usage]:
        found = {}
        for name in self.views:
            ledger = self.ledger(name)
            if ledger is not None:
                found[name] = Usage(resources=books.taken(ledger, self.now))
        return found


class Resources:
    """The capacity of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ledgers = Ledgers(cluster.bus, cluster.subjects)
        self._nodes = Bucket(cluster.bus, cluster.subjects, "nodes")

    # ---- looking ------------------------------------------------------------------

    async def report(self) -> ResourceReport:
        """Per node and in total: used, reserved, free; and the demand of pending agents.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        infos, seen, agents = await asyncio.gather(
            self._cluster.nodes.list(),
            self._look(),
            Bucket(self._cluster.bus, self._cluster.subjects, "agents").read_all(),
        )
        nodes = []
        for info in infos:
            # A node that is not up is shown by its last books.
            read = seen.reads.get(info.name)
            ledger = None if read is None else read.record
            nodes.append(
                NodeResources(
                    node=info.name,
                    status=info.status,
                    available=info.status == NodeStatus.UP and not info.cordoned,
                    agents=info.agents,
                    resources=_amounts(info.capacity, ledger, seen.now),
                    reservations=_reservations(info.name, ledger, seen.now),
                )
            )
        records = (rpc.decode(AgentRecord, e.value) for e in agents.values() if e.value is not None)
        total = _sum(item.resources for item in nodes if item.available)
        return ResourceReport(nodes=nodes, total=total, unmet=_unmet(records, seen))

    async def can_allocate(
        self,
        requirements: Mapping[str, float],
        *,
        node: str | None = None,
        placement: Mapping[str, Any] | None = None,
    ) -> Check:
        """Where *requirements* would fit now; false if nowhere, and it says whether they ever will.

        It promises nothing: `reserve` does.

        Args:
            node: only this one.
            placement: as in a manifest: ``require``, ``labels`` and so on.

        Raises:
            ConfigError: an argument is wrong.
            NodeNotFoundError: there is no such node.
            BusUnavailableError, BusTimeoutError
        """
        spec = _spec(requirements, placement, None)
        seen = await self._look(node)
        nodes = _judge(spec, seen)
        return Check(requirements=dict(requirements), verdict=_best(nodes), nodes=nodes)

    async def list(self, *, node: str | None = None) -> builtins.list[Reservation]:
        """Every reservation that counts now, by node and age.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        seen = await self._look(node)
        return [
            item
            for name in sorted(seen.reads)
            for item in _reservations(name, seen.reads[name].record, seen.now)
        ]

    async def reserved(self, nodes: Iterable[str]) -> dict[str, Usage]:
        """What of these nodes is reserved now, for planners; nodes without any are missing.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        found = await self.reservations(nodes)
        return {name: Usage(resources=books.reserved(items)) for name, items in found.items()}

    async def reservations(
        self, nodes: Iterable[str]
    ) -> dict[str, builtins.list[ReservationRecord]]:
        """The reservations that count now, per node; nodes without any are missing.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        reads = await self._ledgers.read_many(list(nodes))
        now = await self._ledgers.clock.now()
        found = {}
        for name, read in reads.items():
            if read.record is not None and (items := books.live(read.record, now)):
                found[name] = items
        return found

    async def get(self, reservation: str | Reservation) -> Reservation:
        """The reservation as it is now.

        Raises:
            NotFoundError: it has expired, was released, or an agent has used it up.
            BusUnavailableError, BusTimeoutError
        """
        id, node = _parsed(reservation)
        read = await self._ledgers.read(node)
        now = await self._ledgers.clock.now()
        found = None if read.record is None else books.find(read.record, id, now)
        if found is None:
            raise NotFoundError(
                f"There is no reservation {id!r} (any more).",
                hint="`foundation resources` lists them.",
                id=id,
            )
        return _public(node, found)

    # ---- taking -------------------------------------------------------------------

    async def reserve(
        self,
        requirements: Mapping[str, float],
        *,
        ttl: float = 30.0,
        strategy: str = "load_balanced",
        node: str | None = None,
        placement: Mapping[str, Any] | None = None,
        holder: str | None = None,
        agent: str | None = None,
        timeout: float = 10.0,
    ) -> Reservation:
        """Take *requirements* of one node for *ttl* seconds: nobody else gets them meanwhile.

        The node is chosen as for an agent with these needs (a slot counts only if it is among
        them). Then `confirm` it, or start an agent with it; if neither happens in time it ends
        by itself. Cancelled, or with an unknown outcome, it may be held for *ttl*.

        Args:
            strategy: how to choose among the nodes that have room.
            node: only this one.
            placement: as in a manifest: ``require``, ``labels`` and so on.
            holder: who you are, for people; this connection's name unless given.
            agent: which agent it is for, for people.

        Raises:
            ConfigError: an argument is wrong.
            NodeNotFoundError: there is no such node.
            InfeasibleError: no node could take it, however empty.
            BusyError: some node could, but not now; ``details["reasons"]`` says why, per node.
            BusTimeoutError: outcome unknown.
            BusUnavailableError
        """
        if not _TTL_MIN_S <= ttl <= _TTL_MAX_S:
            raise ConfigError(f"ttl is {_TTL_MIN_S:g} s to 7 days, got {ttl:g}.")
        spec = _spec(requirements, placement, strategy)
        deadline = monotonic() + timeout
        while True:
            seen = await self._look(node)
            lease = await self._cluster.nodes.leader()
            leader = None if lease is None else lease.holder
            views = {name: view for name, view in seen.views.items() if name not in seen.joining}
            placer = Placer(views, seen.used(), leader, random.Random())
            found = placer.place(Wanted(token_hex(4), spec))
            if isinstance(found, Unplaceable):
                raise _refused(requirements, found, _judge(spec, seen))
            wanted = ReservationRecord(
                id=f"{token_hex(6)}@{found.node}",
                needs=dict(requirements),
                holder=self._cluster.client_name if holder is None else holder,
                since=utc_text(),
                agent=agent,
            )
            taken = await self._take(found.node, seen.reads[found.node], wanted, ttl, deadline)
            if taken is not None:
                return taken
            if monotonic() >= deadline:
                reasons = {item.node: item.reason for item in _judge(spec, seen) if item.reason}
                raise BusyError(
                    f"Others took the room for {_text(requirements)} for {timeout:g} s.",
                    hint="Try again.",
                    reasons=reasons,
                )

    async def _take(
        self, node: str, read: Read, wanted: ReservationRecord, ttl: float, deadline: float
    ) -> Reservation | None:
        """The reservation on this node; None: others were first, and it fits no more."""
        unknown: BusTimeoutError | None = None
        tries = 0
        while read.record is not None:
            now = await self._ledgers.clock.now()
            mine = books.find(read.record, wanted.id, now)
            if mine is not None:
                return _public(node, mine)  # our own write, whose answer was lost
            wanted = wanted.model_copy(update={"expires_at": now + ttl})
            after = books.reserve(read.record, wanted, now)
            if isinstance(after, str):
                break
            if monotonic() >= deadline and tries:
                break
            try:
                await self._ledgers.reserve(after, read)
            except StaleRevisionError:
                tries += 1
                await asyncio.sleep(random.random() * _JITTER_S * min(tries, 10))
            except BusTimeoutError as error:
                unknown = error
                tries += 1
            else:
                failpoint("reserve.after")
                if monotonic() < deadline or await self._ledgers.clock.now() < now + ttl:
                    return _public(node, wanted)
            read = await self._ledgers.read(node)
        if unknown is not None:
            # It may yet be written; then it is held until it expires.
            raise unknown
        return None

    async def confirm(
        self, reservation: str | Reservation, *, ttl: float | None = None
    ) -> Reservation:
        """Make it last until `release`; with *ttl* for so long, and again by each further confirm.

        Only with *ttl* does what a crashed holder had come back by itself.

        Raises:
            ReservationLostError: it has expired, was released or used up, or its node has left:
                it is not yours.
            ConfigError: that is no reservation's id, or *ttl* is wrong.
            BusTimeoutError: outcome unknown; confirm again.
            BusUnavailableError
        """
        if ttl is not None and not _TTL_MIN_S <= ttl <= _TTL_MAX_S:
            raise ConfigError(f"ttl is {_TTL_MIN_S:g} s to 7 days, got {ttl:g}.")
        id, node = _parsed(reservation)
        # Of a node that is only down it stays: that one may come back.
        known = await self._nodes.read(node)
        if known is None or known.value is None:
            raise ReservationLostError(
                f"Node {node}, of which {id} is a part, has left the cluster.",
                hint="Stop what it was for; reserve again.",
                id=id,
                left=node,
            )

        def confirmed(book: LedgerRecord, now: float) -> LedgerRecord | None:
            until = None if ttl is None else now + ttl
            return books.confirm(book, id, now, expires_at=until)

        after = await self._ledgers.change(node, confirmed)
        found = None
        if after is not None:
            found = next((item for item in after.reservations if item.id == id), None)
        if found is None:
            raise ReservationLostError(
                f"The reservation {id} has expired, was released or used up.",
                hint="Stop what it was for; reserve again.",
                id=id,
            )
        return _public(node, found)

    async def release(self, reservation: str | Reservation) -> None:
        """Give it back. Idempotent: one that is gone is no error.

        Raises:
            ConfigError: that is no reservation's id.
            BusTimeoutError: outcome unknown; release again.
            BusUnavailableError
        """
        id, node = _parsed(reservation)
        await self._ledgers.change(node, lambda book, now: books.release(book, id, now))

    # ---- reading ------------------------------------------------------------------

    async def _look(self, node: str | None = None) -> _Seen:
        views = dict(await self._cluster.nodes.views())
        if node is not None:
            if node not in views:
                raise NodeNotFoundError(
                    f"There is no node {node!r}.", hint="`foundation nodes` lists them."
                )
            views = {node: views[node]}
        reads = await self._ledgers.read_many(list(views))
        now = await self._ledgers.clock.now()
        joining = set()
        for name, view in views.items():
            read = reads.get(name)
            if read is None or read.record is None or read.record.incarnation < view.incarnation:
                joining.add(name)
                continue
            record = view.record.model_copy(update={"capacity": dict(read.record.capacity)})
            views[name] = replace(view, record=record)
        return _Seen(views, reads, frozenset(joining), now)


# ---- parts --------------------------------------------------------------------------


def _text(requirements: Mapping[str, float]) -> str:
    return ",".join(f"{name}={amount:g}" for name, amount in requirements.items())


def _spec(
    requirements: Mapping[str, float], placement: Mapping[str, Any] | None, strategy: str | None
) -> AgentSpec:
    """An agent with these needs and no others."""
    if not requirements:
        raise ConfigError("No requirements: name at least one resource, such as cpu=1.")
    for name, amount in requirements.items():
        if not is_name(name):
            raise ConfigError(f"{name!r} is no name of a resource: letters, digits, '-' and '_'.")
        if not (isinstance(amount, int | float) and math.isfinite(amount) and amount > 0):
            raise ConfigError(f"{name}={amount!r}: write a number above 0.")
    if strategy is not None and strategy not in STRATEGIES and find_custom(strategy) is None:
        raise ConfigError(
            f"There is no strategy {strategy!r}.", hint=f"Known: {', '.join(sorted(STRATEGIES))}."
        )
    rules = dict(placement or {})
    if strategy is not None:
        rules["strategy"] = strategy
    try:
        policy = PlacementPolicy.model_validate(rules)
    except ValueError as error:
        raise ConfigError(f"placement: {error}") from error
    amounts = {name: float(amount) for name, amount in requirements.items()}
    return AgentSpec(run=_RUN, resources={books.SLOTS: 0.0, **amounts}, placement=policy)


def _parsed(reservation: str | Reservation) -> tuple[str, str]:
    id = reservation.id if isinstance(reservation, Reservation) else reservation
    name, at, node = id.partition("@")
    if not at or not is_name(name) or not is_name(node):
        raise ConfigError(f"{id!r} is no reservation's id: it looks like 0123456789ab@NODE.")
    return id, node


def _public(node: str, record: ReservationRecord) -> Reservation:
    return Reservation(node=node, **record.model_dump())


def _reservations(node: str, ledger: LedgerRecord | None, now: float) -> list[Reservation]:
    return [] if ledger is None else [_public(node, item) for item in books.live(ledger, now)]


def _verdict(spec: AgentSpec, view: NodeView, usage: Usage | None) -> tuple[Verdict, str]:
    reason = unfit(spec, view)
    if reason is not None:
        record = view.record.model_copy(update={"cordoned": False})
        ever = unfit(spec, replace(view, record=record, status=NodeStatus.UP))
        return (Verdict.UNAVAILABLE, reason) if ever is None else (Verdict.INFEASIBLE, ever)
    if usage is None:
        return Verdict.BUSY, _JOINING
    reason = full(needs(spec), view, usage)
    return (Verdict.FITS, "") if reason is None else (Verdict.BUSY, reason)


def _judge(spec: AgentSpec, seen: _Seen) -> list[NodeVerdict]:
    used = seen.used()
    found = []
    for name in sorted(seen.views):
        verdict, reason = _verdict(spec, seen.views[name], used.get(name))
        found.append(NodeVerdict(node=name, verdict=verdict, reason=reason))
    return found


def _best(nodes: Iterable[NodeVerdict]) -> Verdict:
    return min((item.verdict for item in nodes), key=_WORST.index, default=Verdict.INFEASIBLE)


def _refused(
    requirements: Mapping[str, float], found: Unplaceable, nodes: Iterable[NodeVerdict]
) -> PlacementError:
    nodes = list(nodes)
    # The placer knows more (its strategy's rules), the verdicts see nodes that it was not given.
    reasons = {item.node: found.reasons.get(item.node) or item.reason for item in nodes}
    why = Unplaceable(reasons).text()
    wanted = _text(requirements)
    if _best(nodes) is Verdict.INFEASIBLE:
        return InfeasibleError(
            f"No node could ever take {wanted}: {why}.",
            hint="Ask for less, or start a node that offers it.",
            reasons=reasons,
        )
    return BusyError(f"No node can take {wanted} now: {why}.", hint="Try again.", reasons=reasons)


def _amount(capacity: float, used: float, reserved: float) -> Amount:
    taken = used + reserved
    return Amount(
        capacity=capacity,
        used=used,
        reserved=reserved,
        free=max(0.0, round(capacity - taken, 9)),
        utilisation=round(taken / capacity, 4) if capacity > 0 else 0.0,
    )


def _amounts(
    capacity: Mapping[str, float], ledger: LedgerRecord | None, now: float
) -> dict[str, Amount]:
    used = {} if ledger is None else ledger.agents
    reserved = {} if ledger is None else books.reserved(books.live(ledger, now))
    return {
        name: _amount(capacity[name], used.get(name, 0.0), reserved.get(name, 0.0))
        for name in sorted(capacity)
    }


def _sum(parts: Iterable[Mapping[str, Amount]]) -> dict[str, Amount]:
    sums: dict[str, list[float]] = {}
    for part in parts:
        for name, amount in part.items():
            sum_ = sums.setdefault(name, [0.0, 0.0, 0.0])
            for index, value in enumerate((amount.capacity, amount.used, amount.reserved)):
                sum_[index] = round(sum_[index] + value, 9)
    return {name: _amount(*sums[name]) for name in sorted(sums)}


def _unmet(records: Iterable[AgentRecord], seen: _Seen) -> list[Demand]:
    groups: dict[tuple[str, str], tuple[AgentRecord, int]] = {}
    for record in records:
        if record.status is AgentStatus.PENDING:
            key = (record.deployment or record.id, record.digest)
            first, count = groups.get(key, (record, 0))
            groups[key] = (first, count + 1)
    found = []
    for (deployment, _), (record, count) in sorted(groups.items()):
        found.append(
            Demand(
                deployment=deployment,
                agents=count,
                needs={name: amount for name, amount in needs(record.spec).items() if amount > 0},
                verdict=_best(_judge(record.spec, seen)),
                reason=record.reason or "",
            )
        )
    return found
