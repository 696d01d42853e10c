"""`Log`: the stream of one replicated domain: append by compare-and-set, read on, snapshot, compact.

Reads and writes ``fnd.C.domain.<name>`` (entries), ``….snapshot`` (the newest
one) and ``….mark`` in the stream ``fnd_C_DOMAIN_<name>``. The snapshot lies in
the stream that it sums up, so that a power cut, which takes a stream's end, can
never leave it beside a log that is older.

An append names the sequence of the entry that it follows, and the server stores
at most one entry after each: of two attempts with the same expectation one at
most is ever stored, however late a copy of it arrives.

The entry at a snapshot's revision is never removed: the server compares with
the last message of the subject that is *there*.
"""

from __future__ import annotations

from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import EXPECTED
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.streams import PubAck, StoredMessage, StreamReader, append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import DecodeError, DomainError
from foundation_schemas import DomainEntry, DomainSnapshot

PAGE = 256


class Log:
    """The stream of one domain."""

    def __init__(self, bus: Bus, subjects: Subjects, name: str) -> None:
        self._bus = bus
        self._subjects = subjects
        self.name = name
        self.subject = subjects.domain(name)
        self.live = subjects.domain_live(name)
        self._snapshot = subjects.domain_snapshot(name)
        self._mark = subjects.domain_mark(name)
        self.reader = StreamReader(bus, subjects.domain_stream(name))

    async def ensure(self, *, replicas: int) -> None:
        """Create the stream if it is missing.

        Raises:
            ServerError, BusTimeoutError, BusUnavailableError
        """
        await assets.ensure_domain(self._bus, self._subjects, self.name, replicas=replicas)

    async def append(self, entry: DomainEntry, *, timeout: float) -> PubAck:
        """Store *entry* if the log still ends at ``entry.after``; a single attempt.

        Raises:
            StaleRevisionError: it ends elsewhere, or another append is in flight.
            BusTimeoutError: outcome unknown.
            BusUnavailableError, BusRefusedError: not stored.
        """
        headers = {EXPECTED: str(entry.after), "Nats-Msg-Id": entry.id}
        return await append(
            self._bus, self.subject, _encode(entry), headers=headers, timeout=timeout
        )

    async def last(self) -> StoredMessage | None:
        """The last entry, as the stream's leader knows it."""
        return await self.reader.last_from_leader(self.subject)

    async def at(self, revision: int) -> StoredMessage | None:
        """The entry at *revision*, from the leader; None if it is gone or something else is there."""
        found = await self.reader.at_sequence(revision)
        return found if found is not None and found.subject == self.subject else None

    async def page(self, start: int, *, batch: int = PAGE) -> list[StoredMessage]:
        """Entries from *start* on; a replica that lags may answer."""
        return (await self.reader.page(self.subject, start, batch=batch))[0]

    async def all_from(self, start: int) -> list[StoredMessage]:
        """Whatever the stream holds from *start* on: entries, snapshot, mark."""
        return (await self.reader.page(None, start, batch=PAGE))[0]

    async def mark(self, by: str, *, timeout: float) -> int:
        """Write something that only a leader with its majority can store; returns its sequence.

        Raises:
            BusTimeoutError, BusUnavailableError, BusRefusedError
        """
        headers = {"Nats-Rollup": "sub"}
        ack = await append(self._bus, self._mark, by.encode(), headers=headers, timeout=timeout)
        return ack.sequence

    async def snapshot(self) -> tuple[DomainSnapshot | None, int]:
        """The newest snapshot as the leader knows it, and its sequence; None and 0: there is none.

        Raises:
            DomainError: it can't be read.
        """
        found = await self.reader.last_from_leader(self._snapshot)
        if found is None:
            return None, 0
        try:
            return decode(DomainSnapshot, found.data), found.sequence
        except DecodeError as error:
            raise DomainError(
                f"The snapshot of domain {self.name} can't be read: {error}",
                hint=f"It is the last message on {self._snapshot}; nothing was overwritten.",
            ) from error

    async def store_snapshot(self, snapshot: DomainSnapshot, *, expected: int) -> int:
        """Replace the snapshot with sequence *expected*; returns the new one's sequence.

        Raises:
            StaleRevisionError: there is another by now.
            PayloadTooLargeError, BusTimeoutError, BusUnavailableError
        """
        headers = {EXPECTED: str(expected), "Nats-Rollup": "sub"}
        return (
            await append(self._bus, self._snapshot, _encode(snapshot), headers=headers)
        ).sequence

    async def compact(self, *, below: int) -> int:
        """Remove the entries under revision *below*, which a snapshot covers; returns how many.

        Raises:
            BusTimeoutError, BusUnavailableError, BusRefusedError
        """
        return await self.reader.purge(self.subject, below=below)


def _encode(model: DomainEntry | DomainSnapshot) -> bytes:
    # With its nulls: within a user's operation or state they mean something.
    return model.model_dump_json().encode()
