"""Which resolver serves which scheme: the built-in ones, then those of installed packages.

A package adds one by an entry point in the group ``foundation_nats.discovery``,
named like its scheme::

    [project.entry-points."foundation_nats.discovery"]
    consul = "my_package.consul:resolve"

The object is a `Resolver`. Built-in schemes can't be replaced. Modules are
imported when their scheme is first used.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import entry_points
from typing import cast

from foundation_nats.discovery.locator import Resolver, shown
from foundation_nats.errors import ConfigError

GROUP = "foundation_nats.discovery"

_BUILT_IN = {
    "dns": ("dns", "by_address"),
    "dns+srv": ("dns", "by_service"),
    "k8s": ("dns", "by_headless_service"),
    "file": ("file", "by_file"),
    "context": ("contexts", "by_context"),
    "mdns": ("mdns", "by_multicast"),
}


def schemes() -> list[str]:
    """Every scheme that can be looked up here."""
    return sorted({*_BUILT_IN, *(item.name for item in entry_points(group=GROUP))})


@lru_cache(maxsize=64)
def _built_in(scheme: str) -> Resolver:
    module, name = _BUILT_IN[scheme]
    found = importlib.import_module(f"foundation_nats.discovery.{module}")
    return cast(Resolver, getattr(found, name))


def resolver_of(scheme: str, entry: str) -> Resolver:
    """The resolver of *scheme*; *entry* is named in the error.

    Raises:
        ConfigError: there is none, or its package can't be loaded.
    """
    if scheme in _BUILT_IN:
        return _built_in(scheme)
    for item in entry_points(group=GROUP):
        if item.name == scheme:
            try:
                return cast(Resolver, item.load())
            except Exception as error:  # whatever a foreign package raises when it is imported
                raise ConfigError(
                    f"The resolver {item.value} for {scheme}:// can't be loaded: {error}."
                ) from error
    raise ConfigError(
        f"{shown(entry)} is neither a NATS URL nor a known locator.",
        hint=f"Use nats://HOST:PORT, or one of {', '.join(schemes())}.",
    )
