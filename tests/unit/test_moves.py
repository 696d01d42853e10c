"""Moves: what may begin within the budget, what a hand-over writes, and what becomes of moves gone wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import (
    Assign,
    Cause,
    Command,
    Forget,
    MarkPending,
    MarkUnavailable,
    Stop,
)
from foundation_nats.control.moves import (
    Order,
    begin,
    handed_over,
    is_arriving,
    is_moving,
    progress,
    redirected,
)
from foundation_nats.control.planner import plan
from foundation_nats.control.rebalance import usage_of
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    Load,
    MoveOrder,
    NodeRecord,
    NodeStatus,
    OnNodeLoss,
    PlannedMove,
    RebalanceRecord,
    RecoveredFrom,
)

S = AgentStatus
LIFE = 5


def node(name: str, status: NodeStatus = NodeStatus.UP, life: int = LIFE, **more: Any) -> NodeView:
    """A node's view."""
    return NodeView(NodeRecord(name=name, incarnation=life, **more), status, Load())


def cluster(*views: NodeView) -> dict[str, NodeView]:
    """Three nodes, or others in their places."""
    return {name: node(name) for name in ("n0", "n1", "n2")} | {view.name: view for view in views}


def wish(replicas: int | None = None, **spec: Any) -> Deployment:
    """A deployment named a."""
    return Deployment(name="a", replicas=replicas, spec=AgentSpec(run="m:C", **spec))


def held(wished: Deployment, agent: str = "a", **values: Any) -> Held:
    """An agent that runs on n0, unless it says otherwise."""
    record = {
        "id": agent,
        "deployment": "a",
        "status": S.RUNNING,
        "node": "n0",
        "incarnation": LIFE,
        "epoch": 3,
        "spec": wished.spec,
        "digest": wished.spec.digest(),
        **values,
    }
    return Held(AgentRecord.model_validate(record), 10)


MOVING = {
    "status": S.MOVING,
    "desired": "stop",
    "move": MoveOrder(to="n1", incarnation=LIFE, why="drained"),
}
ARRIVING = {
    "status": S.STARTING,
    "node": "n1",
    "epoch": 4,
    "recovered_from": RecoveredFrom(node="n0", epoch=3, reason="moved"),
}


def some(count: int, **spec: Any) -> dict[str, Held]:
    """So many replicas on n0."""
    wished = wish(count, **spec)
    return {f"a-{i}": held(wished, f"a-{i}") for i in range(count)}


def orders(agents: dict[str, Held], target: str | None = "n1") -> list[Order]:
    """To move them all."""
    return [Order(agent, "n0", target, "drained") for agent in agents]


# ---- beginning -------------------------------------------------------------------


def test_no_more_moves_begin_than_the_cluster_and_each_node_may_have_in_flight() -> None:
    """What is in flight counts; the rest waits for its turn, in order."""
    agents = some(10)
    flying = [held(wish(), "b", **MOVING).record, held(wish(), "c", **ARRIVING).record]
    for per_cluster, per_node, expected in ((5, 9, 3), (9, 4, 2), (2, 9, 0), (99, 99, 10)):
        found, waiting = begin(
            orders(agents),
            agents.get,
            cluster(),
            flying,
            per_cluster=per_cluster,
            per_node=per_node,
        )
        assert [move.agent for move in found] == [f"a-{i}" for i in range(expected)]
        assert [order.agent for order in waiting] == [f"a-{i}" for i in range(expected, 10)]


def test_an_order_says_where_to_go_and_is_one_compare_and_set() -> None:
    """The record names the target's life, so that a new life of it is not taken for it."""
    agents = some(1)
    (move,), _ = begin(orders(agents), agents.get, cluster(), (), per_cluster=9, per_node=9)
    record = move.record
    assert (record.status, record.desired, record.node, record.epoch) == (S.MOVING, "stop", "n0", 3)
    assert record.move == MoveOrder(to="n1", incarnation=LIFE, why="drained")
    assert move.expected == 10
    assert is_moving(record)


