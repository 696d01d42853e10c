"""Compares what is wished with what is recorded and says which records must change.

Pure and level-triggered: it looks at the whole and knows nothing of events, so
that any leader can finish what another one began, and planning again after a
plan was carried out gives nothing new.

Rules, per agent that some deployment wants:

- no record: place it. A fresh record starts above `epoch_floor`, which is
  higher than any epoch its id ever had, so that the claim of an agent that was
  deleted and is wished for again is not refused by its own old state.
- its node is down: critical agents (or ``on_node_loss: restart``) are placed
  elsewhere at once; ``unavailable`` waits for the node for ever, ``stop`` is
  stopped; by default it waits `unavailable_grace_s`, then it is placed. With a grace
  of its own it waits that long first: where the node returns it starts there again.
- its node lives under a newer incarnation: the activation is lost. It is placed
  anew, on the same node if that still qualifies.
- ``starting`` for longer than `start_timeout_s`, on a node that gets nothing
  else started either: stopped there, and placed anew when the node says that it
  is (or is down); before that the node might yet run it.
- ``failed``: placed anew after `failed_backoff_s` × 2^failures, at most
  `failed_backoff_max_s`; never if ``restart: temporary``. After `quarantine_after`
  failures in a row it is left alone until it is released or its spec changes; the same
  after more restarts than its `restart_limit` allows.
- ``temporary``: never started again, also not when its node is down, unless `on_node_loss`
  or `critical` says otherwise.
- a child that is kept where its parent runs: placed there and nowhere else, once the parent
  has a place; stopped and placed again where the parent has gone elsewhere.
- a child that is ending (`kinship`) is wished for by nobody.
- it runs another spec than wished: stopped, then placed again where it was. At
  most `update.max_unavailable` of a deployment's agents are not running because
  of this; a new spec that doesn't start stops the change from going on (and
  `rollouts` may go back). A paused deployment's agents keep their spec.
- it is on its way to another node (`moves.py`): left alone, and counted on both. If
  its source dies, it is lost like any other; if its target dies before it ran there,
  it is placed elsewhere at once, whatever its policy.
- no node qualifies: ``pending``, with the reason for each node. What is reserved on a
  node is taken; an agent that names a reservation goes where that is.

An agent that nobody wants is stopped where it may be running, and its record
is forgotten once nobody runs it. A node that is only suspected is left alone.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import (
    Assign,
    Cause,
    Command,
    Forget,
    MarkPending,
    MarkStopped,
    MarkUnavailable,
    Plan,
    Quarantine,
    Stop,
)
from foundation_nats.control.moves import is_arriving
from foundation_nats.control.restarts import restarted, too_many
from foundation_nats.placement.constraints import Usage
from foundation_nats.placement.place import Placer, Unplaceable, Wanted
from foundation_nats.placement.score import LoadSteps, remember
from foundation_nats.placement.strategies import Strategy
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    NodeLoss,
    NodeStatus,
    OnNodeLoss,
    RecoveredFrom,
    ReservationRecord,
)

QUARANTINED = "quarantined"
"""How the reason of an agent begins that is not tried again by itself."""
COMMANDS_MAX = 10_000
"""Of one plan: more would keep the leader's event loop from its heartbeats."""

_PROGRESS_S = 5.0
"""A node that got an agent started this recently is busy, not stuck …"""
_PATIENCE = 10
"""… until an agent has waited this many time-outs."""

_LATE = "late"
"""Why an agent was stopped that was starting for too long, as its record says meanwhile."""

_FIELDS = set(AgentRecord.model_fields)

_ACTIVE = frozenset({AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING})
"""Somebody may be running it."""


