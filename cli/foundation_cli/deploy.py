"""Commands that change what shall run: deploy, plan, scale, delete.

They wait until the wish is true and their exit code tells the truth: 5 when it
was not in time, with the reason per agent. The wish stands all the same.
"""

from __future__ import annotations

import time
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
_WAITING_SHOWN = 12
_REASONS_AFTER_S = 1.0
_SAID_EVERY_S = 1.0
_PASSED = "ok"
_AHEAD = " "
_PHASE_MARKS = {"ahead": " ", "under_way": "…", "passed": "ok", "failed": "!!"}
_MARKS = {
    "added": ("+", "green"),
    "removed": ("-", "red"),
    "changed": ("~", "yellow"),
    "same": ("=", "dim"),
}

_FATES = (
    ("placements", "+", "would start there"),
    ("restarting", "~", "would restart there"),
    ("leaving", "-", "would leave, drained; its state is kept"),
)
_FATE_COLUMNS = (
    Column("", lambda f: f[0]),
    Column("agent", lambda f: f[1]),
    Column("node", lambda f: f[2]),
    Column("what", lambda f: f[3], free=True),
)

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
_Purge = Annotated[
    bool,
    typer.Option(
        "--purge",
        help="Also delete the state and the mailboxes of the agents that go; for good.",
    ),
]
_Prune = Annotated[
    bool,
    typer.Option(
        "--prune",
        help="Delete what this manifest had applied before and doesn't name any more.",
    ),
]
_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The deployment's name.", autocompletion=complete.deployments
    ),
]


def progress_lines(statuses: Sequence[Any], *, why: bool = True) -> list[str]:
    """Each deployment's state in a line; with *why* the reasons of agents that don't run."""
    lines = []
    for status in statuses:
        mark = "ok" if status.settled else "…"
        counts = f"{status.running}/{status.desired} running"
        for word in ("pending", "failed"):
            if count := getattr(status, word):
                counts += f", {count} {word}"
        lines.append(f"{mark:<2}  {render.clean(status.name)}: {counts}")
        if not why:
            continue
        for agent, reason in list(status.reasons.items())[:_REASONS_SHOWN]:
            lines.append(f"      {render.clean(agent)}: {render.clean(reason)}")
        if len(status.reasons) > _REASONS_SHOWN:
            lines.append(f"      … and {len(status.reasons) - _REASONS_SHOWN} more")
    return lines


class Calm:
    """Lets a `Progress` say less: reasons are said of what lasts, and to a pipe not too often."""

    def __init__(self, shared: Shared) -> None:
        self.progress = Progress(shared)
        self._began = self._said_at = time.monotonic()
        self._passed = 0

    @property
    def knows_why(self) -> bool:
        """Whether it has lasted so long that reasons are worth a line."""
        return time.monotonic() - self._began >= _REASONS_AFTER_S

    def show(self, lines: Sequence[str]) -> None:
        """Replace what is shown; what has passed is always said."""
        now = time.monotonic()
        passed = sum(line.startswith(_PASSED) for line in lines)
        if not self.progress.repaints:
            if passed == self._passed and now - self._said_at < _SAID_EVERY_S:
                return
            lines = [line for line in lines if not line.startswith(_AHEAD)]
        self._said_at, self._passed = now, passed
        self.progress.show(lines)

    def end(self, lines: Sequence[str] = ()) -> None:
        """Leave *lines* standing."""
        self.progress.end(lines)


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
    calm = Calm(shared)

    def show(statuses: Sequence[Any]) -> None:
        calm.show(progress_lines(statuses, why=calm.knows_why))

    try:
        return list(
            await cluster.deployments.wait_settled(
                names, timeout=timeout_s, changed=changed, on_progress=show
            )
        )
    finally:
        calm.end()


