"""The wall clock of a process that a test moves: all of it, or none of it would be tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import foundation_nats
from foundation_nats.testing.clocks import SHIM, WallClock

PACKAGE = Path(foundation_nats.__file__).parent

CLOCKS = """
import sys, time
from foundation_nats.base.clock import monotonic, utc_now, utc_text, wall_ms
from foundation_nats.agent.emissions import expired
from foundation_nats.signaling.schedules import time_text
for line in sys.stdin:
    time.sleep(0.06)
    late = expired("a", {"deadline": line.strip()}) is not None
    print(time.time(), time.time_ns() / 1e9, utc_now().timestamp(), wall_ms() / 1000, utc_text(),
          monotonic(), late, flush=True)
"""


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    """A clock that shows the truth until it is moved."""
    return WallClock(tmp_path / "clock")


class Watched:
    """A process that tells what its clocks show."""

    def __init__(self, clock: WallClock) -> None:
        path = os.pathsep.join((SHIM, str(PACKAGE.parent)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLOCKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **clock.environment, "PYTHONPATH": path},
            text=True,
        )

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=10)

    def look(self, deadline: float) -> tuple[list[float], float, bool]:
        """How far each wall clock is ahead of ours, the monotonic one, and whether it is too late."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        moment = datetime.fromtimestamp(deadline).astimezone().isoformat()
        self.process.stdin.write(moment + "\n")
        self.process.stdin.flush()
        *numbers, text, steady, late = self.process.stdout.readline().split()
        shown = [float(number) for number in numbers] + [datetime.fromisoformat(text).timestamp()]
        now = datetime.now().timestamp()
        return [one - now for one in shown], float(steady), late == "True"


def test_every_wall_clock_of_a_process_moves_and_the_monotonic_one_does_not(
    clock: WallClock,
) -> None:
    """time.time and time_ns, and what the library asks: deadlines, texts, incarnations."""
    with Watched(clock) as watched:
        soon = datetime.now().timestamp() + 60
        offsets, before, late = watched.look(soon)
        assert all(abs(offset) < 5 for offset in offsets)
        assert not late
        for moved in (3600.0, -3600.0):
            clock.move(moved)
            offsets, steady, late = watched.look(soon)
            assert all(abs(offset - moved) < 5 for offset in offsets), offsets
            assert late == (moved > 0)
            assert before <= steady < before + 30
        clock.set_right()
        offsets, _, late = watched.look(soon)
        assert all(abs(offset) < 5 for offset in offsets)
        assert not late


def test_one_process_alone_may_have_another_time(clock: WallClock) -> None:
    """As where a machine's programs see it stepped at different moments."""
    with Watched(clock) as first, Watched(clock) as second:
        clock.move(600)
        clock.move(-600, pid=second.process.pid)
        assert all(abs(offset - 600) < 5 for offset in first.look(0)[0])
        assert all(abs(offset + 600) < 5 for offset in second.look(0)[0])
        clock.set_right()
        assert all(abs(offset) < 5 for offset in first.look(0)[0])
        assert all(abs(offset) < 5 for offset in second.look(0)[0])


def test_nothing_reads_the_wall_clock_past_the_one_that_moves() -> None:
    """`datetime.now` goes to the system at once, and no shim would move it."""
    found = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"datetime\.(now|utcnow|today)\(|\bdate\.today\(", line)
    ]
    assert found == []
