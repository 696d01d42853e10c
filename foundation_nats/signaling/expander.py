"""Signals for many become signals for each: one shared, durable pull consumer, served by every node.

The sender pays one publish. A route message is acknowledged only after every
receiver's mailbox has stored its copy; copies carry ids derived from the route
message, so that an expansion that was cut short is repeated without harm.
Receivers are those that the registry wants to run at the time of expansion,
running or not: mail waits. ``any:`` picks one receiver and writes the choice
down before it sends, so that a repeat picks the same. A receiver whose mailbox
stays full gets a dead letter instead, long before the others' copies could be
forgotten by the stream and be stored twice.

An answer to the stream (done, or try again) may be lost with the connection; it is
given again after a reconnect, because without it the message comes again only after
`assets.ROUTE_ACK_WAIT_S`, when a broker that restarted meanwhile knows the ids of
those copies only that are still stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from hashlib import blake2b
from secrets import token_hex

import orjson

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.assets import EXPANDER, ROUTE_ACK_WAIT_S
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import PubAck, append, append_nowait
from foundation_nats.bus.subjects import Subjects, js_api
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.errors import (
    AlreadyExistsError,
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    MailboxFullError,
)
from foundation_schemas import AgentStatus, DeadLetter

_PULL_S = 20.0
_BATCH = 32
_FRESH_S = 3.0
_PICK_TTL_S = 3600.0
_NAK_S = 1.0
_ACK = b"+ACK"
_NAK = b"-NAK " + orjson.dumps({"delay": int(_NAK_S * 1e9)})
_IN_PROGRESS = b"+WPI"

_RANK = {AgentStatus.RUNNING: 0, AgentStatus.STARTING: 1, AgentStatus.MOVING: 1}


def receivers(registry: Registry, kind: str, name: str) -> list[Held]:
    """The records that a route stands for now, by id."""
    if kind == "everyone":
        found = sorted(registry.all().values(), key=lambda held: held.record.id)
    elif kind == "deployment":
        found = registry.of_deployment(name)
    else:
        found = registry.providing(name)
    return [held for held in found if held.record.desired == "run"]


def pick(candidates: list[Held], key: str) -> str:
    """One of *candidates* for *key*: a running one if there is, by highest random weight."""

    def weight(held: Held) -> tuple[int, bytes]:
        rank = -_RANK.get(held.record.status, 2)
        return rank, blake2b(f"{key}\n{held.record.id}".encode(), digest_size=8).digest()

    return max(candidates, key=weight).record.id


def _delivered(message: Message) -> int:
    """How often this route message was handed out, this time included."""
    # $JS.ACK.<stream>.<consumer>.<delivered>.…
    return int(message.reply.split(".")[4])


class Expander:
    """Serves the ROUTES stream until its task is cancelled."""

    def __init__(
        self, bus: Bus, subjects: Subjects, registry: Registry, *, full_patience_s: float = 30.0
    ) -> None:
        self._tries_max = max(2, int(full_patience_s / _NAK_S))
        self._bus = bus
        self._subjects = subjects
        self._registry = registry
        self._picks = Bucket(bus, subjects, "coordination")
        self._log = get_logger("expander")
        self._inbox: asyncio.Queue[tuple[float, Message]] = asyncio.Queue(maxsize=2 * _BATCH)
        self._answers: deque[tuple[float, str, bytes]] = deque(maxlen=2 * _BATCH)
        """(when, to which delivery, what) was answered last."""
        bus.on_reconnect(self._on_reconnect)

    def _on_reconnect(self) -> None:
        for at, reply, verdict in self._answers:
            if monotonic() - at < ROUTE_ACK_WAIT_S:
                self._bus.publish(reply, verdict)
        # A pull request does not survive a reconnect: end it as the server would.
        self._take(Message("", "", b"", b"NATS/1.0 408\r\n\r\n"))

    def _answer(self, message: Message, verdict: bytes) -> None:
        self._answers.append((monotonic(), message.reply, verdict))
        if self._bus.is_connected:
            self._bus.publish(message.reply, verdict)

    def _take(self, message: Message) -> None:
        if not self._inbox.full():
            self._inbox.put_nowait((monotonic(), message))

    async def run(self) -> None:
        """Pull, expand, acknowledge, for ever."""
        while True:
            try:
                await self._pull()
            except BusError as error:
                self._log.debug("routes not readable yet", error=str(error))
                await asyncio.sleep(0.5)

    async def _pull(self) -> None:
        """One pull request: up to a batch of messages, or nothing within the time."""
        request = js_api("CONSUMER.MSG.NEXT", f"{self._subjects.routes_stream}.{EXPANDER}")
        while not self._inbox.empty():
            _, unread = self._inbox.get_nowait()
            if not unread.status:
                self._answer(unread, _NAK)
        # A pulled message arrives under its own subject, so it needs a
        # subscription of its own rather than the shared inbox.
        reply = f"{self._bus.inbox}.pull.{token_hex(8)}"
        route = self._bus.subscribe(reply, self._take)
        try:
            body = {"batch": _BATCH, "expires": int(_PULL_S * 1e9)}
            self._bus.publish(request, orjson.dumps(body), reply=reply)
            async with asyncio.timeout(_PULL_S + 2):
                for _ in range(_BATCH):
                    taken_at, message = await self._inbox.get()
                    if message.status:
                        if message.status not in (404, 408):
                            await asyncio.sleep(0.2)
                        return
                    await self._expand(message, taken_at)
        except TimeoutError:
            return
        finally:
            self._bus.unsubscribe(route)

    async def _expand(self, message: Message, taken_at: float) -> None:
        # The reply subject is where the acknowledgement goes.
        failpoint("expand.before")
        while self._registry.age_s > _FRESH_S:
            await asyncio.sleep(0.1)
        if monotonic() - taken_at > ROUTE_ACK_WAIT_S:
            return  # cut off or frozen for so long that it was given to another
        # fnd.C.route.<kind>[.<name>]
        tokens = message.subject.split(".")
        kind, name = tokens[3], tokens[4] if len(tokens) > 4 else ""
        key = (message.header(b"Nats-Msg-Id") or message.reply.encode()).decode()
        found = receivers(self._registry, kind, name)
        try:
            if not found:
                await self._nobody(message, f"{kind}:{name}" if name else kind, key)
            else:
                ids = [held.record.id for held in found]
                if kind == "any":
                    ids = [await self._pick(found, key)]
                full = await self._copy(message, ids, key)
                if full and _delivered(message) < self._tries_max:
                    raise full[0][1]
                for agent, error in full:
                    await self._give_up(message, agent, key, error)
            failpoint("expand.before_ack")
            self._answer(message, _ACK)
        except (MailboxFullError, BusTimeoutError, BusUnavailableError) as error:
            # Not acknowledged: it comes again, and what was copied is not copied twice.
            self._log.info("expansion put off", subject=message.subject, error=str(error))
            self._answer(message, _NAK)

    async def _pick(self, candidates: list[Held], key: str) -> str:
        choice = pick(candidates, key)
        name = f"any_{key}"
        try:
            await self._picks.create(name, choice.encode(), ttl_s=_PICK_TTL_S)
        except AlreadyExistsError:
            entry = await self._picks.read(name)
            if entry is not None and entry.value is not None:
                choice = entry.value.decode()
        return choice

    async def _copy(
        self, message: Message, agents: list[str], key: str
    ) -> list[tuple[str, MailboxFullError]]:
        """Store a copy in every mailbox; returns those that had no room.

        Raises:
            BusTimeoutError, BusUnavailableError: some are not stored, or not known to be.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        left = len(agents)
        full: list[tuple[str, MailboxFullError]] = []
        failure: FoundationError | None = None

        def on_ack(agent: str, ack: PubAck | FoundationError) -> None:
            nonlocal left, failure
            left -= 1
            if isinstance(ack, MailboxFullError):
                full.append((agent, ack))
            elif isinstance(ack, FoundationError):
                failure = ack
            if left == 0 and not done.done():
                done.set_result(None)

        told_at = monotonic()
        for index, agent in enumerate(agents):
            await self._bus.wait_room()
            if monotonic() - told_at > ROUTE_ACK_WAIT_S / 4 and self._bus.is_connected:
                told_at = monotonic()
                self._bus.publish(message.reply, _IN_PROGRESS)
            if index == len(agents) // 2:
                failpoint("expand.mid")
            msg_id = blake2b(f"{key}\n{agent}".encode(), digest_size=16).hexdigest()
            if planted("double_expand"):
                msg_id = token_hex(16)
            try:
                append_nowait(
                    self._bus,
                    self._subjects.mailbox(agent),
                    message.data,
                    partial(on_ack, agent),
                    headers={"Nats-Msg-Id": msg_id},
                )
            except BusUnavailableError as error:
                on_ack(agent, error)
        await done
        if failure is not None:
            raise failure
        return full

    async def _give_up(
        self, message: Message, agent: str, key: str, error: MailboxFullError
    ) -> None:
        """One receiver is full for too long: its copy is a dead letter, the others have theirs."""
        letter = DeadLetter(
            agent=agent,
            signal=orjson.loads(message.data),
            code=error.code,
            reason=f"Its mailbox had no room for a signal sent to many: {error}",
            attempts=_delivered(message),
            at=utc_text(),
        )
        await append(
            self._bus,
            self._subjects.dead(agent),
            letter.model_dump_json(exclude_none=True).encode(),
            headers={"Nats-Msg-Id": f"{key}.{agent}.full"},
        )

    async def _nobody(self, message: Message, target: str, key: str) -> None:
        letter = DeadLetter(
            agent="route",
            signal=orjson.loads(message.data),
            code="no_recipient",
            reason=f"Nobody was there to receive it: {target} stands for no agent.",
            at=utc_text(),
        )
        await append(
            self._bus,
            self._subjects.dead("route"),
            letter.model_dump_json(exclude_none=True).encode(),
            headers={"Nats-Msg-Id": f"{key}.nobody"},
        )
