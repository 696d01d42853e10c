"""Which launcher has which name: the built-in ones, then those of installed packages.

A package adds one by an entry point in the group ``foundation_nats.launchers``::

    [project.entry-points."foundation_nats.launchers"]
    cloud = "my_package.cloud:CloudLauncher"

The object is a `MakeLauncher`: called with a `Config`, it gives a `Launcher`.
Built-in names can't be replaced.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import cast

from foundation_nats.config import Config
from foundation_nats.errors import ConfigError
from foundation_nats.launch import command, local
from foundation_nats.launch.command import CommandLauncher
from foundation_nats.launch.launcher import Launcher, MakeLauncher
from foundation_nats.launch.ledger import Ledger
from foundation_nats.launch.local import LocalLauncher

GROUP = "foundation_nats.launchers"

_BUILT_IN: dict[str, MakeLauncher] = {local.NAME: LocalLauncher, command.NAME: CommandLauncher}


def names() -> list[str]:
    """Every launcher that there is."""
    return sorted({*_BUILT_IN, *(item.name for item in entry_points(group=GROUP))})


def starter_of(name: str, config: Config) -> Launcher | None:
    """The launcher that has started the node *name* on this machine; None: not known here.

    Raises:
        ConfigError: it was one of a package that can't be loaded any more.
    """
    entry = Ledger(config.cluster).get(name)
    return None if entry is None else launcher_of(entry.launcher, config)


def launcher_of(kind: str, config: Config) -> Launcher:
    """The launcher *kind* for the cluster of *config*.

    Raises:
        ConfigError: there is none, or its package can't be loaded.
    """
    make = _BUILT_IN.get(kind)
    if make is not None:
        return make(config)
    for item in entry_points(group=GROUP):
        if item.name == kind:
            try:
                return cast(MakeLauncher, item.load())(config)
            except Exception as error:  # whatever a foreign package raises when it is imported
                raise ConfigError(f"The launcher {item.value} can't be loaded: {error}.") from error
    raise ConfigError(f"There is no launcher {kind!r}.", hint=f"Known: {', '.join(names())}.")
