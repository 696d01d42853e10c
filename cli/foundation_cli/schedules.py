"""Commands for what is to be sent later: list it, cancel it. `foundation send --after` sets it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared
from foundation_cli.render import Column

_HELP = "Signals that are to be sent later: list, cancel."


def _again(info: dict[str, Any]) -> str | None:
    if info["cron"] is not None:
        zone = info["zone"] or "UTC"
        return info["cron"] if zone == "UTC" else f"{info['cron']} ({zone})"
    return None if info["every_s"] is None else f"every {info['every_s']:g} s"


_COLUMNS = (
    Column("name", lambda i: i["name"]),
    Column("due", lambda i: i["due"][:19] + "Z"),
    Column("again", _again),
    Column("for", lambda i: i["target"]),
    Column("type", lambda i: i["type"]),
    Column("from", lambda i: i["source"], free=True),
)


@with_shared
def list_(
    shared: Shared,
    agent: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Only the timers of this agent.", autocompletion=complete.agents
        ),
    ] = None,
) -> None:
    """List what is to be sent later, the next one first.

    Example: foundation schedules list
    """

    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.signals.schedules(agent)

    found = render.plain(run(main))
    if not render.document(shared, found):
        render.table(_COLUMNS, found, empty="Nothing is to be sent later.")


@with_shared
def cancel(
    shared: Shared,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="As `schedules list` shows them: ID or AGENT/NAME."),
    ],
) -> None:
    """Cancel what was to be sent later.

    Example: foundation schedules cancel nightly
    """

    async def main() -> Any:
        async with connected(shared) as cluster:
            return [await cluster.signals.cancel(name, timeout=shared.timeout_s) for name in names]

    found = render.plain(run(main))
    if not render.document(shared, found):
        for info in found:
            render.write(f"cancelled {render.clean(info['name'])}")


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="schedules",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("list")(list_)
    group.command()(cancel)
    app.add_typer(group)
