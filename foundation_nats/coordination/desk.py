"""`Desk`: stored questions to agents, with fixed ids, and the box in which the answers are stored.

A question is a durable signal that names a box (`replyto`); what its handler returns is
emitted to the box in the same commit as the handler's effects, and why it could not be handled
in the commit of the dead letter. A box is the mailbox of an agent that does not exist: any
process can read it, so whoever goes on with a pattern finds the answers of all the questions
that its predecessor has asked.

Guaranteed: a question is handled at most once however often it is asked under its id, by
however many processes. Within the duplicate window the stream sees to it. Later, `ask` looks for
its traces first: in the agent's mailbox, then in its outbox, then in the box. A question that
was handled is in one of them, in this order, until the box is cleared. A pattern that trims
while others may ask says by `still` whether the answer is recorded: its record is changed
before the box is trimmed, and read after the traces.

Not guaranteed: an answer (the agent may never come back). An answer that comes after `clear` stays
in the stream until the box is cleared again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import to_json
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.bus.wire import Message, Route
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    FoundationError,
)
from foundation_nats.signaling.envelope import BOX, encode_envelope, message_id
from foundation_nats.signaling.evidence import SAFE_SHARE, is_stored, parse_time
from foundation_nats.signaling.publisher import Publisher
from foundation_schemas import Target, TargetKind
from foundation_schemas.base import is_name

_RETRY_S = 0.1
_PAGES_MAX = 400


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent's handler returned, or why it did not."""

    ok: Any = None
    code: str = ""
    """Of the error; empty: there was none."""
    message: str = ""
    stored: float = field(default=0.0, compare=False)
    """When, by the server's clock."""
    sequence: int = field(default=0, compare=False)
    """Its place in the box."""

    @property
    def is_error(self) -> bool:
        """Whether there is no result."""
        return bool(self.code)


def agent_names(names: Collection[str], what: str) -> list[str]:
    """*names* as ids of agents; ``agent:`` in front is allowed.

    Raises:
        ConfigError: one of them is none.
    """
    found = [name.removeprefix("agent:") for name in names]
    for name in found:
        if not is_name(name):
            raise ConfigError(f"{what}: {name!r} is no id of an agent.")
    return found


