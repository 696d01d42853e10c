"""One simulated process: the decisions of production, driven by a shell that mirrors production's.

`Node` is composed of what a node manager is composed of: membership with its
failure detector, the real `Validity` on a stand-in for a connection, election
with the real `Candidate`, reconciler and executor around the real `plan`, and a
host with one worker whose restarts the real `Supervisor` decides. Where the
shell of production awaits, this one does; where that says "at once", so does
this. Change both together.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, cast

from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.liveness import (
    BusDisturbed,
    Confirm,
    Confirmed,
    Deaf,
    Forgot,
    Heard,
    Left,
    LivenessDetector,
    OwnLag,
    ProbeAnswered,
    ProbeMissed,
    Verdict,
    VerdictChanged,
)
from foundation_nats.cluster.liveness import Event as LivenessEvent
from foundation_nats.cluster.liveness import Tick as LivenessTick
from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.validity import Validity
from foundation_nats.cluster.view import NodeView, missing_node
from foundation_nats.config import ControlConfig, LeaseConfig, LivenessConfig
from foundation_nats.consensus.candidate import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Candidate,
    Doubt,
    HolderBack,
    HolderGone,
    LeaseSeen,
    LeaseVacant,
    LostLeadership,
    ReadLease,
    Release,
    Renew,
    RenewResult,
    Resign,
)
from foundation_nats.consensus.candidate import Effect as LeaseEffect
from foundation_nats.consensus.candidate import Event as LeaseEvent
from foundation_nats.consensus.candidate import Tick as LeaseTick
from foundation_nats.control.commands import Command
from foundation_nats.control.planner import History, plan
from foundation_nats.node.supervision import Escalate, Exited, Restart, Started, Supervisor
from foundation_nats.placement.constraints import needs
from foundation_schemas import (
    AgentRecord,
    AgentReport,
    AgentStatus,
    Deployment,
    Echo,
    LeaseRecord,
    NodeRecord,
    NodeStatus,
    RecoveredFrom,
)
from tests.simulation.coroutines import Later, all_of, start
from tests.simulation.world import Bug, Entry, Failure, StateValue, World

LIVENESS = LivenessConfig(heartbeat_interval_s=1.0, suspect_after_s=2.5, probe_interval_s=0.5)
"""Half as many heartbeats and probes as in production; what is safe does not depend on it."""
LEASE = LeaseConfig()
CONTROL = ControlConfig(unavailable_grace_s=6.0, failed_backoff_max_s=4.0)
STORM_HOLD_S = 15.0

_TICK_S = 0.25
_LAG_MIN_S = 0.05
_LAG_MEMORY_S = 5.0
_RECORD_TTL_S = 60.0
_SEALED_TTL_S = 3600.0
_DEAF_BEATS = 2.5
_EARLY_BEAT = 0.6
_LATE_BEAT = 1.15, 1.3
_LATE_PROBE = 1.25
_RECORD_EVERY_S = 20.0
_STALL_S = 1.0
_RETRY_S = 0.2
_DEBOUNCE_S = 0.005
_QUIET_S = 0.25
_CLAIM_ROUNDS = 8
_COMMIT_EVERY_S = 6.0
_DRAIN_TIMEOUT_S = 20.0
_SUBJECTS = Subjects("simulated")
_BUCKETS = ("nodes", "agents", "desired", "leases")
_FOLLOWING = (NodeStatus.UP, NodeStatus.DRAINING)


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat."""

    node: str
    incarnation: int
    number: int
    sent_at: float
    draining: bool = False
    left: bool = False


@dataclass(slots=True, eq=False)
class Activation:
    """An agent in a worker's memory."""

    agent: str
    epoch: int
    node: Node
    incarnation: int
    worker_life: int
    record: AgentRecord
    revision: int
    is_ended: bool = False
    is_started: bool = False
    is_parked: bool = False


@dataclass(slots=True)
class Placed:
    """An agent that this node holds."""

    epoch: int
    record: AgentRecord
    told: bool = False


@dataclass(slots=True)
class _Line:
    """What `Validity` needs of a connection."""

    on_message: Callable[[Message], None] | None = None
    on_drop: list[Callable[[], None]] = field(default_factory=list)

    def subscribe(self, _subject: str, callback: Callable[[Message], None]) -> object:
        self.on_message = callback
        return callback

    def unsubscribe(self, route: object) -> None:
        if self.on_message is route:
            self.on_message = None

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self.on_drop.append(callback)


class Wake:
    """An event that one coroutine waits for."""

    def __init__(self) -> None:
        self.is_set = False
        self._later: Later[None] | None = None

    def set(self) -> None:
        """Wake whoever waits, now or next."""
        self.is_set = True
        later, self._later = self._later, None
        if later is not None:
            later.resolve(None)

    async def wait(self) -> None:
        """Until it is set."""
        if not self.is_set:
            self._later = Later()
            await self._later


