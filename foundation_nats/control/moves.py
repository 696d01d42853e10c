"""How far moves of running agents have come, and which may begin now.

Pure. A move is data in the agent's record: status ``moving``, ``desired: stop``
and where it shall go. The node that runs the agent stops it in good order and
writes the next node's assignment itself (`node/host.py`), by compare-and-set;
whatever dies on the way, the record says what is left to do, and the planner
or the next leader's mover does it:

- the source dies: an ordinary failover;
- the target dies or is cordoned before the hand-over: `redirected` lets the
  leader place the agent instead; after it: it is placed anew at once, because
  it never ran there;
- the leader dies: nothing is lost, since it only ever wrote records.

Budget: at most `per_cluster` moves are in flight, and `per_node` of each source
and of each target; the next one begins when one has ended. A drain moves
critical agents first, because its deadline may cut off the rest; a rebalance
moves them last, because it can wait. Never two moves of one agent: only what
runs, and is wished to run, is moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.control.commands import Move
from foundation_nats.placement.constraints import Usage, full, needs, unfit
from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    MoveOrder,
    PlannedMove,
    RebalanceRecord,
    RecoveredFrom,
)

MOVED = "moved"
"""The reason in `recovered_from` of an agent that was moved."""
SKIPPED_SHOWN_MAX = 50
HOLDING = frozenset({AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING})
"""The node that the record names has it, or is about to."""


@dataclass(frozen=True, slots=True)
class Order:
    """One agent that shall leave its node."""

    agent: str
    source: str
    target: str | None
    """None: wherever the leader places it, or nowhere."""
    why: str


def is_moving(record: AgentRecord) -> bool:
    """Whether a move of it is in flight: ordered, or handed over and not yet running."""
    return record.move is not None or is_arriving(record)


def is_arriving(record: AgentRecord) -> bool:
    """Whether it was handed over, and never ran on the node that its record names."""
    origin = record.recovered_from
    return (
        record.status is AgentStatus.STARTING
        and origin is not None
        and origin.reason == MOVED
        and origin.epoch == record.epoch - 1
    )


def may_move(record: AgentRecord) -> bool:
    """Whether a move of it may begin."""
    return record.status is AgentStatus.RUNNING and record.desired == "run"


def handed_over(record: AgentRecord, since: str) -> AgentRecord:
    """The record that follows once the moving agent was stopped: its next assignment."""
    order = record.move
    assert order is not None
    assert record.node is not None
    update: dict[str, object] = {
        "desired": "run",
        "move": None,
        "node": order.to,
        "since": since,
        "status": AgentStatus.PENDING,
        "reason": order.why,
        "recovered_from": RecoveredFrom(node=record.node, epoch=record.epoch, reason=MOVED),
    }
    if order.to is not None:
        update |= {
            "status": AgentStatus.STARTING,
            "incarnation": order.incarnation,
            "epoch": record.epoch + 1,
            "reason": None,
        }
    return record.model_copy(update=update)


def begin(
    orders: Sequence[Order],
    get: Callable[[str], Held | None],
    nodes: Mapping[str, NodeView],
    in_flight: Iterable[AgentRecord],
    *,
    per_cluster: int,
    per_node: int,
    used: Mapping[str, Usage] | None = None,
    at: str | None = None,
) -> tuple[list[Move], list[Order]]:
    """The moves that may begin now, and the orders that must wait for their turn.

    Orders that are out of date are in neither.

    Args:
        used: what is taken on nodes, moves in flight included; None: no node declares a capacity.
    """
    count = 0
    leaving: Counter[str] = Counter()
    coming: Counter[str] = Counter()
    for record in in_flight:
        count += 1
        if record.move is None:
            coming[record.node or ""] += 1
        else:
            leaving[record.node or ""] += 1
            coming[record.move.to or ""] += 1
    taken = {} if used is None else {name: usage.copy() for name, usage in used.items()}
    found: list[Move] = []
    waiting: list[Order] = []
    for index, order in enumerate(orders):
        if count >= per_cluster:
            waiting += orders[index:]
            break
        target = order.target or ""
        if leaving[order.source] >= per_node or (target and coming[target] >= per_node):
            waiting.append(order)
            continue
        item = get(order.agent)
        if item is None or item.record.node != order.source or not may_move(item.record):
            continue
        view = None
        if order.target is not None:
            view = nodes.get(order.target)
            if view is None or unfit(item.record.spec, view) is not None:
                continue
        if view is not None and used is not None:
            usage = taken.setdefault(view.name, Usage())
            if full(needs(item.record.spec), view, usage) is not None:
                waiting.append(order)  # another one may be about to leave it
                continue
            usage.add(item.record.spec, item.record.deployment or order.agent)
        found.append(_ordered(item, order, view, at))
        count += 1
        leaving[order.source] += 1
        coming[target] += 1
    return found, waiting


def _ordered(item: Held, order: Order, view: NodeView | None, at: str | None) -> Move:
    after = item.record.model_copy(
        update={
            "status": AgentStatus.MOVING,
            "desired": "stop",
            "reason": f"{order.why}; it goes to {order.target or 'another node'}",
            "move": MoveOrder(
                to=order.target,
                incarnation=0 if view is None else view.incarnation,
                why=order.why,
            ),
            "since": at,
        }
    )
    return Move(order.agent, after, item.revision, item.record)


def redirected(item: Held, nodes: Mapping[str, NodeView], at: str | None) -> Move | None:
    """The order anew if its target doesn't qualify any more: the leader will place the agent."""
    order = item.record.move
    if order is None or order.to is None:
        return None
    view = nodes.get(order.to)
    if view is not None and view.incarnation == order.incarnation:
        reason = unfit(item.record.spec, view)
        if reason is None:
            return None
    else:
        reason = "is gone"
    after = item.record.model_copy(
        update={
            "move": MoveOrder(why=order.why),
            "reason": f"{order.why}; {order.to} {reason}, so it goes to another node",
            "since": at,
        }
    )
    return Move(item.record.id, after, item.revision, item.record)


