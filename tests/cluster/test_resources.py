"""Capacity is given away once, whoever asks, dies or leads meanwhile; what is reserved and not used comes back."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from foundation_nats import Cluster
from foundation_nats.api.resources import Verdict
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket
from foundation_nats.chaos.checkers import check_capacity, check_ledgers, check_reservations
from foundation_nats.chaos.checkers.reservations import Claim
from foundation_nats.chaos.observer import Observer
from foundation_nats.chaos.workloads.reservations import books_differ
from foundation_nats.cluster.ledgers import BUCKET, PREFIX, Ledgers
from foundation_nats.errors import (
    BusyError,
    ConfigError,
    InfeasibleError,
    NodeNotFoundError,
    NotFoundError,
    ReservationLostError,
)
from foundation_nats.testing import TestCluster, eventually
from tests.cluster.children import Children
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

GPUS = 4
QUICK: dict[str, object] = {"liveness": {"suspect_after_s": 1.0, "down_after_s": 2.0}}
FLEET = """
version: 1
agents:
  - {{name: fleet, run: "fleet:Counter", replicas: {count}, resources: {{gpu: {each}}}}}
"""


@asynccontextmanager
async def cluster_of(
    count: int, *, gpus: int = GPUS, settings: dict[str, object] | None = None
) -> AsyncIterator[TestCluster]:
    """Nodes that have so many gpus each."""
    async with TestCluster(nodes=0, path=[str(AGENTS)], settings=settings or {}) as nodes:
        names = [f"n{number + 1}" for number in range(count)]
        for name in names:
            nodes.start_node(name, "--capacity", f"gpu={gpus}")
        await nodes.wait_up(names)
        await open_for(nodes.client, names)
        yield nodes


async def open_for(cluster: Cluster, names: list[str]) -> None:
    """Wait until these nodes have opened their books."""

    async def opened() -> bool:
        check = await cluster.resources.can_allocate({"gpu": 0.001})
        joining = [item.node for item in check.nodes if "joining" in item.reason]
        return {item.node for item in check.nodes} >= set(names) and not joining

    await eventually(opened, timeout=10, message="the books are open")


async def settled(cluster: Cluster) -> None:
    """Wait until no reservation is left, and the books name what runs."""

    async def quiet() -> bool:
        agents = await cluster.agents.list()
        return (
            not await cluster.resources.list()
            and all(agent.status in ("running", "pending") for agent in agents)
            and await books_differ(cluster) is None
        )

    await eventually(quiet, timeout=30, every=0.1, message="all has ended, and the books are right")


async def test_ten_clients_and_two_leaders_never_get_more_than_there_is() -> None:
    """Clients die and others come, agents come and go, the leader freezes and wakes beside the next."""
    await contend("freeze")


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_ten_clients_never_get_more_than_there_is_when_the_leader_dies() -> None:
    """The same with SIGKILL of the leader's node, and its next life."""
    await contend("kill")


