"""Commands for dead letters: list, show, replay and discard signals that were given up.

`replay` sends the signal to its agent again and removes the letter; `discard`
removes it for good. Numbers are those `dead list` shows.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared
from foundation_cli.render import Column

_HELP = "Signals that were given up: list, show, replay, discard."

_COLUMNS = (
    Column("number", lambda d: d["number"], right=True),
    Column("agent", lambda d: d["letter"]["agent"]),
    Column("type", lambda d: (d["letter"]["signal"] or {}).get("type")),
    Column("signal", lambda d: (d["letter"]["signal"] or {}).get("id")),
    Column("code", lambda d: d["letter"]["code"]),
    Column("attempts", lambda d: d["letter"]["attempts"], right=True),
    Column("age", lambda d: render.age(d["letter"]["at"])),
    Column("reason", lambda d: d["letter"]["reason"], free=True),
)

_Number = Annotated[
    int, typer.Argument(metavar="NUMBER", min=1, help="The number `dead list` shows.")
]
_Numbers = Annotated[
    list[int], typer.Argument(metavar="NUMBER...", min=1, help="The numbers `dead list` shows.")
]


def entry_json(entry: Any) -> dict[str, Any]:
    """A `DeadEntry` as JSON."""
    return {"number": entry.number, "letter": render.plain(entry.letter)}


@with_shared
def list_(
    shared: Shared,
    agent: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only of this agent.", autocompletion=complete.agents),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="At most N.")] = 100,
) -> None:
    """List the dead letters, oldest first.

    Example: foundation dead list --agent visits
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            return [entry_json(entry) for entry in await cluster.dead.list(agent, limit=limit)]

    found = run(main)
    if not render.document(shared, found):
        render.table(_COLUMNS, found, empty="No dead letters.")


@with_shared
def show(shared: Shared, number: _Number) -> None:
    """Show one dead letter with its payload and traceback.

    Example: foundation dead show 1
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            return entry_json(await cluster.dead.show(number))

    found = run(main)
    if render.document(shared, found):
        return
    letter = found["letter"]
    signal = letter["signal"] or {}
    render.record(
        [
            ("number", found["number"]),
            ("agent", letter["agent"]),
            ("reason", letter["reason"]),
            ("code", letter["code"]),
            ("attempts", letter["attempts"]),
            ("at", letter["at"]),
            ("type", signal.get("type")),
            ("id", signal.get("id")),
            ("source", signal.get("source")),
            ("data", render.json_text(signal.get("data")) if signal else letter["raw"]),
        ]
    )
    for line in (letter["traceback"] or "").splitlines():
        indent = len(line) - len(line.lstrip())
        render.write("  " + " " * indent + (render.clean(line.strip()) if line.strip() else ""))
    render.talk(
        f"Send it again with `foundation dead replay {number}`, "
        f"or drop it with `foundation dead discard {number}`."
    )


@with_shared
def replay(shared: Shared, numbers: _Numbers) -> None:
    """Send dead letters to their agents again.

    Example: foundation dead replay 1 2
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            return [
                {"number": number, "receipt": render.plain(await cluster.dead.replay(number))}
                for number in numbers
            ]

    found = run(main)
    if not render.document(shared, found):
        for item in found:
            receipt = item["receipt"]
            render.write(
                f"replayed {item['number']}: stored {render.clean(receipt['id'])} for "
                f"{render.clean(receipt['target'])}, sequence {receipt['sequence']}"
            )


@with_shared
def discard(shared: Shared, numbers: _Numbers) -> None:
    """Remove dead letters for good.

    Example: foundation dead discard 3
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            for number in numbers:
                await cluster.dead.discard(number)
            return [{"number": number, "discarded": True} for number in numbers]

    found = run(main)
    if not render.document(shared, found):
        for item in found:
            render.write(f"discarded {item['number']}")


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="dead",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("list")(list_)
    group.command()(show)
    group.command()(replay)
    group.command()(discard)
    app.add_typer(group)
