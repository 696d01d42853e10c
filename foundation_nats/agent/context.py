"""`Context`: what a handler may know and call besides its state; `Emission`: what it asked to be sent.

Nothing here speaks to NATS: what a handler emits is kept, and leaves with the commit.
"""

from __future__ import annotations

import random
import typing
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import orjson

from foundation_nats.agent.family import Child, Supervision
from foundation_nats.agent.family import children as children_of
from foundation_nats.agent.guards import Bulkhead, Guard, Guards, Limiter, retrying
from foundation_nats.agent.offload import Offload
from foundation_nats.agent.replicated import AgentConsensus
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.steps import (
    Doubt,
    Idempotent,
    StepHome,
    cause_of,
    check_once,
    once,
    resolve,
)
from foundation_nats.base.clock import utc_now
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ConfigError
from foundation_nats.node.blackbox import STARTING
from foundation_nats.signaling.schedules import Timer, check_timer_name, timer_of
from foundation_schemas import FamilyRecord, ParentLink, RestartLimit, Subscription, Target
from foundation_schemas.base import check_name

if typing.TYPE_CHECKING:
    from foundation_nats.agent.kin import Nursery, Parent
    from foundation_nats.agent.owner import AnyAgent
    from foundation_nats.agent.sensors.sensor import Sensor
    from foundation_nats.bus.connection import Bus
    from foundation_nats.bus.subjects import Subjects
    from foundation_nats.consensus.replicas import Replicas

R = TypeVar("R")
_NO_FAMILY = FamilyRecord()
_UNSUPERVISED = Supervision()


@dataclass(frozen=True, slots=True)
class Emission:
    """What a handler asked to be sent, once its effects are stored."""

    target: Target
    type: str
    data: Any
    deadline: str | None = None
    timer: Timer | None = None
    """For later; its `generation` is given when it is stored."""
    name: str = ""
    """Of the timer."""
    event: str = ""
    """It is no signal but an event of this kind, ``agent.<event>``; `type` is its message."""
    attempts: int | None = None
    """How often its receiver tries; None: as its node is set."""
    on_error: str = ""
    """The type of the signal that comes back if it is given up."""
    urgent: bool = False
    """It overtakes what waits at its receiver and is not."""

    @property
    def value(self) -> Any:
        """The data, as the receiver gets it."""
        return orjson.loads(orjson.dumps(self.data))

    def with_data(self, data: Any) -> Emission:
        """The same with other data.

        Raises:
            TypeError: it is not JSON.
        """
        return replace(self, data=freeze(data))


