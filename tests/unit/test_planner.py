"""The planner: one table of situations, and that planning is idempotent, converges and never goes back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import (
    Assign,
    Cause,
    Command,
    Forget,
    MarkPending,
    MarkStopped,
    MarkUnavailable,
    Plan,
    Quarantine,
    Stop,
)
from foundation_nats.control.diff import ChangeKind, diff, preview
from foundation_nats.control.planner import History, plan
from foundation_nats.control.status import deployment_status
from foundation_schemas import (
    AgentRecord,
    AgentSpec,
    AgentStatus,
    Deployment,
    Load,
    NodeLoss,
    NodeRecord,
    NodeStatus,
    OnNodeLoss,
    RecoveredFrom,
    ReservationRecord,
)

S = AgentStatus
CONFIG = ControlConfig()
INCARNATION = 5


def node(
    name: str, status: NodeStatus = NodeStatus.UP, incarnation: int = INCARNATION, **record: Any
) -> NodeView:
    """A node's view."""
    return NodeView(NodeRecord(name=name, incarnation=incarnation, **record), status, Load())


def cluster(*views: NodeView) -> dict[str, NodeView]:
    """Views by name; without any, two nodes that are up."""
    return {view.name: view for view in views or (node("n0"), node("n1"))}


def wish(name: str = "a", replicas: int | None = None, **spec: Any) -> Deployment:
    """A deployment."""
    return Deployment(name=name, replicas=replicas, spec=AgentSpec(run="m:C", **spec))


def record(wished: Deployment, agent: str | None = None, **values: Any) -> AgentRecord:
    """A record of *wished*; running on n0 unless it says otherwise."""
    return AgentRecord.model_validate(
        {
            "id": agent or wished.name,
            "deployment": wished.name,
            "status": S.RUNNING,
            "node": "n0",
            "incarnation": INCARNATION,
            "epoch": 3,
            "spec": wished.spec,
            "digest": wished.spec.digest(),
            **values,
        }
    )


def planned(
    desired: list[Deployment],
    records: list[AgentRecord],
    nodes: dict[str, NodeView] | None = None,
    **options: Any,
) -> Plan:
    """Plan for these records, at revision 10 each."""
    return plan(
        {wished.name: wished for wished in desired},
        {item.id: Held(item, 10) for item in records},
        cluster() if nodes is None else nodes,
        options.pop("now", 100.0),
        CONFIG,
        "n0",
        random.Random(0),
        **options,
    )


def only(found: Plan) -> Command:
    """The plan's single command."""
    (command,) = found.commands
    return command


def waited(seconds: float, agent: str = "a") -> History:
    """The agent's record has been as it is for so long, at now = 100."""
    return History(since={agent: 100.0 - seconds})


def test_a_new_agent_is_assigned_above_every_epoch_its_id_may_have_had() -> None:
    """Node, life, digest and epoch are in the record; nothing is expected at the key."""
    command = only(planned([wish()], [], epoch_floor=41))
    assert isinstance(command, Assign)
    assert (command.cause, command.expected) == (Cause.NEW, 0)
    assert command.record.status is S.STARTING
    assert command.record.epoch == 42
    assert command.record.incarnation == INCARNATION
    assert command.record.digest == wish().spec.digest()
    assert command.record.recovered_from is None


def test_a_record_of_a_plan_is_as_good_as_a_validated_one() -> None:
    """It is made by hand for speed, and equals, dumps, copies and reads back like any other."""
    command = only(planned([wish(critical=True, config={"x": 1})], [], epoch_floor=4))
    assert isinstance(command, Assign)
    made = command.record
    read = AgentRecord.model_validate_json(made.model_dump_json())
    assert made == read
    assert made.model_copy(update={"epoch": 9}) == read.model_copy(update={"epoch": 9})
    assert made.model_fields_set == set(AgentRecord.model_fields)


def test_a_standalone_agent_belongs_to_no_deployment() -> None:
    """`agents.start` writes a deployment of its own, which is not shown."""
    alone = wish().model_copy(update={"standalone": True})
    command = only(planned([alone], []))
    assert isinstance(command, Assign)
    assert command.record.deployment is None


def test_what_is_as_wished_needs_nothing() -> None:
    """Running with the right spec on a living node: no command, no timer."""
    assert planned([wish()], [record(wish())]) == Plan(())


