"""Elections, semaphores and counters whose holders die, freeze and come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    LockLostError,
    LockTimeoutError,
)
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.links import Link
from tests.cluster.children import Child, Children
from tests.cluster.domains import FencedResource

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_TTL_S = 2.0


@pytest.fixture
async def cluster(server: TestServer) -> AsyncIterator[Cluster]:
    """A client."""
    async with Cluster.connect(server.url, name="tester") as client:
        yield client


# ---- elections ------------------------------------------------------------------------


async def test_one_leads_and_a_resignation_is_heard_at_once(cluster: Cluster) -> None:
    """Terms grow, observers see both, and the loser names the leader."""
    one = cluster.leases.election("boss", candidate="one", value="host-1")
    two = cluster.leases.election("boss", candidate="two")
    seen: list[tuple[str, int] | None] = []

    async def observe() -> None:
        async for record in cluster.leases.election("boss").observe():
            seen.append(None if record is None else (record.leader or "", record.term))

    observer = asyncio.create_task(observe())
    first = await one.campaign(timeout=5)
    assert one.is_leader
    assert one.check() == first
    with pytest.raises(LockTimeoutError, match="led by one"):
        await two.campaign(timeout=0.3)
    assert not two.is_leader
    leader = await two.leader()
    assert leader is not None
    assert (leader.leader, leader.value, leader.term) == ("one", "host-1", first)
    waiting = asyncio.create_task(two.campaign(timeout=5))
    await asyncio.sleep(0)
    began = monotonic()
    await one.resign()
    second = await waiting
    assert monotonic() - began < 2, "it waited for the lease to lapse"
    assert second > first
    assert not one.is_leader
    assert not one.lost.is_set()
    with pytest.raises(LockLostError, match="one does not lead boss"):
        one.check()
    await eventually(lambda: seen[-1:] == [("two", second)])
    assert ("one", first) in seen
    await two.resign()
    third = await one.campaign(timeout=5)
    assert third > second
    await one.resign()
    assert await one.leader() is None
    observer.cancel()
    await asyncio.wait([observer])


async def test_a_leader_that_is_cut_off_knows_before_another_leads(server: TestServer) -> None:
    """No message arrives, no connection is closed: the tenure ends by its own clock."""
    host, port = server.url.removeprefix("nats://").split(":")
    async with (
        await Link.open(host, int(port)) as link,
        Cluster.connect(link.url, name="far") as far,
        Cluster.connect(server.url, name="near") as near,
    ):
        old = far.leases.election("boss", ttl_s=_TTL_S)
        new = near.leases.election("boss", ttl_s=_TTL_S)
        first = await old.campaign(timeout=5)
        waiting = asyncio.create_task(new.campaign(timeout=20))
        link.hold()
        both = 0
        while not new.is_leader:
            await asyncio.sleep(0.05)
            both += old.is_leader and new.is_leader
        assert both == 0
        assert old.lost.is_set()
        assert await waiting > first
        link.heal()
        await new.resign()
        await old.resign()


async def test_a_frozen_leader_comes_back_and_is_fenced(
    server: TestServer, cluster: Cluster
) -> None:
    """SIGSTOP for longer than the TTL, SIGCONT: what it writes under the old term is refused."""
    with Children() as children:
        one, two = [
            children.start("tests.cluster.campaigner", server.url, name, f"{_TTL_S}")
            for name in ("one", "two")
        ]
        leader: Child = await eventually(
            lambda: next((child for child in (one, two) if child.said("leads")), None), timeout=20
        )
        follower = two if leader is one else one
        replica = await cluster.consensus.open(FencedResource)
        await eventually(lambda: len(replica.view.writes) > 5, message="the leader writes")
        leader.freeze()
        await eventually(lambda: follower.said("leads"), timeout=20, message="the other leads")
        term = int(follower.said("leads")[0].split()[1])
        await eventually(lambda: replica.view.token == term, message="it writes")
        old = leader.said("leads")[-1].split()[1]
        leader.thaw()
        await eventually(lambda: leader.said("lost"), message="it knows")
        assert f"refused {old}" in leader.lines(), "void: it never wrote under the old term"
        await eventually(lambda: len(replica.view.writes) > 50, timeout=20)
        state = await cluster.consensus.read(FencedResource)
        tokens = [token for token, _ in state.writes]
        assert tokens == sorted(tokens), "an old leader wrote after a new one"
        assert len({(token, by) for token, by in state.writes}) == len(set(tokens))
        assert not [line for child in (one, two) for line in child.said("Traceback")]


async def test_killed_leaders_are_replaced_in_ever_higher_terms(
    server: TestServer, cluster: Cluster
) -> None:
    """SIGKILL three times, and once the broker: each time another leads soon after the TTL."""
    with Children() as children:
        for round in range(3):
            children.start("tests.cluster.campaigner", server.url, f"c{round}", f"{_TTL_S}")
        terms: list[int] = []
        left = list(children.all)
        for round in range(3):
            child: Child = await eventually(
                lambda left=left: next((c for c in left if c.said("leads")), None), timeout=30
            )
            terms.append(int(child.said("leads")[-1].split()[1]))
            if round == 1:
                server.kill()
                await server.restart()
            child.kill()
            left.remove(child)
        assert terms == sorted(set(terms)), terms


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "a.b"}, "a.b"),
        ({"name": "a", "candidate": "b c"}, "b c"),
        ({"name": "a", "ttl_s": 0.1}, "0.1"),
    ],
)
async def test_wrong_elections_are_named(
    cluster: Cluster, arguments: dict[str, object], said: str
) -> None:
    """Before anything is sent."""
    with pytest.raises(ConfigError, match=said):
        cluster.leases.election(**arguments)  # type: ignore[arg-type]


# ---- semaphores -----------------------------------------------------------------------


async def test_never_more_holders_than_permits(cluster: Cluster) -> None:
    """Ten contenders for three permits, many times: tokens are unique and grow."""
    holding = 0
    most = 0
    tokens: list[int] = []

    async def contend(number: int) -> None:
        nonlocal holding, most
        mine = cluster.leases.semaphore("gpu", 3, owner=f"c{number}")
        for _ in range(4):
            tokens.append(await mine.acquire(timeout=30))
            holding += 1
            most = max(most, holding)
            await asyncio.sleep(0.05)
            assert mine.check() == mine.token
            holding -= 1
            await mine.release()

    await asyncio.gather(*(contend(number) for number in range(10)))
    assert most == 3
    assert len(tokens) == len(set(tokens)) == 40
    (info,) = [lease for lease in await cluster.leases.list() if lease.kind == "semaphore"]
    assert (info.holder, info.permits, info.token) == (None, 3, max(tokens))
    with pytest.raises(ConfigError, match="has 3 permits, not 4"):
        await cluster.leases.semaphore("gpu", 4).acquire()


async def test_a_killed_holder_frees_its_permit_after_the_ttl(
    server: TestServer, cluster: Cluster
) -> None:
    """The one that lives keeps its own, across a restart of the broker."""
    with Children() as children:
        dead, alive = [
            children.start("tests.cluster.holder", server.url, name, "2", "1.5")
            for name in ("dead", "alive")
        ]
        for child in (dead, alive):
            await eventually(lambda child=child: child.said("holds"), timeout=20)
        mine = cluster.leases.semaphore("gpu", 2, ttl_s=1.5, owner="me")
        with pytest.raises(LockTimeoutError, match="dead") as late:
            await mine.acquire(timeout=0.3)
        assert "alive" in str(late.value)
        dead.kill()
        killed = monotonic()
        token = await mine.acquire(timeout=10)
        assert monotonic() - killed < 4
        assert token > max(int(child.said("holds")[0].split()[1]) for child in (dead, alive))
        server.kill()
        await server.restart()
        await asyncio.sleep(2)  # longer than the TTL: both must have renewed
        assert mine.is_valid()
        assert not alive.said("lost")
        holders = {lease.holder for lease in await cluster.leases.list() if lease.name == "gpu"}
        assert holders == {"me", "alive"}
        await mine.release()


# ---- counters -------------------------------------------------------------------------


async def test_a_counter_sums_over_its_writers_and_counts_repeats_once(cluster: Cluster) -> None:
    """Also of a later process of the same name."""
    one = cluster.leases.counter("hits", writer="one")
    two = cluster.leases.counter("hits", writer="two")
    assert await one.value() == 0
    await asyncio.gather(*(one.add(2) for _ in range(20)), *(two.add(-1) for _ in range(10)))
    assert await two.value() == 30
    number = await one.add(5)
    assert await one.add(5, sequence=number) == number
    later = cluster.leases.counter("hits", writer="one")
    assert await later.add(5, sequence=number) == number
    assert await later.value() == 35
    assert await later.add(1) == number + 1
    # The old object finds that another one of its name has written since.
    assert await one.add(1) == number + 2
    assert await cluster.leases.counter("other").value() == 0
    assert await one.value() == 37
    assert {name: part.minus for name, part in (await one.writers()).items()} == {
        "one": 0,
        "two": 10,
    }


async def test_an_increment_in_doubt_is_repeated_by_its_number(
    server: TestServer, cluster: Cluster
) -> None:
    """The answer is lost on the wire; whatever became of it, the repeat makes it one."""
    host, port = server.url.removeprefix("nats://").split(":")
    async with (
        await Link.open(host, int(port)) as link,
        Cluster.connect(link.url, name="far") as far,
    ):
        hits = far.leases.counter("hits", writer="w")
        await hits.add(1)
        link.hold()
        with pytest.raises(BusTimeoutError, match="Repeat it with sequence=2") as doubt:
            await hits.add(10, timeout=0.5)
        sequence = doubt.value.details["sequence"]
        link.release()
        await eventually(lambda: far.bus.is_connected)
        await hits.add(10, sequence=sequence, timeout=20)
        await hits.add(10, sequence=sequence)
        assert await cluster.leases.counter("hits").value() == 11


async def test_an_increment_that_was_not_sent_is_said_to_be(
    server: TestServer, cluster: Cluster
) -> None:
    """Without a connection the outcome is known."""
    hits = cluster.leases.counter("hits")
    server.kill()
    await eventually(lambda: not cluster.bus.is_connected)
    with pytest.raises(BusUnavailableError):
        await hits.add(1, timeout=0.3)
    await server.restart()
    await hits.add(1, timeout=20)
    assert await hits.value() == 1


async def test_leases_are_listed_with_holder_and_token(cluster: Cluster) -> None:
    """For `foundation lease list`."""
    held = cluster.leases.lock("nightly", owner="me")
    token = await held.acquire()
    boss = cluster.leases.election("boss", candidate="me")
    term = await boss.campaign(timeout=5)
    permit = cluster.leases.semaphore("gpu", 2, owner="me")
    await permit.acquire()
    await cluster.leases.counter("hits").add()
    found = {lease.kind: lease for lease in await cluster.leases.list()}
    assert set(found) == {"lock", "election", "semaphore"}
    assert {lease.holder for lease in found.values()} == {"me"}
    assert (found["lock"].token, found["election"].token) == (token, term)
    assert all(lease.since and lease.renewed for lease in found.values())
    await held.release()
    await boss.resign()
    await permit.release()
    assert {lease.holder for lease in await cluster.leases.list()} == {None}