class Node:
    """One life of one process."""

    def __init__(self, world: World, name: str, offset: float) -> None:
        self.world = world
        self.name = name
        self.offset = offset
        self.rng = Random(world.rng.random())
        self.is_dead = False
        self.opened_at = float("inf")
        self.freezes = 0
        self.waiting: list[tuple[bool, Callable[..., None], Any]] = []
        self.steps = 0
        self.is_connected = True
        """What the client believes."""
        self.has_interest = True
        """Whether the server has its subscriptions."""
        self.connection = 0
        self.cursors: dict[str, int] = {}
        self.pumps: set[str] = set()
        # membership
        self.incarnation = 0
        self._detector = _new_detector(self.world)
        self._records: dict[str, NodeRecord] = {}
        self._heard: dict[str, Beat | None] = {}
        self._down: dict[str, int] = {}
        self._sealed: dict[str, int] = {}
        self._opinions: dict[str, int] = {}
        self._died_leading: str | None = None
        self._views: dict[str, NodeView] = {}
        self._own_record: NodeRecord | None = None
        self._own_revision = 0
        self._own_incarnations: set[int] = set()
        self._beats = 0
        self._is_member = False
        self._is_over = False
        self._draining: str | None = None
        self._term: int | None = None
        self._holder: str | None = None
        self._missed: set[str] = set()
        self._probing: set[str] = set()
        self._lag_s = 0.0
        self._lag_at = 0.0
        self._disturbed_at: float | None = None
        self._lagged_at: float | None = None
        self._own_heard_at = 0.0
        self._next_beat = self._next_probe = self._expected = self._beat_at = 0.0
        self._pinged_at: float | None = None
        # validity
        self._line = _Line()
        self._validity: Validity | None = None
        self._rejoining = False
        # registry and wishes
        self._held: dict[str, Held] = {}
        self._gone: dict[str, int] = {}
        self._wishes: dict[str, Deployment] = {}
        self._wish_revisions: dict[str, int] = {}
        # election
        self.candidate = self._new_candidate()
        self._lease: tuple[LeaseRecord | None, int] | None = None
        self._armed_for: float | None = None
        self._election_closed = False
        self._echo_for_s = min(LEASE.stop_after_s * 0.8, LEASE.ttl_s - LIVENESS.fence_s - 1.0)
        # reconciler
        self.passes = 0
        self._history = History()
        self._marks: dict[str, tuple[AgentStatus, int, int]] = {}
        self._missing_since: dict[str, float] = {}
        self._newest = 0
        self._epoch_floor = 0
        self._is_ready = False
        self._lead_term: int | None = None
        self._pass_due: float | None = None
        self._passing = False
        self._again: Literal["no", "soon", "urgent"] = "no"
        self._not_before = 0.0
        self._quiet_pending = False
        # host and worker
        self._placed: dict[str, Placed] = {}
        self._used: dict[str, float] = {}
        self._reports: dict[str, AgentReport] = {}
        self._touched: set[str] = set()
        self._lost: set[str] = set()
        self._refused: dict[str, tuple[str, AgentRecord, int]] = {}
        self._unstopped: dict[str, int] = {}
        self._orders: list[tuple[dict[str, int], list[AgentRecord], int]] = []
        self._is_ordering = False
        self._host_wake = Wake()
        self._host_write = Wake()
        self.is_open = False
        self._worker_ready = False
        self._worker_life = 0
        self._worker_incarnation = 0
        self._activations: dict[str, Activation] = {}
        self._claiming: dict[str, int] = {}
        self._supervisor = Supervisor(max_restarts=5, window_s=30.0)

    # ---- small things -----------------------------------------------------------------

    @property
    def now(self) -> float:
        """This process's clock."""
        return self.world.now + self.offset

    @property
    def is_frozen(self) -> bool:
        """Whether it stands still."""
        return self.freezes > 0

    @property
    def is_leader(self) -> bool:
        """Whether it believes to lead."""
        return self.candidate.is_leader

    def _go(self, coroutine: Coroutine[Any, Any, None]) -> None:
        start(coroutine)

    async def _sleep(self, seconds: float) -> None:
        later: Later[None] = Later()
        self.world.timer(self, seconds, later.resolve, None)
        await later

    async def _ask(self, operation: Callable[[], Any]) -> Any:
        later: Later[Any] = Later()
        self.world.ask(self, operation, later.resolve)
        return await later

    async def _write(
        self, bucket: str, key: str, value: Any, expected: int | None, ttl_s: float | None = None
    ) -> int | Failure:
        result: int | Failure = await self._ask(
            lambda: self.world.write(bucket, key, value, expected, ttl_s=ttl_s, by=self)
        )
        return result

    async def _read(self, bucket: str, key: str) -> Entry | Failure | None:
        found: Entry | Failure | None = await self._ask(
            lambda: self.world.buckets[bucket].entries.get(key)
        )
        return found

    # ---- life -------------------------------------------------------------------------

    def begin(self) -> None:
        """The process starts."""
        self._go(self._join())

    def die(self, *, silently: bool = False) -> None:
        """The process ends; all it knew is lost."""
        self.world.say(f"{self.name} ends")
        self.is_dead = True
        if not silently:
            self.has_interest = False
        for activation in list(self._activations.values()):
            self._forget(activation)
        for known in self.world.activations.values():
            known[:] = [item for item in known if item.node is not self]

    async def _join(self) -> None:
        while True:
            entry = await self._read("nodes", self.name)
            if not isinstance(entry, Failure):
                previous = 0 if entry is None or entry.value is None else entry.value.incarnation
                # The wall clock of a machine survives its processes.
                chosen = max(previous + 1, 1 + int(self.world.now * 1000))
                if await self._write_own(chosen, 0 if entry is None else entry.revision):
                    break
            await self._sleep(0.5)
        self._is_member = True
        self._see_self()
        self._next_beat = self._next_probe = self._expected = self._own_heard_at = self.now
        self.opened_at = self.world.now
        self._send_heartbeat()
        self._tick()
        self._listen()
        while True:
            snapshot = await self._ask(self._snapshot)
            if not isinstance(snapshot, Failure):
                break
            await self._sleep(0.3)
        self._open(snapshot)

    def _snapshot(self) -> dict[str, tuple[int, list[Entry]]]:
        buckets = self.world.buckets
        for name in _BUCKETS:
            self.cursors[name] = buckets[name].last
        return {name: (buckets[name].last, buckets[name].since(0)) for name in _BUCKETS}

    def _open(self, snapshot: dict[str, tuple[int, list[Entry]]]) -> None:
        self._supervisor.step(Started("worker"), self.now)
        self.world.timer(self, self.rng.uniform(0.1, 0.4), self._on_worker_ready, self._worker_life)
        for entry in snapshot["nodes"][1]:
            self._on_node_entry(entry)
        for entry in snapshot["agents"][1]:
            self._on_agent_entry(entry)
        for entry in snapshot["desired"][1]:
            self._on_wish(entry)
        self._go(self._keep_record())
        self.is_open = True
        self._touch_mine()
        self._go(self._host_loop())
        self._go(self._host_writes())
        self.candidate = self._new_candidate()
        for entry in snapshot["leases"][1]:
            self._see_lease(entry.value, entry.revision)
        if self._lease is None:
            self._see_lease(None, 0)

    def _listen(self) -> None:
        if self._validity is not None:
            self._validity.close()
        self._worker_incarnation = self.incarnation
        fence = LIVENESS.fence_s
        if Bug.LONG_FENCE in self.world.missing:
            fence = LIVENESS.down_after_s + 4.0
        self._validity = Validity(
            cast(Bus, self._line),
            _SUBJECTS,
            node=self.name,
            incarnation=self.incarnation,
            fence_s=fence,
            on_down=self._echoed_down,
            on_restored=self._restored,
            on_review=self._on_review,
        )

    def remaining_s(self) -> float:
        """Seconds of the right to answer that are left, by this process's clock."""
        if self._validity is None:
            return 0.0
        before, self.world.clock = self.world.clock, self.now
        left = self._validity.remaining_s()
        self.world.clock = before
        return left

    def _is_valid(self) -> bool:
        return self._validity is not None and self._validity.is_valid()

    def disconnected(self) -> None:
        """The client notices that its connection is gone."""
        if self.is_connected:
            self.is_connected = False
            self.world.say(f"{self.name} is disconnected")
            for callback in list(self._line.on_drop):
                callback()
            self._on_bus_change()
        self._go(self._reconnect())

    async def _reconnect(self) -> None:
        await self._sleep(self.rng.uniform(0.02, 0.5))
        while self.world.weather.is_cut(self.name, self.world.now):
            await self._sleep(self.rng.uniform(0.1, 0.5))
        if self.is_connected:
            return
        self.is_connected = self.has_interest = True
        self.connection += 1
        self.world.say(f"{self.name} is connected again")
        self._on_bus_change()
        self._send_heartbeat()

    def drain(self, until: float) -> None:
        """Leave in good order, and come back not before *until*."""
        if not self._is_over and self._draining is None and self.is_open:
            self._go(self._drain(until))

    async def _drain(self, until: float) -> None:
        self._draining = f"drained from {self.name}"
        self._see_self()
        self._send_heartbeat()
        self._notify()
        for agent, placed in self._placed.items():
            if not self._worker_ready:
                self._reports[agent] = AgentReport(
                    id=agent, epoch=placed.epoch, status=AgentStatus.STOPPED, reason="drained"
                )
        self._order({agent: placed.epoch for agent, placed in self._placed.items()}, [])
        self._host_wake.set()
        deadline = self.now + _DRAIN_TIMEOUT_S
        while (self._placed or self._reports) and self.now < deadline:
            await self._sleep(0.1)
        self._lease_step(Resign())
        self._election_closed = True
        await self._sleep(0.1)
        self._is_over = True
        self._send_heartbeat(left=True)
        await self._write("nodes", self.name, None, self._own_revision)
        self.die()
        self.world.begin_later(self.name, max(0.3, until - self.world.now))

    # ---- own record -------------------------------------------------------------------

    async def _write_own(self, incarnation: int, expected: int) -> bool | None:
        """Whether it is written; None: it was refused."""
        record = self._own_record
        if record is None:
            record = NodeRecord(
                name=self.name,
                incarnation=incarnation,
                workers=[f"{self.name}-w0"],
                capacity=self.world.capacity,
            )
        else:
            record = record.model_copy(update={"incarnation": incarnation})
        self._own_incarnations.add(incarnation)
        result = await self._write("nodes", self.name, record, expected, _RECORD_TTL_S)
        if isinstance(result, Failure):
            return None if result is Failure.STALE else False
        self._own_revision = result
        self.incarnation = max(self.incarnation, incarnation)
        self._own_record = record.model_copy(update={"incarnation": self.incarnation})
        self._end(self.name, incarnation - 1)
        self._see_self()
        self._notify()
        return True

    async def _keep_record(self) -> None:
        while not self._is_over:
            await self._sleep(_RECORD_EVERY_S * self.rng.uniform(0.9, 1.0))
            if self._is_over or not self.is_connected:
                continue
            began = self.now
            if await self._write_own(self.incarnation, self._own_revision) is None:
                await self._reclaim()
            if self.now - began > _STALL_S:
                self.disturb()

    async def _reclaim(self) -> None:
        entry = await self._read("nodes", self.name)
        if isinstance(entry, Failure):
            return
        if entry is None or entry.value is None:
            await self._write_own(self.incarnation, 0 if entry is None else entry.revision)
        elif entry.value.ended:
            self._ended(entry.value.incarnation)
        elif entry.value.incarnation in self._own_incarnations:
            await self._write_own(self.incarnation, entry.revision)
        else:
            self.die()

    async def _seal(self, node: str, incarnation: int) -> bool:
        """Write down that this life is over; False: it is not known to be written."""
        while self._sealed.get(node, -1) < incarnation:
            entry = await self._read("nodes", node)
            if isinstance(entry, Failure):
                return False
            record = NodeRecord(name=node, incarnation=incarnation)
            if entry is not None and entry.value is not None:
                record = entry.value
            if record.incarnation < incarnation:
                record = record.model_copy(update={"incarnation": incarnation})
            if record.incarnation == incarnation and not record.ended:
                result = await self._write(
                    "nodes",
                    node,
                    record.model_copy(update={"ended": True}),
                    0 if entry is None else entry.revision,
                    _SEALED_TTL_S,
                )
                if result is Failure.STALE:
                    continue
                if isinstance(result, Failure):
                    return False
                self.world.say(f"{self.name} seals {node}/{incarnation}")
            self._sealed[node] = incarnation
        self._opinions.pop(node, None)
        return True

    def _take_back(self, node: str, incarnation: int) -> None:
        """Judge this life anew, if nothing but our own verdict says that it is over."""
        if self._opinions.get(node) != incarnation or Bug.TRUSTS_OLD_VERDICTS in self.world.missing:
            return
        del self._opinions[node]
        if self._detector.incarnation(node) not in (None, incarnation):
            return
        self.world.say(f"{self.name} takes its verdict on {node}/{incarnation} back")
        self._down[node] = incarnation - 1
        self._step(Forgot(node))
        self._heard.pop(node, None)
        if self._died_leading == node:
            self._died_leading = None
        if node in self._records:
            self._step(Heard(node, incarnation))
            self._show(node)
        else:
            self._views.pop(node, None)
        self._notify()

    def _take_back_all(self, *, but: str | None = None) -> None:
        for node, incarnation in list(self._opinions.items()):
            if node != but:
                self._take_back(node, incarnation)

    def _note_gap(self) -> None:
        self._lagged_at = self.now
        self._take_back_all()

    def _ended(self, incarnation: int) -> None:
        """Somebody has written down that our life *incarnation* is over."""
        if incarnation == self.incarnation and not self._is_over:
            self._declared_down()

    def _echoed_down(self) -> None:
        if Bug.RETURNS_AS_BEFORE in self.world.missing:
            return
        # The worker hears the same echo, and ends.
        for activation in list(self._activations.values()):
            self._forget(activation)
        self._declared_down()

    def _declared_down(self) -> None:
        if not self._rejoining and Bug.RETURNS_AS_BEFORE not in self.world.missing:
            self._rejoining = True
            self.world.say(f"{self.name} learns that it was declared down")
            self._go(self._rejoin())

    async def _rejoin(self) -> None:
        if Bug.LEADS_WHEN_OVER not in self.world.missing:
            self._end(self.name, self.incarnation)
            self._notify()
        while True:
            incarnation = max(self.incarnation + 1, 1 + int(self.world.now * 1000))
            written = await self._write_own(incarnation, self._own_revision)
            if written is None:
                entry = await self._read("nodes", self.name)
                if not isinstance(entry, Failure):
                    if (
                        entry is not None
                        and entry.value is not None
                        and entry.value.incarnation not in self._own_incarnations
                    ):
                        self.die()
                        return
                    written = await self._write_own(
                        incarnation, 0 if entry is None else entry.revision
                    )
            if written:
                break
            await self._sleep(0.5)
        self._forget_verdicts()
        self._send_heartbeat()
        self._listen()
        self._end_worker()
        self.world.timer(self, 0.3, self._on_worker_ready, self._worker_life)
        for agent in list(self._placed):
            self._unplace(agent)
        self._reports.clear()
        self._refused.clear()
        self._lost.clear()
        self._touch_mine()
        self._rejoining = False

    def _forget_verdicts(self) -> None:
        """Judge everybody anew, but for those whose end is sealed."""
        self._detector = _new_detector(self.world)
        self._died_leading = None
        self._opinions.clear()
        self._down = {self.name: self.incarnation - 1, **self._sealed}
        for name, record in list(self._records.items()):
            if not self._is_down(name, record.incarnation):
                self._step(Heard(name, record.incarnation))
            self._show(name)
        self._notify()

    # ---- membership -------------------------------------------------------------------

    def _see_self(self) -> None:
        if self._is_member and self._own_record is not None:
            status = NodeStatus.UP if self._draining is None else NodeStatus.DRAINING
            self._views[self.name] = NodeView(self._own_record, status)

    def _is_down(self, node: str, incarnation: int) -> bool:
        return self._down.get(node, -1) >= incarnation

    def _end(self, node: str, incarnation: int) -> None:
        self._down[node] = max(self._down.get(node, -1), incarnation)

    def _on_heartbeat(self, beat: Beat) -> None:
        if self._is_over:
            return
        name = beat.node
        self._note_deafness(self.now)
        if name == self.name:
            if beat.incarnation == self.incarnation:
                self._own_heard_at = self.now
                self._see_self()
            self._echo(beat)
            return
        if beat.left:
            self._opinions.pop(name, None)
            self._end(name, beat.incarnation)
            self._step(Left(name, beat.incarnation))
            self._heard.pop(name, None)
            self._show(name)
            self._notify()
            return
        if self._term is None:
            self._take_back(name, beat.incarnation)
        if not self._is_down(name, beat.incarnation):
            before = self._heard.get(name)
            is_first = before is None or before.incarnation != beat.incarnation
            self._heard[name] = beat
            self._step(Heard(name, beat.incarnation))
            self._show(name)
            if is_first or (before is not None and before.draining != beat.draining):
                self._notify()
        self._echo(beat)
        if (
            self._term is None
            and name == self._holder
            and self.now - self._beat_at >= LIVENESS.heartbeat_interval_s * _EARLY_BEAT
        ):
            self._send_heartbeat()

    def note_ping(self, source: str) -> None:
        """Somebody's probe arrived."""
        if source == self._holder:
            self._pinged_at = self.now

    def _may_echo(self) -> bool:
        if Bug.ECHOES_FOR_EVER in self.world.missing:
            return True
        renewed_at = self.candidate.renewed_at
        if self.now - renewed_at >= self._echo_for_s:
            return False
        if self._lagged_at is None or renewed_at > self._lagged_at:
            return True
        self._lease_step(Doubt())
        return False

    def _echo(self, beat: Beat) -> None:
        if self._term is None or not self._may_echo():
            return
        over = self._is_down(beat.node, beat.incarnation)
        echo = Echo(
            node=beat.node,
            incarnation=beat.incarnation,
            beat=beat.number,
            sent_at=beat.sent_at,
            verdict=NodeStatus.DOWN if over else NodeStatus.UP,
            leader=self.name,
            term=self._term,
        )
        target = self.world.nodes[beat.node]
        if not self.world.is_lost():
            self.world.send(self, target, target.on_echo, encode(echo))

    def on_echo(self, data: bytes) -> None:
        """An echo arrives."""
        if self._line.on_message is not None:
            self._line.on_message(Message("", "", data, None))

    def _restored(self) -> None:
        self.world.check_answers(self)
        self._resume()

    def _on_review(self, lapse: int) -> None:
        assert self._validity is not None
        self._go(self._review(self._validity, lapse))

    async def _review(self, validity: Validity, lapse: int) -> None:
        while validity.in_review(lapse):
            if Bug.RESTORES_UNREAD not in self.world.missing and not await self._review_records():
                await self._sleep(_RETRY_S)
                continue
            validity.confirm(lapse)

    async def _review_records(self) -> bool:
        """End what others were given meanwhile; False: the records could not be read."""
        held = list(self._activations.values())
        claiming = {agent: epoch for agent, epoch in self._claiming.items() if epoch}
        if not held and not claiming:
            return True
        found = await self._ask(lambda: dict(self.world.buckets["agents"].entries))
        if isinstance(found, Failure):
            return False
        mine = {
            agent: entry.value.epoch
            for agent, entry in found.items()
            if entry.value is not None and entry.value.node == self.name
        }
        for activation in held:
            if not activation.is_ended and mine.get(activation.agent) != activation.epoch:
                self._fail(activation)
        for agent, epoch in claiming.items():
            if mine.get(agent) != epoch and self._claiming.get(agent) == epoch:
                self._claiming[agent] = 0
        return True

    def on_entries(self, bucket: str, entries: list[Entry]) -> None:
        """A watch delivers."""
        for entry in entries:
            match bucket:
                case "nodes":
                    self._on_node_entry(entry)
                case "agents":
                    self._on_agent_entry(entry)
                case "desired":
                    self._on_wish(entry)
                case _:
                    self._see_lease(entry.value, entry.revision)

    def _on_node_entry(self, entry: Entry) -> None:
        name = entry.key
        if entry.value is None:
            self._records.pop(name, None)
            if name != self.name and self._detector.verdict(name) in (None, Verdict.DOWN):
                self._step(Forgot(name))
                self._heard.pop(name, None)
                self._views.pop(name, None)
                self._notify()
            return
        record: NodeRecord = entry.value
        if name == self.name and self._is_member:
            if record.incarnation not in self._own_incarnations:
                self.die()
            elif record.ended:
                self._ended(record.incarnation)
            return
        if record.ended:
            self._sealed[name] = max(record.incarnation, self._sealed.get(name, -1))
            self._opinions.pop(name, None)
            if not self._is_down(name, record.incarnation):
                self._end(name, record.incarnation)
                self._step(Left(name, record.incarnation))
                self._heard.pop(name, None)
        before = self._records.get(name)
        self._records[name] = record
        is_new = before is None or before.incarnation != record.incarnation
        if is_new and not self._is_down(name, record.incarnation):
            self._step(Heard(name, record.incarnation))
            beat = self._heard.get(name)
            if beat is None or beat.incarnation != record.incarnation:
                self._heard.pop(name, None)
                self._greet(name, record.incarnation)
        self._show(name)
        if before != record:
            self._notify()

    def _greet(self, name: str, incarnation: int) -> None:
        if self.world.ping(self.name, name) == incarnation:
            self.world.timer(self, self.rng.uniform(0.002, 0.05), self._greeted, name, incarnation)

    def _greeted(self, name: str, incarnation: int) -> None:
        if not self._is_down(name, incarnation):
            self._heard.setdefault(name, None)
            self._step(Heard(name, incarnation))
            self._show(name)
            self._notify()

    def _on_bus_change(self) -> None:
        if Bug.ECHOES_AFTER_A_DROP not in self.world.missing:
            self._note_gap()
        self.disturb()

    def disturb(self) -> None:
        """The bus is unwell."""
        self._disturbed_at = self.now
        self._step(BusDisturbed())

    def _step(self, event: LivenessEvent) -> None:
        effects = self._detector.step(event, self.now)
        for effect in effects:
            match effect:
                case VerdictChanged(node, incarnation, old, new, cause):
                    if self.world.trace is not None:
                        self.world.say(f"{self.name} says {node}/{incarnation} {new} ({cause})")
                    if new is Verdict.DOWN:
                        if cause != "left":
                            self.world.check_verdict(self, node, incarnation, cause)
                            if not self._is_down(node, incarnation):
                                self._opinions[node] = incarnation
                            if self._term is None and node == self._holder:
                                self._died_leading = node
                        self._end(node, incarnation)
                    elif old is None:
                        self._end(node, incarnation - 1)
                    self._show(node)
                case Confirm(node, incarnation):
                    self._confirm(node, incarnation)
                case _:
                    pass
        if effects:
            self._notify()

    def _confirm(self, node: str, incarnation: int) -> None:
        others = [
            view.name
            for view in self._views.values()
            if view.status is NodeStatus.UP and view.name not in (node, self.name)
        ]
        reachable: bool | None = None
        took = 0.0
        if others:
            other = self.rng.choice(others)
            asked = self.world.ping(self.name, other)
            if asked is None:
                took = 2 * LIVENESS.confirm_timeout_s
            elif asked > 0:
                found = self.world.ping(other, node)
                reachable = found == incarnation
                took = LIVENESS.confirm_timeout_s if found is None else 0.0
        delay = took + self.rng.uniform(0.002, 0.05)
        self.world.timer(self, delay, self._step, Confirmed(node, incarnation, reachable))

    def _show(self, name: str) -> None:
        known, beat = self._records.get(name), self._heard.get(name)
        shown = self._views.get(name)
        if known is None:
            known = shown.record if shown is not None else None
        if known is None or name == self.name:
            return
        is_heard = name in self._heard
        newest = self._detector.incarnation(name)
        if newest is not None and newest > known.incarnation and not self._is_down(name, newest):
            status = NodeStatus.SUSPECT
        elif self._is_down(name, known.incarnation):
            if name not in self._records:
                self._views.pop(name, None)
                return
            status, is_heard = NodeStatus.DOWN, False
        elif not is_heard or self._detector.verdict(name) is not Verdict.UP:
            status = NodeStatus.SUSPECT
        else:
            status = NodeStatus.DRAINING if beat is not None and beat.draining else NodeStatus.UP
        if (
            shown is None
            or shown.record is not known
            or shown.status is not status
            or shown.heard is not is_heard
        ):
            self._views[name] = NodeView(known, status, heard=is_heard)

    def _notify(self) -> None:
        self._election_on_members()
        self._wake_reconciler(urgent=True)

    def _probe_all(self) -> None:
        if not self.is_connected:
            return
        if self._term is not None:
            targets = [name for name in self._views if name != self.name]
        elif self._holder is not None and self._holder != self.name:
            targets = [self._holder]
        else:
            return
        for name in targets:
            view = self._views.get(name)
            if view is None or not view.is_alive or name in self._probing:
                continue
            found = self.world.ping(self.name, name)
            if found == 0:
                self._missed.add(name)
                self._probing.add(name)
                delay = self.rng.uniform(0.002, 0.1)
                self.world.timer(self, delay, self._probed, ProbeMissed(name, view.incarnation))
            elif name in self._missed:
                # To a node that never missed a probe, an answer changes nothing.
                delay = 1.0 if found is None else self.rng.uniform(0.002, 0.05)
                self._missed.discard(name)
                self._probing.add(name)
                self.world.timer(self, delay, self._probed, ProbeAnswered(name, view.incarnation))

    def _probed(self, event: ProbeMissed | ProbeAnswered) -> None:
        self._probing.discard(event.node)
        if self.is_connected:
            self._step(event)

    def _send_heartbeat(self, *, left: bool = False) -> None:
        if not self._is_member or not self.is_connected or (self._is_over and not left):
            return
        self._beats += 1
        self._beat_at = self.now
        follows = self._term is None and self._holder not in (None, self.name)
        share = self.rng.uniform(*(_LATE_BEAT if follows else (0.9, 1.1)))
        self._next_beat = self.now + LIVENESS.heartbeat_interval_s * share
        beat = Beat(
            self.name,
            self.incarnation,
            self._beats,
            self.now,
            self._draining is not None,
            left,
        )
        if self.world.is_lost():
            return  # for all: a bus does not lose one receiver's copy; `Kind.PAIR` does
        for node in self.world.nodes.values():
            if not node.is_dead:
                self.world.send(self, node, node._on_heartbeat, beat)

    def _tick(self) -> None:
        if self._is_over:
            return
        now = self.now
        self._note_lag(now - self._expected, now)
        self._note_deafness(now)
        if now >= self._next_beat:
            self._send_heartbeat()
            self._next_beat = max(self._next_beat, now + LIVENESS.heartbeat_interval_s / 2)
        due = self._next_probe
        if self._term is None and self._pinged_at is not None:
            due = max(due, self._pinged_at + LIVENESS.probe_interval_s * _LATE_PROBE)
        if now >= due:
            self._probe_all()
            self._next_probe = now + LIVENESS.probe_interval_s
        due = self._detector.deadline()
        if due is not None and now >= due:
            self._step(LivenessTick())
            due = self._detector.deadline()
            if due is not None and due <= now:
                self.world.stands_still(self, "the failure detector's deadline")
        self._expected = now + _TICK_S
        self.world.timer(self, _TICK_S, self._tick)

    def _note_deafness(self, now: float) -> None:
        if not self._is_member:
            return
        if now - self._own_heard_at > LIVENESS.heartbeat_interval_s * _DEAF_BEATS:
            if Bug.ECHOES_UNHEARD not in self.world.missing:
                self._note_gap()
            if Bug.JUDGES_UNHEARD not in self.world.missing:
                self._step(Deaf())

    def _note_lag(self, lag: float, now: float) -> None:
        if lag >= LIVENESS.suspect_after_s:
            self._note_gap()
            for name, (incarnation, verdict) in self._detector.snapshot().items():
                if verdict is Verdict.UP:
                    self._step(Heard(name, incarnation))
        if lag >= max(_LAG_MIN_S, self._lag_s):
            self._lag_s, self._lag_at = lag, now
            self._step(OwnLag(lag))
        elif self._lag_s and now - self._lag_at > _LAG_MEMORY_S:
            self._lag_s = 0.0
            self._step(OwnLag(0.0))

    # ---- election ---------------------------------------------------------------------

    def _new_candidate(self) -> Candidate:
        return Candidate(
            me=self.name,
            incarnation=self.incarnation,
            ttl_s=LEASE.ttl_s,
            renew_every_s=LEASE.renew_every_s,
            stop_after_s=LEASE.stop_after_s,
            random=self.rng,
        )

    def _see_lease(self, record: LeaseRecord | None, revision: int) -> None:
        if self._lease is not None and 0 < revision < self._lease[1]:
            return
        is_new = self._lease is None or revision > self._lease[1]
        self._lease = (record, revision)
        self._holder = None if record is None else record.holder
        if record is not None and is_new and self._term is None and record.holder != self.name:
            self._died_leading = None
            self._take_back(record.holder, record.incarnation)
            if (
                not self._is_down(record.holder, record.incarnation)
                and Bug.RENEWS_UNSEEN not in self.world.missing
            ):
                self._step(Heard(record.holder, record.incarnation))
        if record is None:
            self.candidate.term = max(self.candidate.term, revision)
            self._lease_step(LeaseVacant(revision))
        else:
            self._check_holder()
            self._lease_step(LeaseSeen(record.holder, record.incarnation, record.term, revision))

    def _check_holder(self) -> None:
        record = None if self._lease is None else self._lease[0]
        if record is None:
            return
        gone = self._is_down(record.holder, record.incarnation)
        what = HolderGone if gone else HolderBack
        self._lease_step(what(record.holder, record.incarnation))

    def _election_on_members(self) -> None:
        if self._election_closed or not self.is_open:
            return
        if self.candidate.incarnation != self.incarnation:
            self._lease_step(Resign())
            self.candidate = self._new_candidate()
            if self._lease is not None:
                self._see_lease(*self._lease)
        elif self._is_down(self.name, self.incarnation):
            self._lease_step(Resign())
        self._check_holder()

    def _lease_step(self, event: LeaseEvent) -> None:
        if self._election_closed:
            return
        candidate = self.candidate
        for effect in candidate.step(event, self.now):
            self._perform(effect)
        due = self.candidate.deadline()
        if due is not None and due <= self.now:
            self.world.stands_still(self, "the candidate's deadline")
        self._arm(due)

    def _arm(self, due: float | None) -> None:
        if due is None or (self._armed_for is not None and self._armed_for <= due):
            return  # an earlier timer arms the next one
        self._armed_for = due
        self.world.timer(self, due - self.now, self._on_lease_timer, due)

    def _on_lease_timer(self, due: float) -> None:
        if self._armed_for != due:
            return
        self._armed_for = None
        wanted = self.candidate.deadline()
        if wanted is not None and self.now >= wanted:
            self._lease_step(LeaseTick())
        else:
            self._arm(wanted)

    def _perform(self, effect: LeaseEffect) -> None:
        candidate = self.candidate
        match effect:
            case Acquire(attempt, expected, term):
                self._go(self._acquire(candidate, attempt, expected, term))
            case Renew(attempt, expected, term):
                self._go(self._renew(candidate, attempt, expected, term))
            case Release(expected, _):
                self._go(self._give_back(expected))
            case ReadLease():
                self._go(self._read_lease())
            case BecameLeader(term):
                self.world.say(f"{self.name} leads in term {term}")
                self.world.became_leader(self, term)
                self._term = term
                self._take_back_all(but=self._died_leading)
                self._died_leading = None
                self._send_heartbeat()
                self._lead(term)
            case LostLeadership(_, reason):
                self.world.say(f"{self.name} does not lead any more: {reason}")
                self._term = None
                self._died_leading = None
                self._lead(None)

    def _lease_record(self, candidate: Candidate, term: int) -> LeaseRecord:
        return LeaseRecord(
            holder=candidate.me, incarnation=candidate.incarnation, term=term, ttl_s=LEASE.ttl_s
        )

    def _remember(self, record: LeaseRecord, revision: int) -> None:
        if self._lease is None or revision > self._lease[1]:
            self._lease = (record, revision)
            self._holder = record.holder

    async def _acquire(self, candidate: Candidate, attempt: int, expected: int, term: int) -> None:
        record = self._lease_record(candidate, term)
        result = await self._write("leases", "leader", record, expected, LEASE.ttl_s)
        ok: bool | None = None if result is Failure.UNKNOWN else False
        revision = 0
        if not isinstance(result, Failure):
            ok, revision = True, result
            self._remember(record, revision)
        elif result is Failure.STALE and Bug.TRUSTS_REFUSED_LEASE in self.world.missing:
            ok, revision = True, expected + 1
        if candidate is self.candidate:
            self._lease_step(AcquireResult(attempt, ok, term, revision))

    async def _renew(self, candidate: Candidate, attempt: int, expected: int, term: int) -> None:
        began = self.now
        record = self._lease_record(candidate, term)
        result = await self._write("leases", "leader", record, expected, LEASE.ttl_s)
        outcome: Literal["ok", "lost", "unknown"] = "unknown"
        revision = expected
        if not isinstance(result, Failure):
            outcome, revision = "ok", result
            self._remember(record, revision)
        elif result is Failure.STALE:
            entry = await self._read("leases", "leader")
            if not isinstance(entry, Failure):
                if entry is not None and entry.value == record:
                    self._see_lease(entry.value, entry.revision)
                else:
                    outcome = "lost"
        if self.now - began > _STALL_S:
            self.disturb()
        if candidate is self.candidate:
            self._lease_step(RenewResult(attempt, outcome, revision))

    async def _give_back(self, expected: int) -> None:
        await self._write("leases", "leader", None, expected)

    async def _read_lease(self) -> None:
        entry = await self._read("leases", "leader")
        if isinstance(entry, Failure):
            return
        if entry is None:
            self._see_lease(None, 0)
        else:
            self._see_lease(entry.value, entry.revision)

    # ---- registry and wishes ------------------------------------------------------------

    def _revision_of(self, agent: str) -> int:
        held = self._held.get(agent)
        return held.revision if held is not None else self._gone.get(agent, 0)

    def _on_agent_entry(self, entry: Entry) -> None:
        self._apply(entry.key, entry.value, entry.revision)

    def _apply(self, agent: str, record: AgentRecord | None, revision: int) -> None:
        if revision <= self._revision_of(agent):
            return
        held: Held | None = None
        if record is None:
            self._held.pop(agent, None)
            self._gone[agent] = revision
        else:
            held = self._held[agent] = Held(record, revision)
            self._gone.pop(agent, None)
        if (record is not None and record.node == self.name) or agent in self._placed:
            self._touched.add(agent)
            self._host_wake.set()
        self._reconciler_on_record(agent, held)

    def _on_wish(self, entry: Entry) -> None:
        if entry.revision <= self._wish_revisions.get(entry.key, 0):
            return
        self._wish_revisions[entry.key] = entry.revision
        if entry.value is None:
            self._wishes.pop(entry.key, None)
        else:
            self._wishes[entry.key] = entry.value
        self._wake_reconciler()

    async def _change(self, agent: str, record: AgentRecord | None, expected: int) -> int | Failure:
        blind = Bug.BLIND_WRITES in self.world.missing
        result = await self._write("agents", agent, record, None if blind else expected)
        if not isinstance(result, Failure):
            self._apply(agent, record, result)
        return result

    # ---- reconciler ---------------------------------------------------------------------

    def _lead(self, term: int | None) -> None:
        self._lead_term = term
        self._is_ready = False
        self._missing_since.clear()
        if term is not None:
            self._wake_reconciler(urgent=True)

    def _wake_reconciler(self, *, urgent: bool = False) -> None:
        if self._lead_term is None:
            return
        if self._passing:
            if self._again != "urgent":
                self._again = "urgent" if urgent else "soon"
            return
        now = self.now
        self._pass_at(now if urgent else max(now + _DEBOUNCE_S, self._not_before))

    def _pass_at(self, due: float) -> None:
        if self._pass_due is None or due < self._pass_due:
            self._pass_due = due
            self.world.timer(self, due - self.now, self._on_pass_due, due)

    def _on_pass_due(self, due: float) -> None:
        if self._pass_due != due:
            return
        self._pass_due = None
        if self._lead_term is not None and not self._passing:
            self._passing = True
            self._go(self._pass(self._lead_term))

    def _reconciler_on_record(self, agent: str, held: Held | None) -> None:
        self._note(agent, held)
        if self._lead_term is None:
            return
        record = None if held is None else held.record
        if record is not None and record.status is AgentStatus.STARTING:
            return
        if record is not None and record.status is AgentStatus.RUNNING:
            if not self._quiet_pending:
                self._quiet_pending = True
                self.world.timer(self, _QUIET_S, self._on_quiet)
            return
        self._wake_reconciler()

    def _on_quiet(self) -> None:
        self._quiet_pending = False
        self._wake_reconciler()

    def _note(self, agent: str, held: Held | None) -> None:
        history, now = self._history, self.now
        if held is None:
            self._newest = max(self._newest, self._gone.get(agent, 0))
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
        mark = (record.status, record.epoch, record.failures)
        if self._marks.get(agent) != mark:
            self._marks[agent] = mark
            history.since[agent] = now
        if record.node is not None:
            history.homes[agent] = record.node

    async def _pass(self, term: int) -> None:
        began = self.now
        wait = _RETRY_S
        if self._is_ready or await self._prepare():
            wait = await self._plan_and_execute(term)
        took = self.now - began
        self._not_before = self.now + min(1.0, max(_DEBOUNCE_S, 2.0 * took))
        self._passing = False
        again, self._again = self._again, "no"
        if self._lead_term is None:
            return
        if Bug.SPINS in self.world.missing:
            wait = 0.001
        if again == "urgent" or wait == 0.0:
            self._pass_at(self.now)
        elif again == "soon":
            self._pass_at(self._not_before)
        else:
            self._pass_at(self.now + wait)

    async def _prepare(self) -> bool:
        found = await self._ask(
            lambda: (self.world.buckets["desired"].since(0), self.world.buckets["agents"].last)
        )
        if isinstance(found, Failure):
            return False
        wishes, last = found
        for entry in wishes:
            self._on_wish(entry)
        self._epoch_floor = max(self._epoch_floor, last)
        self._is_ready = True
        return True

    def planned(self) -> list[Command]:
        """What it would do now; changes nothing."""
        nodes, _ = self._nodes(self.now)
        found = plan(
            self._wishes,
            self._held,
            nodes,
            self.now,
            CONTROL,
            self.name,
            Random(0),
            history=self._history,
            epoch_floor=self._epoch_floor,
        )
        return list(found.commands)

    async def _plan_and_execute(self, term: int) -> float:
        now = self.now
        nodes, soonest = self._nodes(now)
        self._epoch_floor = max(self._epoch_floor, self._newest)
        self.passes += 1
        found = plan(
            self._wishes,
            self._held,
            nodes,
            now,
            CONTROL,
            self.name,
            self.rng,
            history=self._history,
            epoch_floor=self._epoch_floor,
        )
        wait = CONTROL.resync_every_s
        if soonest is not None:
            wait = min(wait, soonest)
        if found.commands and not await self._seal_losers(found.commands, nodes):
            return _RETRY_S
        if found.commands and self._lead_term == term:
            results = await all_of(
                [
                    self._change(
                        command.agent,
                        self._tampered(command, nodes),
                        command.expected or self._gone.get(command.agent, 0),
                    )
                    for command in found.commands
                ]
            )
            if self.now - now > _STALL_S:
                self.disturb()
            if any(isinstance(result, Failure) for result in results):
                wait = min(wait, _RETRY_S)
        if found.is_truncated:
            wait = 0.0
        return wait if found.next_wake_s is None else min(wait, max(0.01, found.next_wake_s))

    async def _seal_losers(
        self, commands: Sequence[Command], nodes: Mapping[str, NodeView]
    ) -> bool:
        losers = {
            (record.node, record.incarnation)
            for command in commands
            if (held := self._held.get(command.agent)) is not None
            and (record := held.record).node is not None
        }
        for node, incarnation in sorted(losers, key=str):
            assert node is not None
            view = nodes.get(node)
            if (
                view is not None
                and view.status is NodeStatus.DOWN
                and view.record.incarnation == incarnation
                and not await self._seal(node, incarnation)
            ):
                return False
        return True

    def _tampered(self, command: Command, nodes: Mapping[str, NodeView]) -> AgentRecord | None:
        record = command.record
        if (
            Bug.LATE_MOVES in self.world.missing
            and record is not None
            and record.desired == "stop"
            and record.recovered_from is not None
            and record.recovered_from.reason == "late"
        ):
            name = self.rng.choice([name for name, view in nodes.items() if view.is_alive])
            return record.model_copy(
                update={
                    "desired": "run",
                    "node": name,
                    "incarnation": nodes[name].incarnation,
                    "epoch": record.epoch + 1,
                }
            )
        if Bug.KEEPS_EPOCH in self.world.missing and record is not None:
            before = getattr(command, "before", None)
            if before is not None and before.epoch:
                return record.model_copy(update={"epoch": before.epoch})
        return record

    def _nodes(self, now: float) -> tuple[dict[str, NodeView], float | None]:
        nodes = dict(self._views)
        soonest: float | None = None
        incarnations: dict[str, int] = {}
        for held in self._held.values():
            home = held.record.node
            if home is not None:
                incarnations[home] = max(incarnations.get(home, 0), held.record.incarnation)
        for name in [n for n in self._missing_since if n not in incarnations or n in nodes]:
            del self._missing_since[name]
        for name, incarnation in incarnations.items():
            if name in nodes:
                continue
            since = self._missing_since.setdefault(name, now)
            if self._disturbed_at is not None and self._disturbed_at + LIVENESS.bus_grace_s > now:
                self._missing_since[name] = max(since, self._disturbed_at)
                due = self._disturbed_at + LIVENESS.bus_grace_s
            else:
                due = since + LIVENESS.down_after_s
            if self._is_down(name, incarnation) or now >= due:
                nodes[name] = missing_node(name, incarnation)
            else:
                soonest = due - now if soonest is None else min(due - now, soonest)
        if Bug.OVERBOOKS in self.world.missing:
            plenty = {"slots": 99.0}
            nodes = {
                name: replace(view, record=view.record.model_copy(update={"capacity": plenty}))
                for name, view in nodes.items()
            }
        return nodes, soonest

    # ---- host ---------------------------------------------------------------------------

    def _touch_mine(self) -> None:
        self._touched.update(
            agent for agent, held in self._held.items() if held.record.node == self.name
        )
        self._host_wake.set()

    def _host_again(self) -> None:
        self.world.timer(self, _RETRY_S, self._host_wake.set)

    async def _host_loop(self) -> None:
        while True:
            await self._host_wake.wait()
            await self._sleep(0.001)
            self._host_wake.is_set = False
            self._take_in()
            self._match()
            if self._lost or self._reports or self._refused:
                self._host_write.set()

    async def _host_writes(self) -> None:
        while True:
            await self._host_write.wait()
            self._host_write.is_set = False
            await self._reclaim_lost()
            await self._write_reports()
            await self._write_refusals()

    def _take_in(self) -> None:
        for agent, report in self._reports.items():
            placed = self._placed.get(agent)
            if (
                report.status is not AgentStatus.RUNNING
                and placed is not None
                and placed.epoch == report.epoch
            ):
                self._unplace(agent)

    async def _reclaim_lost(self) -> None:
        changes: list[tuple[str, AgentRecord, int]] = []
        for agent in sorted(self._lost):
            held, placed = self._held.get(agent), self._placed.get(agent)
            if (
                held is None
                or placed is None
                or held.record.node != self.name
                or held.record.epoch != placed.epoch
                or held.record.desired != "run"
            ):
                self._lost.discard(agent)
                self._unplace(agent)
                self._touched.add(agent)
                self._host_wake.set()
                continue
            record = held.record.model_copy(
                update={
                    "status": AgentStatus.STARTING,
                    "epoch": held.record.epoch + 1,
                    "incarnation": self._worker_incarnation,
                    "reason": None,
                    "recovered_from": RecoveredFrom(
                        node=self.name, epoch=held.record.epoch, reason="worker_died"
                    ),
                }
            )
            changes.append((agent, record, held.revision))
        results = await all_of([self._change(*change) for change in changes])
        for (agent, _, _), result in zip(changes, results, strict=True):
            if isinstance(result, Failure):
                self._host_again()
            else:
                self._lost.discard(agent)
                self._touched.add(agent)
                self._host_wake.set()

    async def _write_refusals(self) -> None:
        refused, self._refused = self._refused, {}
        results = await all_of([self._change(*change) for change in refused.values()])
        for agent, result in zip(refused, results, strict=True):
            if isinstance(result, Failure):
                self._touched.add(agent)
                self._host_again()

    async def _write_reports(self) -> None:
        changes: list[tuple[str, AgentRecord, int]] = []
        reports: list[AgentReport] = []
        for agent, report in list(self._reports.items()):
            held = self._held.get(agent)
            record = None if held is None else self._after(held.record, report)
            if held is None or record is None:
                del self._reports[agent]
                self._touched.add(agent)
                self._host_wake.set()
                continue
            changes.append((agent, record, held.revision))
            reports.append(report)
        results = await all_of([self._change(*change) for change in changes])
        for report, result in zip(reports, results, strict=True):
            if isinstance(result, Failure):
                self._host_again()
            elif self._reports.get(report.id) == report:
                del self._reports[report.id]

    def _after(self, record: AgentRecord, report: AgentReport) -> AgentRecord | None:
        if record.node != self.name or record.epoch != report.epoch:
            return None
        update: dict[str, object]
        match report.status:
            case AgentStatus.RUNNING:
                if record.status is AgentStatus.RUNNING or record.desired != "run":
                    return None
                update = {"status": AgentStatus.RUNNING, "reason": None, "failures": 0}
            case AgentStatus.FAILED:
                update = {
                    "status": AgentStatus.FAILED,
                    "reason": report.reason,
                    "failures": record.failures + 1,
                }
            case _ if report.reason == "fenced":
                return None
            case _ if record.desired == "stop":
                update = {"status": AgentStatus.STOPPED, "node": None, "reason": report.reason}
            case _ if self._draining is not None:
                update = {
                    "status": AgentStatus.PENDING,
                    "node": None,
                    "reason": self._draining,
                    "recovered_from": RecoveredFrom(
                        node=self.name, epoch=record.epoch, reason="moved"
                    ),
                }
            case _:
                update = {
                    "status": AgentStatus.STOPPED,
                    "node": None,
                    "reason": report.reason,
                    "recovered_from": RecoveredFrom(
                        node=self.name, epoch=record.epoch, reason="restarted"
                    ),
                }
        return record.model_copy(update=update)

    def _match(self) -> None:
        touched, self._touched = self._touched, set()
        starts: list[AgentRecord] = []
        stops, self._unstopped = self._unstopped, {}
        for agent in sorted(touched):
            if agent in self._lost:
                continue
            held, placed = self._held.get(agent), self._placed.get(agent)
            mine = (
                held is not None
                and held.record.node == self.name
                and held.record.incarnation == self._worker_incarnation
            )
            if placed is not None and (
                held is None or not mine or held.record.epoch > placed.epoch
            ):
                if held is None or held.record.node != self.name:
                    stops[agent] = placed.epoch
                self._unplace(agent)
                placed = None
            if held is None or not mine or self._has_ended(held.record):
                continue
            record = held.record
            if record.desired == "stop":
                if placed is not None and self._worker_ready:
                    stops[agent] = placed.epoch
                elif record.status is not AgentStatus.STOPPED:
                    self._reports[agent] = AgentReport(
                        id=agent, epoch=record.epoch, status=AgentStatus.STOPPED, reason="stopped"
                    )
                    self._host_wake.set()
                continue
            if record.status is not AgentStatus.STARTING or self._draining is not None:
                continue
            if placed is None:
                shortage = self._shortage(record)
                if shortage is not None:
                    update = {"status": AgentStatus.PENDING, "node": None, "reason": shortage}
                    changed = record.model_copy(update=update)
                    self._refused[agent] = (agent, changed, held.revision)
                    continue
                placed = self._place(record)
            if not placed.told and self._worker_ready:
                placed.told = True
                starts.append(record)
        self._order(stops, starts)

    def _order(self, stops: dict[str, int], starts: list[AgentRecord]) -> None:
        if (stops or starts) and self._worker_ready:
            self._orders.append((stops, starts, self._worker_life))
            if not self._is_ordering:
                self._is_ordering = True
                self._go(self._give_orders())

    def _has_ended(self, record: AgentRecord) -> bool:
        report = self._reports.get(record.id)
        return (
            report is not None
            and report.epoch == record.epoch
            and report.status is not AgentStatus.RUNNING
        )

    async def _give_orders(self) -> None:
        while self._orders:
            stops, starts, life = self._orders.pop(0)
            await self._sleep(self.rng.uniform(0.001, 0.01))
            if life != self._worker_life:
                continue
            if self.is_connected and self.has_interest:
                if stops:
                    self._worker_stop(stops, self._draining or "stopped")
                if starts:
                    self._go(self._worker_start(starts))
                continue
            for agent, epoch in stops.items():
                self._unstopped[agent] = max(epoch, self._unstopped.get(agent, 0))
            for record in starts:
                placed = self._placed.get(record.id)
                if placed is not None and placed.epoch == record.epoch:
                    placed.told = False
                self._touched.add(record.id)
            self._host_again()
        self._is_ordering = False

    def _shortage(self, record: AgentRecord) -> str | None:
        for name, amount in needs(record.spec).items():
            declared = self.world.capacity.get(name)
            if declared is not None and self._used.get(name, 0.0) + amount > declared + 1e-9:
                return f"{self.name} has no {name} left"
        return None

    def _place(self, record: AgentRecord) -> Placed:
        placed = self._placed[record.id] = Placed(record.epoch, record)
        for name, amount in needs(record.spec).items():
            self._used[name] = self._used.get(name, 0.0) + amount
        return placed

    def _unplace(self, agent: str) -> None:
        placed = self._placed.pop(agent, None)
        if placed is not None:
            for name, amount in needs(placed.record.spec).items():
                self._used[name] = self._used.get(name, 0.0) - amount

    def _report(self, agent: str, epoch: int, status: AgentStatus, reason: str | None) -> None:
        """The worker says what became of an agent."""
        report = AgentReport(id=agent, epoch=epoch, status=status, reason=reason)
        self.world.timer(self, 0.002, self._on_report, report, self._worker_incarnation)

    def _on_report(self, report: AgentReport, incarnation: int) -> None:
        if incarnation != self._worker_incarnation:
            return
        known = self._reports.get(report.id)
        if known is None or known.epoch <= report.epoch:
            self._reports[report.id] = report
        self._host_wake.set()

    # ---- the worker ---------------------------------------------------------------------

    def _on_worker_ready(self, life: int) -> None:
        if life == self._worker_life:
            self._worker_ready = True
            self._touch_mine()
            self._send_heartbeat()

    def _end_worker(self) -> None:
        self._worker_life += 1
        self._worker_ready = False
        self._unstopped.clear()
        for placed in self._placed.values():
            placed.told = False
        for activation in list(self._activations.values()):
            self._forget(activation)
        for known in self.world.activations.values():
            known[:] = [item for item in known if item.node is not self]
        self._claiming.clear()

    def worker_dies(self) -> None:
        """The worker process is gone."""
        if not self.is_open:
            return
        self._end_worker()
        if not self._rejoining:
            self._lost.update(self._placed)
        self._host_wake.set()
        for effect in self._supervisor.step(Exited("worker", "killed"), self.now):
            match effect:
                case Restart(_, delay_s):
                    wait = delay_s + self.rng.uniform(0.1, 0.4)
                    self.world.timer(self, wait, self._worker_begins, self._worker_life)
                case Escalate():
                    self.die()
                    self.world.begin_later(self.name, 1.0)
                case _:
                    pass

    def _worker_begins(self, life: int) -> None:
        self._supervisor.step(Started("worker"), self.now)
        self._on_worker_ready(life)

    async def _worker_start(self, records: list[AgentRecord]) -> None:
        life = self._worker_life
        fresh = []
        for record in records:
            known = self._activations.get(record.id)
            if known is not None and known.epoch < record.epoch:
                self._fail(known)
                known = None
            if known is None and self._claiming.get(record.id, 0) < record.epoch:
                self._claiming[record.id] = record.epoch
                fresh.append(record)
        activations = await all_of([self._claim(record, life) for record in fresh])
        if life != self._worker_life:
            return
        for activation in activations:
            if activation is not None and (
                self._claiming.get(activation.agent) == activation.epoch
                or Bug.STOP_MISSES_CLAIM in self.world.missing
            ):
                self._take_over(activation)
        for record in fresh:
            if self._claiming.get(record.id) == record.epoch:
                del self._claiming[record.id]

    async def _claim(self, record: AgentRecord, life: int) -> Activation | None:
        agent = record.id
        incarnation = self._worker_incarnation
        writer = (self.name, incarnation)
        entry: Entry | Failure | None
        while True:
            entry = await self._ask(lambda: self._maybe_old(agent))
            if not isinstance(entry, Failure):
                break
            await self._sleep(0.2)
        for _ in range(_CLAIM_ROUNDS):
            if life != self._worker_life:
                return None
            stored: StateValue | None = None if entry is None else entry.value
            if (
                stored is not None
                and stored.epoch > record.epoch
                and Bug.SKIPS_EPOCH_CHECK not in self.world.missing
            ):
                return None
            expected = 0 if entry is None else entry.revision
            value = StateValue(record.epoch, writer)
            result = await self._write("state", agent, value, expected)
            if not isinstance(result, Failure):
                return Activation(agent, record.epoch, self, incarnation, life, record, result)
            entry = await self._read_surely(agent)
            if entry is not None and entry.value == value:
                return Activation(
                    agent, record.epoch, self, incarnation, life, record, entry.revision
                )
        self._report(agent, record.epoch, AgentStatus.FAILED, "the record could not be claimed")
        return None

    def _maybe_old(self, agent: str) -> Entry | None:
        """What a replica says of a state record."""
        bucket = self.world.buckets["state"]
        if agent in bucket.before and self.world.rng.random() < 0.1:
            return bucket.before[agent]
        return bucket.entries.get(agent)

    async def _read_surely(self, agent: str) -> Entry | None:
        while True:
            entry = await self._read("state", agent)
            if not isinstance(entry, Failure):
                return entry
            await self._sleep(0.3)

    def _take_over(self, activation: Activation) -> None:
        agent = activation.agent
        self.world.say(f"{self.name} runs {agent} under epoch {activation.epoch}")
        self.world.report.claims += 1
        self._activations[agent] = activation
        self.world.activations.setdefault(agent, []).append(activation)
        self.world.check_answers(self)
        self._try_start(activation)

    def _try_start(self, activation: Activation) -> None:
        if activation.is_ended or activation.is_started:
            return
        if not self._is_valid():
            activation.is_parked = True
            return
        activation.is_started = True
        activation.is_parked = False
        self._report(activation.agent, activation.epoch, AgentStatus.RUNNING, None)
        self.world.timer(
            self, self.rng.uniform(0.5, 1.5) * _COMMIT_EVERY_S, self._commit_later, activation
        )

    def _resume(self) -> None:
        for activation in list(self._activations.values()):
            if activation.is_parked:
                self._try_start(activation)

    def _commit_later(self, activation: Activation) -> None:
        if activation.is_ended:
            return
        if self._is_valid():
            self._go(self._commit(activation))
        self.world.timer(
            self, self.rng.uniform(0.5, 1.5) * _COMMIT_EVERY_S, self._commit_later, activation
        )

    async def _commit(self, activation: Activation) -> None:
        value = StateValue(activation.epoch, (self.name, activation.incarnation))
        result = await self._write("state", activation.agent, value, activation.revision)
        if activation.is_ended:
            return
        if not isinstance(result, Failure):
            activation.revision = max(activation.revision, result)
            return
        entry = await self._read_surely(activation.agent)
        if activation.is_ended:
            return
        if entry is not None and entry.value == value:
            activation.revision = max(activation.revision, entry.revision)
        else:
            self._fail(activation)

    def _forget(self, activation: Activation) -> None:
        activation.is_ended = True
        if self._activations.get(activation.agent) is activation:
            del self._activations[activation.agent]
        known = self.world.activations.get(activation.agent, [])
        if activation in known:
            known.remove(activation)

    def _fail(self, activation: Activation) -> None:
        """It is fenced."""
        self._forget(activation)
        self._report(activation.agent, activation.epoch, AgentStatus.STOPPED, "fenced")

    def _worker_stop(self, agents: dict[str, int], reason: str) -> None:
        for agent, epoch in agents.items():
            activation = self._activations.get(agent)
            if activation is not None and activation.epoch <= epoch:
                self._forget(activation)
                self._report(agent, activation.epoch, AgentStatus.STOPPED, reason)
            elif activation is None:
                if 0 < self._claiming.get(agent, 0) <= epoch:
                    self._claiming[agent] = 0
                self._report(agent, epoch, AgentStatus.STOPPED, reason)


def _new_detector(world: World) -> LivenessDetector:
    impatient = Bug.NO_PATIENCE in world.missing
    down_after_s = LIVENESS.heartbeat_interval_s if impatient else LIVENESS.down_after_s
    return LivenessDetector(
        suspect_after_s=min(LIVENESS.suspect_after_s, down_after_s / 2),
        down_after_s=down_after_s,
        bus_grace_s=LIVENESS.bus_grace_s,
        storm_fraction=LIVENESS.storm_fraction,
        storm_hold_s=STORM_HOLD_S,
    )
