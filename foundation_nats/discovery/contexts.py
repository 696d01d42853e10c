"""NATS contexts, as the NATS command line keeps them: ``context://NAME`` is a whole connection.

IO: reads ``$XDG_CONFIG_HOME/nats/context/NAME.json`` (``~/.config`` without that variable) and
writes nothing. A context says where the servers are, as whom to connect, and what TLS needs. What
one asks for and we can't do is refused by its name, never ignored: a connection without the
certificate or the domain that somebody wrote down would be another one.

`read` is the only reader. `applied` gives settings of the bus what the context in their
``servers`` says; what the settings say themselves goes before. `by_context` looks up
the servers alone, and follows the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foundation_nats.config import BusConfig
from foundation_nats.discovery.locator import Found, Locator, parse
from foundation_nats.errors import ConfigError

SCHEME = "context"
DEFAULT_URL = "nats://127.0.0.1:4222"

IDENTITY = ("creds", "user", "password", "token", "nkey", "user_jwt")
"""Settings that say who connects: taken together, or not at all."""
_CERTIFICATE = ("cert", "key")
_FILES = ("creds", "nkey", "ca", "cert", "key")
_TEXTS = (*IDENTITY, "ca", "cert", "key", "inbox_prefix")
_HARMLESS = ("description", "url", "tls_first", "color_scheme", "jetstream_event_prefix")
_REFUSED = {
    "nsc": "Write a file by `nsc generate creds` and name it as 'creds' of the context.",
    "user_seed": "Write the seed into a file and name it as 'nkey' of the context.",
    "socks_proxy": "Use a server that is reached without a proxy.",
    "jetstream_domain": "Connect to a server of that domain itself.",
    "jetstream_api_prefix": "Connect to the account that has the JetStream itself.",
}


@dataclass(frozen=True, slots=True)
class Context:
    """What a context says."""

    name: str
    servers: tuple[str, ...]
    """Its URLs or locators."""
    settings: Mapping[str, Any] = field(repr=False)
    """Settings of `BusConfig` besides ``servers``; those that it says."""


def folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where the NATS command line keeps its files."""
    env = os.environ if environment is None else environment
    base, home = env.get("XDG_CONFIG_HOME"), env.get("HOME")
    return (Path(base) if base else (Path(home) if home else Path.home()) / ".config") / "nats"


def selected(environment: Mapping[str, str] | None = None) -> str | None:
    """The context that ``NATS_CONTEXT`` or else `nats context select` names; None: none."""
    env = os.environ if environment is None else environment
    if env.get("NATS_CONTEXT"):
        return env["NATS_CONTEXT"]
    try:
        return (folder(env) / "context.txt").read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def path_of(name: str, environment: Mapping[str, str] | None = None) -> Path:
    """The file of a context.

    Raises:
        ConfigError: it is not the name of one.
    """
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise ConfigError(
            f"{name!r} is not the name of a NATS context.", hint="See `nats context ls`."
        )
    return folder(environment) / "context" / f"{name}.json"


def read(name: str, environment: Mapping[str, str] | None = None) -> Context:
    """What the context *name* says.

    Raises:
        ConfigError: it is missing, broken, or asks for what we can't do; says which.
    """
    path = path_of(name, environment)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(item.stem for item in path.parent.glob("*.json"))) or "none"
        raise ConfigError(
            f"There is no NATS context {name!r} in {path.parent}.", hint=f"Known: {known}."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The NATS context {path} cannot be read: {error}.",
            hint="Check the file, or name a server instead.",
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"The NATS context {path} is no JSON object.", hint="Name a server instead."
        )
    return _context(name, {key: value for key, value in found.items() if value})


def _context(name: str, said: Mapping[str, Any]) -> Context:
    for key, value in said.items():
        if key in _REFUSED or key not in (*_TEXTS, *_HARMLESS):
            raise ConfigError(
                f"The NATS context {name!r} uses {key!r}, which is not supported.",
                hint=_REFUSED.get(key, "Use a context without it, or name a server instead."),
            )
        wanted = bool if key == "tls_first" else str
        if not isinstance(value, wanted):
            raise ConfigError(
                f"{key!r} of the NATS context {name!r} is not {wanted.__name__}: {value!r}."
                if key not in IDENTITY
                else f"{key!r} of the NATS context {name!r} is not text."
            )
    settings: dict[str, Any] = {key: said[key] for key in _TEXTS if key in said}
    for key in _FILES:
        if key in settings:
            settings[key] = str(Path(settings[key]).expanduser())
    if said.get("tls_first"):
        settings["tls_first"] = True
    try:
        BusConfig(**settings)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"The NATS context {name!r} is wrong: {reason}.") from None
    urls = [part.strip() for part in str(said.get("url") or DEFAULT_URL).split(",")]
    servers = tuple(url if "://" in url else f"nats://{url}" for url in urls if url)
    if any(is_context(url) for url in servers):
        raise ConfigError(f"The 'url' of the NATS context {name!r} is a context again.")
    return Context(name, servers, settings)


def is_context(entry: str) -> bool:
    """Whether *entry* of ``servers`` names a context."""
    return entry.partition("://")[0].lower() == SCHEME and "://" in entry


def applied(config: BusConfig) -> BusConfig:
    """*config* with what the context in its ``servers`` says; itself, if there is none.

    What *config* says goes before, and who connects is taken whole from one of them. The servers
    stay the locator: they are looked up again and again.

    Raises:
        ConfigError: see `read`; or the context is not the only server.
    """
    if not any(is_context(entry) for entry in config.servers):
        return config
    if len(config.servers) > 1:
        raise ConfigError(
            "A NATS context stands beside other servers, and says who connects to all of them.",
            hint="Name the context alone; its 'url' may have several servers.",
        )
    settings = read(_name(parse(config.servers[0]))).settings
    blank = BusConfig()
    own = {
        key
        for key in (*_TEXTS, "tls_first")
        if getattr(config, key) not in (None, getattr(blank, key))
    }
    for together in (IDENTITY, _CERTIFICATE):
        if own.intersection(together):
            own.update(together)
    return config.model_copy(
        update={key: value for key, value in settings.items() if key not in own}
    )


def _name(locator: Locator) -> str:
    locator.accept()
    if locator.port is not None:
        raise locator.wrong("a port means nothing here")
    name = locator.host or selected()
    if name is None:
        raise ConfigError(
            "No NATS context is selected.", hint="Name one as context://NAME, or select one."
        )
    return name


class ByContext:
    """``context://NAME``: the servers of a NATS context; ``context://``: of the selected one."""

    async def __call__(self, locator: Locator, timeout_s: float) -> list[Found]:
        """Read the context, and look up what its ``url`` says.

        Raises:
            ConfigError: see `read`.
            BusUnavailableError: its ``url`` is a locator that leads nowhere now.
        """
        from foundation_nats.discovery.servers import Servers

        context = read(_name(locator))
        urls = await Servers(context.servers).resolve(timeout_s)
        return [Found(url, note=f"NATS context {context.name}") for url in urls]

    def stamp(self, locator: Locator) -> object:
        """What changes with the file."""
        try:
            found = os.stat(path_of(_name(locator)))
        except (OSError, ConfigError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


by_context = ByContext()

__all__ = ["Context", "applied", "by_context", "is_context", "read", "selected"]
