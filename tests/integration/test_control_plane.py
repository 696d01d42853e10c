"""Membership, election and reconciler over a real server: who is there, who leads, what runs where."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.streams import StreamReader
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.membership import Membership
from foundation_nats.control.desired import Desired
from foundation_nats.errors import AlreadyExistsError, DeploymentNotFoundError, NodeNameTakenError
from foundation_nats.testing import TestServer, eventually
from foundation_schemas import AgentSpec, ClusterEvent, Deployment, Echo, NodeStatus
from tests.integration.control_plane import FakeNode, config_for

Starter = Callable[..., Awaitable[FakeNode]]


@pytest.fixture
async def start(server: TestServer) -> AsyncIterator[Starter]:
    """Start a member on the test's server; all are gone after the test."""
    nodes: list[FakeNode] = []

    async def start(name: str, *, settings: Any = None, **record: Any) -> FakeNode:
        node = FakeNode(config_for(server.url, **(settings or {})), name, **record)
        await node.start()
        nodes.append(node)
        return node

    yield start
    for node in nodes:
        await node.kill()


def deployment(name: str = "a", replicas: int | None = 4, **spec: Any) -> Deployment:
    """A wish."""
    return Deployment(name=name, replicas=replicas, spec=AgentSpec(run="m:C", **spec))


def running_on(node: FakeNode) -> dict[str, str | None]:
    """Agent to node, of those that run."""
    return {a: n for a, (status, n) in node.statuses().items() if status == "running"}


async def events_of(node: FakeNode) -> list[ClusterEvent]:
    """Every event so far."""
    messages, _ = await StreamReader(node.bus, node.subjects.events_stream).page(None, 1)
    return [decode(ClusterEvent, message.data) for message in messages]


async def test_members_see_each_other_and_exactly_one_leads(start: Starter) -> None:
    """Three nodes agree on who is there and on one leader."""
    nodes = [await start(f"n{i}", workers=[]) for i in range(3)]
    for node in nodes:
        await eventually(
            lambda node=node: (
                {v.name: v.status for v in node.membership.nodes().values()}
                == {f"n{i}": NodeStatus.UP for i in range(3)}
            )
        )
    await eventually(lambda: sum(node.controller.is_leader for node in nodes) == 1)
    leader = next(node for node in nodes if node.controller.is_leader)
    for node in nodes:
        await eventually(
            lambda node=node: (
                node.controller.leader is not None and node.controller.leader.holder == leader.name
            )
        )


async def test_a_second_node_of_a_living_name_is_refused(start: Starter) -> None:
    """The name is taken while its holder answers; the first one goes on."""
    first = await start("n0")
    with pytest.raises(NodeNameTakenError, match="is running"):
        await start("n0")
    assert not first.was_replaced.is_set()
    assert first.membership.nodes()["n0"].status is NodeStatus.UP


async def test_a_restarted_node_gets_a_higher_incarnation(start: Starter) -> None:
    """After a kill the name is free within half a second, for a newer life."""
    first = await start("n0")
    old = first.membership.incarnation
    await first.kill()
    began = monotonic()
    second = await start("n0")
    assert second.membership.incarnation > old
    assert monotonic() - began < 4.0  # silence alone would take 5
    await eventually(lambda: second.controller.is_leader, timeout=4.0)


async def test_a_killed_leader_is_replaced_fast_and_the_dead_node_is_down(start: Starter) -> None:
    """No responders at the leader's node: another leads in well under two seconds."""
    first = await start("n0")
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1")
    await eventually(lambda: second.membership.nodes()["n0"].status is NodeStatus.UP)
    await first.kill()
    began = monotonic()
    await eventually(lambda: second.controller.is_leader, timeout=4.0)
    assert monotonic() - began < 4.0  # silence alone would take 5
    assert second.membership.nodes()["n0"].status is NodeStatus.DOWN
    await eventually(
        lambda: _has_event(second, "node", "down", "n0"), message="node.down is told by the next"
    )


async def _has_event(node: FakeNode, topic: str, what: str, subject: str) -> bool:
    return any(
        event.topic == topic and event.what == what and event.data.get("node") == subject
        for event in await events_of(node)
    )


async def test_a_leader_that_closes_hands_over_at_once(start: Starter) -> None:
    """Giving the lease back needs no time-out, and a node that left is not shown."""
    first = await start("n0")
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1")
    term = first.controller.term
    await first.stop()
    await eventually(lambda: second.controller.is_leader, timeout=1.0)
    assert second.controller.term is not None
    assert term is not None
    assert second.controller.term > term
    await eventually(lambda: "n0" not in second.membership.nodes())


