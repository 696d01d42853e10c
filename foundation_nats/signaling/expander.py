"""Signals for many become signals for each: one shared, durable pull consumer, served by every node.

The sender pays one publish. A route message is acknowledged only after every
receiver's mailbox has stored its copy; copies carry ids derived from the route
message, so that an expansion that was cut short is repeated without harm; one that is repeated
later than the stream remembers ids looks into each mailbox first (`evidence.py`).
Receivers are those that the registry wants to run at the time of expansion,
running or not: mail waits. ``any:`` (and a topic, for each group that shares it) picks one
receiver and writes the choice down before it sends, so that a repeat picks the same;
`rerouter.py` changes it if that one dies first. A receiver whose mailbox
stays full gets a dead letter instead, long before the others' copies could be
forgotten by the stream and be stored twice. Nobody behind a target is a dead letter, but for a
topic: to have no subscribers is no fault.

Anybody may publish a route, so what a message holds is not trusted: bytes that are no
envelope are copied as they are (each mailbox buries its copy), ids become keys by hash, and
what can't be copied or stands for nobody is a dead letter.
"""

from __future__ import annotations

import asyncio
from functools import partial
from hashlib import blake2b
from secrets import token_hex

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.assets import EXPANDER, ROUTE_ACK_WAIT_S
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.streams import PubAck, StreamReader, append_nowait
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.errors import (
    AlreadyExistsError,
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    MailboxFullError,
    NotFoundError,
    PayloadTooLargeError,
)
from foundation_nats.signaling.burial import bury, content
from foundation_nats.signaling.evidence import SAFE_SHARE, is_stored, server_now
from foundation_nats.signaling.pulling import NAK_S, Puller, delivered, stored_at
from foundation_nats.signaling.receivers import Given, LoadOf, pick, receivers, subscribers
from foundation_schemas import TargetKind
from foundation_schemas.base import is_name

ANY_HEADER = "Fnd-Any"
"""On the copy of a signal for one of several: what it was for, and the name of the choice."""
PICK_TTL_S = 3600.0
_FRESH_S = 3.0


def pick_name(key: str) -> str:
    """The key under which the choice for a route message is written down."""
    return f"any_{key}"


def copy_id(key: str, agent: str, hop: int = 0) -> str:
    """The id of *agent*'s copy of a route message; *hop* counts how often it was re-routed."""
    text = f"{key}\n{agent}" + (f"\n{hop}" if hop else "")
    return blake2b(text.encode(), digest_size=16).hexdigest()


def read_choice(value: bytes) -> tuple[str, int]:
    """Agent and hop of a choice."""
    agent, _, hop = value.decode().partition(" ")
    return agent, int(hop or 0)


def _key(message: Message) -> str:
    """What this route message's copies and its choice are named after; the same at each delivery."""
    given = (message.header(b"Nats-Msg-Id") or message.reply.encode()).decode("utf-8", "replace")
    return given if is_name(given) else blake2b(given.encode(), digest_size=16).hexdigest()


def _expressions(data: bytes) -> str:
    """What a signal for ``label:`` selects by: its route can't say, but the signal does."""
    body, _ = content(data)
    target = str((body or {}).get("subject") or "")
    return target.removeprefix("label:") if target.startswith("label:") else ""


