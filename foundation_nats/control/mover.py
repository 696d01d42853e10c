"""Carries out drains and rebalances while this node leads: a few moves at a time, until all are made.

IO: writes orders into agents' records, by compare-and-set, and results into the
bucket ``settings``. Everything it must know is in records and wishes, so that
the next leader goes on where this one ended; only how long moves took is
remembered here. `moves.py` says what may begin, `rebalance.py` where agents go.

A node is emptied if an operator drains it, or if it says itself that it is about
to end (``draining`` in its heartbeats). What fits nowhere stays, unless forced.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.cluster.ledgers import Ledgers
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import Command, Plan
from foundation_nats.control.desired import Desired
from foundation_nats.control.executor import execute
from foundation_nats.control.moves import (
    HOLDING,
    SKIPPED_SHOWN_MAX,
    Order,
    begin,
    is_moving,
    may_move,
    progress,
    redirected,
)
from foundation_nats.control.rebalance import Balance, drain_moves, rebalance, usage_of
from foundation_nats.control.rebalance import Move as ProposedMove
from foundation_nats.control.upkeep import Upkeep
from foundation_nats.errors import FoundationError
from foundation_nats.placement.constraints import Usage, needs
from foundation_schemas import (
    AgentStatus,
    Cordon,
    NodeStatus,
    PlannedMove,
    RebalanceRecord,
)

_DEBOUNCE_S = 0.002
_LOOK_AGAIN_S = 0.5
"""While something is open, should no change wake us."""
_REPLAN_S = 0.25
"""Between two looks at what is left of a drain …"""
_REPLAN_IDLE_S = 2.0
"""… and where the last one found nothing to do."""
_RETRY_S = 0.2
_TELL_EVERY_S = 0.5
_OFFERED_WITHIN_S = 30.0
_AGENTS_NAMED_MAX = 50

Nodes = Callable[[], Mapping[str, NodeView]]


@dataclass(slots=True)
class _Seen:
    """A move that was seen to begin."""

    source: str
    at: float


@dataclass(frozen=True, slots=True)
class _Done:
    agent: str
    source: str
    target: str
    ms: float


class Mover:
    """The leader's loop for moves."""

    def __init__(
        self,
        config: ControlConfig,
        membership: Membership,
        registry: Registry,
        desired: Desired,
        upkeep: Upkeep,
        nodes: Nodes,
        ledgers: Ledgers | None = None,
    ) -> None:
        """*nodes* gives the nodes as they are for placing, cordons included."""
        self._config = config
        self._membership = membership
        self._registry = registry
        self._desired = desired
        self._upkeep = upkeep
        self._nodes = nodes
        self._ledgers = ledgers
        self._term: int | None = None
        self._is_ready = False
        self._wake = asyncio.Event()
        self._orders: list[Order] = []
        self._planned_at = -1e9
        self._replan_s = _REPLAN_S
        self._must_plan = True
        self._in_flight: dict[str, Held] = {}
        self._seen: dict[str, _Seen] = {}
        self._done: list[_Done] = []
        self._told_at = -1e9
        self._joined: dict[str, tuple[int, float | None]] = {}
        """Node to its life and when it came; None: it was there before us, or is dealt with."""
        self._rng = random.Random()
        self._log = get_logger("mover").bind(node=membership.node)

    # ---- life -------------------------------------------------------------------

    def open(self, scope: TaskScope) -> None:
        """Begin to watch, and to work whenever `lead` says so, until *scope* closes."""
        for agent, held in self._registry.all().items():
            self._note(agent, held)
        for name, view in self._membership.nodes().items():
            self._joined[name] = view.incarnation, None
        self._registry.subscribe(self._on_record)
        self._upkeep.subscribe(self._on_wish)
        self._desired.subscribe(lambda _name: self._on_wish())
        self._membership.subscribe(self._on_members)
        scope.start(self._run(), "mover")

    def lead(self, term: int | None) -> None:
        """Work in this term; None: stop."""
        self._term = term
        self._is_ready = False
        self._orders.clear()
        self._must_plan = True
        self._wake.set()

    def _on_record(self, agent: str, held: Held | None) -> None:
        if self._note(agent, held) and self._term is not None:
            self._wake.set()

    def _on_wish(self) -> None:
        self._must_plan = True
        self._wake.set()

    def _on_members(self) -> None:
        now = monotonic()
        for name, view in self._membership.nodes().items():
            known = self._joined.get(name)
            if view.status is NodeStatus.UP and (known is None or known[0] != view.incarnation):
                self._joined[name] = view.incarnation, now
        self._on_wish()

    def _note(self, agent: str, held: Held | None) -> bool:
        """Keep count of what is in flight; whether this concerns a move."""
        record = None if held is None else held.record
        if held is not None and record is not None and is_moving(record):
            self._in_flight[agent] = held
            if record.move is not None and record.node is not None:
                self._seen.setdefault(agent, _Seen(record.node, monotonic()))
            return True
        was = self._in_flight.pop(agent, None) is not None
        seen = self._seen.pop(agent, None)
        if (
            seen is not None
            and record is not None
            and record.status is AgentStatus.RUNNING
            and record.node is not None
            and record.node != seen.source
        ):
            took = (monotonic() - seen.at) * 1000
            self._done.append(_Done(agent, seen.source, record.node, round(took, 1)))
        return was

    # ---- the loop -------------------------------------------------------------------

    async def _run(self) -> None:
        wait: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait)
            await asyncio.sleep(_DEBOUNCE_S)  # gather what changes together
            self._wake.clear()
            term = self._term
            if term is None:
                self._done.clear()
                wait = None
                continue
            try:
                wait = await self._look(term)
            except FoundationError as error:
                self._log.warning("moves put off; trying again", error=str(error))
                wait = _RETRY_S

    async def _look(self, term: int) -> float | None:
        """Let moves begin, and finish what is done; returns when to look again."""
        if not self._is_ready:
            await self._upkeep.refresh()
            await self._desired.refresh()
            self._is_ready = True
        now = monotonic()
        self._tell(now)
        wait = self._look_at_joined(now)
        leaving = self._leaving()
        open_plan = self._open_plan()
        if not leaving and open_plan is None and not self._in_flight:
            self._orders.clear()
            if wait is not None and wait <= 0:
                await self._rebalance_by_itself()
                return _LOOK_AGAIN_S
            return wait
        nodes = self._nodes()
        if self._must_plan or (not self._orders and now - self._planned_at >= self._replan_s):
            self._must_plan = False
            self._planned_at = now
            self._orders = self._plan(leaving, nodes)
            is_idle = not self._orders and not self._in_flight
            self._replan_s = _REPLAN_IDLE_S if is_idle else _REPLAN_S
        commands: list[Command] = []
        at = utc_text()
        for item in self._in_flight.values():
            found = redirected(item, nodes, at)
            if found is not None:
                commands.append(found)
        if self._membership.is_in_storm:
            self._orders.clear()  # the agents of lost nodes come first
        ready, self._orders = begin(
            self._orders,
            self._registry.get,
            nodes,
            [item.record for item in self._in_flight.values()],
            per_cluster=self._config.moves_max,
            per_node=self._config.moves_per_node_max,
            used=self._used(nodes),
            at=at,
        )
        commands += ready
        if commands:
            outcome = await execute(
                self._registry, Plan(tuple(commands)), may_go_on=lambda: self._term == term
            )
            failpoint("moves.ordered")
            if not outcome.is_complete:
                self._must_plan = True
                return _RETRY_S
        await self._finish_drains(leaving)
        if open_plan is not None and not self._membership.is_in_storm:
            await self._finish_rebalance(open_plan, nodes)
        return _REPLAN_S if leaving or self._in_flight else _LOOK_AGAIN_S

    def _leaving(self) -> dict[str, Cordon]:
        """Nodes that shall be empty; those that only say so themselves under a cordon of no one."""
        found = {
            name: cordon
            for name, cordon in self._upkeep.cordons.items()
            if cordon.drain and (cordon.drained_at is None or self._holds(name))
        }
        for name, view in self._membership.nodes().items():
            if view.status is NodeStatus.DRAINING and self._holds(name):
                found.setdefault(name, Cordon(node=name, reason="it ends", drain=True))
        return found

    def _holds(self, node: str) -> bool:
        return any(held.record.status in HOLDING for held in self._registry.on_node(node))

    def _open_plan(self) -> RebalanceRecord | None:
        plan = self._upkeep.rebalance
        return None if plan is None or plan.finished_at is not None else plan

    def _plan(self, leaving: Mapping[str, Cordon], nodes: Mapping[str, NodeView]) -> list[Order]:
        orders: list[Order] = []
        reserved = self._reserved()
        held = self._registry.all()
        for name, cordon in leaving.items():
            found = drain_moves(
                name,
                self._desired.all(),
                held,
                nodes,
                leader=self._membership.node,
                rng=self._rng,
                reserved=reserved,
            )
            for move in found.moves:
                item = held.get(move.agent)
                if item is None or not may_move(item.record):
                    continue
                orders.append(Order(move.agent, name, move.target, move.why))
                usage = reserved.setdefault(move.target, Usage())
                usage.add(item.record.spec, item.record.deployment or move.agent)
            if cordon.force:
                orders += [
                    Order(agent, name, None, f"{name} is being emptied by force")
                    for agent in found.stuck
                ]
        chosen = {order.agent for order in orders}
        plan = self._open_plan()
        if plan is not None:
            todo = progress(plan, self._registry.get, nodes).todo
            orders += [order for order in todo if order.agent not in chosen]
        return orders

    def _used(self, nodes: Mapping[str, NodeView]) -> Mapping[str, Usage] | None:
        """What is taken, if that may matter: to count it takes a look at every record."""
        declared = {name for view in nodes.values() for name in view.record.capacity}
        items = (self._registry.get(order.agent) for order in self._orders)
        if not any(
            item is not None and declared & needs(item.record.spec).keys() for item in items
        ):
            return None
        return usage_of(self._registry.all(), nodes, self._reserved())

    def _reserved(self) -> dict[str, Usage]:
        """What clients have reserved on the nodes."""
        found: dict[str, Usage] = {}
        for node, items in ({} if self._ledgers is None else self._ledgers.reservations()).items():
            resources = found.setdefault(node, Usage()).resources
            for item in items:
                for name, amount in item.needs.items():
                    resources[name] = resources.get(name, 0.0) + amount
        return found

    # ---- finishing --------------------------------------------------------------------

    async def _finish_drains(self, leaving: Mapping[str, Cordon]) -> None:
        for name in leaving:
            cordon = self._upkeep.cordons.get(name)
            if cordon is None or cordon.drained_at is not None or self._holds(name):
                continue
            now = utc_text()
            said = False

            def drained(current: Cordon | None, now: str = now) -> Cordon | None:
                nonlocal said
                if current is None or not current.drain or current.drained_at is not None:
                    return current
                said = True
                return current.model_copy(update={"drained_at": now})

            await self._upkeep.set_cordon(name, drained)
            if said:
                self._membership.emit("node", "drained", f"Node {name} is empty.", node=name)

    async def _finish_rebalance(self, plan: RebalanceRecord, nodes: Mapping[str, NodeView]) -> None:
        if self._in_flight:
            return
        found = progress(plan, self._registry.get, nodes)
        if found.in_flight:
            return
        blocked = {order.agent for order in self._orders}
        if any(order.agent not in blocked for order in found.todo):
            self._must_plan = True
            self._wake.set()
            return
        skipped = {**found.skipped, **dict.fromkeys(blocked, "there is no room for it")}
        finished = plan.model_copy(
            update={
                "finished_at": utc_text(),
                "moved": found.moved,
                "skipped": dict(list(skipped.items())[:SKIPPED_SHOWN_MAX]),
            }
        )
        if await self._upkeep.finish_rebalance(finished):
            self._orders.clear()
            self._membership.emit(
                "cluster",
                "rebalanced",
                f"{found.moved} of {len(plan.moves)} agents moved ({plan.strategy}).",
                id=plan.id,
                strategy=plan.strategy,
                moved=found.moved,
                skipped=finished.skipped,
            )

    # ---- by itself --------------------------------------------------------------------

    def _look_at_joined(self, now: float) -> float | None:
        """In how many seconds to see whether a node that has joined makes a rebalance pay."""
        soonest: float | None = None
        for _, since in self._joined.values():
            if since is not None:
                left = since + self._config.rebalance_after_s - now
                soonest = left if soonest is None else min(soonest, left)
        return soonest

    async def _rebalance_by_itself(self) -> None:
        """Once a new node has been up for a while: even things out, or say that it would pay."""
        now = monotonic()
        due = []
        for name, (incarnation, since) in self._joined.items():
            waited = 0.0 if since is None else now - since
            if since is None or waited < self._config.rebalance_after_s:
                continue
            self._joined[name] = incarnation, None
            view = self._membership.nodes().get(name)
            is_there = view is not None and view.status is NodeStatus.UP
            # A leader before us has said it, if it is long ago.
            is_news = waited < self._config.rebalance_after_s + _OFFERED_WITHIN_S
            if is_there and (is_news or self._config.rebalance_on_join):
                due.append(name)
        if not due:
            return
        plan = planned(
            rebalance(
                self._desired.all(),
                self._registry.all(),
                self._nodes(),
                strategy=Balance(self._config.rebalance_strategy),
                budget=self._config.rebalance_budget,
                reserved=self._reserved(),
            ).moves,
            self._registry.all(),
            strategy=self._config.rebalance_strategy,
            by=f"{self._membership.node}: {', '.join(due)} joined",
        )
        if not plan.moves:
            return
        if self._config.rebalance_on_join:
            await self._upkeep.begin_rebalance(plan)
            return
        count = len(plan.moves)
        agents = "1 agent" if count == 1 else f"{count} agents"
        self._membership.emit(
            "cluster",
            "rebalance_offered",
            f"{', '.join(due)} joined: `foundation rebalance` would move {agents}.",
            nodes=due,
            strategy=plan.strategy,
            moves=count,
        )

    # ---- telling ----------------------------------------------------------------------

    def _tell(self, now: float) -> None:
        goes_on = bool(self._in_flight or self._orders)
        if not self._done or (goes_on and now - self._told_at < _TELL_EVERY_S):
            return
        done, self._done, self._told_at = self._done, [], now
        named = done[:_AGENTS_NAMED_MAX]
        sources = sorted({item.source for item in done})
        targets = Counter(item.target for item in done)
        who = done[0].agent if len(done) == 1 else f"{len(done)} agents"
        times = [item.ms for item in done]
        self._membership.emit(
            "agent",
            "moved",
            f"{who} moved from {', '.join(sources)} to {', '.join(sorted(targets))}.",
            count=len(done),
            sources=sources,
            to=dict(targets),
            agents={item.agent: item.target for item in named},
            ms=round(statistics.median(times), 1),
            ms_max=max(times),
        )
        self._log.info("agents moved", count=len(done), ms=round(statistics.median(times), 1))


def planned(
    moves: Sequence[ProposedMove], held: Mapping[str, Held], *, strategy: str, by: str
) -> RebalanceRecord:
    """The record of a rebalance that makes *moves*."""
    return RebalanceRecord(
        id=token_hex(4),
        strategy=strategy,
        by=by,
        at=utc_text(),
        moves=[
            PlannedMove(
                agent=move.agent,
                source=move.source,
                target=move.target,
                epoch=held[move.agent].record.epoch,
                why=move.why,
            )
            for move in moves
        ],
    )
