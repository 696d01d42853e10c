"""`election`: one leader among any number of campaigners, with a term that is its fencing token.

Drives the pure `Candidate` (the machine that elects the cluster's own leader)
over a key of the bucket ``coordination``.

Guaranteed: terms strictly grow, and no two tenures have the same. While the
leader's process runs and `Election.is_leader` says yes, nobody else leads: a
tenure counts from before the write that gave it on the leader's own clock and
ends by itself after two thirds of `ttl_s`; others take over `ttl_s` after they
last saw the key change, on theirs.

Not guaranteed: that a leader which was frozen between `check` and what it does
next knows that it was replaced. What must not happen twice hands the term to
the resource, and the resource refuses lower ones.

The key is never deleted, and every acquisition writes a higher term over the
very record that it has read: so terms grow for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any, Literal, Self

from foundation_nats.base.clock import monotonic, utc_text, wall_ms
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.events import Events
from foundation_nats.consensus.candidate import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Candidate,
    Effect,
    Event,
    LeaseSeen,
    LeaseVacant,
    LostLeadership,
    ReadLease,
    Release,
    Renew,
    RenewResult,
    Resign,
    Tick,
)
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    FoundationError,
    LockLostError,
    LockTimeoutError,
    StaleRevisionError,
)
from foundation_schemas import ElectionRecord
from foundation_schemas.base import check_name

_TTL_MIN_S = 2.0
_POLL_S = 1.0
_TIMER_MAX_S = 1.0
_RELEASE_TIMEOUT_S = 2.0


class Election:
    """One campaigner; enter it to lead, or `campaign` and `resign`. It may also only `observe`.

    An object is used by one task at a time. A tenure that is lost is over: `campaign`
    again, on the same object, for another one with another term.
    """

    def __init__(
        self, connection: Connection, name: str, *, candidate: str, ttl_s: float, value: str
    ) -> None:
        try:
            self.name = check_name(name)
            self.candidate = check_name(candidate)
        except ValueError as error:
            raise ConfigError(f"election {name!r} of {candidate!r}: {error}") from error
        if ttl_s < _TTL_MIN_S:
            raise ConfigError(f"An election's ttl_s is at least {_TTL_MIN_S:g} s, got {ttl_s:g}.")
        self.ttl_s = ttl_s
        self.value = value
        self.lost = asyncio.Event()
        """Set when a tenure ended without `resign`."""
        self.token = 0
        """The term of the present (or last) tenure: the fencing token."""
        self._bus = connection.bus
        self._events = Events(connection.bus, connection.subjects, connection.bus.name)
        self._bucket = Bucket(connection.bus, connection.subjects, "coordination")
        self._key = f"election_{name}"
        self._machine: Candidate | None = None
        self._since = ""
        self._scope: TaskScope | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._elected = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._revision = 0
        self._last: ElectionRecord | None = None
        self._log = get_logger("election").bind(election=name, candidate=candidate)

    # ---- leading ----------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether nobody else can lead now; after a pause of this process: checked anew."""
        machine = self._machine
        if machine is None or not machine.is_leader:
            return False
        return monotonic() < machine.renewed_at + machine.stop_after_s

    def check(self) -> int:
        """The term, to be handed to whatever must not be done by two.

        Raises:
            LockLostError: the tenure is over.
        """
        if not self.is_leader:
            raise LockLostError(
                f"{self.candidate} does not lead {self.name} any more.",
                hint="Stop what only the leader may do; campaign again.",
            )
        return self.token

    async def campaign(self, *, timeout: float | None = None) -> int:
        """Wait until elected; returns the term.

        Cancellation: the candidacy ends; if it was just won, it is given back or lapses.

        Raises:
            LockTimeoutError: somebody else led for all of *timeout*; names who.
            BusUnavailableError: the server was not reachable all the time.
        """
        if self._scope is not None:
            raise RuntimeError("this Election campaigns already: use one object per candidate")
        await self._ended()
        self._machine = Candidate(
            me=self.candidate,
            incarnation=wall_ms() * 1000 + random.randrange(1000),
            ttl_s=self.ttl_s,
            renew_every_s=self.ttl_s / 6,
            stop_after_s=self.ttl_s * 2 / 3,
        )
        self.lost.clear()
        self._elected.clear()
        self._revision = 0
        self._scope = TaskScope(f"election.{self.name}")
        self._scope.start(self._look(), "look")
        try:
            async with asyncio.timeout(timeout):
                await self._elected.wait()
        except TimeoutError:
            last = self._last
            await self._end()
            if last is None:
                raise BusUnavailableError(
                    f"The election {self.name} could not be read within {timeout:g} s."
                ) from None
            who = f" by {last.leader}" if last.leader else ""
            raise LockTimeoutError(
                f"{self.name} was led{who} for all of {timeout:g} s.",
                hint="Wait longer, or find out what its leader does.",
            ) from None
        except BaseException:
            await self._end()
            raise
        return self.token

    async def resign(self) -> None:
        """Lead no more and be no candidate; others learn of it at once. Idempotent."""
        await self._end()
        await self._ended()

    async def _ended(self) -> None:
        """Wait for the end of a tenure that was lost."""
        ending, self._ending = self._ending, None
        if ending is not None:
            await ending

    async def _end(self) -> None:
        scope, self._scope = self._scope, None
        if scope is None:
            return
        machine = self._machine
        assert machine is not None
        released = [e for e in machine.step(Resign(), monotonic()) if isinstance(e, Release)]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await scope.close()
        for effect in released:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self._give_back(machine, effect.expected_revision, effect.term)

    async def __aenter__(self) -> Self:
        await self.campaign()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.resign()

    # ---- observing ----------------------------------------------------------------

    async def leader(self) -> ElectionRecord | None:
        """Who was last elected and has not resigned; it may have died since.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        record = _record(await self._bucket.read(self._key))
        return record if record.leader is not None else None

    async def observe(self) -> AsyncIterator[ElectionRecord | None]:
        """The leader now, then each change; None: nobody. Iterate until you have seen enough.

        A tenure shorter than a round trip may go unseen. While the server can't be
        reached nothing is reported.
        """
        changed = asyncio.Event()

        def on_change(_message: Message) -> None:
            changed.set()

        route = self._bus.subscribe(self._bucket.subject(self._key), on_change)
        seen: tuple[str | None, int] | None = None
        try:
            while True:
                changed.clear()
                with contextlib.suppress(BusTimeoutError, BusUnavailableError):
                    record = _record(await self._bucket.read(self._key))
                    if (record.leader, record.term) != seen:
                        seen = (record.leader, record.term)
                        yield record if record.leader is not None else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S * random.uniform(0.5, 1.0)):
                        await changed.wait()
        finally:
            self._bus.unsubscribe(route)

    # ---- driving the candidate ----------------------------------------------------

    async def _look(self) -> None:
        """Read the key whenever somebody writes it, and now and then."""

        def on_change(_message: Message) -> None:
            self._changed.set()

        route = self._bus.subscribe(self._bucket.subject(self._key), on_change)
        try:
            while True:
                self._changed.clear()
                await self._read()
                with contextlib.suppress(TimeoutError):
                    pause = min(_POLL_S, self.ttl_s / 4) * random.uniform(0.5, 1.0)
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
        finally:
            self._bus.unsubscribe(route)

    async def _read(self) -> None:
        try:
            entry = await self._bucket.read(self._key)
            record = _record(entry)
        except FoundationError as error:
            self._log.info("election not read", error=str(error))
            return
        self._see(record, 0 if entry is None else entry.revision)

    def _see(self, record: ElectionRecord, revision: int) -> None:
        if revision < self._revision:
            return
        self._revision, self._last = revision, record
        if record.leader is None:
            self._step(LeaseVacant(revision))
        else:
            self._step(LeaseSeen(record.leader, record.incarnation, record.term, revision))

    def _step(self, event: Event) -> None:
        if self._scope is None or self._machine is None:
            return
        machine = self._machine
        for effect in machine.step(event, monotonic()):
            if isinstance(effect, LostLeadership):
                # No second tenure behind the back of whoever still works for the first.
                self._lose(effect.term, effect.reason)
                return
            self._perform(machine, effect)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = machine.deadline()
        if due is not None:
            # The loop's clock stops while the machine sleeps and ours doesn't: never sleep long.
            delay = min(max(0.0, due - monotonic()), _TIMER_MAX_S)
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._step(Tick())

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self._scope is not None
        self._scope.start(work, name)

    def _perform(self, machine: Candidate, effect: Effect) -> None:
        match effect:
            case Acquire(attempt, expected, term):
                self._start(self._acquire(machine, attempt, expected, term), "acquire")
            case Renew(attempt, expected, term):
                self._start(self._renew(machine, attempt, expected, term), "renew")
            case Release():
                raise AssertionError("only a candidate that has resigned releases")
            case ReadLease():
                self._start(self._read(), "read")
            case BecameLeader(term):
                self.token = term
                self._log.info("elected", term=term)
                self._elected.set()
                self._emit("elected", f"{self.candidate} leads {self.name} in term {term}.", term)
            case LostLeadership():
                raise AssertionError("handled by the caller")

    def _lose(self, term: int, reason: str) -> None:
        self._log.warning("no longer the leader", term=term, reason=reason)
        self.lost.set()
        self._emit("lost", f"{self.candidate} no longer leads {self.name}: {reason}.", term)
        self._ending = asyncio.create_task(self._end(), name=f"election.{self.name}.end")

    def _emit(self, what: str, message: str, term: int) -> None:
        self._events.emit(
            "election", what, message, election=self.name, candidate=self.candidate, term=term
        )

    def _mine(self, machine: Candidate, term: int) -> ElectionRecord:
        return ElectionRecord(
            leader=machine.me,
            incarnation=machine.incarnation,
            term=term,
            ttl_s=self.ttl_s,
            value=self.value,
            since=self._since,
        )

    async def _acquire(self, machine: Candidate, attempt: int, expected: int, term: int) -> None:
        ok: bool | None
        revision = 0
        self._since = utc_text()
        try:
            revision = await self._write(self._mine(machine, term), expected)
            ok = True
        except StaleRevisionError:
            ok = False
        except FoundationError as error:
            self._log.info("election not won", error=str(error))
            ok = None if error.outcome == "unknown" else False
        self._step(AcquireResult(attempt, ok, term, revision))

    async def _renew(self, machine: Candidate, attempt: int, expected: int, term: int) -> None:
        revision = expected
        outcome: Literal["ok", "lost", "unknown"]
        try:
            revision = await self._write(self._mine(machine, term), expected)
            outcome = "ok"
        except StaleRevisionError:
            outcome = await self._lost_or_not(machine, term)
        except FoundationError as error:
            self._log.warning("tenure not renewed", error=str(error))
            outcome = "unknown"
        self._step(RenewResult(attempt, outcome, revision))

    async def _lost_or_not(self, machine: Candidate, term: int) -> Literal["lost", "unknown"]:
        """An earlier renewal whose answer was lost also makes this one stale: look whose it is."""
        try:
            entry = await self._bucket.read(self._key)
            record = _record(entry)
        except FoundationError:
            return "unknown"
        if entry is not None and (record.incarnation, record.term) == (machine.incarnation, term):
            self._see(record, entry.revision)
            return "unknown"
        return "lost"

    async def _write(self, record: ElectionRecord, expected: int) -> int:
        revision = await self._bucket.replace(self._key, encode(record), expected=expected)
        if revision > self._revision:
            self._revision, self._last = revision, record
        return revision

    async def _give_back(self, machine: Candidate, expected: int, term: int) -> None:
        free = ElectionRecord(term=term, ttl_s=self.ttl_s)
        try:
            try:
                await self._bucket.replace(self._key, encode(free), expected=expected)
            except StaleRevisionError:
                # A renewal may have been stored after we stopped listening.
                entry = await self._bucket.read(self._key)
                if entry is not None and _record(entry).incarnation == machine.incarnation:
                    await self._bucket.replace(self._key, encode(free), expected=entry.revision)
        except FoundationError as error:
            self._log.info("tenure not given back; it lapses", term=term, error=str(error))


def _record(entry: Entry | None) -> ElectionRecord:
    if entry is None or entry.value is None:
        return ElectionRecord()
    return decode(ElectionRecord, entry.value)


def election(
    connection: Connection,
    name: str,
    *,
    candidate: str | None = None,
    ttl_s: float = 15.0,
    value: str = "",
) -> Election:
    """A campaigner, or observer, of the election *name*.

    Args:
        candidate: who we are, for others to see; the connection's name unless given.
        ttl_s: how long others wait after the last sign of a leader that died.
        value: what the leader wants others to know, such as its address.

    Raises:
        ConfigError: a name or `ttl_s` is not allowed.

    Example:
        >>> async with election(cluster, "billing", candidate="node-1") as leader:
        ...     while leader.is_leader:
        ...         await bill_one(token=leader.check())
    """
    name_of_us = connection.bus.name if candidate is None else candidate
    return Election(connection, name, candidate=name_of_us, ttl_s=ttl_s, value=value)
