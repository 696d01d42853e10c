"""The nodes' ledgers in the bucket ``coordination``: read, replaced by compare-and-set, watched; and the clock they go by.

IO. A decision is made on a read from the stream's leader and written only over
that very revision. The watch serves those who want to know early (the planner);
nobody takes capacity on its word.

Expiries are in the time of the NATS server that leads the bucket's stream, which
says what time it is in every description of the stream: a client or node with
a wrong clock neither loses its reservation early nor takes another's. Servers of
one NATS cluster must agree on the time as far as reservations shall end in time:
a new stream leader whose clock is ahead ends them that much earlier. Nothing is
over-allocated by any clock; see `ledger.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import planted
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster import ledger as books
from foundation_nats.errors import BusTimeoutError, DecodeError, StaleRevisionError
from foundation_schemas import LedgerRecord, ReservationRecord

BUCKET = "coordination"
PREFIX = "ledger."
_SYNC_EVERY_S = 30.0
_SYNC_TRIES = 3
_SYNC_BLUR_S = 0.5
_CHANGE_TRIES = 50
_JITTER_S = 0.005
_JITTER_STEPS = 20


class ServerClock:
    """The time at the server that leads a stream, to half a round trip."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._ahead: float | None = None
        """Of `monotonic`."""
        self._synced_at = 0.0

    async def now(self) -> float:
        """Seconds since 1970 there; asks if it was long ago.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        ahead = self._ahead
        if ahead is None or monotonic() - self._synced_at > _SYNC_EVERY_S:
            for _ in range(_SYNC_TRIES):
                began = monotonic()
                info = await self._bucket.reader.info()
                ended = monotonic()
                there = datetime.fromisoformat(info["ts"]).timestamp()
                self._ahead = ahead = there - (began + ended) / 2
                self._synced_at = ended
                if ended - began < _SYNC_BLUR_S:
                    break
        assert ahead is not None
        return monotonic() + ahead

    def at(self) -> float | None:
        """The same without asking; None: it never was asked."""
        return None if self._ahead is None else monotonic() + self._ahead


@dataclass(frozen=True, slots=True)
class Read:
    """A ledger and the revision it was read at; a record of None: there is none."""

    record: LedgerRecord | None
    revision: int


class Ledgers:
    """Every node's ledger."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bucket = Bucket(bus, subjects, BUCKET)
        self.clock = ServerClock(self._bucket)
        self._seen: dict[str, Read] = {}
        self._listeners: list[Callable[[str, LedgerRecord | None, LedgerRecord | None], None]] = []
        self._log = get_logger("ledgers")

    # ---- one by one ---------------------------------------------------------------

    async def read(self, node: str) -> Read:
        """A node's ledger as the stream's leader knows it.

        Raises:
            BusUnavailableError, BusTimeoutError, DecodeError
        """
        entry = await self._bucket.read(PREFIX + node)
        return Read(None, 0) if entry is None else _read(entry)

    async def read_many(self, nodes: Sequence[str]) -> dict[str, Read]:
        """Many at once, none older than the call; nodes without one are missing.

        Raises:
            BusUnavailableError, BusTimeoutError, DecodeError
        """
        entries = await self._bucket.read_many([PREFIX + node for node in nodes], by_now=True)
        return {key.removeprefix(PREFIX): _read(entry) for key, entry in entries.items()}

    async def write(self, after: LedgerRecord, read: Read) -> Read:
        """Replace what was read.

        Raises:
            StaleRevisionError: it has changed since.
            BusTimeoutError: outcome unknown.
            BusUnavailableError
        """
        key, value = PREFIX + after.node, encode(after)
        return Read(after, await self._bucket.replace(key, value, expected=read.revision))

    async def remove(self, read: Read) -> None:
        """Delete what was read.

        Raises:
            StaleRevisionError, BusTimeoutError, BusUnavailableError
        """
        if read.record is not None:
            await self._bucket.delete(PREFIX + read.record.node, expected=read.revision)

    async def reserve(self, after: LedgerRecord, read: Read) -> Read:
        """`write` for one reservation more.

        Raises:
            StaleRevisionError, BusTimeoutError, BusUnavailableError
        """
        if planted("reserve_without_cas"):
            return Read(after, await self._bucket.overwrite(PREFIX + after.node, encode(after)))
        return await self.write(after, read)

    async def change(
        self, node: str, what: Callable[[LedgerRecord, float], LedgerRecord | None]
    ) -> LedgerRecord | None:
        """Replace a node's ledger by what *what* makes of it, until that was not disturbed.

        It is called anew for each try, and must say the same for the same ledger:
        a write whose answer was lost is looked for and done again. None, from it or if there
        is no ledger: nothing is written.

        Raises:
            BusUnavailableError, BusTimeoutError: it may have been written.
        """
        unknown: BusTimeoutError | None = None
        for number in range(_CHANGE_TRIES):
            # Those that collided must not do it again at the same time.
            await asyncio.sleep(random.random() * _JITTER_S * min(number, _JITTER_STEPS))
            now = await self.clock.now()
            read = await self.read(node)
            if read.record is None:
                return None
            after = what(read.record, now)
            if after is None or after == read.record:
                return after
            try:
                await self.write(after, read)
            except StaleRevisionError:
                continue
            except BusTimeoutError as error:
                unknown = error
                continue
            return after
        raise unknown or BusTimeoutError(
            f"The ledger of {node} is being changed by others all the time."
        )

    # ---- all, watched -------------------------------------------------------------

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Follow all ledgers until *scope* closes.

        Raises:
            BusTimeoutError: they could not be read in time.
        """
        watch = self._bucket.watch(scope, self._on_entry, keys=PREFIX + "*")
        await watch.wait_ready(timeout)

    def subscribe(
        self, listener: Callable[[str, LedgerRecord | None, LedgerRecord | None], None]
    ) -> None:
        """Call *listener* with the node and its ledger before and after, at every change."""
        self._listeners.append(listener)

    def seen(self) -> Mapping[str, LedgerRecord]:
        """Node to its ledger, as last seen by the watch."""
        return {node: read.record for node, read in self._seen.items() if read.record is not None}

    def reservations(self) -> dict[str, list[ReservationRecord]]:
        """Node to the reservations that count, as last seen; nodes without any are missing."""
        found = {}
        now: float | None = None
        for node, read in self._seen.items():
            if read.record is None or not read.record.reservations:
                continue
            if now is None:
                now = self.clock.at()
            # A clock that was never asked ends nothing: too much is counted, and soon put right.
            items = books.live(read.record, now if now is not None else 0.0)
            if items:
                found[node] = items
        return found

    def _on_entry(self, entry: Entry) -> None:
        node = entry.key.removeprefix(PREFIX)
        before = self._seen.get(node, Read(None, 0))
        try:
            after = self._seen[node] = _read(entry)
        except DecodeError as error:
            self._log.error("ledger not understood, left alone", node=node, error=str(error))
            return
        for listener in self._listeners:
            listener(node, before.record, after.record)


def _read(entry: Entry) -> Read:
    record = None if entry.value is None else decode(LedgerRecord, entry.value)
    return Read(record, entry.revision)
