"""`AgentHarness`: one agent in a unit test, without a server: feed it signals, see what it did.

No IO. It keeps the promises that an agent has from its runtime: payloads are validated,
a handler that raises leaves no trace and is tried again, state is checked and stored as JSON
after every signal, emitted signals leave only with the state that caused them, a signal with a
known id has no second effect, and a crash loses what was not stored. So a test that passes here
passes on a cluster, as far as one agent alone can tell.

Time stands still but for `advance`, which fires timers. Not here: other agents, placement,
time-outs, limits of size, and what only processes can do to each other. Retries don't wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from secrets import token_hex
from typing import Any, Generic, TypeVar

import orjson

from foundation_nats.agent.agent import Agent, begin, end
from foundation_nats.agent.context import Context, Emission
from foundation_nats.agent.directives import apply_result, are_directives
from foundation_nats.agent.failing import handler_error
from foundation_nats.agent.handling import handlings, is_notice, unhandled, validated
from foundation_nats.agent.kin import announce, hear, is_of_kin, join
from foundation_nats.agent.middleware import layered, outgoing
from foundation_nats.agent.offload import Offload
from foundation_nats.agent.sensors.sensor import Event, Sensor
from foundation_nats.agent.signal import Payload, Signal, typed
from foundation_nats.agent.state import dump_state, first_state, load_state, restore_state
from foundation_nats.agent.steps import StepLedger
from foundation_nats.agent.streaming import Ended, collected
from foundation_nats.base.clock import utc_now, utc_text
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import (
    AgentUnavailableError,
    AskTimeoutError,
    BudgetError,
    FoundationError,
    HandlerError,
    PayloadInvalidError,
    PlanFailedError,
    StepInDoubtError,
    StepTooLargeError,
    TransitionError,
    UnhandledSignalError,
)
from foundation_nats.signaling.schedules import Timer
from foundation_nats.testing.kin import Playground
from foundation_nats.testing.sensing import UNSET, Sensing
from foundation_schemas import (
    Deployment,
    FamilyRecord,
    ParentLink,
    RecoveredFrom,
    StepRecord,
    StepStatus,
)

A = TypeVar("A", bound=Agent)
_ATTEMPTS = 4
_READY_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Emitted:
    """A signal that the agent has sent."""

    type: str
    data: Any
    to: str
    """As a target: ``agent:ID``, ``capability:NAME`` …"""
    cause: str | None
    """The id of the signal that was handled."""
    timer: str | None = None
    """The name, if it is sent later (`ctx.schedule`); a cancelled one has the type ``cancel``."""
    due: datetime | None = None
    """When it is sent first."""
    attempts: int | None = None
    on_error: str = ""
    urgent: bool = False
    deadline: str | None = None
    """After it, it is not handled."""


@dataclass(frozen=True, slots=True)
class Reported:
    """An event that the agent has reported."""

    what: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dead:
    """A signal that was given up."""

    id: str
    type: str
    error: FoundationError
    attempts: int


@dataclass(slots=True)
class _Stored:
    """What the store would hold."""

    state: bytes
    version: int = 1
    applied: set[str] = field(default_factory=set)
    steps: bytes = b"[]"
    family: bytes = b"{}"
    timers: dict[str, _Armed] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Armed:
    """A timer that the broker would hold."""

    timer: Timer
    target: str
    type: str
    data: Any
    cause: str | None


class CrashPoint(StrEnum):
    """Where in a step of `ctx.once` an activation can be made to end."""

    BEGUN = "begun"
    """It is stored as pending; nothing has happened yet."""
    HAPPENED = "happened"
    """Its effect has happened, and nobody knows."""
    DONE = "done"
    """It is stored as done; the handler goes no further."""


async def _into(items: asyncio.Queue[Any], generator: AsyncGenerator[Any, None]) -> Ended:
    """Hand over each item, as the asker gets it."""
    async with aclosing(generator):
        async for item in generator:
            await items.put(orjson.loads(to_json(item)))
    return Ended()


class _Crashed(BaseException):
    """The activation is gone in the middle of a handler."""


class _Home:
    """Keeps the step ledger of one activation; see `StepHome`."""

    def __init__(self, stored: _Stored, crashes: dict[str, CrashPoint]) -> None:
        self._stored = stored
        self._crashes = crashes
        self.steps = StepLedger(
            StepRecord.model_validate(item) for item in orjson.loads(stored.steps)
        )

    def save(self) -> None:
        """Store the ledger together with what else is stored."""
        self._stored.steps = orjson.dumps(self.steps.encoded())

    async def store_steps(self) -> None:
        point = next(
            (
                (key, wanted)
                for key, wanted in self._crashes.items()
                for step in self.steps.find(key, None)
                if (step.status is StepStatus.PENDING) == (wanted is CrashPoint.BEGUN)
            ),
            None,
        )
        if point is None or point[1] is not CrashPoint.HAPPENED:
            self.save()
        if point is not None:
            del self._crashes[point[0]]
            raise _Crashed


class HarnessContext(Context):
    """With the harness's clock."""

    __slots__ = ("_clock",)
    _clock: Callable[[], datetime]

    def now(self) -> datetime:
        return self._clock()


