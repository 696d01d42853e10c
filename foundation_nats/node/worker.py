"""One worker process: hosts a workload, answers its manager, ends with it.

The manager writes one line of JSON to the worker's standard input (who it is),
and keeps the pipe open: its end is the manager's end, and the worker's. Beyond
that they speak over NATS only. What became of agents is reported at once and
again until the manager has acknowledged it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

from pydantic import BaseModel

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import configure, get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.events import Events
from foundation_nats.cluster.validity import Validity
from foundation_nats.config import BusConfig, Config
from foundation_nats.errors import BusError, FoundationError
from foundation_nats.node.blackbox import BlackBox
from foundation_nats.node.hosting import HostContext, Workload, WorkloadFactory
from foundation_nats.node.preparing import carry_out
from foundation_nats.node.watchdog import Blocked, Watchdog
from foundation_schemas import (
    AgentReport,
    BusiestRequest,
    InspectReply,
    Load,
    MeasureReply,
    MeasureRequest,
    Pong,
    StartRequest,
    StopRequest,
    ValidateReply,
    ValidateRequest,
    WireModel,
    WorkerReport,
)

REPORT_EVERY_S = 0.5
REPORT_IDLE_S = 2.0
OTHER_SERVERS = "FOUNDATION_TEST_WORKER_SERVERS"
"""The variable by which a test gives the workers of a node a way to the bus that is not their
manager's, so that the two may be parted. Commas between the servers."""
_LAG_TICK_S = 0.2
_LAG_TICK_IDLE_S = 1.0
_REVIEW_AGAIN_S = 0.2


class WorkerOrders(BaseModel):
    """The line of JSON on a worker's standard input."""

    node: str
    incarnation: int
    worker: str
    config: Config
    imports: list[str] = []
    domains: list[str] = []
    log_level: str = "info"
    log_json: bool = False


