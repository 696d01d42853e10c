"""`Launcher`: what starts a node somewhere and clears it away; `LaunchOptions`: what the node runs with.

Pure. A launcher knows machines, not the cluster: whether a node has come up,
and whether its agents have left it, is for the caller to see.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from foundation_nats.config import Config
from foundation_nats.errors import ConfigError

_PORT_MAX = 65535


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What every node of one `nodes add` offers and runs with."""

    workers: int | None = None
    """Worker processes; None: one per core."""
    imports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    capabilities: tuple[str, ...] = ()
    capacity: Mapping[str, float] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    """``module:Class`` of replicated domains that they follow from their start."""
    metrics: str | None = None
    """``HOST:PORT`` where a node serves its metrics; None: nowhere."""
    log_level: str = "info"
    log_json: bool = False

    def nth(self, number: int) -> LaunchOptions:
        """The same for the *number*-th node of several, from 0: each serves its metrics at its own port.

        Raises:
            ConfigError: there is no such port.
        """
        if self.metrics is None:
            return self
        host, _, first = self.metrics.rpartition(":")
        port = int(first) + number
        if port > _PORT_MAX:
            raise ConfigError(
                f"The metrics of node {number + 1} would be served at port {port}, which is none.",
                hint="Begin with a lower port, or add fewer nodes at a time.",
            )
        return replace(self, metrics=f"{host}:{port}")


@dataclass(frozen=True, slots=True)
class Launched:
    """A node that a launcher has started."""

    name: str
    launcher: str
    at: str
    """UTC, RFC 3339: when."""
    is_running: bool | None
    """None: the launcher can't tell."""
    pid: int | None = None
    log: Path | None = None


class Ending(StrEnum):
    """How a node that was stopped has ended."""

    GONE = "gone"
    """It had ended before."""
    STOPPED = "stopped"
    """It ended as it was asked to."""
    KILLED = "killed"
    """It did not end in time."""


class Launcher(Protocol):
    """Starts nodes and ends them; remembers which."""

    async def start(self, name: str, options: LaunchOptions) -> Launched:
        """Start a node; returns once it is on its way, which is not yet up.

        Raises:
            AlreadyExistsError: it has started one of this name that may live.
            LaunchError: it could not be started; nothing is left of it.
            ConfigError: a setting is wrong.
        """
        ...

    async def stop(self, name: str, *, timeout: float) -> Ending:
        """End a node and forget it: ask it to drain, and after *timeout* seconds end it all the same.

        Raises:
            NodeNotFoundError: it has started none of this name.
            LaunchError: it could not be ended, and is still remembered.
        """
        ...

    async def list(self) -> builtins.list[Launched]:
        """The nodes it has started and not stopped, by name, dead ones included."""
        ...


class MakeLauncher(Protocol):
    """What an entry point names: makes a launcher for the cluster that *config* names."""

    def __call__(self, config: Config) -> Launcher: ...


def option_arguments(options: LaunchOptions) -> dict[str, list[str]]:
    """The options of ``foundation node start``, by what they are about."""
    return {
        "workers": [] if options.workers is None else ["--workers", str(options.workers)],
        "imports": _repeated("--import", options.imports),
        "labels": _repeated("--label", (f"{k}={v}" for k, v in sorted(options.labels.items()))),
        "capabilities": _repeated("--capability", options.capabilities),
        "capacity": _repeated(
            "--capacity", (f"{k}={v:g}" for k, v in sorted(options.capacity.items()))
        ),
        "domains": _repeated("--domain", options.domains),
        "metrics": [] if options.metrics is None else ["--metrics", options.metrics],
        "log_json": ["--log-json"] if options.log_json else [],
        "log_level": [] if options.log_level == "info" else ["--log-level", options.log_level],
    }


def _repeated(flag: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (flag, value)]


def node_arguments(name: str, options: LaunchOptions) -> list[str]:
    """``node start --name … …``, without where to connect."""
    parts = option_arguments(options).values()
    return ["node", "start", "--name", name, *(part for some in parts for part in some)]
