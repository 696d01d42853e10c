"""The file by which the other commands find this user's running `foundation up`.

One file per cluster, mode 0600, in ``$XDG_RUNTIME_DIR/foundation`` or
``~/.local/state/foundation``. A file whose process is gone is ignored; the
start time of the process is compared too, so that a reused pid is not taken
for the cluster. A file of another user is never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

_LOGS_KEPT = 5


@dataclass(frozen=True, slots=True)
class UpFile:
    """What a running `foundation up` says about itself."""

    cluster: str
    url: str
    pid: int
    started: str
    """The start time of the process as the kernel counts it; empty where unknown."""
    store: str
    durability: str


def runtime_dir() -> Path:
    """Where runtime files and the logs of node processes live."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "foundation"
    return Path.home() / ".local" / "state" / "foundation"


def make_runtime_dir() -> Path:
    """`runtime_dir`, created for this user alone."""
    folder = runtime_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def make_log_dir(cluster: str) -> Path:
    """A directory for the logs of this process's nodes.

    Those of processes that were killed, or kept theirs because something failed, stay to
    be read: the newest `_LOGS_KEPT`; older ones are taken away here.
    """
    parent = make_runtime_dir() / "logs"
    folder = parent / f"{cluster}-{os.getpid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    dead = [path for path in parent.iterdir() if not _has_process(path)]
    for path in sorted(dead, key=_modified, reverse=True)[_LOGS_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _has_process(folder: Path) -> bool:
    pid = folder.name.rpartition("-")[2]
    return pid.isdecimal() and process_start(int(pid)) is not None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def process_start(pid: int) -> str | None:
    """A text that differs between two processes of one pid; None: there is no such process."""
    from foundation_nats.base.process import process_start

    return process_start(pid)


def path_of(cluster: str) -> Path:
    """The file of *cluster*."""
    return runtime_dir() / f"up-{cluster}.json"


def write(entry: UpFile) -> None:
    """Say that *entry* runs; the newest `up` of a cluster has the file."""
    make_runtime_dir()
    path = path_of(entry.cluster)
    partial = path.with_suffix(f".{entry.pid}.tmp")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(entry), file)
    partial.replace(path)


def remove(entry: UpFile) -> None:
    """Take the file away, unless a newer `up` has it now."""
    if _read(path_of(entry.cluster)) == entry:
        with contextlib.suppress(OSError):
            path_of(entry.cluster).unlink()


def running() -> list[UpFile]:
    """Every `foundation up` of this user that is alive, by cluster name."""
    try:
        paths = sorted(runtime_dir().glob("up-*.json"))
    except OSError:
        return []
    entries = (_read(path) for path in paths)
    return [entry for entry in entries if entry is not None and _is_alive(entry)]


def _is_alive(entry: UpFile) -> bool:
    started = process_start(entry.pid)
    return started is not None and (not started or not entry.started or started == entry.started)


def _read(path: Path) -> UpFile | None:
    try:
        if path.stat().st_uid != os.getuid():
            return None
        found = json.loads(path.read_text())
        entry = UpFile(**found)
    except (OSError, ValueError, TypeError):
        return None
    return entry if isinstance(entry.pid, int) and isinstance(entry.url, str) else None
