"""Handlers that block or hang: named while it lasts, ended, recovered, and given up in the end."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(60)]


async def test_a_handler_that_blocks_the_loop_is_named() -> None:
    """Agent, signal, and the line, once per incident: in an event, in `why` and in the log."""
    settings = {"worker": {"block_warn_s": 0.2}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("workshop:Workshop", id="smith")
        await cluster.ask("smith", "block", 0.7, timeout=5)
        await cluster.ask("smith", "block.plain", 0.7, timeout=5)

        async def told() -> list[dict[str, object]] | None:
            found = await cluster.events.list(topic="agent", limit=1000)
            blocked = [event for event in found if event.what == "blocked_loop"]
            return [event.data for event in blocked] if len(blocked) >= 2 else None

        first, second = await eventually(told, message="two events") or ({}, {})
        assert (first["agent"], first["type"]) == ("smith", "block")
        assert second["type"] == "block.plain"
        assert 0.5 < float(str(first["seconds"])) < 5
        assert "workshop.py" in str(first["where"])
        assert "in Workshop.block" in str(first["where"])
        assert "time.sleep(signal.data)" in str(first["stack"])
        assert "foundation_nats" not in str(first["stack"])
        story = await cluster.why("smith")
        assert any("smith (handling block) kept all of" in s.text for s in story.sentences)
        assert story.status == "running"
        assert "by=smith (handling block) " in nodes.nodes["n1"].log.read_text()


@pytest.mark.parametrize(
    ("type_", "data"),
    [
        pytest.param("compute", 30_000_000, id="holds the lock"),
        pytest.param("block", 1000, id="sleeps"),
        pytest.param("compute.thread", 30_000_000, id="holds it in a thread"),
    ],
)
async def test_a_worker_that_hangs_is_killed_and_the_signal_given_up(
    request: pytest.FixtureRequest, type_: str, data: int
) -> None:
    """Also in native code that lets no thread run: the agent goes on, the others with it."""
    if type_ != "compute" and not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    settings = {
        "worker": {"hang_after_s": 1.0, "block_warn_s": 0.3},
        "mailbox": {"attempts_max": 2},
    }
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("workshop:Workshop", id="smith")
        await cluster.agents.start("fleet:Counter", id="neighbour")
        assert await cluster.ask("smith", "note", "before") == ["before"]
        began = time.monotonic()
        await cluster.send("smith", type_, data, id="poison")
        await cluster.send("smith", "note", "after")

        async def given_up() -> bool:
            return len(await cluster.dead.list("smith")) == 1

        await eventually(given_up, timeout=30, message="a dead letter")
        assert time.monotonic() - began < 25
        (dead,) = await cluster.dead.list("smith")
        assert dead.letter.signal is not None
        assert dead.letter.signal["id"] == "poison"
        assert dead.letter.attempts == 2
        assert "ended the worker process 2 times (killed, because it had not answered" in (
            dead.letter.reason
        )
        in_thread = type_ == "compute.thread"
        assert in_thread or "workshop.py:" in dead.letter.reason

        async def goes_on() -> bool:
            return bool(await cluster.ask("smith", "note", "now") == ["before", "after", "now"])

        await eventually(goes_on, message="the next signal is handled")
        assert await cluster.ask("neighbour", "counter.add", {"amount": 1}) == 1
        info = await cluster.agents.get("smith")
        assert info.recovered_from is not None
        assert info.recovered_from.reason == "worker_died"
        died = [e for e in await cluster.events.list(topic="worker") if e.what == "died"]
        assert len(died) == 2
        assert all(event.data["suspect"] == "smith" for event in died)
        assert in_thread or all("workshop.py" in str(event.data["stack"]) for event in died)
        # Whose fault it is, is known: the node's own restarts are not used up by it.
        assert nodes.nodes["n1"].is_running


async def test_a_blocking_call_in_a_thread_or_process_keeps_nobody_waiting() -> None:
    """On real workers; the processes end with their worker."""
    async with TestCluster(nodes=1, path=[str(AGENTS)]) as nodes:
        cluster = nodes.client
        await cluster.agents.start("workshop:Workshop", id="smith")
        await cluster.agents.start("fleet:Counter", id="neighbour")
        assert await cluster.ask("smith", "square", 7, timeout=10) == 49
        (worker,) = psutil.Process(nodes.nodes["n1"].process.pid).children()
        (child,) = worker.children()
        late = asyncio.create_task(cluster.ask("smith", "late", 1.0, timeout=10))
        began = time.monotonic()
        assert await cluster.ask("neighbour", "counter.add", {"amount": 1}) == 1
        assert time.monotonic() - began < 1
        assert await late == "late"
        assert await cluster.ask("smith", "square", 8, timeout=10) == 64
        assert child not in worker.children()
        (child,) = worker.children()
        worker.kill()
        await eventually(lambda: not child.is_running(), message="the process ends with its worker")

        async def again() -> bool:
            return bool(await cluster.ask("smith", "square", 9, timeout=10) == 81)

        await eventually(again, timeout=15, message="the recovered agent computes")
