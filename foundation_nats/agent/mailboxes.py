"""`Mailboxes`: of all agents of a worker: what they hold that has not reached memory, read from the stream.

A republished copy is at most once, and a lost one with nothing behind it
leaves no gap to see. Hence the sweep: on a timer, at once after a reconnect,
and at a stream's new leader, the last sequence of every mailbox is compared
with what was taken in. An idle cluster pays one request per sweep. The sweep and
every claim also find out whether the stream went back (`rewind.py`).

Those that have fallen behind are read page by page until the live copies connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from secrets import token_hex

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.dormitory import Sleeper
from foundation_nats.agent.rewind import has_lost_its_clock, is_rewound, just_after, stamp
from foundation_nats.base.clock import utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import Logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.streams import PAGE, StoredMessage, StreamReader, append, identity
from foundation_nats.bus.subjects import STREAM_LEADER_ELECTED, Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.errors import BusError, FoundationError, NotFoundError
from foundation_schemas import ClusterEvent

_SWEEPS = 2
"""Of one state of the stream: a replica that lags may answer the first."""
_ANNOUNCE_AFTER_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)


class Mailboxes:
    """The mailboxes of one worker's agents, as the stream has them.

    Args:
        signals: the stream.
        activations: those in memory; live.
        sleepers: those asleep; live.
        on_doubt: called when the stream may answer otherwise than a moment ago.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        signals: StreamReader,
        scope: TaskScope,
        *,
        node: str,
        in_memory_max: int,
        sweep_every_s: float,
        activations: Mapping[str, Activation],
        sleepers: Mapping[str, Sleeper],
        on_doubt: Callable[[], None],
        log: Logger,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._signals = signals
        self._scope = scope
        self._node = node
        self._in_memory_max = in_memory_max
        self._activations = activations
        self._sleepers = sleepers
        self._on_doubt = on_doubt
        self._log = log
        self._catching_up: set[Activation] = set()
        self._swept_to = (0, 0)
        """(Last sequence of the stream, how often it was swept up to there)."""
        self._sweep_now = asyncio.Event()
        self._era = 0
        """Counts the moments since which the stream may have gone back."""
        self._stream_is: tuple[str, str] | None = None
        scope.start(self._sweep_loop(sweep_every_s), "sweep")
        bus.on_disconnect(self._uncheck)
        bus.on_reconnect(self._disturbed)
        bus.subscribe(STREAM_LEADER_ELECTED, self._on_advisory)

    async def look_into(self, activations: list[Activation]) -> None:
        """They were taken over: compare their mailboxes now, or by the next sweep."""
        self._swept_to = (0, 0)
        try:
            await self._bus.flush()
            await self.look_for_unread(activations)
        except (BusError, NotFoundError) as error:
            self._log.warning("mailboxes not readable yet", error=str(error))
            self.sweep_soon()

    def catch_up(self, activation: Activation) -> None:
        """Read on from the stream until the live copies connect."""
        if activation not in self._catching_up:
            self._catching_up.add(activation)
            self._scope.start(self._catch_up(activation), "catch-up")

    async def _catch_up(self, activation: Activation) -> None:
        delay = 0.02
        subject = self._subjects.mailbox(activation.id)
        try:
            while (
                activation.mailbox.behind
                and activation.failure is None
                and not activation.mailbox.rewinding
            ):
                if activation.mailbox.backlog > self._in_memory_max // 2:
                    return  # it asks again when it has handled what it holds
                failpoint("catchup.page")
                try:
                    if not activation.mailbox.checked:
                        await self._check(activation)
                        continue
                    era = self._era
                    room = max(1, self._in_memory_max - activation.mailbox.backlog)
                    messages, more = await self._signals.page(
                        subject, activation.mailbox.fetched + 1, batch=min(PAGE, room)
                    )
                    if era != self._era:
                        continue
                except (BusError, FoundationError) as error:
                    self._log.debug("catch-up will be retried", error=str(error))
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 1.0)
                    continue
                if activation.take_page(messages, bool(more)):
                    return
                if not messages:
                    # A replica that lags behind what was already seen live; or the
                    # signals heard of were trimmed or discarded meanwhile.
                    last = await self._signals.last_from_leader(subject)
                    if last is None or last.sequence <= activation.mailbox.fetched:
                        activation.mailbox.seen = activation.mailbox.fetched
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 1.0)
        except (BusError, NotFoundError) as error:
            self._log.debug("catch-up left to the sweep", error=str(error))
            activation.mailbox.behind = False
            self.sweep_soon()
        finally:
            self._catching_up.discard(activation)

    async def _check(self, activation: Activation) -> None:
        """Compare its place in the mailbox with the stream as it is now.

        Raises:
            BusError
        """
        era = self._era
        if await self._find_place(activation) is not None:
            activation.rewound()
        elif era == self._era:
            activation.mailbox.checked = True

    async def _find_place(self, activation: Activation) -> int | None:
        """The sequence behind which all is new; None: the stream did not go back."""
        subject = self._subjects.mailbox(activation.id)
        cursor, mark = activation.mailbox.fetched, activation.mailbox.fetched_mark
        if not mark:
            return None
        info = await self._signals.info()
        found = await self._signals.first_since(subject, just_after(mark))
        while found is not None and found.sequence <= cursor:
            if is_rewound(found.sequence, found.time, cursor=cursor, mark=mark):
                return found.sequence - 1
            # Leaders whose clocks differ: later in the stream, and yet earlier.
            found = await self._signals.next_of(subject, found.sequence + 1)
        if has_lost_its_clock(info, cursor=cursor, mark=mark):
            return int(info["state"]["last_seq"])
        return None

    async def find_place(self, activation: Activation) -> int | None:
        """`_find_place`, however long that takes; None also when the activation ends."""
        delay = 0.02
        while activation.failure is None and activation.stopping is None:
            try:
                await self._bus.wait_connected(60.0)
                return await self._find_place(activation)
            except (BusError, NotFoundError) as error:
                self._log.debug("stream not readable yet", error=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 1.0)
        return None

    def report_rewound(self, activation: Activation, before: int) -> None:
        """Its cursor has followed the stream back from *before*."""
        message = (
            f"The signals of {activation.id} went back from {before} to {activation.mailbox.cursor}: "
            "the broker has lost the latest it had acknowledged. What came since is handled."
        )
        self._log.error("stream rewound", agent=activation.id, error=message)
        event = ClusterEvent(
            topic="agent",
            what="stream_rewound",
            at=utc_text(),
            source=self._node,
            message=message,
            data={
                "agent": activation.id,
                "stream": self._signals.stream,
                "before": before,
                "after": activation.mailbox.cursor,
            },
        )
        self._scope.start(self._announce(event), "announce")

    async def _announce(self, event: ClusterEvent) -> None:
        """Store an event; more than once, because it is told while streams still elect leaders."""
        subject = self._subjects.event(event.topic, event.what)
        headers = {"Nats-Msg-Id": token_hex(16)}
        for delay in _ANNOUNCE_AFTER_S:
            await asyncio.sleep(delay)
            try:
                await append(self._bus, subject, encode(event), headers=headers, timeout=2.0)
                return
            except FoundationError as error:
                self._log.debug("event not stored yet", what=event.what, error=str(error))

    def _uncheck(self) -> None:
        self._era += 1
        for activation in self._activations.values():
            activation.mailbox.uncheck()

    def _disturbed(self) -> None:
        self._uncheck()
        self.sweep_soon()

    def sweep_soon(self) -> None:
        """Compare all mailboxes with what was taken in, as soon as that is possible."""
        self._swept_to = (0, 0)
        self._sweep_now.set()
        self._on_doubt()

    def _on_advisory(self, message: Message) -> None:
        if message.subject.endswith(f".{self._signals.stream}"):
            self._uncheck()
        self.sweep_soon()

    async def _sweep_loop(self, every_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sweep_now.wait(), every_s * random.uniform(0.8, 1.2))
            self._sweep_now.clear()
            if not self._activations and not self._sleepers:
                continue
            try:
                info = await self._signals.info()
                last = int(info["state"]["last_seq"])
                before, times = self._swept_to
                if last < before or identity(info) != (self._stream_is or identity(info)):
                    self._uncheck()
                    before, times = 0, 0
                self._stream_is = identity(info)
                all_checked = all(item.mailbox.checked for item in self._activations.values())
                if last == before and times >= _SWEEPS and all_checked:
                    continue
                await self.look_for_unread(list(self._activations.values()))
                await self._look_for_sleepers(last)
                self._swept_to = (last, times + 1 if last == before else 1)
            except (BusError, FoundationError) as error:
                self._log.debug("sweep put off", error=str(error))
                await asyncio.sleep(0.2)
                self._sweep_now.set()

    async def look_for_unread(self, activations: list[Activation]) -> None:
        """Compare these mailboxes with what was taken in.

        Raises:
            BusError, NotFoundError
        """
        by_subject = {self._subjects.mailbox(item.id): item for item in activations}
        era = self._era
        if all(item.mailbox.checked for item in activations):
            found = await self._signals.last_of(by_subject)
        else:
            info = await self._signals.info()
            newest = int(info["state"]["last_seq"])
            found = await self._signals.last_of_by_now(by_subject, newest=newest)
            for item in activations:
                if not item.mailbox.checked and has_lost_its_clock(
                    info, cursor=item.mailbox.fetched, mark=item.mailbox.fetched_mark
                ):
                    item.fall_behind()  # it looks more closely first
        for subject, activation in by_subject.items():
            self._compare(activation, found.get(subject), era)

    async def _look_for_sleepers(self, newest: int) -> None:
        sleepers = {self._subjects.mailbox(item.id): item for item in self._sleepers.values()}
        if sleepers:
            found = await self._signals.last_of_by_now(sleepers, newest=newest)
            for subject, sleeper in sleepers.items():
                sleeper.compare(found.get(subject))

    def _compare(self, activation: Activation, last: StoredMessage | None, era: int) -> None:
        """What the last message of its mailbox says to an activation."""
        if last is not None and last.sequence > activation.mailbox.fetched:
            activation.mailbox.seen = max(activation.mailbox.seen, last.sequence)
            activation.fall_behind()
        elif last is not None and stamp(last.time) > (activation.mailbox.fetched_mark or "~"):
            activation.rewound()
        elif era == self._era and not activation.mailbox.behind:
            activation.mailbox.checked = True
