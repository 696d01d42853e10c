"""Barriers, votes, auctions, sagas and queues whose participants, initiators and brokers are killed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.bus.streams import StreamReader
from foundation_nats.coordination import (
    auction,
    barrier,
    cast,
    saga,
    sagas,
    vote,
    vote_result,
    workqueue,
)
from foundation_nats.coordination.cell import Cell
from foundation_nats.coordination.desk import Answer, Desk
from foundation_nats.coordination.workqueue import Item, WorkQueue
from foundation_nats.errors import (
    BarrierBrokenError,
    ConfigError,
    ConflictError,
    MailboxFullError,
    NotFoundError,
    NotSettledError,
    VoteClosedError,
)
from foundation_nats.testing import TestCluster, TestServer, eventually
from foundation_schemas.coordination import VoteRecord
from tests.cluster.children import Child, Children
from tests.cluster.storm import Storm, broker_dies, crashed, node_dies, said, survived, worker_dies
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


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


@pytest.fixture
async def nodes() -> AsyncIterator[TestCluster]:
    """Two nodes that can run the partners."""
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as running:
        yield running


async def _start(cluster: Cluster, run: str, **configs: dict[str, Any]) -> None:
    for name, config in configs.items():
        await cluster.agents.start(run, id=name, config=config, critical=True)


# ---- barriers -------------------------------------------------------------------------


async def test_all_pass_or_none_and_again(cluster: Cluster) -> None:
    """Three parties, three generations; nobody is through before the last has come."""
    through: list[tuple[int, str]] = []
    names = ["a", "b", "c"]

    async def party(name: str) -> None:
        mine = barrier(cluster, "phase", names, party=name)
        for generation in (1, 2, 3):
            if name == "c":
                assert [g for g, _ in through].count(generation) == 0
                await asyncio.sleep(0.05)
                assert [g for g, _ in through].count(generation) == 0
            assert await mine.wait(timeout=10) == generation
            through.append((generation, name))

    await asyncio.gather(*(party(name) for name in names))
    assert sorted(through) == [(g, n) for g in (1, 2, 3) for n in names]
    # A party that does not know whether it had arrived asks for the generation.
    began = monotonic()
    assert await barrier(cluster, "phase", names, party="a").wait(generation=2) == 2
    assert monotonic() - began < 1
    with pytest.raises(ConfigError, match="9 has not begun"):
        await barrier(cluster, "phase", names, party="a").wait(generation=9)


async def test_a_generation_breaks_for_everyone_and_names_who_is_missing(cluster: Cluster) -> None:
    """By the shortest time; the next arrivals form the next generation."""
    names = ["a", "b", "c"]
    long = asyncio.create_task(barrier(cluster, "p", names, party="a").wait(timeout=30))
    short = asyncio.create_task(barrier(cluster, "p", names, party="b").wait(timeout=0.5))
    for waiter in (long, short):
        with pytest.raises(BarrierBrokenError, match="missing c") as broken:
            await waiter
        assert broken.value.details == {"generation": 1, "missing": ["c"]}
    with pytest.raises(BarrierBrokenError, match="Generation 1"):
        await barrier(cluster, "p", names, party="c").wait(generation=1)
    ended = await asyncio.gather(*(barrier(cluster, "p", names, party=n).wait() for n in names))
    assert ended == [2, 2, 2]
    with pytest.raises(BarrierBrokenError, match="missing 1 of 2"):
        await barrier(cluster, "counted", 2).wait(timeout=0.2)


async def test_who_is_cancelled_takes_its_arrival_back(cluster: Cluster) -> None:
    """So the others break at their time instead of going on without it."""
    names = ["a", "b", "c"]
    other = asyncio.create_task(barrier(cluster, "p", names, party="a").wait(timeout=1))
    gone = asyncio.create_task(barrier(cluster, "p", names, party="b").wait(timeout=1))
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    last = asyncio.create_task(barrier(cluster, "p", names, party="c").wait(timeout=5))
    for waiter in (other, last):
        with pytest.raises(BarrierBrokenError, match="missing b"):
            await waiter


async def test_waiters_that_died_leave_a_generation_that_breaks(
    server: TestServer, cluster: Cluster
) -> None:
    """Nobody is left to break it: the record's own time counts for who comes next."""
    with Children() as children:
        child = children.start("tests.cluster.party", server.url, "a=1", "a,b", "1")
        await eventually(lambda: child.said("begins"), timeout=20)
        late = barrier(cluster, "phase", ["a", "b"], party="b")
        # The child has given 60 s; another arrival shortens that for all.
        with pytest.raises(BarrierBrokenError):
            await barrier(cluster, "other", ["a", "b"], party="b").wait(timeout=0.1)
        await eventually(lambda: _waits(cluster, "a"))
        child.kill()
        assert await late.wait(timeout=5) == 1, "its arrival stands"


