"""One lease: a key in the bucket ``leases``, written by compare-and-set under a TTL.

Reads and writes ``$KV.fnd_C_leases.<name>``. Holding it proves nothing by
itself: between our last renewal and now another may have taken it. What is
done under it must be conditional on its own.

The key's revision is the fencing token. A term is never higher than the
revision it was written at, and a lease taken over a deleted key gets a term
above that key's revision, so that terms grow for ever even though a deleted
key remembers none.
"""

from __future__ import annotations

from dataclasses import dataclass

from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import DecodeError
from foundation_schemas import LeaseRecord

LEADER = "leader"


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What the key holds: *record* None: nobody has the lease."""

    record: LeaseRecord | None
    revision: int


class Lease:
    """The key of one lease."""

    def __init__(self, bus: Bus, subjects: Subjects, name: str = LEADER) -> None:
        self.name = name
        self.bucket = Bucket(bus, subjects, "leases")

    def state(self, entry: Entry | None) -> LeaseState:
        """An entry of the bucket as a lease; one that can't be read counts as nobody's."""
        if entry is None:
            return LeaseState(None, 0)
        if entry.value is None:
            return LeaseState(None, entry.revision)
        try:
            return LeaseState(decode(LeaseRecord, entry.value), entry.revision)
        except DecodeError as error:
            get_logger("lease").error("lease not understood", lease=self.name, error=str(error))
            return LeaseState(None, entry.revision)

    async def read(self) -> LeaseState:
        """The lease as the stream's leader knows it.

        Raises:
            BusUnavailableError, BusTimeoutError
        """
        return self.state(await self.bucket.read(self.name))

    async def write(self, record: LeaseRecord, *, expected: int) -> int:
        """Take or renew it over revision *expected*; returns the new revision.

        Raises:
            StaleRevisionError: the key has changed.
            BusTimeoutError: outcome unknown.
        """
        return await self.bucket.replace(
            self.name, encode(record), expected=expected, ttl_s=record.ttl_s
        )

    async def release(self, *, expected: int) -> None:
        """Delete it if it is still at revision *expected*.

        Raises:
            StaleRevisionError: it is another's by now.
            BusTimeoutError: outcome unknown; it ends by its TTL.
        """
        await self.bucket.delete(self.name, expected=expected)
