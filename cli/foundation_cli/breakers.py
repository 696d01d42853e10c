"""`foundation breakers`: the circuit breakers that clients and workers have told of.

Breakers are in the memory of each process. What the command shows are their last words, from the events.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.render import Column

_COLUMNS = (
    Column("target", lambda row: row["target"]),
    Column("state", lambda row: row["state"]),
    Column("since", lambda row: render.age(row["since"])),
    Column("told by", lambda row: row["source"]),
    Column("for", lambda row: row["kind"]),
    Column("opened", lambda row: row["opened"], right=True),
    Column("refused", lambda row: row["refused"], right=True),
)


@with_shared
def breakers(
    shared: Shared,
    all: Annotated[bool, typer.Option("--all", help="Those that are closed again, too.")] = False,
) -> None:
    """List the circuit breakers that are open or half open, as clients and workers have last told.

    One whose process has ended says nothing more, and stays as it was until its events are gone.

    Example: foundation breakers --all
    """

    async def main() -> list[Any]:
        async with connected(shared) as cluster:
            found = await cluster.reported_breakers()
            return [one for one in found if all or one.state != "closed"]

    found = render.plain(run(main))
    if not render.document(shared, found):
        render.table(_COLUMNS, found, empty="No breaker is open.")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(breakers)