async def contend(trouble: str) -> None:
    """Judged at every revision of the books, by what each client believes, and at the end."""
    chance = random.Random(trouble)
    async with cluster_of(3, settings=QUICK) as nodes:
        cluster = nodes.client
        scope = TaskScope("observer")
        observer = Observer(cluster, watch_state=False)
        await observer.open(scope)
        at = nodes.config.bus.servers[0], nodes.config.cluster
        killed = 0
        try:
            with Children() as children:
                bookers = [
                    children.start("tests.cluster.booker", *at, f"booker-{number}", str(number))
                    for number in range(10)
                ]
                await eventually(lambda: all(b.said("claim") for b in bookers), timeout=30)
                leader = await nodes.leader()
                leader.pause() if trouble == "freeze" else leader.kill_all()
                broken_at = monotonic()
                successors: set[str] = set()
                number = 10
                while monotonic() - broken_at < 6 or not successors - {leader.name}:
                    # Agents come and go, clients die and others come.
                    wish = FLEET.format(count=chance.randint(0, 8), each=chance.choice((1, 2)))
                    await cluster.deployments.apply(wish)
                    victim = chance.randrange(len(bookers))
                    bookers[victim].kill()
                    killed += 1
                    bookers[victim] = children.start(
                        "tests.cluster.booker", *at, f"booker-{number}", str(number)
                    )
                    number += 1
                    await asyncio.sleep(0.4)
                    if (lease := await cluster.leader()) is not None:
                        successors.add(lease.holder)
                        if lease.holder != leader.name and trouble == "freeze":
                            leader.resume()  # which believes for a moment that it leads
                if trouble == "kill":
                    nodes.start_node(leader.name, "--capacity", f"gpu={GPUS}")
                await nodes.wait_up(list(nodes.nodes), timeout=30)
                for booker in bookers:
                    booker.kill()
                claims = list(_claims(line for c in children.all for line in c.said("claim")))
                errors = {line.split()[1] for c in children.all for line in c.said("error")}
            await settled(cluster)
        finally:
            await scope.close()
        print(
            f"{len(claims)} claims, {len(observer.ledgers)} revisions, {killed} clients killed; "
            f"errors: {sorted(errors)}"
        )
        assert len(claims) > 50, "void: too few claims"
        assert max(sum(dict(s.agents).values()) for s in observer.ledgers) > 0, "void: no agents"
        for judgement in (
            check_ledgers(observer.ledgers),
            check_reservations(claims, observer.ledgers, observer.capacity),
            check_capacity(observer.assignments, observer.capacity),
        ):
            assert not judgement.violations, judgement
        assert errors <= {"placement.busy", "bus.timeout", "reservation.lost"}
        whats = [event.what for event in await cluster.events.list(topic="resources", limit=500)]
        assert "reclaimed" in whats, "what dead clients held was reclaimed"


def _claims(lines: object) -> list[Claim]:
    """The claims as last said; the needs are tuples again."""
    found = {}
    for line in lines:  # type: ignore[attr-defined]
        values = orjson.loads(line.split(" ", 1)[1])
        values["needs"] = tuple((name, amount) for name, amount in values["needs"])
        found[values["id"]] = Claim(**values)
    return list(found.values())


async def test_a_client_that_dies_before_it_knows_what_it_has_gives_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """reserve.after: it is written, and nobody hears of it. It is held, then free again (R-53)."""
    async with cluster_of(1) as nodes:
        cluster = nodes.client
        monkeypatch.setenv("FOUNDATION_FAILPOINTS", "reserve.after=kill")
        with Children() as children:
            child = children.start(
                "tests.cluster.reserver", nodes.server.url, nodes.config.cluster, str(GPUS), "2"
            )
            await eventually(lambda: child.process.poll() is not None, message="it dies")
            assert child.process.returncode == -signal.SIGKILL, child.lines()[-5:]
            assert not child.said("got")
        monkeypatch.delenv("FOUNDATION_FAILPOINTS")
        (held,) = await cluster.resources.list()
        assert held.holder == "reserver"
        with pytest.raises(BusyError):
            await cluster.resources.reserve({"gpu": 1.0}, timeout=0.2)

        async def free() -> bool:
            taken = await cluster.resources.reserve({"gpu": float(GPUS)}, ttl=5, timeout=1)
            return bool(taken.id)

        await eventually(free, timeout=10, message="it is free again")


async def test_a_reservation_holds_back_agents_until_it_expires_and_they_start_by_themselves() -> (
    None
):
    """Pending with the reason meanwhile; the leader tells of it."""
    async with cluster_of(1, gpus=1) as nodes:
        cluster = nodes.client
        mine = await cluster.resources.reserve({"gpu": 1}, ttl=3, holder="me")
        ref = await cluster.agents.start(
            "fleet:Counter", id="late", resources={"gpu": 1}, wait=False
        )

        async def status() -> str:
            return (await cluster.agents.get(ref.id)).status

        async def is_pending() -> bool:
            return await status() == "pending"

        await eventually(is_pending, timeout=2.5, message="it waits for the room")
        info = await cluster.agents.get("late")
        assert "gpu" in (info.reason or "")
        report = await cluster.resources.report()
        (demand,) = report.unmet
        assert (demand.deployment, demand.agents, demand.verdict) == ("late", 1, Verdict.BUSY)
        assert demand.needs["gpu"] == 1
        amount = report.total["gpu"]
        assert (amount.capacity, amount.used, amount.reserved, amount.free) == (1, 0, 1, 0)
        assert (await cluster.resources.get(mine)).holder == "me"

        async def runs() -> bool:
            return await status() == "running"

        await eventually(runs, timeout=8, message="it starts once the reservation is over")
        with pytest.raises(ReservationLostError):
            await cluster.resources.confirm(mine)
        await cluster.resources.release(mine)
        events = await cluster.events.list(topic="resources")
        reclaimed = [event for event in events if event.what == "reclaimed"]
        assert [event.data["reservations"] for event in reclaimed] == [[mine.id]]
        assert reclaimed[0].data["holders"] == ["me"]
        assert (await cluster.resources.report()).total["gpu"].used == 1