@pytest.mark.parametrize(
    ("values", "target"),
    [
        (MOVING, node("n1")),
        ({"status": S.STARTING}, node("n1")),
        ({"status": S.FAILED}, node("n1")),
        ({"desired": "stop"}, node("n1")),
        ({"node": "n2"}, node("n1")),
        ({}, node("n1", NodeStatus.DOWN)),
        ({}, node("n1", NodeStatus.DRAINING)),
        ({}, node("n1", NodeStatus.SUSPECT)),
        ({}, node("n1", cordoned=True)),
    ],
)
def test_only_what_runs_as_wished_is_moved_and_only_to_where_it_may_run(
    values: dict[str, Any], target: NodeView
) -> None:
    """Never two moves of one agent; an order that is out of date is dropped."""
    agents = {"a": held(wish(), **values)}
    found, waiting = begin(
        orders(agents), agents.get, cluster(target), (), per_cluster=9, per_node=9
    )
    assert (found, waiting) == ([], [])


def test_a_target_is_not_filled_beyond_its_capacity() -> None:
    """Moves in flight and those of the same look are counted."""
    agents = some(5)
    nodes = cluster(node("n1", capacity={"slots": 3}))
    coming = held(wish(), "b", **MOVING)
    used = usage_of(agents | {"b": coming}, nodes)
    found, waiting = begin(
        orders(agents), agents.get, nodes, [coming.record], per_cluster=9, per_node=9, used=used
    )
    assert (len(found), len(waiting)) == (2, 3)


# ---- the hand-over -----------------------------------------------------------------


def test_the_hand_over_is_the_next_assignment_under_the_next_epoch() -> None:
    """Nothing else is needed: the target acts on it."""
    after = handed_over(held(wish(), **MOVING).record, "now")
    assert (after.status, after.desired, after.node, after.incarnation) == (
        S.STARTING,
        "run",
        "n1",
        LIFE,
    )
    assert (after.epoch, after.move) == (4, None)
    assert after.recovered_from == RecoveredFrom(node="n0", epoch=3, reason="moved")
    assert is_arriving(after)


def test_without_a_target_the_agent_is_left_to_the_leader() -> None:
    """Pending, under its old epoch, so that the next assignment is above it."""
    values = MOVING | {"move": MoveOrder(why="drained")}
    after = handed_over(held(wish(), **values).record, "now")
    assert (after.status, after.desired, after.node, after.epoch) == (S.PENDING, "run", None, 3)
    assert after.recovered_from is not None
    assert after.recovered_from.reason == "moved"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (node("n1"), False),
        (node("n1", NodeStatus.DOWN), True),
        (node("n1", NodeStatus.DRAINING), True),
        (node("n1", life=LIFE + 1), True),
        (node("n1", cordoned=True), True),
    ],
)
def test_an_order_whose_target_does_not_qualify_any_more_is_redirected(
    target: NodeView, expected: bool
) -> None:
    """To wherever the leader places the agent once it has stopped; and only once."""
    item = held(wish(), **MOVING)
    nodes = cluster(target)
    found = redirected(item, nodes, "now")
    assert (found is not None) == expected
    if found is not None:
        assert found.record.move == MoveOrder(why="drained")
        assert redirected(Held(found.record, 11), nodes, "now") is None


