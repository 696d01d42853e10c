"""Urgent signals and limits on intake: order, exactly once through crashes, moves and trimming."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.errors import ConfigError, ManifestError, OverloadError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def _keys(cluster: Cluster, agent: str) -> list[str]:
    stored = await cluster.agents.state(agent)
    return [] if stored is None or stored["state"] is None else stored["state"]["keys"]


async def _record(cluster: Cluster, agent: str) -> dict[str, Any]:
    entry = await Bucket(cluster.bus, cluster.subjects, "state").read(agent)
    return {} if entry is None or entry.value is None else orjson.loads(entry.value)


def _check(keys: list[str], ordinary: int, urgent: int) -> None:
    """Each once, and each lane in the order in which it was sent."""
    assert [key for key in keys if key[0] == "o"] == [f"o{n}" for n in range(ordinary)]
    assert [key for key in keys if key[0] == "u"] == [f"u{n}" for n in range(urgent)]


async def test_urgent_signals_overtake_and_each_lane_keeps_its_order() -> None:
    """Also those that are given up, and what an agent tells itself; a full window is not exceeded."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("lanes:Lane", id="a")
        await cluster.send("a", "hold", 0.7)
        for n in range(10):
            await cluster.send("a", "key", f"o{n}")
        await cluster.send("a", "break", attempts=1, urgent=True, id="bad")
        for n in range(4):
            await cluster.send("a", "key", f"u{n}", urgent=True)

        async def done(count: int) -> bool:
            return len(await _keys(cluster, "a")) == count

        await eventually(lambda: done(14), timeout=10)
        keys = await _keys(cluster, "a")
        _check(keys, 10, 4)
        assert keys[:4] == ["u0", "u1", "u2", "u3"], "all before those that waited"
        (letter,) = await cluster.dead.list()
        assert (letter.letter.signal or {})["id"] == "bad"
        assert "ahead" not in await _record(cluster, "a"), "nothing is left of it in the record"
        await cluster.send("a", "hold", 0.4)
        await cluster.send("a", "hand_on")
        await cluster.send("a", "hold", 0.4)
        await cluster.send("a", "key", "last")
        await eventually(lambda: done(16), timeout=10)
        assert (await _keys(cluster, "a"))[-2:] == ["urgent", "last"]


async def _faults(settings: dict[str, Any], *, rounds: int, move: bool) -> None:
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("lanes:Lane", id="a", critical=True, config={"seconds": 0.03})
        ordinary, urgent = 30 * rounds, 10 * rounds
        sent_o = sent_u = 0
        for number in range(rounds):
            for _ in range(10):
                for _ in range(3):
                    await cluster.send("a", "key", f"o{sent_o}", id=f"o{sent_o}")
                    sent_o += 1
                await cluster.send("a", "key", f"u{sent_u}", id=f"u{sent_u}", urgent=True)
                sent_u += 1
            before = await _keys(cluster, "a")

            async def ahead(least: int = len(before) + 3) -> bool:
                record = await _record(cluster, "a")
                return bool(record.get("ahead")) and len(await _keys(cluster, "a")) >= least

            await eventually(ahead, timeout=20, every=0.01, message="some were handled ahead")
            info = await cluster.agents.get("a")
            node = nodes.nodes[info.node or ""]
            if move and number % 2:
                await cluster.nodes.drain(info.node or "", timeout=20)
                await cluster.nodes.uncordon(info.node or "")
            else:
                for worker in node.workers():
                    worker.kill()

        async def all_there() -> bool:
            return len(await _keys(cluster, "a")) >= ordinary + urgent

        await eventually(all_there, timeout=60, message="all were handled")
        keys = await _keys(cluster, "a")
        _check(keys, ordinary, urgent)
        overtaken = sum(
            key[0] == "u" and "o" in {k[0] for k in keys[i:]} for i, key in enumerate(keys)
        )
        assert overtaken > urgent // 2
        assert await cluster.dead.list() == []


async def test_both_lanes_survive_the_death_of_a_worker() -> None:
    """While some urgent ones are ahead of the cursor, and mailboxes are trimmed at once."""
    mailbox = {"trim_every_s": 0.1, "trim_min_age_s": 0.1, "mailbox_max": 200}
    await _faults({"mailbox": mailbox}, rounds=1, move=False)


@pytest.mark.usefixtures("chaos")
async def test_both_lanes_survive_deaths_and_moves() -> None:
    """Again and again; with little memory, so that what waits is read from the stream in pages."""
    mailbox = {"trim_every_s": 0.1, "trim_min_age_s": 0.1, "mailbox_max": 400, "in_memory_max": 16}
    await _faults({"mailbox": mailbox}, rounds=6, move=True)


