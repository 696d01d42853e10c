"""Servers on the local network by multicast DNS: finding announced ones, and announcing one.

IO: UDP multicast to 224.0.0.251 port 5353; needs zeroconf (extra ``mdns``). The service
type is ``_nats._tcp.local.``; the TXT entry ``cluster`` names the cluster.

Multicast reaches one network segment, no further, and anybody on it can
announce anything: this is for a bench, not for a network with strangers.
Not guaranteed: that every announced server is found in one look (packets get
lost). A look-up for a named cluster ends half a second after the last server it has heard of;
one for any waits longer, because a responder may keep silent for a second after it has
spoken (RFC 6762 §6), and two clusters must not look like one.

Questions ask for multicast answers: a unicast one goes to whichever process of this
machine has bound port 5353 last.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from foundation_nats.base.clock import monotonic
from foundation_nats.discovery.locator import DEFAULT_PORT, NATS_SCHEMES, Found, Locator, shown
from foundation_nats.errors import BusUnavailableError, ConfigError

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

SERVICE = "_nats._tcp.local."
_QUIET_S = 0.5
_QUIET_ANY_S = 1.2
_ASK_S = 1.0
_FOUND_MAX = 256
_LABEL_MAX = 63


async def by_multicast(locator: Locator, timeout_s: float) -> list[Found]:
    """``mdns://`` or ``mdns://CLUSTER``: the servers announced on the local network.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    locator.accept("interface")
    if locator.port is not None:
        raise locator.wrong("write mdns:// or mdns://CLUSTER; the announcement gives the port")
    deadline = monotonic() + timeout_s
    zeroconf = await _open(_interfaces(locator), locator.shown)
    try:
        return await _browse(zeroconf, locator, deadline)
    finally:
        await zeroconf.async_close()


async def _browse(zeroconf: AsyncZeroconf, locator: Locator, deadline: float) -> list[Found]:
    from zeroconf import DNSQuestionType, ServiceStateChange
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

    names: asyncio.Queue[str] = asyncio.Queue(_FOUND_MAX)

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Added and not names.full():
            names.put_nowait(name)

    browser = AsyncServiceBrowser(
        zeroconf.zeroconf, SERVICE, handlers=[on_change], question_type=DNSQuestionType.QM
    )
    quiet = _QUIET_S if locator.host else _QUIET_ANY_S
    found: dict[str, Found] = {}
    others: set[str] = set()
    try:
        while (left := deadline - monotonic()) > 0:
            try:
                patience = min(left, quiet) if found else left
                name = await asyncio.wait_for(names.get(), patience)
            except TimeoutError:
                break
            info = AsyncServiceInfo(SERVICE, name)
            left = deadline - monotonic()
            if left <= 0 or not await info.async_request(
                zeroconf.zeroconf, min(left, _ASK_S) * 1000, question_type=DNSQuestionType.QM
            ):
                continue
            cluster = _text(info, b"cluster")
            if locator.host and cluster != locator.host:
                others.add(cluster or "(without a name)")
                continue
            for item in _found(locator, info, cluster):
                found.setdefault(item.url, item)
    finally:
        await browser.async_cancel()
    if not found:
        others_text = f" (announced: {', '.join(sorted(others))})" if others else ""
        raise BusUnavailableError(
            f"{locator.shown} finds no NATS server on this network{others_text}.",
            hint="Announce one with `foundation discovery announce` where it runs; "
            "networks may block multicast.",
        )
    return list(found.values())


def _text(info: AsyncServiceInfo, key: bytes) -> str | None:
    value = (info.properties or {}).get(key)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) and value else None


def _found(locator: Locator, info: AsyncServiceInfo, cluster: str | None) -> list[Found]:
    scheme = _text(info, b"scheme") or "nats"
    if info.port is None or scheme not in NATS_SCHEMES:
        return []
    addresses = [ipaddress.ip_address(text) for text in info.parsed_addresses()]
    # A link-local address means nothing without the interface it was heard on.
    usable = [item for item in addresses if not (item.version == 6 and item.is_link_local)]
    usable.sort(key=lambda item: item.version)
    note = info.name.removesuffix(f".{SERVICE}")
    return [
        Found(locator.url(str(item), info.port, scheme=scheme), cluster, note) for item in usable
    ]


def _interfaces(locator: Locator) -> list[str] | None:
    text = locator.options.get("interface")
    if text is None:
        return None
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise locator.wrong(f"the interface {text!r} is no IP address of this machine") from None
    return [text]


