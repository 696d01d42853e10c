"""`workqueue`: many workers take items from one stream; each item until it is acknowledged, those of a key in order.

A JetStream stream of its own. Items with a key are spread over partitions by the key, and of a
partition one item at a time is handed out; items without a key have no order and no such limit.

Guaranteed: an item whose `put` returned is handed out until somebody has acknowledged it, or
it is a dead letter (after *attempts*, or because a worker says so): at least once. Of two items
with the same key the later one is not handed out before the earlier one is acknowledged or dead.
Who does not acknowledge (or `extend`) within the visibility time loses it to another. With `feed` an agent does the item,
and its state changes exactly once for it.

Not guaranteed: that an item is done once by workers that are no agents: one that was frozen or cut
off for longer than the visibility time goes on while another does it too (`Item.is_valid` says
so). Keys share partitions, so that a slow item also holds up other keys; 16 partitions are 16
items with keys at a time. A repeated `put` counts once within two minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from secrets import token_hex
from typing import Any

import orjson

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.bus import assets
from foundation_nats.bus.kv import EXPECTED
from foundation_nats.bus.rpc import decode, encode, to_json
from foundation_nats.bus.streams import StreamReader, api, append
from foundation_nats.bus.subjects import js_api
from foundation_nats.bus.wire import Message, Route
from foundation_nats.coordination.cell import checked
from foundation_nats.coordination.desk import Desk, agent_names
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    DecodeError,
    NotFoundError,
    StaleRevisionError,
)
from foundation_nats.signaling.envelope import message_id
from foundation_nats.signaling.publisher import Publisher
from foundation_nats.signaling.pulling import delivered, sequence, stored_at
from foundation_schemas.coordination import DeadItem, QueueItem

VISIBILITY_S = 30.0
ATTEMPTS = 5
PARTS = 16
ITEMS_MAX = 1_000_000
_VISIBILITY_MIN_S = 1.0
_POLL_S = 1.0
_PULL_S = 2.0
_FREE_PULL_S = 0.1
_HELD_PULL_S = 0.05
_RETRY_S = 0.1
_BACKOFF_MAX_S = 60.0
_FREE = "free"

Handler = Callable[["Item"], Awaitable[Any]]


class Item:
    """One item in a worker's hand."""

    def __init__(self, queue: WorkQueue, message: Message, stored: QueueItem, sent: float) -> None:
        self._queue = queue
        self._reply = message.reply
        self.id = stored.id
        self.key = stored.key
        self.data = stored.data
        self.attempt = delivered(message)
        """1 at the first; counts each time that it was handed out."""
        self.sequence = sequence(message)
        """Its place in the queue."""
        self.put_at = stored_at(message)
        """When it was stored, by the server's clock."""
        self._stored = stored
        self._until = sent + queue.visibility_s
        self._is_done = False

    def is_valid(self) -> bool:
        """Whether nobody else has been given it; after a pause of this process: checked anew."""
        return monotonic() < self._until

    async def ack(self, *, timeout: float = 10.0) -> None:
        """It is done: it is not handed out again.

        Raises:
            BusTimeoutError, BusUnavailableError: outcome unknown: it may be handed out again.
        """
        deadline = monotonic() + timeout
        while not self._is_done:
            left = deadline - monotonic()
            try:
                await self._queue.request(self._reply, b"+ACK", max(0.05, min(left, _PULL_S)))
                self._is_done = True
            except (BusTimeoutError, BusUnavailableError):
                with contextlib.suppress(BusTimeoutError, BusUnavailableError):
                    self._is_done = await self._queue.is_gone(self.sequence)
                if self._is_done:
                    return
                if monotonic() + _RETRY_S >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def nack(self, reason: str = "", *, delay: float = 0.0) -> None:
        """It is not done: hand it out again, after *delay* seconds; after its last attempt it is dead.

        Until then no later item of its key is handed out.

        Raises:
            BusTimeoutError, BusUnavailableError: then it is handed out after the visibility time.
        """
        self._until = 0.0
        if self.attempt >= self._queue.attempts:
            await self.bury(reason or "given back")
            return
        body = b"-NAK " + orjson.dumps({"delay": int(max(delay, 0.001) * 1e9)})
        await self._queue.request(self._reply, body, _PULL_S)

    async def extend(self) -> None:
        """Still at it: the visibility time begins anew.

        Raises:
            BusTimeoutError, BusUnavailableError: it may not be extended.
        """
        sent = monotonic()
        await self._queue.request(self._reply, b"+WPI", _PULL_S)
        if self._until:
            self._until = sent + self._queue.visibility_s

    async def bury(self, reason: str) -> None:
        """Make it a dead letter: once, however often this is repeated.

        Raises:
            BusTimeoutError, BusUnavailableError: outcome unknown: it may be handed out again.
        """
        await self._queue.bury(self._stored, self.sequence, self.attempt, reason)
        await self.ack()


