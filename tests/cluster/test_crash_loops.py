"""What dies again and again, or never ends: it is slowed down and named, and nobody else suffers."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from foundation_nats import Cluster
from foundation_nats.errors import AskTimeoutError, HandlerError, NotSettledError
from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]


async def last_revision(cluster: Cluster, bucket: str) -> int:
    """How many writes a bucket has had."""
    from foundation_nats.bus.kv import Bucket

    info = await Bucket(cluster.bus, cluster.subjects, bucket).reader.info()
    return int(info["state"]["last_seq"])


async def answers(cluster: Cluster, agent: str) -> float:
    """Seconds until a counter has answered."""
    began = time.monotonic()
    await cluster.ask(agent, "counter.add", {"amount": 1}, timeout=5)
    return time.monotonic() - began


async def test_a_deployment_that_fails_at_every_start_is_slowed_down() -> None:
    """It says why, its tries become rare, and the neighbours answer as ever (R-07)."""
    settings = {"control": {"failed_backoff_s": 0.2}}
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="neighbour")
        text = """
version: 1
agents:
  - {name: bad, run: "fleet:Difficult", replicas: 20, config: {fail_start: true}}
"""
        await cluster.deployments.apply(text)
        with pytest.raises(NotSettledError, match="no start today"):
            await cluster.deployments.wait_settled(["bad"], timeout=0.5)

        async def all_tried_thrice() -> bool:
            records = await cluster.deployments.status("bad")
            assert records.running == 0
            infos = [info for info in await cluster.agents.list() if info.id != "neighbour"]
            return all(info.failures >= 3 for info in infos)

        await eventually(all_tried_thrice, timeout=15, message="three failures each")
        # The back-off is 1.6 s now, and doubles: two writes for each try, and no other.
        before, began = await last_revision(cluster, "agents"), time.monotonic()
        slowest = 0.0
        while time.monotonic() - began < 1.4:
            slowest = max(slowest, await answers(cluster, "neighbour"))
            await asyncio.sleep(0.02)
        written = await last_revision(cluster, "agents") - before
        assert written <= 20 * 2, f"{written} writes in 1.4 s"
        assert slowest < 1.0
        infos = {info.id: info for info in await cluster.agents.list()}
        assert infos["neighbour"].epoch == 1
        assert all("no start today" in (i.reason or "") for i in infos.values() if i.failures)


async def test_a_deployment_that_ends_every_worker_ends_no_node() -> None:
    """Whose fault it is, is known: were the node to end, the next one would, too (R-08)."""
    settings = {"worker": {"restarts_max": 2}, "control": {"failed_backoff_s": 0.1}}
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="neighbour", critical=True)
        text = """
version: 1
agents: [{name: bad, run: "quarrelsome:Suicidal", replicas: 6}]
"""
        await cluster.deployments.apply(text)

        async def died_often() -> bool:
            events = await cluster.events.list(topic="worker", limit=1000)
            died = Counter(e.data.get("worker") for e in events if e.what == "died")
            return len(died) == 2 and min(died.values()) > 2

        await eventually(died_often, timeout=30, message="more deaths than the limit, everywhere")
        assert all(node.is_running for node in nodes.nodes.values())
        infos = await cluster.agents.list()
        assert any("on_start ended the worker process" in (i.reason or "") for i in infos)
        # It can be mended in place.
        mended = text.replace("replicas: 6", "replicas: 6, config: {deadly: false}")
        await cluster.deployments.apply(mended)
        await cluster.deployments.wait_settled(["bad"], timeout=30)
        assert await cluster.ask("bad-5", "ping") == "bad-5"
        await answers(cluster, "neighbour")


async def test_the_back_off_of_one_is_not_undone_by_another_that_ends_their_worker() -> None:
    """Two that end their worker: each waits as if it were alone (R-07)."""
    settings = {"control": {"failed_backoff_s": 2.0}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        for id in ("a", "b"):
            await cluster.agents.start("quarrelsome:Suicidal", id=id, wait=False)

        async def both_failed() -> list[int]:
            failures = [info.failures for info in await cluster.agents.list()]
            return failures if len(failures) == 2 and min(failures) >= 1 else []

        assert await eventually(both_failed, timeout=10, message="both failed") == [1, 1]
        await asyncio.sleep(2)  # the next try is due 4 s after the first
        assert [info.failures for info in await cluster.agents.list()] == [1, 1]


async def test_workers_that_die_too_often_end_their_node_and_no_other() -> None:
    """The intensity of one node is spent: it leaves with the reason, its agents move (R-08)."""
    settings = {"worker": {"restarts_max": 3, "restart_window_s": 30}}
    async with TestCluster(nodes=2, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        text = """
