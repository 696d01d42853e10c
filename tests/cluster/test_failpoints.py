"""Crash at named points: whatever the instant, every receipted signal takes effect exactly once."""

from __future__ import annotations

import pytest

from foundation_nats.testing import TestCluster, eventually
from tests.cluster import load as workload
from tests.conftest import AGENTS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

# Point to how often it is passed before the crash. The first ones belong to the
# default suite; --chaos runs them all.
ALWAYS = {
    "commit.before_cas": 40,
    "commit.after_cas_before_outbox": 40,
    "outbox.mid": 40,
    "claim.after_cas": 1,
}
CHAOS = {
    "handle.before": 60,
    "handle.after": 60,
    "outbox.after": 40,
    "claim.read": 1,
    "claim.after_subscribe": 1,
    "report_running": 3,
    "live.received": 60,
    "trim.before": 1,
    "trim.after": 1,
    "plan.computed": 1,
    "start.sent": 1,
    "lease.acquired": 1,
}


async def crash_at(point: str, passes: int) -> None:
    """Run the load over a node that crashes at *point*, again and again."""
    room = 40 if point.startswith("trim") else 2000
    settings = {"mailbox": {"trim_every_s": 0.1, "trim_min_age_s": 0.1, "mailbox_max": room}}
    async with TestCluster(nodes=0, workers=1, path=[str(AGENTS)], settings=settings) as nodes:
        # Started first, so that it leads and the leader's points are passed too.
        nodes.start_node(
            "fragile", environment={"FOUNDATION_FAILPOINTS": f"{point}=after({passes},kill)"}
        )
        if not point.startswith("lease"):
            await nodes.wait_up(["fragile"])
        nodes.start_node("n1")
        await nodes.wait_up(["n1"])
        await workload.deploy(nodes)
        epochs = workload.EpochWatch()
        await epochs.open(nodes.client)
        load = workload.Load(nodes.client)
        load.start()
        await eventually(lambda: load.receipts > 400, timeout=40, message="load flows")
        history = await load.stop()
        await workload.verdict(nodes, history, minimum=400)
        crashes = [
            event
            for event in await nodes.client.events.list()
            if (event.topic, event.what) in (("worker", "died"), ("node", "down"))
        ]
        assert crashes, f"void: nothing crashed at {point}"
        nodes.nodes["fragile"].kill_all()
        await workload.everyone_runs_once(nodes)
        await workload.verdict(nodes, history, minimum=400)
        epochs.check()


@pytest.mark.parametrize("point", sorted(ALWAYS))
async def test_a_crash_at_the_heart_loses_and_repeats_nothing(point: str) -> None:
    """The instants around the commit, the outbox and the claim."""
    await crash_at(point, ALWAYS[point])


@pytest.mark.parametrize("point", sorted(CHAOS))
async def test_a_crash_anywhere_loses_and_repeats_nothing(
    point: str, request: pytest.FixtureRequest
) -> None:
    """Every other named point."""
    if not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    await crash_at(point, CHAOS[point])
