"""`LocalLauncher`: nodes as detached processes of this machine.

IO. Each is a `foundation node start` in a session of its own, with a log of
its own; it outlives the command that started it. It gets the settings of the
caller by its environment, where passwords are not seen by others. It is ended
by SIGTERM, which drains it, and by SIGKILL after the deadline; its workers end
with it. A process is signalled through a handle where the kernel has them, and
only if it is the one that was started: never another one that got its pid.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from foundation_nats.base.process import process_start
from foundation_nats.config import Config
from foundation_nats.errors import LaunchError, NodeNotFoundError
from foundation_nats.launch.launcher import Ending, Launched, LaunchOptions, node_arguments
from foundation_nats.launch.ledger import Entry, Ledger

NAME = "local"
_POLL_S = 0.02
_KILL_TIMEOUT_S = 5.0
_CHILDREN: set[int] = set()
"""Nodes that this very process has started, as long as it is their parent."""

# Settings of the caller's own connection; what holds for the node comes from the config.
_FOREIGN = (
    "FOUNDATION_SERVER",
    "FOUNDATION_CREDS",
    "FOUNDATION_USER",
    "FOUNDATION_PASSWORD",
    "FOUNDATION_TOKEN",
    "NATS_CONTEXT",
)


def environment(config: Config) -> dict[str, str]:
    """What a process finds that shall join the cluster that *config* names."""
    found = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    for key in [key for key in found if key.startswith("FOUNDATION_BUS__")]:
        del found[key]
    return {**found, **config.to_environment()}


class LocalLauncher:
    """Starts nodes here."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ledger = Ledger(config.cluster)

    async def start(self, name: str, options: LaunchOptions) -> Launched:
        """See `Launcher.start`."""
        claim = self._ledger.claim(name, NAME)
        try:
            pid = self._spawn(name, options, Path(claim.log))
        except OSError as error:
            self._ledger.forget(claim)
            raise LaunchError(
                f"The process of node {name} could not be started: {error}."
            ) from error
        return self._shown(self._ledger.record(claim, pid))

    def _spawn(self, name: str, options: LaunchOptions, log: Path) -> int:
        command = [sys.executable, "-m", "foundation_cli.main", *node_arguments(name, options)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        # Not a child that somebody must wait for: it goes on when this process ends.
        pid = os.posix_spawn(
            sys.executable,
            command,
            self._environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
        )
        _CHILDREN.add(pid)
        return pid

    def _environment(self) -> Mapping[str, str]:
        return environment(self._config)

    async def stop(self, name: str, *, timeout: float) -> Ending:
        """See `Launcher.stop`."""
        entry = self._ledger.get(name)
        if entry is None or entry.launcher != NAME:
            raise NodeNotFoundError(f"No node {name!r} was started on this machine.", node=name)
        ending = Ending.GONE
        if not entry.is_claim:
            ending = await self._end(entry, timeout)
        self._ledger.forget(entry)
        return ending

    async def _end(self, entry: Entry, timeout: float) -> Ending:
        for number, patience, ending in (
            (signal.SIGTERM, timeout, Ending.STOPPED),
            (signal.SIGKILL, _KILL_TIMEOUT_S, Ending.KILLED),
        ):
            if not _send(entry, number):
                return Ending.GONE if number is signal.SIGTERM else Ending.STOPPED
            deadline = asyncio.get_running_loop().time() + patience
            while _lives(entry):
                if asyncio.get_running_loop().time() >= deadline:
                    break
                await asyncio.sleep(_POLL_S)
            else:
                return ending
        raise LaunchError(
            f"The process {entry.pid} of node {entry.name} does not end.",
            hint="It may hang in the kernel, on a dead network disk for example.",
        )

    async def list(self) -> builtins.list[Launched]:
        """See `Launcher.list`."""
        return [self._shown(entry) for entry in self._ledger.all() if entry.launcher == NAME]

    def _shown(self, entry: Entry) -> Launched:
        return Launched(entry.name, NAME, entry.at, _lives(entry), entry.pid, Path(entry.log))


def _lives(entry: Entry) -> bool:
    if entry.pid in _CHILDREN:
        # What is left of a dead child is taken away by its parent, and by nobody else.
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(entry.pid, os.WNOHANG)[0]:
                _CHILDREN.discard(entry.pid)
    return entry.has_process is True


def _send(entry: Entry, number: signal.Signals) -> bool:
    """Send a signal to the process that was started, and to no other; False: it has ended."""
    if not entry.started or not _lives(entry):
        return False
    try:
        if not hasattr(os, "pidfd_open"):
            os.kill(entry.pid, number)
            return True
        handle = os.pidfd_open(entry.pid)
    except ProcessLookupError:
        return False
    try:
        # The handle is of whoever has the pid now, and stays with it.
        if process_start(entry.pid) != entry.started:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True