class Expander:
    """Serves the ROUTES stream until its task is cancelled."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        registry: Registry,
        *,
        full_patience_s: float = 30.0,
        window_s: float = 120.0,
        load_of: LoadOf = lambda record: 0.0,
    ) -> None:
        """*load_of* tells how busy the place of an agent is, for `any:`."""
        self._tries_max = max(2, int(full_patience_s / NAK_S))
        self._window_s = window_s
        self._bus = bus
        self._subjects = subjects
        self._registry = registry
        self._picks = Bucket(bus, subjects, "coordination")
        self._signals = StreamReader(bus, subjects.signals_stream)
        self._place_load = load_of
        self._given = Given()
        self._subscribed: dict[str, Held] = {}
        """The agents that subscribe to anything."""
        registry.subscribe(self._on_change)
        for agent, held in registry.all().items():
            self._on_change(agent, held)
        self._log = get_logger("expander")
        self._puller = Puller(
            bus, subjects.routes_stream, EXPANDER, self._expand, ack_wait_s=ROUTE_ACK_WAIT_S
        )

    def _on_change(self, agent: str, held: Held | None) -> None:
        if held is not None and held.record.spec.subscribe:
            self._subscribed[agent] = held
        else:
            self._subscribed.pop(agent, None)

    async def run(self) -> None:
        """Pull, expand, acknowledge, for ever."""
        await self._puller.run()

    async def _expand(self, message: Message, taken_at: float) -> None:
        # The reply subject is where the acknowledgement goes.
        failpoint("expand.before")
        while self._registry.age_s > _FRESH_S:
            await asyncio.sleep(0.1)
        if self._puller.is_late(taken_at):
            return
        # fnd.C.route.<kind>[.<name>]
        tokens = message.subject.split(".")
        kind, name = tokens[3], ".".join(tokens[4:])
        if kind == TargetKind.LABEL:
            name = _expressions(message.data)
        key = _key(message)
        try:
            copies = await self._copies(kind, name, key)
            if not copies and kind != TargetKind.TOPIC:
                await self._nobody(message, f"{kind}:{name}" if name else kind, key)
            else:
                full = await self._copy(message, copies, key)
                if full and delivered(message) < self._tries_max:
                    raise full[0][1]
                for agent, error in full:
                    await self._give_up(message, agent, key, error)
            failpoint("expand.before_ack")
            self._puller.done(message)
        except PayloadTooLargeError as error:
            # With the header of a copy it is too large for everybody; trying again won't help.
            await self._bury(message, "route", error.code, str(error), f"{key}.large")
            self._puller.done(message)
        except (MailboxFullError, BusTimeoutError, BusUnavailableError, NotFoundError) as error:
            # Not acknowledged: it comes again, and what was copied is not copied twice.
            self._log.info("expansion put off", subject=message.subject, error=str(error))
            self._puller.again(message)

    async def _copies(self, kind: str, name: str, key: str) -> dict[str, dict[str, str]]:
        """Agent to the headers of its copy."""
        copies: dict[str, dict[str, str]] = {}

        async def choose(candidates: list[Held], name_of: str, key_of: str) -> None:
            agent, hop = await self._pick(candidates, key_of)
            if agent not in copies:  # else it gets it as a subscriber of its own
                header = f"{name_of} {key_of}"
                copies[agent] = {"Nats-Msg-Id": copy_id(key_of, agent, hop), ANY_HEADER: header}

        if kind == TargetKind.TOPIC:
            each, groups = subscribers(self._subscribed.values(), name)
            copies = {agent: {"Nats-Msg-Id": copy_id(key, agent)} for agent in sorted(each)}
            for group, candidates in sorted(groups.items()):
                await choose(candidates, f"topic {name} {group}", f"{key}_{group}")
        elif kind == TargetKind.ANY:
            found = receivers(self._registry, kind, name)
            if found:
                await choose(found, f"any {name} -", key)
        else:
            for held in receivers(self._registry, kind, name):
                agent = held.record.id
                copies[agent] = {"Nats-Msg-Id": copy_id(key, agent)}
        return copies

    async def _pick(self, candidates: list[Held], key: str) -> tuple[str, int]:
        choice = pick(candidates, key, lambda record: self._load(record.id, record.node))
        try:
            await self._picks.create(pick_name(key), choice.encode(), ttl_s=PICK_TTL_S)
        except AlreadyExistsError:
            entry = await self._picks.read(pick_name(key))
            if entry is not None and entry.value is not None:
                return read_choice(entry.value)
        self._given.add(choice, monotonic())
        return choice, 0

    def _load(self, agent: str, node: str | None) -> float:
        held = self._registry.get(agent)
        place = 0.0 if held is None else self._place_load(held.record)
        # What another node has given out lately is not known here; its effect on the place is.
        return round(place + self._given.lately(agent, monotonic()), 2)

    async def _copy(
        self, message: Message, copies: dict[str, dict[str, str]], key: str
    ) -> list[tuple[str, MailboxFullError]]:
        """Store a copy in every mailbox; returns those that had no room.

        Raises:
            BusTimeoutError, BusUnavailableError: some are not stored, or not known to be.
        """
        if delivered(message) > 1:
            copies = await self._without_stored(message, copies)
        if not copies:
            return []
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        left = len(copies)
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
        for index, (agent, headers) in enumerate(copies.items()):
            await self._bus.wait_room()
            if monotonic() - told_at > ROUTE_ACK_WAIT_S / 4:
                told_at = monotonic()
                self._puller.in_progress(message)
            if index == len(copies) // 2:
                failpoint("expand.mid")
            if planted("double_expand"):
                headers = {**headers, "Nats-Msg-Id": token_hex(16)}
            try:
                append_nowait(
                    self._bus,
                    self._subjects.mailbox(agent),
                    message.data,
                    partial(on_ack, agent),
                    headers=headers,
                )
            except BusUnavailableError as error:
                on_ack(agent, error)
        await done
        if failure is not None:
            raise failure
        return full

    async def _without_stored(
        self, message: Message, copies: dict[str, dict[str, str]]
    ) -> dict[str, dict[str, str]]:
        """What a repeat must still copy, where the stream may have forgotten the ids."""
        since, now = stored_at(message), await server_now(self._signals)
        if now is None or (now - since).total_seconds() < self._window_s * SAFE_SHARE:
            return copies
        left = {}
        for agent, headers in copies.items():
            subject = self._subjects.mailbox(agent)
            if not await is_stored(self._signals, subject, headers["Nats-Msg-Id"], since):
                left[agent] = headers
        return left

    async def _give_up(
        self, message: Message, agent: str, key: str, error: MailboxFullError
    ) -> None:
        """One receiver is full for too long: its copy is a dead letter, the others have theirs."""
        reason = f"Its mailbox had no room for a signal sent to many: {error}"
        await self._bury(message, agent, error.code, reason, f"{key}.{agent}.full")

    async def _nobody(self, message: Message, target: str, key: str) -> None:
        reason = f"Nobody was there to receive it: {target} stands for no agent."
        await self._bury(message, "route", "no_recipient", reason, f"{key}.nobody")

    async def _bury(
        self, message: Message, agent: str, code: str, reason: str, msg_id: str
    ) -> None:
        await bury(
            self._bus,
            self._subjects,
            agent,
            message.data,
            code=code,
            reason=reason,
            msg_id=msg_id,
            attempts=delivered(message),
        )
