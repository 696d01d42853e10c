"""`semaphore`: at most N holders at a time, all in one key by compare-and-set, each with a fencing token.

Guaranteed: tokens strictly grow from acquisition to acquisition. While the
holders' processes run and their `Permit.is_valid` says yes, there are at most N
of them: a right counts from before the write that gave it on the holder's own
clock, and others wait its full length from when they saw its last sign of life,
on theirs.

Not guaranteed: that a holder which was frozen knows in time that its right is
over (see `lock`); that waiters are served in order. Every renewal writes the one
key: meant for tens of holders, not for thousands.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from secrets import token_hex
from types import TracebackType
from typing import Self

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.wire import Message
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    LockLostError,
    LockTimeoutError,
    StaleRevisionError,
)
from foundation_schemas import PermitRecord, SemaphoreRecord
from foundation_schemas.base import check_name

_TTL_MIN_S = 1.0
_DRIFT = 0.05
_POLL_S = 1.0
_RETRY_S = 0.1
_PERMITS_MAX = 1000


class Semaphore:
    """One contender for one of the permits; enter it, or `acquire` and `release`.

    An object is used by one task at a time, and may be used again after `release`.
    """

    def __init__(
        self, connection: Connection, name: str, permits: int, *, ttl_s: float, owner: str
    ) -> None:
        try:
            self.name = check_name(name)
        except ValueError as error:
            raise ConfigError(f"semaphore {name!r}: {error}") from error
        if not 1 <= permits <= _PERMITS_MAX:
            raise ConfigError(f"A semaphore has 1 to {_PERMITS_MAX} permits, got {permits}.")
        if ttl_s < _TTL_MIN_S:
            raise ConfigError(f"A semaphore's ttl_s is at least {_TTL_MIN_S:g} s, got {ttl_s:g}.")
        self.permits = permits
        self.ttl_s = ttl_s
        self.token = 0
        """The fencing token of the present (or last) holding."""
        self.lost = asyncio.Event()
        """Set when the right ended without `release`."""
        self._owner = owner
        self._bus = connection.bus
        self._bucket = Bucket(connection.bus, connection.subjects, "coordination")
        self._key = f"semaphore_{name}"
        self._holder: str | None = None
        self._until = 0.0
        self._signs: dict[str, tuple[int, float]] = {}
        """The last beat seen of each holder, and when on our clock."""
        self._renewing: asyncio.Task[None] | None = None
        self._log = get_logger("semaphore").bind(semaphore=name)

    # ---- holding ----------------------------------------------------------------

    def is_valid(self) -> bool:
        """Whether the permit is ours now; after a pause of this process: checked anew."""
        return self._holder is not None and monotonic() < self._until

    def check(self) -> int:
        """The token.

        Raises:
            LockLostError: the right is over.
        """
        if not self.is_valid():
            raise LockLostError(
                f"A permit of the semaphore {self.name} is not held any more.",
                hint="Stop what it protected; acquire one again.",
            )
        return self.token

    async def acquire(self, *, timeout: float = 10.0) -> int:
        """Wait until a permit is ours; returns the fencing token.

        Cancellation: if a permit was just won it lapses after `ttl_s`.

        Raises:
            LockTimeoutError: others held all permits all the time; names them.
            ConfigError: the semaphore exists with another number of permits.
            BusUnavailableError: the server was not reachable within *timeout*.
        """
        if self._holder is not None:
            raise RuntimeError("this Semaphore is held already: use one object per holder")
        deadline = monotonic() + timeout
        changed = asyncio.Event()

        def on_change(_message: Message) -> None:
            changed.set()

        route = self._bus.subscribe(self._bucket.subject(self._key), on_change)
        holder = f"{self._owner}-{token_hex(8)}"
        unreachable: BusError | None = None
        unsure_since: float | None = None
        record = SemaphoreRecord(permits=self.permits)
        try:
            while (left := deadline - monotonic()) > 0:
                changed.clear()
                wait = _RETRY_S
                try:
                    entry = await self._bucket.read(self._key)
                    record, unreachable = self._record(entry), None
                    revision = 0 if entry is None else entry.revision
                    mine = next((p for p in record.holders if p.holder == holder), None)
                    if mine is not None:
                        # Our own write, whose answer was lost.
                        assert unsure_since is not None
                        self._begin(mine, unsure_since)
                        return self.token
                    alive, wait = self._alive(record)
                    if len(alive) < self.permits:
                        sent = monotonic()
                        permit = PermitRecord(
                            holder=holder,
                            owner=self._owner,
                            token=max(record.token, revision) + 1,
                            ttl_s=self.ttl_s,
                            since=utc_text(),
                        )
                        after = SemaphoreRecord(
                            permits=self.permits, holders=[*alive, permit], token=permit.token
                        )
                        try:
                            await self._bucket.replace(self._key, encode(after), expected=revision)
                        except StaleRevisionError:
                            await asyncio.sleep(random.uniform(0, 0.02))
                            continue
                        except BusTimeoutError:
                            unsure_since = unsure_since or sent
                            raise
                        self._begin(permit, sent)
                        return self.token
                except (BusTimeoutError, BusUnavailableError) as error:
                    unreachable = error
                    wait = _RETRY_S
                with contextlib.suppress(TimeoutError):
                    pause = min(wait, left, _POLL_S * random.uniform(0.5, 1.0))
                    async with asyncio.timeout(max(0.001, pause)):
                        await changed.wait()
        finally:
            self._bus.unsubscribe(route)
        if unreachable is not None:
            raise unreachable
        owners = ", ".join(p.owner or p.holder for p in record.holders[:5])
        raise LockTimeoutError(
            f"All {self.permits} permits of {self.name} were held for all of {timeout:g} s"
            f"{f' (by {owners})' if owners else ''}.",
            hint="Wait longer, or find out what the holders do.",
        )

    def _record(self, entry: Entry | None) -> SemaphoreRecord:
        if entry is None or entry.value is None:
            return SemaphoreRecord(permits=self.permits)
        record = decode(SemaphoreRecord, entry.value)
        if record.permits != self.permits:
            raise ConfigError(
                f"The semaphore {self.name} has {record.permits} permits, not {self.permits}.",
                hint="All its users must agree on their number.",
            )
        return record

    def _alive(self, record: SemaphoreRecord) -> tuple[list[PermitRecord], float]:
        """Whose right may not be over, and how long until the next of them could be."""
        now = monotonic()
        signs: dict[str, tuple[int, float]] = {}
        for permit in record.holders:
            beat, at = self._signs.get(permit.holder, (-1, now))
            signs[permit.holder] = (permit.beat, at if beat == permit.beat else now)
        self._signs = signs
        left = {p.holder: signs[p.holder][1] + p.ttl_s - now for p in record.holders}
        alive = [permit for permit in record.holders if left[permit.holder] > 0]
        return alive, min((left[permit.holder] for permit in alive), default=_POLL_S)

    def _begin(self, permit: PermitRecord, sent: float) -> None:
        self._holder, self.token = permit.holder, permit.token
        self._until = sent + self.ttl_s * (1 - _DRIFT)
        self.lost.clear()
        self._renewing = asyncio.create_task(self._renew(), name=f"semaphore.{self.name}")

    # ---- renewing -----------------------------------------------------------------

    async def _rewrite(
        self, holder: str, change: Callable[[PermitRecord], PermitRecord | None]
    ) -> bool:
        """Change our own entry; False: it is not there any more.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        while True:
            entry = await self._bucket.read(self._key)
            record = self._record(entry)
            mine = next((p for p in record.holders if p.holder == holder), None)
            if entry is None or mine is None:
                return False
            new = change(mine)
            rest = [p for p in record.holders if p.holder != holder]
            holders = rest if new is None else [*rest, new]
            after = record.model_copy(update={"holders": holders})
            try:
                await self._bucket.replace(self._key, encode(after), expected=entry.revision)
            except StaleRevisionError:
                await asyncio.sleep(random.uniform(0, 0.02))
            else:
                return True

    async def _renew(self) -> None:
        while (holder := self._holder) is not None:
            await asyncio.sleep(self.ttl_s / 3)
            while self._holder is not None:
                left = self._until - monotonic()
                if left <= 0:
                    self._lose("it could not be renewed in time")
                    return
                sent = monotonic()
                try:
                    async with asyncio.timeout(left):
                        is_mine = await self._rewrite(
                            holder, lambda p: p.model_copy(update={"beat": p.beat + 1})
                        )
                except (TimeoutError, BusTimeoutError, BusUnavailableError):
                    await asyncio.sleep(min(_RETRY_S, self.ttl_s / 20))
                    continue
                except ConfigError as error:
                    self._lose(str(error))
                    return
                if not is_mine:
                    self._lose("somebody else took it")
                    return
                self._until = sent + self.ttl_s * (1 - _DRIFT)
                break

    def _lose(self, why: str) -> None:
        self._log.warning("permit lost", reason=why, token=self.token)
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
            async with asyncio.timeout(self.ttl_s):
                await self._rewrite(holder, lambda _: None)
        except (TimeoutError, BusTimeoutError, BusUnavailableError) as error:
            self._log.info("permit not given back; it lapses", error=str(error))

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


def semaphore(
    connection: Connection, name: str, permits: int, *, ttl_s: float = 10.0, owner: str = ""
) -> Semaphore:
    """A contender for one of the *permits* of the semaphore *name*.

    Args:
        ttl_s: how long others wait after the last sign of a holder that died.
        owner: who we are, for people who ask who holds it.

    Raises:
        ConfigError: the name, `permits` or `ttl_s` is not allowed.

    Example:
        >>> async with semaphore(cluster, "gpu", 4) as permit:
        ...     await train(token=permit.check())
    """
    return Semaphore(connection, name, permits, ttl_s=ttl_s, owner=owner)
