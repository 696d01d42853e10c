"""What an entry of ``servers`` says: a NATS URL as it is, or a locator to look up.

Pure. A locator is ``scheme://[user[:password]@]place[/path][?option=value]``.
What is wrong with one is said before any I/O. Passwords never reach a text for
people: use `shown`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from foundation_nats.errors import ConfigError

NATS_SCHEMES = ("nats", "tls", "ws", "wss")
DEFAULT_PORT = 4222


@dataclass(frozen=True, slots=True)
class Locator:
    """One entry that must be looked up."""

    text: str = field(repr=False)
    scheme: str
    host: str
    """The place without its port; as it was written, because names of clusters have a case."""
    port: int | None
    path: str
    options: Mapping[str, str]
    userinfo: str = field(default="", repr=False)

    @property
    def shown(self) -> str:
        """The locator as people may see it: without credentials."""
        return shown(self.text)

    def accept(self, *options: str, path: bool = False, userinfo: bool = False) -> None:
        """Refuse what this kind of locator doesn't know.

        Raises:
            ConfigError: an option, a path or credentials that would be ignored.
        """
        for name in self.options:
            if name not in options:
                known = ", ".join(options) or "none"
                raise self.wrong(f"it has no option {name!r} (known: {known})")
        if not path and self.path not in ("", "/"):
            raise self.wrong(f"the path {self.path!r} means nothing here")
        if not userinfo and self.userinfo:
            raise self.wrong("credentials can't stand in it")

    def wrong(self, reason: str) -> ConfigError:
        """The error that says what is wrong with this locator."""
        return ConfigError(f"The server locator {self.shown} is wrong: {reason}.", hint=_SEE)

    def url(self, host: str, port: int, *, scheme: str = "nats") -> str:
        """The URL of one server, with this locator's credentials."""
        place = f"[{host}]" if ":" in host else host
        user = f"{self.userinfo}@" if self.userinfo else ""
        return f"{scheme}://{user}{place}:{port}"


@dataclass(frozen=True, slots=True)
class Found:
    """One server that a locator has led to."""

    url: str
    cluster: str | None = None
    """The cluster it announces itself for, where the source knows."""
    note: str = ""
    """For people: priority and weight, the name of an announcement …"""


class Resolver(Protocol):
    """How one scheme is looked up; plug-ins register one in `foundation_nats.discovery`.

    The entry point's name is the scheme. An optional attribute ``stamp``, a
    function from a locator to anything comparable, makes its answer watched:
    it is called every two seconds, must be quick, and when its result changes
    the locator is looked up again.
    """

    async def __call__(self, locator: Locator, timeout_s: float) -> list[Found]:
        """Look *locator* up, in the order in which the servers shall be tried.

        Called at connect and again and again while disconnected. It is
        cancelled shortly after *timeout_s* and should end before.

        Raises:
            ConfigError: the locator is wrong, or something must be installed.
            BusUnavailableError: there is no answer now; the message says why.
        """
        ...


_SEE = "See docs/discovery.md for the kinds of locators."


def is_locator(entry: str) -> bool:
    """Whether *entry* must be looked up; a NATS URL and a bare ``host:port`` need not."""
    scheme, separator, _ = entry.partition("://")
    return bool(separator) and scheme.lower() not in NATS_SCHEMES


def parse(text: str) -> Locator:
    """Read a locator.

    Raises:
        ConfigError: it can't be read; says what is wrong.
    """
    try:
        parts = urlsplit(text)
        userinfo, _, place = parts.netloc.rpartition("@")
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise ConfigError(
            f"The server locator {shown(text)} can't be read: {error}.", hint=_SEE
        ) from None
    if parts.fragment:
        raise ConfigError(f"The server locator {shown(text)} has a '#', which means nothing here.")
    host = place
    if port is not None:
        host = place.rpartition(":")[0]
    host = host.removesuffix(":").removeprefix("[").removesuffix("]")
    return Locator(
        text=text,
        scheme=parts.scheme.lower(),
        host=unquote(host),
        port=port,
        path=unquote(parts.path),
        options=dict(pairs),
        userinfo=userinfo,
    )


def shown(url: str) -> str:
    """A URL or locator without user and password."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    place, slash, more = rest.partition("/")
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{more}"


__all__ = ["DEFAULT_PORT", "Found", "Locator", "Resolver", "is_locator", "parse", "shown"]