async def apply_and_wait(
    cluster: Cluster, shared: Shared, manifest: Path, wait_s: float, *, prune: bool = False
) -> dict[str, Any]:
    """Deploy *manifest*, showing the phases; the document that `deploy -o json` prints."""
    read = cluster.deployments.manifest(manifest)
    names = [item.name for item in read.deployments]
    if wait_s <= 0:
        applied = await cluster.deployments.apply(read, prune=prune)
        changes = [change_json(item) for item in applied]
        if shared.format is Output.TABLE:
            for change in changes:
                render.talk(change_text(change))
        known = {status.name: status for status in await cluster.deployments.list()}
        return _document([], changes, [known[name] for name in names if name in known])
    calm = Calm(shared)
    shown: list[Any] = []

    def on_progress(report: Any) -> None:
        fresh = report.changes[len(shown) :]  # what is not core comes later
        if fresh and shared.format is Output.TABLE:
            shown.extend(fresh)
            calm.progress.clear()
            for item in fresh:
                render.talk(change_text(change_json(item)))
        shown_lines[:] = phase_lines(report, why=calm.knows_why)
        calm.show(shown_lines)

    shown_lines: list[str] = []
    try:
        report = await cluster.deployments.deploy(
            read,
            timeout=wait_s,
            prune=prune,
            on_progress=on_progress,
        )
    finally:
        calm.end([line for line in shown_lines if not line.startswith(_AHEAD)])
    changes = [change_json(item) for item in report.changes]
    return _document(report.phases, changes, report.statuses)


def _document(
    phases: Sequence[Any], changes: list[dict[str, Any]], statuses: Sequence[Any]
) -> dict[str, Any]:
    return {
        "schema": f"{render.SCHEMA}/deploy",
        "phases": render.plain(list(phases)),
        "ms": round(sum(phase.ms or 0.0 for phase in phases), 1),
        "changes": changes,
        "deployments": render.plain(list(statuses)),
    }


def phase_lines(report: Any, *, why: bool) -> list[str]:
    """Each phase in a line; under the one that is waiting for agents, those that are not there."""
    lines = []
    for phase in report.phases:
        mark = _PHASE_MARKS[str(phase.state)]
        took = "" if phase.ms is None else f"  ({_duration(phase.ms)})"
        text = f"{mark:<4}{phase.name!s:<10}{render.clean(phase.text) if phase.text else ''}"
        lines.append(f"{text}{took}".rstrip())
        if str(phase.name) in ("services", "agents") and str(phase.state) in (
            "under_way",
            "failed",
        ):
            waiting = [status for status in report.statuses if not status.settled]
            lines += [f"    {line}" for line in progress_lines(waiting[:_WAITING_SHOWN], why=why)]
            if len(waiting) > _WAITING_SHOWN:
                lines.append(f"    … and {len(waiting) - _WAITING_SHOWN} deployments more")
    return lines


def _duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


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
    prune: _Prune = False,
) -> None:
    """Store what shall run, and wait until it does: cluster, core services, agents, health.

    Example: foundation deploy agents.yaml --wait 1m
    """
    if plan:
        _plan(shared, manifest, exit_code=False, prune=prune)
        return

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            return await apply_and_wait(cluster, shared, manifest, wait, prune=prune)

    found = run(main)
    if not render.document(shared, found):
        render.table(DEPLOYMENT_COLUMNS, found["deployments"])


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
    prune: _Prune = False,
) -> None:
    """Show what a deploy would change, and what would start where.

    Example: foundation plan agents.yaml --exit-code
    """
    _plan(shared, manifest, exit_code=exit_code, prune=prune)


def _plan(shared: Shared, manifest: Path, *, exit_code: bool, prune: bool) -> None:
    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.deployments.plan(manifest, prune=prune)

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
        "restarting": _by_number(preview.restarting),
        "leaving": _by_number(preview.leaving),
        "nodes_up": preview.nodes_up,
        "min_nodes": preview.min_nodes,
        "dropped": list(preview.dropped),
    }


def _by_number(agents: dict[str, str]) -> dict[str, str]:
    """In the order of their numbers: NAME-10 after NAME-9."""

    def key(agent: str) -> tuple[str, int, str]:
        name, _, number = agent.rpartition("-")
        return (name, int(number), "") if number.isdecimal() else (agent, -1, agent)

    return {agent: agents[agent] for agent in sorted(agents, key=key)}


