"""`Activation`: one agent in memory under one epoch: intake, handling, commit, outbox.

It consumes its mailbox in order and exactly once: a live copy with a sequence
at or below the cursor was seen; one whose ``Nats-Last-Sequence`` lies above
the cursor shows a gap, and the stream is read instead. Only *greater than* is
a gap, because trimming lowers that number.

Effects become visible in one step, the compare-and-set of the record that
holds state, cursor and outbox. While a commit is in flight further signals are
handled, and the next commit covers them all. Replies and emitted signals leave
only after the commit that holds their cause. Emitted signals for one receiver
are published one after the other, so that their order survives a retry.

An urgent signal is handled before those that wait in memory. The record then names it beside the
cursor (`ahead`: its sequence, and when the server stored it), and the cursor passes it without
handling it again once those in front of it are done. The time tells it from another that gets its
number if the stream goes back. So it is the same compare-and-set that makes both lanes exactly once.

Where the stream itself has gone back, the cursor follows it by a commit of its own:
`rewind.py` has the rule, and `rewound` begins it.

After a commit whose outcome is unknown nothing is guessed: the record is read
from the leader and its writer compared (`Runtime.resolve`).

Obligations of the caller (`runtime.py`): claim the record before `open`, feed
`on_message` in order of arrival, call `resume` when the right to answer or the
connection is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import orjson

from foundation_nats.agent.agent import Agent, begin, end
from foundation_nats.agent.context import Emission
from foundation_nats.agent.directives import apply_result, are_directives
from foundation_nats.agent.emissions import answer, expired, outbox_items
from foundation_nats.agent.failing import handler_error
from foundation_nats.agent.handling import (
    Handling,
    handlings,
    is_notice,
    unhandled,
    validated,
)
from foundation_nats.agent.intake import AHEAD_MAX, Intake, is_urgent, source_of
from foundation_nats.agent.kin import announce, hear, is_of_kin
from foundation_nats.agent.middleware import layered, outgoing
from foundation_nats.agent.past import Past, base_key, encode_base
from foundation_nats.agent.record import OutboxItem, encode_record
from foundation_nats.agent.rewind import is_rewound, stamp
from foundation_nats.agent.sensors.host import SensorHost, begin_sensors, order_sensors
from foundation_nats.agent.signal import Signal
from foundation_nats.agent.state import dump_state, restore_state
from foundation_nats.agent.steps import StepLedger, cause_of
from foundation_nats.agent.streaming import (
    Ended,
    Replies,
    asked_for,
    collected,
    ending,
    read_flow,
)
from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.bus.rpc import REPLY_PREFIX, error_body, to_json
from foundation_nats.bus.streams import PubAck, StoredMessage
from foundation_nats.bus.wire import Message, Route
from foundation_nats.control.moves import MOVED
from foundation_nats.errors import (
    AgentUnavailableError,
    AskTimeoutError,
    BudgetError,
    BusError,
    FencedError,
    FoundationError,
    HandlerError,
    OverloadError,
    PayloadInvalidError,
    PayloadTooLargeError,
    PlanFailedError,
    StateInvalidError,
    StateTooLargeError,
    StepInDoubtError,
    StepTooLargeError,
    TransitionError,
    UnhandledSignalError,
)
from foundation_nats.node.blackbox import STARTING
from foundation_nats.signaling.burial import attempts_of, content, words
from foundation_nats.signaling.envelope import emitted_id
from foundation_schemas import AgentRecord, BaseRecord, DeadLetter, Envelope, RecoveredFrom

if TYPE_CHECKING:
    from foundation_nats.agent.runtime import Runtime

_UNCOMMITTED_MAX = 256
HIBERNATED = "hibernated"
"""The reason of the `on_stop` before it sleeps, and of `recovered_from` when it wakes."""
_READY_EVERY_S = 0.1
_TRACEBACK_MAX = 8000
_HOPELESS = (BudgetError, PlanFailedError, StepInDoubtError, StepTooLargeError, TransitionError)
"""To try again would end the same way."""
_REST_MIN_S = 0.001
_COMMIT_EVERY_S = 0.01
"""While there is more to handle: what was handled within that time shares a commit."""
_NOT_VALID_S = 0.2
"""Between two looks whether what is stored may be published again."""


@dataclass(slots=True)
class _Stored:
    """A signal in hand's reach: its place in the mailbox, and the envelope's bytes."""

    sequence: int
    data: bytes
    stamp: str
    """When the server stored it, as `rewind.stamp`."""


@dataclass(slots=True)
class _Ask:
    """A question that waits for its turn."""

    reply: str
    data: bytes


class _Start:
    """The first item of every activation: `on_start`."""


class _Sleep:
    """The item by which an activation that has nothing to do is put to sleep."""


class _Rewind:
    """The item behind all that was taken in before the stream went back."""


class _Abandon(BaseException):
    """The activation ends here; what is in hand is left to its successor.

    No handler shall take it for an error of its own.
    """


class Activation:
    """One agent under one epoch."""

    __slots__ = (
        "_awaiting",
        "_choked",
        "_handlings",
        "_kind",
        "_waiting",
        "agent",
        "ahead",
        "asked",
        "behind",
        "cautious",
        "checked",
        "commit_no",
        "committed_cursor",
        "committed_outbox",
        "consumed",
        "cursor",
        "dirty",
        "emitted",
        "epoch",
        "failure",
        "fetched",
        "fetched_mark",
        "held",
        "id",
        "in_flight",
        "intake",
        "mark",
        "outbox",
        "outbox_bytes",
        "overtaking",
        "past",
        "positions",
        "queue",
        "recovered",
        "recovered_at",
        "recovering",
        "replies",
        "resting",
        "revision",
        "rewinding",
        "route",
        "run_name",
        "runtime",
        "salt",
        "scheduled",
        "seen",
        "sensing",
        "skip",
        "starting",
        "state_json",
        "step_ledger",
        "stopped",
        "stopping",
        "target",
        "task",
        "uncommitted",
        "urgent",
    )

    def __init__(
        self,
        runtime: Runtime,
        record: AgentRecord,
        agent: Agent,
        *,
        state_json: bytes,
        cursor: int,
        mark: str,
        commit_no: int,
        revision: int,
        salt: str,
        emitted: int,
        outbox: list[OutboxItem],
        recovered: RecoveredFrom | None,
        skip: list[int],
        ahead: dict[int, str] | None = None,
        steps: StepLedger | None = None,
        positions: dict[str, Any] | None = None,
        past: Past | None = None,
    ) -> None:
        self.runtime = runtime
        # The record itself would cost each idle agent two kilobytes.
        self.run_name = sys.intern(record.spec.run)
        self.id = record.id
        self.epoch = record.epoch
        self.agent = agent
        self._kind = type(agent).State
        self._handlings = handlings(type(agent))
        self.recovered = recovered
        self.recovered_at = ""
        """The server's time of the record whose outbox this activation recovers."""
        self.held = list(outbox) if outbox else None
        """What is stored and waits until the recovered outbox was compared with the streams."""
        self.recovering = bool(outbox)
        """Some of the recovered outbox is not published yet."""
        self.state_json = state_json
        """The state after the last handled signal."""
        self.cursor = cursor
        """The last handled signal; what is committed may lie behind."""
        self.committed_cursor = cursor
        self.asked = 0
        """Questions that it has begun to answer."""
        self.consumed = 0
        """Signals that this activation has handled or given up."""
        self.mark = mark
        """The latest time at which the server stored any of the handled ones."""
        self.fetched = cursor
        """The last signal taken into `queue`."""
        self.fetched_mark = mark
        """As `mark`, of those taken in."""
        self.checked = not mark
        """Its place in the mailbox was compared with the stream since that could have gone back."""
        self.rewinding = False
        """The stream did go back: nothing is taken in until the cursor has followed."""
        self.seen = 0
        """The highest sequence heard of; catching up goes on until it is reached."""
        self.skip = skip
        """Signals beyond the cursor that were given to another agent (`signaling/rerouter.py`)."""
        self.ahead: dict[int, str] = ahead or {}
        """Urgent signals beyond the cursor that were handled: sequence to stamp."""
        self.urgent: deque[_Stored] | None = None
        """Those of the queue that overtake, in order; they stay in the queue, too."""
        self.overtaking = False
        """The signal in hand is not the next one of the queue."""
        rate = record.spec.rate
        self.intake = None if rate is None else Intake(rate)
        self.resting = False
        """What is next must wait, because of `intake`."""
        self.replies: Replies | None = None
        """Where the handler's items go, while it answers one by one."""
        self.step_ledger = steps
        self.positions = positions
        """How far each sensor has come, by name."""
        self.past = past
        """What it keeps of what it has handled, if it keeps any."""
        self.sensing: SensorHost | None = None
        """Its sensors, while they run."""
        agent.ctx._home = self
        self.commit_no = commit_no
        self.revision = revision
        self.salt = salt
        self.emitted = emitted
        self.outbox: dict[str, OutboxItem] = {item.msg_id: item for item in outbox}
        """Emitted and not yet acknowledged by the stream, in order."""
        self.outbox_bytes = sum(len(item.body) for item in outbox)
        self.committed_outbox = len(outbox)
        """How many of them the stored record holds."""
        self._waiting: dict[str, deque[OutboxItem]] | None = None
        self._awaiting: list[tuple[str, bytes]] = []
        """Replies that leave with the commit in flight or the next one."""
        self.queue: deque[_Stored | _Ask | _Start | _Rewind | _Sleep] | None = None
        self.route: Route | None = None
        self.scheduled = False
        self.behind = False
        self.cautious = False
        """A signal has ended its worker: mark each further attempt at it in the record first."""
        self.dirty = False
        self.in_flight: list[Any] | None = None
        self._choked = False
        self.uncommitted = 0
        self.starting = True
        self.stopping: str | None = None
        self.target: str | None = None
        """The node to which it is moved, if it is and that is known."""
        self.stopped: asyncio.Future[None] | None = None
        self.failure: str | None = None
        self.task: asyncio.Task[Any] | None = None

    # ---- intake -----------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        """Take a live copy or an ask off the wire."""
        if message.subject.endswith(".live"):
            self._on_live(message)
        elif message.subject.endswith(".ask") and message.reply.startswith(REPLY_PREFIX):
            self._on_ask(message)
        elif message.subject.endswith(".flow"):
            self._on_flow(message.data)
        elif message.subject.endswith(".trace") and message.reply.startswith(REPLY_PREFIX):
            self._send_reply(message.reply, self.runtime.trace.answer(self.id, message.data))

    def _on_live(self, message: Message) -> None:
        failpoint("live.received")
        sequence, last, stored_at = place_of(message.raw_headers or b"")
        if sequence <= self.fetched:
            if is_rewound(sequence, stored_at, cursor=self.fetched, mark=self.fetched_mark):
                self.rewound()
            return
        if sequence > self.seen:
            self.seen = sequence
        if self.behind:
            return
        if (
            not self.checked
            or last > self.fetched
            or (self.queue is not None and len(self.queue) >= self.runtime.in_memory_max)
        ):
            self.fall_behind()
            return
        self._take(sequence, message.data, stored_at)

    def _take(self, sequence: int, data: bytes, stored_at: str) -> None:
        self.fetched = sequence
        if stored_at > self.fetched_mark:
            self.fetched_mark = stored_at
        item = _Stored(sequence, data, stored_at)
        if stored_at and is_urgent(data) and self.ahead.get(sequence) != stored_at:
            if self.urgent is None:
                self.urgent = deque()
            self.urgent.append(item)
        self._put(item)

    def _on_ask(self, message: Message) -> None:
        if self.stopping is not None or not self.runtime.is_valid():
            self._refuse(message.reply)
            return
        if self.queue is not None and len(self.queue) >= 2 * self.runtime.in_memory_max:
            busy = AgentUnavailableError(
                f"{self.id} has too much to do.", busy=True, refused=self.epoch, sure=True
            )
            self._send_reply(message.reply, orjson.dumps(error_body(busy)))
            return
        if self.intake is not None and not self.starting:
            wait = self.intake.wait_s(source_of(message.data), monotonic())
            if wait or self.resting:
                wait = max(wait, _REST_MIN_S)
                overload = OverloadError(
                    f"{self.id} takes in no more than it may: ask again in {wait:.2f} s.",
                    name=self.id,
                    retry_in_s=round(wait, 3),
                )
                self._send_reply(message.reply, orjson.dumps(error_body(overload)))
                return
        self._put(_Ask(message.reply, message.data))

    def _on_flow(self, data: bytes) -> None:
        if self.replies is not None:
            self.replies.on_flow(data)
        flow = read_flow(data)
        if flow is not None and flow[2] and self.queue:
            # Its asker does not wait any more, and it has not begun.
            question = orjson.dumps(flow[0])
            rest = [x for x in self.queue if not (isinstance(x, _Ask) and question in x.data)]
            if len(rest) < len(self.queue):
                self.queue.clear()
                self.queue.extend(rest)

    def _refuse(self, reply: str, *, sure: bool = True) -> None:
        """Say that nothing was handled: here, and, as long as our right holds, anywhere."""
        error = AgentUnavailableError(
            f"{self.id} may not answer on {self.runtime.node} now: "
            "the node is stopping, or not sure that it still holds the agent.",
            hint="Ask again.",
            refused=self.epoch,
            sure=sure and self.runtime.is_valid(),
        )
        self._send_reply(reply, orjson.dumps(error_body(error)))

    def _put(self, item: _Stored | _Ask | _Start | _Rewind | _Sleep) -> None:
        if self.queue is None:
            self.queue = deque()
        self.queue.append(item)
        self.runtime.pool.submit(self)

    def begin(self) -> None:
        """Queue `on_start` before everything else."""
        self._put(_Start())

    def fall_behind(self) -> None:
        """Drop live copies from now on and read the stream instead."""
        if not self.behind:
            self.behind = True
            self.runtime.catch_up(self)

    def take_page(self, messages: list[StoredMessage], more: bool) -> bool:
        """Take what the stream holds beyond `fetched`; True when caught up."""
        for message in messages:
            if message.sequence > self.fetched:
                self._take(message.sequence, message.data, stamp(message.time))
        if not more and self.fetched >= self.seen:
            self.behind = False
            return True
        return False

    def uncheck(self) -> None:
        """The stream may have gone back: take nothing in before that is known."""
        self.checked = not self.fetched_mark

    def rewound(self) -> None:
        """The stream has gone back: follow it, after all that was taken in before."""
        if not self.rewinding and self.stopping is None and self.failure is None:
            self.rewinding = self.behind = True
            self.checked = False
            self._put(_Rewind())

    @property
    def backlog(self) -> int:
        """Signals and asks in memory."""
        return 0 if self.queue is None else len(self.queue)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that it does, has to do, or waits for."""
        return not (
            self.queue
            or self.task is not None
            or self.dirty
            or self.in_flight is not None
            or self.outbox
            or self.committed_outbox
            or self.starting
            or self.behind
            or not self.checked
            or self.rewinding
            or self.cautious
            or self.stopping is not None
            or self.failure is not None
        )

    @property
    def has_company(self) -> bool:
        """Whether something runs beside it that sleeping would end."""
        return self.sensing is not None

    def sleep(self) -> None:
        """Put it to sleep, unless something comes first."""
        self._put(_Sleep())

    async def _fall_asleep(self) -> bool:
        """End as for a stop, but keep the place; False: something came, it goes on."""
        assert self.queue is not None
        if len(self.queue) > 1 or not self.runtime.is_valid():
            return False
        kind = type(self.agent)
        if kind.on_stop is not Agent.on_stop or kind.skills:
            self.agent.ctx._begin(None)
            try:
                await self._observed(end(self.agent, HIBERNATED), STARTING)
                self._effects(self._checked_state(), seed=f"sleep-{self.commit_no}")
            except Exception as error:
                self.runtime.log.warning("on_stop failed", agent=self.id, exc_info=error)
                self._roll_back()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.runtime.stop_timeout_s):
                await self._wait_committed()
                while self.outbox:
                    await self.runtime.next_commit(self)
                if self.committed_outbox:
                    self.dirty = True
                    await self._wait_committed()
        if self.outbox or self.dirty or self.in_flight is not None or len(self.queue) > 1:
            # Awake again, and for its handlers it has slept.
            self.starting = True
            self.recovered = RecoveredFrom(
                node=self.runtime.node, epoch=self.epoch, reason=HIBERNATED
            )
            self.queue.insert(1, _Start())
            return False
        if self.stopping is not None or self.failure is not None:
            return False
        failpoint("sleep.before")
        self.runtime.lay_down(self)
        return True

    # ---- handling ---------------------------------------------------------------

    def resume(self) -> None:
        """Go on, if there is anything to do."""
        if self.queue or self.stopping is not None:
            self.runtime.pool.submit(self)

    async def run(self, task: asyncio.Task[Any]) -> None:
        """Handle what is queued; called by one runner, which is *task*, at a time."""
        if self.task is not None or self.route is None:
            return
        self.task = task
        stored_at = monotonic()
        try:
            while self.queue and self.stopping is None and not self.resting:
                if self.uncommitted >= _UNCOMMITTED_MAX or self._is_choked():
                    break
                if self.dirty and (now := monotonic()) - stored_at > _COMMIT_EVERY_S:
                    # Handlers that take their time don't hold up what others wait for.
                    stored_at = now
                    self.commit()
                item = self.queue[0]
                first = self._overtakes(item) if self.urgent else None
                if isinstance(item, _Ask) and first is None:
                    self.queue.popleft()
                    await self._handle_ask(item)
                    continue
                if not self.runtime.is_valid():
                    self.runtime.park(self)
                    break
                next_one = first or item
                if isinstance(next_one, _Stored) and self._must_rest(next_one):
                    break
                if first is not None:
                    self.overtaking = True
                    try:
                        await self._handle_stored(first)
                    finally:
                        self.overtaking = False
                    continue
                if isinstance(item, _Start):
                    await self._start()
                elif isinstance(item, _Rewind):
                    await self._follow_stream()
                elif isinstance(item, _Sleep):
                    if await self._fall_asleep():
                        self.queue = None
                        return
                elif isinstance(item, _Stored):
                    await self._handle_stored(item)
                if self.queue:
                    self.queue.popleft()
        except _Abandon:
            return
        except asyncio.CancelledError:
            if self.stopping is None:
                raise
            task.uncancel()
        except FoundationError as error:
            self.fail(error)
            return
        finally:
            self.task = None
        if self.queue is not None and not self.queue:
            self.queue = self.urgent = None
        self.commit()
        if self.stopping is not None:
            await self._finish()
        elif self.behind and self.backlog <= self.runtime.in_memory_max // 2:
            self.runtime.catch_up(self)

    def _overtakes(self, item: object) -> _Stored | None:
        """The urgent signal that comes before *item*, the next of the queue; None: nothing does."""
        assert self.urgent is not None
        while self.urgent:
            first = self.urgent[0]
            if first.sequence > self.cursor and first.sequence not in self.ahead:
                break
            self.urgent.popleft()
        if not self.urgent:
            self.urgent = None
            return None
        if self.starting or not isinstance(item, _Stored | _Ask) or len(self.ahead) >= AHEAD_MAX:
            return None
        return None if self.urgent[0] is item else self.urgent[0]

    def _must_rest(self, item: _Stored) -> bool:
        """Whether *item* must not begin yet; then the queue is gone on with as soon as it may."""
        if (
            self.intake is None
            or item.sequence <= self.cursor
            or item.sequence in self.skip
            or item.sequence in self.ahead
        ):
            return False
        wait = self.intake.wait_s(source_of(item.data), monotonic())
        if wait:
            self.resting = True
            asyncio.get_running_loop().call_later(max(wait, _REST_MIN_S), self._rested)
        return bool(wait)

    def _rested(self) -> None:
        self.resting = False
        self.resume()

    def _is_choked(self) -> bool:
        """Whether receivers must take some of what was emitted before more is handled.

        Every commit carries the whole outbox, so it is not filled up again one by one:
        once full, handling goes on when half of it has left, or a receiver is full itself.
        """
        count, size = len(self.outbox), self.outbox_bytes
        share = 2 if self._choked else 1
        runtime = self.runtime
        self._choked = (
            count * share >= runtime.outbox_max or size * share >= runtime.outbox_max_bytes
        )
        return self._choked

    def unchoke(self) -> None:
        """Go on as soon as there is any room in the outbox."""
        self._choked = False
        self.resume()

    async def _start(self) -> None:
        agent = self.agent
        agent.ctx._begin(None)
        try:
            await self._observed(begin(agent, self.recovered), STARTING)
            announce(agent)
            state = self._checked_state()
        except FoundationError:
            raise
        except Exception as error:
            self.runtime.log.warning("on_start failed", agent=self.id, exc_info=error)
            raise handler_error(error, "on_start raised ") from error
        self._effects(state, seed=f"start-{self.epoch}")
        if self.step_ledger is not None and self.step_ledger.settle(f"start-{self.epoch}"):
            self.dirty = True
        self.starting = False
        if self.dirty:
            # Running means that what on_start did is stored.
            self.commit()
            await self._wait_committed()
        if type(agent).ready is not Agent.ready:
            await self._get_ready()
        failpoint("report_running")
        self.runtime.report_running(self)
        begin_sensors(self)

    async def _get_ready(self) -> None:
        timeout = self.runtime.ready_timeout_s
        try:
            async with asyncio.timeout(timeout):
                while not await self._observed(self.agent.ready(), STARTING):
                    await asyncio.sleep(_READY_EVERY_S)
        except TimeoutError:
            raise HandlerError(f"It was not ready within {timeout:g} s.") from None
        except Exception as error:
            raise handler_error(error, "ready raised ") from error

    async def _follow_stream(self) -> None:
        """Commit the cursor just before the first signal that is new, and read on from there."""
        await self._wait_committed()
        place = await self.runtime.find_place(self)
        before = self.cursor
        if place is not None and place < before:
            self.cursor = self.fetched = place
            # Numbers will come again: what they cause must not get the ids of before.
            self.salt = token_hex(8)
            self.skip = []
            if self.past is not None:
                self.past.restart()
            self.ahead = {}
            self.urgent = None
            self.cautious = False
            self.runtime.attempts.pop(self.id, None)
            self.dirty = True
            self.commit()
            await self._wait_committed()
            self.runtime.report_rewound(self, before)
        self.seen = 0
        self.rewinding = False

    async def _handle_stored(self, item: _Stored) -> None:
        if item.sequence <= self.cursor:
            return
        if self.skip and item.sequence in self.skip:
            if self.past is not None:
                self.past.took_no_effect(item.sequence)
            self._advance(item)
            return
        if self.ahead and not self.overtaking and item.sequence in self.ahead:
            if self.ahead.pop(item.sequence) == item.stamp:
                self._advance(item)
                return
            # The stream went back, and its number was given out again: it is another one.
            self.dirty = True
        if self.cautious and not await self._may_try(item):
            return
        try:
            body = orjson.loads(item.data)
            signal_type, signal_id, source = body["type"], body["id"], body["source"]
            data = body.get("data")
            if not (
                isinstance(signal_type, str)
                and isinstance(signal_id, str)
                and isinstance(source, str)
                and body.get("specversion") == "1.0"
            ):
                raise ValueError("not a CloudEvents 1.0 envelope")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._bury(item, None, _malformed(item.data, error), attempts=1)
            return
        handling = self._handlings.find(signal_type, body)
        if handling is None and not is_notice(signal_type):
            self._bury(item, body, self._unhandled(signal_type), attempts=1)
            return
        try:
            data = validated(handling, signal_type, data)
        except PayloadInvalidError as error:
            self._bury(item, body, error, attempts=1)
            return
        attempt = 1
        while True:
            if (late := expired(self.id, body)) is not None:
                self._bury(item, body, late, attempts=attempt - 1)
                return
            signal = Signal(
                id=signal_id,
                source=source,
                type=signal_type,
                data=data,
                time=body.get("time"),
                cause=body.get("cause"),
                traceparent=body.get("traceparent"),
                sequence=item.sequence,
                attempt=attempt,
                deadline=body.get("deadline"),
            )
            began, before = monotonic(), self.emitted
            failure = await self._try(handling, signal, body.get("replyto"))
            if failure is None:
                self.runtime.trace.add(
                    self.id,
                    item.sequence,
                    self.epoch,
                    monotonic() - began,
                    attempt,
                    self.emitted - before,
                )
                if self.step_ledger is not None:
                    self.step_ledger.settle(cause_of(source, signal_id))
                self.runtime.counts.handled += 1
                if self.overtaking and self.past is not None:
                    # A replay goes by the order of the mailbox, in which this one has no place.
                    self.past.took_no_effect(item.sequence)
                    self.past.aside()
                self._advance(item)
                return
            if isinstance(failure, StateTooLargeError):
                raise failure
            most = attempts_of(body, self.runtime.attempts_max)
            if attempt >= most or isinstance(failure, _HOPELESS):
                self._bury(item, body, failure, attempts=attempt)
                return
            self.commit()
            await asyncio.sleep(self.runtime.retry_delay(attempt))
            if self.stopping is not None:
                raise asyncio.CancelledError
            if not self.runtime.is_valid():
                self.runtime.park(self)
                raise _Abandon
            attempt += 1
            if handling is not None and handling.adapter is not None:
                data = validated(handling, signal_type, body.get("data"))

    def _advance(self, item: _Stored) -> None:
        """The signal is done with: the next commit moves the cursor past it, or names it as ahead."""
        suspect = self.runtime.attempts.get(self.id, (0, 0))[0]
        if self.overtaking:
            self.ahead[item.sequence] = item.stamp
            is_past = item.sequence == suspect
        else:
            self.cursor = item.sequence
            if item.stamp > self.mark:
                self.mark = item.stamp
            self.consumed += 1
            if self.past is not None:
                self.past.done()
            is_past = item.sequence >= suspect
        if self.cautious and is_past:
            self.cautious = False
            self.runtime.attempts.pop(self.id, None)
        self.dirty = True
        self.uncommitted += 1

    async def _try(
        self, handling: Handling | None, signal: Signal[Any], reply_to: Any
    ) -> FoundationError | None:
        """Handle one signal; effects are kept only if this returns None."""
        try:
            result = await self._call(handling, signal)
            if reply_to is not None:
                self.agent.ctx._emissions += answer(reply_to, {"ok": result})
            self._effects(self._checked_state(), seed=str(signal.sequence), signal=signal)
            return None
        except (asyncio.CancelledError, _Abandon):
            self._roll_back()
            raise
        except FoundationError as error:
            self._roll_back()
            return error
        except Exception as error:
            self._roll_back()
            return handler_error(error)

    async def _call(self, handling: Handling | None, signal: Signal[Any]) -> Any:
        failpoint("handle.before")
        agent = self.agent
        agent.ctx._begin(signal)
        if is_of_kin(signal.type) and not hear(agent, signal):
            return None
        timeout = self.runtime.handler_timeout_s
        sequence = signal.sequence or 0
        if handling is not None and handling.timeout is not None:
            timeout = handling.timeout
        if agent._layers and handling is not None:
            handling = layered(handling, agent._layers)
        if handling is None:
            if not signal.type.startswith("cluster."):
                return None
            result = await self._observed(agent.handle_cluster_signal(signal), sequence)
        elif not handling.is_async:
            result = self.runtime.blackbox.call(
                handling.function, agent, signal, agent=self.id, sequence=sequence
            )
        elif timeout is None:
            result = await self._observed(handling.function(agent, signal), sequence)
        else:
            try:
                async with asyncio.timeout(timeout):
                    result = await self._observed(handling.function(agent, signal), sequence)
            except TimeoutError as error:
                raise HandlerError(
                    f"The handler of {signal.type} took longer than {timeout:g} s."
                ) from error
        if isinstance(result, AsyncGenerator):
            result = await self._drain(result, signal.type, sequence, timeout)
        failpoint("handle.after")
        return apply_result(agent, result) if are_directives(result) else result

    async def _drain(
        self, generator: AsyncGenerator[Any, None], type_: str, sequence: int, timeout: float | None
    ) -> Any:
        """Run a handler that is a generator to its end; its items go to who asked for them."""
        replies = self.replies
        try:
            async with asyncio.timeout(timeout):
                if replies is None:
                    return await self._observed(collected(generator), sequence)
                await replies.send(
                    generator,
                    observed=lambda work: self._observed(work, sequence),
                    may_go_on=self._may_go_on,
                )
                return Ended()
        except TimeoutError as error:
            raise HandlerError(f"The handler of {type_} took longer than {timeout} s.") from error

    def _may_go_on(self) -> FoundationError | None:
        if self.stopping is not None or self.failure is not None:
            return ending(self.id, "it is being stopped or moved")
        if not self.runtime.is_valid():
            return ending(self.id, "its node is not sure that it still holds it")
        return None

    async def _observed(self, coroutine: Coroutine[Any, Any, Any], sequence: int) -> Any:
        """Await a handler; should it end the process, the black box tells that it was this one."""
        box = self.runtime.blackbox
        is_done, result = box.step(coroutine, self.id, sequence)
        return result if is_done else await box.rest(coroutine, result, self.id, sequence)

    def _checked_state(self) -> bytes:
        state = dump_state(self.agent.state)
        if len(state) > self.runtime.state_max_bytes:
            raise StateTooLargeError(
                f"The state of {self.id} would be {len(state):,} bytes; the limit is "
                f"{self.runtime.state_max_bytes:,}. Nothing was stored.",
                hint="Keep large data elsewhere, or split the agent.",
            )
        return state

    def _roll_back(self) -> None:
        self.agent.state = restore_state(self.agent.state, self.state_json)
        self.agent.ctx._emissions = []
        self.agent.ctx._family = self.agent.ctx._family_kept

    def _effects(self, state: bytes, *, seed: str, signal: Signal[Any] | None = None) -> None:
        """Keep what a handler did, for the next commit; all of it, or an error and nothing.

        *seed* is the same whenever this cause is handled again, and of no other cause.
        """
        context = self.agent.ctx
        if context._emissions and self.agent._layers:
            context._emissions = outgoing(self.agent._layers, self.agent, context._emissions)
        items = self._emitted_items(context._emissions, seed, signal) if context._emissions else ()
        for item in items:
            self.outbox[item.msg_id] = item
            self.outbox_bytes += len(item.body)
            self.emitted += 1
            self.dirty = True
        context._emissions = []
        if context._family is not context._family_kept:
            context._family_kept = context._family
            self.dirty = True
        if context._sensor_orders:
            orders, context._sensor_orders = context._sensor_orders, None
            order_sensors(self, orders)
        if state != self.state_json:
            self.state_json = state
            self.dirty = True
            if self.past is not None and (signal is None or not signal.sequence):
                self.past.aside()
        if context._stop_reason is not None and self.stopping is None:
            reason, context._stop_reason = context._stop_reason, None
            self.runtime.stop_one(self, reason)

    def _emitted_items(
        self, emissions: list[Emission], seed: str, signal: Signal[Any] | None
    ) -> list[OutboxItem]:
        runtime = self.runtime
        items = outbox_items(
            runtime.subjects,
            self.id,
            emissions,
            salt=self.salt,
            seed=seed,
            emitted=self.emitted,
            signal=signal,
        )
        size = sum(len(item.body) for item in items)
        if size > runtime.emit_max_bytes:
            raise PayloadTooLargeError(
                f"{self.id} emitted {size:,} bytes for one signal; "
                f"the limit is {runtime.emit_max_bytes:,}.",
                hint="Emit references to the data, or spread it over several signals.",
            )
        return items

    def _unhandled(self, signal_type: str) -> UnhandledSignalError:
        return unhandled(type(self.agent), self.id, signal_type)

    def _bury(
        self,
        item: _Stored,
        body: dict[str, Any] | None,
        error: FoundationError,
        *,
        attempts: int,
    ) -> None:
        """Give the signal up: the dead letter is part of the commit that moves the cursor past it."""
        failpoint("deadletter.before_ack")
        self.runtime.counts.given_up += 1
        trace = error.details.get("traceback")
        raw = None if body is not None else item.data[:_TRACEBACK_MAX].decode("utf-8", "replace")
        letter = DeadLetter(
            agent=self.id,
            signal=body,
            raw=raw,
            sequence=item.sequence,
            code=error.code,
            reason=str(error),
            attempts=attempts,
            traceback=trace,
            at=utc_text(),
        )
        subject = self.runtime.subjects.dead(self.id)
        payload = letter.model_dump_json(exclude_none=True).encode()
        try:
            self.runtime.check_size(subject, payload)
        except PayloadTooLargeError:
            brief = letter.model_copy(update={"signal": None, "raw": None})
            payload = brief.model_dump_json(exclude_none=True).encode()
        msg_id = emitted_id(self.salt, str(item.sequence), -1, subject)
        self.outbox[msg_id] = OutboxItem(subject, msg_id, payload)
        self.outbox_bytes += len(payload)
        self._tell(body, letter, msg_id)
        if body is not None and is_of_kin(body["type"]):
            self._hear_buried(body, item.sequence)
        if self.past is not None:
            self.past.took_no_effect(item.sequence)
        self._advance(item)
        self.runtime.log.warning(
            "signal given up", agent=self.id, sequence=item.sequence, reason=error.code
        )

    def _hear_buried(self, body: dict[str, Any], sequence: int) -> None:
        """A child has ended all the same, although the handler of that has failed."""
        signal: Signal[Any] = Signal(
            id=body["id"], source=body["source"], type=body["type"], data=body.get("data")
        )
        self.agent.ctx._begin(signal)
        hear(self.agent, signal)
        self._effects(self.state_json, seed=f"buried-{sequence}")

    def _tell(self, body: dict[str, Any] | None, letter: DeadLetter, seed: str) -> None:
        """Whoever waits for the answer, or asked to be told, learns of the dead letter: with it."""
        source = f"agent:{self.id}"
        for word in words(self.runtime.subjects, body, letter, source=source, seed=seed):
            self.outbox[word.msg_id] = OutboxItem(word.subject, word.msg_id, word.payload)
            self.outbox_bytes += len(word.payload)

    async def _may_try(self, item: _Stored) -> bool:
        """Write down that a signal which ended a worker is tried again; False: it was tried enough."""
        sequence, tries = self.runtime.attempts.get(self.id, (0, 0))
        if sequence != item.sequence:
            return True
        body, _ = content(item.data)
        if tries >= attempts_of(body, self.runtime.attempts_max):
            known = self.recovered is not None and self.recovered.sequence == item.sequence
            cause = self.recovered.cause if known and self.recovered is not None else None
            error = HandlerError(
                f"Handling it ended the worker process {tries} times "
                f"({cause or 'a crash in native code, an exit, or too much memory'})."
            )
            self._bury(item, body, error, attempts=tries)
            # Stored before the next signal, which may end the worker too.
            self.commit()
            await self._wait_committed()
            return False
        self.runtime.attempts[self.id] = (item.sequence, tries + 1)
        self.dirty = True
        self.commit()
        await self._wait_committed()
        return True

    # ---- asks -------------------------------------------------------------------

    async def _handle_ask(self, item: _Ask) -> None:
        if not self.runtime.is_valid() or self.starting:
            self._refuse(item.reply)
            return
        self.asked += 1
        try:
            body = orjson.loads(item.data)
            Envelope.model_validate(body)
        except (ValueError, RecursionError) as error:
            self._send_reply(item.reply, orjson.dumps(error_body(_malformed(item.data, error))))
            return
        signal_type = body["type"]
        handling: Handling | None = None
        result: Any = None
        failure: FoundationError | None = None
        before = self.state_json, len(self.outbox)
        try:
            handling = self._handlings.find(signal_type, body)
            if handling is None and not is_notice(signal_type):
                raise self._unhandled(signal_type)
            if (late := expired(self.id, body)) is not None:
                raise late
            signal = Signal(
                id=body["id"],
                source=body["source"],
                type=signal_type,
                data=validated(handling, signal_type, body.get("data")),
                time=body.get("time"),
                traceparent=body.get("traceparent"),
                deadline=body.get("deadline"),
            )
            self.replies = asked_for(
                body, self.epoch, lambda item_: self.runtime.bus.publish(item.reply, item_)
            )
            if self.replies is not None:
                # What an item rests on is stored, but for what its own handler does.
                await self._wait_committed()
            answered = await self._call(handling, signal)
            result = to_json(answered) if self.replies is None else self.replies.last(answered)
            self._effects(
                self._checked_state(), seed=f"ask-{self.epoch}-{self.emitted}", signal=signal
            )
        except (asyncio.CancelledError, _Abandon):
            self.replies = None
            self._roll_back()
            self._refuse(item.reply, sure=not self.step_ledger)
            raise
        except FoundationError as error:
            failure = error
        except Exception as error:
            failure = handler_error(error)
        if self.step_ledger is not None and self.step_ledger.settle(
            cause_of(body["source"], body["id"])
        ):
            self.dirty = True
        if failure is not None:
            self._roll_back()
            reply = orjson.dumps(error_body(failure))
        else:
            reply = b'{"ok":%b}' % result if self.replies is None else result
        self.replies = None
        self.runtime.counts.answered += 1
        if (self.state_json, len(self.outbox)) != before:
            self.uncommitted += 1
        # The answer may rest on effects that are not stored yet: it leaves with the
        # commit that covers them, which is the one in flight if nothing came since.
        if self.dirty:
            self._awaiting.append((item.reply, reply))
        elif self.in_flight is not None:
            self.in_flight[3].append((item.reply, reply))
        elif self.runtime.is_valid():
            self._send_reply(item.reply, reply)
        else:
            self._refuse(item.reply)

    def _send_reply(self, reply: str, body: bytes) -> None:
        try:
            self.runtime.bus.publish(reply, body)
        except PayloadTooLargeError as error:
            self.runtime.bus.publish(reply, orjson.dumps(error_body(error)))
        except BusError:
            pass  # the asker's time-out tells it that the outcome is unknown

    # ---- commit -----------------------------------------------------------------

    def commit(self) -> None:
        """Store what is dirty, unless a commit is in flight: then the next one covers it."""
        if not self.dirty or self.in_flight is not None or self.failure is not None:
            return
        if not self.agent.durable:
            self._commit_nothing()
            return
        if not self.runtime.may_commit(self):
            return
        failpoint("commit.before_cas")
        if self.skip:
            self.skip = [sequence for sequence in self.skip if sequence > self.cursor]
        items = list(self.outbox.values())
        past = self.past
        payload = encode_record(
            epoch=self.epoch,
            commit=self.commit_no + 1,
            writer=self.runtime.writer_json,
            cursor=self.cursor,
            mark=self.mark,
            run=self.run_name,
            state=self.state_json,
            salt=self.salt,
            emitted=self.emitted,
            outbox=[] if planted("drop_outbox") else items,
            attempt=self.runtime.attempts.get(self.id) if self.cautious else None,
            outbox_since=self.recovered_at if self.recovering else "",
            skip=self.skip,
            ahead=self.ahead,
            steps=self.step_ledger,
            sensors=self.positions,
            family=self.agent.ctx._family_kept,
            schema_version=self._kind.version,
            past=None if past is None else past.encoded(),
        )
        self.commit_no += 1
        self.in_flight = [payload, self.cursor, items, self._awaiting]
        if past is not None:
            self.in_flight += past.mark(), self._base()
        self._awaiting = []
        self.dirty = False
        self.uncommitted = 0
        self.store()

    def _commit_nothing(self) -> None:
        self.dirty = False
        self.uncommitted = 0
        self.committed_cursor = self.cursor
        self.runtime.moved(self)
        awaiting, self._awaiting = self._awaiting, []
        for reply, body in awaiting:
            self._send_reply(reply, body)
        self._publish(list(self.outbox.values()))

    def store(self) -> None:
        """Send the commit in flight (again)."""
        assert self.in_flight is not None
        try:
            self.runtime.state.replace_nowait(
                self.id, self.in_flight[0], expected=self.revision, on_ack=self._on_stored
            )
        except PayloadTooLargeError as error:
            self.fail(StateTooLargeError(f"The record of {self.id} does not fit: {error}"))
        except BusError:
            self.runtime.resolve(self)

    def _on_stored(self, ack: PubAck | FoundationError) -> None:
        if self.in_flight is None:
            return
        if isinstance(ack, PubAck):
            self.stored_as(ack.sequence)
        else:
            self.runtime.resolve(self)

    def stored_as(self, revision: int) -> None:
        """The commit in flight is stored: let its replies and emitted signals go."""
        assert self.in_flight is not None
        _, cursor, items, awaiting, *past = self.in_flight
        self.in_flight = None
        self.runtime.commits_in_flight -= 1
        self.revision = revision
        self.committed_cursor = cursor
        self.committed_outbox = len(items)
        failpoint("commit.after_cas_before_outbox")
        if self.past is not None and past:
            self.past.committed(past[0])
            self._store_base(past[1])
        self.runtime.counts.commits += 1
        self.runtime.moved(self)
        for reply, body in awaiting:
            self._send_reply(reply, body)
        if items:
            self._publish(items)
        if self.dirty:
            self.commit()
        if self.in_flight is None and self.outbox == {} and self.committed_outbox:
            self.runtime.clear_later(self)
        self.runtime.committed(self)
        self.runtime.commit_next()
        self.resume()

    def _base(self) -> tuple[BaseRecord, bytes] | None:
        """What is being committed, as a base, if it is time for one."""
        if self.past is None or (place := self.past.next_place()) is None:
            return None
        base = self.past.begin(place, self.cursor)
        return base, encode_base(
            base,
            epoch=self.epoch,
            run=self.run_name,
            state=self.state_json,
            schema_version=self._kind.version,
        )

    def store_first_base(self) -> None:
        """The claim is stored: what it found is what a replay can begin with."""
        if self.past is not None:
            self._store_base(self._base())

    def _store_base(self, base: tuple[BaseRecord, bytes] | None) -> None:
        """Store a base of a commit that is stored; the next commit names it."""
        past = self.past
        if past is None or base is None:
            return
        made, value = base
        # Its place was named by a record until now; what is there from now on may be either.
        past.bases = [known for known in past.bases if known.place != made.place]

        def on_ack(ack: PubAck | FoundationError) -> None:
            past.end(made, is_stored=isinstance(ack, PubAck))
            if self.runtime.holds(self) and self.failure is None and self.stopping is None:
                self.dirty = True
                self.commit()

        try:
            self.runtime.state.overwrite_nowait(base_key(self.id, made.place), value, on_ack=on_ack)
        except BusError:
            past.end(made, is_stored=False)

    @property
    def steps(self) -> StepLedger:
        """What was begun and done outside, until its signal has taken effect."""
        if self.step_ledger is None:
            self.step_ledger = StepLedger(bytes_max=self.runtime.steps_max_bytes)
        return self.step_ledger

    async def store_steps(self) -> None:
        """Store the ledger, in the middle of a handler: with the state as it was before that."""
        self.dirty = True
        await self._wait_committed()
        if not self.runtime.is_valid():
            self.runtime.park(self)
            raise _Abandon

    async def _wait_committed(self) -> None:
        while self.dirty or self.in_flight is not None:
            if self.failure is not None:
                raise _Abandon
            self.commit()
            await self.runtime.next_commit(self)

    # ---- outbox -----------------------------------------------------------------

    def _publish(self, items: list[OutboxItem]) -> None:
        """Publish stored items that are not on their way yet, in order per receiver.

        While it is not known which of the recovered ones were published before, all wait.
        """
        if self.held is not None:
            self.held = items
            return
        if self._waiting is None:
            self._waiting = {}
        for item in items:
            # Every commit brings all that was not acknowledged when it left.
            if item.in_line or item.msg_id not in self.outbox:
                continue
            item.in_line = True
            line = self._waiting.get(item.subject)
            if line is None:
                self._waiting[item.subject] = deque((item,))
                self._publish_head(item.subject)
            else:
                line.append(item)

    def _publish_head(self, subject: str) -> None:
        if self._waiting is None or self.failure is not None:
            return
        line = self._waiting[subject]
        item = line[0]
        if not self.runtime.is_valid():
            # Perhaps replaced long ago: then the successor publishes it, from the record.
            self.runtime.publish_again_after(_NOT_VALID_S, self, subject)
            return

        def on_ack(ack: PubAck | FoundationError) -> None:
            if isinstance(ack, PubAck):
                failpoint("outbox.mid")
                self._acknowledged(subject, line, item)
            else:
                self.runtime.publish_later(self, subject, item, ack)

        self.runtime.append(subject, item, on_ack)

    def publish_again(self, subject: str) -> None:
        """Try the head of *subject*'s line once more."""
        if self._waiting is not None and subject in self._waiting:
            self._publish_head(subject)

    def publish_late(self, subject: str, item: OutboxItem, is_stored: bool) -> None:
        """The stream was searched for the head of *subject*'s line: go on with what it said."""
        if self._waiting is None or self.failure is not None:
            return
        line = self._waiting.get(subject)
        if not line or line[0] is not item:
            return
        if is_stored:
            self._acknowledged(subject, line, item)
        else:
            self._publish_head(subject)

    def _acknowledged(self, subject: str, line: deque[OutboxItem], item: OutboxItem) -> None:
        if self.outbox.pop(item.msg_id, None) is not None:
            self.outbox_bytes -= len(item.body)
        line.popleft()
        if line:
            self._publish_head(subject)
            if self._choked and not self._is_choked():
                self.resume()
        else:
            self._published(subject)

    def give_up_publishing(self, subject: str, error: FoundationError) -> None:
        """Its receiver is full for too long: the signal becomes a dead letter of the receiver.

        Signal and dead letter change places in one commit, so it is never both.
        """
        if self._waiting is None or subject not in self._waiting:
            return
        line = self._waiting[subject]
        item = line.popleft()
        if line:
            # The receiver is as full for the next one: it has waited long enough too.
            line[0].refused_since = item.refused_since
            self._publish_head(subject)
        else:
            del self._waiting[subject]
        self.outbox_bytes -= len(item.body)
        del self.outbox[item.msg_id]
        signal = orjson.loads(item.body)
        receiver = subject.rpartition(".")[2] if ".signal.agent." in subject else "route"
        letter = DeadLetter(
            agent=receiver,
            signal=signal,
            code=error.code,
            reason=f"{self.id} could not deliver it: {error}",
            at=utc_text(),
        )
        dead = self.runtime.subjects.dead(receiver)
        payload = letter.model_dump_json(exclude_none=True).encode()
        msg_id = emitted_id(self.salt, item.msg_id, -2, dead)
        self.outbox[msg_id] = OutboxItem(dead, msg_id, payload)
        self.outbox_bytes += len(payload)
        self._tell(signal, letter, msg_id)
        self.dirty = True
        self.runtime.log.warning("emitted signal given up", agent=self.id, receiver=receiver)
        self.commit()
        self.resume()

    def _published(self, subject: str) -> None:
        assert self._waiting is not None
        del self._waiting[subject]
        if not self._waiting:
            self._waiting = None
            self.recovering = False
            failpoint("outbox.after")
            self.runtime.committed(self)
            if self.committed_outbox and self.agent.durable:
                self.runtime.clear_later(self)
        if self.stopping is not None or self.queue:
            self.resume()

    def publish_recovered(self) -> None:
        """Publish what the record of the earlier activation had not yet published."""
        items, self.held = self.held, None
        if items:
            # Not the whole outbox: what was emitted since and is not stored must not leave.
            self._publish(items)

    # ---- end --------------------------------------------------------------------

    def stop(self, reason: str) -> asyncio.Future[None]:
        """Finish the signal in hand, store, publish, end; resolves when that is done."""
        if self.stopped is None:
            self.stopped = asyncio.get_running_loop().create_future()
        if self.stopping is None:
            self.stopping = reason
            if self.task is None:
                self.runtime.pool.submit(self)
        return self.stopped

    async def _finish(self) -> None:
        assert self.stopping is not None
        if self.stopped is not None and self.stopped.done():
            return
        if self.route is not None:
            self.runtime.bus.unsubscribe(self.route)
        if self.sensing is not None:
            await self.sensing.close()
        failpoint("release.before")
        if not self.starting and self.failure is None:
            self.agent.ctx._begin(None)
            try:
                async with asyncio.timeout(5):
                    if self.stopping == MOVED:
                        await self._tell_move()
                    await end(self.agent, self.stopping)
                self._effects(self._checked_state(), seed=f"stop-{self.epoch}")
            except (Exception, _Abandon) as error:
                self.runtime.log.warning("on_stop failed", agent=self.id, exc_info=error)
                self._roll_back()
            self.starting = True  # on_stop runs once
        self.refuse_queued()
        try:
            async with asyncio.timeout(self.runtime.stop_timeout_s):
                await self._wait_committed()
                while self.outbox:
                    await self.runtime.next_commit(self)
                if self.committed_outbox and self.agent.durable and self.runtime.is_valid():
                    self.dirty = True
                    await self._wait_committed()
        except (TimeoutError, _Abandon):
            pass  # the record holds the outbox; the next activation publishes it
        failpoint("release.after")
        self.runtime.ended(self)

    async def _tell_move(self) -> None:
        """It is about to be moved: the last thing that it hears here."""
        data = {"node": self.runtime.node, "to": self.target}
        kind = "cluster.about_to_move"
        id = f"move-{self.epoch}"
        body = {"id": id, "source": "cluster", "data": data}
        handling = self._handlings.find(kind, body)
        signal: Signal[Any] = Signal(
            id=id,
            source="cluster",
            type=kind,
            data=validated(handling, kind, data),
            time=utc_text(),
        )
        await self._call(handling, signal)
        self._effects(self._checked_state(), seed=id)
        self.agent.ctx._begin(None)

    def refuse_queued(self) -> None:
        """Tell waiting askers that they must ask elsewhere."""
        for item in self.queue or ():
            if isinstance(item, _Ask):
                self._refuse(item.reply)
        self.queue = self.urgent = None

    def fail(self, error: FoundationError) -> None:
        """End at once because of *error*; nothing more is stored."""
        if self.failure is not None:
            return
        self.failure = str(error)
        if self.route is not None:
            self.runtime.bus.unsubscribe(self.route)
        if isinstance(error, FencedError | StateInvalidError):
            # What was handled may be stored, and whoever has the agent now may have been asked, too.
            said: FoundationError = AskTimeoutError(
                f"{self.id} was replaced before it was known whether what it did is stored: {error}",
                hint="It may have handled the question all the same.",
                agent=self.id,
            )
        else:
            said = error
        for reply, _ in self._awaiting + (self.in_flight[3] if self.in_flight else []):
            self._send_reply(reply, orjson.dumps(error_body(said)))
        self._awaiting = []
        if self.in_flight is not None:
            self.in_flight = None
            self.runtime.commits_in_flight -= 1
        self.refuse_queued()
        self.runtime.failed(self, error)
        self.runtime.commit_next()


def place_of(raw: bytes) -> tuple[int, int, str]:
    """Sequence, last sequence and stamp of a live copy; every signal passes here."""
    start = raw.find(b"\r\nNats-Sequence: ")
    if start < 0:
        return 0, 0, ""
    sequence = int(raw[start + 17 : raw.find(b"\r\n", start + 17)])
    start = raw.find(b"\r\nNats-Last-Sequence: ")
    last = 0 if start < 0 else int(raw[start + 22 : raw.find(b"\r\n", start + 22)])
    start = raw.find(b"\r\nNats-Time-Stamp: ")
    if start < 0:
        return sequence, last, ""
    return sequence, last, stamp(raw[start + 19 : raw.find(b"\r\n", start + 19)].decode())


def _malformed(data: bytes, error: Exception) -> PayloadInvalidError:
    return PayloadInvalidError(
        f"Not a CloudEvents 1.0 envelope in JSON: {type(error).__name__}: {str(error)[:200]}."
    )
