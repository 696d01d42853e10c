"""What this machine lets a node have: ``cpu`` in cores, ``memory_mb`` in MiB; the defaults of its capacity.

IO: reads /proc and /sys. A share of a machine counts as what it is: cpu by the
affinity of this process and the quota of its control groups, memory by their
limits. These are numbers to count with, not limits that anybody enforces; of
several nodes on one machine each finds the whole of it, unless told otherwise
by ``--capacity``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

CPU = "cpu"
MEMORY_MB = "memory_mb"
_MIB = 1024 * 1024
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Version 1 says so with a number nearly as large as it has."""


def detected(root: Path = _ROOT, self_file: Path = Path("/proc/self/cgroup")) -> dict[str, float]:
    """The machine's part that is ours; each resource is missing where nothing can be read."""
    found = {CPU: _affinity(), MEMORY_MB: psutil.virtual_memory().total / _MIB}
    for folder in _groups(root, self_file, "cpu"):
        quota = _cpu_quota(folder)
        if quota is not None:
            found[CPU] = min(found[CPU], quota)
    for folder in _groups(root, self_file, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _number(folder / name)
            if limit is not None and 0 < limit < _UNLIMITED:
                found[MEMORY_MB] = min(found[MEMORY_MB], limit / _MIB)
    found[CPU] = round(found[CPU], 2)
    found[MEMORY_MB] = float(math.floor(found[MEMORY_MB]))
    return found


def _affinity() -> float:
    try:
        return float(len(os.sched_getaffinity(0)))
    except (AttributeError, OSError):  # no such call on this platform
        return float(os.cpu_count() or 1)


def _groups(root: Path, self_file: Path, controller: str) -> Iterator[Path]:
    """The folders of our control group and those around it, of version 2 and 1."""
    try:
        lines = self_file.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controllers
            if not base.is_dir():
                base = root / controller
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        # In a container the path is the host's, and the root is the group itself.
        for part in (inner, *inner.parents):
            yield base / part


def _cpu_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()[:2]
        if quota != "max" and float(period) > 0:
            return float(quota) / float(period)
    except (OSError, ValueError):
        pass
    quota_us, period_us = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota_us is not None and period_us and quota_us > 0:
        return quota_us / period_us
    return None


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
