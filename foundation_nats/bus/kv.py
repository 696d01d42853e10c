"""`Bucket`: keys with revisions over one stream; every write says what it expects, and a watch never goes deaf.

nats-py's own KV is not used: its ``get`` and ``create`` mishandle expiry
markers, and its watch needs 20 s to notice a lost consumer. A deleted or
expired key is absent here (`value` None), whatever marker says so.

Facts verified on nats-server 2.15.1:

- A key never written has last sequence 0; a tombstone counts as a write, so
  that `create` over it must name its sequence.
- ``Nats-TTL`` below 1 s is refused; on expiry a bucket with
  ``subject_delete_marker_ttl`` stores a marker with ``Nats-Marker-Reason``,
  which watchers see; without it they see nothing.
- A push consumer with ``idle_heartbeat`` reports its last consumer sequence in
  each heartbeat; a gap in consumer sequences is a lost message.
- A delete marker keeps headers of one's own (`Entry.mark`), for readers and for
  watchers, until the key is written again or the marker expires.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import (
    OnAck,
    StoredMessage,
    StreamReader,
    api,
    append,
    append_nowait,
)
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import (
    AlreadyExistsError,
    BusError,
    BusTimeoutError,
    NotFoundError,
    StaleRevisionError,
)

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
TOMBSTONE_TTL = "3600s"
_MARK = "Fnd-Mark"
_HEARTBEAT_S = 1.0
_DEAF_AFTER_S = 3.5


@dataclass(frozen=True, slots=True)
class Entry:
    """One key at one revision; `value` None: deleted or expired."""

    key: str
    value: bytes | None
    revision: int
    time: str = ""
    """The server's time of the write, RFC 3339; empty where it was not asked for."""
    mark: str = ""
    """What whoever deleted it left there; empty: nothing, or it is not deleted."""


def _is_marker(headers: Mapping[str, str]) -> bool:
    return "KV-Operation" in headers or "Nats-Marker-Reason" in headers