class WorkQueue:
    """A handle on one queue: `put` items, `take` them, or `work` and `feed`."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        visibility_s: float | None,
        attempts: int | None,
        parts: int | None,
        replicas: int | None,
    ) -> None:
        self.name = checked("queue", name)
        if visibility_s is not None and visibility_s < _VISIBILITY_MIN_S:
            raise ConfigError(
                f"A queue's visibility_s is at least {_VISIBILITY_MIN_S:g} s, got {visibility_s:g}."
            )
        if (attempts is not None and attempts < 1) or (parts is not None and not 1 <= parts <= 256):
            raise ConfigError(f"The queue {name} needs 1 to 256 parts, and attempts from 1.")
        self.visibility_s = visibility_s or VISIBILITY_S
        self.attempts = attempts or ATTEMPTS
        self.parts = parts or PARTS
        self._given = {"ack_wait_s": visibility_s, "attempts": attempts, "parts": parts}
        self._connection = connection
        self._bus = connection.bus
        self._subjects = connection.subjects
        self._replicas = replicas
        self._stream = connection.subjects.queue_stream(name)
        self._reader = StreamReader(connection.bus, self._stream)
        self._publisher = Publisher(connection.bus, connection.subjects, f"pattern:queue-{name}")
        self._opening = asyncio.Lock()
        self._is_open = self._can_take = False
        self._spare: deque[Item] = deque()
        """Handed out together with another one, and nobody's yet."""
        self._log = get_logger("queue").bind(queue=name)

    # ---- putting ----------------------------------------------------------------

    async def open(self, *, timeout: float = 10.0) -> WorkQueue:
        """Create the queue if it is missing, else learn how it is set up; done by itself at need.

        Raises:
            ConfigError: it exists with other settings than were given.
            ServerError: the server has no room.
            BusTimeoutError, BusUnavailableError
        """
        async with self._opening:
            if not self._is_open:
                await self._patiently(self._open, timeout)
        return self

    async def _open(self) -> None:
        set_up = await assets.ensure_queue(
            self._bus,
            self._subjects,
            self.name,
            replicas=self._replicas,
            parts=self.parts,
            items_max=ITEMS_MAX,
            ack_wait_s=self.visibility_s,
            attempts=self.attempts,
        )
        for what, given in self._given.items():
            if given is not None and float(set_up[f"fnd.{what}"]) != given:
                name = "visibility_s" if what == "ack_wait_s" else what
                raise ConfigError(
                    f"The queue {self.name} has {name} = {set_up[f'fnd.{what}']}, not {given:g}.",
                    hint="Leave it out to take what the queue has.",
                )
        self.visibility_s = float(set_up["fnd.ack_wait_s"])
        self.attempts = int(set_up["fnd.attempts"])
        self.parts = int(set_up["fnd.parts"])
        self._is_open = True

    async def _patiently(self, step: Callable[[], Awaitable[Any]], timeout: float) -> Any:
        deadline = monotonic() + timeout
        while True:
            try:
                return await step()
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def put(
        self, data: Any, *, key: str | None = None, id: str | None = None, timeout: float = 5.0
    ) -> str:
        """Store an item; returns its id. A repeat with the same *id* counts once within two minutes.

        Raises:
            ConfigError: *data* is not JSON.
            MailboxFullError: the queue is full; nothing was stored.
            PayloadTooLargeError, BusUnavailableError: nothing was stored.
            BusTimeoutError: it may be stored: put it again with the same id.
        """
        await self.open(timeout=timeout)
        item = QueueItem(id=id or token_hex(12), key=key, data=data, at=utc_text())
        try:
            payload = to_json(item.model_dump())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The item can't be put: {error}.") from error
        subject = self._subjects.queue(self.name, self._part(key))
        msg_id = message_id(f"queue:{self.name}", "", item.id)
        await self._publisher.store(subject, payload, msg_id, timeout=timeout)
        return item.id

    def _part(self, key: str | None) -> str:
        if key is None:
            return _FREE
        digest = blake2b(key.encode(), digest_size=8).digest()
        return f"p{int.from_bytes(digest, 'big') % self.parts}"

    # ---- taking -------------------------------------------------------------------

    async def take(self, *, timeout: float = 10.0) -> Item | None:
        """The next item that may be done; None if there is none within *timeout*.

        Cancellation: an item that was just handed out comes again after the visibility time.

        Raises:
            BusTimeoutError, BusUnavailableError: the server was not reachable within *timeout*.
        """
        deadline = monotonic() + timeout
        hint = asyncio.Event()
        route: Route | None = None
        unreachable: BusError | None = None
        try:
            while True:
                hint.clear()
                try:
                    await self._ready(max(_RETRY_S, deadline - monotonic()))
                    if route is None:
                        subject = self._subjects.queue(self.name, "*")
                        route = self._bus.subscribe(subject, lambda _: hint.set())
                    item = await self._scan()
                    unreachable = None
                    if item is not None:
                        return item
                except (BusTimeoutError, BusUnavailableError) as error:
                    unreachable = error
                left = deadline - monotonic()
                if left <= 0:
                    break
                pause = _RETRY_S if unreachable else _POLL_S * random.uniform(0.5, 1.0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.001, min(left, pause))):
                        await hint.wait()
        finally:
            if route is not None:
                self._bus.unsubscribe(route)
        if unreachable is not None:
            raise unreachable
        return None

    async def _ready(self, timeout: float) -> None:
        await self.open(timeout=timeout)
        async with self._opening:
            if not self._can_take:
                await assets.ensure_queue_consumers(
                    self._bus,
                    self._subjects,
                    self.name,
                    parts=self.parts,
                    ack_wait_s=self.visibility_s,
                )
                self._can_take = True

    async def _scan(self) -> Item | None:
        """Whatever may be done now: of parts that are free, then of those with items in hands."""
        while self._spare:
            spare = self._spare.popleft()
            if spare.is_valid():
                return spare
        free, held = await self._parts()
        random.shuffle(free)
        for part in free:
            while (item := await self._pull(part, _FREE_PULL_S)) is not None:
                if await self._is_good(item):
                    return item
        # An item whose visibility time is over comes again only to who asks for it.
        back = await asyncio.gather(*(self._pull(part, _HELD_PULL_S) for part in held))
        for item in back:
            if item is not None and await self._is_good(item):
                self._spare.append(item)
        return self._spare.popleft() if self._spare else None

    async def _parts(self) -> tuple[list[str], list[str]]:
        """Those that can hand out an item, and those that may, if one in hands has come back."""
        free: list[str] = []
        held: list[str] = []
        total, seen = 1, 0
        while seen < total:
            page = await api(self._bus, "CONSUMER.LIST", self._stream, {"offset": seen})
            total = int(page.get("total", 0))
            infos = page.get("consumers") or []
            seen += len(infos)
            for info in infos:
                in_hands = int(info.get("num_ack_pending", 0))
                most = int(info["config"].get("max_ack_pending", 1))
                if int(info.get("num_pending", 0)) and in_hands < most:
                    free.append(info["name"])
                elif in_hands:
                    held.append(info["name"])
            if not infos:
                break
        return free, held

    async def _pull(self, part: str, expires_s: float) -> Item | None:
        # A pulled message arrives under its own subject, so it needs a
        # subscription of its own rather than the shared inbox.
        got: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        reply = f"{self._bus.inbox}.queue.{token_hex(8)}"

        def on_message(message: Message) -> None:
            if not got.done():
                got.set_result(message)

        route = self._bus.subscribe(reply, on_message)
        sent = monotonic()
        try:
            request = js_api("CONSUMER.MSG.NEXT", f"{self._stream}.{part}")
            # Without `expires` a pull of a part with an item in hands is never answered.
            body = {"batch": 1, "no_wait": True, "expires": int(expires_s * 1e9)}
            self._bus.publish(request, orjson.dumps(body), reply=reply)
            async with asyncio.timeout(_PULL_S):
                message = await got
        except TimeoutError:
            raise BusTimeoutError(f"The queue {self.name} does not answer.") from None
        finally:
            self._bus.unsubscribe(route)
        if message.status == 503:
            self._can_take = False  # the consumer is gone: make it anew
            raise BusUnavailableError(f"The queue {self.name} can't hand out items now.")
        return None if message.status else await self._item(message, sent)

    async def _item(self, message: Message, sent: float) -> Item | None:
        try:
            return Item(self, message, decode(QueueItem, message.data), sent)
        except DecodeError as error:
            text = message.data[:1000].decode("utf-8", "replace")
            stored = QueueItem(id=f"seq-{sequence(message)}", data=text)
            await Item(self, message, stored, sent).bury(str(error))
            return None

    async def _is_good(self, item: Item) -> bool:
        """Whether it may be tried (again); else it is a dead letter now."""
        if item.attempt <= self.attempts:
            return True
        item.attempt -= 1
        await item.bury(f"not acknowledged in time, {self.attempts} times")
        return False

    # ---- working --------------------------------------------------------------------

    async def work(
        self,
        handler: Handler,
        *,
        concurrency: int = 1,
        drain: bool = False,
        backoff: float = 1.0,
    ) -> int:
        """Take items and do them, for ever, or with *drain* until there is none; returns how many.

        An item is extended while its handler runs, acknowledged when it returns, and given back when it
        raises: for *backoff* seconds, then twice that, and so on.

        Cancellation: items in hand are given back at once.
        """
        done = 0

        async def one() -> None:
            nonlocal done
            while True:
                try:
                    item = await self.take(timeout=_POLL_S if drain else 60.0)
                except (BusTimeoutError, BusUnavailableError):
                    await asyncio.sleep(_RETRY_S)
                    continue
                if item is not None:
                    is_done = await self._do(item, handler, backoff)
                    done += is_done  # not `+= await`: that forgets what others did meanwhile
                elif drain and not await self.waiting():
                    return

        tasks = [asyncio.ensure_future(one()) for _ in range(max(1, concurrency))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return done

    async def _do(self, item: Item, handler: Handler, backoff: float) -> bool:
        extending = asyncio.ensure_future(self._extend(item))
        try:
            await handler(item)
        except asyncio.CancelledError:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(_PULL_S):
                    await item.nack("cancelled")
            raise
        except Exception as error:  # whatever a handler raises is its item's failure
            reason = f"{type(error).__name__}: {error}"
            self._log.info("item failed", id=item.id, attempt=item.attempt, reason=reason)
            delay = min(backoff * 2 ** (item.attempt - 1), _BACKOFF_MAX_S)
            with contextlib.suppress(BusError):
                await item.nack(reason, delay=delay)
            return False
        finally:
            extending.cancel()
            await asyncio.gather(extending, return_exceptions=True)
        try:
            await item.ack()
        except BusError as error:
            self._log.warning("item done, but not acknowledged", id=item.id, error=str(error))
        return True

    async def _extend(self, item: Item) -> None:
        while True:
            await asyncio.sleep(self.visibility_s / 3)
            with contextlib.suppress(BusError):
                await item.extend()

    async def feed(
        self,
        to: str | Callable[[Item], str],
        type: str,
        *,
        concurrency: int = 1,
        drain: bool = False,
        timeout: float = 300.0,
    ) -> int:
        """Let agents do the items: as signals of *type*, ``{"id", "key", "data"}``, with fixed ids.

        An item is acknowledged when its agent has handled it, and its state changes exactly once for it,
        however many feed and die (as of P2). What the agent can't handle is a dead letter.

        Args:
            to: the agent, or which one does an item; it must be the same at each attempt.
            timeout: how long to wait for the agent before the item is tried again (the signal waits).
        """

        async def hand_over(item: Item) -> None:
            (agent,) = agent_names([to if isinstance(to, str) else to(item)], "feed")
            wake = asyncio.Event()
            async with Desk(self._connection, f"queue-{self.name}-{item.sequence}", wake) as desk:
                id = f"queue.{self.name}.{item.sequence}"
                until = monotonic() + timeout
                put_at = item.put_at.timestamp()
                now = put_at if item.attempt == 1 else float("inf")
                data = {"id": item.id, "key": item.key, "data": item.data}
                await desk.ask(agent, id, type, data, until=until, since=put_at, now=now)
                while (answer := (await desk.answers(until)).get(id)) is None:
                    if monotonic() >= until:
                        raise BusTimeoutError(f"{agent} has not handled it in {timeout:g} s.")
                    wake.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_S):
                            await wake.wait()
                if answer.is_error:
                    await item.bury(f"{agent}: {answer.code}: {answer.message}")
                else:
                    await item.ack()
                await desk.clear()

        return await self.work(hand_over, concurrency=concurrency, drain=drain)

    # ---- looking ---------------------------------------------------------------------

    async def waiting(self) -> int:
        """How many items are not done, those in hands included; dead letters are not counted.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        await self.open()
        return sum((await self._reader.subjects(self._subjects.queue(self.name, "*"))).values())

    async def dead(self) -> list[DeadItem]:
        """The dead letters, oldest first.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        await self.open()
        found: list[DeadItem] = []
        start, more = 1, 1
        while more:
            page, more = await self._reader.page(self._subjects.queue(self.name, "dead.*"), start)
            if not page:
                break
            for message in page:
                with contextlib.suppress(DecodeError):
                    found.append(decode(DeadItem, message.data))
            start = page[-1].sequence + 1
        return found

    async def replay(self, sequence: int) -> str:
        """Put a dead letter into the queue again, at its end; returns its id.

        Raises:
            NotFoundError: there is none of this number.
            MailboxFullError, BusTimeoutError, BusUnavailableError: repeat it.
        """
        await self.open()
        subject = self._subjects.queue(self.name, f"dead.{sequence}")
        message = await self._reader.last_from_leader(subject)
        if message is None:
            raise NotFoundError(f"The queue {self.name} has no dead letter {sequence}.")
        letter = decode(DeadItem, message.data)
        again = f"{letter.item.id}.again-{sequence}"
        await self.put(letter.item.data, key=letter.item.key, id=again)
        await self._reader.delete(message.sequence)
        return again

    # ---- for items -------------------------------------------------------------------

    async def request(self, reply: str, body: bytes, timeout: float) -> None:
        """Answer a delivery, and wait until the server has it."""
        await self._bus.request(reply, body, timeout=timeout)

    async def is_gone(self, sequence: int) -> bool:
        """Whether an item is done or dead."""
        return await self._reader.at_sequence(sequence) is None

    async def bury(self, item: QueueItem, sequence: int, attempts: int, reason: str) -> None:
        """Store a dead letter, unless it is there."""
        letter = DeadItem(
            item=item, sequence=sequence, attempts=attempts, reason=reason[:1000], at=utc_text()
        )
        subject = self._subjects.queue(self.name, f"dead.{sequence}")

        async def store() -> None:
            with contextlib.suppress(StaleRevisionError):
                await append(self._bus, subject, encode(letter), headers={EXPECTED: "0"})

        await self._patiently(store, _POLL_S * 5)
        self._log.warning("item is dead", id=item.id, attempts=attempts, reason=reason)


def workqueue(
    connection: Connection,
    name: str,
    *,
    visibility_s: float | None = None,
    attempts: int | None = None,
    parts: int | None = None,
    replicas: int | None = None,
) -> WorkQueue:
    """A handle on the work queue *name*; its first user sets it up.

    Args:
        visibility_s: how long an item is one worker's alone (30 s).
        attempts: after so many it is a dead letter (5).
        parts: how many items with keys are in hands at a time (16).
        replicas: copies of its stream (as many as the cluster's streams have).

    Raises:
        ConfigError: an argument is wrong.

    Example:
        >>> jobs = workqueue(cluster, "jobs")
        >>> await jobs.put({"file": "a.csv"}, key="customer-7")
        >>> await jobs.work(convert, concurrency=4)
    """
    return WorkQueue(
        connection,
        name,
        visibility_s=visibility_s,
        attempts=attempts,
        parts=parts,
        replicas=replicas,
    )


__all__ = ["DeadItem", "Item", "WorkQueue", "workqueue"]
