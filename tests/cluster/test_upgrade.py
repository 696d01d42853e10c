"""Nodes are replaced by those of a later release, one after the other, under load.

The later release is this one with fields in every message and record that nobody else
knows (`later_release/`), and agents whose states have another shape (`releases.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation_nats.bus.kv import Bucket
from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

LATER = str(Path(__file__).parent / "later_release")
SECOND = {"FOUNDATION_TEST_RELEASE": "2"}


async def deploy(nodes: TestCluster) -> list[str]:
    """Ledgers and mirrors of whatever release their node has; the ledgers' names."""
    text = f"""
version: 1
agents:
  - name: ledger
    run: releases:Ledger
    replicas: {workload.LEDGERS}
    critical: true
    config: {{mirror: "mirror-{{}}"}}
  - name: mirror-ledger
    run: releases:Mirror
    replicas: {workload.LEDGERS}
    critical: true
"""
    await nodes.client.deployments.apply(text)
    await nodes.client.deployments.wait_settled(["ledger", "mirror-ledger"], timeout=60)
    return [f"ledger-{number}" for number in range(workload.LEDGERS)]


async def leave(nodes: TestCluster, name: str) -> None:
    """It drains, and ends in good order."""
    nodes.nodes[name].terminate()
    assert await nodes.nodes[name].wait() == 0


async def upgrade(nodes: TestCluster, name: str) -> None:
    """Its place is taken by a node of the later release."""
    await leave(nodes, name)
    nodes.start_node(name, environment=SECOND)
    await nodes.wait_up([name])


async def versions(nodes: TestCluster, ledgers: list[str]) -> dict[str, int]:
    """Of the stored states."""
    found = {name: await nodes.client.agents.state(name) for name in ledgers}
    return {name: record["schema_version"] for name, record in found.items() if record is not None}


async def is_of_later_release(nodes: TestCluster, node: str) -> bool:
    """Whether its record has what this release does not know."""
    client = nodes.client
    entry = await Bucket(client.bus, client.subjects, "nodes").read(node)
    return entry is not None and b'"later"' in (entry.value or b"")


@pytest.mark.usefixtures("chaos")
async def test_a_rolling_upgrade_under_load_loses_and_repeats_nothing() -> None:
    """Nor does it if the first new node dies half-way: old code refuses newer states and leaves them alone."""
    async with TestCluster(nodes=3, path=[str(AGENTS), LATER]) as nodes:
        ledgers = await deploy(nodes)
        epochs = workload.EpochWatch()
        await epochs.open(nodes.client)
        load = workload.Load(nodes.client)
        load.start()
        await eventually(lambda: load.receipts > 50, message="load flows")
        await upgrade(nodes, "n1")
        assert await is_of_later_release(nodes, "n1")
        assert not await is_of_later_release(nodes, "n3")
        # What n2 gives up goes to both releases: they live side by side, and take each other's signals.
        await leave(nodes, "n2")

        async def newer() -> list[str]:
            return [name for name, seen in (await versions(nodes, ledgers)).items() if seen == 2]

        moved = await eventually(newer, message="some states are of the later release")
        assert len(moved) < len(ledgers), "void: none is of the earlier one"
        stored = {name: await nodes.client.agents.state(name) for name in moved}
        nodes.nodes["n1"].kill_all()

        async def refused() -> bool:
            infos = [await nodes.client.agents.get(name) for name in moved]
            return all(
                info.status == "failed" and "nothing was overwritten" in (info.reason or "")
                for info in infos
            )

        await eventually(refused, timeout=30, message="n3 refuses what it can not read")
        for name, record in stored.items():
            assert record is not None
            after = await nodes.client.agents.state(name)
            assert after is not None
            assert after["schema_version"] == 2, "it was overwritten"
            before = record["state"]["applied"]
            assert after["state"]["applied"][: len(before)] == before
        nodes.start_node("n1", environment=SECOND)
        nodes.start_node("n2", environment=SECOND)
        await nodes.wait_up(["n1", "n2"])
        await upgrade(nodes, "n3")
        await workload.everyone_runs_once(nodes, timeout=60)
        history = await load.stop()
        await workload.verdict(nodes, history, minimum=200)
        assert set((await versions(nodes, ledgers)).values()) == {2}
        for name in nodes.nodes:
            assert await is_of_later_release(nodes, name)
        epochs.check()
