"""Locks, permits, leaderships and counters whose holders and writers are killed at random moments."""

from __future__ import annotations

import random

import pytest

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_exclusion
from foundation_nats.chaos.checkers.exclusion import Holding
from foundation_nats.testing import TestServer, eventually
from tests.cluster.children import Child, Children
from tests.cluster.contender import PERMITS, amount
from tests.cluster.storm import Storm, check_permits, crashed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TTL_S = {"lock": 1.0, "semaphore": 1.0, "election": 2.0}


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of this run; ``--seed`` repeats one."""
    given = request.config.getoption("--seed")
    found = random.randrange(2**32) if given is None else int(given)
    print(f"--seed {found}")
    return found


def _judged(kind: str, holdings: list[Holding]) -> Judgement:
    return check_permits(holdings, PERMITS) if kind == "semaphore" else check_exclusion(holdings)


async def _storm_at_the_holders(
    server: TestServer, kind: str, seed: int, contenders: int, kills: int, *, broker: bool
) -> None:
    """Whoever holds is killed, again and again, and comes back; the broker is killed once."""
    dice = random.Random(seed)
    names = [f"c{number}" for number in range(contenders)]
    with Children() as children:

        def start(name: str, _life: int) -> Child:
            given = (server.url, name, kind, f"{TTL_S[kind]}")
            return children.start("tests.cluster.contender", *given)

        storm = Storm(start, names, dice)

        def holder(among: object) -> str | None:
            inside = storm.insiders(names)
            return dice.choice(inside) if inside else None

        for number in range(kills):
            if broker and number == kills // 2:
                server.kill()
                await server.restart()
            await storm.kill(names, within=0.2, who=holder)
        before = len(storm.holdings(kind))
        await storm.until("inside", 2)
        storm.stop()
        found = storm.holdings(kind)
        ended = sum(len(c.said("outside")) for lives in storm.lives.values() for c in lives)
        assert len(found) > before
        assert len(found) - ended >= max(1, kills // 3), "void: hardly anybody was killed inside"
    judged = _judged(kind, found)
    assert judged.is_clean, judged.violations
    assert judged.looked_at > contenders


@pytest.mark.parametrize("kind", ["lock", "semaphore", "election"])
async def test_who_holds_is_killed_and_never_are_there_too_many(
    server: TestServer, seed: int, kind: str
) -> None:
    """Tokens strictly grow from holder to holder, and never are two (or more than the permits) inside."""
    contenders = 3 if kind == "semaphore" else 2
    await _storm_at_the_holders(server, kind, seed, contenders, 1, broker=False)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("round", range(3))
@pytest.mark.parametrize("kind", ["lock", "semaphore", "election"])
async def test_holders_under_many_seeds(
    server: TestServer, seed: int, kind: str, round: int
) -> None:
    """The same, longer, with the death of the broker."""
    await _storm_at_the_holders(server, kind, seed + round, 5, 12, broker=True)


async def _storm_at_the_counter(
    server: TestServer, cluster: Cluster, seed: int, adds: int, kills: int
) -> None:
    """Writers are killed and go on behind what they know of; the broker once: the sum is exact."""
    dice = random.Random(seed)
    names = ["w0", "w1", "w2"]
    with Children() as children:

        def start(name: str, life: int) -> Child:
            known = [int(line.split()[1]) for line in storm.lines(name, "added")] if life else []
            given = (server.url, name, "counter", str(max(known, default=0) + 1), str(adds))
            return children.start("tests.cluster.contender", *given)

        storm = Storm(start, [], dice)
        for name in names:
            storm.begin(name)
        hits = cluster.leases.counter("it", writer="eye")
        for number in range(kills):
            if number == kills // 2:
                server.kill()
                await server.restart()
            left = [name for name in names if storm.now(name).process.poll() is None]
            if not left:
                break
            await storm.kill(left, within=0.3)
        assert len(storm.killed_at) >= 2, "void: they were done too soon"
        await storm.ended()
    parts = await hits.writers()
    assert {name: part.sequence for name, part in parts.items()} == dict.fromkeys(names, adds)
    assert await hits.value() == len(names) * sum(map(amount, range(1, adds + 1)))


async def test_writers_are_killed_and_the_sum_is_exact(server: TestServer, seed: int) -> None:
    """Each increment counts once: those that had returned, and those in doubt, which are repeated."""
    async with Cluster.connect(server.url, name="eye") as cluster:
        await _storm_at_the_counter(server, cluster, seed, 300, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("round", range(3))
async def test_counters_under_many_seeds(server: TestServer, seed: int, round: int) -> None:
    """The same, longer."""
    async with Cluster.connect(server.url, name="eye") as cluster:
        await _storm_at_the_counter(server, cluster, seed + round, 5_000, 12)


async def test_a_lock_whose_winner_dies_unheard_is_taken_over(
    server: TestServer, seed: int
) -> None:
    """It died right after its write was stored: others wait for as long as for a holder, and get a higher token."""
    with Children() as children:
        given = ("tests.cluster.contender", server.url, "c0", "lock", "1.0")
        dead = children.start(*given, failpoints="lock.taken=kill")
        await crashed(dead)
        assert not dead.said("inside")
        async with Cluster.connect(server.url, name="eye") as cluster:
            (lease,) = await cluster.leases.list()
            assert lease.holder == "c0"
            mine = cluster.leases.lock("it", ttl_s=1.0)
            assert await mine.acquire(timeout=10) > lease.token
            await mine.release()


async def test_an_increment_whose_writer_dies_unheard_counts_once(
    server: TestServer, seed: int
) -> None:
    """Its successor does not know of it and repeats it under its number."""
    with Children() as children:
        given = ("tests.cluster.contender", server.url, "w0", "counter")
        passes = 1 + seed % 4
        dead = children.start(
            *given, "1", "9", failpoints=f"counter.after_cas=after({passes},kill)"
        )
        await crashed(dead)
        added = len(dead.said("added"))
        assert added == passes - 1
        next_ = children.start(*given, str(added + 1), "9")
        await eventually(lambda: next_.process.poll() == 0, timeout=20)
    async with Cluster.connect(server.url, name="eye") as cluster:
        assert await cluster.leases.counter("it").value() == sum(map(amount, range(1, 10)))
