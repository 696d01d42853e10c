"""The fleet of a thousand device twins counts exactly, although a worker is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.fleet.agents import Fleet, Hot, Telemetry, Told, Twin
from foundation_nats.testing import AgentHarness

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_fleet_is_equal_to_the_digit_although_a_worker_was_killed() -> None:
    """The demo, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.fleet.demo"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 twins run on 2 nodes" in done.stdout
    assert "killed with SIGKILL" in done.stdout
    assert "equal to the digit" in done.stdout


async def test_a_twin_tells_of_every_second_reading_and_of_heat_at_once() -> None:
    """Without a server; a crash between two readings changes nothing."""
    async with AgentHarness(Twin, id="device-0") as twin:
        await twin.send(Telemetry(number=1, celsius=70, watt_hours=3))
        assert twin.emitted == []
        await twin.crash()
        await twin.send(Telemetry(number=2, celsius=90, watt_hours=4))
        await twin.send(Telemetry(number=3, celsius=91, watt_hours=5))
        hot, told = twin.take()
        assert (hot.type, hot.data) == (Hot.signal_type, {"celsius": 90.0})
        assert (told.type, told.data) == (
            Told.signal_type,
            {"readings": 2, "watt_hours": 7, "hottest": 90.0},
        )
        assert twin.state.out_of_order == 0


async def test_the_fleet_looks_at_itself_twice_a_second() -> None:
    """By its sensor, which the test's clock drives."""
    async with AgentHarness(Fleet, id="fleet") as fleet:
        await fleet.send(Told(readings=2, watt_hours=7, hottest=90))
        await fleet.advance(1)
        await fleet.send(Told(readings=2, watt_hours=1, hottest=20))
        await fleet.advance(0.5)
        assert fleet.state.curve == [2, 2, 4]
        assert (fleet.state.watt_hours, fleet.state.hottest) == (8, 90.0)