async def _waits(cluster: Cluster, party: str) -> bool:
    from foundation_nats.bus.kv import Bucket

    entry = await Bucket(cluster.bus, cluster.subjects, "coordination").read("barrier_phase")
    return entry is not None and f'"{party}"' in (entry.value or b"").decode().split("arrived")[1]


async def _storm_at_the_barrier(
    server: TestServer,
    seed: int,
    generations: int,
    kills: int,
    *,
    processes: int = 3,
    each: int = 1,
) -> None:
    """Processes of *each* so many parties are killed and come again, the broker once: every generation ends for all."""
    dice = random.Random(seed)
    groups = {f"g{p}": [f"g{p}-{n}" for n in range(each)] for p in range(processes)}
    everybody = [name for group in groups.values() for name in group]
    with Children() as children:

        def start(group: str, life: int) -> Child:
            heard = storm.lines(group, "ended") if life else []
            first = ",".join(f"{name}={_last(heard, name) + 1}" for name in groups[group])
            arguments = (server.url, first, ",".join(everybody), str(generations))
            return children.start("tests.cluster.party", *arguments)

        storm = Storm(start, [], dice)
        for group in groups:
            storm.begin(group)
        for step in range(kills):
            if step == kills // 2:
                await broker_dies(server)()
            await storm.kill(list(groups))
        await storm.ended(timeout=100)
        for group, names in groups.items():
            assert not storm.lines(group, "broken")
            lines = storm.lines(group, "ended")
            for name in names:
                ended = [int(number) for _, number, who in map(str.split, lines) if who == name]
                assert ended == list(range(1, generations + 1)), name


def _last(lines: list[str], name: str) -> int:
    """The last generation that ended for *name*."""
    return max((int(n) for _, n, who in map(str.split, lines) if who == name), default=0)


async def test_killed_parties_come_again_and_every_generation_ends(
    server: TestServer, seed: int
) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_barrier(server, seed, 60, 1)


async def test_a_crowd_of_which_some_are_killed_goes_on_together(
    server: TestServer, seed: int
) -> None:
    """30 parties in three processes: they gather what they hear of each other; what was only said counts for nothing."""
    await _storm_at_the_barrier(server, seed, 8, 1, processes=3, each=10)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("round", range(5))
async def test_barriers_under_many_seeds(server: TestServer, seed: int, round: int) -> None:
    """The same, longer."""
    await _storm_at_the_barrier(server, seed + round, 300, 12)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("round", range(3))
async def test_crowds_under_many_seeds(server: TestServer, seed: int, round: int) -> None:
    """The same, with 48 parties."""
    await _storm_at_the_barrier(server, seed + round, 80, 12, processes=6, each=8)


# ---- votes ----------------------------------------------------------------------------


async def test_agents_vote_and_the_result_is_recorded_and_told(nodes: TestCluster) -> None:
    """Abstentions and who is unavailable count as what they are; asked again: the same."""
    cluster = nodes.client
    yes, no = {"choice": "yes"}, {"choice": {"choice": "no", "reason": "too early"}}
    await _start(
        cluster,
        "partners:Voter",
        v1=yes,
        v2=yes,
        v3=no,
        v4={"choice": None},
        v5={"fail": True},
        v6={"choice": "maybe"},
    )
    voters = ["v1", "v2", "v3", "v4", "v5", "v6", "v7"]
    found = await vote(cluster, "ship", {"version": 2}, ["yes", "no"], voters, timeout=15)
    assert (found.choice, found.reason) == (None, "no choice can reach the quorum any more")
    assert found.unavailable["v7"] == "there is no such agent"
    again = await vote(cluster, "ship", {"version": 2}, ["yes", "no"], voters)
    assert again == found
    with pytest.raises(ConfigError, match="another vote ship"):
        await vote(cluster, "ship", {"version": 3}, ["yes", "no"], voters)
    weights = {"v1": 3.0, "v2": 1.0, "v3": 1.0}
    found = await vote(cluster, "weighted", "?", ["yes", "no"], weights, timeout=15)
    assert (found.choice, found.reason) == ("yes", "the quorum is reached")
    assert await vote_result(cluster, "weighted") == found
    stories = {v: await cluster.ask(v, "story", timeout=5) for v in ("v1", "v3", "v4")}
    await eventually(lambda: _told(cluster, "v1", [None, "yes"]))
    await eventually(lambda: _told(cluster, "v4", [None]))
    assert [story["asked"] for story in stories.values()] == [
        ["ship", "weighted"],
        ["ship", "weighted"],
        ["ship"],
    ]


