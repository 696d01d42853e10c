"""Commands that change what shall run: deploy, plan, scale, delete.

They wait until the wish is true and their exit code tells the truth: 5 when it
was not in time, with the reason per agent. The wish stands all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Output, Shared, connected, run, with_shared
from foundation_cli.render import Column, Progress
from foundation_cli.status import DEPLOYMENT_COLUMNS, did_you_mean

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

WAIT_DEFAULT = "30s"
_REASONS_SHOWN = 5
_PLACEMENTS_SHOWN = 40
_MARKS = {
    "added": ("+", "green"),
    "removed": ("-", "red"),
    "changed": ("~", "yellow"),
    "same": ("=", "dim"),
}

_Manifest = Annotated[
    Path,
    typer.Argument(metavar="MANIFEST", help="A YAML file.", exists=True, dir_okay=False),
]
_Wait = Annotated[
    float,
    typer.Option(
        "--wait",
        metavar="DURATION",
        parser=values.duration,
        help="How long to wait until it is true; 0s does not wait.",
        show_default=WAIT_DEFAULT,
    ),
]
_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The deployment's name.", autocompletion=complete.deployments
    ),
]


def progress_lines(statuses: Sequence[Any]) -> list[str]:
    """Each deployment's state in a line, with the reasons of agents that don't run."""
    lines = []
    for status in statuses:
        mark = "ok" if status.settled else "…"
        counts = f"{status.running}/{status.desired} running"
        for word in ("pending", "failed"):
            if count := getattr(status, word):
                counts += f", {count} {word}"
        lines.append(f"{mark:<2}  {render.clean(status.name)}: {counts}")
        for agent, reason in list(status.reasons.items())[:_REASONS_SHOWN]:
            lines.append(f"      {render.clean(agent)}: {render.clean(reason)}")
        if len(status.reasons) > _REASONS_SHOWN:
            lines.append(f"      … and {len(status.reasons) - _REASONS_SHOWN} more")
    return lines


async def wait_settled(
    cluster: Cluster,
    shared: Shared,
    names: list[str],
    timeout_s: float,
    changed: Collection[str] = (),
) -> list[Any]:
    """Wait until *names* are as wished, showing progress.

    Raises:
        RolloutFailedError: one of *changed* was rolled back.
        NotSettledError: not in time; says why, per agent.
    """
    progress = Progress(shared)
    try:
        return list(
            await cluster.deployments.wait_settled(
                names,
                timeout=timeout_s,
                changed=changed,
                on_progress=lambda statuses: progress.show(progress_lines(statuses)),
            )
        )
    finally:
        progress.clear()


async def apply_and_wait(
    cluster: Cluster, shared: Shared, manifest: Path, wait_s: float
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Apply *manifest*; returns the changes, and wish and fact of all it names."""
    names = [item.name for item in cluster.deployments.read(manifest)]
    changes = [change_json(change) for change in await cluster.deployments.apply(manifest)]
    if shared.format is Output.TABLE:
        for change in changes:
            render.talk(change_text(change))
    if wait_s > 0:
        changed = [item["name"] for item in changes if item["restarts"]]
        return changes, await wait_settled(cluster, shared, names, wait_s, changed)
    known = {status.name: status for status in await cluster.deployments.list()}
    return changes, [known[name] for name in names if name in known]


def change_json(change: Any) -> dict[str, Any]:
    """A `DeploymentChange` as JSON."""
    before, after = change.before, change.after
    return {
        "name": change.name,
        "kind": change.kind.name.lower(),
        "agents_before": 0 if before is None else before.size(),
        "agents_after": 0 if after is None else after.size(),
        "restarts": change.restarts,
        "fields": [render.plain(item) for item in change.fields],
    }


def change_text(change: dict[str, Any]) -> str:
    """A change in a line."""
    mark, style = _MARKS[change["kind"]]
    before, after = change["agents_before"], change["agents_after"]
    match change["kind"]:
        case "added":
            text = f"{_agents(after)}, new"
        case "removed":
            text = f"{_agents(before)}, removed"
        case "same":
            text = f"{_agents(after)}, no change"
        case _:
            fields = [
                f"{item['name']}: {render.json_text(item['before'])} → "
                f"{render.json_text(item['after'])}"
                for item in change["fields"]
            ]
            text = ", ".join(fields) + (" (restarts its agents)" if change["restarts"] else "")
    return f"{render.styled(mark, style)} {render.clean(change['name'])}: {render.clean(text)}"


