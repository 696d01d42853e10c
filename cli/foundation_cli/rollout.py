"""Commands for rollouts: how far a changed spec has come; pause, resume and undo it; earlier specs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Shared, connected, group_callback, run, with_shared
from foundation_cli.render import Column

if TYPE_CHECKING:
    from foundation_nats import Cluster

_HELP = "The passage of a deployment's agents to a changed spec: status, pause, resume, undo."

_Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A deployment.", autocompletion=complete.deployments)
]

_HISTORY = (
    Column("revision", lambda row: row["revision"], right=True),
    Column("outcome", lambda row: row["outcome"]),
    Column("run", lambda row: row["spec"]["run"]),
    Column("replaced", lambda row: render.age(row["at"]) if row["at"] else None),
    Column("reason", lambda row: row["reason"], free=True),
)


@with_shared
def status(
    shared: Shared,
    name: _Name,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="Wait for its end, so long at most.",
        ),
    ] = None,
) -> None:
    """Show how far the agents have come to the present spec.

    With --wait: exit code 0 when all run it, 1 when it was rolled back or is stuck, 5 when
    it did not end in time.

    Example: foundation rollout status worker --wait 60s
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            if wait is not None:
                await cluster.deployments.wait_rollout(name, timeout=wait)
            return await _shown(cluster, name)

    _show(shared, run(main))


@with_shared
def pause(shared: Shared, name: _Name) -> None:
    """Restart no further agent for the changed spec.

    Example: foundation rollout pause worker
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            await cluster.deployments.pause(name)
            return await _shown(cluster, name)

    _show(shared, run(main))


@with_shared
def resume(shared: Shared, name: _Name) -> None:
    """Go on with a paused rollout.

    Example: foundation rollout resume worker
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            await cluster.deployments.resume(name)
            return await _shown(cluster, name)

    _show(shared, run(main))


@with_shared
def undo(
    shared: Shared,
    name: _Name,
    to: Annotated[
        int | None, typer.Option(metavar="REVISION", min=1, help="This one of `rollout history`.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            metavar="DURATION",
            parser=values.duration,
            help="How long to wait for the agents; 0s does not wait.",
        ),
    ] = "60s",  # type: ignore[assignment]
) -> None:
    """Wish for an earlier spec again.

    Example: foundation rollout undo worker --to 3
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            await cluster.deployments.undo(name, to=to)
            if wait:
                await cluster.deployments.wait_rollout(name, timeout=wait)
            return await _shown(cluster, name)

    _show(shared, run(main))


@with_shared
def history(shared: Shared, name: _Name) -> None:
    """List the earlier specs that are remembered, the last one last.

    Example: foundation rollout history worker
    """

    async def main() -> list[dict[str, Any]]:
        async with connected(shared) as cluster:
            return [render.plain(item) for item in await cluster.deployments.history(name)]

    found = run(main)
    if not render.document(shared, found):
        render.table(_HISTORY, found, empty="It never had another spec.")


async def _shown(cluster: Cluster, name: str) -> dict[str, Any]:
    found = await cluster.deployments.rollout(name)
    return {
        "name": found.name,
        "revision": found.revision,
        "phase": found.phase.value,
        "desired": found.desired,
        "updated": found.updated,
        "outdated": found.outdated,
        "failing": found.failing,
        "rolled_back": found.rolled_back,
        "stuck": found.stuck,
    }


def _show(shared: Shared, found: dict[str, Any]) -> None:
    if render.document(shared, found):
        return
    render.record(
        [
            ("deployment", found["name"]),
            ("revision", found["revision"]),
            ("phase", found["phase"]),
            ("updated", f"{found['updated']} of {found['desired']}"),
            ("outdated", found["outdated"] or None),
            ("rolled back", found["rolled_back"]),
            ("stuck", found["stuck"]),
            *((f"  {agent}", why) for agent, why in found["failing"].items()),
        ]
    )


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="rollout",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for command in (status, pause, resume, undo, history):
        group.command()(command)
    app.add_typer(group)
