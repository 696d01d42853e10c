"""`barrier`: parties wait for each other, again and again; a generation ends for all or breaks for all.

There is no coordinator. Who has arrived is one record; the arrival that completes it
ends the generation in the same write, and whoever sees its time pass breaks it.
In a crowd each party first says aloud that it comes, waits a moment, and then writes down all that it has
heard of, unless another one was faster: so a hundred arrivals are a few writes, not a hundred that
are in each other's way. What was said and not written counts for nothing.

Guaranteed: of one generation either every party that asks learns that it ended, or every one
that it broke, with who was missing; it ends only after all parties have arrived. The time is the
server's and the record's own, so it also passes for a generation all of whose waiters died: the
next that comes breaks it and begins the next one. To arrive again under the same party's
name counts once.

Not guaranteed: that a party which arrived still lives when the generation ends. An arrival
stands; only who is cancelled takes it back.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from secrets import token_hex

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.bus.wire import Message
from foundation_nats.coordination.cell import Cell, checked
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BarrierBrokenError,
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    FoundationError,
)
from foundation_schemas.coordination import BarrierRecord

_PARTIES_MAX = 500
_CROWD = 20
_PACE_S = 0.0005
"""Per party of a crowd: so long arrivals are gathered, and the record is not read by all at once."""
_GONE_MAX = 1000
_BROKEN_MAX = 64
_WITHDRAW_S = 1.0
_GRACE_S = 3.0
"""For the outcome, once the time has passed, where the server is just away."""


# ---- decisions ----------------------------------------------------------------------


def missing(record: BarrierRecord) -> list[str]:
    """Who has not arrived: names, or a number where they are not known."""
    if record.names is not None:
        return [name for name in record.names if name not in record.arrived]
    left = record.parties - len(record.arrived)
    return [f"{left} of {record.parties}"]


def lapsed(record: BarrierRecord, now: float) -> BarrierRecord:
    """*record*, with its generation broken if its time has passed."""
    if record.deadline is None or now < record.deadline:
        return record
    broken = {**record.broken, record.generation: missing(record)}
    forgotten = record.forgotten
    while len(broken) > _BROKEN_MAX:
        forgotten = min(broken)
        del broken[forgotten]
    return record.model_copy(
        update={
            "generation": record.generation + 1,
            "arrived": {},
            "deadline": None,
            "last": sorted(record.arrived.values()),
            "gone": [],
            "broken": broken,
            "forgotten": forgotten,
        }
    )


def arrived(
    record: BarrierRecord, party: str, token: str, now: float, timeout: float
) -> BarrierRecord:
    """*record* with *party* in its present generation, which ends if it was the last."""
    there = {**record.arrived, party: token}
    if len(there) >= record.parties:
        return record.model_copy(
            update={
                "generation": record.generation + 1,
                "arrived": {},
                "deadline": None,
                "last": sorted(there.values()),
                "gone": [],
            }
        )
    until = now + timeout
    deadline = until if record.deadline is None else min(record.deadline, until)
    return record.model_copy(update={"arrived": there, "deadline": deadline})


@dataclass(frozen=True, slots=True)
class Coming:
    """Somebody who has said that it comes."""

    party: str
    token: str
    generation: int
    until: float
    """After it, by the server's clock, the generation is to break."""


def read_coming(data: bytes) -> Coming | None:
    """Such a message; None: it is none."""
    try:
        body = orjson.loads(data)
        return Coming(
            str(body["party"]), str(body["token"]), int(body["generation"]), float(body["until"])
        )
    except (ValueError, KeyError, TypeError):
        return None


def gathered(record: BarrierRecord, coming: Iterable[Coming], now: float) -> BarrierRecord:
    """*record* with those who come to its present generation, until it is complete."""
    generation = record.generation
    for one in coming:
        if record.generation != generation:
            break
        if (
            one.generation == generation
            and one.party not in record.arrived
            and one.token not in record.gone
            and one.until > now
            and (record.names is None or one.party in record.names)
        ):
            record = arrived(record, one.party, one.token, now, one.until - now)
    return record


def was_in(record: BarrierRecord, generation: int, token: str) -> bool:
    """Whether the arrival *token*, which may be stored, was in *generation*, which is over."""
    if record.generation == generation + 1 and generation not in record.broken:
        return token in record.last
    return record.generation > generation


