"""Groups whose leaders die, freeze and come back: what was appended stays, in one order, once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.coordination import leader_follower
from foundation_nats.coordination.leader_follower import Group, GroupEntry, Lead
from foundation_nats.errors import (
    BusTimeoutError,
    ConfigError,
    NotFoundError,
    NotLeaderError,
    ProposalRejectedError,
)
from foundation_nats.testing import TestCluster, TestServer, eventually
from tests.cluster.children import Child, Children
from tests.cluster.leading import GROUP
from tests.cluster.storm import Storm
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

_TTL_S = 2.0


@pytest.fixture
async def cluster(server: TestServer) -> AsyncIterator[Cluster]:
    """A client."""
    async with Cluster.connect(server.url, name="tester") as client:
        yield client


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of this run; ``--seed`` repeats one."""
    given = request.config.getoption("--seed")
    found = random.randrange(2**32) if given is None else int(given)
    print(f"--seed {found}")
    return found


def add(total: int, value: int) -> int:
    """The fold of most tests."""
    if value < 0:
        raise ValueError("no debts")
    return total + value


async def test_a_follower_reads_what_the_leader_appends_and_leads_when_it_resigns(
    cluster: Cluster,
) -> None:
    """Entries in order, a value, a stated age; a second term goes on behind the first."""
    async with (
        leader_follower(cluster, "sums", member="one", apply=add, initial=0) as one,
        leader_follower(cluster, "sums", apply=add, initial=0) as watcher,
    ):
        first = await one.led(timeout=5)
        two = leader_follower(cluster, "sums", member="two", apply=add, initial=0)
        await two.open()
        for value in (1, 2, 3):
            entry = await one.append(value)
        assert (entry.index, entry.term, entry.value) == (3, first, 3)
        seen = await two.read()
        assert (seen.value, seen.index, seen.leader) == (6, 3, "one")
        assert seen.age_s < 1
        await eventually(lambda: two.view().age_s < 0.5)
        again = await one.append(3, id="twice")
        assert (await one.append(3, id="twice")).index == again.index
        with pytest.raises(NotLeaderError, match="one does, as far as we know"):
            await two.append(9)
        with pytest.raises(ProposalRejectedError, match="no debts"):
            await one.append(-1)
        with pytest.raises(ConfigError, match="observer"):
            await watcher.led()
        with pytest.raises(BusTimeoutError):
            await two.led(timeout=0.1)
        began = monotonic()
        await one.close()
        second = await two.led(timeout=5)
        assert monotonic() - began < 2, "it waited for the lease to lapse"
        assert second > first
        assert (await two.append(4)).index == 5
        assert [entry.value for entry in await _first(watcher, 5)] == [1, 2, 3, 3, 4]
        assert (await watcher.read()).value == 13
        await two.close()


async def _first(group: Group, count: int, after: int = 0) -> list[GroupEntry]:
    found: list[GroupEntry] = []
    async with asyncio.timeout(10):
        async for entry in group.entries(after=after):
            found.append(entry)
            if len(found) == count:
                break
    return found


async def test_the_log_refuses_a_deposed_leader_whatever_its_clock_says(cluster: Cluster) -> None:
    """Its election still looks good; a newer term in the log is what counts."""
    async with leader_follower(cluster, "fenced", member="old") as old:
        term = await old.led(timeout=5)
        await old.append("a")
        async with leader_follower(cluster, "fenced") as usurper:
            assert usurper._replica is not None
            await usurper._replica.propose(Lead(term=term + 1, member="new"))
            assert old._election is not None
            assert old._election.is_leader
            with pytest.raises(NotLeaderError):
                await old.append("b")
            # It campaigns again, and begins a term of its own.
            assert await old.led(timeout=5) > term + 1
            await old.append("c")
            assert [entry.value for entry in await _first(usurper, 2)] == ["a", "c"]


async def test_who_joins_late_has_the_value_and_the_newest_entries(cluster: Cluster) -> None:
    """Behind a snapshot the value goes on; entries before it are named as gone."""
    async with leader_follower(cluster, "long", member="one", apply=add, initial=0) as one:
        await one.led(timeout=5)
        for _ in range(10):
            await one.append(1)
        assert one._replica is not None
        await one._replica.snapshot()
        await one.append(1)
        async with leader_follower(cluster, "long", apply=add, initial=0) as late:
            assert late.view().value == 11
            assert [entry.index for entry in await _first(late, 1, after=10)] == [11]
            with pytest.raises(NotFoundError, match="Entry 1 of the group long is not kept"):
                await _first(late, 1)


def _check(children: list[Child], log: list[GroupEntry]) -> None:
    """What a member was told stands in the log, in order, once; terms never fall."""
    assert [entry.index for entry in log] == list(range(1, len(log) + 1))
    assert sorted(entry.term for entry in log) == [entry.term for entry in log]
    values = [entry.value for entry in log]
    assert len(set(values)) == len(values)
    owners: dict[int, set[str]] = {}
    for entry in log:
        owners.setdefault(entry.term, set()).add(entry.value.split("-")[0])
    assert all(len(who) == 1 for who in owners.values()), "two appended in one term"
    places: dict[str, Any] = {entry.value: (entry.index, entry.term) for entry in log}
    for child in children:
        for line in child.said("put"):
            _, index, term, value = line.split()
            assert places[value] == (int(index), int(term)), f"lost or moved: {line}"


