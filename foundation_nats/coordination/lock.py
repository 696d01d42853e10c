"""`lock`: mutual exclusion over one key by compare-and-set, with a fencing token that only grows.

Guaranteed: tokens of one lock strictly grow from holder to holder. While the
holder's process runs and `Lock.is_valid` says yes, nobody else holds it: the
right is counted from before the write that gave it, on the holder's own clock,
and others wait the full time from after they saw that write, on theirs.

Not guaranteed: that a holder which was frozen knows in time that its right is
over (no lock can). What must not happen twice hands the token to the resource,
and the resource refuses lower ones (Kleppmann, *How to do distributed locking*,
2016). Waiters are not served in order.

A key is never deleted; a token is the revision that the acquisition replaced,
plus one, and revisions of a bucket only grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from secrets import token_hex
from types import TracebackType
from typing import Protocol, Self

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    LockLostError,
    LockTimeoutError,
    StaleRevisionError,
)
from foundation_schemas import LockRecord
from foundation_schemas.base import check_name

_TTL_MIN_S = 1.0
_DRIFT = 0.05
"""Of the right's length: for clocks that run differently fast."""
_POLL_S = 1.0
"""Waiters look this often even if they hear of no change."""
_RETRY_S = 0.1


class Connection(Protocol):
    """What the patterns need of a client or an agent's context."""

    bus: Bus
    subjects: Subjects