async def test_a_number_that_is_given_out_again_is_another_signal() -> None:
    """A record that says *handled ahead* of a signal with another time does not hide it."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("lanes:Lane", id="a")
        await cluster.agents.stop("a")
        await cluster.send("a", "key", "o0")
        receipt = await cluster.send("a", "key", "u0", urgent=True)
        states = Bucket(cluster.bus, cluster.subjects, "state")
        entry = await states.read("a")
        assert entry is not None
        record = orjson.loads(entry.value or b"")
        record["ahead"] = [[receipt.sequence, "2020-01-01T00:00:00.000000000Z"]]
        await states.replace("a", orjson.dumps(record), expected=entry.revision)
        await cluster.agents.start("lanes:Lane", id="a")

        async def both() -> bool:
            return sorted(await _keys(cluster, "a")) == ["o0", "u0"]

        await eventually(both, timeout=10)

        async def forgotten() -> bool:
            return "ahead" not in await _record(cluster, "a")

        await eventually(forgotten, timeout=10)


async def test_intake_is_limited() -> None:
    """What is stored waits, in order; what is asked is refused and told when to ask again."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("lanes:Limited", id="a")
        await cluster.agents.start("lanes:Lane", id="b", rate={"per_sender": 2})
        loop = asyncio.get_running_loop()
        began = loop.time()
        for n in range(16):
            await cluster.send("a", "key", f"o{n}")

        async def some() -> bool:
            return len(await _keys(cluster, "a")) >= 3

        await eventually(some, timeout=5, every=0.02)
        with pytest.raises(OverloadError, match="ask again in") as caught:
            await cluster.ask("a", "key", "asked")
        assert 0 < caught.value.details["retry_in_s"] < 1
        assert caught.value.retryable

        async def all_there() -> bool:
            return len(await _keys(cluster, "a")) == 16

        await eventually(all_there, timeout=10, every=0.02)
        took = loop.time() - began
        assert took > 14 / 20 * 0.9, "two at once, the rest at 20 a second"
        _check(await _keys(cluster, "a"), 16, 0)
        for _ in range(2):
            await cluster.ask("b", "key", "x")
        with pytest.raises(OverloadError):
            await cluster.ask("b", "key", "x")
        async with Cluster.connect(config=nodes.config, name="other") as other:
            assert await other.ask("b", "key", "y") == 3
        with pytest.raises(ConfigError, match="per_s"):
            await cluster.agents.start("lanes:Lane", id="c", rate={"burst": 3})
        with pytest.raises(ManifestError, match="rate"):
            await cluster.deployments.apply(
                'version: 1\nagents: [{name: d, run: "lanes:Lane", rate: {per_s: 0}}]'
            )
        # Stopping does not wait for the limit.
        for n in range(40):
            await cluster.send("a", "key", f"o{n + 16}")
        began = loop.time()
        await cluster.agents.stop("a")
        assert loop.time() - began < 1.5


@pytest.mark.usefixtures("chaos")
async def test_urgent_signals_for_one_of_several_stay_urgent_where_they_are_re_routed_to() -> None:
    """Their first choice dies amid them: each takes effect once, and the urgent ones still overtake."""
    settings = {"control": {"unavailable_grace_s": 60}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        dying = nodes.start_node("dies", "--label", "home=dies")
        await nodes.wait_up(["dies"])
        slow = {"capabilities": ["work"], "config": {"seconds": 0.3}}
        await cluster.agents.start(
            "lanes:Lane", id="a", placement={"labels": {"home": "dies"}}, **slow
        )
        for n in range(6):
            await cluster.send("any:work", "key", f"o{n}")
        for n in range(4):
            await cluster.send("any:work", "key", f"u{n}", urgent=True)

        async def ahead() -> bool:
            return bool((await _record(cluster, "a")).get("ahead"))

        await eventually(ahead, timeout=10, every=0.01, message="one was handled ahead")
        # The other one comes when the choice has been made, and is busy until all are there.
        place = {"expressions": ["!home"]}
        await cluster.agents.start("lanes:Lane", id="b", placement=place, capabilities=["work"])
        dying.kill_all()
        await cluster.send("b", "hold", 6)
        by_a = await _keys(cluster, "a")
        left = 10 - len(by_a)
        assert 3 <= left < 10, "void: it was killed amid them"

        async def moved() -> bool:
            events = await cluster.events.list(topic="signal", limit=1000)
            return len([event for event in events if event.what == "rerouted"]) == left

        await eventually(moved, timeout=15, message="all that is left goes to the other one")
        assert await _keys(cluster, "b") == [], "void: it has not handled any yet"

        async def done() -> bool:
            return len(await _keys(cluster, "b")) == left

        await eventually(done, timeout=15)
        by_b = await _keys(cluster, "b")
        assert by_b == sorted(by_b, reverse=True, key=lambda key: key[0]), "the urgent ones first"
        assert {key[0] for key in by_b} == {"o", "u"}, "void: both kinds were left"
        # What is for one of several has no order, but each comes once.
        assert sorted(by_a + by_b) == [*(f"o{n}" for n in range(6)), *(f"u{n}" for n in range(4))]
        # It comes back, and skips what was taken from it, in both lanes.
        nodes.start_node("dies", "--label", "home=dies")
        await cluster.send("a", "key", "last")

        async def last() -> bool:
            return await _keys(cluster, "a") == [*by_a, "last"]

        await eventually(last, timeout=20)
        assert await _keys(cluster, "b") == by_b
        assert await cluster.dead.list() == []