async def test_who_only_casts_and_who_subscribes_hear_the_result_too(nodes: TestCluster) -> None:
    """Each once; the ballot that decides tells, although nobody waits for the vote any more."""
    cluster = nodes.client
    await _start(cluster, "partners:Voter", v1={}, v2={})
    await _start(cluster, "partners:Listener", ear={})
    waiting = asyncio.create_task(
        vote(cluster, "lunch", "?", ["soup", "salad"], ["v1", "v2", "ann"], ask=False, timeout=30)
    )
    await eventually(lambda: cast(cluster, "lunch", "ann", "soup"))
    waiting.cancel()
    await asyncio.wait([waiting])
    assert (await cast(cluster, "lunch", "v1", "soup")).result is not None
    for agent in ("v1", "v2", "ear"):
        await eventually(lambda a=agent: _told(cluster, a, ["soup"]), message=agent)
    assert (await vote_result(cluster, "lunch")).choice == "soup"
    for agent in ("v1", "v2", "ear"):
        assert await _told(cluster, agent, ["soup"]), "told twice"


async def test_a_voter_whose_mailbox_is_full_stops_nobody(seed: int) -> None:
    """The others are told; it is named in the record, and told when there is room."""
    mailbox = {"mailbox_max": 3, "full_patience_s": 0.2}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings={"mailbox": mailbox}) as running:
        cluster = running.client
        await _start(cluster, "partners:Voter", full={"slow": 60}, v1={"choice": "yes"}, v2={})
        with pytest.raises(MailboxFullError):
            for _ in range(10):
                await cluster.send("full", "vote.question", {"vote": "other"}, timeout=1)
        found = await vote(cluster, "v", "?", ["yes"], {"full": 1, "v1": 3, "v2": 1}, timeout=20)
        assert found.choice == "yes"
        assert "full" not in found.missing
        await eventually(lambda: _told(cluster, "v1", ["yes"]))
        await eventually(lambda: _told(cluster, "v2", ["yes"]))
        async with Cell(cluster, "vote_v", VoteRecord) as cell:
            record = await cell.read(monotonic() + 5)
            assert record is not None
            assert (list(record.untold), record.delivered) == (["full"], True)
            signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
            await signals.purge(cluster.subjects.mailbox("full"))
            assert await vote_result(cluster, "v") == found
            record = await cell.read(monotonic() + 5)
            assert record is not None
            assert not record.untold


async def _told(cluster: Cluster, voter: str, results: list[str | None]) -> bool:
    story = await cluster.ask(voter, "story", timeout=5)
    return bool(story["results"] == results)


async def test_clients_cast_until_it_is_decided(cluster: Cluster) -> None:
    """The first ballot of a voter counts, and the one that decides ends it for all."""
    voters = ["ann", "bob", "cy"]
    with pytest.raises(NotFoundError):
        await cast(cluster, "lunch", "ann", "soup")
    waiting = asyncio.create_task(
        vote(cluster, "lunch", "?", ["soup", "salad"], voters, ask=False, timeout=20)
    )
    await eventually(lambda: cast(cluster, "lunch", "ann", "soup"))
    assert (await cast(cluster, "lunch", "ann", "soup")).result is None
    with pytest.raises(ConflictError, match="ann has voted soup"):
        await cast(cluster, "lunch", "ann", "salad")
    with pytest.raises(ConfigError, match="none of the voters"):
        await cast(cluster, "lunch", "eve", "soup")
    with pytest.raises(ConfigError, match="none of: soup, salad"):
        await cast(cluster, "lunch", "bob", "steak")
    decided = await cast(cluster, "lunch", "bob", "soup")
    assert decided.result is not None
    assert (await waiting).choice == decided.result.choice == "soup"
    with pytest.raises(VoteClosedError):
        await cast(cluster, "lunch", "cy", "salad")
    late = await vote(cluster, "late", "?", ["a", "b"], voters, ask=False, timeout=0.3)
    assert (late.choice, late.reason, late.missing) == (None, "time is over", voters)


def _initiate(
    children: Children,
    nodes: TestCluster,
    pattern: str,
    arguments: dict[str, Any],
    failpoints: str = "",
) -> Child:
    given = (nodes.server.url, nodes.client.name, pattern, json.dumps(arguments))
    return children.start("tests.cluster.initiator", *given, failpoints=failpoints)


