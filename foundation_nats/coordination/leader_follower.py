"""`leader_follower`: a group elects a leader; what it appends reaches every follower, in one order.

Two things that exist are put together. The election (`election`) sees to it that there is one
leader at a time while clocks run properly. The log is that of a replicated domain
(`consensus`), into which a new leader first writes its term: an entry carries the term of
who appends it, is judged against the newest term in the log, and is stored only
if the log still ends where it was judged. That is the fence, and it needs no clock: Raft's rule
that a leader begins its term with an entry of its own (Ongaro and Ousterhout, 2014, §8), with the
stream's replication for Raft's own.

Guaranteed: an entry whose `append` returned is in the log, and stays there through the loss of the
leader, of any member and of the broker (as far as the broker keeps what it acknowledged, P1). All
members see the same entries in the same order. Behind the first entry of a term there is none of
an earlier one: who was deposed while it was frozen can't append. A repeated id counts
once. What a follower reads says how old it may be at most.

Not guaranteed: that there is a leader at every moment: after one that died the others wait
`ttl_s`. That an append which raised with an unknown outcome is not in the log: append it again, under the same id.
While a server that was cut off from the others still answers reads as leader (seconds, and only
with several servers), a stated age may be too young by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from secrets import token_hex
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.streams import api
from foundation_nats.consensus.domain import Applied, Domain, Proposal, ProposalStatus
from foundation_nats.consensus.replica import Replica
from foundation_nats.coordination.cell import as_json, checked
from foundation_nats.coordination.election import Election
from foundation_nats.coordination.lock import Connection
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    DomainError,
    FoundationError,
    NotFoundError,
    NotLeaderError,
)

PREFIX = "group_"
"""Before a group's name, in those of its domain and its election."""
_KEPT_MAX = 10_000
_RETRY_S = 0.2
_TAKE_OVER_S = 5.0
_FRESH_MIN_S = 0.05

Fold = Callable[[Any, Any], Any]


# ---- the log ----------------------------------------------------------------------------


class Lead(BaseModel):
    """The first entry of a term."""

    kind: Literal["lead"] = "lead"
    term: int
    member: str


class Put(BaseModel):
    """What a leader has appended."""

    kind: Literal["put"] = "put"
    term: int
    value: Any = None


class GroupState(BaseModel):
    """What the entries up to here make together."""

    term: int = 0
    leader: str = ""
    index: int = 0
    """How many entries were appended by leaders."""
    value: Any = None
    """What `apply` makes of them; None before the first."""


class _Group(Domain[GroupState, Any]):
    """The domain of one group."""

    State, Operation = GroupState, Lead | Put
    # `apply` replaces what it changes, and the value is copied before a user's code sees it.
    pure = True

    def __init__(self, name: str, apply: Fold | None, initial: Any) -> None:
        self.name = PREFIX + name  # type: ignore[misc]  # one class for all groups
        self._fold = apply
        self._initial = initial

    def validate(self, state: GroupState, operation: Any) -> str | None:
        if isinstance(operation, Lead):
            if operation.term <= state.term:
                return f"term {state.term} of {state.leader} has begun"
        elif operation.term != state.term:
            return f"{state.leader or 'nobody'} leads in term {state.term}"
        return None

    def apply(self, state: GroupState, operation: Any) -> GroupState:
        if isinstance(operation, Lead):
            return state.model_copy(update={"term": operation.term, "leader": operation.member})
        changes: dict[str, Any] = {"index": state.index + 1}
        if self._fold is not None:
            changes["value"] = as_json(
                self._fold(self.value(state), copy.deepcopy(operation.value)), "what `apply` made"
            )
        return state.model_copy(update=changes)

    def value(self, state: GroupState) -> Any:
        """What the entries make together, for somebody who may change it."""
        return copy.deepcopy(self._initial if state.index == 0 else state.value)


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One entry of a group's log."""

    index: int
    """1, 2, 3 … without gaps."""
    term: int
    """Of the leader that appended it; never falls."""
    value: Any
    id: str


@dataclass(frozen=True, slots=True)
class GroupView:
    """What a member knows, and how old that may be."""

    value: Any
    """What `apply` has made of the entries."""
    index: int
    """Of the last entry in it."""
    term: int
    leader: str
    """Who began that term; it may be gone by now."""
    age_s: float
    """Everything that was appended longer ago than this is in it."""


