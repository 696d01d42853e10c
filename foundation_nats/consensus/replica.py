"""`Replica`: one process's copy of a replicated domain: proposes, follows, reads, snapshots, compacts.

Guaranteed, as long as `apply` is deterministic and nobody else writes to the stream:

- operations take effect in one order, the same in every replica; an accepted
  one was valid in the very state that it was applied to (the append names the
  revision it was validated at, and the server refuses it at any other);
- a proposal's id takes effect once, however often it is proposed by whomever,
  among the newest `Domain.ids_kept` entries and, beyond them, within 2 minutes;
- what `propose` returns as accepted or rejected is true and stays so, as long as the
  broker keeps what it acknowledged; what it does not know it says;
- a log that went back (a power cut under `sync_interval`, a restored backup) is noticed
  after the connection was lost with it, also where it has grown to the same length again;
- `read` sees everything that was accepted before it was called; with
  *barrier* also while a leader that was cut off still answers.

Not guaranteed: that `view` is new. It is never older than this process's own
accepted proposals, and lags behind others by a round trip, or up to
`_SWEEP_S` where a live copy was lost, or as long as there is no connection.

The live copy of an entry is only a hint; what is applied was read from the
stream, whose entries name the one before. See docs/consensus.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar
from uuid import uuid4

from pydantic import BaseModel

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.streams import PubAck, StoredMessage
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.events import Events
from foundation_nats.consensus.domain import (
    Applied,
    Domain,
    Machine,
    Misfit,
    Proposal,
    ProposalStatus,
    check_id,
)
from foundation_nats.consensus.log import Log
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    DecodeError,
    DomainBusyError,
    DomainError,
    DomainFullError,
    FoundationError,
    NotFoundError,
    StaleRevisionError,
)
from foundation_schemas import DomainEntry

S = TypeVar("S", bound=BaseModel)
O = TypeVar("O")  # noqa: E741  see domain.py
T = TypeVar("T")

_SWEEP_S = 5.0
"""The leader is asked this often whether a live copy was lost."""
_ATTEMPT_S = 2.0
_PAUSE_S = 0.01
_PAUSE_MAX_S = 0.2
_LAG_PAUSE_S = 0.02
_LAGGING_MAX = 100
_REMEMBERED_MAX = 1024
_SNAPSHOT_TRIES = 5
_REWOUND_AFTER_S = 15.0
"""Longer than a leader without its majority may answer: then a shorter log is the log."""
_SNAPSHOT_RETRY_ENTRIES = 50
_DUPLICATE_IN_FLIGHT = 10158

OnApplied = Callable[[Applied, Any], None]


class Replica(Generic[S, O]):
    """A domain as this process knows it; `open` it, and `close` it."""

    def __init__(
        self, bus: Bus, subjects: Subjects, domain: Domain[S, O], *, replicas: int = 1
    ) -> None:
        """
        Args:
            replicas: of the domain's stream, if it has to be created.

        Raises:
            ConfigError: the declaration is not complete.
        """
        self._bus = bus
        self._replicas = replicas
        self._machine = Machine(domain)
        self.name = self._machine.name
        self._log = Log(bus, subjects, self.name)
        self._events = Events(bus, subjects, bus.name)
        self._logger = get_logger("domain").bind(domain=self.name)
        self._scope: TaskScope | None = None
        self._hint = asyncio.Event()
        self._hinted = 0
        self._reading = asyncio.Lock()
        self._proposing = asyncio.Lock()
        self._moved = asyncio.Condition()
        self._failure: DomainError | None = None
        self._snapshot_at_entries = 0
        """How many entries the newest snapshot that we know of sums up."""
        self._snapshot_failed_at = -_SNAPSHOT_RETRY_ENTRIES
        self._snapshot_task: asyncio.Task[None] | None = None
        self._shorter_since: float | None = None
        self._rejected: OrderedDict[str, Proposal] = OrderedDict()
        self._doubts: OrderedDict[str, int] = OrderedDict()
        self._listeners: list[OnApplied] = []
        self._sweep_now = False
        self._cuts = 0
        """How often the connection was lost."""
        self._sure_of = 0
        """Of which of these times it is known that the log is still the one that we follow."""

    # ---- life -------------------------------------------------------------------

    async def open(self, *, timeout: float = 10.0) -> None:
        """Create the stream if need be, restore the newest snapshot, read the rest of the log.

        Raises:
            DomainError: the log is damaged, or of a newer version than this code.
            ServerError, BusTimeoutError, BusUnavailableError: not read within *timeout*.
        """
        deadline = monotonic() + timeout
        await _within(deadline, self._log.ensure(replicas=self._replicas))
        self._scope = TaskScope(f"domain.{self.name}")
        route = self._bus.subscribe(self._log.live, self._on_live)
        self._bus.on_disconnect(self._on_disconnect)
        self._bus.on_reconnect(self._on_reconnect)
        try:
            async with self._reading:
                await _within(deadline, self._restore())
            await _within(deadline, self._sync())
        except BaseException:
            self._bus.unsubscribe(route)
            raise
        self._route = route
        self._scope.start(self._pump(), "pump")

    async def close(self) -> None:
        """Follow no more. Idempotent."""
        if self._scope is not None:
            self._bus.unsubscribe(self._route)
            scope, self._scope = self._scope, None
            await scope.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._scope is None:
            raise RuntimeError(f"the replica of domain {self.name} is not open")

    # ---- reading ----------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The revision of the last entry applied here."""
        return self._machine.revision

    @property
    def view(self) -> S:
        """The state as this process knows it, without asking anybody: a copy unless `pure`.

        Raises:
            DomainError: this replica has stopped.
        """
        self._check()
        return self._machine.copy()

    async def read(self, *, timeout: float = 5.0, barrier: bool = False) -> S:
        """The state, with everything in it that was accepted before this call.

        Args:
            barrier: write a mark and wait until it is seen: right even where a server
                that was cut off from the others still believes to lead (a few seconds,
                and only with several servers). Costs a write.

        Raises:
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
            DomainError: this replica has stopped.
        """
        self._check()
        deadline = monotonic() + timeout
        while True:
            try:
                await _within(deadline, self._barrier(deadline) if barrier else self._sync())
                return self.view
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _PAUSE_MAX_S >= deadline:
                    raise
                await asyncio.sleep(_PAUSE_MAX_S)

    async def wait(self, revision: int, *, timeout: float = 5.0) -> S:
        """The state at *revision* or later: for somebody who was told a revision.

        Raises:
            BusTimeoutError: it has not come within *timeout*.
            DomainError: this replica has stopped.
        """
        self._check()

        async def reached() -> None:
            async with self._moved:
                await self._moved.wait_for(
                    lambda: self.revision >= revision or self._failure is not None
                )

        self._hinted = max(self._hinted, revision)
        self._hint.set()
        await _within(monotonic() + timeout, reached())
        return self.view

    def on_applied(self, listener: OnApplied) -> None:
        """Call *listener* with each entry from now on and the state after it, in order.

        A replica that had to restore a snapshot goes on after it: what lies between is
        not reported. The listener must not change the state and not block.
        """
        self._listeners.append(listener)

    # ---- proposing --------------------------------------------------------------

    async def propose(
        self, operation: Any, *, id: str | None = None, timeout: float = 5.0
    ) -> Proposal:
        """Validate *operation*, append it if the state is still the same, and apply it.

        Returns accepted with its revision, rejected with the reason, or unknown: then
        ask `status`, or propose it again with the same id. A repeat takes effect once.

        Cancellation: the outcome is unknown.

        Raises:
            PayloadInvalidError: *operation* fits none of the domain's models.
            BusUnavailableError, DomainBusyError: not accepted within *timeout*, for certain.
            DomainFullError, PayloadTooLargeError, PermissionDeniedError: not accepted.
            DomainError: this replica has stopped.
        """
        self._check()
        deadline = monotonic() + timeout
        proposal_id = uuid4().hex if id is None else check_id(id)
        parsed = self._machine.parse(operation)
        try:
            async with asyncio.timeout(timeout):
                await self._proposing.acquire()
        except TimeoutError:
            raise DomainBusyError(
                f"Other proposals of this process to {self.name} took all of {timeout:g} s."
            ) from None
        try:
            found = await self._propose(parsed, proposal_id, deadline)
        finally:
            self._proposing.release()
        if found.status is ProposalStatus.REJECTED:
            _put(self._rejected, proposal_id, found)
        elif found.accepted:
            self._rejected.pop(proposal_id, None)
        return found

    async def _propose(self, operation: O, id: str, deadline: float) -> Proposal:
        machine = self._machine
        doubt: int | None = None
        """The revision that an attempt of unknown outcome was to follow."""
        why: FoundationError | None = None
        pause = _PAUSE_S
        synced = False
        while True:
            if (known := self._known(id)) is not None:
                return known
            if doubt is not None and machine.revision > doubt:
                doubt = None  # another entry took the place that it was meant for
            if (left := deadline - monotonic()) <= 0:
                break
            if self._cuts != self._sure_of:
                try:
                    await _within(deadline, self._sync())
                    continue
                except (BusTimeoutError, BusUnavailableError) as error:
                    why = error
                await asyncio.sleep(max(0.0, min(pause, deadline - monotonic())))
                continue
            revision = machine.revision
            after = machine.judge(operation)
            if isinstance(after, str):
                if doubt is not None:
                    break  # valid a moment ago, in the same state: a validator that dices
                if synced:
                    return Proposal(id, ProposalStatus.REJECTED, revision, after)
            else:
                _put(self._doubts, id, revision)
                try:
                    if doubt is None:
                        self._check_room()
                    ack = await self._log.append(
                        self._entry(operation, id), timeout=min(left, _ATTEMPT_S)
                    )
                except (StaleRevisionError, BusUnavailableError) as error:
                    why = error
                except FoundationError as error:
                    why = error
                    in_flight = error.details.get("err_code") == _DUPLICATE_IN_FLIGHT
                    if error.outcome == "unknown" or in_flight:
                        doubt = revision
                    elif doubt is None:
                        raise
                    else:
                        break
                else:
                    return await self._accepted(operation, id, after, revision, ack, deadline)
            try:
                await _within(deadline, self._sync())
                synced = True
                if machine.revision > revision:
                    pause = _PAUSE_S
                    continue
                if isinstance(after, str):
                    continue
            except (BusTimeoutError, BusUnavailableError) as error:
                why = error
            except DomainError as error:
                if doubt is None:
                    raise
                why = error
                break
            await asyncio.sleep(
                max(0.0, min(pause * random.uniform(0.5, 1.5), deadline - monotonic()))
            )
            pause = min(2 * pause, _PAUSE_MAX_S)
        if doubt is not None:
            reason = f"no answer in time ({why})"
            return Proposal(id, ProposalStatus.UNKNOWN, doubt, reason, final=False)
        if isinstance(why, BusError):
            raise BusUnavailableError(
                f"The domain {self.name} could not be reached in time; nothing was accepted.",
                hint="Is JetStream up, and does the stream have a leader?",
                id=id,
            ) from why
        raise DomainBusyError(
            f"Other proposals to {self.name} came first all the time; nothing was accepted.",
            hint="Propose it again, or allow more time.",
            id=id,
        )

    async def _accepted(
        self, operation: O, id: str, after: S, revision: int, ack: PubAck, deadline: float
    ) -> Proposal:
        """It is stored: make it visible here, and return."""
        is_sure = self._cuts == self._sure_of
        if is_sure and not ack.duplicate and self._machine.revision == revision:
            self._report(self._machine.take(ack.sequence, id, operation, after))
        else:
            # Stored by an earlier attempt, or this replica was restored meanwhile.
            with contextlib.suppress(BusTimeoutError, BusUnavailableError):
                await _within(deadline, self._sync())
            if (known := self._known(id)) is not None:
                return known
            if not is_sure:
                # Stored behind what may be another history: then every replica passes it over.
                if self._cuts != self._sure_of or self._machine.revision < ack.sequence:
                    reason = "the connection was lost, and the log could not be read since"
                    return Proposal(id, ProposalStatus.UNKNOWN, revision, reason, final=False)
                reason = "the log went back in time, and what it followed is gone"
                return Proposal(id, ProposalStatus.REJECTED, ack.sequence, reason)
        await self._after_own(ack.sequence)
        return Proposal(id, ProposalStatus.ACCEPTED, ack.sequence)

    def _entry(self, operation: O, id: str) -> DomainEntry:
        machine = self._machine
        return DomainEntry(
            id=id,
            after=machine.revision,
            after_id=machine.last_id,
            operation=machine.dump(operation),
            by=self._bus.name,
            at=utc_text(),
            version=machine.domain.version,
        )

    def _known(self, id: str) -> Proposal | None:
        """What the log up to here says of the proposal."""
        recent = self._machine.seen(id)
        if recent is None:
            return None
        if recent.skipped is not None:
            return Proposal(id, ProposalStatus.REJECTED, recent.revision, recent.skipped)
        return Proposal(id, ProposalStatus.ACCEPTED, recent.revision)

    def _check_room(self) -> None:
        machine = self._machine
        behind = machine.entries - self._snapshot_at_entries
        if behind >= machine.domain.log_max:
            self._take_snapshot()
            raise DomainFullError(
                f"The log of domain {self.name} has {behind:,} entries since its last snapshot.",
                hint="Is its state too large for one message? See the event domain.not_compacted.",
            )

    async def status(self, id: str, *, timeout: float = 5.0) -> Proposal:
        """What became of a proposal, as of now.

        *not found* is final where this process proposed it and the log has gone on since;
        else it may still arrive. A rejection is known to the process that got it.

        Raises:
            ConfigError: *id* is none.
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
        """
        check_id(id)
        await self.read(timeout=timeout)
        if (known := self._known(id)) is not None:
            return known
        if (rejected := self._rejected.get(id)) is not None:
            return rejected
        revision = self._machine.revision
        doubt = self._doubts.get(id)
        if doubt is not None and revision > doubt:
            reason = "Another operation took its place; it was not accepted."
            return Proposal(id, ProposalStatus.NOT_FOUND, revision, reason)
        reason = f"It is not among the newest {self._machine.domain.ids_kept:,} entries."
        return Proposal(id, ProposalStatus.NOT_FOUND, revision, reason, final=False)

    # ---- following --------------------------------------------------------------

    def _on_live(self, message: Message) -> None:
        sequence = message.header(b"Nats-Sequence")
        if sequence is not None and sequence.isdigit():
            self._hinted = max(self._hinted, int(sequence))
            self._hint.set()

    def _on_disconnect(self) -> None:
        self._cuts += 1

    def _on_reconnect(self) -> None:
        self._sweep_now = True
        self._hint.set()

    async def _pump(self) -> None:
        """Follow the log until closed, or until it can't be followed."""
        lagging = 0
        while True:
            try:
                async with asyncio.timeout(_SWEEP_S * random.uniform(0.8, 1.2)):
                    await self._hint.wait()
            except TimeoutError:
                self._sweep_now = True
            self._hint.clear()
            try:
                if self._sweep_now:
                    await self._sync()
                    self._sweep_now = False
                # A hint is only believed as far as there is something to read.
                if self._hinted > self._machine.revision:
                    await self._read_on()
                if self._hinted > self._machine.revision and lagging < _LAGGING_MAX:
                    lagging += 1  # a replica that lags answered
                    await asyncio.sleep(_LAG_PAUSE_S)
                    self._hint.set()
                else:
                    lagging = 0
                    self._hinted = self._machine.revision
            except DomainError as error:
                await self._fail(error)
                return
            except (BusError, NotFoundError) as error:
                self._logger.debug("log not read", error=str(error))
                await asyncio.sleep(_PAUSE_MAX_S)
                self._hint.set()

    async def _fail(self, error: DomainError) -> None:
        self._failure = error
        self._logger.error("domain stopped", error=str(error))
        self._events.emit(
            "domain", "stopped", f"Domain {self.name}: {error}", domain=self.name, by=self._bus.name
        )
        async with self._moved:
            self._moved.notify_all()

    async def _sync(self) -> None:
        """Apply everything that the leader has when asked."""
        last = await self._log.last()
        await self._advance(0 if last is None else last.sequence)

    async def _barrier(self, deadline: float) -> None:
        """Apply everything before a mark that we write now: only a real leader stores it."""
        mark = await self._log.mark(self._bus.name, timeout=min(_ATTEMPT_S, deadline - monotonic()))
        start = self._machine.revision + 1
        newest = 0
        while start <= mark:
            messages = await self._log.all_from(start)
            if messages:
                start = messages[-1].sequence + 1
                newest = max(
                    [newest, *(m.sequence for m in messages if m.subject == self._log.subject)]
                )
            else:
                await asyncio.sleep(_LAG_PAUSE_S)
        if newest > self._machine.revision:
            await self._advance(newest)

    async def _read_on(self) -> None:
        """Apply what there is beyond us."""
        async with self._reading:
            await self._make_sure()
            while await self._apply(await self._log.page(self._machine.revision + 1)):
                pass
        await self._tell()

    async def _advance(self, target: int) -> None:
        """Apply the log up to *target*, which is stored."""
        async with self._reading:
            if target < self._machine.revision:
                await self._shorter()
            else:
                self._shorter_since = None
                await self._make_sure()
            while self._machine.revision < target:
                if not await self._apply(await self._log.page(self._machine.revision + 1)):
                    await asyncio.sleep(_LAG_PAUSE_S)  # a replica that lags answered
        await self._tell()

    async def _make_sure(self) -> None:
        """After the connection was lost: whether our last entry is still in the log.

        A log that lost its end and has grown to the same length since looks the same by its
        numbers, and an append that names the last of them would be stored.
        """
        cuts, at = self._cuts, self._machine.revision
        if cuts == self._sure_of:
            return
        if at and not await self._is_ours(at):
            snapshot, _ = await self._log.snapshot()
            if snapshot is not None and snapshot.revision > at:
                self._logger.info("too far behind: restoring", revision=at)
                await self._restore()
            else:
                await self._rewound(f"revision {at} is not what it was")
        self._sure_of = cuts

    async def _tell(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _apply(self, messages: list[StoredMessage]) -> bool:
        """Apply a page; returns whether anything was new. Whoever calls holds `_reading`."""
        before = self._machine.revision
        for message in messages:
            # A proposal of ours may have been applied while the page was on its way.
            if message.sequence <= self._machine.revision:
                continue
            found = self._machine.follow(message.sequence, message.data)
            if isinstance(found, Misfit):
                if not await self._is_foreign(found):
                    return True
                if found.revision <= self._machine.revision:
                    continue
                found = self._machine.skip(found)
            self._report(found)
        return self._machine.revision > before

    async def _is_foreign(self, misfit: Misfit) -> bool:
        """Whether a misfit is to be skipped; if not, this replica was restored instead."""
        machine = self._machine
        at = machine.revision
        snapshot, _ = await self._log.snapshot()
        if snapshot is not None and snapshot.revision > at:
            self._logger.info("too far behind: restoring", revision=at, snapshot=snapshot.revision)
            await self._restore()
            return False
        if at and not await self._is_ours(at):
            await self._rewound(f"revision {at} is not in it any more")
            return False
        if (
            misfit.after is not None
            and misfit.after > at
            and await self._log.at(misfit.after) is None
        ):
            raise DomainError(
                f"The log of domain {self.name} has lost revision {misfit.after}, and no snapshot "
                "covers it.",
                hint="Somebody purged its stream. Restore the stream from a backup.",
            )
        return True

    async def _is_ours(self, revision: int) -> bool:
        """Whether the log still has the entry that we applied at *revision*."""
        last_id = self._machine.last_id
        message = await self._log.at(revision)
        return message is not None and (last_id.startswith("?") or last_id == _id_in(message))

    async def _shorter(self) -> None:
        """The leader's log ends before what we have applied."""
        if await self._is_ours(self._machine.revision):
            self._shorter_since = None
            return
        now = monotonic()
        if self._shorter_since is None:
            self._shorter_since = now
        if now - self._shorter_since < _REWOUND_AFTER_S:
            raise BusUnavailableError(
                f"The log of domain {self.name} is shorter than what is applied here.",
                hint="A server that was cut off may be answering.",
            )
        await self._rewound("it ends before what was applied here")

    async def _rewound(self, why: str) -> None:
        revision = self._machine.revision
        self._shorter_since = None
        self._logger.error("the log went back in time", reason=why, revision=revision)
        self._events.emit(
            "domain",
            "rewound",
            f"The log of domain {self.name} went back in time: {why}; reading it anew.",
            domain=self.name,
            revision=revision,
            by=self._bus.name,
        )
        await self._restore()

    async def _restore(self) -> None:
        """Go to the newest snapshot, or to the beginning. Whoever calls holds `_reading`."""
        snapshot, _ = await self._log.snapshot()
        if snapshot is None:
            self._machine.reset()
            self._snapshot_at_entries = 0
            return
        self._machine.restore(snapshot)
        self._snapshot_at_entries = snapshot.entries

    def _report(self, applied: Applied) -> None:
        if applied.skipped is not None:
            self._logger.warning(
                "entry skipped", revision=applied.revision, id=applied.id, reason=applied.skipped
            )
            self._events.emit(
                "domain",
                "entry_skipped",
                f"Domain {self.name}: revision {applied.revision} was skipped: {applied.skipped}",
                domain=self.name,
                revision=applied.revision,
                id=applied.id,
                by=self._bus.name,
            )
        for listener in self._listeners:
            try:
                listener(applied, self._machine.state)
            except Exception:  # a user's code must not stop the replica
                self._logger.exception("listener failed", revision=applied.revision)

    # ---- snapshots --------------------------------------------------------------

    async def _after_own(self, revision: int) -> None:
        self._hinted = max(self._hinted, revision)
        await self._tell()
        if self._machine.entries >= self._snapshot_due:
            self._take_snapshot()

    @property
    def _snapshot_due(self) -> int:
        due = self._snapshot_at_entries + self._machine.domain.snapshot_every
        return max(due, self._snapshot_failed_at + _SNAPSHOT_RETRY_ENTRIES)

    def _take_snapshot(self) -> None:
        task = self._snapshot_task
        if self._scope is not None and (task is None or task.done()):
            self._snapshot_task = self._scope.start(self._snapshot_and_compact(), "snapshot")

    async def snapshot(self) -> int:
        """Store a snapshot now and compact the log; returns its revision.

        This happens by itself every `Domain.snapshot_every` entries.

        Raises:
            PayloadTooLargeError: the state is too large for one message.
            BusTimeoutError, BusUnavailableError, BusRefusedError
        """
        self._check()
        return await self._snapshot(1)

    async def _snapshot(self, at_least: int) -> int:
        """A snapshot, unless the newest lacks fewer than *at_least* entries."""
        await self._sync()  # never from a state that the log has lost
        machine = self._machine
        for _ in range(_SNAPSHOT_TRIES):
            known, sequence = await self._log.snapshot()
            if known is not None and machine.entries - known.entries < at_least:
                self._snapshot_at_entries = known.entries  # another process was first
                return known.revision
            snapshot = machine.snapshot(by=self._bus.name, at=utc_text())
            try:
                await self._log.store_snapshot(snapshot, expected=sequence)
            except StaleRevisionError:
                continue
            self._snapshot_at_entries = snapshot.entries
            if known is not None:
                # What the one before needs stays, for those who lag and for a power cut.
                await self._log.compact(below=known.revision)
            return snapshot.revision
        raise DomainBusyError(f"Others write snapshots of {self.name} all the time.")

    async def _snapshot_and_compact(self) -> None:
        try:
            revision = await self._snapshot(self._machine.domain.snapshot_every)
            self._logger.debug("compacted", snapshot=revision)
        except FoundationError as error:
            # Accepted proposals will try again; `log_max` bounds how long that may go on.
            self._snapshot_failed_at = self._machine.entries
            self._logger.warning("not compacted", error=str(error))
            self._events.emit(
                "domain",
                "not_compacted",
                f"The log of domain {self.name} could not be compacted: {error}",
                domain=self.name,
                by=self._bus.name,
            )


def _put(memory: OrderedDict[str, T], key: str, value: T) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > _REMEMBERED_MAX:
        memory.popitem(last=False)


def _id_in(message: StoredMessage) -> str:
    try:
        return decode(DomainEntry, message.data).id
    except DecodeError:
        return ""


async def _within(deadline: float, work: Awaitable[T]) -> T:
    """The result of *work*, by *deadline*.

    Raises:
        BusTimeoutError: it took longer.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - monotonic())):
            return await work
    except TimeoutError:
        raise BusTimeoutError("NATS did not answer in time.") from None
