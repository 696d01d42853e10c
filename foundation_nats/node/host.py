"""The agents of one node: makes the workers hold what the registry says this node holds.

Level-triggered: an assignment is a record that names this node and this
incarnation with status ``starting``; whatever else happens, the workers are
made to match the records, and what workers report is written back by
compare-and-set. A record that has moved on (a newer epoch, another node) wins
over any report. The node itself refuses what would exceed its declared
capacity, whoever assigned it (P5): what touches that starts only once `admission`
has written it into the node's ledger.

Orders to a worker may be lost with it, or overtake each other. So they are
given one after the other, repeated until they are taken, and every few seconds
a worker's fingerprint is compared with what it should hold; where they differ
for long, the worker is asked what it really has, and told what to change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.ledger import SLOTS, lacking
from foundation_nats.cluster.registry import Change, Held, Registry
from foundation_nats.control.moves import MOVED, handed_over
from foundation_nats.control.planner import QUARANTINED
from foundation_nats.control.restarts import restarted, too_many
from foundation_nats.errors import BusError, FoundationError, StaleRevisionError
from foundation_nats.node.admission import Admission
from foundation_nats.node.blackbox import STARTING, Suspect
from foundation_nats.node.hosting import mark
from foundation_nats.node.trimmer import Trimmer
from foundation_nats.node.workers import RELOADED, Workers
from foundation_schemas import (
    AgentRecord,
    AgentReport,
    AgentStatus,
    InspectReply,
    Load,
    RecoveredFrom,
    StartRequest,
    StopRequest,
    WorkerReport,
)

_LIVES = (AgentStatus.RUNNING, AgentStatus.HIBERNATED)
_CHUNK = 200
_RETRY_S = 0.2
_AUDIT_EVERY_S = 3.0
_ORDER_TIMEOUT_S = 5.0
_NAMED_MAX = 50
_REFUSE_AGAIN_S = 1.0
"""A leader whose view is behind may assign here again and again what has no room."""

Emit = Callable[..., None]


@dataclass(slots=True)
class Placed:
    """An agent that this node holds."""

    worker: str
    epoch: int
    record: AgentRecord
    told: bool = False
    """The order to start it is on its way to its worker, or there."""


def needs(record: AgentRecord) -> dict[str, float]:
    """What an agent takes of its node's capacity."""
    return {SLOTS: 1.0, **record.spec.resources}