version: 1
agents: [{name: c, run: "fleet:Counter", replicas: 40, critical: true}]
"""
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["c"], timeout=20)
        leader = await nodes.leader()
        victim = next(node for node in nodes.nodes.values() if node is not leader)
        deadline = time.monotonic() + 20
        while victim.is_running and time.monotonic() < deadline:
            for worker in victim.workers():
                worker.send_signal(signal.SIGKILL)
            await asyncio.sleep(0.05)
        assert await victim.wait(timeout=5) == 1
        assert "not restarted" in victim.log_tail()

        async def moved() -> bool:
            infos = await cluster.agents.list()
            return all(i.status == "running" and i.node == leader.name for i in infos)

        await eventually(moved, timeout=20, message="its agents run elsewhere")
        assert leader.is_running
        assert await cluster.ask("c-0", "counter.add", {"amount": 1}) == 1


async def test_a_handler_that_never_ends_is_ended_and_given_up() -> None:
    """With a time-out for handlers: the asker hears of it, a signal becomes a dead letter (R-06)."""
    settings = {
        "worker": {"handler_timeout_s": 0.2},
        "mailbox": {"attempts_max": 2, "retry_first_s": 0.02},
    }
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("quarrelsome:Endless", id="e")
        with pytest.raises((HandlerError, AskTimeoutError), match=r"longer than 0\.2"):
            await cluster.ask("e", "hang", timeout=5)
        await cluster.send("e", "hang", id="never")
        await cluster.send("e", "count")

        async def next_one() -> bool:
            return bool(await cluster.ask("e", "count", timeout=2) >= 2)

        await eventually(next_one, message="the next signal is handled")
        (dead,) = await eventually(cluster.dead.list)
        assert dead.letter.attempts == 2
        assert "longer than 0.2" in dead.letter.reason


async def test_an_effect_outside_has_one_key_however_often_it_is_tried(tmp_path: Path) -> None:
    """Workers and the node are killed amid payments: the sink can tell every repeat (R-13)."""
    sink = tmp_path / "sink"
    sink.touch()
    async with TestCluster(nodes=2, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        config = {"sink": str(sink), "slow": 0.02}
        await cluster.agents.start("quarrelsome:Payer", id="payer", critical=True, config=config)
        total = 60
        for number in range(total):
            await cluster.send("payer", "pay", id=f"p{number}")
            if number in (10, 25, 40):
                home = nodes.nodes[(await cluster.agents.get("payer")).node or ""]
                home.workers()[0].send_signal(signal.SIGKILL)
                await asyncio.sleep(0.2)

        async def all_paid() -> bool:
            stored = await cluster.agents.state("payer")
            return stored is not None and stored["state"]["paid"] == total

        await eventually(all_paid, timeout=30, message="every payment took effect")
        keys: defaultdict[str, set[str]] = defaultdict(set)
        lines = sink.read_text().split("\n")[:-1]
        for line in lines:
            id, key = line.split()
            keys[id].add(key)
        assert len(lines) > total, "void: nothing was tried twice"
        assert set(keys) == {f"p{number}" for number in range(total)}
        assert all(len(found) == 1 for found in keys.values())
        assert len({min(found) for found in keys.values()}) == total, "two payments share a key"
        assert not await cluster.dead.list()
