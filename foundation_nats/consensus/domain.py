"""A replicated domain: what users declare, and the machine that turns a log into a state.

Pure. Every replica feeds the same entries in the same order to a `Machine` and
gets the same state, provided that `apply` is deterministic: no clock, no
randomness, no iteration over sets. An entry that can't be applied is skipped,
by every replica alike, and takes its revision all the same.

Replicas do not validate again what is in the log: accepted is accepted, so
that a validator may change without changing the past (Schneider,
*Implementing fault-tolerant services using the state machine approach*, 1990).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from foundation_nats.errors import (
    ConfigError,
    DomainError,
    PayloadInvalidError,
    ProposalRejectedError,
    ProposalUnknownError,
)
from foundation_schemas import DomainEntry, DomainRecent, DomainSnapshot
from foundation_schemas.base import check_name

S = TypeVar("S", bound=BaseModel)
O = TypeVar("O")  # noqa: E741  state and operation, as everywhere in the literature

_ID = re.compile(r"[A-Za-z0-9_.:/=-]{1,128}\Z")
_REASON_MAX = 500


class Domain(Generic[S, O]):
    """The declaration of a replicated domain; subclass it.

    `State` must have a default for every field: a domain begins as ``State()``.
    `Operation` is a model, or a union of models (best discriminated by a
    ``Literal`` field). `validate` and `apply` depend on nothing but their
    arguments; `apply` returns the next state. It may change and return the
    state it was given, which is a copy.

    Example:
        >>> class Seats(Domain):
        ...     name = "seats"
        ...     State = Plan
        ...     Operation = Book | Cancel
        ...
        ...     def validate(self, state, operation):
        ...         return "taken" if operation.seat in state.taken else None
        ...
        ...     def apply(self, state, operation):
        ...         state.taken[operation.seat] = operation.by
        ...         return state
    """

    name: ClassVar[str] = ""
    """The same in every process; letters, digits, ``-``, ``_``."""
    version: ClassVar[int] = 1
    """Raise it when `apply` changes: processes of an older version then stop instead of diverging."""
    snapshot_every: ClassVar[int] = 1000
    """Entries between snapshots; the log keeps what lies behind the snapshot before the newest."""
    ids_kept: ClassVar[int] = 4096
    """A repeated proposal is noticed among this many newest entries."""
    log_max: ClassVar[int] = 50_000
    """Beyond this many entries without a snapshot proposals are refused."""
    pure: ClassVar[bool] = False
    """Say True where `apply` and readers never change the state: saves a deep copy for each."""

    State: type[S]
    Operation: Any

    def validate(self, state: S, operation: O) -> str | None:
        """Why *operation* can't be accepted in *state*; None: it can."""
        return None

    def apply(self, state: S, operation: O) -> S:
        """The state after *operation*."""
        raise NotImplementedError


class ProposalStatus(StrEnum):
    """What became of a proposal."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    NOT_FOUND = "not_found"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What became of a proposal, as far as it is known."""

    id: str
    status: ProposalStatus
    revision: int
    """Accepted: its own. Else: the domain's, when this was found."""
    reason: str = ""
    final: bool = True
    """Whether it can never become another."""

    @property
    def accepted(self) -> bool:
        """Whether it took effect for certain."""
        return self.status is ProposalStatus.ACCEPTED

    def check(self) -> int:
        """The revision.

        Raises:
            ProposalRejectedError: it took no effect.
            ProposalUnknownError: it is not known whether it did.
        """
        match self.status:
            case ProposalStatus.ACCEPTED:
                return self.revision
            case ProposalStatus.REJECTED:
                raise ProposalRejectedError(
                    f"Rejected: {self.reason}", id=self.id, revision=self.revision
                )
            case ProposalStatus.UNKNOWN | ProposalStatus.NOT_FOUND:
                raise ProposalUnknownError(
                    f"It is not known whether proposal {self.id} is accepted: {self.reason}",
                    hint="Ask `status(id)`, or propose it again with the same id.",
                    id=self.id,
                    revision=self.revision,
                )


