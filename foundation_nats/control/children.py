"""Wishes for children, written by the worker that runs their parent.

IO: compare-and-set writes of the bucket ``desired``. Each function does what one order of the
parent says, however often it is called: the wish names the order that made it, and what is left of
a wish that was deleted does, too. A child may have come and gone before its parent, which has died
meanwhile, carries out the same order once more.

A parent that was replaced must not change what its successor has ordered. So *may_write* is asked
between the reading and the conditional write: an activation that may still write then is the newest
one, and any later change is seen by the condition. (Not beyond the hour that tombstones live.)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from foundation_nats.base.clock import utc_text
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, encode
from foundation_nats.control.rollouts import succeeding
from foundation_nats.errors import FencedError, StaleRevisionError
from foundation_schemas import Deployment, Ending, ParentLink, UpdatePolicy

_REPLICA = re.compile(r"(.+)-(0|[1-9]\d*)")


async def wish_child(
    bucket: Bucket, wish: Deployment, *, may_write: Callable[[], bool]
) -> str | None:
    """Wish for a child; returns why that can't be, None: it is wished for.

    Raises:
        FencedError: *may_write* says no; nothing was written.
        BusUnavailableError, BusTimeoutError: try again.
    """
    link = wish.spec.parent
    assert link is not None
    match = _REPLICA.fullmatch(wish.name)
    if match is not None:
        other = _wish(await bucket.read(match[1]))
        if other is not None and other.replicas is not None and int(match[2]) < other.replicas:
            return f"{wish.name} is the id of a replica of the deployment {other.name}"
    while True:
        entry = await bucket.read(wish.name)
        known = _wish(entry)
        if known is None:
            if entry is not None and entry.mark and entry.mark == link.signal:
                return None  # it was there, and has ended; the parent will hear of it
            after = wish
        else:
            theirs = known.spec.parent
            if theirs is None or theirs.id != link.id:
                whose = "a deployment" if theirs is None else f"a child of {theirs.id}"
                return f"{wish.name} is {whose} already"
            if theirs.order == link.order and known.spec == wish.spec:
                return None
            if known.ending is not None and theirs.order >= link.order:
                return f"{wish.name} is still ending as {theirs.tag}"
            # A parent gives a newer order only once it was told of the end: the old wish is about
            # to be deleted, on condition that nobody has changed it.
            fresh = {"spec": wish.spec, "ending": None, "orphaned": False}
            after = succeeding(known, known.model_copy(update=fresh), at=utc_text())
        if await _write(bucket, wish.name, entry, after, may_write):
            return None


async def end_child(
    bucket: Bucket,
    parent: str,
    child: str,
    order: int,
    reason: str,
    *,
    may_write: Callable[[], bool],
) -> bool:
    """Wish for a child no more; False: there is no such child, so its end will not be told.

    Raises:
        FencedError: *may_write* says no; nothing was written.
        BusUnavailableError, BusTimeoutError: try again.
    """
    while True:
        entry = await bucket.read(child)
        known = _wish(entry)
        link = None if known is None else known.spec.parent
        if known is None or link is None or link.id != parent or link.order != order:
            return False
        if known.ending is not None:
            return True
        after = known.model_copy(
            update={"ending": Ending(reason=reason), "revision": known.revision + 1}
        )
        if await _write(bucket, child, entry, after, may_write):
            return True


async def adopt_child(
    bucket: Bucket, child: str, link: ParentLink, *, may_write: Callable[[], bool]
) -> str | None:
    """Make an agent that has no living parent a child; returns why that can't be.

    Raises:
        FencedError: *may_write* says no; nothing was written.
        BusUnavailableError, BusTimeoutError: try again.
    """
    while True:
        entry = await bucket.read(child)
        known = _wish(entry)
        if known is None or known.ending is not None:
            return f"there is no agent {child} that could be adopted"
        if not known.standalone:
            return f"{child} belongs to a deployment"
        theirs = known.spec.parent
        if theirs is not None and theirs.id == link.id and theirs.order == link.order:
            return None
        lives = theirs is not None and not known.orphaned and await _is_wanted(bucket, theirs.id)
        if theirs is not None and lives:
            return f"{child} has a parent, {theirs.id}"
        spec = known.spec.model_copy(update={"parent": link})
        changed = known.model_copy(
            # A way back would lead to the parent that is no more.
            update={"spec": spec, "orphaned": False, "update": UpdatePolicy(rollback=False)}
        )
        after = succeeding(known, changed, at=utc_text())
        if await _write(bucket, child, entry, after, may_write):
            return None


async def _is_wanted(bucket: Bucket, agent: str) -> bool:
    found = _wish(await bucket.read(agent))
    if found is not None:
        return found.ending is None
    match = _REPLICA.fullmatch(agent)
    other = None if match is None else _wish(await bucket.read(match[1]))
    if other is None or other.replicas is None or match is None:
        return False
    return int(match[2]) < other.replicas


def _wish(entry: Entry | None) -> Deployment | None:
    if entry is None or entry.value is None:
        return None
    return decode(Deployment, entry.value)


async def _write(
    bucket: Bucket,
    name: str,
    entry: Entry | None,
    after: Deployment,
    may_write: Callable[[], bool],
) -> bool:
    if not may_write():
        raise FencedError(f"{name} is not ours to change any more.")
    expected = 0 if entry is None else entry.revision
    try:
        await bucket.replace(name, encode(after), expected=expected)
    except StaleRevisionError:
        return False
    return True
