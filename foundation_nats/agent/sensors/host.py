"""`SensorHost`: runs the sensors of one activation, and stores what they emit by the activation's own commit.

What a sensor emits goes into the agent's outbox, and the record that holds it is written by the same
compare-and-set under the same epoch as everything else the agent does; then it is published to its
mailbox. Hence:

- **Exactly one.** Of several activations of an agent only one can have an event stored. A process that was
  stopped, replaced and woken may still be sensing; its commit is refused, and its sensors are cancelled.
- **Durable.** Once `emit` has returned (under `Overflow.SLOW`), the signal takes effect once or becomes a
  dead letter, whatever is killed then. What was not yet stored is lost with the process.
- **Positions.** An event's position is stored in that same commit, and given to the successor: a source
  that can be read again from a position (a stream, a file's time) is neither read twice nor skipped.

Not so for ``durable = False``: there is no record, so a woken process may have one more signal published
before it learns that it was replaced; and positions begin anew.

While the node's right to answer has lapsed (`cluster/validity.py`) nothing is stored and queues fill up. A
sensor that fails is run again after a pause; it never takes its agent down. IO: only what sensors do.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.committing import commit
from foundation_nats.agent.context import Emission, checked_type, freeze
from foundation_nats.agent.emissions import outbox_items
from foundation_nats.agent.failing import handler_error
from foundation_nats.agent.record import OutboxItem
from foundation_nats.agent.sensors.sensor import (
    KEEP,
    Event,
    Overflow,
    Sensor,
    Surroundings,
    declared,
)
from foundation_nats.base.clock import monotonic
from foundation_nats.base.resilience import backoff_s
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ConfigError, PayloadTooLargeError, SensorError
from foundation_nats.signaling.envelope import emitted_id, encode_envelope
from foundation_schemas import Target, TargetKind

EXIT = "foundation.sensor.exit"
"""The type of the signal to an agent whose sensor has ended or keeps failing."""
POSITION_MAX_BYTES = 32 * 1024
_BATCH = 64
_LOOK_AGAIN_S = 0.2
_CLOSE_S = 2.0
_SOUND_AFTER_S = 10.0
"""Who ran so long before it failed has not been failing."""
_TOLD_AT = (3, 10, 30, 100, 300, 1000)
"""After so many failures in a row it is told."""
Order = Sensor | str
"""Start this one, or stop the one of this name."""


@dataclass(slots=True)
class _Pending:
    """A signal, or a position alone, that waits to be stored."""

    item: OutboxItem | None
    name: str = ""
    position: Any = KEEP
    future: asyncio.Future[str] | None = None

    @property
    def id(self) -> str:
        """Of the signal."""
        return "" if self.item is None else self.item.msg_id

    @property
    def size(self) -> int:
        """In bytes, in the outbox."""
        return 0 if self.item is None else len(self.item.body)


class _Here(Surroundings):
    """The surroundings in a running agent."""

    def __init__(self, activation: Activation, *, position: Any) -> None:
        super().__init__(activation.agent, position=position)
        self._runtime = activation.runtime

    @property
    def is_valid(self) -> bool:
        return self._runtime.is_valid()


class _Running:
    """One sensor that runs, and its queue; it is what the sensor emits with (`Emit`)."""

    def __init__(self, host: SensorHost, template: Sensor) -> None:
        self._host = host
        self.template = template
        self.queue: deque[_Pending] = deque()
        self.dropped = 0
        self._room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        return len(self.queue) >= self.template.queue_max

    async def __call__(
        self,
        data: Any = None,
        *,
        type: str | None = None,
        id: str | None = None,
        position: Any = KEEP,
        traceparent: str | None = None,
    ) -> str:
        pending = self._host.pending(self.template, Event(data, type, id, position, traceparent))
        if self.template.overflow is not Overflow.SLOW:
            self._offer(pending)
            return pending.id
        return await (await self._wait(pending))

    async def keep(self, position: Any) -> None:
        await (await self._wait(self._host.position(self.template, position)))

    async def soon(self, event: Event) -> asyncio.Future[str]:
        return await self._wait(self._host.pending(self.template, event))

    async def _wait(self, pending: _Pending) -> asyncio.Future[str]:
        pending.future = future = asyncio.get_running_loop().create_future()
        if self.template.overflow is Overflow.SLOW:
            while self.is_full:
                self._room.clear()
                await self._room.wait()
        self._offer(pending)
        return future

    def nowait(self, event: Event) -> bool:
        return self._offer(self._host.pending(self.template, event))

    def _offer(self, pending: _Pending) -> bool:
        if self.is_full:
            self.dropped += 1
            # The first, and then ever more rarely.
            if self.dropped & (self.dropped - 1) == 0:
                self._host.log.warning(
                    "sensor overflows", sensor=self.template.name, dropped=self.dropped
                )
            if self.template.overflow is not Overflow.DROP_OLDEST:
                _settle(pending.future, SensorError("Dropped: the sensor's queue is full."))
                return False
            oldest = self.queue.popleft()
            _settle(oldest.future, SensorError("Dropped: newer ones came."))
        self.queue.append(pending)
        self._host.wake()
        return True

    def take(self) -> _Pending | None:
        """The next to be stored."""
        while self.queue:
            pending = self.queue.popleft()
            self._room.set()
            # Who has given up waiting before it was begun gets nothing stored.
            if pending.future is None or not pending.future.done():
                return pending
        return None


def _settle(future: asyncio.Future[str] | None, outcome: str | Exception) -> None:
    if future is None or future.done():
        return
    if isinstance(outcome, str):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
        future.exception()  # nobody need wait for it


class SensorHost:
    """The sensors of one activation."""

    __slots__ = (
        "_activation",
        "_begun",
        "_counter",
        "_orders",
        "_pump_task",
        "_running",
        "_stopped",
        "_tasks",
        "_told",
        "_wake",
        "log",
    )

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self._running: dict[str, _Running] = {}
        self._orders: list[Order] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: deque[_Pending] = deque()
        self._wake = asyncio.Event()
        self._counter = 0
        self._begun = False
        self._stopped = False
        self._pump_task: asyncio.Task[None] | None = None
        self.log = activation.runtime.log.bind(agent=activation.id)

    # ---- life -------------------------------------------------------------------

    def begin(self) -> None:
        """The agent is running: so are its sensors."""
        if self._begun:
            return
        self._begun = True
        for sensor in declared(type(self._activation.agent)):
            self._start(sensor)
        orders, self._orders = self._orders, []
        for order in orders:
            self._carry_out(order)

    def order(self, orders: Iterable[Order]) -> None:
        """Start and stop these once the effects of the signal in hand are stored."""
        if not self._begun:
            self._orders += orders
            return
        activation = self._activation
        wanted = activation.commit_no
        if activation.agent.durable:
            activation.dirty = True
            wanted += 1
        self._spawn(self._obey(list(orders), wanted), "orders")

    async def _obey(self, orders: list[Order], wanted: int) -> None:
        activation = self._activation
        while not self._is_stored(wanted):
            if activation.failure is not None:
                return
            await activation.runtime.commits.next_commit(activation)
        for order in orders:
            self._carry_out(order)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Sensor):
            self._halt(order.name)
            self._start(order)
        else:
            self._halt(order)

    def _start(self, sensor: Sensor) -> None:
        running = self._running[sensor.name] = _Running(self, sensor)
        running.task = self._spawn(self._supervise(running), sensor.name)
        if self._pump_task is None:
            self._pump_task = self._spawn(self._pump(), "pump")

    def _halt(self, name: str) -> None:
        running = self._running.pop(name, None)
        if running is None:
            return
        if running.task is not None:
            running.task.cancel()
        self._told.extend(running.queue)  # what it has sensed is stored all the same
        running.queue.clear()
        self.wake()

    def _spawn(self, coroutine: Any, name: str) -> asyncio.Task[None]:
        task = self._activation.runtime.background(coroutine, f"sensor.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stop(self) -> None:
        """Cancel all; nothing more is stored. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        for running in self._running.values():
            for pending in running.queue:
                _settle(pending.future, self._over())
            running.queue.clear()

    async def close(self) -> None:
        """`stop`, and wait until they have ended; for a while."""
        self.stop()
        current = asyncio.current_task()
        ending = [task for task in self._tasks if task is not current]
        if ending:
            await asyncio.wait(ending, timeout=_CLOSE_S)

    def _over(self) -> SensorError:
        return SensorError(f"{self._activation.id} does not run here any more.")

    @property
    def running(self) -> list[str]:
        """The names of those that run."""
        return sorted(self._running)

    # ---- supervision --------------------------------------------------------------

    async def _supervise(self, running: _Running) -> None:
        template = running.template
        attempt, pause = 0, 0.0
        while True:
            began = monotonic()
            try:
                sensor = copy.copy(template)
                positions = self._activation.positions or {}
                sensor.here = _Here(self._activation, position=positions.get(template.name))
                await sensor.run(running)
                if self._running.get(template.name) is running:
                    del self._running[template.name]
                self._told.extend(running.queue)
                self.log.info("sensor has ended", sensor=template.name)
                self._tell(template, None, attempts=0, pause=0.0)
                return
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                error: Exception = SensorError("What it waited for was cancelled.")
            except Exception as found:  # a sensor's failure must not be its agent's
                error = found
            if monotonic() - began > max(_SOUND_AFTER_S, 2 * pause):
                attempt = 0
            attempt += 1
            pause = backoff_s(
                attempt,
                random.random(),
                first_s=template.retry_first_s,
                most_s=template.retry_most_s,
            )
            self.log.warning(
                "sensor failed",
                sensor=template.name,
                attempt=attempt,
                retry_in_s=round(pause, 2),
                error=str(error) or type(error).__name__,
                exc_info=None if isinstance(error, SensorError | ConfigError) else error,
            )
            is_plain = isinstance(error, ConfigError) and attempt == 1
            if is_plain or attempt in _TOLD_AT:
                self._tell(template, error, attempts=attempt, pause=pause)
            await asyncio.sleep(pause)

    def _tell(
        self, sensor: Sensor, error: Exception | None, *, attempts: int, pause: float
    ) -> None:
        """Say that a sensor has ended or keeps failing: by an event, and to the agent if it handles that."""
        activation = self._activation
        me = Target(kind=TargetKind.AGENT, name=activation.id)
        said = "" if error is None else str(handler_error(error)) or type(error).__name__
        data = {
            "sensor": sensor.name,
            "reason": "ended" if error is None else "failed",
            "error": said[:1000] or None,
            "attempts": attempts,
            "retry_in_s": round(pause, 3) if error is not None else None,
        }
        emissions = []
        if error is not None:
            message = f"Sensor {sensor.name} of {activation.id} fails again and again: {said[:500]}"
            emissions.append(Emission(me, message, freeze(data), event="sensor_failed"))
        if activation.handlings.of(EXIT):
            emissions.append(Emission(me, EXIT, freeze(data)))
        self._counter += 1
        for item in outbox_items(
            activation.runtime.subjects,
            activation.id,
            emissions,
            salt=activation.salt,
            seed=f"sensor-exit-{activation.epoch}-{self._counter}",
            emitted=activation.emitted,
            signal=None,
        ):
            self._told.append(_Pending(item))
        self.wake()

    # ---- storing ------------------------------------------------------------------

    def pending(self, sensor: Sensor, event: Event) -> _Pending:
        """*event* as an item of the outbox.

        Raises:
            TypeError: data or position is not JSON.
            ValueError: the type is none.
            PayloadTooLargeError: it would not fit.
            SensorError: the activation is over.
        """
        if self._stopped:
            raise self._over()
        activation, runtime = self._activation, self._activation.runtime
        target = sensor.target or Target(kind=TargetKind.AGENT, name=activation.id)
        name = str(target)
        self._counter += 1
        # What has no id of its own is told apart by who sensed it when.
        event_id = event.id or f"\n{activation.epoch}.{self._counter}"
        msg_id = emitted_id(activation.salt, f"sensor\n{sensor.name}\n{event_id}", 0, name)
        body = encode_envelope(
            id=msg_id,
            source=f"sensor:{activation.id}/{sensor.name}",
            type=sensor.type if event.type is None else checked_type(event.type),
            target=name,
            data=event.data,
            traceparent=event.traceparent,
        )
        if target.kind is TargetKind.AGENT:
            subject = runtime.subjects.mailbox(target.name)
        else:
            subject = runtime.subjects.route(target)
        runtime.check_size(subject, body)
        if len(body) > runtime.outbox_max_bytes // 2:
            raise PayloadTooLargeError(
                f"Sensor {sensor.name} of {activation.id} emitted {len(body):,} bytes at once; the "
                f"limit is {runtime.outbox_max_bytes // 2:,}.",
                hint="Emit references to the data.",
            )
        item = OutboxItem(subject, msg_id, body)
        if event.position is KEEP:
            return _Pending(item)
        pending = self.position(sensor, event.position)
        pending.item = item
        return pending

    def position(self, sensor: Sensor, position: Any) -> _Pending:
        """A position to be stored.

        Raises:
            TypeError: it is not JSON.
            SensorError: it is too large, or the activation is over.
        """
        if self._stopped:
            raise self._over()
        text = to_json(position)
        if len(text) > POSITION_MAX_BYTES:
            raise SensorError(
                f"The position of sensor {sensor.name} exceeds {POSITION_MAX_BYTES:,} bytes."
            )
        return _Pending(None, sensor.name, orjson.loads(text))

    def wake(self) -> None:
        """There is something to be stored."""
        self._wake.set()

    def _take(self) -> list[_Pending]:
        """Some of what waits, each sensor's turn by turn."""
        limit = self._activation.runtime.outbox_max_bytes // 4
        batch: list[_Pending] = []
        size = 0
        while self._told and len(batch) < _BATCH:
            batch.append(self._told.popleft())
        sources = [item for item in self._running.values() if item.queue]
        while sources and len(batch) < _BATCH and size < limit:
            for source in list(sources):
                pending = source.take()
                if pending is None:
                    sources.remove(source)
                else:
                    batch.append(pending)
                    size += pending.size
        return batch

    async def _pump(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._take():
                try:
                    await self._store(batch)
                finally:
                    for pending in batch:
                        _settle(pending.future, self._over())

    async def _store(self, batch: list[_Pending]) -> None:
        """Have the activation commit *batch*; returns when it is stored."""
        activation, runtime = self._activation, self._activation.runtime
        size = sum(pending.size for pending in batch)
        while not runtime.is_valid() or not self._has_room(len(batch), size):
            await asyncio.sleep(_LOOK_AGAIN_S)
        if activation.failure is not None:
            return
        for pending in batch:
            item = pending.item
            if item is not None and item.msg_id not in activation.outbox.items:
                activation.outbox.add(item)
                activation.emitted += 1
            if pending.position is not KEEP:
                if activation.positions is None:
                    activation.positions = {}
                activation.positions[pending.name] = pending.position
        await self._commit()
        if activation.failure is None:
            for pending in batch:
                _settle(pending.future, pending.id)

    async def _commit(self) -> None:
        activation = self._activation
        wanted = activation.commit_no + bool(activation.agent.durable)
        activation.dirty = True
        commit(activation)
        while activation.failure is None and not self._is_stored(wanted):
            await activation.runtime.commits.next_commit(activation)

    def _is_stored(self, commit: int) -> bool:
        """Whether the commit of this number is."""
        activation = self._activation
        return activation.commit_no > commit or (
            activation.commit_no == commit and activation.in_flight is None
        )

    def _has_room(self, count: int, size: int) -> bool:
        """Whether handlers keep half of the outbox for themselves."""
        activation, runtime = self._activation, self._activation.runtime
        if not activation.outbox:
            return True
        return (
            len(activation.outbox) + count <= runtime.outbox_max // 2
            and activation.outbox.size + size <= runtime.outbox_max_bytes // 2
        )


def begin_sensors(activation: Activation) -> None:
    """Start the sensors of an activation that is running now, if it has any."""
    if activation.failure is not None:
        return
    if activation.sensing is None and declared(type(activation.agent)):
        activation.sensing = SensorHost(activation)
    if activation.sensing is not None:
        activation.sensing.begin()


def order_sensors(activation: Activation, orders: Iterable[Order]) -> None:
    """Start and stop sensors with the effects of the signal in hand."""
    if activation.sensing is None:
        activation.sensing = SensorHost(activation)
        if not activation.starting:
            activation.sensing._begun = True
    activation.sensing.order(orders)


__all__ = ["EXIT", "SensorHost", "begin_sensors", "order_sensors"]