class Desk:
    """Asks under fixed ids, and reads the box; enter it to hear of answers."""

    def __init__(self, connection: Connection, box: str, wake: asyncio.Event) -> None:
        """*box* is what identifies the pattern, such as ``vote-17``; *wake* is set at every answer."""
        self.source = f"pattern:{box}"
        self._box = BOX + box
        self._bus = connection.bus
        self._subjects = connection.subjects
        self._wake = wake
        self._publisher = Publisher(connection.bus, connection.subjects, self.source)
        self._signals = StreamReader(connection.bus, connection.subjects.signals_stream)
        self._states = Bucket(connection.bus, connection.subjects, "state")
        self._agents = Bucket(connection.bus, connection.subjects, "agents")
        self._route: Route | None = None
        self._window_s: float | None = None
        self._answers: dict[str, Answer] = {}
        self._read_to = 0
        self._log = get_logger("desk").bind(box=self._box)

    async def __aenter__(self) -> Self:
        self._route = self._bus.subscribe(self._subjects.live(self._box), self._on_answer)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._route is not None:
            self._bus.unsubscribe(self._route)

    def _on_answer(self, _message: Message) -> None:
        self._wake.set()

    async def ask(
        self,
        agent: str,
        id: str,
        type: str,
        data: Any,
        *,
        until: float,
        since: float,
        now: float,
        deadline: float | None = None,
        answer: bool = True,
        still: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Store a question for *agent*, unless it was; without *answer*: a message.

        Args:
            until: how long to try (`monotonic`).
            since: when it may have been asked first, by the server's clock; so is *now*.
            deadline: after it (by the server's clock) it is not handled any more.
            still: asked after its traces were looked for in vain: whether they were not cleared meanwhile,
                because its answer is recorded; needed by those that `trim` while others may ask.

        Raises:
            BusTimeoutError, BusUnavailableError, MailboxFullError: it may not be stored.
            PayloadTooLargeError, ConfigError: it can't be.
        """
        subject = self._subjects.mailbox(agent)
        msg_id = message_id(f"agent:{agent}", self.source, id)
        try:
            payload = encode_envelope(
                id=id,
                source=self.source,
                type=type,
                target=f"agent:{agent}",
                data=data,
                deadline=None if deadline is None else _time_text(deadline),
            )
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
        if answer:
            payload = b"%b,%b}" % (payload[:-1], to_json({"replyto": self._box})[1:-1])
        if now - since > await self._window(until) * SAFE_SHARE and (
            await self._was_asked(agent, id, msg_id, since, until)
            or (still is not None and not await still())
        ):
            return
        left = max(0.1, until - monotonic())
        await self._publisher.store(subject, payload, msg_id, timeout=left)
        failpoint("desk.after_ask")

    async def announce(self, topic: str, id: str, type: str, data: Any, *, until: float) -> None:
        """Send a signal to all that subscribe to *topic*, under a fixed id: a repeat counts once, within
        the duplicate window.

        Raises:
            BusTimeoutError, BusUnavailableError: it may not be stored.
        """
        await self._publisher.send(
            Target(kind=TargetKind.TOPIC, name=topic),
            type,
            data,
            id=id,
            timeout=max(0.1, until - monotonic()),
        )

    async def _was_asked(
        self, agent: str, id: str, msg_id: str, since: float, until: float
    ) -> bool:
        """In the order in which a question that is being handled leaves its traces."""
        while True:
            try:
                start = datetime.fromtimestamp(since, UTC)
                if await is_stored(self._signals, self._subjects.mailbox(agent), msg_id, start):
                    return True
                entry = await self._states.read(agent)
                value = b"" if entry is None or entry.value is None else entry.value
                if self._subjects.mailbox(self._box).encode() in value and to_json(id) in value:
                    return True
                # Its answer may be younger than what a replica knows.
                last = await self._signals.last_from_leader(self._subjects.mailbox(self._box))
                while last is not None and id not in self._answers:
                    await self.answers(until)
                    if self._read_to >= last.sequence or monotonic() >= until:
                        break
                    await asyncio.sleep(_RETRY_S)
                return id in self._answers
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _window(self, until: float) -> float:
        while self._window_s is None:
            try:
                config = (await self._signals.info())["config"]
                self._window_s = int(config.get("duplicate_window", 0)) / 1e9
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)
        return self._window_s

    async def answers(self, until: float) -> dict[str, Answer]:
        """By the id of the question; of several answers the first.

        Raises:
            BusTimeoutError, BusUnavailableError: not readable by *until*.
        """
        subject = self._subjects.mailbox(self._box)
        while True:
            try:
                for _ in range(_PAGES_MAX):
                    # A replica may be behind: what it lacks is there at the next look.
                    messages, more = await self._signals.page(subject, self._read_to + 1)
                    for message in messages:
                        self._read_to = message.sequence
                        self._take(message)
                    if not more or not messages:
                        return self._answers
                return self._answers
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)

    def _take(self, stored: StoredMessage) -> None:
        try:
            body = orjson.loads(stored.data)
            where: dict[str, Any] = {
                "stored": parse_time(stored.time).timestamp(),
                "sequence": stored.sequence,
            }
            said = body["data"]
            cause = said.get("cause") or body["cause"]
            error = said.get("error")
            found = (
                Answer(ok=said.get("ok"), **where)
                if error is None
                else Answer(code=str(error["code"]), message=str(error["message"]), **where)
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # somebody else's
        self._answers.setdefault(str(cause), found)

    async def exists(self, agent: str, until: float) -> bool:
        """Whether an agent of this id is registered.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        while True:
            try:
                entry = await self._agents.read(agent)
                return entry is not None and entry.value is not None
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def trim(self, is_over: Callable[[str], bool]) -> None:
        """Forget and remove the oldest answers, up to the first whose question is not over."""
        for id in [id for id in self._answers if is_over(id)]:
            del self._answers[id]
        oldest = min((answer.sequence for answer in self._answers.values()), default=None)
        below = self._read_to + 1 if oldest is None else oldest
        try:
            await self._signals.purge(self._subjects.mailbox(self._box), below=below)
        except (BusError, FoundationError) as error:
            self._log.info("answers are left behind", error=str(error))

    async def clear(self) -> None:
        """Remove the answers, once what they said is recorded elsewhere."""
        try:
            await self._signals.purge(self._subjects.mailbox(self._box))
        except (BusError, FoundationError) as error:
            self._log.info("answers are left behind", error=str(error))


def _time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


__all__ = ["Answer", "Desk", "agent_names"]
