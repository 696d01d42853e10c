"""`foundation up --reload`: watch the code of the agents, and have the nodes run it anew when it changes.

A batch of saves is one reload. What is no Python is said with its line, and what
can't be imported is found by new workers before the old ones end: in both cases the
old code goes on. Server and node managers stay; agents keep their state and unread
signals (`RecoveredFrom.reason` is ``reloaded``). A changed manifest is deployed again.

Tests (``test_*.py``, ``conftest.py``, folders called ``tests``) and what tools leave
behind are not watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.machinery
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation_cli import render

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

PATIENCE_S = 2.0
"""How long a handler may go on under the old code."""
_STEP_MS = 60
"""So long without another save ends a batch …"""
_DEBOUNCE_MS = 1000
"""… and it lasts no longer than this."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Files that changed together."""

    code: tuple[Path, ...]
    is_manifest_changed: bool


@dataclass(frozen=True, slots=True)
class Reloaded:
    """All nodes run the new code."""

    agents: int
    forced: tuple[str, ...]
    seconds: float


def check_installed() -> None:
    """Refuse before anything is started, where files can't be watched.

    Raises:
        ConfigError: the extra is not installed.
    """
    from importlib.util import find_spec

    from foundation_nats.errors import ConfigError

    if find_spec("watchfiles") is None:
        raise ConfigError(
            "--reload needs the package watchfiles.",
            hint="pip install 'foundation-nats[reload]'",
        )


def runs_of(manifest: Path | None, imports: Iterable[str]) -> list[str]:
    """The modules that the nodes import, and the classes (``module:Class``) that a manifest names.

    Raises:
        ManifestError: the manifest is wrong.
    """
    found = set(imports)
    if manifest is not None:
        from foundation_nats.control import manifest as manifests

        found |= {wish.spec.run for wish in manifests.load(manifest)}
    return sorted(found)


def directories(runs: Iterable[str], manifest: Path | None) -> list[Path]:
    """Where the code of *runs* is, as far as it can be found without running it, and the manifest."""
    path = [str(Path.cwd())]
    if manifest is not None:
        path.insert(0, str(manifest.resolve().parent))
    path += [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    found: set[Path] = set()
    for top in {run.partition(":")[0].partition(".")[0] for run in runs}:
        spec = importlib.machinery.PathFinder.find_spec(top, [*path, *sys.path])
        if spec is None:
            continue
        if spec.submodule_search_locations:
            found |= {Path(item).resolve() for item in spec.submodule_search_locations}
        elif spec.origin is not None and Path(spec.origin).exists():
            found.add(Path(spec.origin).resolve().parent)
    if manifest is not None:
        found.add(manifest.resolve().parent)
    # One watch for a folder and all below it.
    return sorted(
        one
        for one in found
        if one.is_dir() and not any(one.is_relative_to(o) for o in found - {one})
    )


def _is_code(path: Path) -> bool:
    name = path.name
    is_test = name.startswith("test_") or name == "conftest.py" or "tests" in path.parts[:-1]
    return path.suffix == ".py" and not is_test


class Watcher:
    """The changes below some folders, from the moment it is opened."""

    def __init__(self, folders: Sequence[Path], manifest: Path | None, ignore: Sequence[Path]):
        self.folders = list(folders)
        self._manifest = None if manifest is None else manifest.resolve()
        self._ignore = [path.resolve() for path in ignore]
        self._changed: set[Path] = set()
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Watcher]:
        """Watch."""
        stop = asyncio.Event()
        task = asyncio.create_task(self._watch(stop))
        try:
            await asyncio.sleep(0)  # it begins to watch before it first waits
            yield self
        finally:
            stop.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, stop: asyncio.Event) -> None:
        import watchfiles

        ours = watchfiles.DefaultFilter(ignore_paths=[str(path) for path in self._ignore])

        def wanted(change: watchfiles.Change, path: str) -> bool:
            file = Path(path)
            return (_is_code(file) or file == self._manifest) and ours(change, path)

        async for changes in watchfiles.awatch(
            *self.folders,
            watch_filter=wanted,
            step=_STEP_MS,
            debounce=_DEBOUNCE_MS,
            stop_event=stop,
            ignore_permission_denied=True,
        ):
            self._changed.update(Path(path) for _, path in changes)
            self._news.set()

    async def next(self) -> Batch:
        """What has changed since the last call, as soon as something has."""
        await self._news.wait()
        self._news.clear()
        changed, self._changed = self._changed, set()
        code = sorted(path for path in changed if path != self._manifest)
        return Batch(tuple(code), self._manifest in changed)