@dataclass(slots=True)
class History:
    """What the reconciler remembers besides records: times on its own monotonic clock."""

    since: dict[str, float] = field(default_factory=dict)
    """Agent to when its record was first seen in its present condition; missing: just now."""
    homes: dict[str, str] = field(default_factory=dict)
    """Agent to the node that its record named last, for restarts in place."""
    progress: dict[str, float] = field(default_factory=dict)
    """Node to when one of its agents last came to run."""
    digests: dict[str, tuple[AgentSpec, str]] = field(default_factory=dict)
    """Deployment to the digest of its spec, since hashing ten thousand takes longer than planning."""
    loads: dict[str, tuple[int, LoadSteps]] = field(default_factory=dict)
    """Node to the incarnation and how its load counts: what keeps equal nodes from taking turns."""

    def digest(self, deployment: Deployment) -> str:
        """The digest of the deployment's spec."""
        known = self.digests.get(deployment.name)
        if known is None or known[0] is not deployment.spec:
            known = self.digests[deployment.name] = (deployment.spec, deployment.spec.digest())
        return known[1]


@dataclass(slots=True)
class _Open:
    """An agent that needs a node."""

    deployment: Deployment
    digest: str
    held: Held | None
    agent: str
    cause: Cause
    recovered_from: RecoveredFrom | None = None
    prefer: str | None = None
    only: str | None = None
    restarts: list[str] = field(default_factory=list)

    @property
    def urgency(self) -> int:
        """Lower is placed first: critical agents get what capacity there is."""
        lost = self.cause is Cause.NODE_DOWN or self.cause is Cause.NODE_RESTARTED
        return (0 if self.deployment.spec.critical else 2) + (0 if lost else 1)


@lru_cache(maxsize=256)
def _replica_ids(name: str, replicas: int) -> tuple[str, ...]:
    return tuple(f"{name}-{i}" for i in range(replicas))


def _ids(deployment: Deployment) -> Sequence[str]:
    if deployment.replicas is None:
        return (deployment.name,)
    return _replica_ids(deployment.name, deployment.replicas)


@dataclass(frozen=True, slots=True)
class LossRule:
    """What becomes of an agent whose node is down."""

    then: OnNodeLoss
    """`UNAVAILABLE`: nothing, it waits for the node for ever."""
    grace_s: float = 0.0
    """How long it waits for the node before that."""

    @property
    def is_immediate(self) -> bool:
        """Whether it doesn't wait for the node at all."""
        return self.grace_s <= 0


def loss_rule(spec: AgentSpec, default_grace_s: float) -> LossRule:
    """What becomes of an agent of *spec* when its node is down.

    Args:
        default_grace_s: how long one waits that says nothing of it.
    """
    match spec.on_node_loss:
        case None if spec.critical:
            return LossRule(OnNodeLoss.RESTART)
        case None if spec.restart == "temporary":
            return LossRule(OnNodeLoss.STOP)
        case None:
            return LossRule(OnNodeLoss.RESTART, default_grace_s)
        case NodeLoss(policy=OnNodeLoss.UNAVAILABLE, grace_s=grace_s):
            return LossRule(OnNodeLoss.RESTART, grace_s)
        case NodeLoss(policy=policy, grace_s=grace_s):
            return LossRule(policy, grace_s)
        case policy:
            return LossRule(policy)


def is_bound(spec: AgentSpec) -> bool:
    """Whether an agent of *spec* runs on its node and nowhere else, however long that is down."""
    return spec.on_node_loss is OnNodeLoss.UNAVAILABLE


def plan(
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    nodes: Mapping[str, NodeView],
    now: float,
    config: ControlConfig,
    leader: str | None,
    rng: random.Random,
    *,
    history: History | None = None,
    epoch_floor: int = 0,
    at: str | None = None,
    commands_max: int | None = COMMANDS_MAX,
    reservations: Mapping[str, Sequence[ReservationRecord]] | None = None,
) -> Plan:
    """Say what must change.

    Args:
        nodes: every node that a record names must be in it, as DOWN where nobody
            hears of it; agents of a node that is missing here are left alone.
        epoch_floor: fresh records start above it.
        at: the text for the records' `since`.
        reservations: node to those that count.
    """
    planner = _Planner(desired, held, nodes, now, config, history or History(), epoch_floor, at)
    planner.reservations = reservations or {}
    return planner.run(leader, rng, commands_max)


