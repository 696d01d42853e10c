"""`NodeManager`: composes the services of one node; starts, drains and stops them; nothing else.

It runs no agent code, so a busy agent can't stop its heartbeats. What it does
when it ends: asked to stop (SIGTERM, Ctrl-C) it drains, that is, the leader moves its
agents away a few at a time; what is left after `worker.drain_timeout_s`, or can't be
moved, finishes the signal in hand, stores, and is placed elsewhere later; asked again
it stops at once; killed, it takes its workers with it, and the others notice
by missing responders. Declared down while it lives, it drops everything it
held and joins again under a new incarnation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from secrets import token_hex
from typing import Any

import psutil

from foundation_nats.base import telemetry
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets, rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.micro import Endpoint, MicroService
from foundation_nats.bus.streams import StreamReader
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Registry
from foundation_nats.cluster.rtt import peer_rtts, server_rtt
from foundation_nats.cluster.validity import Validity
from foundation_nats.config import Config
from foundation_nats.control.controller import Controller
from foundation_nats.errors import (
    BusError,
    BusUnavailableError,
    ConfigError,
    ConflictError,
    FoundationError,
)
from foundation_nats.node.blackbox import Suspect, importing
from foundation_nats.node.busiest import together
from foundation_nats.node.capacity import detected
from foundation_nats.node.host import Host
from foundation_nats.node.metrics import Metrics
from foundation_nats.node.preparing import discard
from foundation_nats.node.spawning import WORKER_MODULE, Child, worker_count
from foundation_nats.node.trimmer import Trimmer
from foundation_nats.node.worker import WorkerOrders
from foundation_nats.node.workers import Workers
from foundation_nats.signaling.expander import Expander
from foundation_nats.signaling.rerouter import Rerouter
from foundation_nats.signaling.timekeeper import Timekeeper
from foundation_schemas import (
    AgentRecord,
    BrakeReply,
    BusiestReply,
    BusiestRequest,
    ClassInfo,
    DeploymentMeasure,
    Heartbeat,
    InspectReply,
    Load,
    MeasureReply,
    MeasureRequest,
    NodeRecord,
    NodeStatus,
    ReloadReply,
    ReloadRequest,
    RttReply,
    RttRequest,
    ValidateReply,
    ValidateRequest,
    WireModel,
    is_name,
)

_STOP_REST_S = 20.0
"""For what could not be moved away to stop in good order."""
_NO_PROGRESS_S = 1.0
"""A leaving node doesn't wait longer than this for a leader that moves nothing."""
_VALIDATE_TIMEOUT_S = 20.0
_CPU_SMOOTHING = 0.2
_LOAD_EVERY_S = 1.0
"""Less often than heartbeats: to read it from the kernel costs more than to send one."""
_RTT_TIMEOUT_MAX_S = 10.0
_RELOAD_PATIENCE_MAX_S = 60.0
_RELOAD_READY_S = 10.0


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What one node is called, offers and runs with."""

    name: str | None = None
    """None: the host's name and four random digits."""
    workers: int | None = None
    """Worker processes; None: one per core."""
    imports: tuple[str, ...] = ()
    """Modules that every worker imports at its start."""
    domains: tuple[str, ...] = ()
    """``module:Class`` of replicated domains that the node follows, used or not."""
    labels: Mapping[str, str] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    """What the node offers to agents that require it."""
    capacity: Mapping[str, float] = field(default_factory=dict)
    """Declared limits such as ``slots=500`` or ``gpu=1``, besides the ``cpu`` and ``memory_mb`` that
    are found out (`capacity.detected`); agents count only for what they say they need."""
    log_level: str = "info"
    log_json: bool = False
    metrics: str | None = None
    """``HOST:PORT`` where Prometheus finds the node's metrics; None: nowhere."""

    def checked_name(self) -> str:
        """The name.

        Raises:
            ConfigError: it is no valid name.
        """
        if self.name is None:
            host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
            return f"{host or 'node'}-{token_hex(2)}"
        if not is_name(self.name):
            raise ConfigError(
                f"{self.name!r} is not a valid node name: use letters, digits, '-' and '_'"
            )
        return self.name


