"""What a failpoint may be told to do: at which passing, and to whom."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from foundation_nats.base.failpoint import FailpointError, parse
from foundation_nats.node import blackbox
from foundation_nats.testing import eventually

POINT = "commit.before_cas"


def failures(action: str, passings: int) -> list[int]:
    """At which passings it raised."""
    act = parse(f"{POINT}={action}")[POINT]
    found = []
    for number in range(1, passings + 1):
        try:
            act()
        except FailpointError:
            found.append(number)
    return found


def test_an_action_comes_from_a_passing_on_or_at_it_alone() -> None:
    """after, once, and neither."""
    assert failures("raise", 3) == [1, 2, 3]
    assert failures("after(3,raise)", 5) == [3, 4, 5]
    assert failures("once(3,raise)", 5) == [3]
    assert 10 < len(failures("1in4(raise)", 200)) < 100


@pytest.mark.parametrize(
    ("text", "says"), [("commit.befor=kill", "commit.befor"), (f"{POINT}=die", "die")]
)
def test_a_typo_is_an_error(text: str, says: str) -> None:
    """And not a test that can't fail."""
    with pytest.raises(ValueError, match=says):
        parse(text)


CHILD = f"""
from foundation_nats.base.failpoint import failpoint
failpoint("{POINT}")
"""
PARENT = """
import os, subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


@pytest.mark.parametrize("is_worker", [True, False])
async def test_a_worker_freezes_its_manager_with_itself_and_others_nobody(is_worker: bool) -> None:
    """The parent of a manager is whoever started it: a shell, a test."""
    environment = {**os.environ, "FOUNDATION_FAILPOINTS": f"{POINT}=freeze(0.5)"}
    if is_worker:
        environment[blackbox.VARIABLE] = "0"
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=environment) as parent:
        seen = set()

        def ended() -> bool:
            if parent.poll() is None:
                seen.add(psutil.Process(parent.pid).status())
            return parent.poll() is not None

        await eventually(ended, timeout=20, every=0.01, message="it goes on and ends")
        assert parent.returncode == 0
        assert (psutil.STATUS_STOPPED in seen) == is_worker
