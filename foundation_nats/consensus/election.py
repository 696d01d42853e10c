"""Elects one leader among the members: drives `Candidate` over the lease ``leader``.

Reads and writes the lease through `Lease`, hears of a dead holder through
`Membership`, and tells the rest of the process by callbacks. Two leaders for a
moment are possible (one was replaced and does not know it yet) and must be
harmless to whatever the callbacks start.

At shutdown `close` gives the lease back, so that the next leader needs no
time-out; a process that is killed is replaced when its node is seen to be
down, and at the latest when the lease's TTL is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Entry, Watch
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.membership import Membership
from foundation_nats.config import LeaseConfig
from foundation_nats.consensus.candidate import (
    Acquire,
    AcquireResult,
    BecameLeader,
    Candidate,
    Doubt,
    Effect,
    Event,
    HolderBack,
    HolderGone,
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
from foundation_nats.consensus.lease import Lease, LeaseState
from foundation_nats.errors import FoundationError, StaleRevisionError
from foundation_schemas import LeaseRecord

_STALL_S = 1.0
_RELEASE_TIMEOUT_S = 2.0
_TIMER_MAX_S = 1.0


class Election:
    """This node's candidacy."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        config: LeaseConfig,
        membership: Membership,
        *,
        on_elected: Callable[[int], None] | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            on_elected: called with the term, in the loop.
            on_lost: called with the reason, in the loop.
        """
        self._bus = bus
        self._config = config
        self._membership = membership
        self._on_elected = on_elected
        self._on_lost = on_lost
        self._lease = Lease(bus, subjects)
        self._log = get_logger("election").bind(node=membership.node)
        self._candidate = self._new_candidate()
        self._scope: TaskScope | None = None
        self._watch: Watch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._seen: LeaseState | None = None
        self._is_closed = False
        self._release: asyncio.Task[None] | None = None

    def _new_candidate(self) -> Candidate:
        return Candidate(
            me=self._membership.node,
            incarnation=self._membership.incarnation,
            ttl_s=self._config.ttl_s,
            renew_every_s=self._config.renew_every_s,
            stop_after_s=self._config.stop_after_s,
        )

    # ---- reading ----------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this node believes to lead."""
        return self._candidate.is_leader

    @property
    def term(self) -> int | None:
        """The term this node leads in; None while it doesn't."""
        return self._candidate.term if self._candidate.is_leader else None

    @property
    def last_renewed_at(self) -> float:
        """When the last successful write of our lease was sent, on `monotonic`."""
        return self._candidate.renewed_at

    @property
    def leader(self) -> LeaseRecord | None:
        """Who holds the lease, as last seen."""
        return None if self._seen is None else self._seen.record

    # ---- life -------------------------------------------------------------------

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Become a candidate.

        Raises:
            BusTimeoutError, BusUnavailableError: the ``leases`` bucket could not be read.
        """
        self._scope = scope
        self._membership.subscribe(self._on_members)
        self._watch = self._lease.bucket.watch(scope, self._on_entry)
        await self._watch.wait_ready(timeout)
        if self._seen is None:
            self._see(await self._lease.read())
        self._arm()

    async def close(self) -> None:
        """Stop being a candidate; a leader gives the lease back. Idempotent."""
        if self._is_closed:
            return
        self._step(Resign())
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._release is not None:
            await asyncio.wait([self._release], timeout=_RELEASE_TIMEOUT_S)

    def doubt(self) -> None:
        """Renew now, if this node leads: it may have been replaced without hearing of it."""
        self._step(Doubt())

    # ---- what is seen -----------------------------------------------------------

    def _on_entry(self, entry: Entry) -> None:
        if entry.key == self._lease.name:
            self._see(self._lease.state(entry))

    def _see(self, state: LeaseState) -> None:
        # Revision 0 is an empty key read from the leader: even its marker has aged out.
        if self._seen is not None and 0 < state.revision < self._seen.revision:
            return
        is_new = self._seen is None or state.revision > self._seen.revision
        self._seen = state
        record = state.record
        self._membership.watch_holder(
            None if record is None else record.holder,
            record.incarnation if record is not None and is_new else None,
        )
        if record is None:
            self._candidate.term = max(self._candidate.term, state.revision)
            self._step(LeaseVacant(state.revision))
        else:
            self._check_holder()
            self._step(LeaseSeen(record.holder, record.incarnation, record.term, state.revision))

    def _check_holder(self) -> None:
        record = None if self._seen is None else self._seen.record
        if record is None:
            return
        gone = self._membership.is_down(record.holder, record.incarnation)
        what = HolderGone if gone else HolderBack
        self._step(what(record.holder, record.incarnation))

    def _on_members(self) -> None:
        if self._is_closed:
            return
        if self._candidate.incarnation != self._membership.incarnation:
            # A new life is a new candidate; what the old one held is given back.
            self._step(Resign())
            self._candidate = self._new_candidate()
            if self._seen is not None:
                self._see(self._seen)
        elif self._membership.is_down(self._membership.node, self._candidate.incarnation):
            # Others have given our agents away: a life that is over confirms nobody's rights.
            self._step(Resign())
        self._check_holder()

    # ---- driving ----------------------------------------------------------------

    def _step(self, event: Event) -> None:
        if self._is_closed:
            return
        for effect in self._candidate.step(event, monotonic()):
            self._perform(effect)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._candidate.deadline()
        if due is not None and not self._is_closed:
            # The loop's clock stops while the machine sleeps and ours doesn't: never sleep long.
            delay = min(max(0.0, due - monotonic()), _TIMER_MAX_S)
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._step(Tick())

    def _perform(self, effect: Effect) -> None:
        assert self._scope is not None
        match effect:
            case Acquire(attempt, expected, term):
                self._scope.start(
                    self._acquire(self._candidate, attempt, expected, term), "acquire"
                )
            case Renew(attempt, expected, term):
                failpoint("lease.renew")
                self._scope.start(self._renew(self._candidate, attempt, expected, term), "renew")
            case Release(expected, term):
                self._release = self._scope.start(self._give_back(expected, term), "release")
            case ReadLease():
                self._scope.start(self._read(), "read")
            case BecameLeader(term):
                self._log.info("elected", term=term)
                self._membership.emit(
                    "leader",
                    "elected",
                    f"Node {self._membership.node} leads in term {term}.",
                    node=self._membership.node,
                    incarnation=self._candidate.incarnation,
                    term=term,
                )
                if self._on_elected is not None:
                    self._on_elected(term)
            case LostLeadership(term, reason):
                self._log.warning("no longer the leader", term=term, reason=reason)
                self._membership.emit(
                    "leader",
                    "lost",
                    f"Node {self._membership.node} no longer leads: {reason}.",
                    node=self._membership.node,
                    term=term,
                    reason=reason,
                )
                if self._on_lost is not None:
                    self._on_lost(reason)

    def _answer(self, candidate: Candidate, event: Event) -> None:
        """Report a result, unless the candidate that asked for it is of a former life."""
        if candidate is self._candidate:
            self._step(event)

    def _record(self, candidate: Candidate, term: int) -> LeaseRecord:
        return LeaseRecord(
            holder=candidate.me,
            incarnation=candidate.incarnation,
            term=term,
            ttl_s=self._config.ttl_s,
        )

    async def _acquire(self, candidate: Candidate, attempt: int, expected: int, term: int) -> None:
        ok: bool | None
        revision = 0
        record = self._record(candidate, term)
        try:
            revision = await self._lease.write(record, expected=expected)
            ok = True
        except StaleRevisionError:
            ok = False
        except FoundationError as error:
            self._log.info("lease not taken", error=str(error))
            ok = None if error.outcome == "unknown" else False
        if ok:
            failpoint("lease.acquired")
            self._remember(record, revision)
        self._answer(candidate, AcquireResult(attempt, ok, term, revision))

    async def _renew(self, candidate: Candidate, attempt: int, expected: int, term: int) -> None:
        began = monotonic()
        revision = expected
        outcome: Literal["ok", "lost", "unknown"]
        record = self._record(candidate, term)
        try:
            revision = await self._lease.write(record, expected=expected)
            outcome = "ok"
            self._remember(record, revision)
        except StaleRevisionError:
            outcome = await self._lost_or_not(record)
        except FoundationError as error:
            self._log.warning("lease not renewed", error=str(error))
            outcome = "unknown"
        if monotonic() - began > _STALL_S:
            self._membership.note_write_stall()
        self._answer(candidate, RenewResult(attempt, outcome, revision))

    async def _lost_or_not(self, record: LeaseRecord) -> Literal["lost", "unknown"]:
        """An earlier renewal whose answer was lost also makes this one stale: look whose it is."""
        try:
            state = await self._lease.read()
        except FoundationError:
            return "unknown"
        if state.record == record:
            self._see(state)
            return "unknown"
        return "lost"

    def _remember(self, record: LeaseRecord, revision: int) -> None:
        if self._seen is None or revision > self._seen.revision:
            self._seen = LeaseState(record, revision)
            self._membership.watch_holder(record.holder)

    async def _give_back(self, expected: int, term: int) -> None:
        try:
            await self._lease.release(expected=expected)
        except FoundationError as error:
            self._log.info("lease not given back; it ends by itself", term=term, error=str(error))

    async def _read(self) -> None:
        try:
            state = await self._lease.read()
        except FoundationError as error:
            self._log.info("lease not read", error=str(error))
            return
        self._see(state)