class Bucket:
    """One KV bucket of a cluster."""

    def __init__(self, bus: Bus, subjects: Subjects, kind: str) -> None:
        self._bus = bus
        self._prefix = subjects.bucket_key(kind, "")
        self.stream = subjects.bucket_stream(kind)
        self.reader = StreamReader(bus, self.stream)

    def subject(self, key: str) -> str:
        """The subject of *key*."""
        return self._prefix + key

    def entry(self, message: StoredMessage) -> Entry:
        """A stored message of this bucket as an entry."""
        gone = _is_marker(message.headers)
        return Entry(
            message.subject[len(self._prefix) :],
            None if gone else message.data,
            message.sequence,
            message.time,
            message.headers.get(_MARK, "") if gone else "",
        )

    async def read(self, key: str) -> Entry | None:
        """The key as the leader knows it; None if it was never written.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        message = await self.reader.last_from_leader(self.subject(key))
        return None if message is None else self.entry(message)

    async def read_many(self, keys: list[str], *, by_now: bool = False) -> dict[str, Entry]:
        """Many keys at once; those never written are missing.

        A replica may answer, which may be behind; with *by_now* nothing is older than the call.
        """
        read = self.reader.last_of_by_now if by_now else self.reader.last_of
        found = await read(self.subject(key) for key in keys)
        entries = (self.entry(message) for message in found.values())
        return {entry.key: entry for entry in entries}

    async def read_all(self) -> dict[str, Entry]:
        """Every live key; pages through the stream, so it is no snapshot."""
        entries: dict[str, Entry] = {}
        start, pending = 1, 1
        while pending:
            messages, pending = await self.reader.page(None, start, batch=512)
            if not messages:
                break
            for message in messages:
                entry = self.entry(message)
                entries[entry.key] = entry
            start = messages[-1].sequence + 1
        return {key: entry for key, entry in entries.items() if entry.value is not None}

    async def create(self, key: str, value: bytes, *, ttl_s: float | None = None) -> int:
        """Write a key that must not exist; returns its revision.

        Raises:
            AlreadyExistsError: it exists.
            BusTimeoutError: outcome unknown.
        """
        expected = 0
        for _ in range(5):
            try:
                return await self.replace(key, value, expected=expected, ttl_s=ttl_s)
            except StaleRevisionError:
                current = await self.read(key)
                if current is not None and current.value is not None:
                    raise AlreadyExistsError(f"{key} exists already.", key=key) from None
                expected = 0 if current is None else current.revision
        raise AlreadyExistsError(f"{key} is being written by others.", key=key)

    async def replace(
        self, key: str, value: bytes, *, expected: int, ttl_s: float | None = None
    ) -> int:
        """Write a key that must still be at revision *expected*; returns the new revision.

        Raises:
            StaleRevisionError: it has changed, or another write is in flight.
            BusTimeoutError: outcome unknown.
        """
        headers = {EXPECTED: str(expected)}
        if ttl_s is not None:
            headers["Nats-TTL"] = f"{max(1.0, ttl_s):g}s"
        return (await append(self._bus, self.subject(key), value, headers=headers)).sequence

    def replace_nowait(self, key: str, value: bytes, *, expected: int, on_ack: OnAck) -> None:
        """`replace` without waiting; *on_ack* is called once.

        Raises:
            BusUnavailableError, PayloadTooLargeError: nothing was sent; *on_ack* is not called.
        """
        append_nowait(
            self._bus, self.subject(key), value, on_ack, headers={EXPECTED: str(expected)}
        )

    def overwrite_nowait(self, key: str, value: bytes, *, on_ack: OnAck) -> None:
        """`overwrite` without waiting; *on_ack* is called once.

        Raises:
            BusUnavailableError, PayloadTooLargeError: nothing was sent; *on_ack* is not called.
        """
        append_nowait(self._bus, self.subject(key), value, on_ack)

    async def overwrite(self, key: str, value: bytes, *, ttl_s: float | None = None) -> int:
        """Write a key whatever it holds: for keys that have one writer."""
        headers = {} if ttl_s is None else {"Nats-TTL": f"{max(1.0, ttl_s):g}s"}
        return (await append(self._bus, self.subject(key), value, headers=headers)).sequence

    async def delete(self, key: str, *, expected: int | None = None, mark: str = "") -> None:
        """Delete a key, if it is still at revision *expected* where that is given.

        *mark* can be read in its place (`Entry.mark`), until it is written again or the
        tombstone expires.

        Raises:
            StaleRevisionError: it has changed.
            BusTimeoutError: outcome unknown.
        """
        headers = {"KV-Operation": "DEL", "Nats-TTL": TOMBSTONE_TTL}
        if expected is not None:
            headers[EXPECTED] = str(expected)
        if mark:
            headers[_MARK] = mark
        await append(self._bus, self.subject(key), b"", headers=headers)

    def watch(self, scope: TaskScope, on_entry: Callable[[Entry], None], keys: str = ">") -> Watch:
        """Call *on_entry* with every key that there is, then with every change, in order.

        `Watch.ready` is set once all that was there has been reported. *keys* is a
        wildcard such as ``ledger.*``.
        """
        return Watch(self._bus, self, scope, on_entry, keys)


class Watch:
    """One live view of a bucket; it restarts itself when it may have missed something."""

    def __init__(
        self,
        bus: Bus,
        bucket: Bucket,
        scope: TaskScope,
        on_entry: Callable[[Entry], None],
        keys: str = ">",
    ) -> None:
        self._bus = bus
        self._bucket = bucket
        self._keys = keys
        self._on_entry = on_entry
        self._log = get_logger("watch").bind(stream=bucket.stream)
        self.ready = asyncio.Event()
        self._heard_at = monotonic()
        self._last_stream_seq = 0
        self._last_consumer_seq = 0
        self._consumer = ""
        self._route: Route | None = None
        self._broken = asyncio.Event()
        bus.on_reconnect(self._break)
        self._task = scope.start(self._run(), f"watch.{bucket.stream}")

    @property
    def age_s(self) -> float:
        """Seconds since the server was last heard of: how old the view may be."""
        return monotonic() - self._heard_at

    def _break(self) -> None:
        self._broken.set()

    async def _run(self) -> None:
        try:
            while True:
                self._broken.clear()
                try:
                    await self._open()
                except (BusError, NotFoundError) as error:
                    self._log.debug("cannot watch yet", error=str(error))
                    await asyncio.sleep(0.2)
                    continue
                while not self._broken.is_set() and self.age_s < _DEAF_AFTER_S:
                    try:
                        await asyncio.wait_for(self._broken.wait(), _HEARTBEAT_S)
                    except TimeoutError:
                        continue
                await self._close_consumer()
        finally:
            if self._route is not None:
                self._bus.unsubscribe(self._route)

    async def _open(self) -> None:
        name = f"watch-{token_hex(8)}"
        deliver = f"{self._bus.inbox}.watch.{name}"
        self._consumer = name
        self._last_consumer_seq = 0
        if self._route is not None:
            self._bus.unsubscribe(self._route)
        self._route = self._bus.subscribe(deliver, self._on_message)
        config: dict[str, Any] = {
            "name": name,
            "deliver_subject": deliver,
            "ack_policy": "none",
            "max_deliver": 1,
            "idle_heartbeat": int(_HEARTBEAT_S * 1e9),
            "inactive_threshold": int(10 * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
            "replay_policy": "instant",
            "filter_subject": self._bucket.subject(self._keys),
        }
        info = await self._bucket.reader.info()
        if 0 < self._last_stream_seq <= info["state"]["last_seq"]:
            config["deliver_policy"] = "by_start_sequence"
            config["opt_start_seq"] = self._last_stream_seq + 1
        else:
            config["deliver_policy"] = "last_per_subject"
        self._heard_at = monotonic()
        created = await api(
            self._bus,
            "CONSUMER.CREATE",
            f"{self._bucket.stream}.{name}.{self._bucket.subject(self._keys)}",
            {"stream_name": self._bucket.stream, "config": config, "action": "create"},
        )
        if created.get("num_pending", 0) == 0 and self._last_consumer_seq == 0:
            self.ready.set()

    async def _close_consumer(self) -> None:
        if self._bus.is_connected:
            # Where this fails the consumer ends by its inactive threshold.
            with contextlib.suppress(BusError, NotFoundError):
                await api(self._bus, "CONSUMER.DELETE", f"{self._bucket.stream}.{self._consumer}")

    def _on_message(self, message: Message) -> None:
        self._heard_at = monotonic()
        if message.status == 100:
            last = message.header(b"Nats-Last-Consumer")
            if last is not None and int(last) > self._last_consumer_seq:
                self._broken.set()
            return
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>
        tokens = message.reply.split(".")
        if len(tokens) < 9 or tokens[3] != self._consumer or self._broken.is_set():
            return
        stream_seq, consumer_seq, pending = int(tokens[5]), int(tokens[6]), int(tokens[8])
        if consumer_seq != self._last_consumer_seq + 1:
            self._broken.set()
            return
        self._last_consumer_seq = consumer_seq
        self._last_stream_seq = stream_seq
        headers = message.headers() if message.raw_headers else {}
        self._on_entry(
            self._bucket.entry(StoredMessage(message.subject, stream_seq, message.data, headers))
        )
        if pending == 0:
            self.ready.set()

    async def wait_ready(self, timeout: float) -> None:
        """Wait until everything that was there has been reported.

        Raises:
            BusTimeoutError: not within *timeout* seconds.
        """
        try:
            await asyncio.wait_for(self.ready.wait(), timeout)
        except TimeoutError:
            raise BusTimeoutError(
                f"The bucket {self._bucket.stream} could not be read within {timeout:g} s."
            ) from None


__all__ = ["Bucket", "Entry", "Watch"]