# ---- a member ---------------------------------------------------------------------------


class Group:
    """A member of a group, or an observer; enter it to take part."""

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        member: str | None,
        apply: Fold | None,
        initial: Any,
        ttl_s: float,
        fresh_s: float,
        replicas: int | None,
    ) -> None:
        self.name = checked("group", name)
        self.member = None if member is None else checked(f"a member of the group {name}", member)
        if fresh_s < _FRESH_MIN_S:
            raise ConfigError(f"A group's fresh_s is at least {_FRESH_MIN_S:g} s, got {fresh_s:g}.")
        self.ttl_s = ttl_s
        self.fresh_s = fresh_s
        self._connection = connection
        self._replicas = replicas
        self._domain = _Group(name, apply, as_json(initial, f"`initial` of the group {name}"))
        self._election: Election | None = None
        if member is not None:
            self._election = Election(
                connection, PREFIX + name, candidate=member, ttl_s=ttl_s, value=""
            )
        self._replica: Replica[GroupState, Any] | None = None
        self._scope: TaskScope | None = None
        self._term_led: int | None = None
        self._fresh_at: float | None = None
        self._kept: deque[GroupEntry] = deque(maxlen=_KEPT_MAX)
        self._moved = asyncio.Condition()
        self._moves: set[asyncio.Task[None]] = set()
        self._log = get_logger("group").bind(group=name, member=member)

    # ---- life -------------------------------------------------------------------

    async def open(self, *, timeout: float = 10.0) -> None:
        """Read what there is, then follow, and campaign.

        Raises:
            DomainError: the log can't be read.
            ServerError, BusTimeoutError, BusUnavailableError: not read within *timeout*.
        """
        deadline = monotonic() + timeout
        if self._replica is not None:
            raise RuntimeError(f"the group {self.name} is open already")
        copies = self._replicas
        while copies is None:
            try:
                stream = self._connection.subjects.signals_stream
                found = await api(self._connection.bus, "STREAM.INFO", stream)
                copies = int(found["config"].get("num_replicas", 1))
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= deadline:
                    raise
                await asyncio.sleep(_RETRY_S)
        bus, subjects = self._connection.bus, self._connection.subjects
        replica = Replica(bus, subjects, self._domain, replicas=copies)
        replica.on_applied(self._on_applied)
        self._replica = replica
        began = monotonic()
        try:
            await replica.open(timeout=max(0.1, deadline - monotonic()))
        except BaseException:
            self._replica = None
            raise
        self._fresh_at = began
        self._scope = TaskScope(f"group.{self.name}")
        self._scope.start(self._refresh(), "refresh")
        if self._election is not None:
            self._scope.start(self._campaign(self._election), "campaign")

    async def close(self) -> None:
        """Take part no more; a leader resigns, and the others learn of it at once. Idempotent."""
        self._term_led = None
        scope, self._scope = self._scope, None
        if scope is not None:
            await scope.close()
        if self._election is not None:
            await self._election.resign()
        replica, self._replica = self._replica, None
        if replica is not None:
            await replica.close()
        await self._tell()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _opened(self) -> Replica[GroupState, Any]:
        if self._replica is None:
            raise RuntimeError(f"the group {self.name} is not open: use `async with`")
        return self._replica

    # ---- leading ----------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether we lead, by our clock; an append is decided by the log all the same."""
        return (
            self._term_led is not None and self._election is not None and self._election.is_leader
        )

    @property
    def term(self) -> int:
        """The newest term that we know of."""
        return self._opened().view.term

    @property
    def leader(self) -> str:
        """Who began it; empty: nobody has ever led. It may be gone by now."""
        return self._opened().view.leader

    async def led(self, *, timeout: float | None = None) -> int:
        """Wait until we lead; returns the term.

        Raises:
            ConfigError: we are no member.
            BusTimeoutError: we did not within *timeout*.
        """
        if self._election is None:
            raise ConfigError(f"An observer of the group {self.name} never leads: give `member`.")
        await self._until(lambda: self.is_leader, timeout, "do not lead")
        assert self._term_led is not None
        return self._term_led

    async def _until(self, is_so: Callable[[], bool], timeout: float | None, what: str) -> None:
        try:
            async with asyncio.timeout(timeout), self._moved:
                await self._moved.wait_for(is_so)
        except TimeoutError:
            raise BusTimeoutError(
                f"We {what} in the group {self.name} within {timeout:g} s."
            ) from None

    async def append(
        self, value: Any, *, id: str | None = None, timeout: float = 5.0
    ) -> GroupEntry:
        """Append *value*; once this returns it is in the log for ever, and `apply` was called for it here.

        Cancellation: the outcome is unknown.

        Args:
            id: a repeat with the same one, by whoever leads then, counts once (the newest 4,096).

        Raises:
            NotLeaderError: somebody else leads, or nobody; nothing was appended. `details` has ``leader``.
            ProposalRejectedError: `apply` raised for it; nothing was appended.
            ProposalUnknownError: it may be in the log: append it again with the same id.
            PayloadTooLargeError, BusUnavailableError, DomainBusyError, DomainFullError: nothing was appended.
            ConfigError: *value* is not JSON.
        """
        replica = self._opened()
        plain = as_json(value, f"an entry of the group {self.name}")
        term = self._term_led
        if term is None or not self.is_leader:
            raise self._not_leader()
        name = f"put.{token_hex(8)}" if id is None else id
        found = await replica.propose(Put(term=term, value=plain), id=name, timeout=timeout)
        if found.status is ProposalStatus.REJECTED and replica.view.term != term:
            self._depose(term)
            raise self._not_leader()
        revision = found.check()
        for entry in reversed(self._kept):
            if entry.id == name:
                return entry
        # A repeat of something that was appended longer ago than we remember.
        state = await replica.wait(revision)
        return GroupEntry(state.index, state.term, plain, name)

    def _not_leader(self) -> NotLeaderError:
        known = self._opened().view
        who = known.leader if known.leader not in ("", self.member) else ""
        said = f": {who} does, as far as we know" if who else ""
        return NotLeaderError(
            f"{self.member or 'An observer'} does not lead the group {self.name}{said}.",
            hint="Only the leader appends: ask it, or wait with `led`.",
            leader=who,
            term=known.term,
        )

    async def _campaign(self, election: Election) -> None:
        """Lead whenever nobody else does, until closed."""
        while True:
            try:
                await election.campaign()
                term = await self._take_over(election)
                if term is not None:
                    self._term_led = term
                    self._log.info("leads", term=term)
                    await self._tell()
                    await election.lost.wait()
                    self._depose(term)
            except FoundationError as error:
                self._log.info("does not lead", error=str(error))
            finally:
                self._term_led = None
            await election.resign()
            await self._tell()
            await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))

    async def _take_over(self, election: Election) -> int | None:
        """Begin a term in the log; None: the election was lost meanwhile."""
        replica = self._opened()
        assert self.member is not None
        while election.is_leader:
            known = await replica.read(timeout=_TAKE_OVER_S)
            # The log's terms are what counts: those of the election may have been lost with its bucket.
            lead = Lead(term=max(election.token, known.term + 1), member=self.member)
            found: Proposal = await replica.propose(lead, timeout=_TAKE_OVER_S)
            if found.accepted:
                return lead.term if election.is_leader else None
        return None

    def _depose(self, term: int) -> None:
        if self._term_led == term:
            self._log.warning("leads no more", term=term)
            self._term_led = None
        if self._election is not None and self._scope is not None:
            # Whoever is deposed by the log does not wait for the election to find out.
            self._election.lost.set()

    # ---- following --------------------------------------------------------------

    def _on_applied(self, applied: Applied, state: GroupState) -> None:
        operation = applied.operation
        if applied.skipped is None and isinstance(operation, Put):
            if self._kept and self._kept[-1].index != state.index - 1:
                self._kept.clear()  # restored from a snapshot: what lies between is not known
            self._kept.append(GroupEntry(state.index, operation.term, operation.value, applied.id))
        elif isinstance(operation, Lead) and self._term_led not in (None, operation.term):
            assert self._term_led is not None
            self._depose(self._term_led)
        if not self._moves:
            task = asyncio.get_running_loop().create_task(self._tell(), name="group.tell")
            self._moves.add(task)
            task.add_done_callback(self._moves.discard)

    async def _tell(self) -> None:
        self._moves.clear()
        async with self._moved:
            self._moved.notify_all()

    async def _refresh(self) -> None:
        """Ask every now and then for the end of the log, so that our age is known."""
        while True:
            await asyncio.sleep(self.fresh_s * random.uniform(0.8, 1.0))
            try:
                await self._freshen(max(1.0, self.fresh_s))
            except DomainError:
                return  # whoever looks is told
            except (BusError, NotFoundError) as error:
                self._log.debug("age not known", error=str(error))

    async def _freshen(self, timeout: float) -> None:
        began = monotonic()
        await self._opened().read(timeout=timeout)
        self._fresh_at = max(began, self._fresh_at or began)

    @property
    def age_s(self) -> float:
        """Whatever was appended longer ago than this is known here; 0 while we lead."""
        if self.is_leader:
            return 0.0
        return float("inf") if self._fresh_at is None else monotonic() - self._fresh_at

    def view(self) -> GroupView:
        """What we know, at once, with its age.

        Raises:
            DomainError: the log could not be followed any more.
        """
        age_s = self.age_s
        state = self._opened().view
        return GroupView(self._domain.value(state), state.index, state.term, state.leader, age_s)

    async def read(self, *, max_age: float = 0.0, timeout: float = 5.0) -> GroupView:
        """What we know, if it is no older than *max_age*; else it is read first. 0: all before this call.

        Raises:
            BusTimeoutError, BusUnavailableError: it could not be read within *timeout*.
            DomainError: the log could not be followed any more.
        """
        asked = monotonic()
        if self.age_s > max_age:
            await self._freshen(timeout)
        found = self.view()
        if max_age or self.is_leader:
            return found
        return GroupView(found.value, found.index, found.term, found.leader, monotonic() - asked)

    @property
    def newest(self) -> GroupEntry | None:
        """The last entry that we know of; None: there is none, or it was before the last snapshot."""
        return self._kept[-1] if self._kept else None

    async def entries(self, *, after: int | None = None) -> AsyncIterator[GroupEntry]:
        """Each entry behind *after*, in order, as they come; None: from now on.

        A member keeps the newest 10,000 since it has joined, and finds those since the last snapshot
        but one (each 1,000 entries) in the log when it joins.

        Raises:
            NotFoundError: the entry behind *after* is not kept: take `view`, and go on behind its index.
            DomainError: the log could not be followed any more.
        """
        at = self._opened().view.index if after is None else after
        while True:
            while True:
                replica = self._replica
                if replica is None:
                    return
                if replica.view.index <= at:
                    break
                first = self._kept[0].index if self._kept else replica.view.index + 1
                if at + 1 < first:
                    raise NotFoundError(
                        f"Entry {at + 1} of the group {self.name} is not kept any more.",
                        hint="Take the value from `view`, and go on behind its index.",
                        index=replica.view.index,
                    )
                entry = self._kept[at + 1 - first]
                yield entry
                at = entry.index
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0), self._moved:
                    await self._moved.wait()


