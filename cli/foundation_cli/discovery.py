"""Commands that find NATS servers, and that make one known on the local network.

`resolve` looks up what `--server` would, and connects to nothing; `announce` is
a service: it speaks for a server as long as that answers, and ends with exit
code 0 on Ctrl-C or SIGTERM after having withdrawn the announcement.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Output, Shared, group_callback, resolve, run, with_shared
from foundation_cli.render import Column

if TYPE_CHECKING:
    from foundation_nats.discovery.mdns import Announcement

_HELP = "Finding NATS servers: what a locator leads to, and announcing one on the local network."
_LOOK_EVERY_S = 2.0
_MISSES_MAX = 2

_COLUMNS = (
    Column("url", lambda row: row["url"]),
    Column("cluster", lambda row: row["cluster"]),
    Column("locator", lambda row: row["locator"]),
    Column("note", lambda row: row["note"], free=True),
)


@with_shared
def resolve_(
    shared: Shared,
    locators: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[LOCATOR]...",
            help="dns://NAME, dns+srv://NAME, k8s://SERVICE.NAMESPACE, file:///PATH, mdns://CLUSTER "
            "or a NATS URL; without any, what the other commands would use.",
        ),
    ] = None,
) -> None:
    """Show which servers a locator leads to now; connects to none of them.

    All must lead somewhere: exit code 3 if one doesn't, 2 if one is wrong.

    Example: foundation discovery resolve dns+srv://_nats._tcp.example.org
    """
    wanted = tuple(locators or resolve(shared).urls)

    async def main() -> list[dict[str, Any]]:
        import asyncio

        from foundation_nats.discovery import locator, servers

        answers = await asyncio.gather(*(servers.find(text, shared.timeout_s) for text in wanted))
        return [
            {
                "url": locator.shown(found.url),
                "cluster": found.cluster,
                "locator": locator.shown(text),
                "note": found.note or None,
            }
            for text, answer in zip(wanted, answers, strict=True)
            for found in answer
        ]

    rows = run(main)
    if not render.document(shared, rows):
        render.table(_COLUMNS, rows, empty="Nothing found.")


@with_shared
def announce(
    shared: Shared,
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Announce on the network of this address of this machine."
        ),
    ] = None,
) -> None:
    """Make the server known on the local network by mDNS, until stopped.

    What is announced is the server that the options name, or the running `foundation up`. Others
    find it by mdns://CLUSTER. It is withdrawn while the server does not answer.

    Example: foundation discovery announce --server nats://192.168.1.20:4222 --cluster bench
    """
    found = resolve(shared)

    async def main() -> None:
        await _announce(found.urls, found.cluster, shared, interface)

    run(main)


async def _announce(
    urls: tuple[str, ...], cluster: str, shared: Shared, interface: str | None
) -> None:
    import asyncio
    import signal

    from foundation_nats.discovery import locator
    from foundation_nats.discovery.mdns import Announcement
    from foundation_nats.errors import BusUnavailableError, ConfigError

    if len(urls) != 1 or locator.is_locator(urls[0]):
        raise ConfigError(
            "Only one server can be announced, by its URL.",
            hint="Name it with --server nats://ADDRESS:PORT.",
        )
    if not await _answers(urls[0], shared.timeout_s):
        raise BusUnavailableError(
            f"No NATS server answers at {locator.shown(urls[0])}, so it is not announced.",
            hint="Start one with `foundation up`, or name it with --server.",
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    async with Announcement(urls[0], cluster, interface=interface) as announcement:
        _say(announcement, shared)
        misses = 0
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK_EVERY_S)
            if stop.is_set():
                break
            misses = 0 if await _answers(urls[0], _LOOK_EVERY_S) else misses + 1
            if misses == _MISSES_MAX and announcement.is_announced:
                render.talk("The server does not answer; the announcement is withdrawn.")
                await announcement.withdraw()
            elif misses == 0 and not announcement.is_announced:
                render.talk("The server answers again; it is announced.")
                await announcement.announce()


def _say(announcement: Announcement, shared: Shared) -> None:
    addresses = ", ".join(announcement.addresses)
    facts = {
        "locator": f"mdns://{announcement.cluster}",
        "name": announcement.name,
        "addresses": announcement.addresses,
        "this_machine_only": announcement.is_local,
    }
    if render.document(shared, facts):
        return
    render.write(f"Announced: {addresses}. Others find it by mdns://{announcement.cluster}")
    if announcement.is_local and shared.format is Output.TABLE:
        render.talk(
            "warning: the server listens on this machine only, and only this machine hears of it. "
            "To be reached by others it must listen on an address of the network."
        )


async def _answers(url: str, timeout_s: float) -> bool:
    """Whether a NATS server greets at *url*."""
    import asyncio
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
            return (await reader.read(5)) == b"INFO "
    except (OSError, TimeoutError, ValueError):
        return False
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="discovery",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("resolve")(resolve_)
    group.command()(announce)
    app.add_typer(group)