async def _outcome(
    children: Children,
    nodes: TestCluster,
    pattern: str,
    arguments: dict[str, Any],
    dice: random.Random,
    *,
    kills: int,
    first: bool,
    node: bool,
) -> dict[str, Any]:
    """Of a pattern whose initiator is killed so many times; besides the *first* a worker (or a *node*), then
    the broker."""
    participants = (node_dies if node else worker_dies)(nodes, dice)
    blows = {0: participants, 1: broker_dies(nodes.server)} if first else {}
    last = await survived(
        lambda: _initiate(children, nodes, pattern, arguments), dice, kills=kills, blows=blows
    )
    (line,) = await said(last, "result")
    found: dict[str, Any] = json.loads(line.split(" ", 1)[1])
    return found


async def _storm_at_the_vote(
    nodes: TestCluster, seed: int, votes: int, *, node: bool = False
) -> None:
    """The asker is killed and started anew, once with a worker of voters and once with the broker."""
    dice = random.Random(seed)
    cluster = nodes.client
    voters = {f"v{n}": {"choice": "yes" if n < 4 else "no", "slow": 0.05} for n in range(6)}
    await _start(cluster, "partners:Voter", **voters)
    names = [f"storm-{number}" for number in range(votes)]
    with Children() as children:
        for name in names:
            arguments = {
                "name": name,
                "question": "?",
                "choices": ["yes", "no"],
                "voters": sorted(voters),
                "quorum": 4,
                "timeout": 60,
            }
            found = await _outcome(
                children, nodes, "vote", arguments, dice, kills=2, first=name == names[0], node=node
            )
            assert (found["choice"], found["counts"]["yes"]) == ("yes", 4), found
            assert (await vote_result(cluster, name)).model_dump(mode="json") == found
    for voter in voters:
        await eventually(lambda v=voter: _told(cluster, v, ["yes"] * votes), timeout=30)
        story = await cluster.ask(voter, "story", timeout=5)
        assert story["asked"] == names, f"{voter} was asked twice or never"


