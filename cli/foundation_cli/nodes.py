"""`foundation nodes`: lists them; `nodes add` and `nodes remove` scale the cluster.

Bare `nodes` prints a list, as JSON too: that is part of the contract.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, node, render, values
from foundation_cli.connection import (
    Output,
    Shared,
    connected,
    load_config,
    resolve,
    run,
    with_shared,
)
from foundation_cli.moves import offer
from foundation_cli.render import Column
from foundation_cli.status import NODE_COLUMNS

if TYPE_CHECKING:
    from foundation_nats.api.scaling import Removal, Removed
    from foundation_nats.config import Config
    from foundation_nats.launch.launcher import Launched, Launcher

_HELP = """List the nodes; add and remove some.

Example: foundation nodes -o json
"""
_ADD_MAX = 256
_REMOVE_S = 60.0

_REMOVED = (
    Column("node", lambda n: n["node"]),
    Column("drained", lambda n: n["drained"]),
    Column("how", lambda n: n["how"], free=True),
    Column("waiting for it", lambda n: ",".join(n["waiting"]), free=True),
)
_FATES = (
    Column("agent", lambda a: a["agent"]),
    Column("from", lambda a: a["source"]),
    Column("to", lambda a: a["target"] or "waits"),
    Column("why", lambda a: a["why"], free=True),
)

_Launcher = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="local|command|NAME",
        help="Who starts and ends nodes (local) [env: FOUNDATION_LAUNCHER__KIND].",
    ),
]


@with_shared
def _list(shared: Shared) -> None:
    async def main() -> tuple[Any, str | None]:
        async with connected(shared) as cluster:
            nodes = await cluster.nodes.list()
            hint = await offer(cluster, nodes) if shared.format is Output.TABLE else None
            return render.plain(nodes), hint

    found, hint = run(main)
    if not render.document(shared, found):
        render.table(NODE_COLUMNS, found, empty="No nodes. Start one with `foundation node start`.")
        if hint is not None:
            render.talk(hint)


def _list_when_bare(ctx: typer.Context, **arguments: Any) -> None:
    if ctx.invoked_subcommand is None:
        _list(ctx=ctx, **arguments)


_list_when_bare.__signature__ = inspect.signature(_list)  # type: ignore[attr-defined]
_list_when_bare.__annotations__ = {}
_list_when_bare.__doc__ = _HELP


def _settings(
    shared: Shared, launcher: str | None, *, add: str | None = None, remove: str | None = None
) -> tuple[Config, str, bool]:
    """The settings, which launcher, and whether somebody has said so."""
    config = load_config(resolve(shared))
    update = {key: text for key, text in (("add", add), ("remove", remove)) if text is not None}
    kind = launcher or ("command" if update else config.launcher.kind)
    section = config.launcher.model_copy(update={**update, "kind": kind})
    is_said = bool(launcher or update) or kind != "local"
    return config.model_copy(update={"launcher": section}), kind, is_said


@with_shared
def add(
    shared: Shared,
    count: Annotated[
        int, typer.Argument(metavar="K", min=1, max=_ADD_MAX, help="How many more.")
    ] = 1,
    prefix: Annotated[
        str,
        typer.Option("--name", "-n", metavar="PREFIX", help="Named PREFIX-1, PREFIX-2, …"),
    ] = "node",
    workers: node.Workers = None,
    imports: node.Imports = None,
    domain: node.Domains = None,
    label: node.Labels = None,
    capability: node.Capabilities = None,
    capacity: node.Capacity = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Serve metrics to Prometheus: the first at PORT, the second at PORT + 1, …",
        ),
    ] = None,
    log_json: node.LogJson = False,
    log_level: node.LogLevel = "info",
    launcher: _Launcher = None,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Start each by this command, such as 'ssh host {command:q}' "
            "[env: FOUNDATION_LAUNCHER__ADD].",
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="DURATION",
            parser=values.duration,
            help="How long to wait until they are up.",
            show_default="60s",
        ),
    ] = "60s",  # type: ignore[assignment]
    rebalance: Annotated[
        bool,
        typer.Option("--rebalance", help="Then give them their share of the agents."),
    ] = False,
) -> None:
    """Start more nodes and wait until they are up.

    They are processes of this machine that go on when the command ends, unless a launcher says
    otherwise.

    Example: foundation nodes add 2 --name worker --capability gpu
    """
    from foundation_schemas.base import is_name

    if not is_name(f"{prefix}-{_ADD_MAX}"):
        raise typer.BadParameter(
            f"{prefix!r} can't begin a node's name: use letters, digits, '-' and '_'.",
            param_hint="--name",
        )
    labels = values.pairs(label or [], "--label")
    capacities = values.numbers(capacity or [], "--capacity")
    domains = node.checked_domains(domain)
    level = node.checked_level(log_level)
    where = None if metrics is None else values.address(metrics, "--metrics")

    async def main() -> Any:
        from foundation_nats.api.scaling import add_nodes
        from foundation_nats.launch.launcher import LaunchOptions
        from foundation_nats.launch.registry import launcher_of

        config, kind, _ = _settings(shared, launcher, add=command)
        starter = launcher_of(kind, config)
        options = LaunchOptions(
            workers=workers,
            imports=tuple(imports or ()),
            labels=labels,
            capabilities=tuple(capability or ()),
            capacity=capacities,
            domains=domains,
            metrics=where,
            log_level=level,
            log_json=log_json,
        )
        async with connected(shared) as cluster:
            added = await add_nodes(
                cluster,
                starter,
                count,
                prefix=prefix,
                options=options,
                timeout=wait,
                started=lambda item: _say_started(shared, item),
            )
            moved, hint = None, None
            if rebalance:
                moved = len((await cluster.rebalance(timeout=wait)).moved)
                names = [node.name for node in added]
                added = [node for node in await cluster.nodes.list() if node.name in names]
            elif shared.format is Output.TABLE:
                hint = await offer(cluster, await cluster.nodes.list())
            return render.plain(added), moved, hint

    found, moved, hint = run(main)
    document = {"schema": f"{render.SCHEMA}/nodes-added", "added": found}
    if render.document(shared, document if moved is None else {**document, "moved": moved}):
        return
    render.table(NODE_COLUMNS, found)
    if moved is not None:
        render.talk(f"{moved} agents were moved.")
    if hint is not None:
        render.talk(hint)


def _say_started(shared: Shared, item: Launched) -> None:
    if shared.format is Output.TABLE:
        log = "" if item.log is None else f"; its log: {item.log}"
        render.talk(f"{item.name} is starting{log}")


@with_shared
def remove(
    shared: Shared,
    names: Annotated[
        list[str],
        typer.Argument(metavar="NODE…", help="Which nodes.", autocompletion=complete.nodes),
    ],
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="DURATION",
            parser=values.duration,
            help="How long they may take to hand over their agents and leave (60s; or --timeout).",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also if no node is left to take the agents.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show what would become of their agents.")
    ] = False,
    launcher: _Launcher = None,
    command: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Clear each away by this command once it has left, such as 'docker rm -f {name}' "
            "[env: FOUNDATION_LAUNCHER__REMOVE].",
        ),
    ] = None,
) -> None:
    """Drain nodes and end them; their agents go elsewhere first.

    A node that was not started by `nodes add` is asked to drain and end by itself.

    Example: foundation nodes remove node-3 --plan
    """

    limit = next((given for given in (wait, shared.timeout) if given is not None), _REMOVE_S)

    async def main() -> list[dict[str, Any]] | Removal:
        from foundation_nats.api.scaling import plan_removal, remove_nodes
        from foundation_nats.launch.registry import launcher_of, starter_of

        config, kind, is_said = _settings(shared, launcher, remove=command)

        def launcher_for(name: str) -> Launcher | None:
            return starter_of(name, config) or (launcher_of(kind, config) if is_said else None)

        async with connected(shared) as cluster:
            if plan:
                for name in names:
                    await cluster.nodes.get(name)
                return await plan_removal(cluster, names)
            return [
                render.plain(item)
                for item in await remove_nodes(
                    cluster,
                    names,
                    launcher_of=launcher_for,
                    timeout=limit,
                    force=force,
                    removed=lambda item: _say_removed(shared, item),
                )
            ]

    found = run(main)
    if isinstance(found, list):
        document = {"schema": f"{render.SCHEMA}/nodes-removed", "removed": found}
        if not render.document(shared, document):
            render.table(_REMOVED, found)
        return
    _show_plan(shared, found)


def _say_removed(shared: Shared, item: Removed) -> None:
    if shared.format is Output.TABLE and not item.drained:
        render.talk(f"{item.node} {item.how}; what it had is recovered from what was stored.")


def _show_plan(shared: Shared, found: Removal) -> None:
    fates: list[dict[str, Any]] = [
        {"agent": move.agent, "source": name, "target": move.target, "why": move.why}
        for name, drain in found.drains.items()
        for move in drain.moves
    ]
    fates += [
        {
            "agent": agent,
            "source": name,
            "target": None,
            "why": "; ".join(f"{node} {why}" for node, why in reasons.items()) or "no other node",
        }
        for name, drain in found.drains.items()
        for agent, reasons in drain.stuck.items()
    ]
    document = {
        "schema": f"{render.SCHEMA}/nodes-removal-plan",
        "agents": fates,
        "moves": found.moves,
        "waits": len(found.stuck),
        "last": found.is_last,
    }
    if render.document(shared, document):
        return
    render.table(_FATES, fates, empty="They hold no agents.")
    text = f"{found.moves} would move, {len(found.stuck)} would wait."
    if found.is_last:
        text += " No node would be left: this needs --force."
    render.talk(text)


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="nodes",
        help=_HELP,
        callback=_list_when_bare,
        invoke_without_command=True,
        rich_markup_mode=None,
    )
    for command in (add, remove):
        group.command()(command)
    app.add_typer(group)
