"""Moves of running agents for clients: what is planned, and how those that are made go.

A plan is made here, from the registry and what the nodes answer now; the leader
carries it out. Pauses are upper bounds, by this process's clock: from the
moment that it learnt of the order until it learnt that the agent runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.control.moves import HOLDING, is_arriving
from foundation_nats.control.rebalance import (
    BUDGET,
    THRESHOLD,
    Balance,
    Drain,
    Rebalance,
    drain_moves,
)
from foundation_nats.control.rebalance import rebalance as propose
from foundation_nats.control.upkeep import Upkeep
from foundation_nats.errors import BusError, ConfigError, NotSettledError
from foundation_schemas import AgentStatus, Cordon, NodeStatus, PlannedMove, RebalanceRecord

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.api.refs import NodeInfo

_POLL_S = 0.02
_STUCK_FOR_S = 2.0
"""Where nothing but agents that fit nowhere is left for so long, waiting ends."""
_DONE_MAX = 20_000


@dataclass(frozen=True, slots=True)
class MovedAgent:
    """One agent that runs on another node now."""

    agent: str
    source: str
    target: str
    ms: float
    """From the order until it ran again: no pause is longer."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What a drain has done."""

    node: str
    moved: list[MovedAgent] = field(default_factory=list)
    left: dict[str, dict[str, str]] = field(default_factory=dict)
    """Agents that stay because they fit nowhere else, to the reason per node."""


