"""Replicated domains in handlers and on nodes: one order everywhere, each decision once."""

from __future__ import annotations

import asyncio

import pytest

from foundation_nats.agent.replicated import load_domain
from foundation_nats.errors import ConfigError
from foundation_nats.testing import AgentHarness, TestCluster, eventually
from tests.agents.deciders import Book, Decider, Seats
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


AGENTS_MAX = 4
SEATS = [f"{row}A" for row in range(10)]


async def test_agents_decide_by_a_domain_that_every_node_follows() -> None:
    """All want every seat: each is taken once, in one order on every node, and the handlers know."""
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        for name in ("n1", "n2"):
            nodes.start_node(name, "--domain", "deciders:Seats")
        await nodes.wait_up(["n1", "n2"])
        for number in range(AGENTS_MAX):
            await cluster.agents.start("deciders:Decider", id=f"d{number}")
        for seat in SEATS:
            for number in range(AGENTS_MAX):
                await cluster.send(f"d{number}", "seats.book", {"seat": seat, "by": f"d{number}"})

        async def decided() -> list[dict[str, list[str]]] | None:
            stored = [await cluster.agents.state(f"d{number}") for number in range(AGENTS_MAX)]
            states = [item["state"] for item in stored if item is not None]
            total = sum(len(s["accepted"]) + len(s["rejected"]) for s in states)
            return states if total == AGENTS_MAX * len(SEATS) else None

        states = await eventually(decided, timeout=30, message="each has an answer for each seat")
        assert sorted(seat for state in states for seat in state["accepted"]) == SEATS
        plan = await cluster.consensus.read(Seats)
        assert {
            seat: f"d{number}" for number, state in enumerate(states) for seat in state["accepted"]
        } == plan.taken
        revision = (await cluster.consensus.open(Seats)).revision

        async def everywhere(names: set[str]) -> bool:
            return await cluster.consensus.hosts("seats") == dict.fromkeys(names, revision)

        await eventually(lambda: everywhere({"n1", "n2"}), message="every node has applied all")
        views = [await cluster.ask(f"d{number}", "seats.view") for number in range(AGENTS_MAX)]
        assert all(view["taken"] == plan.taken for view in views)
        assert all(view["seen"] == plan.order for view in views)
        where = [(await cluster.agents.get(f"d{number}")).node for number in range(AGENTS_MAX)]
        assert len({*where}) == 2
        assert len({(node, view["replica"]) for node, view in zip(where, views, strict=True)}) == 2
        # Who comes late catches up, although no agent there has asked for it.
        nodes.start_node("n3", "--domain", "deciders:Seats")
        await nodes.wait_up(["n3"])
        await eventually(lambda: everywhere({"n1", "n2", "n3"}), message="n3 has applied all")


async def test_a_proposal_of_a_handler_that_is_tried_again_takes_effect_once() -> None:
    """It raises after the proposal was accepted; the second try gets the first one's answer."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("deciders:Decider", id="d")
        for seat in SEATS[:3]:
            await cluster.send("d", "seats.book", Book(seat=seat, by="d", fail_first=True))

        async def handled() -> bool:
            stored = await cluster.agents.state("d")
            return stored is not None and stored["state"]["accepted"] == SEATS[:3]

        await eventually(handled, timeout=20, message="all are accepted by the second try")
        assert (await cluster.consensus.read(Seats)).order == SEATS[:3]
        assert [entry.operation["seat"] for entry in await cluster.consensus.log("seats")] == SEATS[
            :3
        ]


async def test_a_node_is_not_started_for_a_domain_that_is_none() -> None:
    """A module that is nowhere is refused at once, with what to do."""
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        for wrong in ("nowhere_at_all:Seats", "deciders"):
            node = nodes.start_node("n1", "--domain", wrong)
            assert await asyncio.wait_for(node.wait(), 20) == 2
            nodes.nodes.pop("n1", None)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deciders", "not of the form"),
        ("tests.agents.nowhere:Seats", "can't be imported"),
        ("tests.agents.deciders:Decider", "not a subclass of foundation_nats.Domain"),
        ("tests.agents.deciders:Nobody", "not a subclass of foundation_nats.Domain"),
    ],
)
def test_what_is_no_domain_is_named(name: str, says: str) -> None:
    """By what is wrong with it."""
    with pytest.raises(ConfigError, match=says):
        load_domain(name)
    assert load_domain("tests.agents.deciders:Seats") is Seats


async def test_without_a_cluster_there_are_no_domains() -> None:
    """A plain test is told so."""
    async with AgentHarness(Decider, id="d") as agent:
        with pytest.raises(ConfigError, match="without a cluster"):
            _ = agent.agent.ctx.consensus