class Host:
    """Matches workers to records, and records to reports."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        registry: Registry,
        workers: Workers,
        trimmer: Trimmer,
        *,
        node: str,
        capacity: dict[str, float],
        emit: Emit,
        retry_s: Callable[[int], float | None] = lambda _: None,
    ) -> None:
        """*retry_s* tells after how long the leader tries again what failed so often; for people."""
        self._bus = bus
        self._subjects = subjects
        self._registry = registry
        self._workers = workers
        self._trimmer = trimmer
        self._node = node
        self._capacity = capacity
        self._emit = emit
        self._retry_s = retry_s
        self._incarnation = 0
        self._placed: dict[str, Placed] = {}
        self._counts: dict[str, int] = {}
        self._admission = Admission(
            bus,
            subjects,
            node=node,
            capacity=capacity,
            on_admitted=self._look_again,
            on_refused=self._on_refused,
            on_dropped=self._on_dropped,
        )
        self._reports: dict[str, AgentReport] = {}
        self._touched: set[str] = set()
        self._refused: dict[str, Change] = {}
        """Assignments that exceed what this node has, and what to make of their records."""
        self._refused_at: dict[str, float] = {}
        self._woken: set[str] = set()
        """Whose report that they run is about waking up."""
        self._lost: dict[str, str] = {}
        """Agents whose worker died: id to the worker."""
        self._reloading: dict[str, set[str]] = {}
        """Workers that end to go on with new code: worker to the agents it has put down."""
        self._reloaded: set[str] = set()
        """Agents, of those in `_lost`, whose worker ended so."""
        self._suspects: dict[str, tuple[int, str]] = {}
        """Agents whose handler ended its worker: id to (sequence of the signal, how it ended)."""
        self._loads: dict[str, Load] = {}
        self._figures: dict[str, tuple[dict[str, int], dict[str, str]]] = {}
        self._unstopped: dict[str, dict[str, int]] = {}
        """Worker to agents that it may still hold and must not (id to epoch)."""
        self._orders: dict[str, asyncio.Lock] = {}
        self._ordering: dict[str, set[asyncio.Task[None]]] = {}
        self._expected: dict[str, int] = {}
        """Worker to the fingerprint of what is placed on it."""
        self._seen: dict[str, int] = {}
        """Worker to the fingerprint that it reported last."""
        self._doubted: dict[str, tuple[int, int]] = {}
        """Worker to (expected, seen) at the last audit, where they differed."""
        self._scope: TaskScope | None = None
        self._wake = asyncio.Event()
        self._write = asyncio.Event()
        self._draining: str | None = None
        self._log = get_logger("host").bind(node=node)

    def open(self, scope: TaskScope, incarnation: int) -> None:
        """Begin to follow the registry."""
        self._incarnation = incarnation
        self._scope = scope
        self._counts = dict.fromkeys(self._workers.ids, 0)
        self._expected = dict.fromkeys(self._workers.ids, 0)
        self._orders = {worker: asyncio.Lock() for worker in self._workers.ids}
        self._registry.subscribe(self._on_change)
        self._admission.open(scope, incarnation)
        self._touch_mine()
        subject = self._subjects.control_node(self._node, "report")
        rpc.serve(self._bus, scope, subject, self._on_report)
        scope.start(self._run(), "host")
        scope.start(self._run_writes(), "host.writes")
        scope.start(self._audit_loop(), "audit")

    def _touch_mine(self) -> None:
        self._touched.update(held.record.id for held in self._registry.on_node(self._node))
        self._wake.set()

    # ---- what the outside sees ----------------------------------------------------

    def agents(self) -> dict[str, int]:
        """Id to epoch of what this node holds."""
        return {agent: placed.epoch for agent, placed in self._placed.items()}

    def leaving(self) -> tuple[int, int]:
        """How many agents this node holds, and how many of them are on their way elsewhere."""
        held = (self._registry.get(agent) for agent in self._placed)
        moving = sum(item is not None and item.record.move is not None for item in held)
        return len(self._placed) + len(self._reports), moving + len(self._reports)

    def load(self) -> Load:
        """The sum over the workers."""
        loads = [self._loads[worker] for worker in self._workers.ids if worker in self._loads]
        return Load(
            agents=len(self._placed),
            backlog=sum(load.backlog for load in loads),
            lag_ms=max((load.lag_ms for load in loads), default=0.0),
        )

    def figures(self) -> dict[str, tuple[dict[str, int], dict[str, str]]]:
        """Worker to its counters and its breakers, as it last said."""
        return {id: self._figures[id] for id in self._workers.ids if id in self._figures}

    def statuses(self) -> dict[str, int]:
        """How many of this node's agents are in which condition."""
        found: dict[str, int] = {}
        for agent in list(self._placed):
            held = self._registry.get(agent)
            if held is not None and held.record.node == self._node:
                record = held.record
                status = str(AgentStatus.HIBERNATED if record.hibernates else record.status)
                found[status] = found.get(status, 0) + 1
        return found

    # ---- events -------------------------------------------------------------------

    def _on_change(self, agent: str, held: Held | None) -> None:
        if (held is not None and held.record.node == self._node) or agent in self._placed:
            self._touched.add(agent)
            self._wake.set()

    async def _on_report(self, data: bytes) -> None:
        report = rpc.decode(WorkerReport, data)
        if report.incarnation != self._incarnation:
            return
        self._workers.heard(report.worker)
        self._loads[report.worker] = report.load
        self._figures[report.worker] = report.counters, report.breakers
        self._seen[report.worker] = report.fingerprint
        forgetful = [
            agent
            for agent in report.consumed
            if agent in self._placed and not self._placed[agent].record.spec.durable
        ]
        self._trimmer.note(report.consumed, prompt=forgetful)
        for change in report.changes:
            if change.reason == RELOADED and report.worker in self._reloading:
                self._reloading[report.worker].add(change.id)
                continue  # it stays here: its record is written when its worker is gone
            known = self._reports.get(change.id)
            if known is None or known.epoch <= change.epoch:
                self._reports[change.id] = change
        if report.changes:
            self._wake.set()

    def worker_ready(self, worker: str) -> None:
        """A worker takes orders now."""
        self._touched.update(
            agent for agent, placed in self._placed.items() if placed.worker == worker
        )
        self._touch_mine()

    def worker_died(
        self, worker: str, cause: str, suspect: Suspect | None, stack: str = ""
    ) -> None:
        """A worker is gone, and with it the activations in it; *suspect* was running."""
        lost = [agent for agent, placed in self._placed.items() if placed.worker == worker]
        self._forget_worker(worker)
        self._lost.update((agent, worker) for agent in lost)
        self._wake.set()
        if cause == RELOADED and self._reloading.pop(worker, None) is not None:
            self._reloaded.update(lost)
            text = f"Worker {worker} goes on with new code, with {len(lost)} agents."
            self._emit(
                "worker",
                RELOADED,
                text,
                node=self._node,
                worker=worker,
                agents=len(lost),
                lost=lost[:_NAMED_MAX],
            )
            return
        blame = ""
        if suspect is not None and suspect.agent in lost:
            self._suspects[suspect.agent] = (suspect.sequence, cause)
            blame = f" while {suspect.agent} was handling a signal"
        self._emit(
            "worker",
            "died",
            f"Worker {worker} ended ({cause}){blame} with {len(lost)} agents; they are restarted.",
            node=self._node,
            worker=worker,
            cause=cause,
            suspect=None if suspect is None else suspect.agent,
            sequence=None if suspect is None else suspect.sequence,
            agents=len(lost),
            lost=lost[:_NAMED_MAX],
            **({"stack": stack} if stack else {}),
        )

    def _forget_worker(self, worker: str) -> None:
        """What was on its way to a dead process is lost, and so is what it had."""
        self._loads.pop(worker, None)
        self._figures.pop(worker, None)
        self._seen.pop(worker, None)
        self._doubted.pop(worker, None)
        self._unstopped.pop(worker, None)
        for task in self._ordering.pop(worker, ()):
            task.cancel()
        for placed in self._placed.values():
            if placed.worker == worker:
                placed.told = False

    def new_incarnation(self, incarnation: int) -> None:
        """This node was declared down and begins a new life: it holds nothing any more."""
        self._incarnation = incarnation
        for worker in self._workers.ids:
            self._forget_worker(worker)
        for agent in list(self._placed):
            self._unplace(agent)
        self._reports.clear()
        self._refused.clear()
        self._lost.clear()
        self._reloading.clear()
        self._reloaded.clear()
        self._suspects.clear()
        self._admission.begin(incarnation)
        self._touch_mine()

    # ---- the loops ----------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(0.001)  # gather what changes together
            self._wake.clear()
            self._take_in()
            self._match()
            if self._lost or self._reports or self._refused:
                self._write.set()

    async def _run_writes(self) -> None:
        """Apart from `_run`: a store that stands still must not keep orders from workers."""
        while True:
            await self._write.wait()
            self._write.clear()
            try:
                await self._reclaim_lost()
                await self._write_reports()
                await self._write_refusals()
            except BusError as error:
                self._log.info("records will be written later", error=str(error))
                await asyncio.sleep(_RETRY_S)
                self._touch_mine()

    def _take_in(self) -> None:
        """What has ended, by its worker's report, is held no more."""
        for agent, report in self._reports.items():
            placed = self._placed.get(agent)
            if report.status not in _LIVES and (
                placed is not None and placed.epoch == report.epoch
            ):
                self._unplace(agent)

    async def _reclaim_lost(self) -> None:
        """Give agents of a dead worker their next epoch, here."""
        if not self._lost:
            return
        changes = []
        for agent in list(self._lost):
            held = self._registry.get(agent)
            placed = self._placed.get(agent)
            if (
                held is None
                or placed is None
                or held.record.node != self._node
                or held.record.epoch != placed.epoch
                or held.record.desired != "run"
                or held.record.status is AgentStatus.FAILED  # it has a back-off to wait for
            ):
                self._lost.pop(agent)
                self._reloaded.discard(agent)
                self._suspects.pop(agent, None)
                self._unplace(agent)
                self._touched.add(agent)
                self._wake.set()
                continue
            changes.append(Change(agent, self._next_life(held.record), held.revision))
        results = await self._registry.write_many(changes)
        retry = False
        for change, result in zip(changes, results, strict=True):
            if isinstance(result, FoundationError):
                retry = True
            else:
                self._lost.pop(change.id, None)
                self._reloaded.discard(change.id)
                self._suspects.pop(change.id, None)
                if change.record is not None and change.record.status is AgentStatus.FAILED:
                    self._unplace(change.id)  # it ended with its worker
                self._touched.add(change.id)
                self._wake.set()
        if retry:
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    def _next_life(self, record: AgentRecord) -> AgentRecord:
        """The record under which an agent whose worker died starts again, or does not."""
        sequence, cause = self._suspects.get(record.id, (0, ""))
        if sequence == STARTING:
            # Starting it again at once would end the next worker, too.
            return record.model_copy(
                update={
                    "status": AgentStatus.FAILED,
                    "reason": f"its on_start ended the worker process ({cause})",
                    "failures": record.failures + 1,
                    "since": utc_text(),
                }
            )
        is_reloaded = record.id in self._reloaded
        # What another agent, or somebody outside, has done to the worker is not its failure.
        is_blamed = record.id in self._suspects
        times = restarted(record, utc_text()) if is_blamed else record.restarts
        why = f"its worker process ended ({cause})" if cause else "its worker process ended"
        if not is_reloaded and record.spec.restart == "temporary" and not record.spec.critical:
            times, why = None, f"{why}, and restart is temporary"
        elif times is None:
            why = f"{QUARANTINED} after {too_many(record.spec.restart_limit)}: {why}"
        if times is None:
            return record.model_copy(
                update={"status": AgentStatus.FAILED, "reason": why, "since": utc_text()}
            )
        origin = RecoveredFrom(
            node=self._node,
            epoch=record.epoch,
            reason=RELOADED if is_reloaded else "worker_died",
            sequence=sequence or None,
            cause=cause or None,
        )
        return record.model_copy(
            update={
                "status": AgentStatus.STARTING,
                "epoch": record.epoch + 1,
                "incarnation": self._incarnation,
                "reason": None,
                "recovered_from": origin,
                "restarts": times,
                "since": utc_text(),
            }
        )

    async def _write_reports(self) -> None:
        """Write what became of agents into their records."""
        if not self._reports:
            return
        changes: list[Change] = []
        reports: list[AgentReport] = []
        for agent, report in list(self._reports.items()):
            held = self._registry.get(agent)
            record = None if held is None else self._after(held.record, report)
            if held is None or record is None:
                del self._reports[agent]
                self._touched.add(agent)
                self._wake.set()
                continue
            changes.append(Change(agent, record, held.revision))
            reports.append(report)
        moving = any(change.record is not None and _goes(change.record) for change in changes)
        if moving:
            failpoint("move.before_handover")
        results = await self._registry.write_many(changes)
        if moving:
            failpoint("move.after_handover")
        retry = False
        for change, report, result in zip(changes, reports, results, strict=True):
            if isinstance(result, FoundationError):
                retry = True
                if not isinstance(result, StaleRevisionError):
                    self._log.info("record not written yet", agent=change.id, error=str(result))
                continue
            if self._reports.get(change.id) == report:
                del self._reports[change.id]
            self._announce(change)
        if retry:
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _write_refusals(self) -> None:
        refused, self._refused = self._refused, {}
        results = await self._registry.write_many(list(refused.values()))
        for agent, result in zip(refused, results, strict=True):
            if isinstance(result, FoundationError):
                self._touched.add(agent)
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    def _after(self, record: AgentRecord, report: AgentReport) -> AgentRecord | None:
        """The record that says what was reported; None: the report is no longer of interest."""
        if record.node != self._node or record.epoch != report.epoch:
            return None
        update: dict[str, object]
        match report.status:
            case AgentStatus.RUNNING | AgentStatus.HIBERNATED:
                asleep = report.status is AgentStatus.HIBERNATED
                runs = record.status is AgentStatus.RUNNING
                if record.desired != "run" or (runs and record.asleep == asleep):
                    return None
                update = {"status": AgentStatus.RUNNING, "reason": None, "failures": 0}
                update["asleep"] = asleep
                if runs and not asleep:
                    self._woken.add(record.id)
            case AgentStatus.FAILED:
                update = {
                    "status": AgentStatus.FAILED,
                    "reason": report.reason,
                    "failures": record.failures + 1,
                    "move": None,
                }
            case _ if report.reason == "fenced":
                return None
            case _ if record.move is not None and self._was_told(record, report):
                # Straight to the next node, by compare-and-set: a detour by the leader would
                # double the pause. What has changed meanwhile, the leader puts right.
                return handed_over(record, utc_text())
            case _ if record.move is not None:
                update = {"status": AgentStatus.STOPPED, "node": None, "reason": report.reason}
                update |= {"desired": "run", "move": None}
            case _ if record.desired == "stop":
                update = {"status": AgentStatus.STOPPED, "node": None, "reason": report.reason}
            case _ if self._draining is not None:
                update = {
                    "status": AgentStatus.PENDING,
                    "node": None,
                    "reason": self._draining,
                    "recovered_from": RecoveredFrom(
                        node=self._node, epoch=record.epoch, reason="moved"
                    ),
                }
            case _:
                update = {
                    "status": AgentStatus.STOPPED,
                    "node": None,
                    "reason": report.reason,
                    "recovered_from": RecoveredFrom(
                        node=self._node, epoch=record.epoch, reason="restarted"
                    ),
                }
        return record.model_copy(update={**update, "since": utc_text()})

    def _was_told(self, record: AgentRecord, report: AgentReport) -> bool:
        """Whether its end is our doing, and not its own wish that stands."""
        told = ("stopped", MOVED, self._draining)
        return report.reason in told or record.spec.restart == "permanent"

    def _announce(self, change: Change) -> None:
        record = change.record
        assert record is not None
        what = {
            AgentStatus.RUNNING: "started",
            AgentStatus.FAILED: "failed",
            AgentStatus.STOPPED: "stopped",
            AgentStatus.PENDING: "drained",
        }.get(record.status)
        if what == "started" and (record.asleep or record.id in self._woken):
            self._woken.discard(record.id)
            return  # it comes and goes with its signals, which is no news
        if what is None:
            return
        recovered = record.recovered_from
        retry_s = None
        if record.status is AgentStatus.FAILED and record.spec.restart != "temporary":
            retry_s = self._retry_s(record.failures)
        text = f"Agent {record.id} {what} on {self._node}"
        self._emit(
            "agent",
            what,
            f"{text}: {record.reason}" if record.reason else f"{text}.",
            agent=record.id,
            node=self._node,
            epoch=record.epoch,
            deployment=record.deployment,
            reason=record.reason,
            recovered_from=None if recovered is None else recovered.model_dump(),
            failures=record.failures,
            retry_s=retry_s,
        )

    def _match(self) -> None:
        """Make the workers hold what the records say."""
        touched, self._touched = self._touched, set()
        starts: dict[str, list[AgentRecord]] = {}
        stops, self._unstopped = self._unstopped, {}
        ready = [worker for worker in self._workers.ready() if worker not in self._reloading]
        for agent in touched:
            if agent in self._lost:
                continue
            held = self._registry.get(agent)
            placed = self._placed.get(agent)
            mine = (
                held is not None
                and held.record.node == self._node
                and held.record.incarnation == self._incarnation
            )
            if placed is not None and (
                held is None or not mine or held.record.epoch > placed.epoch
            ):
                if held is None or held.record.node != self._node:
                    stops.setdefault(placed.worker, {})[agent] = placed.epoch
                previous = placed.worker
                self._unplace(agent)
                placed = None
            else:
                previous = ""
            if placed is None and (held is None or not mine or not self._may_begin(held.record)):
                self._admission.leave(agent)
            if held is None or not mine or self._has_ended(held.record):
                continue
            if held.record.desired == "stop":
                if placed is not None and placed.worker in ready:
                    stops.setdefault(placed.worker, {})[agent] = placed.epoch
                elif held.record.status is not AgentStatus.STOPPED:
                    # No worker has it: at the next turn of the loop it is held no more.
                    self._reports[agent] = AgentReport(
                        id=agent,
                        epoch=held.record.epoch,
                        status=AgentStatus.STOPPED,
                        reason="stopped",
                    )
                    self._wake.set()
                continue
            if held.record.status is not AgentStatus.STARTING or self._draining is not None:
                continue
            if placed is None:
                needed = needs(held.record)
                shortage = lacking(needed, self._capacity)
                if shortage is not None:
                    self._refused[agent] = self._refusal(held, f"{self._node} {shortage}")
                    continue
                if not self._admission.may_start(agent, needed, held.record.spec.reservation):
                    continue  # until it is admitted or refused
                placed = self._place(held.record, previous)
            if not placed.told and placed.worker in ready:
                placed.told = True
                starts.setdefault(placed.worker, []).append(held.record)
        for worker in {*stops, *starts}.intersection(ready):  # others hold nothing
            self._order(worker, stops.get(worker, {}), starts.get(worker, []))

    def _has_ended(self, record: AgentRecord) -> bool:
        """Whether its end under this epoch was reported, and only its record doesn't say so yet."""
        report = self._reports.get(record.id)
        return report is not None and report.epoch == record.epoch and report.status not in _LIVES

    def _may_begin(self, record: AgentRecord) -> bool:
        """Whether a record that names this node and life wants an activation of it."""
        return (
            record.status is AgentStatus.STARTING
            and record.desired == "run"
            and self._draining is None
            and not self._has_ended(record)
        )

    def _look_again(self, agents: list[str]) -> None:
        self._touched.update(agents)
        self._wake.set()

    def _on_refused(self, reasons: dict[str, str]) -> None:
        now = monotonic()
        self._refused_at = {
            agent: at for agent, at in self._refused_at.items() if now - at < _REFUSE_AGAIN_S
        }
        again = self._refused_at.keys() & reasons.keys()
        if again:
            asyncio.get_running_loop().call_later(_REFUSE_AGAIN_S, self._look_again, list(again))
        for agent, why in reasons.items():
            if agent in again:
                continue  # it asks again then
            self._refused_at[agent] = now
            held = self._registry.get(agent)
            if (
                held is not None
                and held.record.node == self._node
                and held.record.incarnation == self._incarnation
                and self._may_begin(held.record)
            ):
                self._refused[agent] = self._refusal(held, f"{self._node} {why}")
        self._write.set()

    def _on_dropped(self, reservations: list[str]) -> None:
        self._emit(
            "resources",
            "dropped",
            f"{len(reservations)} reservation(s) on {self._node} have no room there any more.",
            node=self._node,
            reservations=reservations[:_NAMED_MAX],
        )

    def _refusal(self, held: Held, why: str) -> Change:
        return Change(
            held.record.id,
            held.record.model_copy(
                update={
                    "status": AgentStatus.PENDING,
                    "node": None,
                    "reason": why,
                    "since": utc_text(),
                }
            ),
            held.revision,
        )

    def _place(self, record: AgentRecord, previous: str) -> Placed:
        counts = self._counts
        worker = previous if previous in counts else min(counts, key=counts.__getitem__)
        placed = Placed(worker, record.epoch, record)
        self._placed[record.id] = placed
        counts[worker] += 1
        self._expected[worker] ^= mark(record.id, record.epoch)
        return placed

    def _unplace(self, agent: str) -> None:
        placed = self._placed.pop(agent, None)
        if placed is None:
            return
        self._counts[placed.worker] -= 1
        self._expected[placed.worker] ^= mark(agent, placed.epoch)
        self._trimmer.forget(agent)
        self._admission.leave(agent)

    def _order(self, worker: str, stops: dict[str, int], starts: list[AgentRecord]) -> None:
        """Send these orders after those that are on their way to the worker; doesn't wait."""
        assert self._scope is not None
        task = self._scope.start(self._give_orders(worker, stops, starts), f"orders.{worker}")
        tasks = self._ordering.setdefault(worker, set())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _give_orders(
        self, worker: str, stops: dict[str, int], starts: list[AgentRecord]
    ) -> None:
        async with self._orders[worker]:
            if stops:
                await self._tell_stop(worker, stops)
            if starts:
                await self._tell_start(worker, starts)

    async def _tell_start(self, worker: str, records: list[AgentRecord]) -> None:
        subject = self._subjects.control_worker(worker, "start")
        for start in range(0, len(records), _CHUNK):
            chunk = records[start : start + _CHUNK]
            request = StartRequest(incarnation=self._incarnation, agents=chunk)
            try:
                await rpc.tell(self._bus, subject, request, timeout=_ORDER_TIMEOUT_S)
            except FoundationError as error:
                self._log.info("worker not told to start yet", worker=worker, error=str(error))
                for record in chunk:
                    placed = self._placed.get(record.id)
                    if placed is not None and placed.epoch == record.epoch:
                        placed.told = False
                self._touched.update(record.id for record in chunk)
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    async def _tell_stop(self, worker: str, agents: dict[str, int]) -> None:
        subject = self._subjects.control_worker(worker, "stop")
        moving = {
            agent: epoch
            for agent, epoch in agents.items()
            if (held := self._registry.get(agent)) is not None and held.record.move is not None
        }
        others = {agent: epoch for agent, epoch in agents.items() if agent not in moving}
        try:
            for some, reason in ((moving, MOVED), (others, self._draining or "stopped")):
                if some:
                    request = StopRequest(agents=some, reason=reason, targets=self._targets(some))
                    await rpc.tell(self._bus, subject, request, timeout=_ORDER_TIMEOUT_S)
        except FoundationError as error:
            self._log.info("worker not told to stop yet", worker=worker, error=str(error))
            waiting = self._unstopped.setdefault(worker, {})
            for agent, epoch in agents.items():
                waiting[agent] = max(epoch, waiting.get(agent, 0))
            asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)

    def _targets(self, agents: Iterable[str]) -> dict[str, str]:
        """Where those of *agents* go that are moved to a node that is known."""
        orders = {
            agent: held.record.move
            for agent in agents
            if (held := self._registry.get(agent)) is not None
        }
        return {a: order.to for a, order in orders.items() if order is not None and order.to}

    # ---- audit --------------------------------------------------------------------

    async def _audit_loop(self) -> None:
        """Find and mend what workers hold otherwise than they should, however it came about."""
        while True:
            await asyncio.sleep(_AUDIT_EVERY_S)
            for worker in self._workers.ready():
                if worker in self._reloading:
                    continue
                seen = self._seen.get(worker)
                pair = (self._expected[worker], seen or 0)
                if seen is None or seen == self._expected[worker] or self._draining is not None:
                    self._doubted.pop(worker, None)
                elif self._doubted.get(worker) != pair:
                    self._doubted[worker] = pair  # it may be about to change
                else:
                    await self._audit(worker)

    async def _audit(self, worker: str) -> None:
        subject = self._subjects.control_worker(worker, "inspect")
        try:
            reply = await rpc.call(self._bus, subject, None, InspectReply, timeout=2.0)
        except FoundationError as error:
            self._log.debug("audit put off", worker=worker, error=str(error))
            return
        if reply.incarnation != self._incarnation:
            return
        extra = {
            agent: epoch
            for agent, epoch in reply.agents.items()
            if (placed := self._placed.get(agent)) is None
            or placed.worker != worker
            or placed.epoch > epoch
        }
        missing = [
            agent
            for agent, placed in self._placed.items()
            if placed.worker == worker
            and placed.told
            and agent not in reply.agents
            and (held := self._registry.get(agent)) is not None
            and held.record.epoch == placed.epoch
            and held.record.status is AgentStatus.RUNNING
        ]
        if extra or missing:
            self._log.warning(
                "worker holds other agents than it should; mended",
                worker=worker,
                extra=sorted(extra)[:10],
                missing=missing[:10],
            )
        waiting = self._unstopped.setdefault(worker, {})
        for agent, epoch in extra.items():
            waiting[agent] = max(epoch, waiting.get(agent, 0))
        self._lost.update((agent, worker) for agent in missing)
        self._wake.set()

    # ---- new code -----------------------------------------------------------------

    def modules(self) -> set[str]:
        """The modules that the agents here come from."""
        return {placed.record.spec.run.partition(":")[0] for placed in self._placed.values()}

    async def put_down(self, worker: str, *, timeout: float) -> list[str]:
        """Let a worker's agents stop in good order; those that did not in time.

        They stay this node's and start again when the worker has ended, which the caller sees to.
        """
        down = self._reloading[worker] = set()
        agents = {a: placed.epoch for a, placed in self._placed.items() if placed.worker == worker}
        if not agents or worker not in self._workers.ready():
            return []
        subject = self._subjects.control_worker(worker, "stop")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline), self._orders[worker]:
                request = StopRequest(agents=agents, reason=RELOADED)
                await rpc.tell(self._bus, subject, request, timeout=timeout)
        except (FoundationError, TimeoutError) as error:
            self._log.info("worker not told to stop its agents", worker=worker, error=str(error))
            return sorted(agents)
        while late := [
            agent
            for agent, epoch in agents.items()
            if agent not in down
            and (placed := self._placed.get(agent)) is not None
            and (placed.worker, placed.epoch) == (worker, epoch)
        ]:
            if loop.time() >= deadline:
                return sorted(late)
            await asyncio.sleep(0.005)
        return []

    def keep(self, worker: str) -> None:
        """A worker is not replaced after all; what it has put down is found by the audit."""
        self._reloading.pop(worker, None)
        self._touch_mine()

    async def wait_running(self, *, timeout: float) -> None:
        """Until all that this node holds has started, as far as that is so in time."""
        deadline = asyncio.get_running_loop().time() + timeout
        while asyncio.get_running_loop().time() < deadline and (
            self._lost
            or any(
                held.record.status is AgentStatus.STARTING
                for held in self._registry.on_node(self._node)
            )
        ):
            await asyncio.sleep(0.01)

    # ---- end ----------------------------------------------------------------------

    async def drain(self, reason: str, *, timeout: float) -> bool:
        """Stop every agent in good order and give its record back; True if all have gone."""
        self._draining = reason
        by_worker: dict[str, dict[str, int]] = {}
        ready = self._workers.ready()
        for agent, placed in self._placed.items():
            if placed.worker in ready:
                by_worker.setdefault(placed.worker, {})[agent] = placed.epoch
            else:
                self._reports[agent] = AgentReport(
                    id=agent, epoch=placed.epoch, status=AgentStatus.STOPPED, reason=reason
                )
        for worker, agents in by_worker.items():
            # In line: an order to start them that is on its way must not come after it.
            self._order(worker, agents, [])
        self._wake.set()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (self._placed or self._reports) and loop.time() < deadline:
            await asyncio.sleep(0.01)
        return not self._placed


def _goes(record: AgentRecord) -> bool:
    """Whether this record hands the agent over to another node."""
    origin = record.recovered_from
    return record.status is AgentStatus.STARTING and origin is not None and origin.reason == MOVED
