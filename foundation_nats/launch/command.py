"""`CommandLauncher`: nodes by a command of the operator's: ssh, docker, kubectl.

IO. The command for adding must return once the node is on its way, and not
stay until the node ends. Its output goes to a file, not a pipe: what it leaves
running in the background can't hold it up. A command that fails or takes too
long is an error that says what it wrote; in the second case the node may have
been started all the same.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping
from typing import IO

from foundation_nats.config import Config
from foundation_nats.errors import ConfigError, LaunchError, NodeNotFoundError
from foundation_nats.launch.launcher import (
    Ending,
    Launched,
    LaunchOptions,
    node_arguments,
    option_arguments,
)
from foundation_nats.launch.ledger import Entry, Ledger
from foundation_nats.launch.local import environment
from foundation_nats.launch.template import render

NAME = "command"
_SAID_MAX = 2000


class CommandLauncher:
    """Starts nodes by ``launcher.add`` and clears them away by ``launcher.remove``."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ledger = Ledger(config.cluster)

    async def start(self, name: str, options: LaunchOptions) -> Launched:
        """See `Launcher.start`."""
        template = self._config.launcher.add
        if template is None:
            raise ConfigError(
                "The launcher `command` has no command that starts a node.",
                hint="Give --command 'ssh HOST …{command:q}', or set FOUNDATION_LAUNCHER__ADD.",
            )
        arguments = render(template, self.values(name, options))
        claim = self._ledger.claim(name, NAME)
        try:
            await self._run(arguments, name, "started")
        except BaseException:
            self._ledger.forget(claim)
            raise
        return self._shown(self._ledger.record(claim, 0))

    async def stop(self, name: str, *, timeout: float) -> Ending:
        """See `Launcher.stop`; without ``launcher.remove`` the node is only forgotten.

        *timeout* is the node's: a command has ``launcher.timeout_s``.
        """
        entry = self._ledger.get(name)
        template = self._config.launcher.remove
        if template is not None:
            arguments = render(template, self.values(name, LaunchOptions()))
            await self._run(arguments, name, "removed")
        elif entry is None:
            raise NodeNotFoundError(f"No node {name!r} was started by a command.", node=name)
        if entry is not None:
            self._ledger.forget(entry)
        return Ending.GONE if template is None else Ending.STOPPED

    async def list(self) -> builtins.list[Launched]:
        """See `Launcher.list`."""
        return [self._shown(entry) for entry in self._ledger.all() if entry.launcher == NAME]

    def _shown(self, entry: Entry) -> Launched:
        return Launched(entry.name, NAME, entry.at, None)

    def values(self, name: str, options: LaunchOptions) -> Mapping[str, builtins.list[str]]:
        """What templates may name."""
        config = self._config
        servers = ",".join(config.bus.servers)
        command = ["foundation", *node_arguments(name, options)]
        command += ["--server", servers, "--cluster", config.cluster]
        if config.bus.creds is not None:
            command += ["--creds", config.bus.creds]
        parts = option_arguments(options)
        return {
            "name": [name],
            "servers": [servers],
            "cluster": [config.cluster],
            "creds": [config.bus.creds] if config.bus.creds is not None else [],
            **parts,
            "options": [part for some in parts.values() for part in some],
            "command": command,
        }

    async def _run(self, arguments: builtins.list[str], name: str, what: str) -> None:
        with tempfile.TemporaryFile() as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment(self._config),
                    # A group of its own, so that all of it can be ended when it takes too long.
                    start_new_session=True,
                )
            except OSError as error:
                raise LaunchError(
                    f"Node {name} was not {what}: {arguments[0]} can't be run: {error.strerror}.",
                    hint="Is the program there? The command is run without a shell.",
                ) from error
            timeout = self._config.launcher.timeout_s
            try:
                code = await asyncio.wait_for(process.wait(), timeout)
            except TimeoutError:
                await _kill(process)
                raise LaunchError(
                    f"The command for node {name} did not end within {timeout:g} s: "
                    f"{_said(output)}.",
                    hint="It must return once the node is on its way. The node may have been "
                    f"{what} all the same: see `foundation nodes`.",
                ) from None
            except asyncio.CancelledError:
                await _kill(process)
                raise
            if code:
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                raise LaunchError(
                    f"Node {name} was not {what}: {arguments[0]} ended with {how}: {_said(output)}.",
                    exit_code=code,
                    said=_said(output),
                )


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _said(output: IO[bytes]) -> str:
    """The end of what a command wrote."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _SAID_MAX))
    text = output.read().decode("utf-8", "replace").strip()
    return " | ".join(line.strip() for line in text.splitlines() if line.strip()).rstrip(".") or (
        "it said nothing"
    )