class Worker:
    """The services of one worker process."""

    def __init__(self, orders: WorkerOrders, bus: Bus, factory: WorkloadFactory) -> None:
        self._orders = orders
        self._bus = bus
        self._subjects = Subjects(orders.config.cluster)
        self._scope = TaskScope("worker")
        self._log = get_logger("worker").bind(worker=orders.worker)
        self._changes: dict[str, AgentReport] = {}
        self._number = 0
        self._report_now = asyncio.Event()
        self._lag_s = 0.0
        self._was_busy = True
        self._watchdog: Watchdog | None = None
        self._events = Events(bus, self._subjects, orders.node)
        self._box = BlackBox.inherited()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._validity = Validity(
            bus,
            self._subjects,
            node=orders.node,
            incarnation=orders.incarnation,
            fence_s=orders.config.liveness.fence_s,
            on_down=lambda: self._end("this node was declared down"),
            on_restored=self._restored,
            on_review=self._on_review,
        )
        self._workload: Workload = factory(
            HostContext(
                bus=bus,
                subjects=self._subjects,
                config=orders.config,
                node=orders.node,
                incarnation=orders.incarnation,
                worker=orders.worker,
                validity=self._validity,
                scope=self._scope,
                blackbox=self._box,
                domains=orders.domains,
                report=self._report,
            )
        )

    def open(self) -> None:
        """Begin to serve."""
        verbs = {
            "start": self._start,
            "stop": self._stop,
            "inspect": self._inspect,
            "measure": self._measure,
            "busiest": self._busiest,
            "validate": self._validate,
            "ping": self._ping,
        }
        for verb, handler in verbs.items():
            subject = self._subjects.control_worker(self._orders.worker, verb)
            rpc.serve(self._bus, self._scope, subject, handler)
        warn_s = self._orders.config.worker.block_warn_s
        if warn_s is not None:
            self._watchdog = Watchdog(
                self._box,
                self._log,
                warn_s=warn_s,
                type_of=self._workload.doing,
                on_over=self._was_blocked,
            )
        self._scope.start(self._report_loop(), "report")
        self._scope.start(self._lag_loop(), "lag")
        self._scope.failure.add_done_callback(
            lambda failure: self._end(f"a service failed: {failure.result()!r}")
        )

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    def _restored(self) -> None:
        self._workload.resume()

    def _on_review(self, lapse: int) -> None:
        self._scope.start(self._review(lapse), "review")

    async def _review(self, lapse: int) -> None:
        """The right to answer had lapsed: end what others run by now, before it counts again."""
        while self._validity.in_review(lapse):
            try:
                await self._workload.review()
            except FoundationError as error:
                self._log.info("records not readable yet: no right to answer", error=str(error))
                await asyncio.sleep(_REVIEW_AGAIN_S)
                continue
            self._validity.confirm(lapse)

    # ---- control ----------------------------------------------------------------

    async def _ping(self, _data: bytes) -> WireModel:
        return Pong(name=self._orders.worker, incarnation=self._orders.incarnation)

    async def _start(self, data: bytes) -> None:
        request = rpc.decode(StartRequest, data)
        if request.incarnation == self._orders.incarnation:
            self._scope.start(self._workload.start(request.agents), "start")

    async def _stop(self, data: bytes) -> None:
        request = rpc.decode(StopRequest, data)
        self._scope.start(
            self._workload.stop(request.agents, request.reason, request.targets), "stop"
        )

    async def _inspect(self, _data: bytes) -> WireModel:
        return InspectReply(
            name=self._orders.worker,
            incarnation=self._orders.incarnation,
            agents=self._workload.running(),
            details={
                "pid": os.getpid(),
                "backlog": self._workload.backlog(),
                "valid_s": round(self._validity.remaining_s(), 3),
                "lag_s": round(self._lag_s, 4),
                "blocked": 0 if self._watchdog is None else self._watchdog.incidents,
                "tasks": len(asyncio.all_tasks()),
                "domains": self._workload.domains(),
            },
        )

    async def _measure(self, data: bytes) -> WireModel:
        request = rpc.decode(MeasureRequest, data)
        return MeasureReply(deployments=self._workload.measure(frozenset(request.deployments)))

    async def _busiest(self, data: bytes) -> WireModel:
        return self._workload.busiest(rpc.decode(BusiestRequest, data).limit)

    async def _validate(self, data: bytes) -> WireModel:
        request = rpc.decode(ValidateRequest, data)
        return ValidateReply(classes=self._workload.describe(request.runs))

    # ---- reports ----------------------------------------------------------------

    def _report(self, report: AgentReport) -> None:
        known = self._changes.get(report.id)
        if known is None or known.epoch <= report.epoch:
            self._changes[report.id] = report
            self._report_now.set()

    async def _report_loop(self) -> None:
        subject = self._subjects.control_node(self._orders.node, "report")
        while True:
            try:
                every = REPORT_EVERY_S if self._was_busy else REPORT_IDLE_S
                await asyncio.wait_for(self._report_now.wait(), every)
                await asyncio.sleep(0.001)  # gather what changes together
            except TimeoutError:
                pass
            self._report_now.clear()
            changes = list(self._changes.values())[:2000]
            consumed = self._workload.consumed()
            self._was_busy = bool(changes or consumed)
            self._number += 1
            report = WorkerReport(
                worker=self._orders.worker,
                incarnation=self._orders.incarnation,
                number=self._number,
                changes=changes,
                consumed=consumed,
                fingerprint=self._workload.fingerprint(),
                load=Load(
                    agents=len(self._workload.running()),
                    backlog=self._workload.backlog(),
                    lag_ms=round(self._lag_s * 1000, 1),
                ),
                counters=self._workload.counters(),
                breakers=self._workload.breakers(),
            )
            try:
                await rpc.tell(self._bus, subject, report, timeout=2.0)
            except FoundationError as error:
                self._log.debug("report will be repeated", error=str(error))
                await asyncio.sleep(0.1)
                if changes:
                    self._report_now.set()
                continue
            for change in changes:
                if self._changes.get(change.id) == change:
                    del self._changes[change.id]
            if self._changes:
                self._report_now.set()

    async def _lag_loop(self) -> None:
        while True:
            pause = _LAG_TICK_S if self._was_busy else _LAG_TICK_IDLE_S
            due = monotonic() + pause
            if self._watchdog is not None:
                self._watchdog.promise(due)
            await asyncio.sleep(pause)
            late = max(0.0, monotonic() - due)
            # Rises at once, falls slowly: a heartbeat sees the worst of the last second.
            self._lag_s = max(late, self._lag_s * 0.8 ** (pause / _LAG_TICK_S))

    def _was_blocked(self, blocked: Blocked) -> None:
        suspect = blocked.suspect
        worker = self._orders.worker
        where = f" at {blocked.place}" if blocked.place else ""
        line = f" ({blocked.source})" if blocked.source else ""
        often = f", {blocked.times} times since that was last told" if blocked.times > 1 else ""
        self._events.emit(
            "worker" if suspect is None else "agent",
            "blocked_loop",
            f"{blocked.what} kept all of {worker} waiting for {blocked.seconds:.2g} s"
            f"{where}{line}{often}.",
            agent=None if suspect is None else suspect.agent,
            sequence=None if suspect is None else suspect.sequence,
            type=blocked.type or None,
            node=self._orders.node,
            worker=worker,
            seconds=blocked.seconds,
            times=blocked.times,
            where=blocked.place or None,
            stack=blocked.stack,
        )

    async def close(self) -> None:
        """End every task."""
        if self._watchdog is not None:
            self._watchdog.close()
        self._validity.close()
        await self._scope.close()


def _end_with_manager() -> None:
    """Leave when the pipe from the manager ends, whatever the event loop is doing."""

    def wait() -> None:
        # Not the buffered reader: its lock, held here, would abort the interpreter's end.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="manager-pipe", daemon=True).start()


def _bus_config(orders: WorkerOrders) -> BusConfig:
    """How the worker reaches the bus: as its manager does, unless a test says otherwise."""
    other = os.environ.get(OTHER_SERVERS)
    if not other:
        return orders.config.bus
    return orders.config.bus.model_copy(update={"servers": tuple(other.split(","))})


async def serve(factory: WorkloadFactory) -> int:
    """Be a worker, as told on standard input, until the manager ends or this node is down."""
    line = sys.stdin.buffer.readline()
    if line and carry_out(line):
        line = sys.stdin.buffer.readline()
    if not line:
        return 0
    orders = WorkerOrders.model_validate_json(line)
    _end_with_manager()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure(level=orders.log_level, json=orders.log_json)
    log = get_logger("worker").bind(worker=orders.worker)
    for module in orders.imports:
        __import__(module)
    try:
        bus = await Bus.connect(_bus_config(orders), orders.worker)
    except BusError as error:
        log.error("worker can't connect; its manager starts another", error=str(error))
        return 1
    worker = Worker(orders, bus, factory)
    worker.open()
    try:
        reason = await worker.ended
        log.warning("worker ends", reason=reason)
        return 1
    finally:
        await worker.close()
        try:
            await bus.close()
        except BusError as error:
            log.debug("bus did not close in order", error=str(error))