async def _leader(children: list[Child], but: Child | None = None) -> Child:
    """Who leads now, by the newest term that was printed."""

    def newest() -> Child | None:
        terms = {
            int(child.said("leads")[-1].split()[1]): child
            for child in children
            if child is not but and child.process.poll() is None and child.said("leads")
        }
        return terms[max(terms)] if terms else None

    found = await eventually(newest, timeout=20)
    assert found is not None
    return found


async def _storm_at_the_group(
    server: TestServer, cluster: Cluster, seed: int, members: int, kills: int
) -> None:
    """Leaders and followers are killed at random moments and come back, the broker is killed once."""
    dice = random.Random(seed)
    names = [f"m{number}" for number in range(members)]
    with Children() as children:

        def start(name: str, life: int) -> Child:
            given = (server.url, name, f"{_TTL_S}", str(life))
            return children.start("tests.cluster.leading", *given)

        storm = Storm(start, names, dice)

        async def leader() -> str:
            found = await _leader([storm.now(name) for name in names])
            return next(name for name in names if storm.now(name) is found)

        victims = []
        for number in range(kills):
            led = await leader()
            before = len(storm.now(led).said("put"))
            await eventually(
                lambda led=led, before=before: len(storm.now(led).said("put")) > before + 10,
                message="the leader appends",
            )
            if number == kills // 2:
                server.kill()
                await server.restart()
            # Whoever it is: the first time the leader, then a follower, then as the dice fall.
            others = [name for name in names if name != led]
            among = [led] if number == 0 else others if number == 1 else names
            victims.append((await storm.kill(among, ready="joins", within=0.5)) == led)
        assert True in victims
        assert False in victims
        led = await leader()
        done = len(storm.now(led).said("put"))
        await eventually(lambda: len(storm.now(led).said("put")) > done + 10, timeout=20)
        storm.stop()
        async with leader_follower(cluster, GROUP) as watcher:
            _check(children.all, await _first(watcher, (await watcher.read()).index))


async def test_leaders_and_followers_are_killed_and_the_broker_too_and_nothing_is_lost(
    server: TestServer, cluster: Cluster, seed: int
) -> None:
    """kill -9 of the leader, then of a follower; both come back: each append that returned is there."""
    await _storm_at_the_group(server, cluster, seed, 2, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("round", range(3))
async def test_groups_under_many_seeds(
    server: TestServer, cluster: Cluster, seed: int, round: int
) -> None:
    """The same, longer, with three members."""
    await _storm_at_the_group(server, cluster, seed + round, 3, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_a_leader_that_was_frozen_appends_nothing_more(
    server: TestServer, cluster: Cluster
) -> None:
    """SIGSTOP for longer than the TTL, SIGCONT: the log goes on under the new term alone."""
    with Children() as children:
        members = [
            children.start("tests.cluster.leading", server.url, name, f"{_TTL_S}", "0")
            for name in ("a", "b")
        ]
        old = await _leader(members)
        await eventually(lambda: len(old.said("put")) > 20, message="it appends")
        old.freeze()
        new = await _leader(members, but=old)
        await eventually(lambda: len(new.said("put")) > 20, message="its successor appends")
        old.thaw()
        await eventually(lambda: old.said("refused"), message="it learns of it")
        done = len(new.said("put"))
        await eventually(lambda: len(new.said("put")) > done + 20)
        assert not new.said("refused")
        for child in members:
            child.kill()
        async with leader_follower(cluster, GROUP) as watcher:
            _check(members, await _first(watcher, (await watcher.read()).index))


async def _leading(cluster: Cluster, names: list[str]) -> str | None:
    for name in names:
        if (await cluster.ask(name, "look", timeout=5))["leads"]:
            return name
    return None


async def test_agents_are_members_and_one_that_dies_is_replaced_and_comes_back() -> None:
    """From `on_start` to `on_stop`, by `self.ctx`; the worker of the one that leads is killed."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        names = ["m1", "m2"]
        for name in names:
            await cluster.agents.start("team:Member", id=name, critical=True)
        first = await eventually(lambda: _leading(cluster, names), timeout=20)
        other = next(name for name in names if name != first)
        for value in (1, 2, 3):
            entry = await cluster.ask(first, "add", value, timeout=10)
        assert entry["index"] == 3
        assert await cluster.ask(other, "add", 9) == {"refused": first}
        seen = await cluster.ask(other, "look")
        assert seen == {"value": 6, "index": 3, "leads": False}
        home = next(info.node for info in await cluster.agents.list() if info.id == first)
        assert home is not None
        for worker in nodes.nodes[home].workers():
            worker.kill()
        leader = await eventually(lambda: _leading(cluster, names), timeout=30)
        again = await eventually(lambda: cluster.ask(leader, "add", 4, timeout=5), timeout=20)
        assert (again["index"], again["term"] > entry["term"]) == (4, True)
        for name in names:
            look = await cluster.ask(name, "look", timeout=10)
            assert (look["value"], look["index"]) == (10, 4)
        # Who is stopped resigns: the next one leads at once.
        began = monotonic()
        await cluster.agents.stop(leader)
        rest = [name for name in names if name != leader]
        await eventually(lambda: _leading(cluster, rest), timeout=10)
        assert monotonic() - began < 5
