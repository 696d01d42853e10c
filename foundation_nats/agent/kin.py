"""Children of an agent, from the side of its handlers: `spawn`, and what is heard of them.

What a handler asks for changes its family (`family.py`, pure) and becomes an order: a signal of the
agent to itself, stored in the same commit. `carry_out` handles it: it writes the wish for the child
(`control/children.py`), which the cluster makes true like any other. A parent that dies in between
has stored either neither or both, and its next activation goes on.

`hear` stands before every handler: it tells what is news of the family from what is a repeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from pydantic import BaseModel, ValidationError

from foundation_nats.agent.context import Context, Emission, freeze
from foundation_nats.agent.family import (
    Order,
    Supervision,
    exited,
    find,
    spawned,
    started,
    stopping,
)
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Payload, Signal
from foundation_nats.base.failpoint import failpoint
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.subjects import Subjects
from foundation_nats.control.children import adopt_child, end_child, wish_child
from foundation_nats.control.declaring import declared
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    FencedError,
    NotFoundError,
)
from foundation_schemas import (
    ChildStatus,
    ClassInfo,
    Deployment,
    FamilyRecord,
    OnParentDeath,
    ParentLink,
    RestartLimit,
    Target,
    TargetKind,
)
from foundation_schemas.base import NAME_LENGTH_MAX, check_name

if TYPE_CHECKING:
    from foundation_nats.agent.agent import Agent

ORDER = "foundation.child.order"
"""The type of the signal that carries an order."""
STARTED = "foundation.child.started"
EXITED = "foundation.child.exited"
ORPHANED = "foundation.orphaned"
_PLACES = ("cluster", "local")
_RETRY_MAX_S = 1.0


class ChildStarted(Payload, type=STARTED):
    """A child runs for the first time."""

    id: str
    tag: str
    order: int
    node: str = ""


class ChildExited(Payload, type=EXITED):
    """A child has ended for good: it is not started again, unless by this agent."""

    id: str
    tag: str
    order: int
    status: str
    """``stopped``; ``failed``; ``refused``: it could not be had at all."""
    reason: str = ""


class Orphaned(Payload, type=ORPHANED):
    """The parent has ended for good, and this agent goes on."""

    parent: str
    tag: str
    reason: str
    order: int


@dataclass(frozen=True, slots=True)
class Parent:
    """Whose child an agent is."""

    id: str
    tag: str
    """What it is called there."""
    is_gone: bool
    """It has ended for good, as far as this agent has heard."""

    @property
    def target(self) -> str:
        """Where to send it signals: ``agent:ID``."""
        return f"agent:{self.id}"


class Nursery(Protocol):
    """Who carries orders out."""

    async def start(self, wish: Deployment) -> str | None:
        """Have the child run; returns why that can't be."""

    async def stop(self, parent: str, child: str, order: int, reason: str) -> bool:
        """Have it end; False: there is none."""

    async def adopt(self, child: str, link: ParentLink) -> str | None:
        """Make it a child of another; returns why that can't be."""