class Lock:
    """One contender; enter it to hold the lock, or `acquire` and `release`.

    An object is used by one task at a time, and may be used again after `release`.
    """

    def __init__(self, connection: Connection, name: str, *, ttl_s: float, owner: str) -> None:
        try:
            self.name = check_name(name)
        except ValueError as error:
            raise ConfigError(f"lock {name!r}: {error}") from error
        if ttl_s < _TTL_MIN_S:
            raise ConfigError(f"A lock's ttl_s is at least {_TTL_MIN_S:g} s, got {ttl_s:g}.")
        self.ttl_s = ttl_s
        self.token = 0
        """The fencing token of the present (or last) holding."""
        self.lost = asyncio.Event()
        """Set when the right ended without `release`."""
        self._owner = owner
        self._bus = connection.bus
        self._bucket = Bucket(connection.bus, connection.subjects, "coordination")
        self._key = f"lock_{name}"
        self._holder: str | None = None
        self._revision = 0
        self._since = ""
        self._until = 0.0
        self._renewing: asyncio.Task[None] | None = None
        self._log = get_logger("lock").bind(lock=name)

    # ---- holding ----------------------------------------------------------------

    def is_valid(self) -> bool:
        """Whether nobody else can hold it now; after a pause of this process: checked anew."""
        return self._holder is not None and monotonic() < self._until

    def check(self) -> int:
        """The token.

        Raises:
            LockLostError: the right is over.
        """
        if not self.is_valid():
            raise LockLostError(
                f"The lock {self.name} is not held any more.",
                hint="Stop what it protected; acquire it again.",
            )
        return self.token

    async def acquire(self, *, timeout: float = 10.0) -> int:
        """Wait until it is ours; returns the fencing token.

        Cancellation: if the lock was just won it is released, or lapses after `ttl_s`.

        Raises:
            LockTimeoutError: somebody else held it all the time; names who.
            BusUnavailableError: the server was not reachable within *timeout*.
        """
        if self._holder is not None:
            raise RuntimeError("this Lock is held already: use one object per holder")
        deadline = monotonic() + timeout
        changed = asyncio.Event()

        def on_change(_message: Message) -> None:
            changed.set()

        # Whoever writes the key publishes on its subject: a hint to look again.
        route = self._bus.subscribe(self._bucket.subject(self._key), on_change)
        holder = f"{self._owner}-{token_hex(8)}"
        seen: tuple[int, float] = (-1, 0.0)
        last: LockRecord | None = None
        unreachable: BusError | None = None
        unsure_since: float | None = None
        try:
            while (left := deadline - monotonic()) > 0:
                changed.clear()
                try:
                    entry = await self._bucket.read(self._key)
                    last, unreachable = self._record(entry), None
                    revision = 0 if entry is None else entry.revision
                    if revision != seen[0]:
                        seen = (revision, monotonic())
                    wait = seen[1] + last.ttl_s - monotonic()
                    if last.holder == holder:
                        # Our own write, whose answer was lost: count from the first that it may be.
                        assert unsure_since is not None
                        self._begin(holder, last.token, revision, unsure_since)
                        return self.token
                    if last.holder is None or wait <= 0:
                        sent = monotonic()
                        try:
                            if await self._take(holder, revision, sent):
                                return self.token
                        except BusTimeoutError:
                            unsure_since = unsure_since or sent
                            raise
                        continue
                except (BusTimeoutError, BusUnavailableError) as error:
                    unreachable = error
                    wait = _RETRY_S
                with contextlib.suppress(TimeoutError):
                    pause = min(wait, left, _POLL_S * random.uniform(0.5, 1.0))
                    # Not `wait_for`, which may swallow a cancellation (Python 3.11).
                    async with asyncio.timeout(max(0.001, pause)):
                        await changed.wait()
        finally:
            self._bus.unsubscribe(route)
        if unreachable is not None:
            raise unreachable
        who = "" if last is None or not last.owner else f" by {last.owner}"
        raise LockTimeoutError(
            f"The lock {self.name} was held{who} for all of {timeout:g} s.",
            hint="Wait longer, or find out what its holder does.",
        )

    async def _take(self, holder: str, expected: int, sent: float) -> bool:
        self._since = utc_text()
        record = LockRecord(
            holder=holder,
            owner=self._owner,
            token=expected + 1,
            ttl_s=self.ttl_s,
            since=self._since,
        )
        try:
            revision = await self._bucket.replace(self._key, encode(record), expected=expected)
        except StaleRevisionError:
            return False
        failpoint("lock.taken")
        self._begin(holder, record.token, revision, sent)
        return True

    def _begin(self, holder: str, token: int, revision: int, sent: float) -> None:
        self._holder, self.token, self._revision = holder, token, revision
        self._until = sent + self.ttl_s * (1 - _DRIFT)
        self.lost.clear()
        self._renewing = asyncio.create_task(self._renew(), name=f"lock.{self.name}")

    def _record(self, entry: Entry | None) -> LockRecord:
        if entry is None or entry.value is None:
            return LockRecord()
        return decode(LockRecord, entry.value)

    async def _renew(self) -> None:
        while self._holder is not None:
            await asyncio.sleep(self.ttl_s / 3)
            while self._holder is not None:
                if monotonic() >= self._until:
                    self._lose("it could not be renewed in time")
                    return
                sent = monotonic()
                record = LockRecord(
                    holder=self._holder,
                    owner=self._owner,
                    token=self.token,
                    ttl_s=self.ttl_s,
                    since=self._since,
                )
                try:
                    self._revision = await self._bucket.replace(
                        self._key, encode(record), expected=self._revision
                    )
                except StaleRevisionError:
                    if not await self._is_still_mine():
                        return
                except (BusTimeoutError, BusUnavailableError):
                    await asyncio.sleep(min(_RETRY_S, self.ttl_s / 20))
                else:
                    self._until = sent + self.ttl_s * (1 - _DRIFT)
                    break

    async def _is_still_mine(self) -> bool:
        """After a refused renewal: an earlier one of ours may have been stored unheard."""
        try:
            entry = await self._bucket.read(self._key)
        except (BusTimeoutError, BusUnavailableError):
            return True  # not known; the right runs out by itself
        if entry is not None and self._record(entry).holder == self._holder:
            self._revision = entry.revision
            return True
        self._lose("somebody else took it")
        return False

    def _lose(self, why: str) -> None:
        self._log.warning("lock lost", reason=why, token=self.token)
        self._holder = None
        self.lost.set()

    async def release(self) -> None:
        """Give it back; others learn of it at once. If the server can't be reached it lapses."""
        holder, self._holder = self._holder, None
        self._until = 0.0
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
        if holder is None:
            return
        try:
            free = LockRecord(token=self.token, ttl_s=self.ttl_s)
            try:
                await self._bucket.replace(self._key, encode(free), expected=self._revision)
            except StaleRevisionError:
                # A renewal may have been stored after we stopped listening.
                entry = await self._bucket.read(self._key)
                if entry is not None and self._record(entry).holder == holder:
                    await self._bucket.replace(self._key, encode(free), expected=entry.revision)
        except (StaleRevisionError, BusTimeoutError, BusUnavailableError) as error:
            self._log.info("lock not given back; it lapses", error=str(error))

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.release()


def lock(connection: Connection, name: str, *, ttl_s: float = 10.0, owner: str = "") -> Lock:
    """A contender for the lock *name*.

    Args:
        ttl_s: how long others wait after the last sign of a holder that died.
        owner: who we are, for people who ask who holds it.

    Raises:
        ConfigError: the name or `ttl_s` is not allowed.

    Example:
        >>> async with lock(cluster, "nightly-report") as held:
        ...     await store(report, token=held.check())
    """
    return Lock(connection, name, ttl_s=ttl_s, owner=owner)
