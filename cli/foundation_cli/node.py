"""`foundation node start`: this process becomes one node of the cluster.

SIGTERM or Ctrl-C drains and stops with exit code 0; a second one stops at
once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from foundation_cli import values
from foundation_cli.connection import (
    Shared,
    group_callback,
    load_config,
    resolve,
    with_shared,
)

_HELP = "Nodes: processes that host agents."
_LEVELS = ("debug", "info", "warning", "error")

# What a node runs with, wherever it is started.
Workers = Annotated[
    int | None,
    typer.Option(metavar="K", min=1, max=1024, help="Worker processes (one per core)."),
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import at start; may be repeated."),
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="Follow this replicated domain from the start on; may be repeated.",
    ),
]
Labels = Annotated[list[str] | None, typer.Option(metavar="K=V", help="A label; may be repeated.")]
Capabilities = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="What the node offers; may be repeated."),
]
Capacity = Annotated[
    list[str] | None,
    typer.Option(metavar="K=N", help="A limit, such as slots=500; may be repeated."),
]
LogJson = Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")]
LogLevel = Annotated[str, typer.Option(metavar="LEVEL", help=f"{', '.join(_LEVELS)}.")]


def checked_level(level: str) -> str:
    """The level in small letters.

    Raises:
        typer.BadParameter: there is none of this name.
    """
    if level.lower() not in _LEVELS:
        raise typer.BadParameter(
            f"{level!r} is none of {', '.join(_LEVELS)}.", param_hint="--log-level"
        )
    return level.lower()


def checked_domains(domains: list[str] | None) -> tuple[str, ...]:
    """The domains.

    Raises:
        typer.BadParameter: one is not written as a module and a class.
    """
    for wanted in domains or []:
        module, colon, kind = wanted.partition(":")
        if not (module and colon and kind):
            raise typer.BadParameter(
                f"{wanted!r} is not of the form 'module:Class'.", param_hint="--domain"
            )
    return tuple(domains or ())


def _find_modules_here() -> None:
    """Let this process and its workers import from the working directory."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *paths])


def _check_found(modules: list[str], option: str = "--import") -> None:
    """Refuse a module that is nowhere now, rather than by workers that die of it again and again.

    Nothing is imported: this process runs no agent code.
    """
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module.partition(".")[0]) is None:
            raise typer.BadParameter(
                f"there is no module {module!r} in {os.getcwd()} or on PYTHONPATH.",
                param_hint=option,
            )


@with_shared
def start(
    shared: Shared,
    name: Annotated[
        str | None,
        typer.Option("--name", "-n", metavar="NAME", help="The node's name (from the host's)."),
    ] = None,
    workers: Workers = None,
    imports: Imports = None,
    domain: Domains = None,
    label: Labels = None,
    capability: Capabilities = None,
    capacity: Capacity = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT", help="Serve metrics to Prometheus; on 127.0.0.1 unless HOST."
        ),
    ] = None,
    log_json: LogJson = False,
    log_level: LogLevel = "info",
) -> None:
    """Run one node until it is told to stop.

    Example: foundation node start --name n1 --import my_agents --label zone=a --capacity slots=500
    """
    level = checked_level(log_level)
    labels = values.pairs(label or [], "--label")
    capacities = values.numbers(capacity or [], "--capacity")

    where = None if metrics is None else values.address(metrics, "--metrics")

    _find_modules_here()
    _check_found(imports or [])
    domains = checked_domains(domain)
    _check_found([wanted.partition(":")[0] for wanted in domains], "--domain")

    from foundation_nats.node.spawning import spawn, worker_count

    # First of all: the workers import while the manager does. They end with it.
    spare = [spawn() for _ in range(worker_count(workers))]

    from foundation_nats.api.node import Node, NodeOptions
    from foundation_nats.base import logs, tasks

    config = load_config(resolve(shared))
    logs.configure(level=level, json=log_json)
    options = NodeOptions(
        name=name,
        workers=workers,
        imports=tuple(imports or ()),
        domains=domains,
        labels=labels,
        capabilities=tuple(capability or ()),
        capacity=capacities,
        log_level=level,
        log_json=log_json,
        metrics=where,
    )

    async def main() -> int:
        return await Node(options, config, spare=spare).run()

    code = tasks.run(main)
    if code:
        raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="node",
        help=_HELP,
        callback=group_callback(_HELP),
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command()(start)
    app.add_typer(group)
