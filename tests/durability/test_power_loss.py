"""A fault costs what the mode of durability says, and leaves nothing that contradicts itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foundation_nats.testing.disks import MortalDisk, SlowDisk, SmallDisk, can_mount, can_throttle
from tests.durability.losses import MODES, Fault, Loss, Mode, Outcome, faults_of, measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(90),
    pytest.mark.skipif(can_mount() is not None, reason=can_mount() or ""),
]

_SLACK_S = 1.0
"""A sync takes its time, the more so on a machine that others use too."""


def within_the_promise(mode: Mode, loss: Loss) -> None:
    """Raise AssertionError if more is gone than the mode allows."""
    assert loss.acknowledged > 20, f"void: {loss}"
    assert loss.holes == 0, loss
    if loss.fault in (Fault.KILL, Fault.ONE):
        assert loss.outcome is Outcome.USABLE, loss
        assert loss.lost == 0, loss
        return
    match mode.sync_interval:
        case "always":
            assert loss.outcome is Outcome.USABLE, loss
            assert loss.lost == 0, loss
        case "100ms":
            assert loss.outcome is Outcome.USABLE, loss
            assert loss.lost_s <= 0.1 + _SLACK_S, loss


async def test_a_power_cut_loses_nothing_that_was_acknowledged_under_sync_always() -> None:
    """One server, `always`: every acknowledged message is there."""
    mode = Mode(1, "always")
    loss = await measure(mode, load_s=1.0)
    if loss.acknowledged <= 20:  # a disk that others use, too
        loss = await measure(mode, load_s=8.0)
    within_the_promise(mode, loss)


async def test_a_power_cut_loses_little_of_what_the_embedded_default_acknowledged() -> None:
    """One server, 100 ms, the load cut after 1.5 s: most of it is there, the end is missing."""
    mode = Mode(1, "100ms")
    within_the_promise(mode, await measure(mode, load_s=1.5))


async def test_a_killed_server_loses_nothing_that_was_acknowledged() -> None:
    """One server under the weakest mode: the kernel has what the process had written."""
    mode = Mode(1, "2m")
    within_the_promise(mode, await measure(mode, Fault.KILL, load_s=1.0))


@pytest.mark.parametrize(
    ("mode", "fault"),
    [(mode, fault) for mode in MODES for fault in faults_of(mode)],
    ids=lambda value: value.name if isinstance(value, Mode) else str(value),
)
async def test_every_mode_keeps_its_promise(
    mode: Mode, fault: Fault, request: pytest.FixtureRequest
) -> None:
    """All modes and faults. 2m promises nothing when all the power goes."""
    if not request.config.getoption("--chaos"):
        pytest.skip("needs --chaos")
    loss = await measure(mode, fault)
    print(loss)
    within_the_promise(mode, loss)


# ---- the instrument ----------------------------------------------------------------


def _append(path: Path, text: str, *, sync: bool) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def test_what_was_synced_survives_a_power_cut_and_nothing_else() -> None:
    """fsync decides, twice in a row; the file still open at the cut does not matter."""
    with MortalDisk(32) as disk:
        _append(disk.path / "synced", "a" * 10_000, sync=True)
        _append(disk.path / "synced", "b" * 10_000, sync=False)
        _append(disk.path / "written", "c" * 10_000, sync=False)
        with (disk.path / "synced").open() as held:
            assert disk.power_loss() == disk.path
            assert (disk.path / "synced").read_text() == "a" * 10_000
            assert not (disk.path / "written").exists()
            _append(disk.path / "synced", "d" * 10, sync=True)
            _append(disk.path / "synced", "e" * 10, sync=False)
            disk.power_loss()
            assert (disk.path / "synced").read_text() == "a" * 10_000 + "d" * 10
            assert not held.closed


def test_after_the_cut_nothing_is_written_any_more() -> None:
    """The order of cut, kill and copy does not matter, because writes fail from the cut on."""
    with MortalDisk(32) as disk:
        with (disk.path / "file").open("w") as file:
            file.write("a")
            file.flush()
            os.fsync(file.fileno())
            disk.cut()
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(file.fileno())
        disk.power_loss()
        assert (disk.path / "file").read_text() == "a"


def test_what_has_settled_survives() -> None:
    """settle stands for the time in which the kernel writes back by itself."""
    with MortalDisk(32) as disk:
        _append(disk.path / "file", "a", sync=False)
        disk.settle()
        disk.power_loss()
        assert (disk.path / "file").read_text() == "a"


def test_disks_leave_nothing_behind_even_after_an_error() -> None:
    """Neither a mount nor a directory, also with a file still open on it."""
    for kind in (SmallDisk, MortalDisk, SlowDisk):
        with pytest.raises(ZeroDivisionError), kind(16) as disk:
            path = disk.path
            held = (path / "held").open("w")
            raise ZeroDivisionError
        held.close()
        assert not path.parent.exists()
        assert str(path) not in Path("/proc/self/mounts").read_text()


def test_what_a_killed_process_left_mounted_is_removed_by_the_next_disk() -> None:
    """A process that ends without a word leaves its mount; the next disk finds it by its owner."""
    script = (
        "import os\n"
        "from foundation_nats.testing.disks import MortalDisk\n"
        "disk = MortalDisk(16).__enter__()\n"
        "print(disk.path, flush=True)\n"
        "os._exit(9)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=30
    )
    path = ended.stdout.strip()
    assert path, ended.stderr
    assert path in Path("/proc/self/mounts").read_text()
    with SmallDisk(1):
        assert path not in Path("/proc/self/mounts").read_text()
        assert not Path(path).parent.exists()


def test_a_full_disk_takes_nothing_until_it_is_freed() -> None:
    """fill and free."""
    for kind in (SmallDisk, MortalDisk):
        with kind(16) as disk:
            disk.fill(leave_kb=200)
            assert 0 < disk.free_bytes <= 256 * 1024
            disk.fill()
            with pytest.raises(OSError, match="No space"):
                (disk.path / "more").write_bytes(bytes(100_000))
            disk.free()
            assert disk.free_bytes > 8 * 1024 * 1024


def test_a_slow_disk_syncs_slowly() -> None:
    """Twenty writes a second: a sync takes its time, until the limit is lifted."""
    reason = can_throttle()
    if reason is not None:
        pytest.skip(reason)
    with SlowDisk(32) as disk:

        def synced() -> float:
            start = time.monotonic()
            for _ in range(3):
                _append(disk.path / "file", "a", sync=True)
            return time.monotonic() - start

        disk.slow(20)
        assert synced() > 0.1
        disk.slow(0)
        assert synced() < 5