async def test_a_vote_survives_its_asker_its_voters_and_the_broker(
    nodes: TestCluster, seed: int
) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_vote(nodes, seed, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_votes_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer, with the death of a node."""
    await _storm_at_the_vote(nodes, seed, 12, node=True)


# ---- auctions -------------------------------------------------------------------------


async def _awarded(cluster: Cluster, bidder: str) -> list[str]:
    story = await cluster.ask(bidder, "story", timeout=5)
    return list(story["awarded"])


async def test_the_best_that_accepts_gets_the_award(nodes: TestCluster) -> None:
    """Who declines, is slow, does not bid or is not there is passed over; asked again: the same."""
    cluster = nodes.client
    await _start(
        cluster,
        "partners:Bidder",
        b1={"bid": {"cost": 1, "load": 9}, "declines": True},
        b2={"bid": {"cost": 2, "load": 8}, "slow": 3.0},
        b3={"bid": {"cost": 3, "load": 7}},
        b4={"bid": 4},
        b5={},
        b6={"bid": "cheap"},
    )
    bidders = ["b1", "b2", "b3", "b4", "b5", "b6", "b7"]
    found = await auction(cluster, "job", {"n": 1}, bidders, timeout=10, accept_timeout=1)
    assert (found.winner, found.bid) == ("b3", {"cost": 3, "load": 7})
    assert found.ranking == ["b1", "b2", "b3", "b4"]
    assert found.refused["b1"] == "declined"
    assert found.refused["b2"] == "did not accept in time"
    assert found.refused["b5"] == "does not bid"
    assert "no number" in found.refused["b6"]
    assert found.refused["b7"] == "there is no such agent"
    assert await auction(cluster, "job", {"n": 1}, bidders) == found
    with pytest.raises(ConfigError, match="another auction job"):
        await auction(cluster, "job", {"n": 2}, bidders)
    await eventually(lambda: _is_awarded(cluster, "b3", ["job"]))
    assert await _awarded(cluster, "b1") == await _awarded(cluster, "b4") == []
    by_load = await auction(cluster, "2", None, ["b3", "b1"], key="load", accept_timeout=1)
    assert by_load.ranking == ["b3", "b1"]
    dearest = await auction(cluster, "3", None, ["b3", "b4"], key=lambda who, _: who != "b4")
    assert dearest.winner == "b4"
    nobody = await auction(cluster, "4", None, ["b5", "b1"], accept_timeout=1)
    assert nobody.winner is None


async def _is_awarded(cluster: Cluster, bidder: str, expected: list[str]) -> bool:
    return await _awarded(cluster, bidder) == expected


async def _storm_at_the_auction(
    nodes: TestCluster, seed: int, auctions: int, *, node: bool = False
) -> None:
    """Auctioneers, a worker of bidders (or a node) and the broker are killed: one award each, which takes effect once."""
    dice = random.Random(seed)
    cluster = nodes.client
    slow = {"thinks": 0.05, "slow": 0.05}
    bidders = {f"b{n}": {"bid": {"cost": n}, "declines": n == 0, **slow} for n in range(4)}
    await _start(cluster, "partners:Bidder", **bidders)
    names = [f"job-{number}" for number in range(auctions)]
    with Children() as children:
        for number, name in enumerate(names):
            arguments = {
                "name": name,
                "task": number,
                "bidders": sorted(bidders),
                "timeout": 30,
                "accept_timeout": 30,
            }
            found = await _outcome(
                children, nodes, "auction", arguments, dice, kills=2, first=number == 0, node=node
            )
            assert (found["winner"], found["ranking"]) == ("b1", ["b0", "b1", "b2", "b3"]), found
    await eventually(lambda: _is_awarded(cluster, "b1", names), timeout=30)
    for bidder in bidders:
        story = await eventually(lambda b=bidder: cluster.ask(b, "story", timeout=5), timeout=30)
        assert story["announced"] == names, f"{bidder} was asked twice or never"
        assert story["awarded"] == (names if bidder == "b1" else [])


async def test_an_auction_survives_auctioneer_bidders_and_broker(
    nodes: TestCluster, seed: int
) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_auction(nodes, seed, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
async def test_auctions_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer."""
    await _storm_at_the_auction(nodes, seed, 12, node=True)


# ---- questions, and agents that ask -------------------------------------------------------


async def test_agents_use_the_patterns_from_their_handlers(nodes: TestCluster) -> None:
    """By `self.ctx`: two meet at a barrier, one holds a vote among others."""
    cluster = nodes.client
    await _start(cluster, "partners:Desk", d1={}, d2={})
    await _start(cluster, "partners:Voter", v1={"choice": "yes"}, v2={"choice": "yes"})
    both = await asyncio.gather(*(cluster.ask(d, "meet", timeout=20) for d in ("d1", "d2")))
    assert both == [1, 1]
    assert await cluster.ask("d1", "ballot", ["v1", "v2"], timeout=20) == "yes"


async def test_a_question_that_is_repeated_late_is_found_by_its_traces() -> None:
    """The stream has forgotten its id, the mailbox has been trimmed: the answer tells."""
    mailbox = {"duplicate_window_s": 1, "full_patience_s": 0.4}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings={"mailbox": mailbox}) as running:
        cluster = running.client
        await _start(cluster, "partners:Desk", d1={})
        async with Desk(cluster, "test-1", asyncio.Event()) as desk:
            until = monotonic() + 60
            began = time.time()

            async def ask(since: float) -> None:
                await desk.ask("d1", "q", "book", "x", until=until, since=since, now=time.time())

            await ask(began)
            await eventually(lambda: desk.answers(until))
            assert (await desk.answers(until))["q"] == Answer(ok={"booking": "d1/x"})
            signals = StreamReader(cluster.bus, cluster.subjects.signals_stream)
            mail = cluster.subjects.mailbox("d1")
            await signals.purge(mail)  # as the trimmer does, which waits for a batch
            await asyncio.sleep(1.5)  # longer than the duplicate window
            await ask(began)
            assert await _is_empty(signals, mail)
            assert await _log(cluster, "d1") == ["book x"]
            await ask(time.time())  # as if it were new
            await eventually(lambda: _has_log(cluster, "d1", ["book x", "book x"]), message="void")
            assert len(await desk.answers(until)) == 1
            await desk.clear()


async def _is_empty(stream: StreamReader, subject: str) -> bool:
    return not await stream.subjects(subject)


async def _has_log(cluster: Cluster, agent: str, log: list[str]) -> bool:
    return await _log(cluster, agent) == log


@pytest.mark.parametrize("point", ["cell.after_cas", "desk.after_ask"])
async def test_who_starts_a_pattern_dies_at_a_point_and_another_ends_it(
    nodes: TestCluster, seed: int, point: str
) -> None:
    """Right after a change of the record, or a question, was stored: nothing is done twice, nothing is left out."""
    dice = random.Random(seed)
    cluster = nodes.client
    await _start(cluster, "partners:Desk", d1={}, d2={}, full={"full": True})
    await _start(cluster, "partners:Bidder", b1={"bid": 1}, b2={"bid": 2})
    await _start(cluster, "partners:Voter", v1={"choice": "yes"}, v2={"choice": "yes"})
    patterns: dict[str, dict[str, Any]] = {
        "vote": {
            "name": "v",
            "question": "?",
            "choices": ["yes", "no"],
            "voters": ["v1", "v2"],
            "timeout": 60,
        },
        "auction": {
            "name": "a",
            "task": 1,
            "bidders": ["b1", "b2"],
            "timeout": 60,
            "accept_timeout": 60,
        },
        "saga": {"name": "s", "steps": _trip("d1", "d2", "full")},
    }
    with Children() as children:
        armed = f"{point}=after({dice.choice([1, 2])},kill)"
        for child in [_initiate(children, nodes, *p, armed) for p in patterns.items()]:
            await crashed(child)
        last = {name: _initiate(children, nodes, name, given) for name, given in patterns.items()}
        results = {
            n: (await said(child, "result"))[0].split(" ", 1)[1] for n, child in last.items()
        }
    found = {name: json.loads(text) for name, text in results.items()}
    assert (found["vote"]["choice"], found["auction"]["winner"]) == ("yes", "b1")
    assert found["saga"]["state"] == "undone"
    assert await _log(cluster, "d1") == ["book x", "unbook x d1/x"]
    await eventually(lambda: _is_awarded(cluster, "b1", ["a"]))
    await eventually(lambda: _told(cluster, "v1", ["yes"]))
    assert (await cluster.ask("b2", "story"))["announced"] == ["a"]
    assert (await cluster.ask("v2", "story"))["asked"] == ["v"]


