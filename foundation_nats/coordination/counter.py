"""`counter`: a number that many processes add to without waiting for each other.

A PN counter (Shapiro et al., *A comprehensive study of convergent and
commutative replicated data types*, 2011): each writer has a key with two sums
that only grow, and the value is the sum over all writers.

Guaranteed: an increment that returned is in every later `value`; one that is
repeated with its *sequence* counts once, also by a later process of the same
writer's name. Not guaranteed: that `value` is a moment's picture while others add.

A writer's key stays for ever: give writers names that come again.
"""

from __future__ import annotations

import asyncio
import random

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.streams import api
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    StaleRevisionError,
)
from foundation_schemas import CounterRecord
from foundation_schemas.base import check_name

_RETRY_S = 0.05


class Counter:
    """One writer's handle on a counter."""

    def __init__(self, connection: Connection, name: str, *, writer: str) -> None:
        try:
            self.name = check_name(name)
            self.writer = check_name(writer)
        except ValueError as error:
            raise ConfigError(f"counter {name!r} of writer {writer!r}: {error}") from error
        self._bus = connection.bus
        self._bucket = Bucket(connection.bus, connection.subjects, "coordination")
        self._key = f"counter_{name}.{writer}"
        self._record = CounterRecord()
        self._revision: int | None = None
        self._adding = asyncio.Lock()

    async def add(
        self, amount: int = 1, *, sequence: int | None = None, timeout: float = 5.0
    ) -> int:
        """Add *amount*, which may be negative; returns the sequence number it has.

        Args:
            sequence: the writer's number of this increment, greater than of all before
                it: a repeat counts once. Without it the next one is taken, and whoever
                calls must not repeat a call whose outcome is unknown.

        Raises:
            BusUnavailableError: not added.
            BusTimeoutError: outcome unknown; repeat it with the sequence in `details`.
        """
        deadline = monotonic() + timeout
        wanted = sequence
        unsure = False
        async with self._adding:
            while True:
                left = deadline - monotonic()
                try:
                    async with asyncio.timeout(max(0.0, left)):
                        if self._revision is None:
                            await self._load()
                        assert self._revision is not None
                        if wanted is None:
                            wanted = self._record.sequence + 1
                        if self._record.sequence >= wanted:
                            return wanted  # counted before
                        after = CounterRecord(
                            plus=self._record.plus + max(0, amount),
                            minus=self._record.minus + max(0, -amount),
                            sequence=wanted,
                        )
                        self._revision = await self._bucket.replace(
                            self._key, encode(after), expected=self._revision
                        )
                        failpoint("counter.after_cas")
                        self._record = after
                        return wanted
                except StaleRevisionError:
                    # Our own write, unheard, or another process of this writer's name.
                    self._revision = None
                    if not unsure and sequence is None:
                        wanted = None
                except (TimeoutError, BusTimeoutError) as error:
                    unsure = unsure or self._revision is not None
                    self._revision = None
                    if left <= 0 or monotonic() >= deadline:
                        raise self._not_known(unsure, wanted) from error
                except BusUnavailableError:
                    self._revision = None
                    if monotonic() + _RETRY_S >= deadline:
                        if unsure:
                            raise self._not_known(unsure, wanted) from None
                        raise
                await asyncio.sleep(random.uniform(0, _RETRY_S))

    def _not_known(
        self, unsure: bool, sequence: int | None
    ) -> BusTimeoutError | BusUnavailableError:
        if not unsure:
            return BusUnavailableError(f"The counter {self.name} could not be reached in time.")
        return BusTimeoutError(
            f"It is not known whether the counter {self.name} was increased.",
            hint=f"Repeat it with sequence={sequence}.",
            sequence=sequence,
        )

    async def _load(self) -> None:
        entry = await self._bucket.read(self._key)
        if entry is None or entry.value is None:
            self._record = CounterRecord()
        else:
            self._record = decode(CounterRecord, entry.value)
        self._revision = 0 if entry is None else entry.revision

    async def value(self) -> int:
        """The sum over all writers, with every increment that returned before this call.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        return sum(record.plus - record.minus for record in (await self.writers()).values())

    async def writers(self) -> dict[str, CounterRecord]:
        """Each writer's part.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        # The leader names the keys; a replica may answer for what is in them.
        prefix = self._bucket.subject(f"counter_{self.name}.")
        info = await api(
            self._bus, "STREAM.INFO", self._bucket.stream, {"subjects_filter": prefix + "*"}
        )
        subjects = info["state"].get("subjects") or {}
        found = await self._bucket.reader.last_of_by_now(subjects)
        entries = {
            message.subject.removeprefix(prefix): self._bucket.entry(message)
            for message in found.values()
        }
        return {
            writer: decode(CounterRecord, entry.value)
            for writer, entry in sorted(entries.items())
            if entry.value is not None
        }


def counter(connection: Connection, name: str, *, writer: str) -> Counter:
    """*writer*'s handle on the counter *name*.

    Raises:
        ConfigError: a name is not allowed.

    Example:
        >>> hits = counter(cluster, "hits", writer="web-1")
        >>> await hits.add(3)
        >>> await hits.value()
    """
    return Counter(connection, name, writer=writer)
