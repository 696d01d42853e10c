"""Servers by DNS: all addresses of a name, the SRV records of a service, a headless service.

IO. Addresses come from the system's own resolver, so that hosts files and
search domains count, unless the locator names a ``nameserver``; SRV records and
a nameserver need dnspython (extra ``dns``). Nothing is cached here: every
look-up is asked anew, which is what a moved cluster needs.

SRV targets are tried by priority, and within one priority in a random order
weighted as RFC 2782 says (a record of weight 0 is tried seldom, not never).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from foundation_nats.discovery.locator import DEFAULT_PORT, Found, Locator
from foundation_nats.errors import BusUnavailableError, ConfigError

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver as Asker

_DNS_PORT = 53
_CLUSTER_DOMAIN = "cluster.local"


class Service(NamedTuple):
    """One SRV record."""

    priority: int
    weight: int
    port: int
    target: str


async def by_address(locator: Locator, timeout_s: float) -> list[Found]:
    """``dns://NAME[:PORT]``: every A and AAAA record of the name.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    locator.accept("nameserver", userinfo=True)
    if not locator.host:
        raise locator.wrong("it names no host, as in dns://nats.example.org:4222")
    return await _at_addresses(locator, locator.host, timeout_s)


async def by_headless_service(locator: Locator, timeout_s: float) -> list[Found]:
    """``k8s://SERVICE.NAMESPACE[:PORT]``: the pods behind a headless service.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    locator.accept("domain", "nameserver", userinfo=True)
    service, _, namespace = locator.host.partition(".")
    if not service or not namespace or "." in namespace:
        raise locator.wrong("write k8s://SERVICE.NAMESPACE or k8s://SERVICE.NAMESPACE:PORT")
    domain = locator.options.get("domain", _CLUSTER_DOMAIN).strip(".")
    # With a dot at its end the name is whole: a pod's search domains would add five wrong guesses.
    return await _at_addresses(locator, f"{service}.{namespace}.svc.{domain}.", timeout_s)


async def _at_addresses(locator: Locator, name: str, timeout_s: float) -> list[Found]:
    port = DEFAULT_PORT if locator.port is None else locator.port
    addresses = await _addresses(locator, name, timeout_s)
    random.shuffle(addresses)  # so that clients spread over the servers
    return [Found(locator.url(address, port), note=name) for address in addresses]


async def _addresses(locator: Locator, name: str, timeout_s: float) -> list[str]:
    asker = _own_asker(locator, timeout_s)
    if asker is not None:
        return await _ask_addresses(locator, asker, name)
    try:
        found = await asyncio.wait_for(_system_addresses(name), timeout_s)
    except TimeoutError:
        raise _nothing(locator, f"no answer within {timeout_s:g} s", name) from None
    except (OSError, UnicodeError) as error:
        raise _nothing(locator, getattr(error, "strerror", None) or str(error), name) from error
    return list(dict.fromkeys(found))


async def _system_addresses(name: str) -> list[str]:
    """Ask the system's resolver, in a thread that nobody waits for.

    The loop's own ``getaddrinfo`` can't be given up: with a silent nameserver the process
    would end only when it has ended, some ten seconds after we have said what is wrong.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[str]] = loop.create_future()

    def settle(found: list[str] | OSError | UnicodeError) -> None:
        if answer.done():
            return
        if isinstance(found, Exception):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def ask() -> None:
        found: list[str] | OSError | UnicodeError
        try:
            items = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found = [str(item[4][0]) for item in items]
        except (OSError, UnicodeError) as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=ask, name="dns", daemon=True).start()
    return await answer


async def by_service(locator: Locator, timeout_s: float) -> list[Found]:
    """``dns+srv://_nats._tcp.DOMAIN``: the targets of the SRV records, best priority first.

    Targets stay names (as TLS wants them, with ``tls=true``) and are looked up
    when they are connected to; with ``nameserver`` that one also gives their
    addresses, because the system's resolver may not know them.

    Raises:
        ConfigError, BusUnavailableError: see `Resolver`.
    """
    locator.accept("nameserver", "tls", userinfo=True)
    if not locator.host or locator.port is not None:
        raise locator.wrong("write dns+srv://_nats._tcp.example.org; the records give the ports")
    tls = locator.options.get("tls", "false").lower()
    if tls not in ("true", "false"):
        raise locator.wrong("tls is true or false")
    scheme = "tls" if tls == "true" else "nats"
    own = _own_asker(locator, timeout_s)
    asker = own or _system_asker(locator, timeout_s)
    answer = await _ask(locator, asker, locator.host, "SRV")
    records = [
        Service(item.priority, item.weight, item.port, item.target.to_text(omit_final_dot=True))
        for item in answer
    ]
    services = [record for record in in_order(records) if record.target not in ("", ".")]
    if not services:
        raise _nothing(locator, "its SRV records say that there is no such service")
    found: list[Found] = []
    for service in services:
        note = f"priority {service.priority}, weight {service.weight}"
        if own is None or scheme == "tls":
            found.append(Found(locator.url(service.target, service.port, scheme=scheme), note=note))
            continue
        try:
            addresses = await _ask_addresses(locator, own, service.target)
        except BusUnavailableError:
            continue  # one target without an address doesn't hide the others
        note = f"{service.target}, {note}"
        found += [Found(locator.url(address, service.port), note=note) for address in addresses]
    if not found:
        raise _nothing(locator, "none of its SRV targets has an address")
    return found