# ---- sagas ----------------------------------------------------------------------------


def _trip(*agents: str, data: str = "x") -> list[dict[str, Any]]:
    return [
        {"name": f"at-{a}", "agent": a, "type": "book", "data": data, "undo": "unbook"}
        for a in agents
    ]


async def _log(cluster: Cluster, agent: str) -> list[str]:
    return list(await cluster.ask(agent, "log", timeout=10))


async def _is_up(cluster: Cluster, agent: str) -> bool:
    await _log(cluster, agent)
    return True


async def test_a_saga_is_done_or_undone_in_reverse(nodes: TestCluster) -> None:
    """And asked again it tells the recorded outcome, without doing anything."""
    cluster = nodes.client
    await _start(
        cluster, "partners:Desk", d1={}, d2={}, full={"full": True}, mule={"stubborn": True}
    )
    found = await saga(cluster, "good", _trip("d1", "d2", data="good"), timeout=20)
    assert (found.state, found.error) == ("done", "")
    assert found.results() == {
        "at-d1": {"booking": "d1/good"},
        "at-d2": {"booking": "d2/good"},
    }
    assert await saga(cluster, "good") == found
    bad = await saga(cluster, "bad", _trip("d1", "d2", "full", data="bad"), timeout=20)
    assert bad.state == "undone"
    assert "at-full: agent.handler: RuntimeError: full" in bad.error
    assert [part.state for part in bad.progress] == ["undone", "undone", "failed"]
    assert await _log(cluster, "d1") == ["book good", "book bad", "unbook bad d1/bad"]
    assert (await sagas(cluster))["bad"] == bad
    stuck = await saga(cluster, "stuck", _trip("mule", "full"), timeout=20)
    assert (stuck.state, stuck.progress[0].state) == ("stuck", "undoing")
    assert "undoing at-mule: agent.handler: RuntimeError: stubborn" in stuck.error
    await cluster.ask("mule", "repair")
    again = await saga(cluster, "stuck", timeout=20)
    assert (again.state, again.progress[0].state) == ("undone", "undone")
    assert await _log(cluster, "mule") == ["book x", "unbook x mule/x"]


async def test_many_initiators_at_once_do_no_harm(nodes: TestCluster) -> None:
    """Each has the same outcome, and everything took effect once."""
    cluster = nodes.client
    slow = {"slow": 0.02}
    await _start(cluster, "partners:Desk", d1=slow, d2=slow, full={"full": True})
    await _start(cluster, "partners:Bidder", b1={"bid": 1, **slow}, b2={"bid": 2})
    await _start(cluster, "partners:Voter", v1={"choice": "yes", **slow}, v2={"choice": "yes"})
    async with (
        Cluster.connect(nodes.server.url, cluster=cluster.name) as second,
        Cluster.connect(nodes.server.url, cluster=cluster.name) as third,
    ):
        all_ = (cluster, second, third)
        steps = _trip("d1", "d2", "full")
        trips = await asyncio.gather(*(saga(one, "t", steps, timeout=20) for one in all_))
        jobs = await asyncio.gather(*(auction(one, "j", 1, ["b1", "b2"]) for one in all_))
        votes = await asyncio.gather(
            *(vote(one, "v", 1, ["yes", "no"], ["v1", "v2"]) for one in all_)
        )
    assert trips[0].state == "undone"
    assert jobs[0].winner == "b1"
    assert votes[0].choice == "yes"
    for found in (trips, jobs, votes):
        assert found[0] == found[1] == found[2]
    assert await _log(cluster, "d1") == ["book x", "unbook x d1/x"]
    await eventually(lambda: _is_awarded(cluster, "b1", ["j"]))
    await eventually(lambda: _told(cluster, "v1", ["yes"]))
    assert (await cluster.ask("b2", "story"))["announced"] == ["j"]
    assert (await cluster.ask("v1", "story"))["asked"] == ["v"]


