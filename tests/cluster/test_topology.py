"""The picture of a cluster whose links are held, cut and healed, seen from either side."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest

from foundation_cli import render
from foundation_cli.topology import lines
from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.topology import OneWay, Topology
from foundation_nats.config import BusConfig, LivenessConfig
from foundation_nats.errors import BusTimeoutError
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_nats.testing.brokers import Brokers
from foundation_nats.testing.links import Link
from foundation_schemas import ClusterEvent, NodeStatus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

PATIENT = {
    "liveness": {"suspect_after_s": 1.0, "down_after_s": 60.0, "fence_after_s": 50.0},
    "bus": {"ping_interval_s": 60.0},
}
"""Nodes that are cut off stay suspect, and connections stay open: the state lasts for the test."""


def link_to(server: TestServer) -> tuple[str, int]:
    """Where *server* listens."""
    host, _, port = server.url.removeprefix("nats://").partition(":")
    return host, int(port)


@asynccontextmanager
async def far_node(
    settings: dict[str, dict[str, float]],
) -> AsyncIterator[tuple[TestCluster, Link]]:
    """Nodes n1 and n2 at the server, and n3 that reaches it through a link."""
    async with (
        TestCluster(nodes=2, settings={"liveness": settings["liveness"]}) as nodes,
        await Link.open(*link_to(nodes.server)) as link,
    ):
        environment = {"FOUNDATION_BUS__SERVERS": link.url}
        if "bus" in settings:
            environment["FOUNDATION_BUS__PING_INTERVAL_S"] = str(settings["bus"]["ping_interval_s"])
        nodes.start_node("n3", "--label", "zone=far", environment=environment)
        await nodes.wait_up(["n1", "n2", "n3"])
        await eventually(lambda: whole(nodes.client), message="all hear each other")
        try:
            yield nodes, link
        finally:
            nodes.nodes["n3"].kill_all()


async def whole(cluster: Cluster) -> Topology | None:
    """The picture, once it is one group of three that all hear each other and answer."""
    found = await cluster.topology(timeout=1.0)
    is_whole = (
        not found.partitioned
        and not found.one_way
        and found.totals["up"] == found.totals["answered"] == 3
        and all(len(node.hears or ()) == 2 for node in found.nodes)
        and all(ms is not None for row in found.matrix.values() for ms in row.values())
    )
    return found if is_whole else None


async def parted(cluster: Cluster) -> Topology | None:
    """The picture, once it is of more than one group."""
    found = await cluster.topology(timeout=1.0)
    return found if found.partitioned else None


def parts(found: Topology) -> set[tuple[str, ...]]:
    """The groups, without their order."""
    return {group.nodes for group in found.groups}


async def command(nodes: TestCluster, *arguments: str) -> str:
    """What ``foundation topology`` prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "foundation_cli.main", "topology", *arguments),
        *("--server", nodes.server.url, "--cluster", "test"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    return out.decode()


async def told(cluster: Cluster, what: str) -> list[ClusterEvent]:
    """The events of the topic cluster of this kind."""
    return [event for event in await cluster.events.list(topic="cluster") if event.what == what]


async def test_a_node_that_is_cut_off_in_silence_is_a_partition_until_it_is_back() -> None:
    """Seen from the rest, told once by the leader, drawn loudly; then whole and told again."""
    async with far_node(PATIENT) as (nodes, link):
        cluster = nodes.client
        before = await eventually(lambda: whole(cluster), message="whole")
        assert before is not None
        assert dict(before.zones) == {"far": ("n3",), "": ("n1", "n2")}
        assert before.leader is not None
        assert before.leader.confirmed
        assert [node.server for node in before.nodes] == [before.observer.server] * 3
        assert all(node.server_rtt_ms is not None for node in before.nodes)
        assert before.leader.node != "n3", "void: it joined last"
        shown = json.loads(await command(nodes, "-o", "json"))
        assert shown["schema"] == "foundation/v1/topology"
        assert [node["name"] for node in shown["nodes"]] == ["n1", "n2", "n3"]
        assert shown["partitioned"] is False
        assert "zone far  1 node" in await command(nodes)
        link.hold()
        found = await eventually(lambda: parted(cluster), message="a partition")
        assert found is not None
        assert parts(found) == {("n1", "n2"), ("n3",)}
        assert [group.is_known for group in found.groups] == [True, False]
        n3 = found.node("n3")
        assert n3 is not None
        assert (n3.status, n3.answered) == (NodeStatus.SUSPECT, False)
        assert found.matrix["n1"]["n3"] is None
        assert found.matrix["n1"]["n2"] is not None
        assert found.revision > before.revision
        drawn = "\n".join(lines(json.loads(render.json_text(found)), width=100))
        assert "PARTITION  2 groups" in drawn

        (event,) = await eventually(lambda: told(cluster, "partition"), message="it is told")
        assert event.data["groups"] == [["n1", "n2"], ["n3"]]
        link.release()
        after = await eventually(lambda: whole(cluster), timeout=20, message="whole again")
        assert after is not None
        assert after.revision > found.revision
        await eventually(lambda: told(cluster, "partition_healed"), message="that is told")
        assert len(await told(cluster, "partition")) == 1


async def test_a_node_that_is_given_up_and_comes_back_heals_the_partition_only_then() -> None:
    """Down is no partition in the picture, and no healing in the events."""
    quick = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 5.0}}
    async with far_node(quick) as (nodes, link):
        cluster = nodes.client
        link.hold()
        await eventually(lambda: told(cluster, "partition"), message="it is told")

        async def is_down() -> bool:
            found = await cluster.topology(timeout=0.5)
            return found.totals["down"] == 1 and not found.partitioned

        await eventually(is_down, timeout=20, message="n3 is given up")
        await asyncio.sleep(2.5)  # longer than a change must last to be told
        assert await told(cluster, "partition_healed") == []
        link.release()
        await eventually(lambda: whole(cluster), timeout=40, message="whole again")
        await eventually(lambda: told(cluster, "partition_healed"), message="that is told")