class NodeManager:
    """One node of the cluster."""

    def __init__(
        self,
        options: NodeOptions,
        config: Config,
        *,
        worker_module: str = WORKER_MODULE,
        spare: Sequence[Child] = (),
    ) -> None:
        """*spare* are worker processes that were spawned before, to save time."""
        self._options = options
        self._config = config
        self.name = options.checked_name()
        self._subjects = Subjects(config.cluster)
        self._log = get_logger("node").bind(node=self.name)
        count = worker_count(options.workers)
        if count < 1:
            raise ConfigError(f"a node needs at least one worker, not {count}")
        self._worker_ids = [f"{self.name}-w{i}" for i in range(count)]
        self.ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        """Resolves when the node can't go on: with the reason."""
        self._asked = asyncio.Event()
        """Set when somebody wants the node to drain and stop: by a signal, or over the bus."""
        self._is_process = False
        self._workers = Workers(
            config.worker,
            count=count,
            module=worker_module,
            on_ready=self._worker_ready,
            on_died=self._worker_died,
            on_exhausted=self._end,
            may_judge=lambda for_s: (
                self._membership is not None and self._membership.hears_itself(for_s)
            ),
            spare=spare,
        )
        self._bus: Bus | None = None
        self._scope: TaskScope | None = None
        self._membership: Membership | None = None
        self._controller: Controller | None = None
        self._host: Host | None = None
        self._validity: Validity | None = None
        self._describing: dict[str, list[asyncio.Future[tuple[str, Suspect | None]]]] = {}
        """Per worker, who waits for what it finds behind class names."""
        self._rejoining = False
        self._reload_lock = asyncio.Lock()
        self._has_left = False
        self._micro: MicroService | None = None
        self._metrics: Metrics | None = None
        self._unload_telemetry: Callable[[], None] = lambda: None
        self._draining = False
        self._cpu = self._memory = 0.0
        self._load_at = 0.0

    # ---- start ------------------------------------------------------------------

    async def start(self) -> None:
        """Join the cluster and begin to host; returns when the node is up.

        Raises:
            ConfigError: a handler of `telemetry.handlers` can't be loaded.
            BusUnavailableError: no NATS server.
            ServerError: the server can't carry a cluster.
            NodeNameTakenError: a node of this name is alive.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(drain=False)
            raise

    async def _start(self) -> None:
        config = self._config
        self._unload_telemetry = telemetry.load(config.telemetry.handlers)
        self._bus = bus = await Bus.connect(config.bus, self.name)
        self._scope = scope = TaskScope("node")
        scope.failure.add_done_callback(
            lambda failure: self._end(f"a service failed: {failure.result()!r}")
        )
        await assets.ensure(bus, config)
        capacity = {**detected(), **self._options.capacity}
        record = NodeRecord(
            name=self.name,
            incarnation=0,
            workers=self._worker_ids,
            capabilities=sorted(self._options.capabilities),
            labels=dict(self._options.labels),
            capacity=capacity,
            host=platform.node(),
            pid=os.getpid(),
            version=version("foundation-nats"),
            started_at=utc_text(),
        )
        self._membership = membership = Membership(
            bus,
            self._subjects,
            config.liveness,
            record=record,
            load=self._load,
            on_replaced=lambda: self._end("another node took this node's name"),
            on_ended=self._declared_down,
        )
        joined = await membership.join(scope)
        registry = Registry(bus, self._subjects)
        self._listen(joined.incarnation)
        self._workers.open(bus, self._subjects, scope, self._orders(joined.incarnation))
        await registry.open(scope)
        signals = StreamReader(bus, self._subjects.signals_stream)
        trimmer = Trimmer(signals, self._subjects, config.mailbox)
        bus.on_disconnect(trimmer.distrust)
        self._host = Host(
            bus,
            self._subjects,
            registry,
            self._workers,
            trimmer,
            node=self.name,
            capacity=capacity,
            emit=membership.emit,
            retry_s=config.control.retry_s,
        )
        self._host.open(scope, joined.incarnation)
        verbs = {
            "inspect": self._inspect,
            "measure": self._measure,
            "busiest": self._busiest,
            "validate": self._validate,
            "heartbeat": self._heartbeat,
            "force_failover": self._force_failover,
            "brake": self._brake,
            "rtt": self._rtt,
            "reload": self._reload,
            "stop": self._stop_asked,
        }
        for verb, handler in verbs.items():
            rpc.serve(bus, scope, self._subjects.control_node(self.name, verb), handler)
        self._micro = self._announce(bus)
        scope.start(trimmer.run(), "trimmer")
        expander = Expander(
            bus,
            self._subjects,
            registry,
            full_patience_s=config.mailbox.full_patience_s,
            window_s=config.mailbox.duplicate_window_s,
            load_of=self._place_load,
        )
        scope.start(expander.run(), "expander")
        self._controller = controller = Controller(
            bus, self._subjects, config, membership, registry
        )
        await controller.open(scope)
        timekeeper = Timekeeper(
            bus,
            self._subjects,
            full_patience_s=config.mailbox.full_patience_s,
            window_s=config.mailbox.duplicate_window_s,
        )
        scope.start(timekeeper.run(), "timekeeper")
        rerouter = Rerouter(
            bus,
            self._subjects,
            registry,
            node=self.name,
            is_leader=lambda: controller.is_leader,
            emit=membership.emit,
        )
        scope.start(rerouter.run(), "rerouter")
        if self._options.metrics is not None:
            dead = StreamReader(bus, self._subjects.dead_stream)
            self._metrics = Metrics(self.name, self._host, self._load, lambda: controller.is_leader)
            self._metrics.serve(self._options.metrics)
            scope.start(self._metrics.count_dead(dead), "metrics")
        self._log.info("node is up", incarnation=joined.incarnation, workers=len(self._worker_ids))

    def _announce(self, bus: Bus) -> MicroService:
        """Be seen by ``nats micro ls``."""
        return MicroService(
            bus,
            name="foundation-node",
            id=self.name,
            version=version("foundation-nats"),
            description=f"Node of the cluster {self._config.cluster}; hosts agents.",
            metadata={"cluster": self._config.cluster, "node": self.name},
            endpoints=[
                Endpoint(verb, self._subjects.control_node(self.name, verb))
                for verb in ("ping", "inspect", "heartbeat", "validate")
            ],
        )

    def _orders(self, incarnation: int) -> list[WorkerOrders]:
        return [
            WorkerOrders(
                node=self.name,
                incarnation=incarnation,
                worker=worker,
                config=self._config,
                imports=list(self._options.imports),
                # One replica a node is enough to follow: agents of other workers have their own.
                domains=list(self._options.domains) if worker == self._worker_ids[0] else [],
                log_level=self._options.log_level,
                log_json=self._options.log_json,
            )
            for worker in self._worker_ids
        ]

    def _listen(self, incarnation: int) -> None:
        assert self._bus is not None
        if self._validity is not None:
            self._validity.close()
        self._validity = Validity(
            self._bus,
            self._subjects,
            node=self.name,
            incarnation=incarnation,
            fence_s=self._config.liveness.fence_s,
            on_down=self._declared_down,
        )

    # ---- events -----------------------------------------------------------------

    def _worker_ready(self, worker: str) -> None:
        if self._host is not None:
            self._host.worker_ready(worker)
        if self._membership is not None:
            # Its activations may start once it has seen an echo.
            self._membership.beat_now()

    def _worker_died(self, worker: str, cause: str, suspect: Suspect | None, stack: str) -> None:
        for died in self._describing.pop(worker, ()):
            if not died.done():
                died.set_result((cause, suspect))
        if self._host is not None and not self._rejoining:
            self._host.worker_died(worker, cause, suspect, stack)

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self._log.error("node ends", reason=reason)
            self.ended.set_result(reason)

    def _declared_down(self) -> None:
        if not self._rejoining and self._scope is not None:
            self._rejoining = True
            self._scope.start(self._rejoin(), "rejoin")

    async def _rejoin(self) -> None:
        """The others gave this node up: drop everything, and come back as a new one."""
        assert self._membership is not None
        assert self._host is not None
        self._log.warning("declared down while alive; joining again under a new incarnation")
        try:
            while True:
                try:
                    joined = await self._membership.rejoin()
                    break
                except BusError as error:
                    self._log.info("cannot join again yet", error=str(error))
                    await asyncio.sleep(0.5)
            self._listen(joined.incarnation)
            self._workers.replace_all(self._orders(joined.incarnation))
            self._host.new_incarnation(joined.incarnation)
        finally:
            self._rejoining = False

    def _load(self) -> Load:
        own = self._host.load() if self._host is not None else Load()
        now = monotonic()
        if now - self._load_at >= _LOAD_EVERY_S:
            self._load_at = now
            # Smoothed over some ten looks: placement should see load, not noise.
            self._cpu += _CPU_SMOOTHING * (psutil.cpu_percent(None) / 100 - self._cpu)
            self._memory = psutil.virtual_memory().percent / 100
        return own.model_copy(update={"cpu": round(self._cpu, 3), "memory": round(self._memory, 3)})

    def _place_load(self, record: AgentRecord) -> float:
        """Signals that wait on an agent's node, per agent there."""
        assert self._membership is not None
        node = None if record.node is None else self._membership.nodes().get(record.node)
        if node is None or node.load is None:
            return 0.0
        return node.load.backlog / max(1, node.load.agents)

    # ---- control ----------------------------------------------------------------

    async def _inspect(self, _data: bytes) -> WireModel:
        assert self._bus is not None
        assert self._membership is not None
        assert self._host is not None
        agents: dict[str, int] = {}
        details: dict[str, object] = {
            "pid": os.getpid(),
            "placed": self._host.agents(),
            "tasks": len(asyncio.all_tasks()),
        }
        for worker in self._workers.ready():
            subject = self._subjects.control_worker(worker, "inspect")
            with contextlib.suppress(FoundationError):
                found = await rpc.call(self._bus, subject, None, InspectReply, timeout=2.0)
                agents.update(found.agents)
                details[worker] = found.details
        return InspectReply(
            name=self.name,
            incarnation=self._membership.incarnation,
            agents=agents,
            details=details,
        )

    async def _measure(self, data: bytes) -> WireModel:
        """The sum over the workers; fails if one of them does not answer."""
        assert self._bus is not None
        request = rpc.decode(MeasureRequest, data)
        sums: dict[str, DeploymentMeasure] = {}
        for worker in self._workers.ready():
            subject = self._subjects.control_worker(worker, "measure")
            found = await rpc.call(self._bus, subject, request, MeasureReply, timeout=0.8)
            for name, part in found.deployments.items():
                before = sums.get(name, DeploymentMeasure())
                gauges = {key: list(values) for key, values in before.gauges.items()}
                for key, values in part.gauges.items():
                    gauges.setdefault(key, []).extend(values)
                sums[name] = DeploymentMeasure(
                    agents=before.agents + part.agents,
                    backlog=before.backlog + part.backlog,
                    gauges=gauges,
                )
        return MeasureReply(deployments=sums, cpu=self._load().cpu)

    async def _busiest(self, data: bytes) -> WireModel:
        """Of all workers that answer in time."""
        assert self._bus is not None
        bus, request = self._bus, rpc.decode(BusiestRequest, data)

        async def ask(worker: str) -> BusiestReply | None:
            subject = self._subjects.control_worker(worker, "busiest")
            with contextlib.suppress(FoundationError):
                return await rpc.call(bus, subject, request, BusiestReply, timeout=0.5)
            return None

        told = await asyncio.gather(*map(ask, self._workers.ready()))
        return together([reply for reply in told if reply is not None], request.limit)

    async def _reload(self, data: bytes) -> WireModel:
        """New workers with the code as it is now; nothing changes if that can't be imported."""
        assert self._host is not None
        request = rpc.decode(ReloadRequest, data)
        host = self._host
        async with self._reload_lock:
            if self._draining or self._rejoining:
                raise ConflictError(f"Node {self.name} is leaving, or joins anew.")
            runs = {*self._options.imports, *(request.runs or host.modules())}
            children = await self._workers.prepare(sorted(runs))
            agents = len(host.agents())
            patience_s = max(0.0, min(request.patience_s, _RELOAD_PATIENCE_MAX_S))

            async def one(worker: str, child: Child) -> list[str]:
                try:
                    late = await host.put_down(worker, timeout=patience_s)
                except BaseException:
                    host.keep(worker)
                    discard(child)
                    raise
                await self._workers.replace(worker, child, timeout=_RELOAD_READY_S)
                return late

            late = await asyncio.gather(*map(one, self._workers.ids, children))
            forced = sorted(agent for some in late for agent in some)
            await host.wait_running(timeout=max(1.0, patience_s))
        self._log.info("reloaded", runs=",".join(sorted(runs)), agents=agents)
        return ReloadReply(workers=len(children), agents=agents, forced=forced)

    async def _force_failover(self, _data: bytes) -> None:
        assert self._membership is not None
        self._log.warning("the storm brake is overridden")
        self._membership.force_failover()
        if self._controller is not None:
            self._controller.reconciler.hurry()

    async def _brake(self, _data: bytes) -> WireModel:
        """What holds failover back or slows it down, as this node sees it; the leader's word counts."""
        assert self._membership is not None
        held = self._membership.held_back()
        paced_s = 0.0 if self._controller is None else self._controller.reconciler.paced_s()
        return BrakeReply(
            node=self.name,
            held=[] if held is None else sorted(held[0]),
            held_for_s=None if held is None else held[1],
            paced_for_s=paced_s or None,
        )

    async def _stop_asked(self, _data: bytes) -> None:
        if not self._is_process:
            raise ConflictError(
                f"Node {self.name} runs within another program.", hint="Stop that program."
            )
        self._log.info("asked over the bus to drain and stop")
        self._asked.set()

    async def _heartbeat(self, _data: bytes) -> WireModel:
        assert self._membership is not None
        controller = self._controller
        return Heartbeat(
            node=self.name,
            incarnation=self._membership.incarnation,
            beat=0,
            sent_at=0.0,
            draining=self._draining,
            load=self._load(),
            distrusted=controller is not None and controller.reconciler.distrusts(self.name),
        )

    async def _rtt(self, data: bytes) -> WireModel:
        """How far the server and the other nodes are from here; within the asker's time."""
        assert self._bus is not None
        assert self._membership is not None
        bus, membership = self._bus, self._membership
        request = rpc.decode(RttRequest, data)
        timeout = max(0.0, min(request.timeout_s, _RTT_TIMEOUT_MAX_S))
        # Those that answer first: who does not, takes all the time there is.
        heard = membership.hears()
        peers = sorted(set(request.peers) - {self.name}, key=lambda peer: (peer not in heard, peer))
        began = monotonic()
        server = await server_rtt(bus, timeout=timeout / 2)
        found = await peer_rtts(bus, self._subjects, peers, timeout=timeout - (monotonic() - began))
        facts = bus.server_facts
        return RttReply(
            node=self.name,
            incarnation=membership.incarnation,
            draining=self._draining,
            load=self._load(),
            server=str(facts.get("server_name") or facts.get("server_id") or ""),
            server_cluster=str(facts.get("cluster") or ""),
            server_rtt_ms=server,
            peers=found,
            hears=sorted(membership.hears()),
            leader=None if self._controller is None else self._controller.leader,
            gave_up={
                node.name: node.incarnation
                for node in membership.nodes().values()
                if not node.is_alive and self._controller is not None and self._controller.is_leader
            },
        )

    async def _validate(self, data: bytes) -> WireModel:
        """Have a worker import what is asked about; an import that ends it is said to do so."""
        request = rpc.decode(ValidateRequest, data)
        found: dict[str, ClassInfo] = {}
        for _ in range(100):
            runs = [run for run in request.runs if run not in found]
            if ready := self._workers.ready():
                described = await self._describe(ready[0], runs)
                found |= {info.run: info for info in described}
                if len(found) == len(set(request.runs)):
                    return ValidateReply(classes=[found[run] for run in request.runs])
            await asyncio.sleep(0.05)
        raise BusUnavailableError(f"No worker of {self.name} is ready.")

    async def _describe(self, worker: str, runs: list[str]) -> list[ClassInfo]:
        assert self._bus is not None
        died: asyncio.Future[tuple[str, Suspect | None]]
        died = asyncio.get_running_loop().create_future()
        self._describing.setdefault(worker, []).append(died)
        call: asyncio.Task[ValidateReply] = asyncio.create_task(
            rpc.call(
                self._bus,
                self._subjects.control_worker(worker, "validate"),
                ValidateRequest(runs=runs),
                ValidateReply,
                timeout=_VALIDATE_TIMEOUT_S,
            )
        )
        try:
            either: set[asyncio.Future[Any]] = {call, died}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not died.done():
                return (await call).classes
            cause, suspect = died.result()
        finally:
            if waiting := self._describing.get(worker):
                waiting.remove(died)
            call.cancel()
            await asyncio.wait({call})
        return [
            ClassInfo(
                run=run, ok=False, error=f"{run}: importing it ended the worker process ({cause})"
            )
            for run in runs
            if suspect is not None and suspect == importing(run)
        ]

    @property
    def worker_pids(self) -> dict[str, int]:
        """Worker id to process id."""
        return self._workers.pids()

    # ---- stop -------------------------------------------------------------------

    async def stop(self, *, drain: bool = True) -> None:
        """Leave the cluster; with *drain* the agents go first. Idempotent."""
        # It stays for those who ask meanwhile: a drain may take a while.
        membership = None if self._has_left else self._membership
        self._has_left = True
        if membership is not None and self._bus is not None and self._bus.is_connected:
            move_s = self._config.worker.drain_timeout_s
            with contextlib.suppress(FoundationError, TimeoutError):
                async with asyncio.timeout(move_s + _STOP_REST_S + 10):
                    if drain and self._host is not None:
                        self._draining = True
                        membership.set_draining()
                        failpoint("drain.mid")
                        await self._wait_moved(self._host, membership, move_s)
                        if not await self._host.drain(
                            f"drained from {self.name}", timeout=_STOP_REST_S
                        ):
                            self._log.warning("not every agent could be drained in time")
                    if self._controller is not None:
                        await self._controller.close()
                    await membership.leave()
        if self._validity is not None:
            self._validity.close()
        if self._micro is not None:
            self._micro.close()
        self._unload_telemetry()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        await self._workers.close()
        if self._scope is not None:
            await self._scope.close()
        if self._bus is not None:
            await self._bus.close()
        self._log.info("node has stopped")

    async def _wait_moved(self, host: Host, membership: Membership, timeout: float) -> None:
        """Let the leader move the agents away, a few at a time; not if it doesn't get on.

        What is left, because there is no leader, no other node or no time, is stopped.
        """
        loop = asyncio.get_running_loop()
        began = progressed = loop.time()
        before = host.leaving()
        while before[0] and (now := loop.time()) - began < timeout:
            others = (view for name, view in membership.nodes().items() if name != self.name)
            if not any(view.status is NodeStatus.UP for view in others):
                return
            found = host.leaving()
            if found[1] or found != before:
                progressed, before = now, found
            elif now - progressed > _NO_PROGRESS_S:
                return
            await asyncio.sleep(0.01)

    async def run(self) -> int:
        """Start, serve until told to stop, stop; returns the exit code.

        SIGTERM or SIGINT drains and stops; a second one stops at once.

        Raises:
            FoundationError: the node could not start.
        """
        loop = asyncio.get_running_loop()
        self._is_process = True
        asked = self._asked
        again = asyncio.Event()

        def on_signal() -> None:
            (again if asked.is_set() else asked).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        starting = asyncio.create_task(self.start())
        waiting = asyncio.create_task(asked.wait())
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return 0
        try:
            await starting
        except BaseException:
            waiting.cancel()
            raise
        both: set[asyncio.Future[Any]] = {waiting, self.ended}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        failed = self.ended.done()
        waiting.cancel()
        stopping = asyncio.create_task(self.stop(drain=True))
        hurry = asyncio.create_task(again.wait())
        await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            stopping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stopping
            await self.stop(drain=False)
        else:
            await stopping
        return 1 if failed else 0