async def test_a_saga_that_was_cancelled_goes_on_when_it_is_called_again(
    nodes: TestCluster,
) -> None:
    """It stands where it was."""
    cluster = nodes.client
    await _start(cluster, "partners:Desk", d1={"slow": 0.5}, d2={"slow": 0.5})
    task = asyncio.create_task(saga(cluster, "t", _trip("d1", "d2")))
    await eventually(lambda: _has_begun(cluster, "t"))
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await sagas(cluster))["t"].state == "running"
    assert (await saga(cluster, "t", timeout=20)).state == "done"
    assert [await _log(cluster, desk) for desk in ("d1", "d2")] == [["book x"], ["book x"]]


async def _has_begun(cluster: Cluster, name: str) -> bool:
    return name in await sagas(cluster)


async def test_a_step_without_an_answer_is_undone_behind_it(nodes: TestCluster) -> None:
    """Whether it has happened is not known: the compensation comes after it in the mailbox."""
    cluster = nodes.client
    await _start(cluster, "partners:Desk", d1={}, slow={"slow": 1.5})
    steps = _trip("d1", "slow", data="s")
    steps[1]["timeout_s"] = 0.5
    with pytest.raises(NotSettledError, match="slow has not answered yet: undo of at-slow"):
        await saga(cluster, "s", steps, timeout=1.0)
    found = await saga(cluster, "s", timeout=20)
    assert found.state == "undone"
    assert [part.state for part in found.progress] == ["undone", "undone"]
    assert await _log(cluster, "slow") == ["book s", "unbook s None"]
    assert await _log(cluster, "d1") == ["book s", "unbook s d1/s"]


async def test_wrong_sagas_are_named(cluster: Cluster) -> None:
    """Before anything is sent."""
    with pytest.raises(NotFoundError, match="no saga none"):
        await saga(cluster, "none")
    with pytest.raises(ConfigError, match="Step 1 of the saga s: agent: Field required"):
        await saga(cluster, "s", [{"name": "a", "type": "t"}])
    with pytest.raises(ConfigError, match="has compensate; a step has name, agent"):
        await saga(cluster, "s", [{"name": "a", "type": "t", "agent": "x", "compensate": "u"}])
    with pytest.raises(ConfigError, match="names that differ"):
        await saga(cluster, "s", [*_trip("a"), *_trip("a")])


async def _storm_at_the_saga(
    nodes: TestCluster, seed: int, rounds: int, *, node: bool = False
) -> None:
    """Runners, a worker (or a node) and the broker are killed: each agent's log is that of a run without faults."""
    dice = random.Random(seed)
    cluster = nodes.client
    slow = {"slow": 0.03}
    desks = {"d1": slow, "d2": slow, "d3": slow, "full": {"full": True, **slow}}
    await _start(cluster, "partners:Desk", **desks)
    expected: dict[str, list[str]] = {name: [] for name in desks}
    with Children() as children:
        for number in range(rounds):
            fails = (number + seed) % 2 == 0
            agents = ["d1", "d2", "d3", *(["full"] if fails else [])]
            data = f"n{number}"
            arguments = {"name": f"trip-{number}", "steps": _trip(*agents, data=data)}
            found = await _outcome(
                children, nodes, "saga", arguments, dice, kills=3, first=number == 0, node=node
            )
            assert found["state"] == ("undone" if fails else "done"), found
            for name in ("d1", "d2", "d3"):
                expected[name].append(f"book {data}")
                if fails:
                    expected[name].append(f"unbook {data} {name}/{data}")
    for name, log in expected.items():
        await eventually(lambda n=name: _is_up(cluster, n), timeout=30)
        assert await _log(cluster, name) == log