class _Planner:
    def __init__(
        self,
        desired: Mapping[str, Deployment],
        held: Mapping[str, Held],
        nodes: Mapping[str, NodeView],
        now: float,
        config: ControlConfig,
        history: History,
        epoch_floor: int,
        at: str | None,
    ) -> None:
        self._desired = desired
        self._held = held
        self._nodes = nodes
        self._now = now
        self._config = config
        self._history = history
        self._epoch_floor = epoch_floor
        self._at = at
        self.reservations: Mapping[str, Sequence[ReservationRecord]] = {}
        self._commands: list[Command] = []
        self._open: list[_Open] = []
        self._wake: float | None = None
        self._templates: dict[str, AgentRecord] = {}
        self._refusal: tuple[Unplaceable, str, dict[str, str]] | None = None
        """The last one and its text, since a thousand agents may be refused in one go."""
        self._taken: dict[tuple[str, str, str], tuple[AgentSpec, list[int]]] = {}

    def run(self, leader: str | None, rng: random.Random, commands_max: int | None) -> Plan:
        matched = self._look_at_wanted()
        if matched < len(self._held):
            self._look_at_unwanted()
        # Stable: agents of equal urgency keep the order of names and ordinals.
        self._open.sort(key=lambda item: item.urgency)
        limit = len(self._open) + len(self._commands) if commands_max is None else commands_max
        room = max(0, limit - len(self._commands))
        truncated = len(self._open) > room or len(self._commands) > limit
        self._place(self._open[:room] if truncated else self._open, leader, rng)
        return Plan(tuple(self._commands[:limit]), self._wake, truncated)

    # ---- looking ------------------------------------------------------------------

    def _look_at_wanted(self) -> int:
        held, nodes, taken = self._held, self._nodes, self._taken
        matched = 0
        for name in sorted(self._desired):
            deployment = self._desired[name]
            if deployment.ending is not None:
                continue
            link = deployment.spec.parent
            ids = _ids(deployment)
            digest = self._history.digest(deployment)
            running = 0
            rolling: list[Held] = []
            for agent in ids:
                item = held.get(agent)
                if item is None:
                    if link is None or not link.local or self._place_of(link.id) is not None:
                        self._open.append(_Open(deployment, digest, None, agent, Cause.NEW))
                    continue
                matched += 1
                record = item.record
                if record.status in _ACTIVE and record.node is not None:
                    view = nodes.get(record.node)
                    if (
                        view is not None
                        and view.record.incarnation == record.incarnation
                        and view.status is not NodeStatus.DOWN
                    ):
                        key = (record.node, name, record.digest)
                        count = taken.get(key)
                        if count is None:
                            taken[key] = (record.spec, [1])
                        else:
                            count[1][0] += 1
                        if record.desired != "run":
                            self._take_at_target(record, name)
                            continue
                        if link is not None and link.local and self._is_astray(record, link.id):
                            self._stop(item, returns=True)
                        elif record.digest != digest:
                            rolling.append(item)
                        elif record.status is not AgentStatus.RUNNING:
                            self._starting(item)
                            continue
                        if record.status is AgentStatus.RUNNING:
                            running += 1
                        continue
                self._at_rest(deployment, digest, item)
            if rolling and not deployment.paused:
                budget = deployment.update.budget(len(ids))
                self._roll(rolling, budget - (len(ids) - running))
        return matched

    def _place_of(self, parent: str) -> str | None:
        """The node on which a parent runs or starts, if that lives."""
        item = self._held.get(parent)
        record = None if item is None else item.record
        if record is None or record.status not in _ACTIVE or record.node is None:
            return None
        view = self._nodes.get(record.node)
        if view is None or not view.is_alive or view.incarnation != record.incarnation:
            return None
        return record.node

    def _is_astray(self, record: AgentRecord, parent: str) -> bool:
        """Whether a child that belongs to its parent's node is elsewhere."""
        item = self._held.get(parent)
        home = self._place_of(parent)
        settled = item is not None and item.record.status is AgentStatus.RUNNING
        return settled and home is not None and home != record.node

    def _take_at_target(self, record: AgentRecord, group: str) -> None:
        """An agent on its way takes its place on both nodes."""
        order = record.move
        view = None if order is None or order.to is None else self._nodes.get(order.to)
        if view is not None and order is not None and view.incarnation == order.incarnation:
            key = (view.name, group, record.digest)
            self._taken.setdefault(key, (record.spec, [0]))[1][0] += 1

    def _roll(self, rolling: Sequence[Held], budget: int) -> None:
        for item in rolling:
            if item.record.status is AgentStatus.RUNNING:
                if budget <= 0:
                    continue
                budget -= 1
            self._stop(item, returns=True)

    def _starting(self, item: Held) -> None:
        record = item.record
        assert record.node is not None
        waited = self._waited(record.id)
        timeout = self._config.start_timeout_s
        busy = self._now - self._history.progress.get(record.node, -1e9) < _PROGRESS_S
        if waited >= timeout * (_PATIENCE if busy else 1):
            self._stop_late(item)
        elif waited >= timeout:
            self._wake_in(_PROGRESS_S)
        else:
            self._wake_in(timeout - waited)

    def _at_rest(self, deployment: Deployment, digest: str, item: Held) -> None:
        """A wanted agent that nobody runs, as far as we know."""
        record, spec = item.record, deployment.spec
        changed = record.digest != digest
        match record.status:
            case AgentStatus.PENDING:
                self._reopen(deployment, digest, item, Cause.WAITED)
            case AgentStatus.HIBERNATED:
                pass
            case AgentStatus.STOPPED:
                if changed or record.desired != "run":
                    cause = Cause.LATE if _was_late(record) else Cause.RESTARTED
                    self._reopen(deployment, digest, item, cause)
                elif not _was_stopped_by_loss(record) and spec.restart == "permanent":
                    self._after(self._config.failed_backoff_s, deployment, digest, item)
            case AgentStatus.FAILED:
                if changed or record.desired != "run":
                    self._reopen(deployment, digest, item, Cause.RETRY)
                elif (record.reason or "").startswith(QUARANTINED):
                    pass
                elif (backoff := self._config.retry_s(record.failures)) is None:
                    self._quarantine(item)
                elif spec.restart != "temporary":
                    self._after(backoff, deployment, digest, item)
            case AgentStatus.UNAVAILABLE:
                self._unavailable(deployment, digest, item)
            case AgentStatus.STARTING | AgentStatus.RUNNING | AgentStatus.MOVING:
                self._lost(deployment, digest, item)

    def _after(self, pause: float, deployment: Deployment, digest: str, item: Held) -> None:
        waited = self._waited(item.record.id)
        if waited < pause:
            self._wake_in(pause - waited)
            return
        stopped = item.record.status is AgentStatus.STOPPED
        times = restarted(item.record, self._at)
        if times is None:
            self._quarantine(item, too_many(deployment.spec.restart_limit))
            return
        cause = Cause.RESTARTED if stopped else Cause.RETRY
        self._reopen(deployment, digest, item, cause, restarts=times)

    def _lost(self, deployment: Deployment, digest: str, item: Held) -> None:
        record = item.record
        if record.node is None:
            self._reopen(deployment, digest, item, Cause.WAITED)
            return
        view = self._nodes.get(record.node)
        if view is None or view.incarnation < record.incarnation:
            return  # our view of the nodes is behind the record
        rule = self._rule(deployment.spec)
        link = deployment.spec.parent
        follows = link is not None and link.local and self._place_of(link.id) is not None
        if follows and rule.then is OnNodeLoss.RESTART:
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)
        elif is_arriving(record):
            # It was on its way there, and may as well go elsewhere: it has no home to wait for.
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)
        elif rule.then is OnNodeLoss.STOP and rule.is_immediate:
            self._stopped_by_loss(deployment, digest, item)
        elif view.is_alive:
            if rule.then is not OnNodeLoss.RESTART and view.status is not NodeStatus.UP:
                self._mark_unavailable(item, rule)
            else:
                self._reopen(deployment, digest, item, Cause.NODE_RESTARTED)
        elif rule.then is OnNodeLoss.RESTART and rule.is_immediate:
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)
        else:
            self._mark_unavailable(item, rule)

    def _stopped_by_loss(self, deployment: Deployment, digest: str, item: Held) -> None:
        if item.record.digest == digest:
            self._mark_stopped(item)
        else:
            # What is stopped is the old wish; the new one has not run yet.
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)

    def _unavailable(self, deployment: Deployment, digest: str, item: Held) -> None:
        record = item.record
        rule = self._rule(deployment.spec)
        view = None if record.node is None else self._nodes.get(record.node)
        link = deployment.spec.parent
        follows = link is not None and link.local and self._place_of(link.id) is not None
        restarts = rule.then is OnNodeLoss.RESTART
        if record.node is None or (restarts and (rule.is_immediate or follows)):
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)
        elif rule.then is OnNodeLoss.STOP and rule.is_immediate:
            self._stopped_by_loss(deployment, digest, item)
        elif view is not None and view.status is NodeStatus.UP:
            self._reopen(deployment, digest, item, Cause.RETURNED)
        elif rule.then is OnNodeLoss.UNAVAILABLE:
            pass
        elif (waited := self._waited(record.id)) < rule.grace_s:
            self._wake_in(rule.grace_s - waited)
        elif restarts:
            self._reopen(deployment, digest, item, Cause.NODE_DOWN)
        else:
            self._stopped_by_loss(deployment, digest, item)

    def _rule(self, spec: AgentSpec) -> LossRule:
        return loss_rule(spec, self._config.unavailable_grace_s)

    def _look_at_unwanted(self) -> None:
        wanted = {
            agent
            for deployment in self._desired.values()
            if deployment.ending is None
            for agent in _ids(deployment)
        }
        for agent, item in self._held.items():
            if agent in wanted:
                continue
            record = item.record
            if record.status not in _ACTIVE or record.node is None:
                self._commands.append(Forget(agent, None, item.revision))
                continue
            view = self._nodes.get(record.node)
            if view is None or view.incarnation < record.incarnation:
                continue
            if view.incarnation > record.incarnation or not view.is_alive:
                self._commands.append(Forget(agent, None, item.revision))
                continue
            key = (record.node, record.deployment or agent, record.digest)
            count = self._taken.setdefault(key, (record.spec, [0]))
            count[1][0] += 1
            if record.is_wanted:
                self._stop(item)

    # ---- saying -------------------------------------------------------------------

    def _waited(self, agent: str) -> float:
        return self._now - self._history.since.get(agent, self._now)

    def _wake_in(self, seconds: float) -> None:
        if self._wake is None or seconds < self._wake:
            self._wake = seconds

    def _stop(self, item: Held, *, returns: bool = False) -> None:
        update = {"desired": "stop", "move": None, "returns": returns, "since": self._at}
        record = item.record.model_copy(update=update)
        self._commands.append(Stop(record.id, record, item.revision))

    def _stop_late(self, item: Held) -> None:
        record = item.record
        assert record.node is not None
        origin = RecoveredFrom(node=record.node, epoch=record.epoch, reason=_LATE)
        after = record.model_copy(
            update={
                "desired": "stop",
                "returns": True,
                "recovered_from": origin,
                "since": self._at,
            }
        )
        self._commands.append(Stop(record.id, after, item.revision))

    def _mark_unavailable(self, item: Held, rule: LossRule) -> None:
        record = item.record
        assert record.node is not None
        how_long = "waits for its return"
        if rule.then is not OnNodeLoss.UNAVAILABLE:
            how_long = f"waits {rule.grace_s:g} s for its return"
        if rule.then is OnNodeLoss.STOP:
            how_long += ", and is stopped then"
        after = record.model_copy(
            update={
                "status": AgentStatus.UNAVAILABLE,
                "desired": "run",
                "move": None,
                "reason": f"node {record.node} is down; {how_long}",
                "recovered_from": RecoveredFrom(
                    node=record.node, epoch=record.epoch, reason="node_down"
                ),
                "since": self._at,
            }
        )
        self._commands.append(MarkUnavailable(record.id, after, item.revision))
        if rule.then is not OnNodeLoss.UNAVAILABLE:
            self._wake_in(rule.grace_s)

    def _quarantine(self, item: Held, why: str | None = None) -> None:
        record = item.record
        why = why or f"{record.failures} failed starts"
        update = {
            "status": AgentStatus.FAILED,
            "reason": f"{QUARANTINED} after {why}: {record.reason}",
            "since": self._at,
        }
        after = record.model_copy(update=update)
        self._commands.append(Quarantine(record.id, after, item.revision))

    def _mark_stopped(self, item: Held) -> None:
        record = item.record
        assert record.node is not None
        after = record.model_copy(
            update={
                "status": AgentStatus.STOPPED,
                "desired": "run",
                "move": None,
                "node": None,
                "reason": f"node {record.node} is down, and on_node_loss is stop",
                "recovered_from": RecoveredFrom(
                    node=record.node, epoch=record.epoch, reason="node_down"
                ),
                "since": self._at,
            }
        )
        self._commands.append(MarkStopped(record.id, after, item.revision))

    def _reopen(
        self,
        deployment: Deployment,
        digest: str,
        item: Held,
        cause: Cause,
        *,
        restarts: list[str] | None = None,
    ) -> None:
        record = item.record
        link = deployment.spec.parent
        if link is not None and link.local and self._place_of(link.id) is None:
            return  # it waits for its parent, whose record will change
        times = record.restarts if restarts is None and deployment.spec.restart_limit else restarts
        home = record.node or self._history.homes.get(record.id)
        recovered = record.recovered_from
        prefer = only = None
        match cause:
            case Cause.NODE_DOWN | Cause.NODE_RESTARTED | Cause.RETURNED:
                if record.node is not None:
                    recovered = RecoveredFrom(
                        node=record.node,
                        epoch=record.epoch,
                        reason="restarted" if cause is Cause.NODE_RESTARTED else "node_down",
                    )
                if cause is not Cause.NODE_DOWN:
                    prefer = record.node
                    if self._rule(deployment.spec).then is not OnNodeLoss.RESTART:
                        only = record.node
            case Cause.RESTARTED | Cause.RETRY | Cause.LATE:
                if home is not None:
                    recovered = RecoveredFrom(node=home, epoch=record.epoch, reason="restarted")
                if cause is Cause.RESTARTED:
                    prefer = home
            case Cause.WAITED | Cause.NEW:
                pass
        if deployment.spec.placement.strategy == Strategy.LOCAL_PREFERRED:
            prefer = home
        self._open.append(
            _Open(deployment, digest, item, record.id, cause, recovered, prefer, only, times or [])
        )

    # ---- placing ------------------------------------------------------------------

    def _bound(self, opened: Sequence[_Open]) -> dict[str, tuple[str, str]]:
        """Agent to the reservation that it shall use up, and its node."""
        if not self.reservations:
            return {}
        homes = {item.id: node for node, items in self.reservations.items() for item in items}
        found: dict[str, tuple[str, str]] = {}
        for item in opened:
            node = homes.pop(item.deployment.spec.reservation or "", None)
            if node is not None and item.only is None:
                found[item.agent] = item.deployment.spec.reservation or "", node
        return found

    def _used(self, but: Collection[str] = ()) -> dict[str, Usage]:
        """What agents and reservations take, without the reservations *but*."""
        used: dict[str, Usage] = {}
        for node, items in self.reservations.items():
            resources = used.setdefault(node, Usage()).resources
            for item in items:
                if item.id in but:
                    continue
                for name, amount in item.needs.items():
                    resources[name] = resources.get(name, 0.0) + amount
        for (node, group, _), (spec, count) in self._taken.items():
            used.setdefault(node, Usage()).add(spec, group, count[0])
        return used

    def _place(self, opened: Sequence[_Open], leader: str | None, rng: random.Random) -> None:
        if not opened:
            return
        loads = self._history.loads = remember(self._nodes, self._history.loads)
        steps = {name: found for name, (_, found) in loads.items()}
        bound = self._bound(opened)
        used = self._used({reservation for reservation, _ in bound.values()})
        placer = Placer(self._nodes, used, leader, rng, loads=steps)
        nodes, commands = self._nodes, self._commands
        for item in opened:
            spec = item.deployment.spec
            if spec.parent is not None and spec.parent.local:
                item.only = self._place_of(spec.parent.id)
            found = placer.place(
                Wanted(
                    item.agent,
                    spec,
                    item.deployment.name,
                    bound[item.agent][1] if item.agent in bound else item.prefer,
                    item.only,
                )
            )
            if isinstance(found, Unplaceable):
                self._unplaceable(item, found)
                continue
            before = None if item.held is None else item.held.record
            commands.append(
                Assign(
                    item.agent,
                    self._record(
                        item,
                        status=AgentStatus.STARTING,
                        node=found.node,
                        incarnation=nodes[found.node].record.incarnation,
                        epoch=(self._epoch_floor if before is None else before.epoch) + 1,
                    ),
                    0 if item.held is None else item.held.revision,
                    item.cause,
                    before,
                )
            )

    def _record(
        self,
        item: _Open,
        *,
        status: AgentStatus,
        node: str | None,
        incarnation: int,
        epoch: int,
        reason: str | None = None,
    ) -> AgentRecord:
        before = None if item.held is None else item.held.record
        same = before is not None and before.digest == item.digest
        name = item.deployment.name
        template = self._templates.get(name)
        if template is None:
            template = self._templates[name] = AgentRecord(
                id=item.agent,
                deployment=None if item.deployment.standalone else name,
                spec=item.deployment.spec,
                digest=item.digest,
                since=self._at,
            )
        return _stamped(
            template,
            {
                "id": item.agent,
                "status": status,
                "node": node,
                "incarnation": incarnation,
                "epoch": epoch,
                "reason": reason,
                "recovered_from": item.recovered_from,
                "failures": before.failures if before is not None and same else 0,
                "restarts": item.restarts if same else [],
            },
        )

    def _unplaceable(self, item: _Open, found: Unplaceable) -> None:
        before = None if item.held is None else item.held.record
        expected = 0 if item.held is None else item.held.revision
        if self._refusal is None or self._refusal[0] is not found:
            self._refusal = (found, f"no node qualifies: {found.text()}", dict(found.reasons))
        _, text, reasons = self._refusal
        if item.only is not None and before is not None:
            if before.status is AgentStatus.UNAVAILABLE and before.reason == text:
                return
            after = before.model_copy(
                update={
                    "status": AgentStatus.UNAVAILABLE,
                    "reason": text,
                    "recovered_from": item.recovered_from,
                    "since": self._at,
                }
            )
            self._commands.append(MarkUnavailable(item.agent, after, expected))
            return
        if (
            before is not None
            and before.status is AgentStatus.PENDING
            and before.node is None
            and before.reason == text
            and before.digest == item.digest
        ):
            return
        record = self._record(
            item,
            status=AgentStatus.PENDING,
            node=None,
            incarnation=0,
            epoch=self._epoch_floor if before is None else before.epoch,
            reason=text,
        )
        self._commands.append(MarkPending(item.agent, record, expected, reasons))


def _stamped(template: AgentRecord, values: dict[str, Any]) -> AgentRecord:
    """`template.model_copy(update=values)` for records that share everything else.

    Every part was validated before; doing that again would double the cost of a
    failover, and pydantic's own copy is still a third of a pass over many agents.
    """
    record = AgentRecord.__new__(AgentRecord)
    object.__setattr__(record, "__dict__", {**template.__dict__, **values})
    object.__setattr__(record, "__pydantic_fields_set__", _FIELDS)
    object.__setattr__(record, "__pydantic_extra__", None)
    object.__setattr__(record, "__pydantic_private__", None)
    return record


def _was_late(record: AgentRecord) -> bool:
    origin = record.recovered_from
    return origin is not None and origin.reason == _LATE and origin.epoch == record.epoch


def _was_stopped_by_loss(record: AgentRecord) -> bool:
    origin = record.recovered_from
    return origin is not None and origin.reason == "node_down" and origin.epoch == record.epoch


def assignments(found: Plan) -> Iterator[Assign]:
    """The plan's assignments."""
    return (command for command in found.commands if isinstance(command, Assign))