@dataclass(frozen=True, slots=True)
class Applied:
    """An entry has taken its place."""

    revision: int
    id: str
    operation: Any
    """None where the entry was skipped before it was understood."""
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Misfit:
    """An entry does not follow what is applied: a gap, a log gone back in time, or a foreign entry.

    The shell finds out which, and then restores or calls `Machine.skip`.
    """

    revision: int
    why: str
    after: int | None = None
    """The revision it claims to follow; None: it is no entry at all."""


def check_id(id: str) -> str:
    """*id*, if it may be that of a proposal.

    Raises:
        ConfigError: it may not.
    """
    if not _ID.match(id):
        raise ConfigError(
            f"{id[:40]!r} can't be a proposal's id: use 1 to 128 letters, digits or _.:/=-"
        )
    return id


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _raised(what: str, error: Exception) -> str:
    return f"{what} raised {type(error).__name__}: {error}"[:_REASON_MAX]


class Machine(Generic[S, O]):
    """One domain at one revision."""

    def __init__(self, domain: Domain[S, O]) -> None:
        """
        Raises:
            ConfigError: the declaration is not complete; names what is missing.
        """
        self.domain = domain
        kind = type(domain).__name__
        try:
            self.name = check_name(domain.name)
        except ValueError as error:
            raise ConfigError(f"Domain {kind}: name: {error}") from error
        for field in ("State", "Operation"):
            if not hasattr(domain, field):
                raise ConfigError(f"Domain {self.name}: the class {kind} declares no {field}.")
        if domain.snapshot_every < 1 or domain.ids_kept < 1:
            raise ConfigError(f"Domain {self.name}: snapshot_every and ids_kept must be positive.")
        self._operations: TypeAdapter[O] = TypeAdapter(domain.Operation)
        try:
            self.state: S = domain.State()
        except ValidationError as error:
            raise ConfigError(
                f"Domain {self.name}: its State has no default for {_first(error)}.",
                hint="A domain begins as State(): give every field a default.",
            ) from error
        self.revision = 0
        self.last_id = ""
        self.entries = 0
        self._recent: OrderedDict[str, DomainRecent] = OrderedDict()

    # ---- deciding ---------------------------------------------------------------

    def copy(self) -> S:
        """The state, for somebody who may change it."""
        return self.state if self.domain.pure else self.state.model_copy(deep=True)

    def parse(self, operation: Any) -> O:
        """*operation* (a model, or what JSON gives) as every replica will read it from the log.

        Raises:
            PayloadInvalidError: it fits none of the domain's models.
        """
        try:
            mine = self._operations.validate_python(operation)
            return self._operations.validate_json(self._operations.dump_json(mine))
        except ValidationError as error:
            raise PayloadInvalidError(
                f"Not an operation of domain {self.name}: {_first(error)}.",
                errors=error.errors(include_url=False, include_input=False, include_context=False),
            ) from error

    def dump(self, operation: O) -> Any:
        """*operation* as JSON values."""
        return self._operations.dump_python(operation, mode="json")

    def judge(self, operation: O) -> str | S:
        """The reason why *operation* can't be accepted now, or the state after it."""
        try:
            reason = self.domain.validate(self.copy(), operation)
        except Exception as error:  # a user's code: whatever it raises is its verdict
            return _raised("validate", error)
        if reason is not None:
            return str(reason) or "no reason given"
        try:
            return self._next(operation)
        except Exception as error:  # it would be skipped by all: it need not get into the log
            return _raised("apply", error)

    def _next(self, operation: O) -> S:
        after = self.domain.apply(self.copy(), operation)
        if not isinstance(after, self.domain.State):
            raise TypeError(f"it returned {type(after).__name__}, not the State")
        return after

    def seen(self, id: str) -> DomainRecent | None:
        """What is remembered of the proposal *id*."""
        return self._recent.get(id)

    # ---- following --------------------------------------------------------------

    def follow(self, revision: int, data: bytes) -> Applied | Misfit:
        """Take the next entry of the log.

        Raises:
            DomainError: it is of a newer version than this code.
        """
        assert revision > self.revision
        try:
            entry = DomainEntry.model_validate_json(data)
        except ValidationError as error:
            return Misfit(revision, f"it is no entry ({_first(error)})")
        if entry.after != self.revision or entry.after_id != self.last_id:
            why = f"it follows revision {entry.after}, not {self.revision}"
            return Misfit(revision, why, entry.after)
        if entry.version > self.domain.version:
            raise DomainError(
                f"Domain {self.name} has operations of version {entry.version}; this process "
                f"knows version {self.domain.version}.",
                hint="Upgrade this program.",
                revision=revision,
            )
        if entry.id in self._recent:
            was = self._recent[entry.id].revision
            return self._skip(revision, entry.id, f"its id took effect at revision {was}")
        try:
            operation = self._operations.validate_json(orjson.dumps(entry.operation))
        except ValidationError as error:
            return self._skip(revision, entry.id, f"not an operation: {_first(error)}")
        try:
            after = self._next(operation)
        except Exception as error:  # deterministic by contract, hence skipped by every replica
            return self._skip(revision, entry.id, _raised("apply", error), operation)
        return self.take(revision, entry.id, operation, after)

    def take(self, revision: int, id: str, operation: O, after: S) -> Applied:
        """Move to *after*, the judged outcome of an entry that is known to be next."""
        self.state = after
        self._advance(revision, id)
        self._remember(DomainRecent(id=id, revision=revision))
        return Applied(revision, id, operation)

    def skip(self, misfit: Misfit) -> Applied:
        """Pass over something in the log that is no entry of this log."""
        return self._skip(misfit.revision, f"?{misfit.revision}", misfit.why)

    def _skip(self, revision: int, id: str, why: str, operation: Any = None) -> Applied:
        self._advance(revision, id)
        if id not in self._recent:
            self._remember(DomainRecent(id=id, revision=revision, skipped=why[:_REASON_MAX]))
        return Applied(revision, id, operation, why)

    def _advance(self, revision: int, id: str) -> None:
        self.revision, self.last_id = revision, id
        self.entries += 1

    def _remember(self, recent: DomainRecent) -> None:
        self._recent[recent.id] = recent
        while len(self._recent) > self.domain.ids_kept:
            self._recent.popitem(last=False)

    # ---- snapshots --------------------------------------------------------------

    def snapshot(self, *, by: str, at: str) -> DomainSnapshot:
        """All that is needed to go on from here."""
        return DomainSnapshot(
            revision=self.revision,
            last_id=self.last_id,
            state=self.state.model_dump(mode="json"),
            recent=list(self._recent.values()),
            entries=self.entries,
            by=by,
            at=at,
            version=self.domain.version,
        )

    def restore(self, snapshot: DomainSnapshot) -> None:
        """Go to where *snapshot* was taken.

        Raises:
            DomainError: it is of a newer version, or does not fit the State; nothing has changed.
        """
        if snapshot.version > self.domain.version:
            raise DomainError(
                f"Domain {self.name} has a snapshot of version {snapshot.version}; this process "
                f"knows version {self.domain.version}.",
                hint="Upgrade this program.",
            )
        try:
            state = self.domain.State.model_validate_json(orjson.dumps(snapshot.state))
        except ValidationError as error:
            raise DomainError(
                f"The snapshot of domain {self.name} at revision {snapshot.revision} does not fit "
                f"its State: {_first(error)}.",
                hint="Give new fields defaults and keep the old ones; nothing was overwritten.",
            ) from error
        self.state = state
        self.revision, self.last_id = snapshot.revision, snapshot.last_id
        self.entries = snapshot.entries
        self._recent = OrderedDict((recent.id, recent) for recent in snapshot.recent)

    def reset(self) -> None:
        """Go to the beginning."""
        self.state = self.domain.State()
        self.revision, self.last_id, self.entries = 0, "", 0
        self._recent.clear()