class Context:
    """What a handler may know and call besides its state."""

    __slots__ = (
        "_consensus",
        "_emissions",
        "_family",
        "_family_kept",
        "_gauges",
        "_guards",
        "_home",
        "_keys",
        "_link",
        "_nursery",
        "_offload",
        "_owner",
        "_runs",
        "_sensor_orders",
        "_stop_reason",
        "_supervision",
        "agent_id",
        "bus",
        "config",
        "epoch",
        "node",
        "signal",
        "subjects",
    )
    bus: Bus
    """With `subjects`: for the patterns of `foundation_nats.coordination`, as in ``lock(self.ctx, …)``;
    effects of those are outside (P8). Not there in plain tests."""
    subjects: Subjects

    def __init__(
        self, agent_id: str, *, config: dict[str, Any] | None = None, node: str = "", epoch: int = 0
    ) -> None:
        self.agent_id = agent_id
        self.config = config or {}
        self.node = node
        self.epoch = epoch
        self.signal: Signal[Any] | None = None
        """The signal in hand."""
        self._emissions: list[Emission] = []
        self._keys = 0
        self._owner: ReferenceType[AnyAgent] | None = None
        self._runs: dict[str, int] | None = None
        self._stop_reason: str | None = None
        self._gauges: dict[str, float] = {}
        self._consensus: Replicas | None = None
        self._guards: Guards | None = None
        self._offload: Offload | None = None
        self._home: StepHome | None = None
        self._sensor_orders: list[Sensor | str] | None = None
        self._family = self._family_kept = _NO_FAMILY
        self._link: ParentLink | None = None
        self._nursery: Nursery | None = None
        self._supervision = _UNSUPERVISED

    @property
    def _agent(self) -> AnyAgent | None:
        """Whose context it is; weakly, or an agent that sleeps or ends would keep its memory till a full collection."""
        return None if self._owner is None else self._owner()

    @_agent.setter
    def _agent(self, agent: AnyAgent) -> None:
        self._owner = ref(agent)

    @property
    def idempotency_key(self) -> str:
        """A key for an effect outside NATS, equal at every retry of the signal in hand.

        Each reading within one handler gives the next key: ``<agent>.<signal>.<n>``.
        Such effects are at least once (P8); a peer that honours the key makes them once.
        """
        self._keys += 1
        cause = self.signal.id if self.signal is not None else f"start-{self.epoch}"
        return f"{self.agent_id}.{cause}.{self._keys}"

    def now(self) -> datetime:
        """The wall clock, in UTC; differs between retries."""
        return utc_now()

    @property
    def random(self) -> random.Random:
        """Randomness that repeats at every retry of the signal in hand."""
        cause = self.signal.id if self.signal is not None else f"start-{self.epoch}"
        return random.Random(f"{self.agent_id}.{cause}")

    @property
    def consensus(self) -> AgentConsensus:
        """The cluster's replicated domains; `propose` takes effect once for the signal in hand.

        Raises:
            ConfigError: there is no cluster, as in a plain test.
        """
        if self._consensus is None:
            raise ConfigError(
                "There are no replicated domains here: this agent runs without a cluster.",
                hint="Use a TestCluster for what proposes.",
            )
        return AgentConsensus(self, self._consensus)

    async def once(
        self,
        key: str,
        function: Callable[..., Any],
        *args: Any,
        on_doubt: str = Doubt.RERUN,
        verify: Callable[..., Any] | None = None,
        returns: Any = None,
        scope: str = "signal",
    ) -> Any:
        """Do something outside NATS that must not be repeated: ``await self.ctx.once("pay", pay, 5)``.

        Before *function* is called, ``pending`` is stored in the agent's record; after it,
        ``done`` with what it returned. When the handler is tried again, on whatever node, a step
        that is done returns what is stored. One that is pending was interrupted, or has raised:
        then *on_doubt* says what to do.

        It is called with *args*, and with ``idempotency_key=`` if it takes that: the same at each
        attempt, for the other side to recognise a repeat by. A plain function runs in a thread.
        Steps of one handler may run side by side (``asyncio.gather``); their keys must differ.

        Args:
            on_doubt: ``rerun``: call it again. ``verify``: call *verify* with the same arguments,
                which returns the result, or raises `StepNotDoneError`. ``fail``: the signal becomes
                a dead letter, for a person to look (`foundation steps`).
            returns: the type of the result; None: as *function* is annotated, else plain JSON.
            scope: ``signal``: forgotten when the signal in hand has taken effect. ``agent``: until
                `forget`; the key is then unique for all the agent does.

        Raises:
            StepInDoubtError: with ``fail``, and it is not known whether it was done.
            StepTooLargeError: it is done, and its result can't be kept.
            ConfigError: an argument is wrong, or what it returned is no JSON.

        What *function* raises is raised. If it is sure that nothing happened it raises
        `StepNotDoneError`, and the step is as if it had never begun. To cancel leaves it pending.
        """
        policy = check_once(key, on_doubt, verify, scope)
        cause = "" if scope == "agent" else self._step_cause
        name = Idempotent(self.agent_id, cause, key)
        return await once(
            self._steps_home, name, function, args, on_doubt=policy, verify=verify, returns=returns
        )

    async def forget(self, key: str) -> bool:
        """Drop a step of ``scope="agent"``, so that it may be done again; whether there was one."""
        home = self._steps_home
        found = home.steps.forget("", key)
        if found:
            await home.store_steps()
        return found

    @property
    def _steps_home(self) -> StepHome:
        if self._home is None:
            raise ConfigError("a step can only be done by a handler of a running agent")
        return self._home

    @property
    def _step_cause(self) -> str:
        signal = self.signal
        if signal is None:
            return f"start-{self.epoch}"
        return cause_of(signal.source, signal.id)

    async def _resolve_step(
        self, key: str, signal: str | None, *, done: bool, result: Any
    ) -> dict[str, Any]:
        home = self._steps_home
        step = resolve(home.steps, key, signal, done=done, result=result)
        await home.store_steps()
        return step.encoded()

    async def run(self, what: Any, params: Any = None) -> Any:
        """Run an action within the handler in hand: ``await self.ctx.run(Refund, {"amount": 5})``.

        Params and result are validated, and it is tried again as the action says. What it changes and
        emits is part of this handler's commit. Its steps (``ctx.once``) are steps of the signal in hand:
        the handler must run the same actions in the same order when it is tried again.

        Args:
            what: an `Action` (the class, or an instance), a `Plan`, an `Instruction`, or the name of
                one of this agent's actions.

        Raises:
            ActionInvalidError: params or result don't fit.
            ActionNotFoundError: there is no action of that name.
            PlanFailedError: a step of the plan has failed, and all before it is undone.
            ActionError: the action has failed for the last time.
        """
        from foundation_nats.agent.actions.running import run_in

        if self._agent is None:
            raise ConfigError("an action can only be run by a handler; elsewhere take `run_action`")
        return await run_in(self, self._agent, what, params)

    async def run_blocking(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call a blocking function in a thread of this worker, so that other agents go on.

        It sees a copy of the context variables. At most `worker.threads_max` run at a time, more
        wait. A time-out (``asyncio.timeout``) ends the waiting, not the thread: it runs on, and
        what it returns is dropped. For what keeps the processor busy take `run_process`.

        Raises:
            TypeError: *function* is a coroutine function.
        """
        signal = self.signal
        sequence = STARTING if signal is None else signal.sequence or 0
        return await self._workshop.call_in_thread(self.agent_id, sequence, function, args, kwargs)

    async def run_process(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Call a function in another process, so that no other agent waits for the processor.

        The function must be at the top of a module; it, its arguments and its result are pickled.
        At most `worker.processes_max` run at a time, more wait; each is kept for the next call.
        Cancelled, or with a time-out (``asyncio.timeout``), it ends with its process.

        Raises:
            TypeError: something can't be pickled; names it.
            ProcessCrashedError: the process has ended; the next call gets another.
        """
        return await self._workshop.run_process(function, *args, **kwargs)

    @property
    def _workshop(self) -> Offload:
        if self._offload is None:
            self._offload = Offload()
        return self._offload

    def schedule(
        self,
        type: str,
        data: Any = None,
        *,
        to: str | Target | None = None,
        name: str | None = None,
        at: datetime | str | None = None,
        after: float | timedelta | None = None,
        every: float | timedelta | None = None,
        cron: str | None = None,
        zone: str = "UTC",
        ttl: float | None = None,
    ) -> str:
        """Send a signal later, once or again and again; stored together with the state.

        To this agent itself unless *to* says otherwise. It outlives this activation, and the
        agent. A later timer of the same *name* replaces this one. Returns the name.

        Args:
            at, after, every, cron: when; one of them, or *every* with a first time.
            zone: in which *cron* is meant.
            ttl: so many seconds after each firing it may still be handled.

        Raises:
            ValueError: an argument is wrong; says which.
            TypeError: *data* is not JSON.
        """
        timer = timer_of(self.now(), at=at, after=after, every=every, cron=cron, zone=zone, ttl=ttl)
        target = as_target(f"agent:{self.agent_id}" if to is None else to)
        if name is None:
            seed = f"{self._cause}\n{len(self._emissions)}".encode()
            name = blake2b(seed, digest_size=8).hexdigest()
        name = check_timer_name(name)
        self._emissions.append(
            Emission(target, checked_type(type), freeze(data), timer=timer, name=name)
        )
        return name

    def cancel(self, name: str) -> None:
        """End the timer *name* of this agent, together with the state; one that is firing may still come."""
        timer = Timer(self.now(), is_cancel=True)
        target = as_target(f"agent:{self.agent_id}")
        self._emissions.append(
            Emission(target, "cancel", None, timer=timer, name=check_timer_name(name))
        )

    @property
    def _cause(self) -> str:
        return self.signal.id if self.signal is not None else f"start-{self.epoch}"

    def breaker(
        self,
        name: str,
        *,
        failures: int = 5,
        window_s: float = 30.0,
        pause_s: float = 5.0,
        probes: int = 1,
    ) -> Guard:
        """A circuit breaker for calls to the outside: ``async with self.ctx.breaker("mail"): …``.

        After *failures* within *window_s* it raises `BreakerOpenError` at once for *pause_s*, then lets
        *probes* calls through. Shared by name in this worker; set where it is first used.

        Raises:
            ConfigError: a number is wrong.
        """
        return self._shared.breaker(
            name, failures=failures, window_s=window_s, pause_s=pause_s, probes=probes
        )

    def limiter(self, name: str, *, rate: float, burst: float | None = None) -> Limiter:
        """A limit of *rate* calls a second in this worker: ``await self.ctx.limiter(…).wait(timeout=1)``.

        Raises:
            ConfigError: a number is wrong.
        """
        return self._shared.limiter(name, rate=rate, burst=burst)

    def bulkhead(self, name: str, *, limit: int, wait_s: float = 5.0) -> Bulkhead:
        """At most *limit* at once in this worker: ``async with self.ctx.bulkhead("db", limit=4): …``.

        Raises:
            ConfigError: *limit* is below 1.
        """
        return self._shared.bulkhead(name, limit=limit, wait_s=wait_s)

    async def retrying(
        self,
        function: Callable[[], Awaitable[R]],
        *,
        attempts: int = 3,
        first_s: float = 0.1,
        most_s: float = 10.0,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> R:
        """Await *function* again while it raises *on*, with doubling pauses and jitter.

        The mailbox waits meanwhile. The error of the last attempt, or of an open breaker, is raised.
        """
        return await retrying(function, attempts=attempts, first_s=first_s, most_s=most_s, on=on)

    @property
    def _shared(self) -> Guards:
        if self._guards is None:
            self._guards = Guards()
        return self._guards

    def gauge(self, name: str, value: float) -> None:
        """Say how much of something there is now, such as work in hand; for autoscaling.

        Kept in memory until it is set again; not stored, and not undone with a handler.
        """
        self._gauges[name] = float(value)

    def report(self, what: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        """Have the event ``agent.<what>`` stored together with the state: for people, not for agents.

        `foundation events` and `foundation why` show it.

        Raises:
            ValueError: *what* is no name.
            TypeError: *data* is not JSON.
        """
        target = as_target(f"agent:{self.agent_id}")
        self._emissions.append(
            Emission(target, message, freeze(dict(data or {})), event=check_name(what))
        )

    def stop(self, reason: str = "stopped by itself") -> None:
        """Stop this agent after the signal in hand; a permanent one is started again."""
        self._stop_reason = reason

    def spawn(
        self,
        run: Any,
        *,
        tag: str | None = None,
        id: str | None = None,
        config: Mapping[str, Any] | None = None,
        on_parent_death: str = "stop",
        restart: str = "transient",
        restart_limit: RestartLimit | Mapping[str, Any] | None = None,
        place: str = "cluster",
        critical: bool | None = None,
        durable: bool | None = None,
        capabilities: Collection[str] = (),
        resources: Mapping[str, float] | None = None,
        placement: Mapping[str, Any] | None = None,
        on_node_loss: str | dict[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        subscribe: Collection[str | Subscription] = (),
    ) -> str:
        """Have a child: an agent that the cluster runs once the effects of the signal in hand are stored.

        Returns its id, to which signals can be sent at once. It is had once, whatever crashes in
        between, and not at all if the handler raises. To spawn a *tag* that is there changes
        nothing; with other arguments the child is restarted with them.

        Args:
            run: the class, or ``"module:Class"``.
            tag: what this agent calls it; its *id*, or a number, unless given.
            id: ``PARENT_TAG`` unless given. Its state is kept under that name: a child that has
                ended and is spawned again goes on from it.
            on_parent_death: when this agent has ended for good: ``stop``, ``continue``, or
                ``emit_orphan``: go on, and be sent ``foundation.orphaned``.
            restart: ``permanent``; ``transient``: not after it stopped itself; ``temporary``: never.
            restart_limit: ``{"max_restarts": 10, "within_s": 60}``: more, and it has failed for good.
            place: ``local``: on the node of this agent, wherever that goes.

        When it runs, this agent is sent ``foundation.child.started``; when it has ended for good,
        ``foundation.child.exited`` (`ChildStarted`, `ChildExited`).

        Raises:
            ConfigError: an argument is wrong.
        """
        from foundation_nats.agent.kin import spawn

        spec = {
            "config": config,
            "critical": critical,
            "durable": durable,
            "capabilities": sorted(capabilities),
            "resources": resources,
            "placement": placement,
            "on_node_loss": on_node_loss,
            "labels": labels,
            "subscribe": list(subscribe),
        }
        return spawn(
            self,
            run,
            tag=tag,
            id=id,
            on_parent_death=on_parent_death,
            restart=restart,
            restart_limit=restart_limit,
            place=place,
            spec=spec,
        )

    def stop_child(self, tag: str, reason: str = "stopped by its parent") -> bool:
        """Have a child no more; whether there is one. ``foundation.child.exited`` says when it has ended."""
        from foundation_nats.agent.kin import stop_child

        return stop_child(self, tag, reason)

    def adopt(self, id: str, *, tag: str | None = None, on_parent_death: str = "stop") -> str:
        """Make an agent a child that was started by itself, or whose parent has ended; returns its tag.

        It is restarted once, to know its parent. If it has a living one, or there is no such
        agent, ``foundation.child.exited`` says ``refused``.

        Raises:
            ConfigError: an argument is wrong.
        """
        from foundation_nats.agent.kin import adopt

        return adopt(self, id, tag, on_parent_death)

    def children(self) -> dict[str, Child]:
        """Its children by tag, in the order in which they were started; those that are ending, too."""
        return children_of(self._family)

    @property
    def parent(self) -> Parent | None:
        """Who has spawned this agent; None: nobody."""
        from foundation_nats.agent.kin import Parent

        link = self._link
        return None if link is None else Parent(link.id, link.tag, self._family.orphaned)

    def start_sensor(self, sensor: Sensor) -> None:
        """Run a sensor beside the declared ones, once the effects of the signal in hand are stored.

        It replaces one of its name, and ends with this activation: what shall always run is declared,
        or started in `on_start`.
        """
        self._sensor_orders = [*(self._sensor_orders or ()), sensor]

    def stop_sensor(self, name: str) -> None:
        """End the sensor of this name, once the effects of the signal in hand are stored."""
        self._sensor_orders = [*(self._sensor_orders or ()), name]

    def _begin(self, signal: Signal[Any] | None) -> None:
        self.signal = signal
        self._family = self._family_kept
        self._sensor_orders = None
        self._emissions = []
        self._keys = 0
        self._runs = None


def as_target(to: str | Target) -> Target:
    """Read a target.

    Raises:
        ValueError: it is none.
    """
    return to if isinstance(to, Target) else Target.parse(to)


def checked_type(type: str) -> str:
    """Return *type* if it can be a signal's.

    Raises:
        ValueError: it can't.
    """
    if not type or any(c.isspace() for c in type):
        raise ValueError(f"{type!r} is not a signal type")
    return type


def freeze(data: Any) -> Any:
    """The data as it is now, as JSON.

    Raises:
        TypeError: it is not JSON.
    """
    return orjson.Fragment(to_json(data))
