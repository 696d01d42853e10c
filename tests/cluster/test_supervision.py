"""Children on real nodes: had once, restarted, ended with their parents, whatever is killed meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from foundation_nats.errors import AgentNotFoundError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def _state(nodes: TestCluster, id: str) -> dict[str, Any]:
    record = await nodes.client.agents.state(id)
    return {} if record is None else dict(record["state"])


async def _until(nodes: TestCluster, id: str, timeout: float = 20, **wanted: Any) -> None:
    async def so() -> bool:
        state = await _state(nodes, id)
        return all(state.get(key) == value for key, value in wanted.items())

    try:
        await eventually(so, timeout=timeout, message=f"{id} is {wanted}")
    except AssertionError as error:
        error.add_note(f"{id} is {await _state(nodes, id)}")
        raise


async def _gone(nodes: TestCluster, id: str) -> None:
    async def gone() -> bool:
        try:
            await nodes.client.agents.get(id)
        except AgentNotFoundError:
            return id not in await nodes.client.deployments.wishes()
        return False

    await eventually(gone, timeout=20, message=f"{id} is gone")


async def _runs(nodes: TestCluster, id: str) -> None:
    async def runs() -> bool:
        try:
            return (await nodes.client.agents.get(id)).status == "running"
        except AgentNotFoundError:
            return False

    await eventually(runs, timeout=20, message=f"{id} runs")


async def test_a_child_is_had_used_and_told_of() -> None:
    """Mail may be sent before it runs; its end, by itself or by order, is told once."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Boss", id="boss")
        assert await client.ask("boss", "have", {"tag": "a"}) == "boss_a"
        assert await client.ask("boss", "have", {"tag": "a"}) == "boss_a"
        await client.send("boss_a", "add", 5)
        # Which of two that are had at once runs first, and is told of first, is up to the cluster.
        await _until(nodes, "boss", started=["a"])
        await client.ask("boss", "have", {"id": "named", "restart": "temporary"})
        await _until(nodes, "boss", started=["a", "named"])
        await _until(nodes, "boss_a", total=5, parent="boss", starts=1)
        assert await client.ask("boss", "children") == {"a": "running", "named": "running"}
        await client.send("boss_a", "done")
        await _until(nodes, "boss", exited=["a stopped"])
        assert await client.ask("boss", "end", "named")
        assert not await client.ask("boss", "end", "nobody")
        await _until(nodes, "boss", exited=["a stopped", "named stopped"])
        await _gone(nodes, "boss_a")
        await _gone(nodes, "named")
        # Stopped before it could be started, refused, and had again.
        await client.agents.start("parents:Kid", id="alone")
        await client.ask("boss", "have", {"id": "alone"})
        await _until(nodes, "boss", exited=["a stopped", "named stopped", "alone refused"])
        await client.ask("boss", "have", {"tag": "a"})
        await _until(nodes, "boss_a", starts=2, total=5)
        await _until(nodes, "boss", started=["a", "named", "a"])
        assert await client.ask("boss", "adopt", "alone") == "alone"
        await _until(nodes, "alone", parent="boss")
        await _until(nodes, "boss", started=["a", "named", "a", "alone"])
        # By hand it is as any other, and its parent hears of it.
        await client.agents.stop("boss_a")
        await _until(
            nodes, "boss", exited=["a stopped", "named stopped", "alone refused", "a stopped"]
        )


