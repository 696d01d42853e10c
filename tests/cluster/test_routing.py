"""Signals for many and for one of several: who gets them, and exactly once through crashes."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from foundation_nats import Cluster
from foundation_nats.bus.assets import EXPANDER
from foundation_nats.bus.streams import StreamReader, api
from foundation_nats.testing import TestCluster, eventually
from foundation_schemas import Subscription
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def applied(cluster: Cluster, agent: str) -> list[str]:
    """What an agent has stored."""
    stored = await cluster.agents.state(agent)
    return [] if stored is None or stored["state"] is None else stored["state"]["applied"]


async def all_applied(cluster: Cluster, agents: list[str]) -> Counter[str]:
    """How often each key was applied, all agents together."""
    found: Counter[str] = Counter()
    for agent in agents:
        found.update(await applied(cluster, agent))
    return found


async def test_labels_and_topics_select_their_receivers() -> None:
    """`label:` by the agents' own labels, `topic:` by patterns, and one of each group."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.deployments.apply(
            """
version: 1
agents:
  - {name: a, run: "fleet:Mirror", labels: {zone: eu, tier: gold}, subscribe: ["orders.*"]}
  - {name: b, run: "fleet:Mirror", labels: {zone: us, tier: gold}, subscribe: ["orders.>"]}
  - name: g
    run: fleet:Mirror
    replicas: 3
    subscribe: [{topic: "orders.new", mode: one-of-group}, {topic: "*.new", mode: one-of-group}]
"""
        )
        await cluster.deployments.wait_settled(["a", "b", "g"], timeout=20)

        async def send(target: str, key: str) -> None:
            await cluster.send(target, "ledger.append", {"key": key})

        await send("label:zone=eu", "eu")
        await send("label:tier=gold;zone in (us, asia)", "us")
        await send("topic:orders.new", "new")
        await send("topic:orders.old.paid", "old")
        await send("topic:nobody.hears", "void")
        await send("label:zone=mars", "mars")
        group = ["g-0", "g-1", "g-2"]

        async def arrived() -> bool:
            assert sorted(await applied(cluster, "a")) == ["eu", "new"]
            assert sorted(await applied(cluster, "b")) == ["new", "old", "us"]
            assert await all_applied(cluster, group) == {"new": 1}
            return True

        await eventually(arrived, timeout=15)
        (letter,) = await eventually(cluster.dead.list, timeout=5)
        assert letter.letter.code == "no_recipient"
        assert letter.letter.signal is not None
        assert letter.letter.signal["subject"] == "label:zone=mars"


