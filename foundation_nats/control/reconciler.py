"""Makes wishes true while this node leads: looks, plans, carries out, and looks again.

One level-triggered loop over `plan` and `execute`. It wakes on every change of
the registry, the wishes or the nodes, collects changes for a few milliseconds,
and passes over everything at least every `resync_every_s`, so that a lost wake
costs time, never truth. A change of the nodes is urgent and is not collected.

While it doesn't lead it only remembers since when records are as they are, so
that grace periods don't begin anew with a new leader who was there before.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from foundation_nats.base import telemetry
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.cluster.ledgers import Ledgers
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.cluster.view import NodeView, missing_node
from foundation_nats.config import Config
from foundation_nats.control.commands import (
    Assign,
    Cause,
    Command,
    MarkPending,
    MarkStopped,
    MarkUnavailable,
    Plan,
    Quarantine,
)
from foundation_nats.control.desired import Desired
from foundation_nats.control.executor import Outcome, execute
from foundation_nats.control.pacing import commands_max, left_s, pause_s
from foundation_nats.control.planner import COMMANDS_MAX, History, plan
from foundation_nats.control.rollout_keeper import RolloutKeeper
from foundation_nats.control.trust import is_flapping
from foundation_nats.control.upkeep import Upkeep
from foundation_nats.errors import FoundationError
from foundation_schemas import AgentStatus, LedgerRecord, NodeStatus

_DEBOUNCE_S = 0.005
_QUIET_S = 0.25
"""How long an agent that came to run may wait for a pass: it seldom needs one."""
_RETRY_S = 0.2
_STALL_S = 1.0
_REST_FACTOR = 2.0
"""After a pass the loop rests this many times as long as the pass took, except when urgent."""
_AGENTS_NAMED_MAX = 50
_NODES_NAMED_MAX = 20
_WAITING_TOLD_MAX = 20
_LOST = (Cause.NODE_DOWN, Cause.NODE_RESTARTED)


class Reconciler:
    """The leader's loop."""

    def __init__(
        self,
        config: Config,
        membership: Membership,
        registry: Registry,
        desired: Desired,
        upkeep: Upkeep | None = None,
        ledgers: Ledgers | None = None,
    ) -> None:
        self._control = config.control
        self._liveness = config.liveness
        self._membership = membership
        self._registry = registry
        self._desired = desired
        self._upkeep = upkeep
        self._ledgers = ledgers
        self._log = get_logger("reconciler").bind(node=membership.node)
        self._history = History()
        self._rollouts = RolloutKeeper(desired, registry, membership.emit)
        self._marks: dict[str, tuple[AgentStatus, int, int]] = {}
        self._missing_since: dict[str, float] = {}
        self._down_at: dict[str, float] = {}
        self._stormed_at: float | None = None
        self._born: dict[str, tuple[int, float]] = {}
        """Node to its life and when we first saw that."""
        self._distrusted: set[str] = set()
        """Nodes that live and flap, as last looked at."""
        self._newest = 0
        self._epoch_floor = 0
        self._is_ready = False
        self._term: int | None = None
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._wake_later: asyncio.TimerHandle | None = None
        self._rng = random.Random()
        self._passes = 0

    # ---- life -------------------------------------------------------------------

    def open(self, scope: TaskScope) -> None:
        """Begin to remember, and to work whenever `lead` says so, until *scope* closes."""
        now = monotonic()
        for agent, held in self._registry.all().items():
            self._note(agent, held, now)
        self._registry.subscribe(self._on_record)
        self._desired.subscribe(lambda _name: self.wake())
        if self._upkeep is not None:
            self._upkeep.subscribe(self.wake)
        if self._ledgers is not None:
            self._ledgers.subscribe(self._on_ledger)
        self._membership.subscribe(self._on_members)
        self._on_members()
        scope.start(self._run(), "reconciler")

    def lead(self, term: int | None) -> None:
        """Work in this term; None: stop. A pass in flight writes no further chunk."""
        self._term = term
        self._is_ready = False
        self._missing_since.clear()
        self._rollouts.forget()
        if term is not None:
            self._urgent.set()
            self._wake.set()

    def wake(self, *, urgent: bool = False) -> None:
        """Look at everything soon."""
        if self._term is not None:
            if urgent:
                self._urgent.set()
            self._wake.set()

    @property
    def passes(self) -> int:
        """How many passes were made, for tests and statistics."""
        return self._passes

    # ---- remembering --------------------------------------------------------------

    def _on_record(self, agent: str, held: Held | None) -> None:
        now = monotonic()
        self._note(agent, held, now)
        if self._term is None:
            return
        record = None if held is None else held.record
        if record is not None and record.status in (AgentStatus.STARTING, AgentStatus.MOVING):
            return  # our own doing
        if record is not None and record.status is AgentStatus.RUNNING:
            if self._wake_later is None and not self._wake.is_set():
                loop = asyncio.get_running_loop()
                self._wake_later = loop.call_later(_QUIET_S, self._on_quiet)
            return
        self.wake()

    def _on_ledger(
        self, _node: str, before: LedgerRecord | None, after: LedgerRecord | None
    ) -> None:
        """What is reserved no more may be what an agent waits for."""
        left = set() if after is None else {item.id for item in after.reservations}
        if before is not None and any(item.id not in left for item in before.reservations):
            self.wake()

    def _on_quiet(self) -> None:
        self._wake_later = None
        self.wake()

    def _note(self, agent: str, held: Held | None, now: float) -> None:
        history = self._history
        if held is None:
            self._newest = max(self._newest, self._registry.tombstone(agent))
            self._marks.pop(agent, None)
            history.since.pop(agent, None)
            history.homes.pop(agent, None)
            return
        record = held.record
        self._newest = max(self._newest, held.revision)
        if record.status is AgentStatus.RUNNING and record.desired == "run":
            self._marks.pop(agent, None)
            history.since.pop(agent, None)
            history.homes.pop(agent, None)
            if record.node is not None:
                history.progress[record.node] = now
            return
        # Only agents that don't run are remembered: they are few.
        mark = (record.status, record.epoch, record.failures)
        if self._marks.get(agent) != mark:
            self._marks[agent] = mark
            history.since[agent] = now
        if record.node is not None:
            history.homes[agent] = record.node

    def _on_members(self) -> None:
        now = monotonic()
        if self._membership.is_in_storm:
            self._stormed_at = now  # whoever leads after it paces, too
        for name, view in self._membership.nodes().items():
            if view.status is NodeStatus.DOWN:
                self._down_at.setdefault(name, now)
                continue
            self._down_at.pop(name, None)
            if self._born.get(name, (0, 0.0))[0] != view.incarnation:
                self._born[name] = view.incarnation, now
        if self._term is None:
            # A new leader tells what changes under it, and no more.
            self._look_at_trust(self.nodes())
        self.wake(urgent=True)

    # ---- the loop -------------------------------------------------------------------

    async def _run(self) -> None:
        wait: float | None = None
        while True:
            await self._wait(wait)
            term = self._term
            if term is None:
                wait = None
                continue
            began = monotonic()
            try:
                wait = await self._pass(term)
            except FoundationError as error:
                self._log.warning("pass failed; trying again", error=str(error))
                wait = _RETRY_S
            took = monotonic() - began
            if wait > 0 and not self._urgent.is_set():
                try:
                    rest = min(1.0, max(_DEBOUNCE_S, _REST_FACTOR * took))
                    await asyncio.wait_for(self._urgent.wait(), rest)
                except TimeoutError:
                    pass

    async def _wait(self, seconds: float | None) -> None:
        try:
            await asyncio.wait_for(self._wake.wait(), seconds)
        except TimeoutError:
            return
        if not self._urgent.is_set():
            await asyncio.sleep(_DEBOUNCE_S)
        self._wake.clear()
        self._urgent.clear()

    async def _pass(self, term: int) -> float:
        """Look, plan, carry out; returns how long to wait if nothing happens."""
        if not self._is_ready:
            await self._prepare()
        now = monotonic()
        nodes, soonest = self._nodes(now)
        self._look_at_trust(nodes)
        paced_s = self.paced_s()
        self._epoch_floor = max(self._epoch_floor, self._newest)
        found = plan(
            self._desired.all(),
            self._registry.all(),
            nodes,
            now,
            self._control,
            self._membership.node,
            self._rng,
            history=self._history,
            epoch_floor=self._epoch_floor,
            at=utc_text(),
            commands_max=commands_max(
                paced_s, sum(view.is_alive for view in nodes.values()), self._control, COMMANDS_MAX
            ),
            reservations=None if self._ledgers is None else self._ledgers.reservations(),
        )
        self._passes += 1
        wait = self._control.resync_every_s
        if soonest is not None:
            wait = min(wait, soonest)
        if found.commands:
            failpoint("plan.computed")
            await self._seal(found, nodes)
            outcome = await execute(self._registry, found, may_go_on=lambda: self._term == term)
            if outcome.slowest_s > _STALL_S:
                self._membership.note_write_stall()
            self._tell(outcome, monotonic())
            if not outcome.is_complete:
                # What was refused or lost shows in the registry once the watch has caught up.
                wait = min(wait, _RETRY_S)
        if found.is_truncated:
            wait = pause_s(self.paced_s(), self._control)
        rolling = await self._rollouts.look(now)
        if rolling is not None:
            wait = min(wait, rolling)
        return self._soonest(wait, found)

    async def _seal(self, found: Plan, nodes: Mapping[str, NodeView]) -> None:
        """Write down that nodes are dead before anything that rests on it is decided."""
        losers = {
            (record.node, record.incarnation)
            for command in found.commands
            if (held := self._registry.get(command.agent)) is not None
            and (record := held.record).node is not None
        }
        for node, incarnation in sorted(losers, key=str):
            assert node is not None
            view = nodes.get(node)
            if (
                view is not None
                and view.status is NodeStatus.DOWN
                and view.record.incarnation == incarnation
            ):
                lived_s = self._lived_s(node, incarnation)
                was_short = lived_s is not None and lived_s < self._control.stable_after_s
                await self._membership.seal(node, incarnation, was_short=was_short)

    def paced_s(self) -> float:
        """For how much longer agents are given out slowly, because many nodes were lost at once."""
        now = monotonic()
        if self._membership.is_in_storm:
            self._stormed_at = now
        return left_s(now, self._stormed_at, self._control)

    def hurry(self) -> None:
        """Give agents out as fast as usual again: a person says that the survivors can take it."""
        self._stormed_at = None
        self.wake(urgent=True)

    def _lived_s(self, node: str, incarnation: int) -> float | None:
        """How long this life has lasted as far as we saw it, until it was down; None: not seen."""
        born = self._born.get(node)
        if born is None or born[0] != incarnation:
            return None
        return self._down_at.get(node, monotonic()) - born[1]

    def nodes(self) -> Mapping[str, NodeView]:
        """The nodes as they are for placing: cordons and flapping ones marked."""
        return self._nodes(monotonic())[0]

    def _trusted(self, name: str, view: NodeView, now: float) -> NodeView:
        """The view, marked if its node is cordoned or flaps."""
        if self._upkeep is not None:
            view = self._upkeep.marked(view)
        lived_s = self._lived_s(name, view.incarnation)
        if not is_flapping(view.record.short_lives, lived_s, self._control):
            return view
        return replace(view, flaps=True)

    def distrusts(self, name: str) -> bool:
        """Whether a node that lives is one that flaps, as far as this node saw."""
        view = self._membership.nodes().get(name)
        return view is not None and self._trusted(name, view, monotonic()).flaps

    def _look_at_trust(self, nodes: Mapping[str, NodeView]) -> None:
        """Tell, while we lead, which nodes are trusted no more, or again; those that are down are neither."""
        now = {name: view for name, view in nodes.items() if view.flaps and view.is_alive}
        before, self._distrusted = self._distrusted, set(now)
        if self._term is None:
            return
        for name in sorted(now.keys() - before):
            lives = now[name].record.short_lives
            self._membership.emit(
                "node",
                "distrusted",
                f"Node {name} is given agents only if no other can take them: its last {lives} lives "
                f"were shorter than {self._control.stable_after_s:g} s.",
                node=name,
                incarnation=now[name].incarnation,
                short_lives=lives,
                stable_after_s=self._control.stable_after_s,
            )
        for name in sorted(before - now.keys()):
            view = nodes.get(name)
            if view is None or not view.is_alive:
                continue
            self._membership.emit(
                "node",
                "trusted",
                f"Node {name} has lived for {self._control.stable_after_s:g} s, and gets agents "
                "like any other again.",
                node=name,
                incarnation=view.incarnation,
            )

    def _soonest(self, wait: float, found: Plan) -> float:
        return wait if found.next_wake_s is None else min(wait, max(0.01, found.next_wake_s))

    async def _prepare(self) -> None:
        """What a new leader must know before its first decision.

        The watches of wishes and records are independent: agents of a wish that
        has not arrived yet would look unwanted.
        """
        await self._desired.refresh()
        if self._upkeep is not None:
            await self._upkeep.refresh()
        info = await self._registry.bucket.reader.info()
        self._epoch_floor = max(self._epoch_floor, int(info["state"]["last_seq"]))
        self._is_ready = True

    def _nodes(self, now: float) -> tuple[Mapping[str, NodeView], float | None]:
        """The nodes, with those as DOWN that records name and nobody hears of; when to look again."""
        nodes = {
            name: self._trusted(name, view, now) for name, view in self._membership.nodes().items()
        }
        soonest: float | None = None
        named = set(self._registry.nodes())
        for name in [name for name in self._missing_since if name not in named or name in nodes]:
            del self._missing_since[name]
        disturbed = self._membership.disturbed_at
        for name in named:
            if name in nodes:
                continue
            incarnation = max(held.record.incarnation for held in self._registry.on_node(name))
            since = self._missing_since.setdefault(name, now)
            if disturbed is not None and disturbed + self._liveness.bus_grace_s > now:
                since = self._missing_since[name] = max(since, disturbed)
                due = disturbed + self._liveness.bus_grace_s
            else:
                due = since + self._liveness.down_after_s
            if self._membership.is_down(name, incarnation) or now >= due:
                self._down_at.setdefault(name, now)
                nodes[name] = missing_node(name, incarnation)
            else:
                soonest = min(due - now, soonest) if soonest is not None else due - now
        return nodes, soonest

    # ---- telling --------------------------------------------------------------------

    def _tell(self, outcome: Outcome, now: float) -> None:
        failed_over: dict[str, list[Assign]] = {}
        moved: list[Assign] = []
        assigned: list[Assign] = []
        for command in outcome.applied:
            if not isinstance(command, Assign):
                continue
            origin = command.record.recovered_from
            if command.cause in _LOST and command.before is not None:
                failed_over.setdefault(command.before.node or "?", []).append(command)
            elif command.cause is Cause.WAITED and origin is not None and origin.reason == "moved":
                moved.append(command)
            else:
                assigned.append(command)
        emit = self._membership.emit
        for node, commands in failed_over.items():
            down_at = self._down_at.get(node)
            took = None if down_at is None else round((now - down_at) * 1000, 1)
            emit(
                "agent",
                "failed_over",
                f"{_agents(commands)} of {node} placed on {_where(commands)}.",
                node=node,
                count=len(commands),
                ms=took,
                **self._details(commands),
            )
            self._log.info("agents failed over", peer=node, count=len(commands), ms=took)
            telemetry.execute(
                telemetry.FAILOVER_COMPLETED,
                {"agents": len(commands), **({} if took is None else {"ms": took})},
                {"node": node, "to": _per_node(commands), "observer": self._membership.node},
            )
        for what, commands in (("moved", moved), ("assigned", assigned)):
            if commands:
                emit(
                    "agent",
                    what,
                    f"{_agents(commands)} {what} to {_where(commands)}.",
                    count=len(commands),
                    **self._details(commands),
                )
        for command in outcome.applied:
            if isinstance(command, Quarantine):
                emit(
                    "agent",
                    "quarantined",
                    f"{command.agent} is not tried again by itself: {command.record.reason}.",
                    agent=command.agent,
                    failures=command.record.failures,
                    reason=command.record.reason,
                )
        self._tell_waiting(outcome.applied)
        others = _count_others(outcome.applied)
        if assigned or moved or others:
            self._log.info("plan carried out", assigned=len(assigned), moved=len(moved), **others)

    def _tell_waiting(self, commands: Sequence[Command]) -> None:
        """Who waits, and for what: those with the same reason in one event."""
        waiting: dict[tuple[str, str], list[MarkPending | MarkUnavailable | MarkStopped]] = {}
        for command in commands:
            match command:
                case MarkPending():
                    what = "pending"
                case MarkUnavailable():
                    what = "unavailable"
                case MarkStopped():
                    what = "stopped_by_loss"
                case _:
                    continue
            waiting.setdefault((what, command.record.reason or ""), []).append(command)
        for (what, reason), some in list(waiting.items())[:_WAITING_TOLD_MAX]:
            first = some[0]
            who = first.agent if len(some) == 1 else f"{len(some)} agents"
            word = what.partition("_")[0]
            self._membership.emit(
                "agent",
                what,
                f"{who} {'is' if len(some) == 1 else 'are'} {word}: {reason}.",
                count=len(some),
                term=self._term,
                reason=reason,
                reasons=dict(first.reasons) if isinstance(first, MarkPending) else {},
                agents=dict.fromkeys(item.agent for item in some[:_AGENTS_NAMED_MAX]),
            )

    def _details(self, commands: Sequence[Assign]) -> dict[str, object]:
        """What observers may want to know of a batch; long lists are cut."""
        named = commands[:_AGENTS_NAMED_MAX]
        alive = [view for view in self._membership.nodes().values() if view.is_alive]
        return {
            "to": _per_node(commands),
            "causes": dict(Counter(command.cause.value for command in commands)),
            "agents": {command.agent: command.record.node for command in named},
            "why": {command.agent: command.cause.value for command in named},
            "epochs": {command.agent: command.record.epoch for command in named},
            "strategies": dict(Counter(c.record.spec.placement.strategy for c in commands)),
            "loads": {view.name: view.load.agents for view in alive[:_NODES_NAMED_MAX]},
            "term": self._term,
        }


def _agents(commands: Sequence[Assign]) -> str:
    return commands[0].agent if len(commands) == 1 else f"{len(commands)} agents"


def _per_node(commands: Sequence[Assign]) -> dict[str, int]:
    return dict(Counter(command.record.node or "?" for command in commands))


def _where(commands: Sequence[Assign]) -> str:
    names = sorted(_per_node(commands))
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _count_others(commands: Sequence[Command]) -> dict[str, int]:
    return dict(
        Counter(type(command).__name__ for command in commands if not isinstance(command, Assign))
    )