def broken(paths: Iterable[Path]) -> str | None:
    """The first of *paths* that is no Python, with the line that is wrong; None: all are fine."""
    for path in paths:
        try:
            source = path.read_bytes()
        except OSError:
            continue  # it was removed, or is being replaced
        try:
            compile(source, str(path), "exec", dont_inherit=True)
        except SyntaxError as error:
            line = (error.text or "").rstrip()
            lead = len(line) - len(line.lstrip())
            mark = " " * max(0, (error.offset or 1) - 1 - lead) + "^"
            shown = f"\n    {line.strip()}\n    {mark}" if line else ""
            return f"{_short(path)}:{error.lineno}: {error.msg}{shown}"
        except ValueError as error:  # null bytes
            return f"{_short(path)}: {error}"
    return None


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def names(paths: Sequence[Path]) -> str:
    """Some files, for people."""
    shown = ", ".join(_short(path) for path in paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"


async def reload(cluster: Cluster, nodes: Sequence[str], runs: Sequence[str]) -> Reloaded:
    """Have *nodes* run their agents with the code as it is now, and try again what had failed.

    Raises:
        ConfigError: it can't be imported, or a class isn't there; the old code goes on.
        FoundationError: a node did not do it.
    """
    from foundation_nats.bus import rpc
    from foundation_nats.errors import FoundationError
    from foundation_schemas import ReloadReply, ReloadRequest

    began = time.monotonic()
    request = ReloadRequest(runs=list(runs), patience_s=PATIENCE_S)
    calls = [
        rpc.call(
            cluster.bus,
            cluster.subjects.control_node(node, "reload"),
            request,
            ReloadReply,
            timeout=_TIMEOUT_S,
        )
        for node in nodes
    ]
    found = await asyncio.gather(*calls, return_exceptions=True)
    for item in found:
        if isinstance(item, BaseException):
            raise item
    replies = [item for item in found if isinstance(item, ReloadReply)]
    for info in await cluster.agents.list(status="failed"):
        with contextlib.suppress(FoundationError):
            await cluster.agents.release(info.id)
    return Reloaded(
        agents=sum(item.agents for item in replies),
        forced=tuple(agent for item in replies for agent in item.forced),
        seconds=time.monotonic() - began,
    )


def wrong(error: Exception) -> str:
    """Why new code could not be taken, for people: the user's line first."""
    details: dict[str, Any] = getattr(error, "details", {})
    trace = str(details.get("traceback") or "")
    text = str(error)
    return f"{text}\n{trace}".rstrip() if trace else text


def warn(text: str) -> None:
    """Say something of several lines that others wrote."""
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        render.talk(" " * indent + render.clean(line.strip()) if line.strip() else "")


class Troubles:
    """Tells, while it is open, what goes wrong in agents: each in a few lines, the user's first."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def open(self) -> None:
        """Tell from now on; ends with the connection."""
        subjects = self._cluster.subjects
        self._cluster.bus.subscribe(subjects.dead("*"), self._on_dead)
        for topic, what in (("agent", "failed"), ("agent", "blocked_loop"), ("worker", "died")):
            self._cluster.bus.subscribe(subjects.event(topic, what), self._on_event)

    def _on_dead(self, message: Any) -> None:
        from foundation_schemas import DeadLetter

        with contextlib.suppress(ValueError):
            letter = DeadLetter.model_validate_json(message.data)
            what = (letter.signal or {}).get("type", "a signal")
            tries = f" after {letter.attempts} attempts" if letter.attempts > 1 else ""
            head = f"{letter.agent} gave up {what}{tries}: {letter.reason}"
            # The second line of a trace is the user's own.
            line = (letter.traceback or "").split("\n")[1:2]
            warn("\n".join([render.clean(head), *(item for item in line if item[:1] == " ")]))

    def _on_event(self, message: Any) -> None:
        from foundation_schemas import ClusterEvent

        with contextlib.suppress(ValueError):
            warn(ClusterEvent.model_validate_json(message.data).message)