def test_scaling_down_takes_the_highest_ordinals() -> None:
    """The rest stays."""
    small = wish(replicas=2)
    found = planned([small], [record(small, f"a-{i}") for i in range(4)])
    assert [(type(c), c.agent) for c in found.commands] == [(Stop, "a-2"), (Stop, "a-3")]
    assert all(c.record is not None and c.record.desired == "stop" for c in found.commands)


@dataclass(frozen=True)
class Case:
    """A situation of one agent and what must come of it."""

    spec: dict[str, Any]
    record: dict[str, Any]
    nodes: dict[str, NodeView]
    command: type[Command] | None
    cause: Cause | None = None
    node: str | None = None
    waited: float = 0.0


DOWN = cluster(node("n0", NodeStatus.DOWN), node("n1"))
BACK = cluster(node("n0", incarnation=INCARNATION + 1), node("n1"))
GRACE_RESTART = {"on_node_loss": {"policy": "restart", "grace_s": 7}}
GRACE_UNAVAILABLE = {"on_node_loss": {"policy": "unavailable", "grace_s": 7}}
GRACE_STOP = {"on_node_loss": {"policy": "stop", "grace_s": 7}}
CASES = {
    "critical, node down": Case({"critical": True}, {}, DOWN, Assign, Cause.NODE_DOWN, "n1"),
    "restart, node down": Case(
        {"on_node_loss": "restart"}, {}, DOWN, Assign, Cause.NODE_DOWN, "n1"
    ),
    "default, node down": Case({}, {}, DOWN, MarkUnavailable),
    "unavailable, node down": Case({"on_node_loss": "unavailable"}, {}, DOWN, MarkUnavailable),
    "stop, node down": Case({"on_node_loss": "stop"}, {}, DOWN, MarkStopped),
    "critical but stop": Case({"critical": True, "on_node_loss": "stop"}, {}, DOWN, MarkStopped),
    "node suspect": Case(
        {"critical": True}, {}, cluster(node("n0", NodeStatus.SUSPECT), node("n1")), None
    ),
    "node unknown": Case({"critical": True}, {}, cluster(node("n1")), None),
    "view older than record": Case({}, {"incarnation": 9}, cluster(), None),
    "node restarted": Case({}, {}, BACK, Assign, Cause.NODE_RESTARTED, "n0"),
    "node restarted, starting": Case(
        {}, {"status": S.STARTING}, BACK, Assign, Cause.NODE_RESTARTED, "n0"
    ),
    "waiting within grace": Case({}, {"status": S.UNAVAILABLE}, DOWN, None, waited=29),
    "waiting beyond grace": Case(
        {}, {"status": S.UNAVAILABLE}, DOWN, Assign, Cause.NODE_DOWN, "n1", 30
    ),
    "unavailable waits for ever": Case(
        {"on_node_loss": "unavailable"}, {"status": S.UNAVAILABLE}, DOWN, None, waited=9e9
    ),
    "unavailable, returned": Case(
        {"on_node_loss": "unavailable"},
        {"status": S.UNAVAILABLE},
        BACK,
        Assign,
        Cause.RETURNED,
        "n0",
    ),
    "default, returned": Case({}, {"status": S.UNAVAILABLE}, BACK, Assign, Cause.RETURNED, "n0"),
    "restart after a grace": Case(GRACE_RESTART, {}, DOWN, MarkUnavailable),
    "restart, grace over": Case(
        GRACE_RESTART, {"status": S.UNAVAILABLE}, DOWN, Assign, Cause.NODE_DOWN, "n1", 7
    ),
    "critical, but with a grace": Case(
        {"critical": True, **GRACE_RESTART}, {"status": S.UNAVAILABLE}, DOWN, None, waited=6
    ),
    "unavailable for a grace": Case(GRACE_UNAVAILABLE, {}, DOWN, MarkUnavailable),
    "unavailable, within its grace": Case(
        GRACE_UNAVAILABLE, {"status": S.UNAVAILABLE}, DOWN, None, waited=6
    ),
    "unavailable, grace over": Case(
        GRACE_UNAVAILABLE, {"status": S.UNAVAILABLE}, DOWN, Assign, Cause.NODE_DOWN, "n1", 7
    ),
    "unavailable, back within its grace": Case(
        GRACE_UNAVAILABLE, {"status": S.UNAVAILABLE}, BACK, Assign, Cause.RETURNED, "n0", 6
    ),
    "stop after a grace": Case(GRACE_STOP, {}, DOWN, MarkUnavailable),
    "stop, within its grace": Case(GRACE_STOP, {"status": S.UNAVAILABLE}, DOWN, None, waited=6),
    "stop, grace over": Case(GRACE_STOP, {"status": S.UNAVAILABLE}, DOWN, MarkStopped, waited=7),
    "stop, back within its grace": Case(
        GRACE_STOP, {"status": S.UNAVAILABLE}, BACK, Assign, Cause.RETURNED, "n0", 6
    ),
    "stop after a grace, node restarted": Case(
        GRACE_STOP, {}, BACK, Assign, Cause.NODE_RESTARTED, "n0"
    ),
    "stop after a grace, node back and leaving": Case(
        GRACE_STOP,
        {},
        cluster(node("n0", NodeStatus.DRAINING, INCARNATION + 1), node("n1")),
        MarkUnavailable,
    ),
    "starting in time": Case({}, {"status": S.STARTING}, cluster(), None, waited=29),
    "starting too long": Case({}, {"status": S.STARTING}, cluster(), Stop, waited=30),
    "starting too long, told to stop": Case(
        {}, {"status": S.STARTING, "desired": "stop"}, cluster(), None, waited=9e9
    ),
    "starting too long, node down": Case(
        {"critical": True},
        {"status": S.STARTING, "desired": "stop"},
        DOWN,
        Assign,
        Cause.NODE_DOWN,
        "n1",
    ),
    "stopped because it was late": Case(
        {},
        {
            "status": S.STOPPED,
            "node": None,
            "desired": "stop",
            "recovered_from": RecoveredFrom(node="n0", epoch=3, reason="late"),
        },
        cluster(),
        Assign,
        Cause.LATE,
    ),
    "failed, backing off": Case(
        {}, {"status": S.FAILED, "failures": 2}, cluster(), None, waited=3.9
    ),
    "failed, back-off over": Case(
        {}, {"status": S.FAILED, "failures": 2}, cluster(), Assign, Cause.RETRY, None, 4
    ),
    "failed often, capped": Case(
        {}, {"status": S.FAILED, "failures": 9}, cluster(), Assign, Cause.RETRY, None, 60
    ),
    "failed too often": Case({}, {"status": S.FAILED, "failures": 10}, cluster(), Quarantine),
    "in quarantine": Case(
        {},
        {"status": S.FAILED, "failures": 10, "reason": "quarantined after 10 failed starts: x"},
        cluster(),
        None,
        waited=9e9,
    ),
    "in quarantine, other spec": Case(
        {},
        {"status": S.FAILED, "failures": 10, "digest": "old"},
        cluster(),
        Assign,
        Cause.RETRY,
    ),
    "failed, temporary": Case(
        {"restart": "temporary"}, {"status": S.FAILED}, cluster(), None, waited=9e9
    ),
    "failed, transient": Case(
        {"restart": "transient"}, {"status": S.FAILED}, cluster(), Assign, Cause.RETRY, None, 9
    ),
    "failed, other spec": Case(
        {"restart": "temporary"},
        {"status": S.FAILED, "digest": "old"},
        cluster(),
        Assign,
        Cause.RETRY,
    ),
    "ended, transient": Case(
        {"restart": "transient"},
        {"status": S.STOPPED, "node": None},
        cluster(),
        None,
        waited=9e9,
    ),
    "ended, permanent": Case(
        {}, {"status": S.STOPPED, "node": None}, cluster(), Assign, Cause.RESTARTED, None, 5
    ),
    "stopped for another spec": Case(
        {},
        {"status": S.STOPPED, "node": None, "digest": "old", "desired": "stop"},
        cluster(),
        Assign,
        Cause.RESTARTED,
    ),
    "stopped, wished again": Case(
        {},
        {"status": S.STOPPED, "node": None, "desired": "stop"},
        cluster(),
        Assign,
        Cause.RESTARTED,
    ),
    "still stopping, wished again": Case({}, {"desired": "stop"}, cluster(), None),
    "stopped by loss stays": Case(
        {"on_node_loss": "stop"},
        {
            "status": S.STOPPED,
            "node": None,
            "recovered_from": RecoveredFrom(node="n0", epoch=3, reason="node_down"),
        },
        cluster(),
        None,
        waited=9e9,
    ),
    "drained": Case({}, {"status": S.PENDING, "node": None}, cluster(), Assign, Cause.WAITED),
    "other spec": Case({}, {"digest": "old"}, cluster(), Stop),
    "nobody qualifies": Case(
        {"critical": True, "placement": {"require": ["gpu"]}}, {}, DOWN, MarkPending
    ),
    "hibernated": Case({}, {"status": S.HIBERNATED, "node": None}, cluster(), None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_situation(case: Case) -> None:
    """What must come of one agent in one situation."""
    wished = wish(**case.spec)
    before = record(wished, **case.record)
    found = planned([wished], [before], case.nodes, history=waited(case.waited))
    if case.command is None:
        assert found.commands == ()
        return
    command = only(found)
    assert type(command) is case.command
    assert command.expected == 10
    assert command.record is not None
    if isinstance(command, Assign):
        assert command.cause is case.cause
        assert case.node is None or command.record.node == case.node
        assert command.record.epoch == before.epoch + 1
        assert command.record.digest == wished.spec.digest()
    else:
        assert command.record.epoch == before.epoch


@pytest.mark.parametrize(
    ("values", "nodes", "kind"),
    [
        ({}, cluster(), Stop),
        ({"desired": "stop"}, cluster(), None),
        ({}, cluster(node("n0", NodeStatus.DOWN)), Forget),
        ({}, BACK, Forget),
        ({}, {}, None),
        ({"status": S.PENDING, "node": None}, cluster(), Forget),
        ({"status": S.STOPPED, "node": None, "desired": "stop"}, cluster(), Forget),
        ({"status": S.FAILED}, cluster(), Forget),
        ({"status": S.UNAVAILABLE}, DOWN, Forget),
    ],
)
def test_an_agent_that_nobody_wants(
    values: dict[str, Any], nodes: dict[str, NodeView], kind: type[Command] | None
) -> None:
    """It is stopped where it may run, and forgotten once nobody runs it."""
    found = planned([], [record(wish(), **values)], nodes)
    assert [type(command) for command in found.commands] == ([] if kind is None else [kind])


def test_recovered_from_names_the_lost_activation() -> None:
    """Node and epoch of before, for `on_start`."""
    command = only(planned([wish(critical=True)], [record(wish(critical=True))], DOWN))
    assert command.record is not None
    assert command.record.recovered_from == RecoveredFrom(node="n0", epoch=3, reason="node_down")


def test_a_pending_agent_tells_why_per_node_and_is_not_rewritten_for_the_same_reason() -> None:
    """The reasons are stable, so that a wait costs no writes."""
    wished = wish(placement={"require": ["gpu"]})
    command = only(planned([wished], []))
    assert isinstance(command, MarkPending)
    assert command.reasons == dict.fromkeys(("n0", "n1"), "lacks the capability gpu")
    assert planned([wished], [command.record]).commands == ()


def test_critical_agents_get_the_last_capacity() -> None:
    """They are placed first, whatever their name."""
    nodes = cluster(node("n0", capacity={"slots": 1}))
    found = planned([wish("a"), wish("b", critical=True)], [], nodes)
    assert {c.agent: type(c) for c in found.commands} == {"b": Assign, "a": MarkPending}


def test_a_rolling_change_takes_a_quarter_at_a_time() -> None:
    """Agents that are away for any reason count; one that is starting is exchanged at no cost."""
    wished = wish(replicas=8)
    old = [record(wished, f"a-{i}", digest="old") for i in range(8)]
    assert [c.agent for c in planned([wished], old).commands] == ["a-0", "a-1"]
    old[5] = record(wished, "a-5", status=S.STARTING)
    assert [c.agent for c in planned([wished], old).commands] == ["a-0"]
    old[6] = record(wished, "a-6", status=S.STARTING, digest="old")
    assert [c.agent for c in planned([wished], old).commands] == ["a-6"]


def test_a_restart_for_another_spec_stays_where_it_was() -> None:
    """Although the other node is emptier."""
    wished = wish(replicas=2)
    others = [record(wish("b", 9), f"b-{i}") for i in range(9)]
    stopped = record(wished, "a-0", status=S.STOPPED, node=None, desired="stop", digest="old")
    found = planned(
        [wished, wish("b", 9)],
        [stopped, record(wished, "a-1"), *others],
        history=History(homes={"a-0": "n0"}),
    )
    command = only(found)
    assert command.record is not None
    assert command.record.node == "n0"
    assert command.record.recovered_from == RecoveredFrom(node="n0", epoch=3, reason="restarted")


def test_a_busy_node_is_given_more_time_to_start_what_it_got() -> None:
    """While others come to run there, an agent that is still starting waits in a queue."""
    history = waited(31)
    history.progress["n0"] = 99.0
    found = planned([wish()], [record(wish(), status=S.STARTING)], history=history)
    assert found.commands == ()
    assert found.next_wake_s is not None


def test_the_next_timer_is_told() -> None:
    """The soonest of all agents' timers."""
    found = planned(
        [wish("a"), wish("b")],
        [record(wish("a"), status=S.UNAVAILABLE), record(wish("b"), status=S.STARTING)],
        DOWN | cluster(node("n0", NodeStatus.DOWN), node("n1")),
        history=History(since={"a": 90.0}),
    )
    assert found.next_wake_s == pytest.approx(20.0)


def test_a_plan_that_is_too_long_is_cut_and_says_so() -> None:
    """The rest follows in the next pass."""
    found = planned([wish(replicas=50)], [], commands_max=20)
    assert found.is_truncated
    assert len(found.commands) == 20


# ---- properties -------------------------------------------------------------------


def applied(held: dict[str, Held], found: Plan) -> dict[str, Held]:
    """The registry after the plan was carried out."""
    after = dict(held)
    for command in found.commands:
        before = held.get(command.agent)
        assert command.expected == (0 if before is None else before.revision)
        if command.record is None:
            del after[command.agent]
        else:
            assert before is None or command.record.epoch >= before.record.epoch
            if isinstance(command, Assign):
                assert before is None or command.record.epoch == before.record.epoch + 1
            after[command.agent] = Held(command.record, command.expected + 1)
    return after


World = tuple[dict[str, Deployment], dict[str, Held], dict[str, NodeView]]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Wishes, records in any condition, and nodes in any condition."""
    nodes = cluster(
        *(
            node(
                f"n{i}",
                draw(st.sampled_from(list(NodeStatus))),
                INCARNATION + draw(st.integers(0, 1)),
                capacity=draw(st.sampled_from([{}, {"slots": 2}, {"slots": 5}])),
            )
            for i in range(draw(st.integers(1, 4)))
        )
    )
    desired: dict[str, Deployment] = {}
    held: dict[str, Held] = {}
    for name in ("a", "b", "c"):
        wished = wish(
            name,
            draw(st.sampled_from([None, 0, 1, 3, 6])),
            critical=draw(st.booleans()),
            on_node_loss=draw(
                st.sampled_from(
                    [None, *OnNodeLoss, *(NodeLoss(policy=p, grace_s=20) for p in OnNodeLoss)]
                )
            ),
            restart=draw(st.sampled_from(["permanent", "transient", "temporary"])),
            placement={"strategy": draw(st.sampled_from(["load_balanced", "spread", "pack"]))},
        )
        if draw(st.booleans()):
            desired[name] = wished
        for agent in [name, *(f"{name}-{i}" for i in range(5))]:
            if draw(st.booleans()):
                continue
            status = draw(st.sampled_from(list(S)))
            has_node = status in (S.STARTING, S.RUNNING, S.MOVING, S.UNAVAILABLE, S.FAILED)
            held[agent] = Held(
                record(
                    wished,
                    agent,
                    status=status,
                    node=draw(st.sampled_from(sorted(nodes))) if has_node else None,
                    incarnation=INCARNATION,
                    digest=draw(st.sampled_from([wished.spec.digest(), "old"])),
                    desired=draw(st.sampled_from(["run", "run", "stop"])),
                    failures=draw(st.integers(0, 3)),
                ),
                draw(st.integers(1, 50)),
            )
    return desired, held, nodes


@settings(max_examples=300, deadline=None)
@given(worlds(), st.floats(0, 100))
def test_planning_again_after_a_plan_gives_nothing(world: World, age: float) -> None:
    """Whatever the state: what was decided is decided."""
    desired, held, nodes = world
    history = History(since=dict.fromkeys(held, 1000.0 - age))
    rng = random.Random(0)
    found = plan(desired, held, nodes, 1000.0, CONFIG, "n0", rng, history=history, epoch_floor=100)
    held = applied(held, found)
    for command in found.commands:
        history.since.pop(command.agent, None)
    again = plan(
        desired,
        held,
        nodes,
        1000.0,
        CONFIG,
        "n0",
        random.Random(-1),
        history=history,
        epoch_floor=100,
    )
    assert again.commands == ()


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_no_node_that_is_given_an_agent_is_over_its_capacity(world: World) -> None:
    """All that may run there counts, the unwanted and the stopping included."""
    desired, held, nodes = world
    found = plan(desired, held, nodes, 1000.0, CONFIG, "n0", random.Random(0), epoch_floor=100)
    after = applied(held, found)
    for name in {c.record.node for c in found.commands if isinstance(c, Assign)}:
        assert name is not None
        view = nodes[name]
        assert view.status is NodeStatus.UP
        there = [
            item
            for item in after.values()
            if item.record.node == name
            and item.record.incarnation == view.incarnation
            and item.record.status in (S.STARTING, S.RUNNING, S.MOVING)
        ]
        assert len(there) <= view.record.capacity.get("slots", 1e9)


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_every_state_converges_in_bounded_rounds(world: World) -> None:
    """With nodes that do as they are told, everything wished runs or says why it can't."""
    desired, held, nodes = world
    now = 0.0
    history = History()
    for _ in range(60):
        now += 100.0
        history.since = dict.fromkeys(held, now - 100.0)
        found = plan(
            desired,
            held,
            nodes,
            now,
            CONFIG,
            "n0",
            random.Random(0),
            history=history,
            epoch_floor=100,
        )
        held = applied(held, found)
        acted = False
        for agent, item in list(held.items()):
            now_record = item.record
            view = None if now_record.node is None else nodes[now_record.node]
            if view is None or not view.is_alive or view.incarnation != now_record.incarnation:
                continue
            if now_record.status not in (S.STARTING, S.RUNNING, S.MOVING):
                continue
            if now_record.desired == "stop":
                update: dict[str, Any] = {"status": S.STOPPED, "node": None}
            elif now_record.status is not S.RUNNING:
                update = {"status": S.RUNNING, "failures": 0}
            else:
                continue
            acted = True
            held[agent] = Held(now_record.model_copy(update=update), item.revision + 1)
        if not found.commands and not acted:
            break
    else:
        raise AssertionError("no end")
    wanted = {agent: d for d in desired.values() for agent in d.agent_ids()}
    assert set(held) == set(wanted)
    for agent, item in held.items():
        digest = wanted[agent].spec.digest()
        match item.record.status:
            case S.RUNNING:
                assert item.record.digest == digest or item.record.node is not None
            case S.PENDING:
                assert item.record.reason
            case S.UNAVAILABLE | S.STOPPED | S.FAILED | S.HIBERNATED:
                pass
            case other:
                raise AssertionError(f"{agent} is left {other}")


def test_ten_thousand_agents_are_planned_in_one_pass() -> None:
    """Everything to do, nothing to do, and a tenth to move. (How long: `benchmarks fleet`.)"""
    wished = wish(replicas=10_000, critical=True)
    nodes = cluster(*(node(f"n{i}") for i in range(10)))
    found = planned([wished], [], nodes)
    assert len(found.commands) == 10_000
    held = {
        c.agent: Held(c.record.model_copy(update={"status": S.RUNNING}), 1)
        for c in found.commands
        if c.record is not None
    }
    history = History()
    for nodes_now, commands in (
        (nodes, 0),
        (nodes | {"n3": node("n3", NodeStatus.DOWN)}, 1_000),
    ):
        again = plan(
            {"a": wished}, held, nodes_now, 0.0, CONFIG, "n0", random.Random(0), history=history
        )
        assert len(again.commands) == commands


# ---- diff, preview, status ----------------------------------------------------------


def test_a_diff_says_what_is_added_changed_removed_and_kept() -> None:
    """Fields are named as in the manifest; what was started by itself is never pruned."""
    current = {
        "same": wish("same"),
        "changed": wish("changed", 2, placement={"strategy": "spread"}),
        "gone": wish("gone").model_copy(update={"manifest": "shop"}),
        "other": wish("other").model_copy(update={"manifest": "bank"}),
        "alone": wish("alone").model_copy(update={"standalone": True, "manifest": "shop"}),
    }
    wanted = [wish("same"), wish("changed", 3, critical=True), wish("new")]
    changes = {change.name: change for change in diff(current, wanted, prune=["shop"])}
    assert {name: change.kind.value for name, change in changes.items()} == {
        "same": "=",
        "changed": "~",
        "new": "+",
        "gone": "-",
    }
    fields = {field.name: (field.before, field.after) for field in changes["changed"].fields}
    assert fields == {
        "replicas": (2, 3),
        "critical": (False, True),
        "placement.strategy": ("spread", "load_balanced"),
    }
    assert changes["changed"].restarts
    assert ChangeKind.REMOVED not in {change.kind for change in diff(current, wanted)}


def test_a_preview_says_where_new_agents_would_go_and_which_could_not() -> None:
    """It is the planner's own answer."""
    nodes = cluster(node("n0", capacity={"slots": 1}), node("n1", capacity={"slots": 1}))
    found = preview({}, [wish("a", 3)], {}, nodes, CONFIG)
    assert sorted(found.placements.values()) == ["n0", "n1"]
    ((agent, reasons),) = found.unplaceable.items()
    assert agent == "a-2"
    assert set(reasons) == {"n0", "n1"}


def test_a_preview_knows_what_is_reserved() -> None:
    """What others hold is not given away, not even in a plan; what they hold elsewhere doesn't matter."""
    views = {view.name: view for view in (node("n0", capacity={"gpu": 2}), node("n1"))}
    wished = [wish("a", 2, resources={"gpu": 1})]
    held = ReservationRecord(id="r@n0", needs={"gpu": 1}, holder="somebody")
    found = preview({}, wished, {}, views, CONFIG, reservations={"n0": [held]})
    assert (dict(found.placements), set(found.unplaceable)) == ({"a-0": "n0"}, {"a-1"})
    assert "gpu" in found.unplaceable["a-1"]["n0"]
    found = preview({}, wished, {}, views, CONFIG, reservations={"n1": [held]})
    assert set(found.placements) == {"a-0", "a-1"}


def test_a_preview_names_the_node_of_agents_that_would_restart_or_leave() -> None:
    """Of those that run; others of the cluster are not concerned."""
    nodes = cluster(node("n0"), node("n1"))
    before, other = wish("a", 3), wish("b", 1)
    items = [record(before, f"a-{i}", node=f"n{i % 2}") for i in range(3)]
    items.append(record(other, "b-0", node="n1"))
    held = {item.id: Held(item, 1) for item in items}
    current = {"a": before, "b": other}
    found = preview(current, [wish("a", 2, config={"x": 1})], held, nodes, CONFIG)
    assert (found.restarting, found.leaving) == ({"a-0": "n0", "a-1": "n1"}, {"a-2": "n0"})
    assert not found.placements
    fewer = preview(current, [wish("a", 1)], held, nodes, CONFIG)
    assert (fewer.restarting, fewer.leaving) == ({}, {"a-1": "n1", "a-2": "n0"})


def test_a_deployment_is_settled_only_when_all_of_it_is_true() -> None:
    """Counts, reasons, and leftovers."""
    wished = wish(replicas=3)
    records = [
        record(wished, "a-0"),
        record(wished, "a-1", status=S.FAILED, node="n1", reason="ImportError: m"),
    ]
    status = deployment_status(wished, [Held(item, 1) for item in records])
    assert (status.desired, status.running, status.failed, status.pending) == (3, 1, 1, 1)
    assert status.reasons == {"a-1": "ImportError: m", "a-2": "not placed yet"}
    assert not status.settled
    records = [record(wished, f"a-{i}") for i in range(3)]
    assert deployment_status(wished, [Held(item, 1) for item in records]).settled
    records.append(record(wished, "a-3"))
    assert not deployment_status(wished, [Held(item, 1) for item in records]).settled
    records[-1:] = []
    records[0] = record(wished, "a-0", digest="old")
    assert not deployment_status(wished, [Held(item, 1) for item in records]).settled


def test_a_grace_changes_the_digest_and_its_absence_does_not() -> None:
    """What is written as a mapping without a grace is the plain word: no agent is restarted for it."""
    plain = wish(on_node_loss="stop").spec
    assert wish(on_node_loss={"policy": "stop"}).spec == plain
    assert plain.digest() == "569399238057"
    assert wish(on_node_loss={"policy": "stop", "grace_s": 7}).spec.digest() != plain.digest()


def test_an_agent_that_waits_says_for_how_long_and_what_comes_then() -> None:
    """And the next look is at the end of the grace."""
    found = planned([wish(**GRACE_STOP)], [record(wish(**GRACE_STOP))], DOWN)
    assert only(found).record.reason == (
        "node n0 is down; waits 7 s for its return, and is stopped then"
    )
    assert found.next_wake_s == 7