async def _open(interfaces: Sequence[str] | None, what: str) -> AsyncZeroconf:
    try:
        from zeroconf import InterfaceChoice
        from zeroconf.asyncio import AsyncZeroconf
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the package zeroconf, which is not installed.",
            hint="Install it with `pip install 'foundation-nats[mdns]'`.",
        ) from error
    try:
        return AsyncZeroconf(
            interfaces=InterfaceChoice.All if interfaces is None else list(interfaces)
        )
    except (OSError, RuntimeError) as error:
        where = "this machine" if interfaces is None else ", ".join(interfaces)
        raise BusUnavailableError(
            f"Multicast is not possible on {where}: {error}.",
            hint="Name an address of this machine with ?interface=ADDRESS.",
        ) from error


# ---- announcing ----------------------------------------------------------------------


class Announcement:
    """A server made known on the local network, as an ``async with``.

    A server on a loopback address is announced on the loopback interface only,
    because nobody else could reach it: `is_local` says so.
    """

    def __init__(self, url: str, cluster: str, *, interface: str | None = None) -> None:
        """
        Raises:
            ConfigError: *url* is no URL that others could connect to.
        """
        parts = urlsplit(url)
        try:
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise ConfigError(f"{shown(url)} can't be announced: {error}.") from None
        if parts.scheme not in NATS_SCHEMES or not parts.hostname:
            raise ConfigError(f"{shown(url)} is no NATS URL that could be announced.")
        self.cluster = cluster
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, port
        self._interface = interface
        self._zeroconf: AsyncZeroconf | None = None
        self._info: AsyncServiceInfo | None = None
        self._telling: asyncio.Future[None] | None = None
        self.addresses: list[str] = []
        """What is announced, once it is."""

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine hear of it."""
        return all(ipaddress.ip_address(item).is_loopback for item in self.addresses)

    @property
    def name(self) -> str:
        """The name of the announcement."""
        return "" if self._info is None else self._info.name.removesuffix(f".{SERVICE}")

    @property
    def is_announced(self) -> bool:
        """Whether it can be found now."""
        return self._info is not None

    async def announce(self) -> None:
        """Make the server known. Idempotent.

        Raises:
            ConfigError: zeroconf is not installed, or the address can't be announced.
            BusUnavailableError: multicast is not possible here.
        """
        if self._info is not None:
            return
        self.addresses = await self._addresses()
        if self._zeroconf is None:
            self._zeroconf = await _open(self._interfaces(), "mDNS")
        from zeroconf import NonUniqueNameException
        from zeroconf.asyncio import AsyncServiceInfo

        token = token_hex(3)
        label = f"{self.cluster} {socket.gethostname().partition('.')[0]} {token}"
        info = AsyncServiceInfo(
            SERVICE,
            f"{label.encode()[-_LABEL_MAX:].decode(errors='ignore')}.{SERVICE}",
            port=self._port,
            parsed_addresses=self.addresses,
            # A name of our own: the machine's may already be announced by the system.
            server=f"foundation-{token}.local.",
            properties={"cluster": self.cluster, "scheme": self._scheme},
        )
        try:
            # It answers questions from here on; telling everybody goes on in the background.
            self._telling = asyncio.ensure_future(await self._zeroconf.async_register_service(info))
        except (OSError, NonUniqueNameException) as error:
            raise BusUnavailableError(f"The server can't be announced: {error!r}.") from error
        self._info = info

    async def withdraw(self) -> None:
        """Say that it is gone. Idempotent."""
        if self._info is not None and self._zeroconf is not None:
            info, self._info = self._info, None
            if self._telling is not None:
                await self._telling
            await (await self._zeroconf.async_unregister_service(info))

    async def close(self) -> None:
        """Withdraw, and leave the network alone. Idempotent."""
        await self.withdraw()
        if self._zeroconf is not None:
            zeroconf, self._zeroconf = self._zeroconf, None
            await zeroconf.async_close()

    async def __aenter__(self) -> Self:
        try:
            await self.announce()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _addresses(self) -> list[str]:
        loop = asyncio.get_running_loop()
        try:
            answers = await asyncio.wait_for(
                loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM), 5.0
            )
        except (OSError, TimeoutError) as error:
            raise ConfigError(
                f"The address of {self._host} is not known: {error}.", hint="Give its IP address."
            ) from error
        found = list(dict.fromkeys(str(item[4][0]) for item in answers))
        if any(ipaddress.ip_address(item).is_unspecified for item in found):
            raise ConfigError(
                f"{self._host} is no address that others could connect to.",
                hint="Give the address of this machine on the network.",
            )
        outside = [item for item in found if not ipaddress.ip_address(item).is_loopback]
        return outside or found

    def _interfaces(self) -> list[str] | None:
        if self._interface is not None:
            return [self._interface]
        own = [item for item in self.addresses if _is_own(item)]
        return own or None


def _is_own(address: str) -> bool:
    """Whether *address* is one of this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


__all__ = ["SERVICE", "Announcement", "by_multicast"]
