"""`Servers`: the entries of one connection, looked up as often as it needs to.

IO, through the resolvers. NATS URLs stay as they are. The URLs come in the
order of the entries, and within a locator in the order its resolver gives.
A locator that fails is passed over as long as another entry gives a server.

Guarantees: `resolve` ends within its time-out and raises only our errors.
Not guaranteed: that a server which was found answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from foundation_nats.base.logs import get_logger
from foundation_nats.discovery.locator import Found, Locator, Resolver, is_locator, parse, shown
from foundation_nats.discovery.registry import resolver_of
from foundation_nats.errors import BusUnavailableError, ConfigError, FoundationError

_GRACE_S = 0.25
"""How much longer than asked a resolver may take to say why it found nothing."""


@dataclass(frozen=True, slots=True)
class _Entry:
    text: str
    locator: Locator | None
    resolver: Resolver | None


class Servers:
    """The servers a configuration names."""

    def __init__(self, entries: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: an entry is neither a NATS URL nor a locator that can be looked up.
        """
        self._entries = [_entry(text) for text in entries]
        self._stamps: dict[str, object] = {}
        self.found: list[Found] = []
        """What the last successful `resolve` gave."""

    @property
    def is_fixed(self) -> bool:
        """Whether every entry is a NATS URL: nothing to look up."""
        return all(entry.locator is None for entry in self._entries)

    @property
    def shown(self) -> str:
        """The entries, and what was found, without credentials."""
        entries = ", ".join(shown(entry.text) for entry in self._entries)
        if self.is_fixed or not self.found:
            return entries
        return f"{entries} (now {', '.join(shown(item.url) for item in self.found)})"

    def has_changed(self) -> bool:
        """Whether something that is watched has changed since the last `resolve`."""
        return self._stamps != self._read_stamps()

    def _read_stamps(self) -> dict[str, object]:
        stamps: dict[str, object] = {}
        for entry in self._entries:
            stamp = getattr(entry.resolver, "stamp", None)
            if stamp is not None:
                stamps[entry.text] = stamp(entry.locator)
        return stamps

    async def resolve(self, timeout_s: float) -> list[str]:
        """The URLs to try, in this order.

        Raises:
            ConfigError: a locator is wrong, something is not installed, or a
                multicast found servers of several clusters.
            BusUnavailableError: no entry gives a server; names each with its reason.
        """
        if self.is_fixed:
            return [entry.text for entry in self._entries]
        self._stamps = self._read_stamps()  # before reading: a change meanwhile is seen next time
        answers = await asyncio.gather(
            *(self._look_up(entry, timeout_s) for entry in self._entries), return_exceptions=True
        )
        found: list[Found] = []
        failures: list[FoundationError] = []
        for entry, answer in zip(self._entries, answers, strict=True):
            match answer:
                case BusUnavailableError():
                    get_logger("discovery").warning(
                        "servers not found", locator=shown(entry.text), error=str(answer)
                    )
                    failures.append(answer)
                case BaseException():
                    raise answer
                case _:
                    _refuse_several(entry, answer)
                    found += answer
        if not found:
            if len(failures) == 1:
                raise failures[0]
            raise BusUnavailableError(
                "No NATS server was found: " + " ".join(item.message for item in failures),
                hint=failures[0].hint,
            )
        self.found = list({item.url: item for item in found}.values())
        return [item.url for item in self.found]

    async def _look_up(self, entry: _Entry, timeout_s: float) -> list[Found]:
        if entry.locator is None or entry.resolver is None:
            return [Found(entry.text)]
        return await look_up(entry.locator, entry.resolver, timeout_s)


def _entry(text: str) -> _Entry:
    if not is_locator(text):
        return _Entry(text, None, None)
    locator = parse(text)
    return _Entry(text, locator, resolver_of(locator.scheme, text))


def _refuse_several(entry: _Entry, found: Sequence[Found]) -> None:
    """Don't join whichever of several clusters answers first."""
    names = sorted({item.cluster or "(without a name)" for item in found})
    if entry.locator is not None and len(names) > 1:
        raise ConfigError(
            f"{entry.locator.shown} finds several clusters: {', '.join(names)}.",
            hint=f"Say which one with {entry.locator.scheme}://NAME.",
        )


async def look_up(locator: Locator, resolver: Resolver, timeout_s: float) -> list[Found]:
    """Ask *resolver*; whatever goes wrong in it comes out as one of our errors.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    try:
        async with asyncio.timeout(timeout_s + _GRACE_S):
            found = await resolver(locator, timeout_s)
    except TimeoutError as error:
        raise BusUnavailableError(
            f"{locator.shown} leads to no NATS server: no answer within {timeout_s:g} s."
        ) from error
    except (ConfigError, BusUnavailableError):
        raise
    except Exception as error:  # a resolver may be of a foreign package
        raise BusUnavailableError(
            f"{locator.shown} leads to no NATS server: {type(error).__name__}: {error}."
        ) from error
    if not found:
        raise BusUnavailableError(f"{locator.shown} leads to no NATS server now.")
    return found


async def find(entry: str, timeout_s: float) -> list[Found]:
    """What one URL or locator leads to now, several clusters included.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    parsed = _entry(entry)
    if parsed.locator is None or parsed.resolver is None:
        return [Found(entry if "://" in entry else f"nats://{entry}")]
    return await look_up(parsed.locator, parsed.resolver, timeout_s)


__all__ = ["Servers", "find", "look_up"]