async def test_silence_alone_is_down_too_but_takes_longer(start: Starter) -> None:
    """A node whose subjects still have listeners, but which says nothing, ends as down."""
    settings = {
        "liveness": {"heartbeat_interval_s": 0.1, "suspect_after_s": 0.3, "down_after_s": 0.9}
    }
    first = await start("n0", settings=settings)
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1", settings=settings)
    await start("n2", settings=settings)
    await eventually(lambda: len(first.membership.nodes()) == 3)
    # Frozen: interest stays, and nothing is answered.
    for route in second.membership._routes:
        route.handler = lambda _: None
    second.membership._is_over = True
    await eventually(
        lambda: first.membership.nodes()["n1"].status is NodeStatus.SUSPECT, timeout=3.0
    )
    await eventually(lambda: first.membership.nodes()["n1"].status is NodeStatus.DOWN, timeout=4.0)
    assert first.membership.is_down("n1", second.membership.incarnation)


async def test_the_leader_echoes_heartbeats_and_calls_an_old_life_down(start: Starter) -> None:
    """Every beat of a living node is echoed as up; `rejoin` makes the former life down."""
    first = await start("n0")
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1")
    old = second.membership.incarnation
    echoes: list[Echo] = []
    second.bus.subscribe(
        second.subjects.echo("n1"), lambda message: echoes.append(decode(Echo, message.data))
    )
    await eventually(lambda: echoes and echoes[-1].verdict is NodeStatus.UP)
    assert echoes[-1].leader == "n0"
    await second.membership.rejoin()
    assert second.membership.incarnation > old
    await eventually(lambda: echoes[-1].incarnation == second.membership.incarnation)
    await eventually(lambda: first.membership.is_down("n1", old))
    await eventually(
        lambda: (
            first.membership.nodes()["n1"].incarnation == second.membership.incarnation
            and first.membership.nodes()["n1"].status is NodeStatus.UP
        )
    )


async def test_an_observer_sees_the_nodes_at_once(start: Starter) -> None:
    """A client knows the living nodes as soon as it has opened its view."""
    node = await start("n0", labels={"zone": "a"}, capabilities=["gpu"])
    bus = await Bus.connect(node.config.bus, "client")
    scope = TaskScope("client")
    try:
        observer = Membership(bus, Subjects("t"), node.config.liveness)
        await observer.observe(scope)
        view = observer.view()
        assert [found.name for found in view.with_status(NodeStatus.UP)] == ["n0"]
        assert [found.name for found in view.having("gpu")] == ["n0"]
        found = view.get("n0")
        assert found is not None
        assert found.record.labels == {"zone": "a"}
        observer.close()
    finally:
        await scope.close()
        await bus.close()


async def test_agents_are_assigned_evenly_scaled_and_forgotten(start: Starter) -> None:
    """Apply, scale up and down, delete: the records follow, each agent on one node."""
    nodes = [await start(f"n{i}") for i in range(2)]
    desired = nodes[1].controller.desired
    await eventually(lambda: len(nodes[0].membership.nodes()) == 2)
    await desired.apply([deployment(replicas=10)])
    await eventually(lambda: len(running_on(nodes[0])) == 10)
    assert sorted(running_on(nodes[0]).values()) == ["n0"] * 5 + ["n1"] * 5
    await desired.scale("a", 4)
    await eventually(lambda: sorted(nodes[0].statuses()) == [f"a-{i}" for i in range(4)])
    await desired.scale("a", 6)
    await eventually(lambda: len(running_on(nodes[0])) == 6)
    with pytest.raises(AlreadyExistsError):
        await desired.apply([deployment("a-3", replicas=None)])
    await desired.delete("a")
    await eventually(lambda: not nodes[0].statuses())
    with pytest.raises(DeploymentNotFoundError):
        await desired.delete("a")


async def test_critical_agents_of_a_killed_node_run_elsewhere_long_before_silence_proves_it(
    start: Starter,
) -> None:
    """Kill to all running elsewhere; the epoch grew and the origin is told. (How long: benchmarks.)"""
    nodes = [await start(f"n{i}") for i in range(3)]
    await eventually(lambda: nodes[0].controller.is_leader)
    await eventually(lambda: len(nodes[0].membership.nodes()) == 3)
    await nodes[0].controller.desired.apply([deployment(replicas=300, critical=True)])
    await eventually(lambda: len(running_on(nodes[0])) == 300)
    lost = [agent for agent, node in running_on(nodes[0]).items() if node == "n2"]
    assert len(lost) == 100
    epochs = {agent: nodes[0].registry.all()[agent].record.epoch for agent in lost}
    await nodes[2].kill()
    await eventually(
        lambda: len([n for n in running_on(nodes[0]).values() if n != "n2"]) == 300,
        timeout=nodes[0].config.liveness.down_after_s - 0.5,
    )
    for agent in lost:
        record = nodes[0].registry.all()[agent].record
        assert record.epoch == epochs[agent] + 1
        assert record.recovered_from is not None
        assert (record.recovered_from.node, record.recovered_from.epoch) == ("n2", epochs[agent])

    async def told() -> bool:
        return any(
            event.what == "failed_over" and event.data["count"] == 100
            for event in await events_of(nodes[0])
        )

    await eventually(told)