async def test_a_node_that_is_killed_is_down_and_no_partition() -> None:
    """Nobody listens for it: that is clear at once, in the picture and to the leader."""
    async with TestCluster(nodes=3, settings={"liveness": PATIENT["liveness"]}) as nodes:
        cluster = nodes.client
        await eventually(lambda: whole(cluster), message="whole")
        leader = await nodes.leader()
        victim = next(node for node in nodes.nodes.values() if node is not leader)
        victim.kill_all()
        found = await cluster.topology()
        assert not found.partitioned
        assert found.totals["down"] == 1
        await asyncio.sleep(3.0)  # longer than a partition must last to be told
        assert await told(cluster, "partition") == []


async def test_a_node_that_beats_and_is_deaf_is_a_one_way_link() -> None:
    """What goes to it is held: it is heard, and says itself that it hears nobody."""
    async with far_node(PATIENT) as (nodes, link):
        cluster = nodes.client
        link.hold("down")

        async def deaf() -> Topology | None:
            found = await cluster.topology(timeout=1.0)
            links = {OneWay("n3", "n1"), OneWay("n3", "n2")}
            return found if set(found.one_way) == links else None

        found = await eventually(deaf, timeout=15, message="both links go one way")
        assert found is not None
        assert parts(found) == {("n1", "n2"), ("n3",)}
        assert all(group.is_known for group in found.groups)
        n3 = found.node("n3")
        assert n3 is not None
        assert (n3.status, n3.answered, n3.hears) == (NodeStatus.UP, False, ())
        # Whoever begins to look now sees it too.
        async with Cluster.connect(nodes.server.url, cluster="test", name="new") as new:
            seen = await new.topology(timeout=2.0)
        assert set(seen.one_way) == set(found.one_way)
        assert parts(seen) == parts(found)
        link.release("down")
        await eventually(lambda: whole(cluster), timeout=20, message="whole again")


