"""Emitted signals: exactly once even when the sender recovers late, and never a deadlock."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(90)]

PINNED = """
version: 1
agents:
  - name: ledger
    run: fleet:Ledger
    on_node_loss: unavailable
    placement: {labels: {pin: "yes"}}
    config: {mirror: "mirror-{}"}
  - {name: mirror-ledger, run: "fleet:Mirror", placement: {strategy: leader_only}}
"""


async def test_an_outbox_recovered_after_the_duplicate_window_repeats_nothing() -> None:
    """The sender's node dies amid publishing and returns when the stream has forgotten its ids."""
    settings = {
        "mailbox": {
            "duplicate_window_s": 2,
            "full_patience_s": 0.9,
            "trim_every_s": 0.2,
            "trim_min_age_s": 30,
        }
    }
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        nodes.start_node("pin", "--label", "pin=yes")
        await nodes.wait_up(["n1", "pin"])
        await cluster.deployments.apply(PINNED)
        await cluster.deployments.wait_settled(["ledger", "mirror-ledger"], timeout=15)
        for number in range(60):
            await cluster.send("ledger", "ledger.append", {"key": f"k{number}"})
        nodes.nodes["pin"].kill_all()
        from foundation_nats.base.clock import monotonic

        died_at = monotonic()
        stored = await cluster.agents.state("ledger")
        assert stored is not None
        print(f"outbox at death: {len(stored['outbox'])}")
        await eventually(lambda: monotonic() - died_at > 3, message="the window passes")
        nodes.start_node("pin", "--label", "pin=yes")

        async def complete() -> bool:
            for agent in ("ledger", "mirror-ledger"):
                found = await cluster.agents.state(agent)
                if found is None or len(set(found["state"]["applied"])) < 60:
                    return False
                if found["outbox"]:
                    return False
            return True

        await eventually(complete, timeout=40, message="everything arrives")
        for agent in ("ledger", "mirror-ledger"):
            found = await cluster.agents.state(agent)
            assert found is not None
            twice = {k: n for k, n in Counter(found["state"]["applied"]).items() if n > 1}
            assert not twice, (agent, twice)


async def test_agents_that_fill_each_others_mailboxes_go_on() -> None:
    """An agent that emits more to itself than fits: what does not fit becomes dead letters."""
    settings = {
        "mailbox": {
            "mailbox_max": 40,
            "outbox_max": 20,
            "full_patience_s": 0.5,
            "trim_every_s": 0.1,
            "trim_min_age_s": 0.2,
        }
    }
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Breeder", id="b", config={"litter": 3, "most": 200})
        await cluster.send("b", "breed")

        async def progress() -> bool:
            stored = await cluster.agents.state("b")
            return stored is not None and stored["state"]["bred"] >= 60

        await eventually(progress, timeout=40, message="it handles on")
        dead = await cluster.dead.list("b")
        assert dead
        assert {entry.letter.code for entry in dead} == {"mailbox_full"}


async def test_a_receiver_that_stays_full_costs_the_others_no_repeat() -> None:
    """A signal for many: the full one gets a dead letter, the others exactly one copy."""
    settings = {"mailbox": {"duplicate_window_s": 8, "full_patience_s": 2, "mailbox_max": 10}}
    async with TestCluster(nodes=1, path=[str(AGENTS)], settings=settings) as nodes:
        cluster = nodes.client
        await cluster.agents.start("fleet:Counter", id="well", capabilities=["counting"])
        await cluster.agents.start(
            "fleet:Counter", id="full", capabilities=["counting"], resources={"gpu": 1}, wait=False
        )

        async def known() -> bool:
            return (await cluster.agents.get("full")).status == "pending"

        await eventually(known)
        for _ in range(10):
            await cluster.send("full", "counter.add", {"amount": 1})
        await cluster.send("capability:counting", "counter.add", {"amount": 1})
        (dead,) = await eventually(cluster.dead.list, timeout=20, message="the dead letter")
        assert dead.letter.agent == "full"
        assert dead.letter.code == "mailbox_full"
        assert await cluster.ask("well", "counter.get") == 1


async def test_a_burst_of_emitted_signals_arrives() -> None:
    """Agents that emit faster than their receivers take it keep going.

    Once every commit compared all that was emitted with all that waited: forty signals a
    second were left of thousands.
    """
    count, each = 4, 1500
    async with TestCluster(nodes=1) as nodes:
        cluster = nodes.client
        run = "foundation_nats.chaos.agents:Tally"
        for number in range(count):
            await cluster.agents.start(run, id=f"mirror-t{number}")
            await cluster.agents.start(run, id=f"t{number}", config={"mirror": "mirror-{}"})

        async def flood(number: int) -> None:
            for step in range(1, each + 1):
                data = {"sender": "s", "number": step}
                await cluster.send(f"t{number}", "tally.count", data)

        await asyncio.gather(*(flood(number) for number in range(count)))

        async def counted() -> bool:
            for number in range(count):
                stored = await cluster.agents.state(f"mirror-t{number}")
                assert stored is not None
                state = stored["state"] or {}
                assert state.get("repeated", 0) == state.get("skipped", 0) == 0
                if state.get("applied") != each:
                    return False
            return True

        await eventually(counted, timeout=25, message="every mirror counts all")