async def test_other_agents_wait_for_their_node_and_return_to_it(start: Starter) -> None:
    """Non-critical agents of a killed node are unavailable, and start there when it is back."""
    first = await start("n0")
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1")
    await eventually(lambda: len(first.membership.nodes()) == 2)
    await first.controller.desired.apply([deployment(replicas=4)])
    await eventually(lambda: len(running_on(first)) == 4)
    lost = {agent for agent, node in running_on(first).items() if node == "n1"}
    await second.kill()
    await eventually(
        lambda: {a for a, (s, _) in first.statuses().items() if s == "unavailable"} == lost
    )
    again = await start("n1")
    await eventually(lambda: len(running_on(first)) == 4)
    assert {agent for agent, node in running_on(first).items() if node == "n1"} == lost
    assert {first.registry.all()[agent].record.incarnation for agent in lost} == {
        again.membership.incarnation
    }


async def test_a_changed_spec_rolls_through_a_deployment(start: Starter) -> None:
    """Never more than a quarter of the replicas are away, and each restarts where it was."""
    nodes = [await start(f"n{i}") for i in range(2)]
    await eventually(lambda: len(nodes[0].membership.nodes()) == 2)
    desired = nodes[0].controller.desired
    await desired.apply([deployment(replicas=8, config={"x": 1})])
    await eventually(lambda: len(running_on(nodes[0])) == 8)
    before = running_on(nodes[0])
    least = [8]
    nodes[0].registry.subscribe(
        lambda *_: least.append(len(running_on(nodes[0]))) if nodes[0].registry.all() else None
    )
    await desired.apply([deployment(replicas=8, config={"x": 2})])
    digest = deployment(config={"x": 2}).spec.digest()
    await eventually(
        lambda: all(
            held.record.digest == digest and held.record.status == "running"
            for held in nodes[0].registry.all().values()
        )
    )
    assert min(least) >= 6
    assert running_on(nodes[0]) == before


async def test_what_no_node_qualifies_for_is_pending_with_reasons_until_one_does(
    start: Starter,
) -> None:
    """Pending says why per node; a node that offers what is missing ends it."""
    first = await start("n0")
    await first.controller.desired.apply([deployment(replicas=2, placement={"require": ["gpu"]})])
    await eventually(lambda: len(first.statuses()) == 2)
    for held in first.registry.all().values():
        assert held.record.status == "pending"
        assert held.record.reason == "no node qualifies: n0 lacks the capability gpu"
    await start("n1", capabilities=["gpu"])
    await eventually(lambda: set(running_on(first).values()) == {"n1"})


async def test_another_leader_finishes_what_one_began(start: Starter) -> None:
    """The leader dies together with its own agents; the next one places them."""
    first = await start("n0")
    await eventually(lambda: first.controller.is_leader)
    second = await start("n1")
    await eventually(lambda: len(first.membership.nodes()) == 2)
    await first.controller.desired.apply([deployment(replicas=6, critical=True)])
    await eventually(lambda: len(running_on(second)) == 6)
    await first.kill()
    await eventually(lambda: list(running_on(second).values()) == ["n1"] * 6, timeout=3.0)


async def test_a_node_whose_record_is_overwritten_is_told_to_stop(start: Starter) -> None:
    """Somebody else took the name: the former holder must end."""
    node = await start("n0")
    entry = await node.membership._bucket.read("n0")
    assert entry is not None
    assert entry.value is not None
    stranger = node.membership.record
    assert stranger is not None
    newer = stranger.model_copy(update={"incarnation": stranger.incarnation + 5})
    await node.membership._bucket.replace(
        "n0", newer.model_dump_json().encode(), expected=entry.revision, ttl_s=60
    )
    await eventually(node.was_replaced.is_set, timeout=2.0)


async def test_a_wish_is_not_taken_for_granted_because_of_an_old_view(start: Starter) -> None:
    """Who has not heard yet what others wished looks before it says that nothing is to be done."""
    node = await start("n0", workers=[])
    late, other = (Desired(node.bus, node.subjects) for _ in range(2))  # neither follows changes

    async def replicas() -> int | None:
        entry = await other.bucket.read("a")
        return (
            None if entry is None or not entry.value else decode(Deployment, entry.value).replicas
        )

    await late.apply([deployment(replicas=4)])
    await other.scale("a", 2)
    await late.apply([deployment(replicas=4)])
    assert await replicas() == 4
    await other.scale("a", 2)
    await late.scale("a", 4)
    assert await replicas() == 4
    await other.delete("a")
    assert await late.apply([deployment(replicas=4)])
    assert await replicas() == 4
    await other.delete("a")
    with pytest.raises(DeploymentNotFoundError):
        await late.scale("a", 4)
    await other.apply([deployment(replicas=3)])
    await late.scale("a", 5)
    assert await replicas() == 5
    await late.delete("a")
    await other.apply([deployment(replicas=3)])
    await late.delete("a")
    assert await replicas() is None