async def test_who_is_stopped_to_be_moved_or_changed_gets_what_is_sent_to_all() -> None:
    """A long handler holds up the move, and then the change: meanwhile signals for many arrive."""
    text = """
version: 1
agents: [{name: a, run: "fleet:Recorder", replicas: 2, config: {version: 1}}]
"""
    async with TestCluster(nodes=2, workers=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.deployments.deploy(text)
        slow = await cluster.agents.get("a-0")
        sleeping = asyncio.create_task(cluster.ask("a-0", "sleep", 1.5, timeout=10))
        draining = asyncio.create_task(cluster.nodes.drain(slow.node or "", timeout=20))

        async def stops() -> bool:
            found = await cluster.agents.get("a-0")
            return found.status == "moving" and not sleeping.done()

        await eventually(stops, timeout=10, every=0.01, message="it is being stopped")
        await cluster.send("deployment:a", "note", {"key": "moved"})
        await draining
        await sleeping
        sleeping = asyncio.create_task(cluster.ask("a-0", "sleep", 1.5, timeout=10))
        changing = asyncio.create_task(
            cluster.deployments.deploy(text.replace("version: 1}", "version: 2}"), timeout=20)
        )
        registry = await cluster._open_registry()

        def changes() -> bool:
            held = registry.get("a-0")
            return held is not None and held.record.desired == "stop" and not sleeping.done()

        await eventually(changes, timeout=10, every=0.01, message="it is being stopped again")
        await cluster.send("deployment:a", "note", {"key": "changed"})
        await changing
        await asyncio.wait([sleeping])

        async def arrived() -> bool:
            return [await applied(cluster, f"a-{n}") for n in (0, 1)] == [["moved", "changed"]] * 2

        await eventually(arrived, timeout=15, message="both have both")


async def test_any_spreads_over_equals() -> None:
    """One node gives to the least loaded: none of three gets more than its share."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        for name in "abc":
            await cluster.agents.start("fleet:Mirror", id=name, capabilities=["share"])
        for number in range(30):
            await cluster.send("any:share", "ledger.append", {"key": str(number)})

        async def all_there() -> bool:
            return len(await all_applied(cluster, ["a", "b", "c"])) == 30

        await eventually(all_there, timeout=15)
        shares = [len(await applied(cluster, name)) for name in "abc"]
        assert max(shares) <= 14, shares


async def test_questions_to_any_go_where_the_least_waits() -> None:
    """Evenly to equals; while signals wait on one node, all to the agent on the other."""
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        for name in ("n1", "n2"):
            nodes.start_node(name, "--label", f"home={name}")
        await nodes.wait_up(["n1", "n2"])
        for name in ("n1", "n2"):
            await cluster.agents.start(
                "fleet:Counter",
                id=f"on_{name}",
                capabilities=["counting"],
                placement={"labels": {"home": name}},
            )

        async def asked(count: int) -> list[int]:
            """How many of so many questions each of the two was given."""
            before = [await cluster.ask(f"on_{name}", "counter.get") for name in ("n1", "n2")]
            for _ in range(count):
                await cluster.ask("any:counting", "counter.add", {"amount": 1})
            after = [await cluster.ask(f"on_{name}", "counter.get") for name in ("n1", "n2")]
            return [b - a for a, b in zip(before, after, strict=True)]

        assert await asked(20) == [10, 10]
        for busy, shares in (("n1", [0, 10]), ("n2", [10, 0])):
            await cluster.agents.start(
                "fleet:SlowMirror",
                id=f"busy_{busy}",
                placement={"labels": {"home": busy}},
                config={"seconds": 3600},
            )
            # More than what the client has given to either lately, on the first and then on both.
            count = 200 if busy == "n1" else 400
            await asyncio.gather(
                *(
                    cluster.send(f"busy_{busy}", "ledger.append", {"key": str(number)})
                    for number in range(count)
                )
            )

            async def heard(busy: str = busy, count: int = count) -> bool:
                node = (await cluster.nodes.view()).get(busy)
                return node is not None and node.load.backlog >= count - 1

            await eventually(heard, timeout=10, message="the client has heard of what waits")
            assert await asked(10) == shares


async def test_an_expander_that_dies_amid_the_copies_is_continued() -> None:
    """Each receiver gets each signal once; another node goes on when the word of the first is overdue."""
    async with TestCluster(nodes=0, path=[str(AGENTS)]) as nodes:
        nodes.start_node("stays", "--label", "home=here")
        armed = {"FOUNDATION_FAILPOINTS": "expand.mid=kill"}
        dying = nodes.start_node("dies", environment=armed)
        await nodes.wait_up(["stays", "dies"])
        cluster = nodes.client
        # Sooner than by default, so that the test is short.
        stream = cluster.subjects.routes_stream
        about = await api(cluster.bus, "CONSUMER.INFO", f"{stream}.{EXPANDER}")
        config = {**about["config"], "ack_wait": 1_000_000_000}
        body = {"stream_name": stream, "config": config, "action": "update"}
        await api(cluster.bus, "CONSUMER.CREATE", f"{stream}.{EXPANDER}", body)
        names = [f"m{n}" for n in range(4)]
        await asyncio.gather(
            *(
                cluster.agents.start(
                    "fleet:Mirror",
                    id=name,
                    capabilities=["r"],
                    placement={"labels": {"home": "here"}},
                )
                for name in names
            )
        )
        keys = [str(number) for number in range(12)]
        for key in keys:
            await cluster.send("capability:r", "ledger.append", {"key": key})
        await eventually(lambda: not dying.is_running, timeout=10, message="void: it did not die")

        async def expanded() -> bool:
            routes = StreamReader(cluster.bus, cluster.subjects.routes_stream)
            assert await all_applied(cluster, names) == dict.fromkeys(keys, 4)
            return (await routes.info())["state"]["messages"] == 0

        await eventually(expanded, timeout=20)


async def reroute(
    environment: dict[str, str], *, freeze: bool = False, target: str = "any:work"
) -> None:
    """Shared signals of an agent whose node dies go to the other one, exactly once each."""
    count = 40
    settings = {"control": {"unavailable_grace_s": 60}}
    async with TestCluster(nodes=0, path=[str(AGENTS)], settings=settings) as nodes:
        nodes.start_node("stays", environment=environment)
        await nodes.wait_up(["stays"])
        dying = nodes.start_node("dies", "--label", "home=dies")
        nodes.start_node("n3")
        await nodes.wait_up(["dies", "n3"])
        cluster = nodes.client
        slow = {
            "capabilities": ["work"],
            "subscribe": [Subscription(topic="work.*", mode="one-of-group", group="g")],
            "config": {"seconds": 0.2},
        }
        await cluster.agents.start(
            "fleet:SlowMirror", id="a", placement={"labels": {"home": "dies"}}, **slow
        )
        await cluster.agents.start(
            "fleet:SlowMirror", id="b", placement={"expressions": ["!home"]}, **slow
        )
        keys = [str(number) for number in range(count)]

        async def send(keys: list[str]) -> None:
            await asyncio.gather(
                *(cluster.send(target, "ledger.append", {"key": key}) for key in keys)
            )

        async def both_work() -> bool:
            return bool(await applied(cluster, "a")) and bool(await applied(cluster, "b"))

        await send(keys[:6])
        await eventually(both_work, timeout=15)
        await send(keys[6:])
        routes = StreamReader(cluster.bus, cluster.subjects.routes_stream)

        async def expanded() -> bool:
            return (await routes.info())["state"]["messages"] == 0

        await eventually(expanded, timeout=10)
        if freeze:
            dying.pause()
        else:
            dying.kill_all()

        async def all_there() -> bool:
            found = await all_applied(cluster, ["a", "b"])
            assert set(found) == set(keys), len(found)
            return True

        await eventually(all_there, timeout=40, message="every signal takes effect")
        assert set((await all_applied(cluster, ["a", "b"])).values()) == {1}
        assert (await cluster.agents.get("a")).status != "running"
        assert len(await applied(cluster, "a")) < count / 3, "void: a has handled its share"
        # It comes back, and has nothing left to do.
        if freeze:
            dying.resume()
        else:
            nodes.start_node("dies", "--label", "home=dies")

        async def back() -> bool:
            return (await cluster.agents.get("a")).status == "running"

        await eventually(back, timeout=20)
        await cluster.send("a", "ledger.append", {"key": "last"})

        async def last() -> bool:
            return "last" in await applied(cluster, "a")

        await eventually(last, timeout=10)
        assert set((await all_applied(cluster, ["a", "b"])).values()) == {1}
        assert not await cluster.dead.list()


async def test_shared_signals_of_a_dead_agent_go_to_another() -> None:
    """`any:` is re-routed when its receiver dies before it commits, and takes effect once."""
    await reroute({})


@pytest.mark.usefixtures("chaos")
async def test_a_topics_signals_of_a_dead_agent_go_to_another_of_its_group() -> None:
    """As `any:`."""
    await reroute({}, target="topic:work.now")


@pytest.mark.usefixtures("chaos")
async def test_a_frozen_receiver_that_comes_back_has_lost_its_shared_signals() -> None:
    """It holds them in memory, and even has one in hand; its commit is refused."""
    await reroute({}, freeze=True)


@pytest.mark.usefixtures("chaos")
@pytest.mark.parametrize("point", ["reroute.after_fence", "reroute.before_delete"])
async def test_a_leader_that_dies_while_it_re_routes_repeats_nothing(point: str) -> None:
    """The next leader finishes it under the same ids."""
    await reroute({"FOUNDATION_FAILPOINTS": f"{point}=kill"})


@pytest.mark.usefixtures("chaos")
async def test_an_expansion_cut_short_for_longer_than_the_window_reaches_everybody_once() -> None:
    """All nodes die amid the copying, and come back when the stream has forgotten the copies' ids."""
    names = [f"m-{number}" for number in range(12)]
    settings = {"mailbox": {"duplicate_window_s": 2, "full_patience_s": 1}}
    armed = {"FOUNDATION_FAILPOINTS": "expand.before_ack=kill"}
    async with TestCluster(nodes=0, path=[str(AGENTS)], settings=settings) as nodes:
        node = nodes.start_node("n1", environment=armed)
        await nodes.wait_up(["n1"])
        cluster = nodes.client
        await cluster.deployments.apply(
            "version: 1\nagents:\n  - {name: m, run: 'fleet:Mirror', replicas: 12, critical: true}"
        )
        await cluster.deployments.wait_settled(["m"], timeout=20)
        await cluster.send("deployment:m", "ledger.append", {"key": "k"})
        await eventually(lambda: not node.is_running, timeout=15, message="void: it did not die")
        nodes.server.kill()
        await asyncio.sleep(3)
        await nodes.server.restart()
        nodes.start_node("n2")

        async def expanded() -> bool:
            routes = StreamReader(cluster.bus, cluster.subjects.routes_stream)
            assert await all_applied(cluster, names) == {"k": 12}
            return (await routes.info())["state"]["messages"] == 0

        await eventually(expanded, timeout=40)
        await asyncio.sleep(1)
        assert await all_applied(cluster, names) == {"k": 12}
