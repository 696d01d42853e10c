"""Writes the bucket ``nodes``: this node's record, and in another's that its life is over.

Every write is a compare-and-set. A node alone writes its record, but for its end; so
who finds it changed was replaced by another process, or was declared over, or has
written it itself without learning that it had (its incarnations are remembered).

A record is refreshed while its node lives. Its TTL is garbage collection (F2), and
that of a record that says that a life is over is longer than anything stays frozen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

from foundation_nats.base.clock import monotonic, utc_text, wall_ms
from foundation_nats.base.logs import Logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import call, decode, encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    DecodeError,
    NodeNameTakenError,
    NoRespondersError,
    StaleRevisionError,
)
from foundation_schemas import NodeRecord, Pong

RECORD_TTL_S = 60.0
RECORD_EVERY_S = 20.0
SEALED_TTL_S = 3600.0
"""How long it is written down that a life is over: longer than anything stays frozen."""
LEADERLESS_S = 6.0
"""How long a node that joins waits for the stream of `nodes` to have a leader."""
SILENT_S = RECORD_TTL_S + 5.0
"""How long a node that joins waits for one of its name that is connected and silent to be over."""
_JOIN_PINGS = 3
_JOIN_PAUSE_S = 0.2
_JOIN_PING_TIMEOUT_S = 1.0


class OwnRecord:
    """The record of this node.

    Args:
        record: what this node is; its incarnation is chosen by `begin`.
        on_written: called after every write that begins or confirms a life.
        on_replaced: called when another process is found to have the name.
        on_ended: called with the life that somebody has declared over.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        bucket: Bucket,
        record: NodeRecord,
        *,
        log: Logger,
        on_written: Callable[[], None],
        on_replaced: Callable[[], None],
        on_ended: Callable[[int], None],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._bucket = bucket
        self._log = log
        self._on_written = on_written
        self._on_replaced = on_replaced
        self._on_ended = on_ended
        self._revision = 0
        self._incarnations: set[int] = set()
        self.now = record.model_copy(update={"incarnation": 0})
        """The record as it should be stored."""

    def has_been(self, incarnation: int) -> bool:
        """Whether that was (or is) a life of this process."""
        return incarnation in self._incarnations

    async def begin(self) -> None:
        """Choose a life that is newer than any of this name, and write it.

        A process of this name that is connected and silent may be frozen, or its machine has
        lost its power and the server doesn't know yet. Its name is free once its life was
        declared over, or its record has expired, which it would have refreshed; till then this waits.

        Raises:
            NodeNameTakenError: a node of this name lives.
            BusTimeoutError, BusUnavailableError: the bucket could not be used.
        """
        name = self.now.name
        began = monotonic()
        attempts = 0
        has_warned = False
        while True:
            entry = await self._bucket.read(name)
            previous = 0
            if entry is not None and entry.value is not None:
                previous = incarnation_of(entry)
                self._remember_short_lives(entry)
            is_silent = await _is_silent(self._bus, self._subjects, name, has_record=previous > 0)
            if is_silent and previous and not _has_ended(entry):
                if monotonic() - began >= SILENT_S:
                    raise NodeNameTakenError(
                        f"A node named {name!r} lives, but does not answer.",
                        hint="End that process, or give this node another name with --name.",
                        node=name,
                    )
                if not has_warned:
                    has_warned = True
                    self._log.warning(
                        "a node of this name is connected and silent; waiting until it is over",
                        node=name,
                        at_most_s=SILENT_S,
                    )
                await asyncio.sleep(_JOIN_PAUSE_S)
                continue
            try:
                await self._write(
                    max(previous + 1, wall_ms()), 0 if entry is None else entry.revision
                )
                return
            except StaleRevisionError:
                attempts += 1
                if attempts == 5:
                    raise NodeNameTakenError(
                        f"Another process is joining as node {name!r} right now.",
                        hint="Give this node another name with --name.",
                        node=name,
                    ) from None
            except BusUnavailableError:
                # Copies that were just made, or have lost a server, elect their leader first.
                if monotonic() - began >= LEADERLESS_S:
                    raise
                await asyncio.sleep(_JOIN_PAUSE_S)

    async def begin_again(self) -> None:
        """Write a new life of this process over the one that was declared over.

        Raises:
            NodeNameTakenError: another process has the name by now.
            BusTimeoutError, BusUnavailableError: not (surely) written; call again.
        """
        name = self.now.name
        incarnation = max(self.now.incarnation + 1, wall_ms())
        try:
            await self._write(incarnation, self._revision)
        except StaleRevisionError:
            entry = await self._bucket.read(name)
            if (
                entry is not None
                and entry.value is not None
                and not self.has_been(incarnation_of(entry))
            ):
                self._on_replaced()
                raise NodeNameTakenError(
                    f"Another process runs as node {name!r} now.",
                    hint="Stop one of them, or give this node another name.",
                    node=name,
                ) from None
            if entry is not None and entry.value is not None:
                self._remember_short_lives(entry)
            await self._write(incarnation, 0 if entry is None else entry.revision)

    def change(self, **changes: Any) -> None:
        """Change fields; `store` writes them, and the next refresh."""
        self.now = NodeRecord.model_validate({**self.now.model_dump(), **changes})

    async def store(self) -> None:
        """Write the record as it is now.

        Raises:
            BusTimeoutError, BusUnavailableError: not (surely) written.
        """
        try:
            await self._write(self.now.incarnation, self._revision)
        except StaleRevisionError:
            await self._reclaim()

    async def delete(self) -> None:
        """Delete the record.

        Raises:
            StaleRevisionError: it is not as we left it.
            BusTimeoutError, BusUnavailableError: not (surely) deleted.
        """
        await self._bucket.delete(self.now.name, expected=self._revision)

    async def _write(self, incarnation: int, expected: int) -> None:
        record = self.now.model_copy(
            update={"incarnation": incarnation, "started_at": self.now.started_at or utc_text()}
        )
        # Before the write: its echo by the watch must not look like a stranger's.
        self._incarnations.add(incarnation)
        self._revision = await self._bucket.replace(
            record.name, encode(record), expected=expected, ttl_s=RECORD_TTL_S
        )
        # The fields may have been changed meanwhile; the life only goes forward.
        self.now = self.now.model_copy(
            update={
                "incarnation": max(self.now.incarnation, incarnation),
                "started_at": record.started_at,
            }
        )
        self._on_written()

    async def _reclaim(self) -> None:
        """Our record is not as we left it: expired, written by us unawares, or by another."""
        try:
            entry = await self._bucket.read(self.now.name)
            if entry is None or entry.value is None:
                await self._write(self.now.incarnation, 0 if entry is None else entry.revision)
            elif decode(NodeRecord, entry.value).ended:
                self._on_ended(incarnation_of(entry))
            elif self.has_been(incarnation_of(entry)):
                await self._write(self.now.incarnation, entry.revision)
            else:
                self._on_replaced()
        except (StaleRevisionError, BusError) as error:
            self._log.warning("node record not reclaimed", error=str(error))

    def _remember_short_lives(self, entry: Entry) -> None:
        """What the record of the life before says of those before it goes on with this one."""
        assert entry.value is not None
        try:
            short = decode(NodeRecord, entry.value).short_lives
        except DecodeError:
            return
        self.now = self.now.model_copy(update={"short_lives": short})


