"""`Puller`: a stream as a work queue that every node serves: pull, handle, answer, through disconnects.

What is not answered within the consumer's ack wait goes to another node, so a handler must
do no harm when it is repeated. An answer (done, or try again) may be lost with the connection;
it is given again after a reconnect, because without it the message comes again only after the
ack wait, when a broker that restarted meanwhile knows only the ids of what is still stored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from secrets import token_hex

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import js_api
from foundation_nats.bus.wire import Message
from foundation_nats.errors import BusError

NAK_S = 1.0
_PULL_S = 20.0
_BATCH = 32
_ACK = b"+ACK"
_NAK = b"-NAK " + orjson.dumps({"delay": int(NAK_S * 1e9)})
_IN_PROGRESS = b"+WPI"


def delivered(message: Message) -> int:
    """How often this message was handed out, this time included."""
    # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<ns>.<pending>
    return int(message.reply.split(".")[4])


def sequence(message: Message) -> int:
    """Its sequence in the stream."""
    return int(message.reply.split(".")[5])


def stored_at(message: Message) -> datetime:
    """When the server stored it, by the server's clock."""
    return datetime.fromtimestamp(int(message.reply.split(".")[7]) / 1e9, UTC)


class Puller:
    """Serves one durable consumer until its task is cancelled."""

    def __init__(
        self,
        bus: Bus,
        stream: str,
        consumer: str,
        handle: Callable[[Message, float], Awaitable[None]],
        *,
        ack_wait_s: float,
    ) -> None:
        """*handle* is given each message and when it was taken; it answers by `done` or `again`."""
        self._bus = bus
        self._request = js_api("CONSUMER.MSG.NEXT", f"{stream}.{consumer}")
        self._handle = handle
        self._ack_wait_s = ack_wait_s
        self._log = get_logger(consumer)
        self._inbox: asyncio.Queue[tuple[float, Message]] = asyncio.Queue(maxsize=2 * _BATCH)
        self._answers: deque[tuple[float, str, bytes]] = deque(maxlen=2 * _BATCH)
        """(when, to which delivery, what) was answered last."""
        bus.on_reconnect(self._on_reconnect)

    def _on_reconnect(self) -> None:
        for at, reply, verdict in self._answers:
            if monotonic() - at < self._ack_wait_s:
                self._bus.publish(reply, verdict)
        # A pull request does not survive a reconnect: end it as the server would.
        self._take(Message("", "", b"", b"NATS/1.0 408\r\n\r\n"))

    def done(self, message: Message) -> None:
        """It need not come again."""
        self._answer(message, _ACK)

    def again(self, message: Message) -> None:
        """Let it come again after `NAK_S`."""
        self._answer(message, _NAK)

    def in_progress(self, message: Message) -> None:
        """Still at it: begin the ack wait anew."""
        if self._bus.is_connected:
            self._bus.publish(message.reply, _IN_PROGRESS)

    def is_late(self, taken_at: float) -> bool:
        """Whether it has been given to another meanwhile: cut off or frozen for so long."""
        return monotonic() - taken_at > self._ack_wait_s

    def _answer(self, message: Message, verdict: bytes) -> None:
        self._answers.append((monotonic(), message.reply, verdict))
        if self._bus.is_connected:
            self._bus.publish(message.reply, verdict)

    def _take(self, message: Message) -> None:
        if not self._inbox.full():
            self._inbox.put_nowait((monotonic(), message))

    async def run(self) -> None:
        """Pull, handle, answer, for ever."""
        while True:
            try:
                await self._pull()
            except BusError as error:
                self._log.debug("not readable yet", error=str(error))
                await asyncio.sleep(0.5)

    async def _pull(self) -> None:
        """One pull request: up to a batch of messages, or nothing within the time."""
        while not self._inbox.empty():
            _, unread = self._inbox.get_nowait()
            if not unread.status:
                self.again(unread)
        # A pulled message arrives under its own subject, so it needs a
        # subscription of its own rather than the shared inbox.
        reply = f"{self._bus.inbox}.pull.{token_hex(8)}"
        route = self._bus.subscribe(reply, self._take)
        try:
            body = {"batch": _BATCH, "expires": int(_PULL_S * 1e9)}
            self._bus.publish(self._request, orjson.dumps(body), reply=reply)
            async with asyncio.timeout(_PULL_S + 2):
                for _ in range(_BATCH):
                    taken_at, message = await self._inbox.get()
                    if message.status:
                        if message.status not in (404, 408):
                            await asyncio.sleep(0.2)
                        return
                    await self._handle(message, taken_at)
        except TimeoutError:
            return
        finally:
            self._bus.unsubscribe(route)
