"""What an agent knows of its children, and what it does when one of them has ended: a supervisor as in OTP.

Pure. The family is part of the agent's record, so it changes with the handler that spawned a child, or
not at all, and survives its activation. Each change gives orders, which leave with that commit as
signals of the agent to itself and are carried out by a handler of its own (`agent/kin.py`): in order,
once each.

An order has a number. What comes from a child names the order that started it; what names another
one, or repeats what is known, is no news and changes nothing. So each exit is handled once, whoever
repeats it and however late.

With `Strategy.ONE_FOR_ONE` the cluster restarts each child by itself, by `restart` and `restart_limit`,
and the parent hears of those that ended for good. With the others each abnormal end comes here: the
group is ended, and started again in its order once all have ended. More restarts than the limit
allows: all children end, and the agent itself, if it is so told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from foundation_nats.control.restarts import counted, too_many
from foundation_nats.errors import ConfigError
from foundation_schemas import ChildRecord, ChildStatus, FamilyRecord, RestartLimit

CHILDREN_MAX = 1_000
"""Of one agent: they are part of each of its commits."""


class Strategy(StrEnum):
    """Whom the failure of a child concerns."""

    ONE_FOR_ONE = "one_for_one"
    """Itself."""
    ONE_FOR_ALL = "one_for_all"
    """All children of the parent."""
    REST_FOR_ONE = "rest_for_one"
    """Those that were started after it, too."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """How an agent looks after its children: ``supervision = Supervision(strategy="one_for_all")``."""

    strategy: Strategy | str = Strategy.ONE_FOR_ONE
    max_restarts: int = 10
    """More restarts than this …"""
    within_s: float = 60.0
    """… within that time are too many: of one child, or of the group."""
    on_exhausted: str = "notify"
    """What then: ``notify``, or ``stop``: this agent stops, too, as a supervisor of OTP does."""

    def __post_init__(self) -> None:
        try:
            Strategy(self.strategy)
            RestartLimit(max_restarts=self.max_restarts, within_s=self.within_s)
        except ValueError as error:
            raise ConfigError(f"Supervision: {error}") from error
        if self.on_exhausted not in ("notify", "stop"):
            raise ConfigError(f"on_exhausted={self.on_exhausted!r}: use 'notify' or 'stop'")

    @property
    def limit(self) -> RestartLimit:
        """As a limit."""
        return RestartLimit(max_restarts=self.max_restarts, within_s=self.within_s)

    @property
    def is_group(self) -> bool:
        """Whether the parent itself restarts its children."""
        return self.strategy != Strategy.ONE_FOR_ONE


@dataclass(frozen=True, slots=True)
class Child:
    """A child as its parent sees it."""

    id: str
    tag: str
    run: str
    status: ChildStatus

    @property
    def target(self) -> str:
        """Where to send it signals: ``agent:ID``."""
        return f"agent:{self.id}"


@dataclass(frozen=True, slots=True)
class Order:
    """Something to be done about a child after the commit."""

    verb: str
    """``start``, ``stop`` or ``adopt``."""
    tag: str
    id: str
    order: int
    wish: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def encoded(self) -> dict[str, Any]:
        """As the data of a signal."""
        return {
            "verb": self.verb,
            "tag": self.tag,
            "id": self.id,
            "order": self.order,
            "wish": self.wish,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Heard:
    """What follows from something that was heard of a child."""

    family: FamilyRecord
    orders: tuple[Order, ...] = ()
    is_news: bool = False
    give_up: str | None = None
    """Why the agent itself shall stop."""


def children(family: FamilyRecord) -> dict[str, Child]:
    """The children by tag, in the order in which they were started."""
    return {item.tag: Child(item.id, item.tag, item.run, item.status) for item in family.children}


def find(family: FamilyRecord, tag: str) -> ChildRecord | None:
    """The child of this tag."""
    return next((item for item in family.children if item.tag == tag), None)


def spawned(
    family: FamilyRecord,
    tag: str,
    id: str,
    *,
    run: str,
    restart: str,
    digest: str,
    wish: dict[str, Any],
    keep: bool = False,
    verb: str = "start",
) -> tuple[FamilyRecord, list[Order]]:
    """Have a child; nothing changes if it is there and just so.

    Args:
        digest: of what it is started with.
        keep: the parent may start it again by itself.

    Raises:
        ConfigError: the id is that of another child, or there are too many.
    """
    known = find(family, tag)
    twin = next((item for item in family.children if item.id == id and item.tag != tag), None)
    if twin is not None:
        raise ConfigError(f"{id} is the child {twin.tag!r} already")
    if known is not None and known.id != id:
        raise ConfigError(f"the child {tag!r} is {known.id}; stop it first")
    if known is None and len(family.children) >= CHILDREN_MAX:
        raise ConfigError(f"an agent has at most {CHILDREN_MAX} children")
    if known is not None and known.status in (ChildStatus.STOPPING, ChildStatus.WAITING):
        update = {"again": True, "wish": wish, "digest": digest, "run": run, "restart": restart}
        return _with(family, known.model_copy(update=update)), []
    if known is not None and known.digest == digest:
        return family, []
    number = family.orders + 1 if known is None else known.order
    kept = wish if keep else None
    if known is None:
        child = ChildRecord(
            tag=tag, id=id, run=run, order=number, digest=digest, restart=restart, wish=kept
        )
        family = family.model_copy(update={"orders": number, "children": [*family.children, child]})
    else:
        update = {"run": run, "digest": digest, "restart": restart, "wish": kept}
        family = _with(family, known.model_copy(update=update))
    return family, [Order(verb, tag, id, number, wish)]


def stopping(family: FamilyRecord, tag: str, reason: str) -> tuple[FamilyRecord, list[Order]]:
    """Have a child no more; nothing changes if there is none.

    It stays among the children until it has ended.
    """
    known = find(family, tag)
    if known is None:
        return family, []
    if known.status is ChildStatus.WAITING:
        return _without(family, tag), []
    if known.status is ChildStatus.STOPPING:
        return _with(family, known.model_copy(update={"again": False})), []
    after = known.model_copy(update={"status": ChildStatus.STOPPING, "again": False})
    return _with(family, after), [Order("stop", tag, known.id, known.order, reason=reason)]


def started(family: FamilyRecord, tag: str, order: int) -> Heard:
    """A child says that it runs."""
    known = find(family, tag)
    if known is None or known.order != order or known.status is not ChildStatus.STARTING:
        return Heard(family)
    after = known.model_copy(update={"status": ChildStatus.RUNNING})
    return Heard(_with(family, after), is_news=True)


def exited(
    family: FamilyRecord,
    tag: str,
    order: int,
    status: str,
    reason: str,
    supervision: Supervision,
    at: str,
) -> Heard:
    """A child has ended for good, as far as the cluster is concerned.

    Args:
        status: ``stopped``; ``failed``; ``refused``: it was not even started.
        at: the time, UTC.
    """
    known = find(family, tag)
    if known is None or known.order != order or known.status is ChildStatus.WAITING:
        return Heard(family)
    if known.status is ChildStatus.STOPPING:
        if not known.again:
            return _resumed(_without(family, tag), ())
        if known.wish is not None and not supervision.is_group:
            return _resumed(_with(family, _waiting(known)), (tag,))
        return _resumed(_with(family, _waiting(known)), ())
    wants_restart = known.restart == "permanent" or (
        known.restart == "transient" and status == "failed"
    )
    if not supervision.is_group or not wants_restart or known.wish is None:
        give_up = status == "failed" and supervision.on_exhausted == "stop"
        why = f"its child {known.id} has failed: {reason}" if give_up else None
        return Heard(_without(family, tag), is_news=True, give_up=why)
    times = counted(family.restarts, supervision.limit, at)
    if times is None:
        return _exhausted(_without(family, tag), supervision, reason)
    family = family.model_copy(update={"restarts": times})
    return _regrouped(family, known, supervision)


def _regrouped(family: FamilyRecord, failed: ChildRecord, supervision: Supervision) -> Heard:
    """End those whom the failure concerns; all of them are to be started again."""
    everyone = list(family.children)
    place = next(i for i, item in enumerate(everyone) if item.tag == failed.tag)
    concerned = everyone if supervision.strategy == Strategy.ONE_FOR_ALL else everyone[place:]
    orders: list[Order] = []
    for item in reversed(concerned):
        if item.tag == failed.tag:
            family = _with(family, _waiting(item))
        elif item.status in (ChildStatus.STARTING, ChildStatus.RUNNING):
            after = item.model_copy(
                update={"status": ChildStatus.STOPPING, "again": item.restart != "temporary"}
            )
            family = _with(family, after)
            why = f"it is restarted with {failed.tag}"
            orders.append(Order("stop", item.tag, item.id, item.order, reason=why))
    found = _resumed(family, ())
    return Heard(found.family, (*orders, *found.orders), is_news=True)


def _exhausted(family: FamilyRecord, supervision: Supervision, reason: str) -> Heard:
    orders: list[Order] = []
    for item in reversed(family.children):
        family, more = stopping(family, item.tag, "its siblings failed too often")
        orders += more
    why = f"{too_many(supervision.limit)} of its children: {reason}"
    return Heard(
        family,
        tuple(orders),
        is_news=True,
        give_up=why if supervision.on_exhausted == "stop" else None,
    )


def _resumed(family: FamilyRecord, alone: Iterable[str]) -> Heard:
    """Start those that wait: *alone*, or all once nobody of the group is still ending."""
    ready = [*alone]
    if not ready and not any(
        item.again and item.status is ChildStatus.STOPPING for item in family.children
    ):
        ready = [item.tag for item in family.children if item.status is ChildStatus.WAITING]
    orders: list[Order] = []
    for item in family.children:
        if item.tag not in ready or item.wish is None:
            continue
        number = family.orders + 1
        after = item.model_copy(
            update={"status": ChildStatus.STARTING, "order": number, "again": False}
        )
        family = _with(family, after).model_copy(update={"orders": number})
        orders.append(Order("start", item.tag, item.id, number, item.wish))
    return Heard(family, tuple(orders), is_news=True)


def _waiting(child: ChildRecord) -> ChildRecord:
    return child.model_copy(update={"status": ChildStatus.WAITING, "again": True})


def _with(family: FamilyRecord, child: ChildRecord) -> FamilyRecord:
    found = [child if item.tag == child.tag else item for item in family.children]
    return family.model_copy(update={"children": found})


def _without(family: FamilyRecord, tag: str) -> FamilyRecord:
    found = [item for item in family.children if item.tag != tag]
    return family.model_copy(update={"children": found})