async def write_end(bucket: Bucket, node: str, incarnation: int, *, was_short: bool) -> bool:
    """Write down that this life of *node* is over; False: somebody else wrote, look again.

    Raises:
        BusTimeoutError, BusUnavailableError: not (surely) written.
        DecodeError: the record can't be read.
    """
    entry = await bucket.read(node)
    record = NodeRecord(name=node, incarnation=incarnation)
    if entry is not None and entry.value is not None:
        record = decode(NodeRecord, entry.value)
    if record.incarnation < incarnation:
        record = record.model_copy(update={"incarnation": incarnation})
    if record.incarnation > incarnation or record.ended:
        return True
    short_lives = record.short_lives + 1 if was_short else 0
    ended = record.model_copy(update={"ended": True, "short_lives": short_lives})
    try:
        await bucket.replace(
            node,
            encode(ended),
            expected=0 if entry is None else entry.revision,
            ttl_s=SEALED_TTL_S,
        )
    except StaleRevisionError:
        return False
    return True


def incarnation_of(entry: Entry) -> int:
    """The incarnation a stored record names; 1 where it can't be read, so that it counts."""
    try:
        return max(1, int(orjson.loads(entry.value or b"{}").get("incarnation", 1)))
    except (ValueError, AttributeError, TypeError):
        return 1


def _has_ended(entry: Entry | None) -> bool:
    """Whether the stored life was declared over."""
    if entry is None or entry.value is None:
        return False
    try:
        return decode(NodeRecord, entry.value).ended
    except DecodeError:
        return False


async def _is_silent(bus: Bus, subjects: Subjects, name: str, *, has_record: bool) -> bool:
    """Whether somebody of this name is connected and does not answer.

    Raises:
        NodeNameTakenError: it answers.
    """
    subject = subjects.control_node(name, "ping")
    for attempt in range(_JOIN_PINGS if has_record else 1):
        if attempt:
            await asyncio.sleep(_JOIN_PAUSE_S)
        try:
            pong = await call(bus, subject, None, Pong, timeout=_JOIN_PING_TIMEOUT_S)
        except NoRespondersError:
            continue
        except BusTimeoutError:
            return True
        raise NodeNameTakenError(
            f"A node named {name!r} is running (incarnation {pong.incarnation}).",
            hint="Give this node another name with --name, or stop the other one.",
            node=name,
        )
    return False