def left(record: BarrierRecord, generation: int, party: str, token: str) -> BarrierRecord | None:
    """*record* without the arrival *token*, which nobody may add any more; None: it is over, or done."""
    if record.generation != generation or token in record.gone:
        return None
    gone = [*record.gone, token][-_GONE_MAX:]
    if record.arrived.get(party) != token:
        return record.model_copy(update={"gone": gone})
    there = {name: value for name, value in record.arrived.items() if name != party}
    deadline = record.deadline if there else None
    return record.model_copy(update={"arrived": there, "deadline": deadline, "gone": gone})


# ---- the barrier --------------------------------------------------------------------


class Barrier:
    """One party's handle; `wait` once per generation."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        parties: int | Sequence[str],
        *,
        party: str | None,
        timeout: float,
    ) -> None:
        self.name = checked("barrier", name)
        self.names = None if isinstance(parties, int) else sorted(set(parties))
        self.parties = parties if isinstance(parties, int) else len(sorted(set(parties)))
        if isinstance(parties, str) or not 1 <= self.parties <= _PARTIES_MAX:
            raise ConfigError(
                f"The barrier {name} needs 1 to {_PARTIES_MAX} parties, got {parties!r}."
            )
        if self.names is not None and party not in self.names:
            raise ConfigError(
                f"{party!r} is none of the barrier's parties: {', '.join(self.names)}.",
                hint="Say who you are: party=…",
            )
        self.party = party or f"{connection.bus.name}-{token_hex(4)}"
        self.timeout = timeout
        self._bus = connection.bus
        self._subject = connection.subjects.barrier(name)
        self._pace_s = self.parties * _PACE_S if self.parties >= _CROWD else 0.0
        self._cell = Cell(connection, f"barrier_{name}", BarrierRecord, pace_s=self._pace_s)

    async def wait(self, *, timeout: float | None = None, generation: int | None = None) -> int:
        """Arrive, and wait until all have; returns the generation that ended.

        Args:
            timeout: after so long the generation breaks, for everyone, unless another's time
                is over sooner.
            generation: which one is meant, for a party that does not know whether it had arrived
                before it died: one that is over is not arrived at again, its outcome is told.

        Cancellation: the arrival is taken back (where the server can be reached within a second),
        so the generation breaks at its time unless the party comes again.

        Raises:
            BarrierBrokenError: the generation broke; `details` has ``generation`` and ``missing``.
            ConfigError: others use it with other parties, or *generation* has not begun.
            BusUnavailableError: not arrived.
            BusTimeoutError: the outcome is unknown: `wait` again with the generation in `details`.
        """
        limit = self.timeout if timeout is None else timeout
        if limit <= 0:
            raise ConfigError(f"A barrier's timeout is positive, got {limit:g}.")
        until = monotonic() + limit
        token = token_hex(8)
        mine: int | None = None
        is_in = False
        said: int | None = None
        coming: dict[str, Coming] = {}

        def on_coming(message: Message) -> None:
            one = read_coming(message.data)
            if one is not None and one.token != token and len(coming) < _PARTIES_MAX:
                coming[one.party] = one

        def arrive(record: BarrierRecord | None) -> BarrierRecord | None:
            nonlocal mine
            record = lapsed(self._fitting(record), now())
            if mine is not None and cell.unsure and was_in(record, mine, token):
                return None  # our own write, whose answer was lost
            if said is not None and self._is_counted(record, said, token):
                mine = said
                return None  # by somebody who has heard of us
            if generation is not None and generation != record.generation:
                if generation > record.generation:
                    raise ConfigError(
                        f"The barrier {self.name} is at generation {record.generation}; "
                        f"{generation} has not begun."
                    )
                mine = generation
                return None
            mine = record.generation
            before = now()
            after = arrived(record, self.party, token, before, limit)
            return after if after.generation > mine else gathered(after, coming.values(), before)

        offset = 0.0

        def now() -> float:
            return monotonic() + offset

        async with self._cell as cell:
            offset = await cell.now(until) - monotonic()
            route = self._bus.subscribe(self._subject, on_coming) if self._pace_s else None
            try:
                if route is not None and generation is None:
                    said = await self._say(cell, token, until, offset, limit)
                await cell.change(arrive, until)
                assert mine is not None
                is_in = True
                return await self._outcome(cell, mine, until, offset)
            except (BusTimeoutError, BusUnavailableError) as error:
                if mine is None or not (is_in or isinstance(error, BusTimeoutError)):
                    raise
                raise BusTimeoutError(
                    f"It is not known how generation {mine} of the barrier {self.name} ended.",
                    hint=f"Wait again with generation={mine}.",
                    generation=mine,
                ) from error
            except asyncio.CancelledError:
                await self._withdraw(cell, said if mine is None else mine, token)
                raise
            finally:
                if route is not None:
                    self._bus.unsubscribe(route)

    async def _say(
        self, cell: Cell[BarrierRecord], token: str, until: float, offset: float, limit: float
    ) -> int | None:
        """Say that we come, and wait until we are counted, or a moment; the generation that was meant."""
        now = monotonic() + offset
        record = lapsed(self._fitting(await cell.read(until)), now)
        said = record.generation
        body = {
            "party": self.party,
            "token": token,
            "generation": said,
            "until": now + limit,
        }
        try:
            self._bus.publish(self._subject, orjson.dumps(body))
        except BusError:
            return None  # then we write it down ourselves
        await asyncio.sleep(random.uniform(self._pace_s / 2, 2 * self._pace_s))
        return said

    def _is_counted(self, record: BarrierRecord, said: int, token: str) -> bool:
        """Whether another has written down that we came to the generation *said*.

        Raises:
            BusTimeoutError: that can't be known any more.
        """
        if record.generation == said:
            return record.arrived.get(self.party) == token
        if record.generation == said + 1:
            return token in record.last
        raise BusTimeoutError(f"The barrier {self.name} has gone on without us.")

    async def _outcome(
        self, cell: Cell[BarrierRecord], mine: int, until: float, offset: float
    ) -> int:
        patience = until + _GRACE_S
        while True:
            record = await cell.read(patience)
            if record is None:
                raise BusTimeoutError(f"The record of the barrier {self.name} is gone.")
            if record.generation > mine:
                return self._ended(record, mine)
            now = monotonic() + offset
            if record.deadline is not None and now >= record.deadline:

                def give_up(record: BarrierRecord | None) -> BarrierRecord | None:
                    if record is None or record.generation != mine:
                        return None
                    after = lapsed(record, monotonic() + offset)
                    return None if after is record else after

                await cell.change(give_up, patience)
                continue
            await cell.wait(
                until - monotonic() if record.deadline is None else record.deadline - now
            )

    def _ended(self, record: BarrierRecord, mine: int) -> int:
        if mine in record.broken:
            who = record.broken[mine]
            raise BarrierBrokenError(
                f"Generation {mine} of the barrier {self.name} broke: "
                f"missing {', '.join(who) or 'nobody'}.",
                hint="Those that wait again form the next generation.",
                generation=mine,
                missing=who,
            )
        if mine <= record.forgotten:
            raise BarrierBrokenError(
                f"Generation {mine} of the barrier {self.name} is too long ago to be known.",
                generation=mine,
                missing=[],
            )
        return mine

    def _fitting(self, record: BarrierRecord | None) -> BarrierRecord:
        if record is None:
            return BarrierRecord(parties=self.parties, names=self.names)
        if (record.parties, record.names) == (self.parties, self.names):
            return record
        if record.arrived:
            theirs = record.parties if record.names is None else ", ".join(record.names)
            ours = self.parties if self.names is None else ", ".join(self.names)
            raise ConfigError(
                f"The barrier {self.name} is waited at by the parties {theirs}, not {ours}.",
                hint="All its users must agree on them.",
            )
        return record.model_copy(update={"parties": self.parties, "names": self.names})

    async def _withdraw(self, cell: Cell[BarrierRecord], mine: int | None, token: str) -> None:
        if mine is None:
            return
        try:
            async with asyncio.timeout(_WITHDRAW_S):
                await cell.change(
                    lambda record: (
                        None if record is None else left(record, mine, self.party, token)
                    ),
                    monotonic() + _WITHDRAW_S,
                )
        except (TimeoutError, FoundationError):
            return  # the arrival stands; the generation's time is recorded


def barrier(
    connection: Connection,
    name: str,
    parties: int | Sequence[str],
    *,
    party: str | None = None,
    timeout: float = 60.0,
) -> Barrier:
    """A party of the barrier *name*, which *parties* (a number, or names) wait at.

    Args:
        party: who we are; needed where *parties* are names. Two that use one name count once.
        timeout: how long a generation may take from our arrival on.

    Raises:
        ConfigError: a name or number is not allowed.

    Example:
        >>> phase = barrier(cluster, "phase", ["a", "b"], party="a")
        >>> await phase.wait()
        1
    """
    return Barrier(connection, name, parties, party=party, timeout=timeout)


__all__ = ["Barrier", "barrier"]
