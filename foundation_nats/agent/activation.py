"""`Activation`: one agent in memory under one epoch: what it is, and what reaches it.

It consumes its mailbox in order and exactly once. What becomes of what it takes in is
told by the modules that work on it, each a few functions over an activation:

- `turns.py` works off its queue: `delivering.py` signals, `asking.py` questions,
  `lifecycle.py` start, sleep and end;
- `calling.py` runs the agent's handlers, and `effects.py` keeps what they did;
- `committing.py` stores that, and `publishing.py` lets go what was emitted.

Its place in the mailbox is `mailbox.py`'s, and its emitted signals are `outgoing.py`'s;
both are pure. Here are the fields that the others share, how messages are taken in, and
how an activation is told to end.

Obligations of the caller (`runtime.py`): claim the record before `begin`, feed
`on_message` in order of arrival, call `resume` when the right to answer or the
connection is back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from foundation_nats.agent.agent import Agent
from foundation_nats.agent.handling import handlings
from foundation_nats.agent.intake import Intake, source_of
from foundation_nats.agent.mailbox import (
    GAP,
    NEXT,
    REWOUND,
    Ask,
    Item,
    Mailbox,
    Sleep,
    Start,
    place_of,
)
from foundation_nats.agent.outgoing import Outbox
from foundation_nats.agent.past import Past
from foundation_nats.agent.record import OutboxItem
from foundation_nats.agent.steps import StepLedger
from foundation_nats.agent.streaming import Replies, read_flow
from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.rpc import REPLY_PREFIX, error_body
from foundation_nats.bus.streams import StoredMessage
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import (
    AgentUnavailableError,
    AskTimeoutError,
    BusError,
    FencedError,
    FoundationError,
    OverloadError,
    PayloadTooLargeError,
    StateInvalidError,
)
from foundation_schemas import AgentRecord, BaseRecord, RecoveredFrom

if TYPE_CHECKING:
    from foundation_nats.agent.runtime import Runtime

HIBERNATED = "hibernated"
"""The reason of the `on_stop` before it sleeps, and of `recovered_from` when it wakes."""
REST_MIN_S = 0.001


@dataclass(slots=True)
class InFlight:
    """A commit that was sent and not yet answered."""

    payload: bytes
    cursor: int
    items: list[OutboxItem]
    """The outbox as the record holds it."""
    awaiting: list[tuple[str, bytes]]
    """Replies that leave when it is stored."""
    past: tuple[tuple[BaseRecord, ...], int] | None
    """As `Past.mark`."""
    base: tuple[BaseRecord, bytes] | None
    """To be stored beside it."""


class Company(Protocol):
    """What runs beside the handlers of an activation: its sensors (`sensors/host.py`)."""

    def begin(self) -> None:
        """The agent is running: so is its company."""

    def order(self, orders: Iterable[Any]) -> None:
        """Start and stop these once the effects of the signal in hand are stored."""

    def stop(self) -> None:
        """End it at once."""

    async def close(self) -> None:
        """End it in good order."""


class Abandoned(BaseException):
    """The activation ends here; what is in hand is left to its successor.

    No handler shall take it for an error of its own.
    """


class Activation:
    """One agent under one epoch."""

    __slots__ = (
        "agent",
        "asked",
        "awaiting",
        "cautious",
        "commit_no",
        "committed_cursor",
        "consumed",
        "dirty",
        "emitted",
        "epoch",
        "failure",
        "handlings",
        "id",
        "in_flight",
        "intake",
        "kind",
        "mailbox",
        "outbox",
        "overtaking",
        "past",
        "positions",
        "recovered",
        "replies",
        "resting",
        "revision",
        "route",
        "run_name",
        "runtime",
        "salt",
        "scheduled",
        "sensing",
        "starting",
        "state_json",
        "step_ledger",
        "stopped",
        "stopping",
        "target",
        "task",
        "uncommitted",
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
        self.kind = type(agent).State
        self.handlings = handlings(type(agent))
        self.recovered = recovered
        self.state_json = state_json
        """The state after the last handled signal."""
        self.mailbox = Mailbox(cursor, mark, skip=skip, ahead=ahead or {})
        self.outbox = Outbox(outbox)
        self.committed_cursor = cursor
        """How far the stored record says that it has come."""
        self.asked = 0
        """Questions that it has begun to answer."""
        self.consumed = 0
        """Signals that this activation has handled or given up."""
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
        self.sensing: Company | None = None
        """Its sensors, while they run."""
        self.commit_no = commit_no
        self.revision = revision
        self.salt = salt
        self.emitted = emitted
        self.awaiting: list[tuple[str, bytes]] = []
        """Replies that leave with the commit in flight or the next one."""
        self.route: Route | None = None
        self.scheduled = False
        self.cautious = False
        """A signal has ended its worker: mark each further attempt at it in the record first."""
        self.dirty = False
        self.in_flight: InFlight | None = None
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
            self.send_reply(message.reply, self.runtime.trace.answer(self.id, message.data))

    def _on_live(self, message: Message) -> None:
        failpoint("live.received")
        sequence, last, stored_at = place_of(message.raw_headers or b"")
        runtime = self.runtime
        found = self.mailbox.hear(sequence, last, stored_at, message.data, runtime.in_memory_max)
        if found is NEXT:
            runtime.pool.submit(self)
        elif found is GAP:
            self.fall_behind()
        elif found is REWOUND:
            self.rewound()

    def _on_ask(self, message: Message) -> None:
        if self.stopping is not None or not self.runtime.is_valid():
            self.refuse(message.reply)
            return
        if self.mailbox.backlog >= 2 * self.runtime.in_memory_max:
            busy = AgentUnavailableError(
                f"{self.id} has too much to do.", busy=True, refused=self.epoch, sure=True
            )
            self.send_reply(message.reply, orjson.dumps(error_body(busy)))
            return
        if self.intake is not None and not self.starting:
            wait = self.intake.wait_s(source_of(message.data), monotonic())
            if wait or self.resting:
                wait = max(wait, REST_MIN_S)
                overload = OverloadError(
                    f"{self.id} takes in no more than it may: ask again in {wait:.2f} s.",
                    name=self.id,
                    retry_in_s=round(wait, 3),
                )
                self.send_reply(message.reply, orjson.dumps(error_body(overload)))
                return
        self.put(Ask(message.reply, message.data))

    def _on_flow(self, data: bytes) -> None:
        if self.replies is not None:
            self.replies.on_flow(data)
        flow = read_flow(data)
        if flow is not None and flow[2]:
            # Its asker does not wait any more.
            self.mailbox.drop_question(orjson.dumps(flow[0]))

    def refuse(self, reply: str, *, sure: bool = True) -> None:
        """Say that nothing was handled: here, and, as long as our right holds, anywhere."""
        error = AgentUnavailableError(
            f"{self.id} may not answer on {self.runtime.node} now: "
            "the node is stopping, or not sure that it still holds the agent.",
            hint="Ask again.",
            refused=self.epoch,
            sure=sure and self.runtime.is_valid(),
        )
        self.send_reply(reply, orjson.dumps(error_body(error)))

    def put(self, item: Item) -> None:
        """Queue something to do."""
        self.mailbox.put(item)
        self.runtime.pool.submit(self)

    def begin(self) -> None:
        """Queue `on_start` before everything else."""
        self.put(Start())

    def fall_behind(self) -> None:
        """Drop live copies from now on and read the stream instead."""
        if not self.mailbox.behind:
            self.mailbox.behind = True
            self.runtime.mailboxes.catch_up(self)

    def take_page(self, messages: list[StoredMessage], more: bool) -> bool:
        """Take what the stream holds beyond what was taken in; True when caught up."""
        is_caught_up = self.mailbox.take_page(messages, more)
        if messages:
            self.runtime.pool.submit(self)
        return is_caught_up

    def rewound(self) -> None:
        """The stream has gone back: follow it, after all that was taken in before."""
        if not self.mailbox.rewinding and self.stopping is None and self.failure is None:
            self.mailbox.rewind()
            self.runtime.pool.submit(self)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that it does, has to do, or waits for."""
        return not (
            self.mailbox.queue
            or self.task is not None
            or self.dirty
            or self.in_flight is not None
            or self.outbox
            or self.outbox.committed
            or self.starting
            or self.mailbox.behind
            or not self.mailbox.checked
            or self.mailbox.rewinding
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
        self.put(Sleep())

    # ---- going on ---------------------------------------------------------------

    def resume(self) -> None:
        """Go on, if there is anything to do."""
        if self.mailbox.queue or self.stopping is not None:
            self.runtime.pool.submit(self)

    def is_choked(self) -> bool:
        """Whether receivers must take some of what was emitted before more is handled."""
        runtime = self.runtime
        return self.outbox.look_if_choked(runtime.outbox_max, runtime.outbox_max_bytes)

    def unchoke(self) -> None:
        """Go on as soon as there is any room in the outbox."""
        self.outbox.choked = False
        self.resume()

    def send_reply(self, reply: str, body: bytes) -> None:
        """Answer somebody; never waits."""
        try:
            self.runtime.bus.publish(reply, body)
        except PayloadTooLargeError as error:
            self.runtime.bus.publish(reply, orjson.dumps(error_body(error)))
        except BusError:
            pass  # the asker's time-out tells it that the outcome is unknown

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

    def refuse_queued(self) -> None:
        """Tell waiting askers that they must ask elsewhere."""
        for item in self.mailbox.drop_all():
            self.refuse(item.reply)

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
        for reply, _ in self.awaiting + (self.in_flight.awaiting if self.in_flight else []):
            self.send_reply(reply, orjson.dumps(error_body(said)))
        self.awaiting = []
        if self.in_flight is not None:
            self.in_flight = None
            self.runtime.commits.in_flight -= 1
        self.refuse_queued()
        self.runtime.failed(self, error)
        self.runtime.commits.commit_next()
