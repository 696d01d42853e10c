"""`Ledger`: the small files in which launchers remember what they have started.

IO. One file per node in ``$XDG_STATE_HOME/foundation/nodes/CLUSTER`` (or
``~/.local/state``), for this user alone. They outlive the runtime directory,
as the nodes do. A pid counts only with the start time of its process, so that
a reused one is never taken for the node. Two commands at a time don't get the
same name: changes are made under a lock that the kernel gives back if its
holder dies. A file that can't be read is as good as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from foundation_nats.base.clock import utc_text
from foundation_nats.base.process import process_start
from foundation_nats.errors import AlreadyExistsError, LaunchError

_LOCK_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A node that was started here."""

    cluster: str
    name: str
    launcher: str
    at: str
    pid: int = 0
    """Of the node; while it is being started, of who starts it; 0: there is no process here."""
    started: str = ""
    """The start time of that process as the kernel counts it."""
    is_claim: bool = False
    """It is being started."""
    log: str = ""

    @property
    def has_process(self) -> bool | None:
        """Whether its process lives; None: it is none of this machine's."""
        if not self.pid:
            return None
        started = process_start(self.pid)
        return started is not None and (not started or started == self.started)


class Ledger:
    """What was started of one cluster."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.folder = state_dir() / "nodes" / cluster

    def claim(self, name: str, launcher: str) -> Entry:
        """Take a name for a node that is about to be started.

        Raises:
            AlreadyExistsError: the node of this name may live.
            LaunchError: the state directory can't be written.
        """
        pid = os.getpid()
        entry = Entry(
            self.cluster,
            name,
            launcher,
            utc_text(),
            pid,
            process_start(pid) or "",
            is_claim=True,
            log=str(self.folder / f"{name}.log"),
        )
        with self._locked():
            known = self.get(name)
            if known is not None and known.has_process is not False:
                raise AlreadyExistsError(
                    f"A node {name!r} was started here by the launcher {known.launcher!r} "
                    f"({known.at}).",
                    hint=f"Give another name, or `foundation nodes remove {name}` first.",
                    node=name,
                )
            self._write(entry)
        return entry

    def record(self, claim: Entry, pid: int) -> Entry:
        """Write down what a claim has become."""
        entry = replace(
            claim, pid=pid, started=process_start(pid) or "" if pid else "", is_claim=False
        )
        with self._locked():
            self._write(entry)
        return entry

    def forget(self, entry: Entry) -> None:
        """Take the entry away, unless another one has its name by now."""
        with self._locked():
            if self.get(entry.name) == entry:
                with contextlib.suppress(OSError):
                    self._path(entry.name).unlink()

    def get(self, name: str) -> Entry | None:
        """The entry of this name."""
        try:
            entry = Entry(**json.loads(self._path(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return entry if isinstance(entry.pid, int) and entry.name == name else None

    def all(self) -> list[Entry]:
        """Every entry, by name."""
        names = sorted(path.stem for path in self.folder.glob("*.json"))
        return [entry for entry in map(self.get, names) if entry is not None]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, entry: Entry) -> None:
        partial = self.folder / f".{entry.name}.{os.getpid()}.tmp"
        try:
            partial.write_text(json.dumps(asdict(entry)))
            partial.replace(self._path(entry.name))
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a")
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        with file:
            deadline = time.monotonic() + _LOCK_PATIENCE_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise _unwritable(self.folder, error) from error
                    time.sleep(0.005)  # held for as long as it takes to write one small file
            yield


def state_dir() -> Path:
    """Where this user's programs keep what shall outlive a login."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "foundation"


def _unwritable(folder: Path, error: OSError) -> LaunchError:
    return LaunchError(
        f"What is started can't be remembered in {folder}: {error}.",
        hint="Set XDG_STATE_HOME to a directory that can be written.",
    )