async def test_the_end_of_a_parent_is_the_end_of_its_children_or_not() -> None:
    """As each link says: and only its end for good."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Boss", id="boss", critical=True)
        for tag, fate in (("s", "stop"), ("c", "continue"), ("o", "emit_orphan")):
            child = {"tag": tag, "on_parent_death": fate, "critical": True}
            await client.ask("boss", "have", child)
        for tag in "sco":
            await _runs(nodes, f"boss_{tag}")
        node = (await client.agents.get("boss")).node
        assert node is not None
        nodes.nodes[node].kill_all()
        survivor = next(name for name in nodes.nodes if name != node)
        await eventually(lambda: _is_on(nodes, "boss", survivor), timeout=20)
        for tag in "sco":
            await _runs(nodes, f"boss_{tag}")
        assert (await _state(nodes, "boss"))["exited"] == []
        await client.agents.stop("boss")
        await _gone(nodes, "boss_s")
        await _until(nodes, "boss_o", orphaned=["boss"])
        await _runs(nodes, "boss_c")
        assert (await _state(nodes, "boss_c"))["orphaned"] == []
        # An orphan can be adopted.
        await client.agents.start("parents:Boss", id="other")
        await client.ask("other", "adopt", "boss_o")
        await _until(nodes, "boss_o", parent="other")


async def _is_on(nodes: TestCluster, id: str, node: str) -> bool:
    info = await nodes.client.agents.get(id)
    return info.node == node and info.status == "running"


async def test_a_transient_parent_that_stops_takes_its_children_with_it() -> None:
    """It has ended for good, although its wish stands."""
    async with TestCluster(nodes=1, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Boss", id="top", restart="transient")
        await client.ask("top", "have", {"tag": "kid"})
        await _runs(nodes, "top_kid")
        await client.send("top", "leave")
        await _gone(nodes, "top_kid")
        assert (await client.agents.get("top")).status == "stopped"


@pytest.mark.parametrize("point", ["child.before_wish", "child.after_wish", "handle.after"])
async def test_a_parent_that_dies_while_it_spawns_has_each_child_once(point: str) -> None:
    """Between the commit and the wish, and around both."""
    armed = {"FOUNDATION_FAILPOINTS": f"{point}=1in4(kill)"}
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        nodes.start_node("n1", environment=armed)
        nodes.start_node("n2")
        await nodes.wait_up(["n1", "n2"])
        client = nodes.client
        on_first = {"expressions": []}
        await client.agents.start("parents:Boss", id="boss", critical=True, placement=on_first)
        tags = [f"k{n}" for n in range(8)]
        for tag in tags:
            await client.send("boss", "have", {"tag": tag})
        for tag in tags:
            await _runs(nodes, f"boss_{tag}")

        async def all_started() -> bool:
            return sorted((await _state(nodes, "boss"))["started"]) == tags

        await eventually(all_started, timeout=20, message="each is told of once")
        for tag in tags:
            await client.send(f"boss_{tag}", "done")

        async def all_exited() -> bool:
            found = (await _state(nodes, "boss"))["exited"]
            return sorted(found) == [f"{tag} stopped" for tag in tags]

        await eventually(all_exited, timeout=30, message="each end is told of once")


async def test_a_child_that_has_come_and_gone_before_its_parent_is_recovered_is_not_had_again() -> (
    None
):
    """The parent dies between the wish and its commit, and carries out the same order once more."""
    armed = {"FOUNDATION_FAILPOINTS": "child.after_wish=once(1,sleep(60))"}
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        fragile = nodes.start_node("n1", "--workers", "1", environment=armed)
        await nodes.wait_up(["n1"])
        client = nodes.client
        await client.agents.start("parents:Boss", id="boss", critical=True)
        nodes.start_node("n2", "--workers", "1")
        await nodes.wait_up(["n1", "n2"])
        await client.nodes.cordon("n1")
        await client.send("boss", "send_out", "errand")

        async def buried() -> bool:
            whats = [event.what for event in await client.events.list(topic="agent", limit=200)]
            return "child_ended" in whats and "boss_errand" not in await client.deployments.wishes()

        await eventually(buried, timeout=20, message="the child has come and gone")
        fragile.kill_all()
        await _until(nodes, "boss", exited=["errand stopped"])
        await client.send("boss", "send_out", "again")
        await _until(nodes, "boss", exited=["errand stopped", "again stopped"])
        state = await client.agents.state("boss_errand")
        assert state is not None
        assert state["state"]["starts"] == 1
        assert set(await client.deployments.wishes()) == {"boss"}
        assert [info.id for info in await client.agents.list()] == ["boss"]


async def test_a_leader_that_dies_while_it_tells_of_an_end_tells_it_once() -> None:
    """Between the signal to the parent and the end of the wish: the next leader sends it again."""
    armed = {"FOUNDATION_FAILPOINTS": "kin.after_signal=kill"}
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        nodes.start_node("n1", environment=armed)
        await nodes.wait_up(["n1"])
        nodes.start_node("n2")
        await nodes.wait_up(["n1", "n2"])
        client = nodes.client
        assert (await nodes.leader()).name == "n1"
        await client.agents.start("parents:Boss", id="boss", critical=True)
        await client.ask("boss", "have", {"tag": "kid", "critical": True})
        await _until(nodes, "boss", started=["kid"])
        await client.send("boss_kid", "done")
        await eventually(lambda: not nodes.nodes["n1"].is_running, message="the leader is killed")
        await _gone(nodes, "boss_kid")
        await _until(nodes, "boss", exited=["kid stopped"])
        await client.send("boss", "have", {"tag": "kid", "critical": True})
        await _until(nodes, "boss", started=["kid", "kid"], exited=["kid stopped"])


async def test_children_of_a_lost_node_follow_their_policies() -> None:
    """A transient one goes on elsewhere, a temporary one has failed; a parent that moved hears it."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Boss", id="boss", critical=True)
        node = (await client.agents.get("boss")).node
        for tag, more in (
            ("t", {"restart": "temporary"}),
            ("c", {"critical": True}),
            ("l", {"place": "local", "critical": True}),
        ):
            await client.ask("boss", "have", {"tag": tag, "place": "local", **more})
        for tag in "tcl":
            await _runs(nodes, f"boss_{tag}")
            assert (await client.agents.get(f"boss_{tag}")).node == node
        assert node is not None
        nodes.nodes[node].kill_all()
        survivor = next(name for name in nodes.nodes if name != node)
        for tag in "cl":
            await eventually(
                lambda tag=tag: _is_on(nodes, f"boss_{tag}", survivor),  # type: ignore[misc]
                timeout=20,
                message="it follows its parent",
            )
        await _until(nodes, "boss", exited=["t failed"])