async def test_a_saga_survives_runner_agents_and_broker(nodes: TestCluster, seed: int) -> None:
    """The outcome is that of a run without faults."""
    await _storm_at_the_saga(nodes, seed, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(400)
async def test_sagas_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer."""
    await _storm_at_the_saga(nodes, seed, 8, node=True)


# ---- work queues ----------------------------------------------------------------------


async def test_items_of_a_key_come_in_order_and_bad_ones_are_dead_at_last(cluster: Cluster) -> None:
    """Three workers at once; a retry happens in its place, a dead item lets the next ones go."""
    jobs = workqueue(cluster, "jobs", attempts=3, visibility_s=10)
    for number in range(8):
        for key in ("a", "b", "c", None):
            await jobs.put(number, key=key, id=f"{key}-{number}")
    await jobs.put(0, key="a", id="a-0")  # a repeat
    assert await jobs.waiting() == 32
    done: dict[str | None, list[int]] = {"a": [], "b": [], "c": [], None: []}
    tried: list[tuple[str | None, int]] = []
    inside: list[str | None] = []

    async def handle(item: Item) -> None:
        assert item.key is None or item.key not in inside
        inside.append(item.key)
        try:
            await asyncio.sleep(random.uniform(0, 0.01))
            if item.data == 3:
                tried.append((item.key, item.attempt))
                if item.attempt < 3 or item.key == "b":
                    raise RuntimeError("three")
            done[item.key].append(item.data)
        finally:
            inside.remove(item.key)

    assert await jobs.work(handle, concurrency=3, drain=True, backoff=0.05) == 31
    assert done["a"] == done["c"] == list(range(8))
    assert done["b"] == [0, 1, 2, 4, 5, 6, 7]
    assert sorted(done[None]) == list(range(8))
    assert [attempt for key, attempt in tried if key == "a"] == [1, 2, 3]
    (letter,) = await jobs.dead()
    assert (letter.item.id, letter.attempts, letter.reason) == ("b-3", 3, "RuntimeError: three")
    await jobs.replay(letter.sequence)
    assert (await jobs.dead(), await jobs.waiting()) == ([], 1)
    with pytest.raises(NotFoundError, match="no dead letter 99"):
        await jobs.replay(99)
    with pytest.raises(ConfigError, match="has attempts = 3, not 4"):
        await workqueue(cluster, "jobs", attempts=4).put(1)


async def test_an_item_that_is_not_acknowledged_goes_to_another(cluster: Cluster) -> None:
    """After the visibility time, which `extend` begins anew; at last it is dead."""
    jobs = workqueue(cluster, "jobs", attempts=2, visibility_s=1)
    await jobs.put("x", key="k")
    await jobs.put("y", key="k")
    item = await jobs.take()
    assert item is not None
    assert (item.data, item.attempt) == ("x", 1)
    for _ in range(3):
        await asyncio.sleep(0.5)
        await item.extend()
        assert item.is_valid()
    other = await jobs.take(timeout=0.3)
    assert other is None, f"{other.data} was handed out, attempt {other.attempt}"
    again = await jobs.take(timeout=5)
    assert again is not None
    assert (again.data, again.attempt, item.is_valid()) == ("x", 2, False)
    second = await jobs.take(timeout=5)
    assert second is not None
    assert second.data == "y"
    await second.ack()
    await second.ack()
    (letter,) = await jobs.dead()
    assert letter.reason == "not acknowledged in time, 2 times"
    assert await jobs.waiting() == 0


async def _storm_at_the_queue(
    nodes: TestCluster, seed: int, items: int, kills: int, *, node: bool = False
) -> None:
    """Feeders, a worker of agents (or a node) and the broker are killed: each agent has done its items once, in order."""
    dice = random.Random(seed)
    cluster = nodes.client
    await _start(cluster, "partners:Desk", q0={}, q1={}, q2={})
    jobs = workqueue(cluster, "jobs", attempts=1000, visibility_s=2)
    with Children() as children:

        def start(_name: str, _life: int) -> Child:
            given = (nodes.server.url, cluster.name, "jobs")
            return children.start("tests.cluster.feeder", *given)

        feeders = [f"f{number}" for number in range(3 if node else 2)]
        storm = Storm(start, feeders, dice)
        expected: dict[str, list[str]] = {f"q{n}": [] for n in range(3)}
        for number in range(items):
            agent = dice.choice(sorted(expected))
            expected[agent].append(f"{agent} {number}")
            await jobs.put(number, key=agent, id=f"item-{number}", timeout=20)
        for step in range(kills):
            if step == kills // 2:
                await broker_dies(nodes.server)()
            if step == kills - 1:
                await (node_dies if node else worker_dies)(nodes, dice)()
            await storm.kill(feeders, within=0.4)
        await eventually(lambda: _is_drained(jobs), timeout=90, message="all is done")
        assert await jobs.dead() == []
    for agent, log in expected.items():
        await eventually(lambda a=agent: _is_up(cluster, a), timeout=30)
        assert await _log(cluster, agent) == log


async def _is_drained(jobs: WorkQueue) -> bool:
    return await jobs.waiting() == 0


async def test_agents_do_each_item_once_although_they_and_feeders_die(
    nodes: TestCluster, seed: int
) -> None:
    """The agents' logs are those of a run without faults."""
    await _storm_at_the_queue(nodes, seed, 60, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("chaos")
@pytest.mark.timeout(400)
async def test_queues_under_many_seeds(nodes: TestCluster, seed: int) -> None:
    """The same, longer."""
    await _storm_at_the_queue(nodes, seed, 1500, 15, node=True)