# ---- what the planner makes of it ----------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A record of a moving agent, the nodes, and what the planner says."""

    name: str
    values: dict[str, Any]
    expected: type[Command] | None
    nodes: tuple[NodeView, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None
    wanted: bool = True
    on: tuple[str, ...] = ()


CASES = [
    Case("on its way: left alone", MOVING, None),
    Case("handed over: left alone", ARRIVING, None),
    Case(
        "source down: an ordinary failover",
        MOVING,
        Assign,
        (node("n0", NodeStatus.DOWN),),
        {"critical": True},
        Cause.NODE_DOWN,
        on=("n1", "n2"),
    ),
    Case(
        "source down, waits by its policy",
        MOVING,
        MarkUnavailable,
        (node("n0", NodeStatus.DOWN),),
    ),
    Case("source restarted", MOVING, Assign, (node("n0", life=6),), {}, Cause.NODE_RESTARTED),
    Case("target down before the hand-over: the mover's business", MOVING, None, (node("n1", NodeStatus.DOWN),)),
    Case(
        "target down after it, not critical: never ran there, so it waits for nothing",
        ARRIVING,
        Assign,
        (node("n1", NodeStatus.DOWN),),
        {},
        Cause.NODE_DOWN,
        on=("n0", "n2"),
    ),
    Case(
        "target down after it, would be stopped by its policy: as above",
        ARRIVING,
        Assign,
        (node("n1", NodeStatus.DOWN),),
        {"on_node_loss": OnNodeLoss.STOP},
        Cause.NODE_DOWN,
        on=("n0", "n2"),
    ),
    Case("not wanted any more: stopped for good", MOVING, Stop, wanted=False),
    Case(
        "not wanted any more, source down",
        MOVING,
        Forget,
        (node("n0", NodeStatus.DOWN),),
        wanted=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_planner_and_a_moving_agent(case: Case) -> None:
    """One row per situation."""
    wished = wish(**case.spec)
    found = plan(
        {"a": wished} if case.wanted else {},
        {"a": held(wished, **case.values)},
        cluster(*case.nodes),
        100.0,
        ControlConfig(),
        "n0",
        random.Random(1),
    )
    kinds = [type(command) for command in found.commands]
    assert kinds == ([] if case.expected is None else [case.expected])
    for command in found.commands:
        if command.record is not None:
            assert command.record.move is None
        if isinstance(command, Assign):
            assert command.cause is case.cause
            assert command.record.epoch > case.values.get("epoch", 3)
            assert not case.on or command.record.node in case.on


def test_an_agent_on_its_way_takes_its_place_on_both_nodes() -> None:
    """Otherwise a new agent would get the place that it is about to take."""
    old, new = wish(), Deployment(name="b", spec=AgentSpec(run="m:C"))
    full = {"capacity": {"slots": 1}}
    nodes = {name: node(name, **full) for name in ("n0", "n1")}
    found = plan(
        {"a": old, "b": new},
        {"a": held(old, **MOVING)},
        nodes,
        100.0,
        ControlConfig(),
        "n0",
        random.Random(1),
    )
    assert [type(command) for command in found.commands] == [MarkPending]


# ---- a rebalance ------------------------------------------------------------------------

MOVE = PlannedMove(agent="a", source="n0", target="n1", epoch=3, why="uneven")


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ({}, node("n1"), "todo"),
        (MOVING, node("n1"), "in flight"),
        (ARRIVING, node("n1"), "in flight"),
        (ARRIVING | {"status": S.RUNNING}, node("n1"), "moved"),
        (None, node("n1"), "it is gone"),
        ({}, node("n1", cordoned=True, cordon_reason="disk"), "n1 is cordoned (disk)"),
        ({"status": S.FAILED}, node("n1"), "it is failed"),
        ({"epoch": 4}, node("n1"), "it was restarted meanwhile"),
        (ARRIVING | {"status": S.RUNNING, "node": "n2"}, node("n1"), "it is running on n2"),
        ({"status": S.PENDING, "node": None}, node("n1"), "it is pending"),
    ],
)
def test_how_far_a_planned_move_is_can_be_read_off_the_record(
    values: dict[str, Any] | None, target: NodeView, expected: str
) -> None:
    """So that any leader goes on with a rebalance, and knows when it is done."""
    agents = {} if values is None else {"a": held(wish(), **values)}
    plan_ = RebalanceRecord(id="x", strategy="even_distribution", moves=[MOVE])
    found = progress(plan_, agents.get, cluster(target))
    said = {
        "todo": len(found.todo) == 1,
        "in flight": found.in_flight == 1,
        "moved": found.moved == 1,
        found.skipped.get("a", "nothing"): True,
    }
    assert said.get(expected), found
    assert len(found.todo) + found.in_flight + found.moved + len(found.skipped) == 1


def test_critical_agents_are_rebalanced_last() -> None:
    """It can wait, and they can't."""
    agents = some(1, critical=True) | {"b": held(wish(), "b")}
    moves = [MOVE.model_copy(update={"agent": agent}) for agent in agents]
    plan_ = RebalanceRecord(id="x", strategy="even_distribution", moves=moves)
    found = progress(plan_, agents.get, cluster())
    assert [order.agent for order in found.todo] == ["b", "a-0"]
