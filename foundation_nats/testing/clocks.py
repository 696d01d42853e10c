"""`WallClock`: the wall clock of processes that a test starts, to be moved while they run.

IO: files in a directory that the test gives. The processes read them by a shim
(`clock_shim/sitecustomize.py`), at most 50 ms later. Monotonic clocks don't move: those
of a machine never step.

Not moved: what asks the operating system past Python (`datetime.now`, libraries in C).
Everything of this project asks `foundation_nats.base.clock`, so it moves.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SHIM = str(Path(__file__).parent / "clock_shim")
"""A directory that goes to the *path* of a `TestCluster` whose clocks are to move."""


class WallClock:
    """The clock of the processes that are started with its `environment`.

    Example:
        >>> clock = WallClock(tmp_path / "clock")
        >>> async with TestCluster(nodes=1, path=[SHIM]) as nodes:
        ...     nodes.start_node("far", environment=clock.environment)
        ...     clock.move(3600)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._alone: set[int] = set()

    @property
    def environment(self) -> dict[str, str]:
        """What the processes need in their environment; their children inherit it."""
        return {"FOUNDATION_TEST_CLOCK": str(self._path)}

    def move(self, seconds: float, *, pid: int | None = None) -> None:
        """Show so many seconds more than the truth: all processes, or *pid* alone.

        Once moved alone, a process ignores what the others show, until `set_right`.
        """
        path = self._path
        if pid is not None:
            self._alone.add(pid)
            path = self._of(pid)
        # In one step: nobody reads half of it.
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(f"{seconds}")
        os.replace(fresh, path)

    def set_right(self) -> None:
        """Show the truth again, in all processes."""
        self.move(0.0)
        for pid in self._alone:
            with contextlib.suppress(FileNotFoundError):
                self._of(pid).unlink()
        self._alone.clear()

    def _of(self, pid: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{pid}")


__all__ = ["SHIM", "WallClock"]