def _agents(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


@with_shared
def deploy(
    shared: Shared,
    manifest: _Manifest,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would change.")] = False,
    wait: _Wait = WAIT_DEFAULT,  # type: ignore[assignment]
) -> None:
    """Store what shall run, and wait until it does.

    Example: foundation deploy agents.yaml --wait 1m
    """
    if plan:
        _plan(shared, manifest, exit_code=False)
        return

    async def main() -> list[Any]:
        async with connected(shared) as cluster:
            return (await apply_and_wait(cluster, shared, manifest, wait))[1]

    _show(shared, run(main))


def _show(shared: Shared, statuses: list[Any]) -> None:
    found = render.plain(statuses)
    if not render.document(shared, found):
        render.table(DEPLOYMENT_COLUMNS, found)


@with_shared
def plan(
    shared: Shared,
    manifest: _Manifest,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 6 if anything would change.")
    ] = False,
) -> None:
    """Show what a deploy would change, and what would start where.

    Example: foundation plan agents.yaml --exit-code
    """
    _plan(shared, manifest, exit_code=exit_code)


def _plan(shared: Shared, manifest: Path, *, exit_code: bool) -> None:
    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.deployments.plan(manifest)

    found = plan_json(run(main))
    if not render.document(shared, found):
        show_plan(found)
    if exit_code and found["differences"]:
        raise typer.Exit(render.DIFFERENCES)


def plan_json(preview: Any) -> dict[str, Any]:
    """A `Preview` as JSON."""
    changes = [change_json(change) for change in preview.changes]
    return {
        "schema": f"{render.SCHEMA}/plan",
        "differences": any(change["kind"] != "same" for change in changes),
        "changes": changes,
        "placements": render.plain(preview.placements),
        "unplaceable": render.plain(preview.unplaceable),
    }


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan for people."""
    for change in found["changes"]:
        render.write(change_text(change))
    if not found["differences"]:
        render.write("Nothing would change.")
    placements = list(found["placements"].items())
    if placements:
        render.write("")
        render.table(
            (Column("agent", lambda p: p[0]), Column("would start on", lambda p: p[1])),
            placements[:_PLACEMENTS_SHOWN],
        )
        if len(placements) > _PLACEMENTS_SHOWN:
            render.write(f"… and {len(placements) - _PLACEMENTS_SHOWN} more")
    for agent, reasons in list(found["unplaceable"].items())[:_PLACEMENTS_SHOWN]:
        why = "; ".join(f"{node}: {reason}" for node, reason in reasons.items()) or "no node is up"
        render.write(
            f"{render.styled('!', 'yellow')} {render.clean(agent)} would wait: {render.clean(why)}"
        )


@with_shared
def scale(
    shared: Shared,
    name: _Name,
    replicas: Annotated[int, typer.Argument(metavar="N", min=0, help="How many agents.")],
    wait: _Wait = WAIT_DEFAULT,  # type: ignore[assignment]
) -> None:
    """Change how many agents a deployment has.

    Example: foundation scale counters 5
    """

    async def main() -> list[Any]:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, name, cluster.deployments.scale(name, replicas))
            if wait > 0:
                return await wait_settled(cluster, shared, [name], wait)
            return [await cluster.deployments.status(name)]

    _show(shared, run(main))


@with_shared
def delete(
    shared: Shared,
    name: _Name,
    wait: _Wait = WAIT_DEFAULT,  # type: ignore[assignment]
) -> None:
    """Stop a deployment's agents; their state is kept.

    Example: foundation delete counters
    """

    async def main() -> None:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, name, cluster.deployments.delete(name))
            if wait > 0:
                await wait_settled(cluster, shared, [name], wait)

    run(main)
    if not render.document(shared, {"name": name, "deleted": True}):
        render.write(f"deleted {name}")


async def _with_suggestion(cluster: Cluster, name: str, change: Any) -> None:
    from foundation_nats.errors import DeploymentNotFoundError

    try:
        await change
    except DeploymentNotFoundError as error:
        names = [item.name for item in await cluster.deployments.list()]
        raise DeploymentNotFoundError(
            f"There is no deployment {name!r} in cluster {cluster.name!r}.",
            hint=did_you_mean(name, names) or "`foundation deployments` lists them.",
        ) from error


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    for command in (deploy, plan, scale, delete):
        app.command()(command)
