"""Who has ended for good, and what that means for children and parents.

Pure and level-triggered, like the planner: it looks at wishes and records, so any leader goes on
where another one stopped. A failover, a move, a restart and hibernation are no ends. Ended for
good is an agent

- that nobody wishes for any more (it was stopped or deleted, or its deployment has fewer replicas);
- that stopped itself and is not ``restart: permanent``;
- that failed and is ``temporary``, or was quarantined;
- that was stopped because its node is down (``on_node_loss: stop``, or ``temporary``).

The end of a child has three steps, each a compare-and-set or a signal with an id of its own, and each
repeated until it is done: `Deployment.ending` is set, so that the planner wants it no more; once its
record is gone the parent is told; then the wish is deleted.

What becomes of a parent's children when it has ended is in their link: they end, go on, or are told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from foundation_nats.cluster.registry import Held
from foundation_nats.control.planner import QUARANTINED
from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    Deployment,
    Ending,
    OnParentDeath,
)

_REPLICA = re.compile(r"(.+)-(0|[1-9]\d*)")


@dataclass(frozen=True, slots=True)
class End:
    """The child shall not run any more."""

    child: str
    ending: Ending


@dataclass(frozen=True, slots=True)
class TellOrphan:
    """The child goes on, and shall hear that its parent has ended."""

    child: str
    reason: str


@dataclass(frozen=True, slots=True)
class Bury:
    """The child has ended: tell its parent, then forget the wish."""

    child: str
    ending: Ending


Step = End | TellOrphan | Bury


def owner_of(agent: str, desired: Mapping[str, Deployment]) -> Deployment | None:
    """The deployment that wants *agent* to run; None: nobody does."""
    found = desired.get(agent)
    if found is None or found.replicas is not None:
        match = _REPLICA.fullmatch(agent)
        found = None if match is None else desired.get(match[1])
        if found is None or found.replicas is None or match is None:
            return None
        if int(match[2]) >= found.replicas:
            return None
    return None if found.ending is not None else found


def ended(record: AgentRecord, digest: str) -> Ending | None:
    """How a wished agent has ended for good; None: it runs, or is going to."""
    if record.digest != digest or record.desired != "run" or record.move is not None:
        return None
    reason = record.reason or ""
    origin = record.recovered_from
    match record.status:
        case AgentStatus.STOPPED:
            if origin is not None and origin.reason == "node_down" and origin.epoch == record.epoch:
                return Ending(status="failed", reason=reason)
            if record.spec.restart != "permanent":
                return Ending(status="stopped", reason=reason)
        case AgentStatus.FAILED:
            if record.spec.restart == "temporary" or reason.startswith(QUARANTINED):
                return Ending(status="failed", reason=reason)
        case _:
            pass
    return None


def kin_id(what: str, child: str, parent: str, order: int) -> str:
    """The id of a signal about a child: the same whoever sends it."""
    text = f"kin\n{what}\n{child}\n{parent}\n{order}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def decide(
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    digest_of: Callable[[Deployment], str],
    names: Iterable[str] | None = None,
) -> list[Step]:
    """What is to be done about children now; *names*: the wishes to look at, None: all."""
    steps: list[Step] = []
    for name in desired if names is None else names:
        wish = desired.get(name)
        if wish is None or wish.spec.parent is None:
            continue
        step = _look_at(wish, desired, held, digest_of)
        if step is not None:
            steps.append(step)
    return steps


def _look_at(
    wish: Deployment,
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    digest_of: Callable[[Deployment], str],
) -> Step | None:
    link = wish.spec.parent
    assert link is not None
    item = held.get(wish.name)
    if wish.ending is not None:
        return Bury(wish.name, wish.ending) if item is None else None
    if item is not None:
        own = ended(item.record, digest_of(wish))
        if own is not None:
            return End(wish.name, own)
    if wish.orphaned or link.on_death is OnParentDeath.CONTINUE:
        return None
    why = _parent_end(link.id, desired, held, digest_of)
    if why is None:
        return None
    if link.on_death is OnParentDeath.STOP:
        return End(wish.name, Ending(reason=f"its parent {link.id} {why}"))
    return TellOrphan(wish.name, why)


def _parent_end(
    parent: str,
    desired: Mapping[str, Deployment],
    held: Mapping[str, Held],
    digest_of: Callable[[Deployment], str],
) -> str | None:
    owner = owner_of(parent, desired)
    if owner is None:
        return "is not wished for any more"
    item = held.get(parent)
    found = None if item is None else ended(item.record, digest_of(owner))
    if found is None:
        return None
    return f"{found.status}: {found.reason}" if found.reason else found.status