def in_order(records: Sequence[Service]) -> list[Service]:
    """Records in the order to try them: by priority, then drawn at random by weight."""
    ordered: list[Service] = []
    for priority in sorted({record.priority for record in records}):
        left = [record for record in records if record.priority == priority]
        while left:
            # A little above zero, so that weight 0 has a small chance beside others.
            weights = [record.weight + 0.01 for record in left]
            (chosen,) = random.choices(range(len(left)), weights)
            ordered.append(left.pop(chosen))
    return ordered


# ---- asking --------------------------------------------------------------------------


def _own_asker(locator: Locator, timeout_s: float) -> Asker | None:
    """What asks the nameserver that the locator names; None if it names none."""
    text = locator.options.get("nameserver")
    if text is None:
        return None
    host, port = text, _DNS_PORT
    try:
        if text.startswith("["):
            host, _, rest = text[1:].partition("]")
            port = int(rest.removeprefix(":")) if rest else _DNS_PORT
        elif text.count(":") == 1:
            host, _, digits = text.partition(":")
            port = int(digits)
        ipaddress.ip_address(host)
    except ValueError:
        raise locator.wrong(
            f"the nameserver {text!r} is no IP address with an optional port, as in 10.0.0.10:53"
        ) from None
    asker = _asker_class(locator)(configure=False)
    asker.nameservers = [host]
    asker.port = port
    asker.lifetime = timeout_s
    return asker


def _system_asker(locator: Locator, timeout_s: float) -> Asker:
    kind = _asker_class(locator)
    from dns.exception import DNSException

    try:
        asker = kind()
    except (DNSException, OSError) as error:
        raise _nothing(locator, f"this machine has no nameserver configured ({error})") from error
    asker.lifetime = timeout_s
    return asker


def _asker_class(locator: Locator) -> type[Asker]:
    try:
        from dns.asyncresolver import Resolver as Kind
    except ImportError as error:
        raise ConfigError(
            f"{locator.shown} needs the package dnspython, which is not installed.",
            hint="Install it with `pip install 'foundation-nats[dns]'`.",
        ) from error
    return Kind


async def _ask(locator: Locator, asker: Asker, name: str, kind: str) -> Sequence[Any]:
    import dns.exception
    import dns.resolver

    servers = ", ".join(str(item) for item in asker.nameservers)
    try:
        answer = await asker.resolve(name, kind)
    except dns.resolver.NXDOMAIN:
        raise _nothing(locator, "there is no such name", name) from None
    except dns.resolver.NoAnswer:
        raise _nothing(locator, f"the name has no {kind} record", name) from None
    except dns.resolver.NoNameservers as error:
        raise _nothing(locator, f"the nameserver {servers} failed", name) from error
    except dns.exception.Timeout:
        raise _nothing(
            locator, f"the nameserver {servers} did not answer within {asker.lifetime:g} s", name
        ) from None
    except (dns.exception.DNSException, OSError, ValueError) as error:
        raise _nothing(locator, str(error) or type(error).__name__, name) from error
    return list(answer)


async def _ask_addresses(locator: Locator, asker: Asker, name: str) -> list[str]:
    answers = await asyncio.gather(
        *(_ask(locator, asker, name, kind) for kind in ("A", "AAAA")), return_exceptions=True
    )
    found: list[str] = []
    for answer in answers:
        if isinstance(answer, BaseException):
            if not isinstance(answer, BusUnavailableError):
                raise answer
        else:
            found += [item.address for item in answer]
    if not found:
        assert isinstance(answers[0], BaseException)
        raise answers[0]
    return list(dict.fromkeys(found))


def _nothing(locator: Locator, reason: str, name: str = "") -> BusUnavailableError:
    about = "" if name in ("", locator.host) else f" ({name.removesuffix('.')})"
    return BusUnavailableError(
        f"{locator.shown}{about} leads to no NATS server: {reason}.",
        hint="Check the name, or try `foundation discovery resolve`.",
    )
