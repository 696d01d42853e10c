"""`Dormitory`: agents of a worker that sleep: their state is in their record, and a little of them here.

An agent that had nothing to do for ``hibernate_after`` seconds is put to sleep: `on_stop` with the
reason ``hibernated``, its last commit, and then its object is dropped. What stays is a `Sleeper`: its
subscription, its epoch and its place in the mailbox. It is still this worker's, under the same epoch, and
counts as running for everything that places, moves and recovers agents; the registry says that it sleeps.

The first signal or question wakes it: the record is read from the leader and, if it is still the one that
was left, the agent goes on with `on_start`, whose `recovered_from.reason` is ``hibernated``. Live copies
that come meanwhile are not kept, they are read from the stream; questions are, up to a bound.

Guaranteed: nothing is lost or handled twice by sleeping, because waking reads the same record that a
failover would. Not guaranteed: that memory comes back to the operating system, which is Python's to give.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from foundation_nats.agent.activation import HIBERNATED, Activation
from foundation_nats.agent.loading import load_class
from foundation_nats.agent.mailbox import place_of
from foundation_nats.agent.record import decode_record
from foundation_nats.agent.rewind import is_rewound, stamp
from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.streams import StoredMessage
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import BusError, FencedError, FoundationError
from foundation_schemas import AgentRecord, RecoveredFrom

if TYPE_CHECKING:
    from foundation_nats.agent.runtime import Runtime

ASKS_MAX = 256
"""Questions that wait for one agent to wake; the rest go unanswered, which their askers notice."""
_LOOKS = 4
"""Within the patience of the least patient."""
_LOOK_MIN_S, _LOOK_MAX_S = 0.05, 5.0


class Sleeper:
    """One agent that sleeps."""

    __slots__ = ("_asks", "_dormitory", "cursor", "epoch", "id", "mark", "route", "waking")

    def __init__(self, dormitory: Dormitory, activation: Activation) -> None:
        assert activation.route is not None
        self._dormitory = dormitory
        self.id = activation.id
        self.epoch = activation.epoch
        self.cursor = activation.mailbox.cursor
        self.mark = activation.mailbox.mark
        self.route: Route = activation.route
        self.route.handler = self.on_message
        self.waking = False
        self._asks: list[Message] | None = None

    def on_message(self, message: Message) -> None:
        """Something came: wake up for it."""
        if message.subject.endswith(".live"):
            sequence, _, stored_at = place_of(message.raw_headers or b"")
            if sequence <= self.cursor and not is_rewound(
                sequence, stored_at, cursor=self.cursor, mark=self.mark
            ):
                return
        elif message.subject.endswith(".flow"):
            return  # of an answer that is over
        elif self._asks is None:
            self._asks = [message]
        elif len(self._asks) < ASKS_MAX:
            self._asks.append(message)
        self._dormitory.wake(self)

    def compare(self, last: StoredMessage | None) -> None:
        """Wake if the last message of the mailbox says that there is something to do."""
        if last is not None and (
            last.sequence > self.cursor or stamp(last.time) > (self.mark or "~")
        ):
            self._dormitory.wake(self)

    def take_asks(self) -> list[Message]:
        """The questions that came meanwhile."""
        asks, self._asks = self._asks or [], None
        return asks


class Dormitory:
    """The sleepers of one worker, and who will be one soon."""

    def __init__(self, runtime: Runtime, scope: TaskScope, *, after_s: float | None) -> None:
        """
        Args:
            after_s: for classes that don't say it themselves; None: those never sleep.
        """
        self._runtime = runtime
        self._scope = scope
        self._after_s = after_s
        self._log = get_logger("agents")
        self._registry = Bucket(runtime.bus, runtime.subjects, "agents")
        self.sleepers: dict[str, Sleeper] = {}
        self._idle: dict[Activation, tuple[int, int, float]] = {}
        """(commit, consumed, since when) of those that may sleep."""
        self._is_looking = False
        self._every_s = _LOOK_MAX_S

    def admit(self, activation: Activation) -> None:
        """It has started: watch whether it has anything to do, if its class wants to sleep."""
        patience = self._patience(activation)
        if patience is None:
            return
        self._every_s = max(_LOOK_MIN_S, min(self._every_s, patience / _LOOKS))
        self._idle[activation] = (-1, -1, monotonic())
        if not self._is_looking:
            self._is_looking = True
            self._scope.start(self._look(), "hibernate")

    def _patience(self, activation: Activation) -> float | None:
        kind = type(activation.agent)
        if not activation.agent.durable or activation.has_company:
            return None
        after: float | None = kind.hibernate_after
        return self._after_s if after is None else after

    async def _look(self) -> None:
        try:
            while self._idle:
                await asyncio.sleep(self._every_s)
                self._look_once(monotonic())
        finally:
            self._is_looking = False

    def _look_once(self, now: float) -> None:
        for activation, (commit, consumed, since) in list(self._idle.items()):
            patience = self._patience(activation)
            if patience is None or not self._runtime.holds(activation):
                del self._idle[activation]
                continue
            seen = activation.commit_no, activation.consumed
            if seen != (commit, consumed) or not activation.is_idle:
                self._idle[activation] = (*seen, now)
            elif now - since >= patience:
                activation.sleep()

    def lay_down(self, activation: Activation) -> None:
        """It is stored as it is: from now on it sleeps."""
        self._idle.pop(activation, None)
        self.sleepers[activation.id] = Sleeper(self, activation)

    def wake(self, sleeper: Sleeper) -> None:
        """Read its record, and let it go on."""
        if not sleeper.waking and self.sleepers.get(sleeper.id) is sleeper:
            sleeper.waking = True
            self._scope.start(self._wake(sleeper), "wake")

    def remove(self, id: str, *, epoch: int | None = None) -> Sleeper | None:
        """It is not this worker's any more; None: it doesn't sleep here, or under a later epoch."""
        sleeper = self.sleepers.get(id)
        if sleeper is None or (epoch is not None and sleeper.epoch > epoch):
            return None
        del self.sleepers[id]
        self._runtime.bus.unsubscribe(sleeper.route)
        return sleeper

    async def _wake(self, sleeper: Sleeper) -> None:
        delay = 0.02
        while self.sleepers.get(sleeper.id) is sleeper:
            try:
                await self._read(sleeper)
                return
            except BusError as error:
                self._log.debug("record not readable yet", agent=sleeper.id, error=str(error))
                await asyncio.sleep(delay)
                delay = min(2 * delay, 1.0)
            except FoundationError as error:
                if self.remove(sleeper.id) is not None:
                    self._runtime.gone(sleeper.id, sleeper.epoch, error)
                return

    async def _read(self, sleeper: Sleeper) -> None:
        """
        Raises:
            BusError: not read; nothing has changed.
            FencedError: it belongs to another by now.
            StateInvalidError, ConfigError: it can't go on here.
        """
        runtime = self._runtime
        assigned, entry = await asyncio.gather(
            self._registry.read(sleeper.id), runtime.state.read(sleeper.id)
        )
        fenced = FencedError(f"{sleeper.id} was given to another while it slept.")
        if assigned is None or assigned.value is None or entry is None or entry.value is None:
            raise fenced
        record = decode(AgentRecord, assigned.value)
        stored = decode_record(sleeper.id, entry.value)
        if record.node != runtime.node or record.epoch != sleeper.epoch:
            raise fenced
        if stored.epoch != sleeper.epoch:
            raise fenced
        failpoint("wake.read")
        origin = RecoveredFrom(node=runtime.node, epoch=sleeper.epoch, reason=HIBERNATED)
        awake = record.model_copy(update={"recovered_from": origin})
        activation = runtime.revive(awake, load_class(record.spec.run), entry)
        if self.sleepers.get(sleeper.id) is not sleeper:
            return  # told to stop meanwhile
        del self.sleepers[sleeper.id]
        activation.route = sleeper.route
        sleeper.route.handler = activation.on_message
        activation.begin()
        activation.fall_behind()
        for message in sleeper.take_asks():
            activation.on_message(message)