async def test_a_local_child_follows_a_parent_that_is_moved() -> None:
    """A drained node keeps neither."""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Boss", id="boss")
        await client.ask("boss", "have", {"tag": "l", "place": "local"})
        await _runs(nodes, "boss_l")
        node = (await client.agents.get("boss")).node
        assert node is not None
        survivor = next(name for name in nodes.nodes if name != node)
        await client.nodes.drain(node)
        await eventually(lambda: _is_on(nodes, "boss", survivor), timeout=20)
        await eventually(lambda: _is_on(nodes, "boss_l", survivor), timeout=20)


async def test_one_for_all_restarts_the_group_and_gives_up_in_the_end() -> None:
    """The parent's strategy: siblings end and start with the one that died, until it is too often."""
    async with TestCluster(nodes=1, workers=2, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Team", id="team", restart="transient")
        await client.ask("team", "have", {"tag": "a"})
        await client.ask("team", "have", {"tag": "b"})
        await _until(nodes, "team_a", starts=1)
        await _until(nodes, "team_b", starts=1)
        await client.ask("team", "have", {"tag": "bad", "config": {"broken": True}})
        await eventually(lambda: _starts(nodes, "team_a"), timeout=20)
        for id in ("team_a", "team_b", "team_bad"):
            await _gone(nodes, id)
        assert (await client.agents.get("team")).status == "stopped"


async def test_agents_that_want_it_hear_of_the_cluster() -> None:
    """A lost node by its name, the next leader, and their own move."""
    async with TestCluster(nodes=3, workers=1, path=[str(AGENTS)]) as nodes:
        client = nodes.client
        await client.agents.start("parents:Listener", id="ear", critical=True)
        await client.agents.start("parents:Kid", id="deaf", critical=True)
        home = (await client.agents.get("ear")).node
        leader = await nodes.leader()
        victim = next(name for name in nodes.nodes if name != home and name != leader.name)
        nodes.nodes[victim].kill_all()

        async def heard(what: str) -> bool:
            return (await _state(nodes, "ear")).get("heard", []).count(what) == 1

        await eventually(lambda: heard(f"node_down {victim}"), timeout=20, message="node_down")
        nodes.start_node(victim)
        await eventually(lambda: heard(f"node_up {victim}"), timeout=20, message="node_up")
        leader.kill_all()
        await eventually(lambda: heard(f"node_down {leader.name}"), timeout=20, message="leader")
        found = (await _state(nodes, "ear"))["heard"]
        assert any(item.startswith("leader_changed") for item in found), found
        await eventually(lambda: _runs_somewhere(nodes, "ear"), timeout=20)
        home = (await client.agents.get("ear")).node
        assert home is not None
        await client.nodes.drain(home)
        await eventually(lambda: heard(f"about_to_move {home}"), timeout=20, message="moved")
        assert await client.dead.list() == []


async def _starts(nodes: TestCluster, id: str) -> bool:
    return (await _state(nodes, id)).get("starts", 0) > 1


async def _runs_somewhere(nodes: TestCluster, id: str) -> bool:
    return (await nodes.client.agents.get(id)).status == "running"