async def test_a_reservation_becomes_an_agent_on_its_node() -> None:
    """Confirmed or only held; the agent runs there although nothing else is free."""
    async with cluster_of(2, gpus=2) as nodes:
        cluster = nodes.client
        resources = cluster.resources
        mine = await resources.reserve({"gpu": 2}, node="n2", agent="bound")
        await resources.confirm(mine)
        assert not await resources.can_allocate({"gpu": 1}, node="n2")
        with pytest.raises(BusyError, match="gpu"):
            await resources.reserve({"gpu": 1}, node="n2", timeout=1)
        await cluster.agents.start(
            "fleet:Counter", id="bound", resources={"gpu": 2}, reservation=mine
        )
        assert (await cluster.agents.get("bound")).node == "n2"
        with pytest.raises(NotFoundError):
            await resources.get(mine)
        with pytest.raises(ReservationLostError):
            await resources.confirm(mine)
        report = await resources.report()
        used = {node.node: node.resources["gpu"].used for node in report.nodes}
        assert used == {"n1": 0, "n2": 2}
        # One that is gone is no obstacle: the agent is placed like any other.
        await cluster.agents.start(
            "fleet:Counter", id="other", resources={"gpu": 1}, reservation=mine.id
        )
        assert (await cluster.agents.get("other")).node == "n1"
        await cluster.agents.stop("bound")
        await settled(cluster)
        again = await resources.reserve({"gpu": 2}, strategy="pack")
        assert again.node == "n2"
        await resources.release(again)
        await resources.release(again)
        await settled(cluster)


async def test_an_agent_moves_only_to_where_its_share_is_free() -> None:
    """Drained from its node it takes its share along; reserved room is not taken from anybody."""
    async with cluster_of(2, gpus=2) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="a", resources={"gpu": 2})
        home = (await cluster.agents.get("a")).node
        other = "n1" if home == "n2" else "n2"
        mine = await cluster.resources.reserve({"gpu": 1}, node=other)
        await cluster.resources.confirm(mine)
        plan = await cluster.nodes.plan_drain(str(home))
        assert "gpu" in plan.stuck["a"][other]
        await cluster.resources.release(mine)
        await cluster.nodes.drain(str(home), timeout=20)
        assert (await cluster.agents.get("a")).node == other
        await settled(cluster)
        used = {n.node: n.resources["gpu"].used for n in (await cluster.resources.report()).nodes}
        assert used == {home: 0, other: 2}


async def test_reservations_outlive_a_new_life_of_their_node_and_the_loss_of_its_books() -> None:
    """SIGKILL and restart; the same with less capacity; books deleted under agents that run."""
    async with cluster_of(1, gpus=3, settings=QUICK) as nodes:
        cluster, node = nodes.client, nodes.nodes["n1"]
        resources = cluster.resources
        held = await resources.reserve({"gpu": 1}, ttl=300)
        firm = await resources.confirm(await resources.reserve({"gpu": 1}))
        before = (await cluster.nodes.get("n1")).incarnation
        node.kill_all()
        nodes.start_node("n1", "--capacity", "gpu=1")
        await nodes.wait_up(["n1"])
        assert (await cluster.nodes.get("n1")).incarnation > before
        await open_for(cluster, ["n1"])
        assert [item.id for item in await resources.list()] == [firm.id], "the confirmed one stays"
        with pytest.raises(ReservationLostError):
            await resources.confirm(held)

        async def told() -> bool:
            events = await cluster.events.list(topic="resources")
            return [e.data["reservations"] for e in events if e.what == "dropped"] == [[held.id]]

        await eventually(told, timeout=5, message="it is told that a reservation had to go")
        await resources.release(firm)
        await cluster.agents.start("fleet:Counter", id="a", resources={"gpu": 1})
        await Bucket(cluster.bus, cluster.subjects, BUCKET).delete(PREFIX + "n1")
        assert not await resources.can_allocate({"gpu": 1}), "books that are gone give nothing"
        await open_for(cluster, ["n1"])
        assert (await resources.report()).total["gpu"].used == 1
        with pytest.raises(BusyError):
            await resources.reserve({"gpu": 1}, timeout=1)


