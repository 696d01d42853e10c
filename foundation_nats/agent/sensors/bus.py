"""`NatsSubject`, `NatsStream`, `KvWatch`: what others publish, as signals of ours.

A stream and a bucket are read from a position that is kept in the agent's record together with the
signal, so each message becomes one signal and takes effect once, whatever is killed in between. No
consumer is made on the server; the credentials of the nodes must allow Direct Get (or ``MSG.GET``) of the
stream, ``STREAM.INFO``, and a subscription to the subject.

What is published live is only a hint to read; without it the stream is looked at every `_POLL_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from foundation_nats.agent.sensors.sensor import Emit, Event, Sensor
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.bus.wire import Message
from foundation_nats.errors import (
    BusError,
    ConfigError,
    NotFoundError,
    PayloadTooLargeError,
    SensorError,
)

_POLL_S = 2.0
_PAGE = 64


def decoded(data: bytes) -> Any:
    """JSON if it is, else text; None if it is nothing."""
    if not data:
        return None
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data.decode("utf-8", "replace")


def _checked_subject(sensor: Sensor, subject: str) -> str:
    if not subject or any(c.isspace() for c in subject) or "" in subject.split("."):
        raise ConfigError(f"{type(sensor).__name__} {sensor.name}: {subject!r} is no subject")
    return subject


class NatsSubject(Sensor):
    """``NatsSubject("plant.*.temp", emit="temp")``: messages of core NATS; the data is JSON, or text.

    At most once, as core NATS is: what comes while the agent does not run, or overflows the queue,
    is lost. For what must not be, let a stream take the subject and use `NatsStream`.

    Args:
        queue: of several subscribers of this queue group one gets each message.
        whole: the data is ``{"subject", "headers", "data"}``.

    Raises:
        ConfigError: *subject* is none.
    """

    can_wait = False

    def __init__(
        self, subject: str, *, queue: str = "", whole: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        self.subject = _checked_subject(self, subject)
        self.queue = queue
        self.whole = whole

    async def run(self, emit: Emit) -> None:
        log: deque[Exception] = deque(maxlen=1)
        failed = asyncio.Event()

        def on_message(message: Message) -> None:
            headers = message.headers() if message.raw_headers else {}
            data = _shaped(message.subject, headers, message.data, whole=self.whole)
            try:
                emit.nowait(Event(data, traceparent=headers.get("traceparent")))
            except Exception as error:  # said by `run`, because the read loop may not stumble
                log.append(error)
                failed.set()

        subject = self.subject.replace("{agent}", self.here.id)
        route = self.here.bus.subscribe(subject, on_message, queue=self.queue)
        try:
            await failed.wait()
        finally:
            self.here.bus.unsubscribe(route)
        raise log[0]


def _shaped(subject: str, headers: Mapping[str, str], data: bytes, *, whole: bool) -> Any:
    if not whole:
        return decoded(data)
    return {"subject": subject, "headers": dict(headers), "data": decoded(data)}


class NatsStream(Sensor):
    """``NatsStream("ORDERS", emit="order")``: each message of a JetStream stream as one signal, in order.

    Args:
        subject: only these messages.
        start: ``new``: what is stored after the agent was first started; ``all``: what is there, too.
        whole: the data is ``{"subject", "headers", "data", "sequence", "time"}``.

    A stream that is deleted and made anew is read from its beginning. A message that is too large for
    a signal is left out and logged.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        stream: str,
        subject: str = ">",
        *,
        start: str = "new",
        whole: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not stream or any(c.isspace() or c in ".*>" for c in stream):
            raise ConfigError(f"{type(self).__name__} {self.name}: {stream!r} is no stream")
        if start not in ("new", "all"):
            raise ConfigError(f"{type(self).__name__} {self.name}: start must be new or all")
        self.stream = stream
        self.subject = _checked_subject(self, subject)
        self.start = start
        self.whole = whole

    async def run(self, emit: Emit) -> None:
        reader = StreamReader(self.here.bus, self.stream)
        hint = asyncio.Event()
        routes = []
        try:
            position, config = await self._place(reader)
            if self.here.position != position:
                await emit.keep(position)
            for subject in self._hints(config):
                routes.append(self.here.bus.subscribe(subject, lambda _message: hint.set()))
            while True:
                hint.clear()
                more = await self._read(reader, position, config, emit)
                if not more:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(hint.wait(), _POLL_S)
                        continue
                    position, config = await self._place(reader, position)
        except NotFoundError as error:
            raise SensorError(f"There is no stream {self.stream}: {error}") from error
        except BusError as error:
            raise SensorError(f"The stream {self.stream} can't be read: {error}") from error
        finally:
            for route in routes:
                self.here.bus.unsubscribe(route)

    def _hints(self, config: Mapping[str, Any]) -> list[str]:
        if self.subject != ">":
            return [self.subject]
        return list(config.get("subjects") or ())

    async def _place(
        self, reader: StreamReader, position: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """Where to read on, and the stream's configuration."""
        info = await reader.info()
        last, created = int(info["state"]["last_seq"]), str(info.get("created", ""))
        found = position or self.here.position
        if not isinstance(found, dict) or "sequence" not in found:
            found = {"sequence": last if self.start == "new" else 0, "created": created}
        elif found.get("created") != created:
            found = {"sequence": 0, "created": created}
        return dict(found), info["config"]

    async def _read(
        self,
        reader: StreamReader,
        position: dict[str, Any],
        config: Mapping[str, Any],
        emit: Emit,
    ) -> bool:
        """Emit what comes next, moving *position*; whether there is more."""
        subject = None if self.subject == ">" else self.subject
        following = position["sequence"] + 1
        if config.get("allow_direct"):
            messages, pending = await reader.page(subject, following, batch=_PAGE)
        else:
            message = await reader.next_of(subject or ">", following)
            messages, pending = ([message], 1) if message else ([], 0)
        stored = None
        for message in messages:
            position["sequence"] = message.sequence
            try:
                stored = await emit.soon(self._event(message, dict(position)))
            except PayloadTooLargeError as error:
                self._left_out(message, error)
        if stored is not None:
            await stored
        return bool(messages) and bool(pending)

    def _left_out(self, message: StoredMessage, error: Exception) -> None:
        from foundation_nats.base.logs import get_logger

        get_logger("sensors").error(
            "message left out",
            sensor=self.name,
            agent=self.here.id,
            stream=self.stream,
            sequence=message.sequence,
            error=str(error),
        )

    def _event(self, message: StoredMessage, position: dict[str, Any]) -> Event:
        data = _shaped(message.subject, message.headers, message.data, whole=self.whole)
        if self.whole:
            data = {**data, "sequence": message.sequence, "time": message.time}
        return Event(
            data,
            id=f"{position['created']}.{message.sequence}",
            position=position,
            traceparent=message.headers.get("traceparent"),
        )


class KvWatch(NatsStream):
    """``KvWatch("settings", "ui.*", emit="setting")``: each change of a key of a NATS KV bucket.

    The data is ``{"key", "value", "revision", "op"}``: `op` is ``put``, ``del`` or ``purge``, and `value`
    is JSON, or text. Of a key that changes several times while nothing runs, as many changes as the
    bucket's history keeps.

    Args:
        keys: a wildcard such as ``ui.*``.
        start: ``all``: the keys that are there first; ``new``: only changes after the first start.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(self, bucket: str, keys: str = ">", *, start: str = "all", **options: Any) -> None:
        super().__init__(f"KV_{bucket}", f"$KV.{bucket}.{keys}", start=start, **options)
        self._prefix = f"$KV.{bucket}."

    def _event(self, message: StoredMessage, position: dict[str, Any]) -> Event:
        marker = message.headers.get("KV-Operation", "").lower()
        if not marker and "Nats-Marker-Reason" in message.headers:
            marker = "del"
        data = {
            "key": message.subject.removeprefix(self._prefix),
            "value": None if marker else decoded(message.data),
            "revision": message.sequence,
            "op": marker or "put",
        }
        return Event(data, id=f"{position['created']}.{message.sequence}", position=position)


__all__ = ["KvWatch", "NatsStream", "NatsSubject", "decoded"]