@dataclass(slots=True)
class Progress:
    """How far a rebalance has come."""

    todo: list[Order] = field(default_factory=list)
    in_flight: int = 0
    moved: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def progress(
    plan: RebalanceRecord, get: Callable[[str], Held | None], nodes: Mapping[str, NodeView]
) -> Progress:
    """Read off the records what became of each move; the agents that aren't critical come first."""
    found = Progress()
    urgent: list[Order] = []
    for move in plan.moves:
        item = get(move.agent)
        if item is None:
            found.skipped[move.agent] = "it is gone"
        elif item.record.epoch == move.epoch:
            _not_left_yet(move, item.record, nodes, found, urgent)
        else:
            _left(move, item.record, found)
    found.todo += urgent
    return found


def _not_left_yet(
    move: PlannedMove,
    record: AgentRecord,
    nodes: Mapping[str, NodeView],
    found: Progress,
    urgent: list[Order],
) -> None:
    if record.move is not None:
        found.in_flight += 1
    elif not may_move(record) or record.node != move.source:
        found.skipped[move.agent] = f"it is {record.status}"
    else:
        view = nodes.get(move.target)
        reason = "is gone" if view is None else unfit(record.spec, view)
        if reason is not None:
            found.skipped[move.agent] = f"{move.target} {reason}"
            return
        order = Order(move.agent, move.source, move.target, move.why)
        (urgent if record.spec.critical else found.todo).append(order)


def _left(move: PlannedMove, record: AgentRecord, found: Progress) -> None:
    origin = record.recovered_from
    was_moved = origin is not None and origin.reason == MOVED and origin.epoch == move.epoch
    if record.status is AgentStatus.STARTING and was_moved:
        found.in_flight += 1
    elif record.status is AgentStatus.RUNNING and record.node == move.target:
        found.moved += 1
    elif was_moved and record.node not in (None, move.source):
        found.skipped[move.agent] = f"it is {record.status} on {record.node}"
    else:
        found.skipped[move.agent] = "it was restarted meanwhile"