async def test_the_books_of_a_life_that_never_was_give_way_to_the_nodes_own() -> None:
    """A clock that was ahead had numbered them; the node's record says which life is the present one."""
    async with cluster_of(1, gpus=1) as nodes:
        cluster = nodes.client
        ledgers = Ledgers(cluster.bus, cluster.subjects)
        read = await ledgers.read("n1")
        assert read.record is not None
        ahead = read.record.model_copy(update={"incarnation": read.record.incarnation + 10**9})
        await ledgers.write(ahead, read)
        await cluster.agents.start("fleet:Counter", id="a", resources={"gpu": 1}, timeout=15)
        after = (await ledgers.read("n1")).record
        assert after is not None
        assert (after.incarnation, after.agents) == (read.record.incarnation, {"gpu": 1.0})


async def test_what_is_asked_in_vain_says_why() -> None:
    """Never, not now, wrong; a frozen node is no obstacle, and one that has left is the end."""
    async with cluster_of(2, gpus=2) as nodes:
        resources = nodes.client.resources
        with pytest.raises(InfeasibleError, match="n1"):
            await resources.reserve({"gpu": 3})
        with pytest.raises(InfeasibleError, match="tpu"):
            await resources.reserve({"tpu": 1})
        with pytest.raises(NodeNotFoundError):
            await resources.reserve({"gpu": 1}, node="n9")
        for wrong in ({}, {"gpu": 0}, {"gpu": -1}, {"gpu": float("nan")}, {"g p u": 1}):
            with pytest.raises(ConfigError):
                await resources.reserve(wrong)
        with pytest.raises(ConfigError, match="ttl"):
            await resources.reserve({"gpu": 1}, ttl=0.1)
        with pytest.raises(ConfigError, match="strategy"):
            await resources.reserve({"gpu": 1}, strategy="best")
        with pytest.raises(ConfigError, match="id"):
            await resources.confirm("nonsense")
        check = await resources.can_allocate({"gpu": 2, "cpu": 0.1})
        assert check
        assert [item.verdict for item in check.nodes] == [Verdict.FITS] * 2
        await nodes.client.nodes.cordon("n1")
        mine = await resources.reserve({"gpu": 1}, ttl=60)
        assert mine.node == "n2"
        check = await resources.can_allocate({"gpu": 2})
        assert not check
        assert check.verdict is Verdict.BUSY
        assert {item.node: item.verdict for item in check.nodes} == {
            "n1": Verdict.UNAVAILABLE,
            "n2": Verdict.BUSY,
        }
        nodes.nodes["n2"].process.send_signal(signal.SIGSTOP)
        try:
            assert (await resources.confirm(mine, ttl=60)).state == "confirmed"
        finally:
            nodes.nodes["n2"].process.send_signal(signal.SIGCONT)
        nodes.nodes["n2"].terminate()
        assert await nodes.nodes["n2"].wait() == 0
        with pytest.raises(ReservationLostError, match="left"):
            await resources.confirm(mine)
        await resources.release(mine)
        assert not await resources.list()


async def test_a_plan_gives_away_nothing_that_is_reserved() -> None:
    """All there is is held by somebody: the plan says that the agents would wait, and for what."""
    async with cluster_of(1) as nodes:
        cluster = nodes.client
        manifest = FLEET.format(count=2, each=2)
        held = await cluster.resources.reserve({"gpu": GPUS}, ttl=60)
        found = await cluster.deployments.plan(manifest)
        assert not found.placements
        assert set(found.unplaceable) == {"fleet-0", "fleet-1"}
        assert all("gpu" in reasons["n1"] for reasons in found.unplaceable.values())
        await cluster.resources.release(held)
        found = await cluster.deployments.plan(manifest)
        assert dict(found.placements) == {"fleet-0": "n1", "fleet-1": "n1"}
        assert not found.unplaceable
