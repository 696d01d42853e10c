"""`foundation resources`: what the nodes have, what of it is taken, where something would fit; and reserves parts.

Bare `resources` prints the report, as JSON too: that is part of the contract.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.render import Column

if TYPE_CHECKING:
    from foundation_nats import Cluster

_HELP = """Show what each node has and what of it is used, reserved and free.

Example: foundation resources -o json
"""
_STRATEGY = "load_balanced"
_VERDICTS = {"fits": "yes", "busy": "not now", "unavailable": "not now", "infeasible": "never"}


def _amount(value: float) -> str:
    return f"{round(value, 3):,.10g}"


def _percent(row: Mapping[str, Any]) -> str:
    # Rounded up, so that what is not empty never looks so, and down, so that 100 % is full.
    share = 100 * row["utilisation"]
    return f"{math.floor(share) if share >= 99 else math.ceil(share)}%"


_AMOUNT_COLUMNS = (
    Column("node", lambda r: r["node"]),
    Column("resource", lambda r: r["resource"]),
    Column("capacity", lambda r: _amount(r["capacity"]), right=True),
    Column("used", lambda r: _amount(r["used"]), right=True),
    Column("reserved", lambda r: _amount(r["reserved"]), right=True),
    Column("free", lambda r: _amount(r["free"]), right=True),
    Column("utilisation", _percent, right=True),
    Column("", lambda r: r["note"] or " ", free=True),
)
_RESERVATION_COLUMNS = (
    Column("reservation", lambda r: r["id"]),
    Column("takes", lambda r: render.labels_text(r["needs"])),
    Column("state", lambda r: r["state"]),
    Column("ends", lambda r: _ends(r["expires_at"])),
    Column("holder", lambda r: r["holder"]),
    Column("for", lambda r: r["agent"]),
)
_UNMET_COLUMNS = (
    Column("waiting", lambda d: d["deployment"]),
    Column("agents", lambda d: d["agents"], right=True),
    Column("each needs", lambda d: render.labels_text(d["needs"])),
    Column("why", lambda d: d["reason"], free=True),
)
_CHECK_COLUMNS = (
    Column("node", lambda n: n["node"]),
    Column("fits", lambda n: _VERDICTS.get(n["verdict"], n["verdict"])),
    Column("why", lambda n: n["reason"], free=True),
)


def _ends(expires_at: float | None) -> str:
    if expires_at is None:
        return "when released"
    import time

    left = expires_at - time.time()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if left >= 2 * size:
            return f"in {left / size:.0f}{unit}"
    return f"in {max(0.0, left):.0f}s"


def _requirements(items: list[str]) -> dict[str, float]:
    """``cpu=2,gpu=1`` or ``cpu=2 gpu=1``."""
    found = values.numbers(
        [part for item in items for part in item.split(",") if part], "REQUIREMENTS"
    )
    for name, amount in found.items():
        if amount <= 0:
            raise typer.BadParameter(
                f"{name}={amount:g}: write a number above 0.", param_hint="REQUIREMENTS"
            )
    return found


def _placement(require: list[str] | None, label: list[str] | None) -> dict[str, Any]:
    return {"require": list(require or []), "labels": values.pairs(label or [], "--label")}


_Needs = Annotated[
    list[str],
    typer.Argument(metavar="NAME=N…", help="What is needed, such as cpu=2,gpu=1 or memory_mb=512."),
]
_Node = Annotated[
    str | None,
    typer.Option("--node", metavar="NODE", help="Only this one.", autocompletion=complete.nodes),
]
_Require = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="NAME", help="A capability of the node; may be repeated."),
]
_Label = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="K=V", help="A label of the node; may be repeated."),
]
_Id = Annotated[
    str, typer.Argument(metavar="ID", help="The reservation.", autocompletion=complete.reservations)
]


# ---- the report -------------------------------------------------------------------------


@with_shared
def _report(shared: Shared) -> None:
    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            return {
                "schema": f"{render.SCHEMA}/resources",
                **render.plain(await cluster.resources.report()),
            }

    found = run(main)
    if render.document(shared, found):
        return
    rows = list(_rows(found))
    render.table(
        _AMOUNT_COLUMNS if any(row["note"] for row in rows) else _AMOUNT_COLUMNS[:-1],
        rows,
        empty="No nodes. Start one with `foundation node start`.",
    )
    reservations = [item for node in found["nodes"] for item in node["reservations"]]
    for columns, items in ((_RESERVATION_COLUMNS, reservations), (_UNMET_COLUMNS, found["unmet"])):
        if items:
            render.write("")
            render.table(columns, items)


def _rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for node in found["nodes"]:
        note = "" if node["available"] else node["status"]
        if note == "up":
            note = "cordoned"
        for name, amount in node["resources"].items():
            yield {"node": node["node"], "resource": name, "note": note, **amount}
    if len(found["nodes"]) > 1:
        for name, amount in found["total"].items():
            yield {"node": "total", "resource": name, "note": "", **amount}


def _report_when_bare(ctx: typer.Context, **arguments: Any) -> None:
    if ctx.invoked_subcommand is None:
        _report(ctx=ctx, **arguments)


_report_when_bare.__signature__ = inspect.signature(_report)  # type: ignore[attr-defined]
_report_when_bare.__annotations__ = {}
_report_when_bare.__doc__ = _HELP


# ---- asking and taking ------------------------------------------------------------------


@with_shared
def check(
    shared: Shared,
    needs: _Needs,
    node: _Node = None,
    require: _Require = None,
    label: _Label = None,
) -> None:
    """Say where requirements would fit now.

    And why not elsewhere; exit code 1 if nowhere. It promises nothing: `reserve` does.

    Example: foundation resources check cpu=2,gpu=1
    """
    wanted = _requirements(needs)
    placement = _placement(require, label)

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            answer = await _suggesting(
                cluster,
                node,
                cluster.resources.can_allocate(wanted, node=node, placement=placement),
            )
            return {
                "schema": f"{render.SCHEMA}/resources-check",
                "fits": bool(answer),
                **render.plain(answer),
            }

    found = run(main)
    if not render.document(shared, found):
        render.table(
            _CHECK_COLUMNS,
            found["nodes"],
            empty="No nodes. Start one with `foundation node start`.",
        )
    if not found["fits"]:
        raise typer.Exit(render.FAILED)


@with_shared
def reserve(
    shared: Shared,
    needs: _Needs,
    ttl: Annotated[
        float,
        typer.Option(
            "--for",
            metavar="DURATION",
            parser=values.duration,
            help="How long it is held, unless it is confirmed: 1s to 7d.",
            show_default="30s",
        ),
    ] = "30s",  # type: ignore[assignment]
    node: _Node = None,
    require: _Require = None,
    label: _Label = None,
    strategy: Annotated[
        str,
        typer.Option(metavar="NAME", help="How to choose a node, as for agents."),
    ] = _STRATEGY,
    holder: Annotated[
        str | None, typer.Option("--holder", metavar="TEXT", help="Who has it, for whoever looks.")
    ] = None,
) -> None:
    """Take a part of one node for a while.

    Nobody else gets it until it ends, is released, or an agent has used it.
    Prints its id: confirm it to keep it, or start an agent with it (`cluster.agents.start(...,
    reservation=ID)`).

    Example: foundation resources reserve cpu=2,gpu=1 --for 5m
    """
    wanted = _requirements(needs)
    placement = _placement(require, label)

    async def main() -> Any:
        async with connected(shared) as cluster:
            return await _suggesting(
                cluster,
                node,
                cluster.resources.reserve(
                    wanted,
                    ttl=ttl,
                    node=node,
                    placement=placement,
                    strategy=strategy,
                    holder=_user() if holder is None else holder,
                    timeout=shared.timeout or 10.0,
                ),
            )

    _show(shared, render.plain(run(main)))


@with_shared
def confirm(
    shared: Shared,
    id: _Id,
    ttl: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="DURATION",
            parser=values.duration,
            help="Only for so long, and again by each further confirm; else until it is released.",
        ),
    ] = None,
) -> None:
    """Keep what is reserved.

    Exit code 1 if it has expired, was released or used up: then it is not yours any more.

    Example: foundation resources confirm 0123456789ab@node-1
    """

    async def main() -> Any:
        async with connected(shared) as cluster:
            return await cluster.resources.confirm(id, ttl=ttl)

    _show(shared, render.plain(run(main)))


@with_shared
def release(shared: Shared, id: _Id) -> None:
    """Give back what is reserved.

    One that is gone already is no error.

    Example: foundation resources release 0123456789ab@node-1
    """

    async def main() -> bool:
        from foundation_nats.errors import NotFoundError

        async with connected(shared) as cluster:
            try:
                await cluster.resources.get(id)
            except NotFoundError:
                return False
            await cluster.resources.release(id)
            return True

    found = run(main)
    document = {"schema": f"{render.SCHEMA}/reservation-released", "id": id, "released": found}
    if not render.document(shared, document):
        render.talk(f"{id} is released." if found else f"{id} was not reserved (any more).")


def _show(shared: Shared, found: Mapping[str, Any]) -> None:
    if not render.document(shared, {"schema": f"{render.SCHEMA}/reservation", **found}):
        render.table(_RESERVATION_COLUMNS, [found])


def _user() -> str:
    import getpass
    import socket

    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a user without a name, as in some containers
        return socket.gethostname()


async def _suggesting(cluster: Cluster, node: str | None, answer: Any) -> Any:
    from foundation_cli.status import did_you_mean
    from foundation_nats.errors import NodeNotFoundError

    try:
        return await answer
    except NodeNotFoundError as error:
        names = [item.name for item in await cluster.nodes.list()]
        raise NodeNotFoundError(
            f"There is no node {node!r} in cluster {cluster.name!r}.",
            hint=did_you_mean(node or "", names) or "`foundation nodes` lists them.",
        ) from error


def register(app: typer.Typer) -> None:
    """Add the group to *app*."""
    group = typer.Typer(
        name="resources",
        help=_HELP,
        callback=_report_when_bare,
        invoke_without_command=True,
        rich_markup_mode=None,
    )
    for command in (check, reserve, confirm, release):
        group.command()(command)
    app.add_typer(group)