@dataclass(frozen=True, slots=True)
class RebalanceReport:
    """What a rebalance would do, or has done."""

    id: str | None
    """None: there was nothing to do, or it was only planned."""
    strategy: str
    plan: Rebalance
    moved: list[MovedAgent] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Agents that were not moved after all, to the reason; the rest of the plan is in `moved`.
    One whose node died meanwhile may have come to where it should be all the same."""


Progress = Callable[[int, int], None]
"""Called with how many have been moved, and how many there are."""


class MoveLog:
    """Follows moves in one process's view of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._open: dict[str, tuple[str, float]] = {}
        self.done: list[MovedAgent] = []
        registry.subscribe(self._on_change)

    @property
    def open_count(self) -> int:
        """How many are on their way."""
        return len(self._open)

    def _on_change(self, agent: str, held: Held | None) -> None:
        if held is None:
            self._open.pop(agent, None)
            return
        record = held.record
        if record.move is not None and record.node is not None:
            self._open.setdefault(agent, (record.node, monotonic()))
        elif agent in self._open and not is_arriving(record) and record.node is not None:
            source, began = self._open.pop(agent)
            if record.status is AgentStatus.RUNNING and record.node != source:
                took = round((monotonic() - began) * 1000, 1)
                self.done.append(MovedAgent(agent, source, record.node, took))
                if len(self.done) > _DONE_MAX:
                    del self.done[: _DONE_MAX // 2]


class Mover:
    """The client's side of `cordon`, `drain` and `rebalance`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.upkeep = Upkeep(cluster.bus, cluster.subjects)
        self._log: MoveLog | None = None
        self._is_open = False
        self._opening = asyncio.Lock()

    async def _open(self) -> tuple[Registry, MoveLog]:
        registry = await self._cluster._open_registry()
        async with self._opening:
            if not self._is_open:
                await self.upkeep.open(await self._cluster._open_scope())
                self._is_open = True
            if self._log is None:
                self._log = MoveLog(registry)
            return registry, self._log

    async def cordons(self) -> Mapping[str, Cordon]:
        """The cordons there are, by node."""
        if not self._is_open:
            await self.upkeep.refresh()
        return self.upkeep.cordons

    # ---- cordon -----------------------------------------------------------------

    async def cordon(self, node: str, reason: str) -> Cordon:
        """Give the node no new agents; a drain that goes on, goes on."""
        await self._check_known(node)
        said = False

        def change(before: Cordon | None) -> Cordon:
            nonlocal said
            said = before is None
            if before is not None:
                return before.model_copy(update={"reason": reason or before.reason})
            return Cordon(node=node, reason=reason, at=utc_text())

        after = await self.upkeep.set_cordon(node, change)
        assert after is not None
        if said:
            self._emit("cordoned", f"Node {node} gets no new agents.", node, reason=reason)
        return after

    async def uncordon(self, node: str) -> bool:
        """Take the cordon away; False: there was none."""
        had = False

        def change(before: Cordon | None) -> None:
            nonlocal had
            had = before is not None

        await self.upkeep.set_cordon(node, change)
        if had:
            self._emit("uncordoned", f"Node {node} may get agents again.", node)
        else:
            await self._check_known(node)
        return had

    async def _check_known(self, node: str) -> None:
        await self._cluster.nodes.get(node)

    def _emit(self, what: str, message: str, node: str, **data: object) -> None:
        self._cluster._emit("node", what, message, node=node, **data)

    # ---- drain ------------------------------------------------------------------

    async def plan_drain(self, node: str) -> Drain:
        """Where the node's agents would go, and which fit nowhere."""
        await self._check_known(node)
        registry, _ = await self._open()
        return await self._drain_of(node, registry)

    async def _drain_of(self, node: str, registry: Registry) -> Drain:
        lease = await self._cluster.leader()
        views = await self._cluster.nodes.views()
        return drain_moves(
            node,
            await self._cluster.deployments.wishes(),
            registry.all(),
            views,
            leader=None if lease is None else lease.holder,
            reserved=await self._cluster.resources.reserved(views),
        )

    async def drain(
        self, node: str, *, timeout: float, force: bool, reason: str, on_progress: Progress | None
    ) -> DrainReport:
        """Wish the node empty, and wait until it is."""
        await self._check_known(node)
        registry, log = await self._open()
        before = len(log.done)

        def change(cordon: Cordon | None) -> Cordon:
            if cordon is None:
                cordon = Cordon(node=node, at=utc_text())
            update = {"drain": True, "force": force, "drained_at": None}
            return cordon.model_copy(update={**update, "reason": reason or cordon.reason})

        await self.upkeep.set_cordon(node, change)
        self._emit("cordoned", f"Node {node} is being emptied.", node, reason=reason, drain=True)
        deadline = monotonic() + timeout
        total = len(_on(registry, node))
        stuck_since: float | None = None
        looked_at = 0.0
        before_count = -1
        drain = Drain(())
        while left := _on(registry, node):
            now = monotonic()
            if on_progress is not None:
                on_progress(max(0, total - len(left)), total)
            if node not in self.upkeep.cordons:
                raise NotSettledError(
                    f"{node} was uncordoned while it was being emptied: {len(left)} agents stay.",
                    hint="Somebody else did it; agree with them, and drain again.",
                    left=left[:1000],
                )
            is_late = now >= deadline
            if now - looked_at > _STUCK_FOR_S / 4:
                looked_at = now
                stands_still = len(left) == before_count
                before_count = len(left)
                if not stands_still:
                    stuck_since = None
            else:
                stands_still = False
            if stands_still or is_late:
                with contextlib.suppress(BusError):  # it says why agents stay; none leaves by it
                    drain = await self._drain_of(node, registry)
                is_stuck = set(drain.stuck) >= set(left) and not force
                stuck_since = (stuck_since or now) if is_stuck else None
            if is_late or (stuck_since and now - stuck_since >= _STUCK_FOR_S):
                raise self._not_empty(node, left, drain, timeout if is_late else None)
            await asyncio.sleep(_POLL_S)
        await self._settle(log, node)
        if on_progress is not None:
            on_progress(total, total)
        return DrainReport(node, [item for item in log.done[before:] if item.source == node])

    async def _settle(self, log: MoveLog, node: str) -> None:
        """Empty as we see it: let the leader say so too, and those that have just left run."""
        deadline = monotonic() + _STUCK_FOR_S
        while monotonic() < deadline:
            cordon = self.upkeep.cordons.get(node)
            if not log.open_count and (cordon is None or cordon.drained_at is not None):
                return
            await asyncio.sleep(_POLL_S)

    def _not_empty(
        self, node: str, left: list[str], drain: Drain, late_s: float | None
    ) -> NotSettledError:
        stuck = {agent: dict(drain.stuck[agent]) for agent in left if agent in drain.stuck}
        texts = {
            agent: "; ".join(f"{name}: {why}" for name, why in reasons.items())
            or "there is no other node"
            for agent, reasons in stuck.items()
        }
        first = "; ".join(f"{agent} ({why})" for agent, why in list(texts.items())[:3])
        what = f"{len(left)} agents are still on {node}"
        if stuck:
            what += f"; {len(stuck)} of them fit nowhere else: {first}"
        return NotSettledError(
            f"{what}." if late_s is None else f"After {late_s:g} s {what}.",
            hint="They keep running, and leave as soon as they can: "
            "make room, drain with --force, or `foundation uncordon` the node.",
            reasons=texts or dict.fromkeys(left[:50], "it has not left yet"),
            left=left[:1000],
        )

    # ---- rebalance --------------------------------------------------------------

    async def plan_rebalance(self, strategy: str, max_moves: int | None) -> Rebalance:
        """What a rebalance would do now.

        Raises:
            ConfigError: there is no such strategy.
        """
        try:
            balance = Balance(strategy)
        except ValueError:
            known = ", ".join(item.value for item in Balance)
            raise ConfigError(
                f"There is no rebalance strategy {strategy!r}: use {known}."
            ) from None
        if max_moves is not None and max_moves < 1:
            raise ConfigError(f"At least one move must be allowed, not {max_moves}.")
        registry, _ = await self._open()
        views = await self._cluster.nodes.views()
        return propose(
            await self._cluster.deployments.wishes(),
            registry.all(),
            views,
            strategy=balance,
            budget=min(max_moves or BUDGET, BUDGET),
            reserved=await self._cluster.resources.reserved(views),
        )

    async def offer(self, nodes: Sequence[NodeInfo]) -> int:
        """How many moves a rebalance would make, of agents per worker; 0: it would not pay.

        *nodes* are those that were just listed: while they are even by their own counts,
        nothing else is read.
        """
        loads = [
            node.agents / max(1, len(node.workers))
            for node in nodes
            if node.status == NodeStatus.UP and not node.cordoned
        ]
        # Two nodes that differ by an agent are even enough, see `control.rebalance`.
        if len(loads) < 2 or max(loads) - min(loads) <= max(1.0, THRESHOLD * max(loads)):
            return 0
        return len((await self.plan_rebalance(Balance.EVEN_DISTRIBUTION.value, None)).moves)

    async def rebalance(
        self,
        strategy: str,
        *,
        max_moves: int | None,
        wait: bool,
        timeout: float,
        on_progress: Progress | None,
    ) -> RebalanceReport:
        """Plan, have it carried out, and wait for its end."""
        plan = await self.plan_rebalance(strategy, max_moves)
        if not plan.moves:
            return RebalanceReport(None, strategy, plan)
        registry, log = await self._open()
        before = len(log.done)
        held = registry.all()
        wanted = RebalanceRecord(
            id=token_hex(4),
            strategy=strategy,
            by=self._cluster.client_name,
            at=utc_text(),
            moves=[
                PlannedMove(
                    agent=move.agent,
                    source=move.source,
                    target=move.target,
                    epoch=held[move.agent].record.epoch,
                    why=move.why,
                )
                for move in plan.moves
                if move.agent in held
            ],
        )
        await self.upkeep.begin_rebalance(wanted)
        if not wait:
            return RebalanceReport(wanted.id, strategy, plan)
        agents = {move.agent for move in wanted.moves}
        deadline = monotonic() + timeout
        ended_at: float | None = None
        while True:
            found = self.upkeep.rebalance
            moved = [item for item in log.done[before:] if item.agent in agents]
            if on_progress is not None:
                on_progress(len(moved), len(agents))
            if found is not None and (found.id != wanted.id or found.finished_at is not None):
                skipped = dict(found.skipped) if found.id == wanted.id else {}
                ended_at = ended_at or monotonic()
                if log.open_count and monotonic() < ended_at + _STUCK_FOR_S:
                    # The leader has seen the last ones arrive a little before us.
                    await asyncio.sleep(_POLL_S)
                    continue
                for agent in sorted(agents - {item.agent for item in moved} - skipped.keys()):
                    item = registry.get(agent)
                    where = None if item is None else item.record.node
                    skipped[agent] = f"it is on {where or 'no node'}, and not by this move"
                return RebalanceReport(wanted.id, strategy, plan, moved, skipped)
            if monotonic() >= deadline:
                raise NotSettledError(
                    f"{len(moved)} of {len(agents)} agents were moved within {timeout:g} s.",
                    hint="It goes on: `foundation events --topic cluster` tells of its end.",
                )
            await asyncio.sleep(_POLL_S)


def _on(registry: Registry, node: str) -> list[str]:
    """The agents that the node has, or is about to."""
    return sorted(
        held.record.id for held in registry.on_node(node) if held.record.status in HOLDING
    )


__all__ = [
    "DrainReport",
    "MoveLog",
    "MovedAgent",
    "Mover",
    "RebalanceReport",
]
