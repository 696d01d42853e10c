"""`FileWatch`: a signal for each file that is added, modified or deleted, by the `watchfiles` library.

It sees the files of the node where the agent runs; to watch certain ones, place the agent there.
"""

from __future__ import annotations

import asyncio
import fnmatch
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation_nats.agent.sensors.sensor import Emit, Event, Sensor, needs
from foundation_nats.base.clock import monotonic
from foundation_nats.errors import ConfigError, SensorError

if TYPE_CHECKING:
    from watchfiles import Change

_REMEMBERED_MAX = 400
Seen = dict[str, list[int]]
"""Path to (time of modification in ns, size)."""


class FileWatch(Sensor):
    """``FileWatch("inbox", match="*.csv", emit="file")``: data is ``{"path": …, "change": "added"}``.

    Changes that come together are several signals; several changes of one file may be one. Needs the
    extra ``watch``.

    Args:
        path: a directory or a file that exists; ``{agent}`` in it is the agent's name.
        match: of the file's name.
        recursive: also what is below.
        remember: keep in the agent's record which files were told of, so that what changes while the
            agent does not run is told of when it runs again, and a file that was there before is
            ``added``. For at most 400 files; those deleted are forgotten.
        settle_s: tell of a file only when it has not changed for so long: for files that are written slowly.
        poll_s: look this often instead of being told by the system, for network file systems.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        match: str = "*",
        recursive: bool = True,
        remember: bool = False,
        settle_s: float = 0.0,
        poll_s: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path = str(path)
        self.match = match
        self.recursive = recursive
        self.remember = remember
        if settle_s < 0 or (poll_s is not None and poll_s <= 0):
            raise ConfigError(f"FileWatch {self.name}: settle_s and poll_s must be positive")
        self.settle_s = settle_s
        self.poll_s = poll_s

    def check(self) -> None:
        try:
            import watchfiles  # noqa: F401
        except ImportError:
            raise needs("watchfiles", "watch", "FileWatch") from None

    async def run(self, emit: Emit) -> None:
        from watchfiles import awatch

        root = Path(self.path.replace("{agent}", self.here.id))
        if not root.exists():
            raise SensorError(f"There is no {root} on {self.here.node} to watch.")
        seen: Seen = dict(self.here.position or {}) if self.remember else {}
        ending = asyncio.Event()
        try:
            # Watch first, then look: what changes in between is seen twice rather than never.
            changes = awatch(
                root,
                watch_filter=self._wants,
                recursive=self.recursive,
                stop_event=ending,
                step=50,
                debounce=400,
                yield_on_timeout=True,
                rust_timeout=500,
                force_polling=None if self.poll_s is None else True,
                poll_delay_ms=300 if self.poll_s is None else max(1, int(self.poll_s * 1000)),
            )
            first = True
            waiting: dict[str, tuple[str, float]] = {}
            async for batch in changes:
                told = [(path, change.raw_str()) for change, path in batch]
                if first and self.remember:
                    told += await self._missed(root, seen)
                first = False
                now = monotonic()
                for path, change in told:
                    known = waiting.get(path, (change, now))[0]
                    waiting[path] = (known if change == "modified" else change, now)
                for path in sorted(waiting):
                    change, changed_at = waiting[path]
                    if now - changed_at >= self.settle_s:
                        del waiting[path]
                        await self._tell(emit, change, path, seen)
        finally:
            ending.set()
        raise SensorError(f"{root} can't be watched any more.")

    def _wants(self, _change: Change, path: str) -> bool:
        return fnmatch.fnmatch(os.path.basename(path), self.match) and not Path(path).is_dir()

    async def _missed(self, root: Path, seen: Seen) -> list[tuple[str, str]]:
        """What has changed since the position."""
        there = await asyncio.to_thread(self._listing, root)
        gone = [(path, "deleted") for path in seen if path not in there]
        added = [(path, "added") for path in there if path not in seen]
        changed = [
            (path, "modified") for path in there if seen.get(path, there[path]) != there[path]
        ]
        return gone + added + changed

    def _listing(self, root: Path) -> Seen:
        files = [root] if root.is_file() else root.rglob("*") if self.recursive else root.iterdir()
        found: Seen = {}
        for file in files:
            mark = _mark(str(file))
            if mark and file.is_file() and fnmatch.fnmatch(file.name, self.match):
                found[str(file)] = mark
                if len(found) > _REMEMBERED_MAX:
                    raise SensorError(
                        f"{root} has more than {_REMEMBERED_MAX} files: too many to remember."
                    )
        return found

    async def _tell(self, emit: Emit, change: str, path: str, seen: Seen) -> None:
        mark = _mark(path)
        if mark is None:
            change = "deleted"
        event = Event({"path": path, "change": change, "size": mark[1] if mark else None})
        if not self.remember:
            await emit(event.data)
            return
        known = seen.get(path)
        if mark == known:
            return
        if mark is None:
            del seen[path]
        else:
            event.data["change"] = "added" if known is None else "modified"
            seen[path] = mark
            if len(seen) > _REMEMBERED_MAX:
                raise SensorError(f"More than {_REMEMBERED_MAX} files are too many to remember.")
        # The same file at the same time is the same event, whoever sees it.
        event_id = f"{path}\n{mark}" if mark else None
        await emit(event.data, id=event_id, position=seen)


def _mark(path: str) -> list[int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_size]


__all__ = ["FileWatch"]