def leader_follower(
    connection: Connection,
    name: str,
    *,
    member: str | None = None,
    apply: Fold | None = None,
    initial: Any = None,
    ttl_s: float = 15.0,
    fresh_s: float = 0.5,
    replicas: int | None = None,
) -> Group:
    """Take part in the group *name*, as *member*; without one, observe it.

    Args:
        member: who we are; unique in the group. It follows, and leads when it is elected.
        apply: ``apply(value, entry)`` makes the next value; of JSON values, deterministic, and the same in
            all members. None: the value stays None, and `entries` are what counts.
        initial: the value before the first entry.
        ttl_s: how long the others wait after the last sign of a leader that died.
        fresh_s: how often a follower asks for the log's end: it is seldom older than that.
        replicas: copies of the log (as many as the cluster's streams have).

    Raises:
        ConfigError: an argument is wrong.

    Example:
        >>> async with leader_follower(cluster, "ledger", member="a", apply=add, initial=0) as group:
        ...     await group.led()
        ...     await group.append(5)
        ...     group.view().value
    """
    return Group(
        connection,
        name,
        member=member,
        apply=apply,
        initial=initial,
        ttl_s=ttl_s,
        fresh_s=fresh_s,
        replicas=replicas,
    )


__all__ = ["Group", "GroupEntry", "GroupView", "leader_follower"]