async def test_a_node_that_hears_and_is_mute_is_not_heard_by_the_rest() -> None:
    """What it sends is held: from outside that can't be told from a cut."""
    async with far_node(PATIENT) as (nodes, link):
        cluster = nodes.client
        link.hold("up")
        found = await eventually(lambda: parted(cluster), message="a partition")
        assert found is not None
        assert parts(found) == {("n1", "n2"), ("n3",)}
        assert found.one_way == ()
        link.release("up")
        await eventually(lambda: whole(cluster), timeout=20, message="whole again")


async def test_both_sides_of_cut_brokers_see_two_groups() -> None:
    """Three brokers, a node at each; one broker is cut off from the others with its node."""
    async with AsyncExitStack() as stack:
        brokers = await stack.enter_async_context(Brokers())
        nodes = await stack.enter_async_context(
            TestCluster(
                nodes=0,
                urls=brokers.urls,
                settings={"replicas": 3, "liveness": PATIENT["liveness"]},
            )
        )
        for number, server in enumerate(brokers.servers, 1):
            environment = {"FOUNDATION_BUS__SERVERS": server.url}
            nodes.start_node(f"n{number}", environment=environment)
        await nodes.wait_up(["n1", "n2", "n3"], timeout=40)
        # A client that gives nodes up soon, and is wrong.
        hasty = LivenessConfig(
            suspect_after_s=1.0, down_after_s=2.0, bus_grace_s=0.1, storm_hold_s=0.5
        )
        config = nodes.config.model_copy(update={"liveness": hasty})
        inside = await stack.enter_async_context(
            Cluster.connect(brokers.urls[2], cluster="test", config=config, name="inside")
        )
        outside = await stack.enter_async_context(
            Cluster.connect(brokers.urls[0], cluster="test", config=nodes.config, name="outside")
        )
        for client in (inside, outside):
            found = await eventually(partial(whole, client), timeout=30, message="whole")
            assert found is not None
            assert len(found.servers) == 3
            assert {server.cluster for server in found.servers} == {"C"}
        brokers.cut_off(brokers.servers[2])
        expected = {("n1", "n2"), ("n3",)}
        for client, known in ((outside, ("n1", "n2")), (inside, ("n3",))):

            async def two(client: Cluster = client) -> Topology | None:
                found = await client.topology(timeout=1.0)
                return found if parts(found) == expected else None

            found = await eventually(two, timeout=20, message="two groups")
            assert found is not None
            assert [group.nodes for group in found.groups if group.is_known] == [known]
            assert {node.name for node in found.nodes if node.answered} == set(known)
        changes = await inside._open_changes()

        def given_up() -> bool:
            return not any(changes.view().nodes[name].is_alive for name in ("n1", "n2"))

        await eventually(given_up, timeout=20, message="the client inside gives n1 and n2 up")
        still = await inside.topology(timeout=1.0)
        assert parts(still) == expected, "what only this client believes ends nobody"
        brokers.heal()
        for client in (inside, outside):
            await eventually(partial(whole, client), timeout=60, message="whole again")


async def test_a_flush_that_timed_out_leaves_no_deaf_connection(server: TestServer) -> None:
    """Its answer comes late, when nobody waits for it: what comes after is read all the same."""
    async with await Link.open(*link_to(server)) as link:
        bus = await Bus.connect(BusConfig(servers=(link.url,), ping_interval_s=60), "client")
        try:
            heard: list[Message] = []
            bus.subscribe("there", heard.append)
            await bus.flush()
            link.hold("down")
            with pytest.raises(BusTimeoutError):
                await bus.flush(0.2)
            link.release("down")
            began = monotonic()
            bus.publish("there", b"")
            await eventually(lambda: heard, timeout=5, message="it is heard")
            await bus.flush(1.0)
            assert monotonic() - began < 5
            assert bus.statistics().reconnects == 0
        finally:
            await bus.close()