class WishingNursery:
    """Writes wishes for the cluster to make true."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        may_write: Callable[[], bool],
        describe: Callable[[str], ClassInfo],
    ) -> None:
        self._bucket = Bucket(bus, subjects, "desired")
        self._may_write = may_write
        self._describe = describe

    async def start(self, wish: Deployment) -> str | None:
        info = self._describe(wish.spec.run)
        if not info.ok:
            return info.error or f"{wish.spec.run} can't run"
        return await wish_child(self._bucket, declared(wish, info), may_write=self._may_write)

    async def stop(self, parent: str, child: str, order: int, reason: str) -> bool:
        return await end_child(
            self._bucket, parent, child, order, reason, may_write=self._may_write
        )

    async def adopt(self, child: str, link: ParentLink) -> str | None:
        return await adopt_child(self._bucket, child, link, may_write=self._may_write)


def join(
    agent: Agent, link: ParentLink | None, family: FamilyRecord | None, nursery: Nursery
) -> None:
    """Give an activation its kin, as they are stored."""
    context = agent.ctx
    context._link = link
    context._nursery = nursery
    context._supervision = type(agent).supervision
    context._family = context._family_kept = family or FamilyRecord()


# ---- what handlers ask for -------------------------------------------------------------


def child_id(parent: str, tag: str) -> str:
    """What a child is called that nobody has named: the same whenever it is asked."""
    name = f"{parent}_{tag}"
    if len(name) <= NAME_LENGTH_MAX - 8:
        return name
    digest = blake2b(name.encode(), digest_size=8).hexdigest()
    return f"{name[: NAME_LENGTH_MAX - 32]}_{digest}"


def spawn(
    context: Context,
    run: Any,
    *,
    tag: str | None,
    id: str | None,
    on_parent_death: str,
    restart: str,
    restart_limit: RestartLimit | Mapping[str, Any] | None,
    place: str,
    spec: Mapping[str, Any],
) -> str:
    """See `Context.spawn`.

    Raises:
        ConfigError: an argument is wrong.
    """
    from foundation_nats.agent.loading import run_name

    name = run if isinstance(run, str) else run_name(run)
    family = context._family
    if place not in _PLACES:
        raise ConfigError(f"place={place!r}: use 'cluster' or 'local'")
    supervision = context._supervision
    keep = supervision.is_group
    try:
        tag = check_name(tag or id or str(family.orders + 1))
        id = check_name(id or child_id(context.agent_id, tag))
        link = ParentLink(
            id=context.agent_id,
            tag=tag,
            order=0,
            on_death=OnParentDeath(on_parent_death),
            local=place == "local",
        )
        given = {key: value for key, value in spec.items() if value not in (None, (), {})}
        limit = supervision.limit if restart_limit is None else restart_limit
        wish = Deployment.model_validate(
            {
                "name": id,
                "standalone": True,
                "spec": {
                    **given,
                    "run": name,
                    # A group is restarted by its parent: each end of one has to come here.
                    "restart": "temporary" if keep else restart,
                    **({} if keep else {"restart_limit": limit}),
                    "parent": link,
                },
            }
        )
        if restart not in ("permanent", "transient", "temporary"):
            raise ValueError(f"restart={restart!r}: use permanent, transient or temporary")
    except (ValueError, ValidationError) as error:
        raise ConfigError(f"spawn({name!r}): {error}") from error
    if id == context.agent_id:
        raise ConfigError(f"{id} can't be its own child")
    # What was not given must stay so: the class may say something there.
    values = wish.model_dump(mode="json", exclude_unset=True)
    raw = orjson.dumps([values, restart], option=orjson.OPT_SORT_KEYS)
    family, orders = spawned(
        family,
        tag,
        id,
        run=name,
        restart=restart,
        digest=blake2b(raw, digest_size=6).hexdigest(),
        wish=values,
        keep=keep,
    )
    _give(context, family, orders)
    return id


def stop_child(context: Context, tag: str, reason: str) -> bool:
    """See `Context.stop_child`."""
    known = find(context._family, tag)
    family, orders = stopping(context._family, tag, reason)
    _give(context, family, orders)
    return known is not None


def adopt(context: Context, id: str, tag: str | None, on_parent_death: str) -> str:
    """See `Context.adopt`.

    Raises:
        ConfigError: an argument is wrong.
    """
    try:
        tag, id = check_name(tag or id), check_name(id)
        link = ParentLink(
            id=context.agent_id, tag=tag, order=0, on_death=OnParentDeath(on_parent_death)
        )
    except ValueError as error:
        raise ConfigError(f"adopt({id!r}): {error}") from error
    family, orders = spawned(
        context._family,
        tag,
        id,
        run="",
        restart="transient",
        digest="adopted",
        wish=link.model_dump(mode="json"),
        verb="adopt",
    )
    _give(context, family, orders)
    return tag


def _give(context: Context, family: FamilyRecord, orders: list[Order] | tuple[Order, ...]) -> None:
    context._family = family
    target = Target(kind=TargetKind.AGENT, name=context.agent_id)
    context._emissions += [Emission(target, ORDER, freeze(item.encoded())) for item in orders]


# ---- carrying out ----------------------------------------------------------------------


async def carry_out(agent: AnyAgent, data: Mapping[str, Any]) -> None:
    """Handle one order; waits for as long as the bus is away."""
    order = Order(**data)
    context = agent.ctx
    known = find(context._family, order.tag)
    if known is None or known.order != order.order:
        return
    delay = 0.05
    while True:
        try:
            failpoint("child.before_wish")
            why = await _try(context, order, is_wanted=known.status is not ChildStatus.STOPPING)
            failpoint("child.after_wish")
            break
        except FencedError:
            # Ends the activation if it is not ours any more.
            await context._steps_home.store_steps()
        except (BusTimeoutError, BusUnavailableError, NotFoundError):
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MAX_S)
    if why is None:
        return
    status = "stopped" if order.verb == "stop" else "refused"
    _tell_myself(
        context,
        EXITED,
        {"id": order.id, "tag": order.tag, "order": order.order, "status": status, "reason": why},
    )


async def _try(context: Context, order: Order, *, is_wanted: bool) -> str | None:
    """Returns why there is no such child (any more), if so."""
    nursery = context._nursery
    assert nursery is not None
    if order.verb == "stop":
        there = await nursery.stop(context.agent_id, order.id, order.order, order.reason)
        return None if there else order.reason
    if not is_wanted:
        return None  # the order to stop it is behind this one, and finds nothing
    if order.verb == "adopt":
        link = ParentLink.model_validate({**order.wish, "order": order.order})
        return await nursery.adopt(order.id, link)
    spec = order.wish["spec"]
    signal = "" if context.signal is None else context.signal.id
    spec = {**spec, "parent": {**spec["parent"], "order": order.order, "signal": signal}}
    return await nursery.start(Deployment.model_validate({**order.wish, "spec": spec}))


def _tell_myself(context: Context, type: str, data: Mapping[str, Any]) -> None:
    target = Target(kind=TargetKind.AGENT, name=context.agent_id)
    context._emissions.append(Emission(target, type, freeze(data)))


# ---- hearing ---------------------------------------------------------------------------


def announce(agent: AnyAgent) -> None:
    """At the first start as somebody's child: tell the parent."""
    context = agent.ctx
    link = context._link
    if link is None or context._family.announced == link.order:
        return
    context._family = context._family.model_copy(
        update={"announced": link.order, "orphaned": False}
    )
    data = {"id": context.agent_id, "tag": link.tag, "order": link.order, "node": context.node}
    target = Target(kind=TargetKind.AGENT, name=link.id)
    context._emissions.append(Emission(target, STARTED, freeze(data)))


def is_of_kin(type: str) -> bool:
    """Whether a signal of this type must be heard before it is handled."""
    return type in (STARTED, EXITED, ORPHANED)


def hear(agent: AnyAgent, signal: Signal[Any]) -> bool:
    """Take note of what a signal says of the family; whether that is news."""
    context = agent.ctx
    family = context._family
    data = signal.data.model_dump() if isinstance(signal.data, BaseModel) else signal.data
    if not isinstance(data, Mapping):
        return False
    tag, order = str(data.get("tag")), data.get("order")
    if not isinstance(order, int):
        return False
    if signal.type == ORPHANED:
        link = context._link
        if link is None or link.order != order or family.orphaned:
            return False
        context._family = family.model_copy(update={"orphaned": True})
        return True
    if signal.type == STARTED:
        found = started(family, tag, order)
    else:
        found = exited(
            family,
            tag,
            order,
            str(data.get("status")),
            str(data.get("reason") or ""),
            context._supervision,
            context.now().isoformat(),
        )
    _give(context, found.family, found.orders)
    if found.give_up is not None:
        context.stop(found.give_up)
    return found.is_news


__all__ = ["ChildExited", "ChildStarted", "Orphaned", "Parent", "Supervision"]