def show_plan(found: dict[str, Any]) -> None:
    """Print a plan for people."""
    for change in found["changes"]:
        render.write(change_text(change))
    if not found["differences"]:
        render.write("Nothing would change.")
    fates = [
        (mark, agent, node, how) for key, mark, how in _FATES for agent, node in found[key].items()
    ]
    if fates:
        render.write("")
        render.table(_FATE_COLUMNS, fates[:_PLACEMENTS_SHOWN])
        if len(fates) > _PLACEMENTS_SHOWN:
            render.write(f"… and {len(fates) - _PLACEMENTS_SHOWN} more (-o json has all)")
    if found["nodes_up"] < found["min_nodes"]:
        up = "1 node is" if found["nodes_up"] == 1 else f"{found['nodes_up']} nodes are"
        render.write(
            f"{render.styled('!', 'yellow')} {up} up, and the manifest asks for "
            f"{found['min_nodes']}: a deploy would wait for the others"
        )
    if found["dropped"]:
        names = ", ".join(found["dropped"][:_WAITING_SHOWN])
        more = " …" if len(found["dropped"]) > _WAITING_SHOWN else ""
        render.write(
            f"{render.styled('!', 'yellow')} {render.clean(names)}{more}: no longer in the manifest "
            "that has applied it; stays, unless --prune is given"
        )
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
    purge: _Purge = False,
) -> None:
    """Change how many agents a deployment has; the highest numbers leave first.

    Those that leave finish the signal in hand. Their state and what is in their mailboxes are kept
    and found again when the deployment grows, unless they are purged.

    Example: foundation scale counters 5
    """
    _check_purge(purge, wait)

    async def main() -> list[Any]:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, name, cluster.deployments.scale(name, replicas))
            if wait > 0:
                found = await wait_settled(cluster, shared, [name], wait)
                if purge:
                    await _purged(cluster, shared, name)
                return found
            return [await cluster.deployments.status(name)]

    statuses = run(main)
    _show(shared, statuses)
    if shared.format is Output.TABLE and any(status.autoscale for status in statuses):
        render.talk(f"{name} scales itself, and goes on from {replicas} by what there is to do.")


@with_shared
def delete(
    shared: Shared,
    name: _Name,
    wait: _Wait = WAIT_DEFAULT,  # type: ignore[assignment]
    purge: _Purge = False,
) -> None:
    """Stop a deployment's agents; their state is kept, unless it is purged.

    Example: foundation delete counters
    """
    _check_purge(purge, wait)

    async def main() -> list[str]:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, name, cluster.deployments.delete(name))
            if wait <= 0:
                return []
            await wait_settled(cluster, shared, [name], wait)
            return await _purged(cluster, shared, name) if purge else []

    found = run(main)
    document: dict[str, Any] = {"name": name, "deleted": True}
    if not render.document(shared, {**document, "purged": found} if purge else document):
        render.write(f"deleted {name}")


def _check_purge(purge: bool, wait: float) -> None:
    if purge and wait <= 0:
        raise typer.BadParameter(
            "what agents leave behind can be purged only once they have ended: don't say --wait 0.",
            param_hint="--purge",
        )


async def _purged(cluster: Cluster, shared: Shared, name: str) -> list[str]:
    found = await cluster.deployments.purge(name)
    if shared.format is Output.TABLE:
        render.talk(f"purged what {_agents(len(found))} left behind")
    return found


async def _with_suggestion(cluster: Cluster, name: str, change: Any) -> None:
    from foundation_nats.errors import DeploymentNotFoundError

    try:
        await change
    except DeploymentNotFoundError as error:
        names = [item.name for item in await cluster.deployments.list()]
        hint = did_you_mean(name, names) or "`foundation deployments` lists them."
        if Path(name).is_file():
            hint = "It is a file; what is asked for is the name of a deployment in it."
        raise DeploymentNotFoundError(
            f"There is no deployment {name!r} in cluster {cluster.name!r}.", hint=hint
        ) from error


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    for command in (deploy, plan, scale, delete):
        app.command()(command)
