"""Several nodes' machines on one simulated bus and store, in simulated time, with an eye on every promise.

Deterministic: a story and its seed decide everything. The world holds what the
nodes share (time, core messages, buckets with revisions) and checks the
invariants named in `Invariant`; a node (`tests.simulation.node`) is one
process, with the decisions of production and a shell that mirrors production's.

What it leaves out: agents' mailboxes, several workers per node, clocks that run
at different rates, and a manager and a worker that disagree about the network.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from foundation_nats.cluster import validity
from foundation_nats.placement.constraints import needs
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    OnNodeLoss,
    PlacementPolicy,
)
from tests.simulation.coroutines import end_all
from tests.simulation.story import LASTING, Fault, Kind, Story, Wish
from tests.simulation.weather import LOST, Weather

if TYPE_CHECKING:
    from tests.simulation.node import Activation, Node

T = TypeVar("T")

REQUEST_TIMEOUT_S = 5.0
HEAL_S = 75.0
"""Within this after the last fault everything is as it should be: lease, grace, storm, back-offs."""
QUIET_S = 2.0
"""So long it must stay so."""
STEPS_PER_S_MAX = 600
_SLICE_S = 1.0
_KV_LATE_S = 0.02
_REPEAT_LATE_S = 3.0
ACTIVE = frozenset({AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING})


class Invariant(StrEnum):
    """What must hold in every world."""

    ONE_LEADER_PER_TERM = "one leader per term"
    EPOCHS_GROW = "the epochs of an agent never go back"
    ONE_NODE_PER_EPOCH = "no two nodes act under the same epoch"
    ONE_ANSWERS = "no two activations of an agent may answer at the same time"
    NO_SLANDER = "a node that nothing has happened to is not declared down"
    CONVERGES = "after healing everything wanted runs, once, under one leader"
    CAPACITY = "no node is given more than it has"
    NO_SPINNING = "deadlines move forward"


class Bug(StrEnum):
    """Safeguards that a test may take away, to see that an invariant notices."""

    LONG_FENCE = "the right to answer outlasts the time to be declared down"
    TRUSTS_REFUSED_LEASE = "the election ignores that its write was refused"
    KEEPS_EPOCH = "the planner does not raise the epoch"
    BLIND_WRITES = "the executor writes without expecting a revision"
    SKIPS_EPOCH_CHECK = "a claim does not look at the epoch that is stored"
    ECHOES_FOR_EVER = "a leader echoes however old its last renewal is"
    RETURNS_AS_BEFORE = "a node that was declared down goes on without a new life"
    STOP_MISSES_CLAIM = "a stop order does not end a claim in flight"
    ECHOES_UNHEARD = "a leader echoes although it was cut off since its last renewal"
    JUDGES_UNHEARD = "a node that is cut off judges the others by their silence"
    ECHOES_AFTER_A_DROP = "a leader echoes although its connection dropped since its last renewal"
    TRUSTS_OLD_VERDICTS = "a node acts on its old verdict about one who has been heard since"
    LEADS_WHEN_OVER = "a node whose life is over leads on until it has a new one"
    RENEWS_UNSEEN = "a renewed lease is no sign of life of its holder"
    RESTORES_UNREAD = "a right that had lapsed comes back without a look at the records"
    LATE_MOVES = "who is late to start is placed elsewhere while its node may run it after all"
    NO_PATIENCE = "a node is declared down when one heartbeat is late"
    OVERBOOKS = "the planner does not look at what a node has left"
    SPINS = "the reconciler comes back at once after each pass"


class Failure(StrEnum):
    """Why a request to the store has no answer."""

    STALE = "stale"
    UNKNOWN = "unknown"
    FAILED = "failed"


class ViolationError(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: Invariant, at: float, text: str) -> None:
        super().__init__(f"at {at:.3f} s: {invariant.value}: {text}")
        self.invariant = invariant
        self.at = at


@dataclass(frozen=True, slots=True)
class StateValue:
    """What an agent's state record says of its writer."""

    epoch: int
    writer: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a bucket; *value* None: deleted or expired."""

    key: str
    value: Any
    revision: int


@dataclass(slots=True)
class Bucket:
    """Compare-and-set registers with one sequence of revisions."""

    name: str
    entries: dict[str, Entry] = field(default_factory=dict)
    before: dict[str, Entry] = field(default_factory=dict)
    """The entry before the last one, as a replica that lags would show it."""
    last: int = 0

    def revision(self, key: str) -> int:
        """The revision of *key*; 0: never written."""
        entry = self.entries.get(key)
        return 0 if entry is None else entry.revision

    def since(self, revision: int) -> list[Entry]:
        """What changed after *revision*, in order; of each key the last."""
        found = [entry for entry in self.entries.values() if entry.revision > revision]
        found.sort(key=lambda entry: entry.revision)
        return found


@dataclass(slots=True)
class Report:
    """What a run was like."""

    events: int = 0
    simulated_s: float = 0.0
    leaders: int = 0
    leaders_at_once: int = 0
    downs: int = 0
    assignments: int = 0
    claims: int = 0
    passes: int = 0
    over_capacity: list[str] = field(default_factory=list)
    """Records that gave a node more than it has; text."""
    converged_after_s: float = 0.0


class World:
    """One run of one story."""

    def __init__(
        self,
        story: Story,
        *,
        missing: frozenset[Bug] = frozenset(),
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.story = story
        self.missing = missing
        self.trace = trace
        self.rng = Random(f"run {story.seed}")
        self.weather = Weather(story)
        self.now = 0.0
        self.clock = 0.0
        self.report = Report()
        self.buckets = {
            name: Bucket(name) for name in ("leases", "nodes", "agents", "desired", "state")
        }
        self.nodes: dict[str, Node] = {}
        self.capacity = {"slots": float(story.slots)}
        self.activations: dict[str, list[Activation]] = {}
        """Every activation that was not ended, by agent."""
        self._heap: list[tuple[float, int, Node | None, bool, Callable[..., None], Any]] = []
        self._count = 0
        self._epochs: dict[str, int] = {}
        self._committers: dict[tuple[str, int], tuple[str, int]] = {}
        self._assigned: dict[tuple[str, int], tuple[str | None, int]] = {}
        self._terms: dict[int, tuple[str, int]] = {}
        self._wishes = {wish.name: self._deployment(wish) for wish in story.wishes}
        self._versions = 0
        self._two_leaders = False

    # ---- time ---------------------------------------------------------------------

    def run(self) -> Report:
        """Tell the story.

        Raises:
            ViolationError: an invariant does not hold.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validity, "monotonic", self._monotonic)
            try:
                return self._run()
            finally:
                end_all()

    def _monotonic(self) -> float:
        return self.clock

    def _run(self) -> Report:
        for name, deployment in self._wishes.items():
            self.write("desired", name, deployment, 0)
        for name in self.story.names:
            self.at(self.rng.uniform(0.0, 0.5), self._begin, name)
        for fault in self.story.faults:
            self.at(fault.at, self._befall, fault)
        good_since: float | None = None
        end = self.story.until + HEAL_S
        while self.now < end:
            self._advance(self.now + _SLICE_S)
            if self.now < self.story.until:
                continue
            wrong = self.unfinished()
            if wrong is not None:
                good_since = None
            elif good_since is None:
                good_since = self.now
                self.report.converged_after_s = self.now - self.story.until
            elif self.now - good_since >= QUIET_S:
                break
        else:
            self.violated(Invariant.CONVERGES, wrong or "it does not stay so")
        self.report.events = self._count
        self.report.simulated_s = self.now
        self.report.passes = sum(node.passes for node in self.nodes.values())
        return self.report

    def _advance(self, until: float) -> None:
        heap = self._heap
        for known in self.nodes.values():
            known.steps = 0
        while heap and heap[0][0] <= until:
            at, _, node, is_timer, action, args = heapq.heappop(heap)
            self.now = at
            if node is None:
                action(*args)
            else:
                self.deliver(node, is_timer, action, args)
        self.now = until

    def deliver(self, node: Node, is_timer: bool, action: Callable[..., None], args: Any) -> None:
        """Let *node* do something now, unless it is dead or stands still."""
        if node.is_dead:
            return
        if node.is_frozen:
            node.waiting.append((is_timer, action, args))
            return
        node.steps += 1
        if node.steps > STEPS_PER_S_MAX:
            self.violated(Invariant.NO_SPINNING, f"{node.name} took {node.steps} steps in a second")
        self.clock = self.now + node.offset
        action(*args)

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        """Do it at a true time."""
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, None, True, action, args))

    def timer(self, node: Node, delay: float, action: Callable[..., None], *args: Any) -> None:
        """Let *node* do it later."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay, self._count, node, True, action, args))

    def arrive(self, node: Node, time: float, action: Callable[..., None], *args: Any) -> None:
        """Let something arrive at *node* at a true time."""
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, node, False, action, args))

    def say(self, text: str) -> None:
        """For people who look at one run."""
        if self.trace is not None:
            self.trace(f"{self.now:8.3f}  {text}")

    # ---- core messages ---------------------------------------------------------------

    def is_lost(self) -> bool:
        """Whether a core message that is sent now gets lost on its way to the bus."""
        loss = self.weather.loss(self.now)
        return loss > 0 and self.rng.random() < loss

    def send(self, source: Node, target: Node, action: Callable[..., None], *args: Any) -> None:
        """A core message that is not lost, unless a link is cut."""
        if not (source.is_connected and source.has_interest):
            return
        rng, weather = self.rng, self.weather
        sent = self.now + 0.001 + rng.random() * weather.late_s(self.now)
        arrives = weather.core(source.name, target.name, sent, rng)
        if arrives == LOST:
            return
        self.arrive(target, arrives, self._received, target, action, args)
        if self.story.repeats and rng.random() < self.story.repeats:
            again = arrives + rng.random() * _REPEAT_LATE_S
            self.arrive(target, again, self._received, target, action, args)

    def _received(self, target: Node, action: Callable[..., None], args: Any) -> None:
        if target.is_connected and target.has_interest:
            action(*args)

    def ping(self, source: str, target: str) -> int | None:
        """Call a node's manager: its incarnation, 0 (nobody listens) or None (no answer)."""
        weather, rng, now = self.weather, self.rng, self.now
        if weather.is_cut(source, now) or rng.random() < 2 * weather.loss(now):
            return None
        node = self.nodes.get(target)
        if node is None or not node.has_interest or weather.is_dropped(target, now):
            return 0
        there = weather.core(source, target, now, rng)
        back = weather.core(target, source, now, rng)
        if node.is_frozen or node.is_dead or there > now:
            return None
        node.note_ping(source)
        if back > now:
            return None
        return node.incarnation

    # ---- the store -------------------------------------------------------------------

    def ask(
        self, node: Node, operation: Callable[[], T], on_answer: Callable[[T | Failure], None]
    ) -> None:
        """A request to the store: carried out later or never, answered later or never."""
        rng, weather, began = self.rng, self.weather, self.now
        if not node.is_connected:
            self.timer(node, 0.001, on_answer, Failure.FAILED)
            return
        connection = node.connection
        late = weather.late_s(began) if weather.late_s(began) >= 1.0 else _KV_LATE_S
        loss = self.story.kv_loss if began < self.story.until else 0.0
        done = weather.out(node.name, began + 0.001 + rng.random() * late, rng)
        if not node.has_interest or (loss and rng.random() < loss):
            done = LOST
        if done != LOST and (goes_on := weather.stalled_until(done)) is not None:
            done = LOST if rng.random() < 0.5 else goes_on + rng.uniform(0.0, 0.1)
        answered = LOST
        if done != LOST and not (loss and rng.random() < loss):
            answered = weather.into(node.name, done + 0.001 + rng.random() * late, rng)
        box: list[T] = []
        if done != LOST:
            self.at(done, lambda: box.append(operation()))
        if answered - began <= REQUEST_TIMEOUT_S:

            def answer() -> None:
                # What was in flight when the connection dropped has an unknown outcome.
                on_answer(box[0] if node.connection == connection else Failure.UNKNOWN)

            self.arrive(node, answered, answer)
        else:
            self.timer(node, REQUEST_TIMEOUT_S, on_answer, Failure.UNKNOWN)

    def write(
        self,
        bucket: str,
        key: str,
        value: Any,
        expected: int | None,
        *,
        ttl_s: float | None = None,
        by: Node | None = None,
    ) -> int | Failure:
        """Carry out a write at the store; *expected* None: whatever is there."""
        held = self.buckets[bucket]
        entry = held.entries.get(key)
        if expected is not None and expected != (0 if entry is None else entry.revision):
            return Failure.STALE
        held.last += 1
        if entry is not None:
            held.before[key] = entry
        held.entries[key] = Entry(key, value, held.last)
        if bucket == "agents":
            self._check_record(key, value, by)
        elif bucket == "state":
            self._check_commit(key, value, entry)
        if ttl_s is not None and value is not None:
            self.at(self.now + ttl_s, self._expire, bucket, key, held.last)
        if bucket != "state":
            self._tell_watchers(bucket)
        return held.last

    def _expire(self, bucket: str, key: str, revision: int) -> None:
        if self.buckets[bucket].revision(key) != revision:
            return
        goes_on = self.weather.stalled_until(self.now)
        if goes_on is not None:
            self.at(goes_on + 0.01, self._expire, bucket, key, revision)
            return
        self.say(f"{bucket}/{key} has expired")
        self.write(bucket, key, None, revision)

    def _tell_watchers(self, bucket: str) -> None:
        late = self.rng.random() * self.story.watch_late_s
        for node in self.nodes.values():
            if bucket in node.cursors and bucket not in node.pumps:
                node.pumps.add(bucket)
                self.at(self.now + 0.001 + late, self._pump, node, bucket)

    def _pump(self, node: Node, bucket: str) -> None:
        if node.is_dead:
            return
        if not (node.is_connected and node.has_interest) or self.weather.is_cut(
            node.name, self.now
        ):
            self.at(self.now + 0.5, self._pump, node, bucket)
            return
        node.pumps.discard(bucket)
        found = self.buckets[bucket].since(node.cursors[bucket])
        if found:
            node.cursors[bucket] = found[-1].revision
            self.deliver(node, False, node.on_entries, (bucket, found))

    # ---- what befalls ------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        from tests.simulation.node import Node

        if name in self.nodes and not self.nodes[name].is_dead:
            return
        offset = float(self.rng.randrange(0, 4096))
        node = self.nodes[name] = Node(self, name, offset)
        self.say(f"{name} begins")
        self.deliver(node, True, node.begin, ())

    def begin_later(self, name: str, delay: float) -> None:
        """Let a node come back."""
        self.at(self.now + delay, self._begin, name)

    def _befall(self, fault: Fault) -> None:
        self.say(f"*** {fault.text()}")
        node = self.nodes.get(fault.node)
        if fault.kind in LASTING:
            self.at(fault.end, self.say, f"*** {fault.kind} {fault.node} is over")
        match fault.kind:
            case Kind.STALL:
                self.at(fault.end, self._advise)
            case Kind.WISH:
                self._wish(fault)
            case _ if node is None or node.is_dead:
                pass
            case Kind.CRASH:
                node.die(silently=fault.how == "silent")
                self.begin_later(fault.node, fault.length)
            case Kind.FREEZE:
                node.freezes += 1
                self.at(fault.end, self._thaw, node)
            case Kind.RESET:
                node.has_interest = False
                self.deliver(node, False, node.disconnected, ())
            case Kind.CUT:
                notice = self.weather.notice_s(fault)
                if fault.length > notice:
                    self.timer(node, notice, node.disconnected)
            case Kind.DRAIN:
                self.deliver(node, False, node.drain, (fault.end,))
            case Kind.WORKER:
                self.deliver(node, False, node.worker_dies, ())
            case Kind.LOSSY | Kind.SLOW | Kind.PAIR:
                pass

    def _thaw(self, node: Node) -> None:
        node.freezes -= 1
        if node.is_dead or node.is_frozen:
            return
        waiting, node.waiting = node.waiting, []
        # One event loop reads its sockets first, another its timers.
        timers_first = self.rng.random() < 0.5
        waiting.sort(key=lambda item: item[0] is not timers_first)
        for is_timer, action, args in waiting:
            self.deliver(node, is_timer, action, args)
        node.steps = 0
        if not node.is_dead:
            self.check_answers(node)

    def _advise(self) -> None:
        """A stream has a new leader: everybody hears of it."""
        for node in list(self.nodes.values()):
            if node.has_interest and not node.is_dead:
                arrives = self.weather.into(node.name, self.now + 0.01, self.rng)
                if arrives != LOST:
                    self.arrive(node, arrives, node.disturb)

    def _deployment(self, wish: Wish, version: int = 0, replicas: int | None = None) -> Deployment:
        return Deployment(
            name=wish.name,
            spec=AgentSpec(
                run="simulated:Agent",
                critical=wish.critical,
                placement=PlacementPolicy(strategy=wish.strategy),
                on_node_loss=None if wish.policy is None else OnNodeLoss(wish.policy),
                config={"version": version} if version else {},
            ),
            replicas=wish.replicas if replicas is None else replicas,
        )

    def _wish(self, fault: Fault) -> None:
        wish = next(item for item in self.story.wishes if item.name == fault.node)
        what, _, number = fault.how.partition(" ")
        deployment: Deployment | None
        match what:
            case "delete":
                deployment = None
                self._wishes.pop(wish.name, None)
            case "change":
                self._versions += 1
                deployment = self._deployment(wish, self._versions)
            case "scale":
                deployment = self._deployment(wish, replicas=int(number))
            case _:
                deployment = self._deployment(wish)
        if deployment is not None:
            self._wishes[wish.name] = deployment
        self.write("desired", wish.name, deployment, None)

    # ---- what must hold ------------------------------------------------------------------

    def violated(self, invariant: Invariant, text: str) -> None:
        """Say that an invariant does not hold.

        Raises:
            ViolationError
        """
        raise ViolationError(invariant, self.now, text)

    def stands_still(self, node: Node, what: str) -> None:
        """A machine wants to be called again before time has passed."""
        self.violated(Invariant.NO_SPINNING, f"{what} on {node.name} does not move on")

    def became_leader(self, node: Node, term: int) -> None:
        """Somebody leads."""
        self.report.leaders += 1
        who = (node.name, node.candidate.incarnation)
        first = self._terms.setdefault(term, who)
        if first != who:
            self.violated(
                Invariant.ONE_LEADER_PER_TERM, f"{first} and {who} both lead in term {term}"
            )
        leaders = [other for other in self.nodes.values() if other.is_leader and not other.is_dead]
        self.report.leaders_at_once = max(self.report.leaders_at_once, len(leaders))
        if len(leaders) > 1:
            self._two_leaders = True

    def _check_record(
        self,
        agent: str,
        record: AgentRecord | None,
        by: Node | None,
    ) -> None:
        if record is None:
            self.say(f"record {agent} deleted by {by.name if by else '?'}")
            return
        if self.trace is not None:
            self.say(
                f"record {agent}: {record.status} on {record.node}/{record.incarnation} epoch "
                f"{record.epoch} {record.desired} by {by.name if by else '?'} {record.reason or ''}"
            )
        before = self._epochs.get(agent, 0)
        if record.epoch < before:
            self.violated(
                Invariant.EPOCHS_GROW, f"{agent} had epoch {before}, its record {record.epoch}"
            )
        self._epochs[agent] = record.epoch
        if record.status is not AgentStatus.STARTING or record.node is None:
            return
        self.report.assignments += 1
        who = (record.node, record.incarnation)
        first = self._assigned.setdefault((agent, record.epoch), who)
        if first != who:
            self.violated(
                Invariant.ONE_NODE_PER_EPOCH,
                f"{agent} is assigned to {first} and to {who} under epoch {record.epoch}",
            )
        self._check_capacity(record.node, record.incarnation)

    def _check_capacity(self, node: str, incarnation: int) -> None:
        slots = 0.0
        for entry in self.buckets["agents"].entries.values():
            record = entry.value
            if (
                record is not None
                and record.node == node
                and record.incarnation == incarnation
                and record.status in ACTIVE
            ):
                slots += needs(record.spec)["slots"]
        if slots > self.capacity["slots"]:
            text = f"{node} is given {slots:g} slots of {self.capacity['slots']:g}"
            if not self._two_leaders:
                self.violated(Invariant.CAPACITY, text)
            # Two leaders may each give the same room away; the node itself refuses one of them.
            self.report.over_capacity.append(f"{self.now:.3f}: {text}")

    def _check_commit(self, agent: str, value: StateValue, before: Entry | None) -> None:
        if before is not None and before.value.epoch > value.epoch:
            self.violated(
                Invariant.EPOCHS_GROW,
                f"the state of {agent} was at epoch {before.value.epoch}, and {value.writer} "
                f"wrote it under {value.epoch}",
            )
        first = self._committers.setdefault((agent, value.epoch), value.writer)
        if first != value.writer:
            self.violated(
                Invariant.ONE_NODE_PER_EPOCH,
                f"{first} and {value.writer} both commit {agent} under epoch {value.epoch}",
            )

    def may_answer(self, activation: Activation) -> bool:
        """Whether a caller could get an answer from it now, by true time."""
        node = activation.node
        if node.is_dead or node.is_frozen or activation.is_ended:
            return False
        return node.is_connected and node.remaining_s() > 0

    def check_answers(self, node: Node) -> None:
        """Look for activations that may answer besides those of *node*."""
        for agent, known in self.activations.items():
            if len(known) > 1 and any(item.node is node for item in known):
                able = [item for item in known if self.may_answer(item)]
                if len(able) < 2:
                    continue
                self.violated(
                    Invariant.ONE_ANSWERS,
                    f"{agent} on "
                    + " and ".join(
                        f"{item.node.name}/{item.incarnation} (epoch {item.epoch}, right for "
                        f"{item.node.remaining_s():.2f} s)"
                        for item in able
                    ),
                )

    def check_verdict(self, observer: Node, about: str, incarnation: int, cause: str) -> None:
        """Somebody declared a node down."""
        self.report.downs += 1
        node = self.nodes[about]
        if node.incarnation != incarnation or self.now < node.opened_at:
            return  # that life is over, or has not begun
        if self.weather.was_disturbed(about, self.now):
            return
        if not self.weather.was_disturbed(observer.name, self.now):
            self.violated(
                Invariant.NO_SLANDER, f"{observer.name} declares {about} down for {cause}"
            )

    def unfinished(self) -> str | None:
        """What is not yet as it should be; None: all is."""
        leaders = [node.name for node in self.nodes.values() if node.is_leader and not node.is_dead]
        if len(leaders) != 1:
            return f"leaders: {leaders}"
        wanted = {
            agent: wish.spec.digest()
            for wish in self._wishes.values()
            for agent in wish.agent_ids()
        }
        held = {
            key: entry.value
            for key, entry in self.buckets["agents"].entries.items()
            if entry.value is not None
        }
        if left := held.keys() - wanted.keys():
            return f"records that nobody wants: {sorted(left)}"
        for agent, digest in wanted.items():
            record = held.get(agent)
            if record is None or record.status is not AgentStatus.RUNNING:
                status = None if record is None else f"{record.status} ({record.reason})"
                return f"{agent} does not run: {status}"
            if record.digest != digest or record.desired != "run":
                return f"{agent} runs another spec than wished"
        for agent, known in self.activations.items():
            alive = [item for item in known if not item.is_ended and not item.node.is_dead]
            if agent not in wanted:
                if alive:
                    return f"{agent} is wanted by nobody and lives on {_where(alive)}"
                continue
            record = held[agent]
            if [(item.node.name, item.epoch) for item in alive] != [(record.node, record.epoch)]:
                return (
                    f"{agent} is to run on {record.node} under epoch {record.epoch} and lives on "
                    f"{_where(alive) or 'no node'}"
                )
            if not self.may_answer(alive[0]):
                return f"{agent} may not answer"
        commands = self.nodes[leaders[0]].planned()
        return f"{leaders[0]} still wants {commands}" if commands else None


def _where(activations: list[Activation]) -> str:
    return ", ".join(f"{item.node.name} (epoch {item.epoch})" for item in activations)


def run(
    story: Story,
    *,
    missing: frozenset[Bug] = frozenset(),
    trace: Callable[[str], None] | None = None,
) -> Report:
    """Tell one story.

    Raises:
        ViolationError: an invariant does not hold.
    """
    return World(story, missing=missing, trace=trace).run()


def broken(story: Story, *, missing: frozenset[Bug] = frozenset()) -> ViolationError | None:
    """The invariant that the story breaks; None if all hold."""
    try:
        run(story, missing=missing)
    except ViolationError as error:
        return error
    return None
