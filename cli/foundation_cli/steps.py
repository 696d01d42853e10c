"""Commands for steps outside NATS (`ctx.once`): which are done or in doubt, and a person's word.

A step in doubt was begun, and nobody here can know whether it was done. Where the agent leaves
that to people, its signal is a dead letter: find out, say it with `resolve`, replay the letter.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import complete, render
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared
from foundation_cli.render import Column
from foundation_cli.values import json_value

_HELP = "Steps that agents did outside: list them, and settle those in doubt."


def _result(step: dict[str, Any]) -> str:
    return "(too large)" if step["lost"] else str(render.json_text(step["result"]))


_COLUMNS = (
    Column("key", lambda s: s["key"]),
    Column("status", lambda s: s["status"]),
    Column("attempts", lambda s: s["attempts"], right=True),
    Column("age", lambda s: render.age(s["at"])),
    Column("signal", lambda s: s["cause"].partition(" ")[2] or "(the agent's own)"),
    Column(
        "result",
        lambda s: s["note"] or (None if s["status"] == "pending" else _result(s)),
        free=True,
    ),
)

_Agent = Annotated[
    str, typer.Argument(metavar="AGENT", help="Its id.", autocompletion=complete.agents)
]


@with_shared
def list_(shared: Shared, agent: _Agent) -> None:
    """List the steps of an agent whose signals have not taken effect yet.

    Example: foundation steps list clerk
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            return [render.plain(step) for step in await cluster.agents.steps(agent)]

    found = run(main)
    if not render.document(shared, found):
        render.table(_COLUMNS, found, empty="No steps are remembered.")


@with_shared
def resolve(
    shared: Shared,
    agent: _Agent,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The step, as `steps list` shows it.")],
    done: Annotated[
        bool | None,
        typer.Option("--done/--again", help="It was done; or it was not, and may be begun again."),
    ] = None,
    result: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="With --done: what the step would have returned."),
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Its signal, where several have a step of this key."),
    ] = None,
) -> None:
    """Say of a step in doubt whether it was done; then replay the dead letter.

    Example: foundation steps resolve clerk pay --done --result '{"number": 5}'
    """
    if done is None:
        raise typer.BadParameter("Say --done if it was done, --again if it was not.")
    if result is not None and not done:
        raise typer.BadParameter("--result goes with --done.")
    value = None if result is None else json_value(result)

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            step = await cluster.agents.resolve_step(
                agent, key, signal=signal, done=done, result=value, timeout=shared.timeout_s
            )
            return dict(render.plain(step))

    step = run(main)
    if not render.document(shared, step):
        word = "done" if done else "to be done again"
        render.write(f"{render.clean(key)} of {render.clean(agent)} is {word}")
        render.talk("`foundation dead list` shows whether its signal waits for a replay.")


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="steps",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("list")(list_)
    group.command()(resolve)
    app.add_typer(group)
