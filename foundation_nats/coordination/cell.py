"""`Cell`: one record under one key, changed by compare-and-set, watched, and timed by the server's clock.

What barriers, votes, auctions and sagas are made of: whoever looks may make the next
change, so there is nobody whose loss would stop them.

Guaranteed: changes of a record come one after the other, each made upon the one before;
a write whose outcome is unknown is looked for before anything is made anew. So a change must
leave the record as it is where it finds itself made already.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode, encode, to_json
from foundation_nats.bus.wire import Message, Route
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    ServerError,
    StaleRevisionError,
)
from foundation_nats.signaling.evidence import parse_time
from foundation_schemas.base import WireModel, check_name

M = TypeVar("M", bound=WireModel)

KEEP_S = 7 * 24 * 3600.0
"""How long a recorded result stays."""
POLL_S = 1.0
"""How often is looked, even if nothing is heard of a change."""
_RETRY_S = 0.1
_JITTER_S = 0.02
_JITTER_MAX_S = 0.2


def checked(what: str, name: str) -> str:
    """*name*, if it may be part of a key.

    Raises:
        ConfigError: it may not.
    """
    try:
        return check_name(name)
    except ValueError as error:
        raise ConfigError(f"{what} {name!r}: {error}") from error


def as_json(value: Any, what: str) -> Any:
    """*value* as it is once it was stored: so that equal ones are equal.

    Raises:
        ConfigError: it is not JSON.
    """
    try:
        return orjson.loads(to_json(value))
    except TypeError as error:
        raise ConfigError(f"{what}: {error}.") from error


class Cell(Generic[M]):
    """The record under *key*; enter it to hear of changes."""

    def __init__(
        self, connection: Connection, key: str, kind: type[M], *, pace_s: float = 0.0
    ) -> None:
        """After a change is heard of, it is read within *pace_s*: not by a crowd at once."""
        self._pace_s = pace_s
        self._bus = connection.bus
        self._bucket = Bucket(connection.bus, connection.subjects, "coordination")
        self._key = key
        self._kind = kind
        self._route: Route | None = None
        self.changed = asyncio.Event()
        """Set when there may be something new since the last reading."""
        self._offset: float | None = None
        self.unsure = False
        """Within `change`: an earlier write of it may be stored."""

    async def __aenter__(self) -> Self:
        self._route = self._bus.subscribe(self._bucket.subject(self._key), self._on_change)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._route is not None:
            self._bus.unsubscribe(self._route)

    def _on_change(self, _message: Message) -> None:
        self.changed.set()

    async def now(self, until: float) -> float:
        """Seconds by the server's clock; asked for once, then counted on ours.

        Raises:
            BusTimeoutError, BusUnavailableError: not known by *until* (`monotonic`).
        """
        while self._offset is None:
            try:
                # The answer was given before it arrived: we are behind rather than ahead.
                text = (await self._bucket.reader.info()).get("ts")
                if text is None:
                    raise ServerError("The server does not say what time it is.")
                self._offset = parse_time(text).timestamp() - monotonic()
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)
        return monotonic() + self._offset

    async def read(self, until: float) -> M | None:
        """The record, as the leader knows it.

        Raises:
            BusTimeoutError, BusUnavailableError: not readable by *until*.
        """
        return (await self._load(until))[0]

    async def _load(self, until: float) -> tuple[M | None, int]:
        while True:
            self.changed.clear()
            try:
                entry = await self._bucket.read(self._key)
                if entry is None:
                    return None, 0
                if entry.value is None:
                    return None, entry.revision
                return decode(self._kind, entry.value), entry.revision
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= until:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def change(
        self,
        make: Callable[[M | None], M | None],
        until: float,
        *,
        ttl_s: Callable[[M], float | None] = lambda _: None,
    ) -> M | None:
        """Replace the record by what *make* makes of it; None leaves it. Returns what it is then.

        *make* is called anew where another change came first, and may raise. *ttl_s* says how
        long the new record stays.

        Raises:
            BusTimeoutError: outcome unknown at *until*.
            BusUnavailableError: not changed by *until*.
        """
        unsure: BusTimeoutError | None = None
        self.unsure = False
        jitter = _JITTER_S
        while True:
            try:
                record, revision = await self._load(until)
            except BusUnavailableError:
                if unsure is not None:
                    raise unsure from None
                raise
            after = make(record)
            if after is None:
                return record
            try:
                await self._bucket.replace(
                    self._key, encode(after), expected=revision, ttl_s=ttl_s(after)
                )
                failpoint("cell.after_cas")
                return after
            except StaleRevisionError:
                await asyncio.sleep(random.uniform(0, jitter))
                jitter = min(jitter * 1.5, max(_JITTER_MAX_S, 2 * self._pace_s))
            except BusTimeoutError as error:
                unsure, self.unsure = error, True
                if monotonic() >= until:
                    raise
            except BusUnavailableError as error:
                if monotonic() + _RETRY_S >= until:
                    raise (unsure or error) from None
                await asyncio.sleep(_RETRY_S)

    async def wait(self, seconds: float) -> None:
        """Wait until something has changed since the last reading, at most *seconds*."""
        pause = max(0.001, min(seconds, POLL_S * random.uniform(0.5, 1.0)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self.changed.wait()
                if self._pace_s:
                    await asyncio.sleep(random.uniform(0, self._pace_s))


__all__ = ["KEEP_S", "POLL_S", "Cell", "as_json", "checked"]