class AgentHarness(Generic[A]):
    """An activation of *cls*, to be used with ``async with`` or by `start` and `stop`.

    Args:
        id: the agent's name.
        config: as in a manifest.
        state: what an earlier activation left; None: it is new.
        parent: whose child it is, as `ctx.parent` says.

    Example:
        >>> async with AgentHarness(Counter, id="visits") as agent:
        ...     assert await agent.ask("counter.add", {"amount": 3}) == 3
        ...     await agent.crash()
        ...     assert agent.state.total == 3
    """

    def __init__(
        self,
        cls: type[A],
        *,
        id: str = "agent",
        config: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
        parent: str | None = None,
    ) -> None:
        self._link = None if parent is None else ParentLink(id=parent, tag=id, order=1)
        self._kin = Playground()
        self._cls = cls
        self._id = id
        self._config = config
        self._handlings = handlings(cls)
        first = first_state(cls.State) if state is None else load_state(cls.State, state)
        self._stored = _Stored(dump_state(first), cls.State.version)
        self._crashes: dict[str, CrashPoint] = {}
        self._offload = Offload()
        self.now = utc_now()
        """The agent's clock, which stands still but for `advance`."""
        self._sensing = Sensing(self._sensed, lambda: self.now)
        self._epoch = 0
        self._agent: A | None = None
        self._sequence = 0
        self.emitted: list[Emitted] = []
        """All that left the agent, in order; clear it when you like."""
        self.events: list[Reported] = []
        """What it has reported (`ctx.report`)."""
        self.dead: list[Dead] = []
        self.stopped: str | None = None
        """Why it stopped itself (`ctx.stop`), if it did."""

    _context_kind: type[HarnessContext] = HarnessContext

    # ---- life -------------------------------------------------------------------

    async def start(self, recovered_from: RecoveredFrom | None = None) -> None:
        """Begin an activation: `on_start`, then `ready`.

        Raises:
            HandlerError: `on_start` or `ready` raised, or it does not get ready.
            StateInvalidError: the state that it leaves does not fit.
        """
        self._epoch += 1
        self.stopped = None
        agent = self._cls()
        agent.ctx = context = self._context_kind(
            self._id, config=self._config, node="test", epoch=self._epoch
        )
        context._agent = agent
        context._clock = lambda: self.now
        context._offload = self._offload
        context._home = self._home = _Home(self._stored, self._crashes)
        if not agent.durable and self._epoch > 1:
            self._stored.state = dump_state(first_state(self._cls.State))
        agent.state = load_state(self._cls.State, self._stored.state)
        family = FamilyRecord.model_validate_json(self._stored.family)
        join(agent, self._link, family, self._kin)
        agent.ctx._begin(None)
        try:
            await begin(agent, recovered_from)
            announce(agent)
            self._home.steps.settle(agent.ctx._step_cause)
            self._commit(agent, None)
            for _ in range(_READY_TRIES):
                if await agent.ready():
                    break
                await asyncio.sleep(0)
            else:
                raise HandlerError("It does not get ready.")
        except FoundationError:
            raise
        except Exception as error:
            raise handler_error(error, "on_start raised ") from error
        self._agent = agent
        self._sensing.begin(agent)
        await self._settle()

    async def stop(self, reason: str = "stopped") -> None:
        """Stop it in good order: `on_stop`, whose effects are kept."""
        agent = self._running()
        agent.ctx._begin(None)
        try:
            await end(agent, reason)
            self._commit(agent, None)
        finally:
            self._agent = None
            self._sensing.end()
            self._offload.close()

    async def crash(self) -> None:
        """Lose the activation without a word, and recover from what was stored."""
        self._running()
        self._agent = None
        await self.start(RecoveredFrom(node="test", epoch=self._epoch, reason="worker_died"))

    async def hibernate(self) -> None:
        """Put it to sleep and wake it, as a cluster does when it had nothing to do."""
        await self.stop("hibernated")
        origin = RecoveredFrom(node="test", epoch=self._epoch, reason="hibernated")
        self._epoch -= 1  # under the same epoch
        await self.start(origin)

    def crash_in_step(self, key: str, point: CrashPoint | str = CrashPoint.HAPPENED) -> None:
        """Let the next step *key* of `ctx.once` end the activation at *point*.

        It recovers as a cluster would: the signal in hand is delivered again, a question is not.
        """
        self._crashes[key] = CrashPoint(point)

    async def advance(self, seconds: float) -> None:
        """Let time pass: timers that come due are fired, in order, each at its moment.

        Those to the agent itself are delivered as signals, others are in `emitted`. The same for
        sensors that go by the clock: `Timer` and `Cron`.
        """
        end = self.now + timedelta(seconds=seconds)
        while True:
            sensed = self._sensing.due()
            timers = [item.timer.due for item in self._stored.timers.values()]
            if sensed is not None and sensed <= min([*timers, end]):
                self.now = max(self.now, sensed)
                await self._sensing.fire()
                continue
            if not timers:
                break
            name, armed = min(self._stored.timers.items(), key=lambda item: item[1].timer.due)
            if armed.timer.due > end:
                break
            self.now = max(self.now, armed.timer.due)
            del self._stored.timers[name]
            if armed.timer.repeats:
                timer = replace(armed.timer, due=armed.timer.after(armed.timer.due))
                self._stored.timers[name] = replace(armed, timer=timer)
            if armed.target == f"agent:{self._id}" and self._agent is not None:
                await self.send(armed.type, armed.data, source=f"agent:{self._id}")
            else:
                self.emitted.append(Emitted(armed.type, armed.data, armed.target, armed.cause))
        self.now = end

    async def sense(self, name: str, data: Any = UNSET) -> bool:
        """Let one of the agent's sensors emit *data* (or an `Event`); returns as `send`.

        Without *data* it is what the sensor senses first, for real but for its `here.sleep`.

        Raises:
            ConfigError: there is no such sensor, or it senses nothing.
        """
        self._running()
        return await self._sensing.sense(name, data)

    async def _sensed(self, sensor: Sensor, event: Event) -> bool:
        type_ = event.type or sensor.type
        if sensor.target is not None and str(sensor.target) != f"agent:{self._id}":
            data = orjson.loads(to_json(event.data))
            self.emitted.append(Emitted(type_, data, str(sensor.target), None))
            return True
        source = f"sensor:{self._id}/{sensor.name}"
        known = None if event.id is None else f"{source}/{event.id}"
        return await self.send(type_, event.data, id=known, source=source)

    async def __aenter__(self) -> AgentHarness[A]:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._agent is not None:
            await self.stop()

    # ---- children ---------------------------------------------------------------

    @property
    def children(self) -> dict[str, Deployment]:
        """What was wished for by `ctx.spawn` and has not ended: id to the wish."""
        return dict(self._kin.children)

    def refuse_child(self, id: str, reason: str) -> None:
        """Have no child of this id from now on: the agent hears ``foundation.child.exited``, ``refused``."""
        self._kin.refused[id] = reason

    async def child_started(self, tag: str) -> bool:
        """Let a child say that it runs; returns as `send`."""
        return await self.send(*self._kin.started(self._family, tag), source="cluster")

    async def child_exited(self, tag: str, status: str = "stopped", reason: str = "") -> bool:
        """Let a child end for good, by itself or as it was told; returns as `send`."""
        said = self._kin.exited(self._family, tag, status, reason)
        return await self.send(*said, source="cluster")

    @property
    def _family(self) -> FamilyRecord:
        return self._running().ctx._family_kept

    # ---- what it holds ----------------------------------------------------------

    @property
    def agent(self) -> A:
        """The activation, to look into."""
        return self._running()

    @property
    def state(self) -> Any:
        """What is stored: a copy of the agent's `State`, also while it does not run."""
        return load_state(self._cls.State, self._stored.state)

    @property
    def steps(self) -> list[StepRecord]:
        """What is stored of its steps (`ctx.once`): those of signals that did not take effect yet."""
        return [StepRecord.model_validate(item) for item in orjson.loads(self._stored.steps)]

    def _running(self) -> A:
        if self._agent is None:
            raise AgentUnavailableError(f"Agent {self._id} is not running.", id=self._id)
        return self._agent

    # ---- signals ----------------------------------------------------------------

    async def send(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        id: str | None = None,
        source: str = "client:test",
    ) -> bool:
        """Deliver a durable signal: its effects are stored, or it is in `dead`.

        Returns whether it took effect; False for a repeated *id*, and for a dead letter.
        """
        self._running()
        type, data = typed(type, data)
        signal_id = id or token_hex(8)
        if signal_id in self._stored.applied:
            return False
        self._stored.applied.add(signal_id)
        self._sequence += 1
        error: FoundationError | None = None
        attempt = 0
        while attempt < _ATTEMPTS:
            attempt += 1
            try:
                await self._handle(
                    self._running(),
                    type,
                    data,
                    signal_id,
                    source,
                    sequence=self._sequence,
                    attempt=attempt,
                )
            except _Crashed:
                self._agent = None
                await self.start(RecoveredFrom(node="test", epoch=self._epoch, reason="crashed"))
                attempt = 0
            except (
                UnhandledSignalError,
                PayloadInvalidError,
                BudgetError,
                PlanFailedError,
                StepInDoubtError,
                StepTooLargeError,
                TransitionError,
            ) as found:
                error = found
                break
            except FoundationError as found:
                error = found
            else:
                await self._settle()
                return True
        assert error is not None
        self._home.save()
        self.dead.append(Dead(signal_id, type, error, attempt))
        return False

    async def ask(
        self, type: str | Payload, data: Any = None, *, source: str = "client:test"
    ) -> Any:
        """Ask, and return the reply as the asker gets it: as JSON, after the effects are stored.

        Raises:
            UnhandledSignalError, PayloadInvalidError, HandlerError: as `Cluster.ask` does.
            StateInvalidError: the handler left a state that does not fit; nothing was kept.
        """
        type, data = typed(type, data)
        try:
            result = await self._handle(self._running(), type, data, token_hex(8), source)
        except _Crashed:
            self._agent = None
            await self.start(RecoveredFrom(node="test", epoch=self._epoch, reason="crashed"))
            raise AskTimeoutError(f"{self._id} crashed while it was asked.") from None
        await self._settle()
        return orjson.loads(to_json(result))

    async def ask_stream(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        source: str = "client:test",
        window: int = 64,
    ) -> AsyncGenerator[Any, None]:
        """Ask a handler that is a generator, and iterate over its items, as `Cluster.ask_stream`.

        Its effects are stored when it ends; `aclose` ends it early, and nothing is kept.

        Raises:
            UnhandledSignalError, PayloadInvalidError, HandlerError: as `Cluster.ask_stream` does.
        """
        type, data = typed(type, data)
        items: asyncio.Queue[Any] = asyncio.Queue(window)
        work = asyncio.ensure_future(
            self._handle(self._running(), type, data, token_hex(8), source, items=items)
        )
        count = 0
        try:
            while not (work.done() and items.empty()):
                taking = asyncio.ensure_future(items.get())
                await asyncio.wait({taking, work}, return_when=asyncio.FIRST_COMPLETED)
                if taking.done():
                    count += 1
                    yield taking.result()
                else:
                    taking.cancel()
            answered = work.result()
        except _Crashed:
            self._agent = None
            await self.start(RecoveredFrom(node="test", epoch=self._epoch, reason="crashed"))
            raise AskTimeoutError(f"{self._id} crashed while it was asked.") from None
        finally:
            work.cancel()
            await asyncio.wait({work})
        if not isinstance(answered, Ended):
            yield orjson.loads(to_json(answered))
        await self._settle()

    async def _handle(
        self,
        agent: A,
        type_: str,
        data: Any,
        id: str,
        source: str,
        *,
        sequence: int = 0,
        attempt: int = 1,
        items: asyncio.Queue[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Any:
        # As it comes over the wire: models become plain values, what is no JSON is refused.
        data = orjson.loads(to_json(data))
        handling = self._handlings.find(type_, {"id": id, "source": source, "data": data})
        if handling is None and not is_notice(type_):
            raise unhandled(self._cls, self._id, type_)
        signal: Signal[Any] = Signal(
            id=id,
            source=source,
            type=type_,
            data=validated(handling, type_, data),
            sequence=sequence,
            attempt=attempt,
            **(extra or {"time": utc_text()}),
        )
        agent.ctx._begin(signal)
        try:
            if is_of_kin(type_) and not hear(agent, signal):
                self._commit(agent, signal)
                return None
            if handling is not None and agent._layers:
                handling = layered(handling, agent._layers)
            if handling is None:
                is_cluster = type_.startswith("cluster.")
                result = await agent.handle_cluster_signal(signal) if is_cluster else None
            elif handling.is_async:
                result = await handling.function(agent, signal)
            else:
                result = handling.function(agent, signal)
            if isinstance(result, AsyncGenerator):
                result = await (collected(result) if items is None else _into(items, result))
            if are_directives(result):
                result = apply_result(agent, result)
            self._home.steps.settle(agent.ctx._step_cause)
            self._commit(agent, signal)
        except BaseException as error:
            agent.state = restore_state(agent.state, self._stored.state)
            agent.ctx._emissions = []
            agent.ctx._family = agent.ctx._family_kept
            if isinstance(error, FoundationError) or not isinstance(error, Exception):
                raise
            raise handler_error(error) from error
        return result

    def _commit(self, agent: A, signal: Signal[Any] | None) -> None:
        """Store the state and let what was emitted go, together."""
        if agent._layers:
            agent.ctx._emissions = outgoing(agent._layers, agent, agent.ctx._emissions)
        self._stored.state = dump_state(agent.state)
        agent.ctx._family_kept = agent.ctx._family
        self._stored.family = agent.ctx._family.model_dump_json(exclude_defaults=True).encode()
        self._home.save()
        # As the next activation would read it: what does not survive JSON shows at once.
        load_state(self._cls.State, self._stored.state)
        self.emitted += [
            Emitted(
                emission.type,
                orjson.loads(orjson.dumps(emission.data)),
                str(emission.target),
                None if signal is None else signal.id,
                emission.name or None,
                None if emission.timer is None else emission.timer.due,
                emission.attempts,
                emission.on_error,
                emission.urgent,
                emission.deadline,
            )
            for emission in agent.ctx._emissions
            if not emission.event
        ]
        self.events += [
            Reported(emission.event, emission.type, emission.value)
            for emission in agent.ctx._emissions
            if emission.event
        ]
        for emission in agent.ctx._emissions:
            self._arm(emission, signal)
        agent.ctx._emissions = []
        self._sensing.commit(agent)

    def _arm(self, emission: Emission, signal: Signal[Any] | None) -> None:
        timer = emission.timer
        if timer is None:
            return
        self._stored.timers.pop(emission.name, None)
        if not timer.is_cancel:
            self._stored.timers[emission.name] = _Armed(
                timer,
                str(emission.target),
                emission.type,
                orjson.loads(orjson.dumps(emission.data)),
                None if signal is None else signal.id,
            )

    async def _settle(self) -> None:
        """What comes by itself after a commit: what the agent tells itself, and its end."""
        while self._agent is not None:
            own = next(
                (
                    item
                    for item in self.emitted
                    if item.type.startswith("foundation.")
                    and item.to == f"agent:{self._id}"
                    and item.timer is None
                ),
                None,
            )
            if own is None:
                break
            self.emitted.remove(own)
            await self.send(own.type, own.data, source=f"agent:{self._id}")
        if self._agent is not None:
            await self._stop_itself()

    async def _stop_itself(self) -> None:
        reason = self._running().ctx._stop_reason
        if reason is not None:
            self.stopped = reason
            await self.stop(reason)

    def take(self, type: str | None = None) -> list[Emitted]:
        """What was emitted since the last call (of *type* alone, if given), and forget it."""
        taken = [item for item in self.emitted if type in (None, item.type)]
        self.emitted = [item for item in self.emitted if item not in taken]
        return taken


__all__ = ["AgentHarness", "CrashPoint", "Dead", "Emitted"]
