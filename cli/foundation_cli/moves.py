"""Commands for maintenance: rebalance, drain, cordon, uncordon.

They say what they will do (`--plan`), wait until it is done, and their exit code
tells the truth: 5 when it was not in time. What was wished stands all the same,
and whoever leads goes on with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import complete, render, values
from foundation_cli.connection import Output, Shared, connected, run, with_shared
from foundation_cli.render import Column, Progress

if TYPE_CHECKING:
    from foundation_nats import Cluster
    from foundation_nats.api.refs import NodeInfo

STRATEGIES = ("even_distribution", "load_based", "capability_based")
_ROWS_SHOWN = 40
_DRAIN_S = 60.0

_MOVE_COLUMNS = (
    Column("agent", lambda m: m["agent"]),
    Column("from", lambda m: m["source"]),
    Column("to", lambda m: m["target"]),
    Column("why", lambda m: m["why"], free=True),
)

_Node = Annotated[
    str, typer.Argument(metavar="NODE", help="The node's name.", autocompletion=complete.nodes)
]
_Reason = Annotated[
    str, typer.Option(metavar="TEXT", help="Why, for whoever looks: `foundation nodes` shows it.")
]
_Plan = Annotated[bool, typer.Option("--plan", help="Only show the moves.")]


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(STRATEGIES)}.")
    return text


def _moves_json(moves: Any) -> list[dict[str, str]]:
    return [
        {"agent": move.agent, "source": move.source, "target": move.target, "why": move.why}
        for move in moves
    ]


def _times(moved: list[Any]) -> dict[str, float] | None:
    """How long agents were away at most; None where none has moved."""
    if not moved:
        return None
    times = sorted(item.ms for item in moved)
    p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
    return {"p50": round(statistics.median(times), 1), "p99": p99, "max": times[-1]}


def _times_text(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    return f", away for at most {times['p50']:.0f} ms (median) and {times['max']:.0f} ms (longest)"


def _show_moves(moves: list[dict[str, str]]) -> None:
    render.table(_MOVE_COLUMNS, moves[:_ROWS_SHOWN])
    if len(moves) > _ROWS_SHOWN:
        render.write(f"… and {len(moves) - _ROWS_SHOWN} more")


def _agents(count: int) -> str:
    return "1 agent" if count == 1 else f"{count} agents"


def _progress(shared: Shared, what: str) -> tuple[Progress, Any]:
    progress = Progress(shared)
    return progress, lambda done, total: progress.show([f"{what}: {done} of {total} moved"])


@with_shared
def rebalance(
    shared: Shared,
    strategy: Annotated[
        str,
        typer.Option(metavar="NAME", parser=_strategy, help=f"{', '.join(STRATEGIES)}."),
    ] = STRATEGIES[0],
    plan: _Plan = False,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", metavar="N", min=1, help="Move so many at most.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="DURATION",
            parser=values.duration,
            help="How long to wait until all are moved; 0s does not wait.",
            show_default="5m",
        ),
    ] = "5m",  # type: ignore[assignment]
) -> None:
    """Move running agents until the nodes are even, a few at a time.

    Agents keep their state and their unread signals. Once it is done, another one has nothing
    to do.

    Example: foundation rebalance --plan
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            if plan:
                found = await cluster.plan_rebalance(strategy, max_moves=max_moves)
                return _rebalance_json(strategy, found, None)
            progress, on_progress = _progress(shared, "rebalance")
            try:
                report = await cluster.rebalance(
                    strategy,
                    max_moves=max_moves,
                    wait=wait > 0,
                    timeout=wait,
                    on_progress=on_progress,
                )
            finally:
                progress.clear()
            return _rebalance_json(strategy, report.plan, report)

    found = run(main)
    if render.document(shared, found):
        return
    if not found["moves"]:
        render.write("Nothing to do: no move makes the nodes more even.")
        return
    _show_moves(found["moves"])
    if plan:
        render.write(f"{_agents(len(found['moves']))} would move.")
    elif wait <= 0:
        render.write(f"{_agents(len(found['moves']))} will be moved.")
    else:
        moved = found["moved"]
        render.write(f"{_agents(len(moved))} moved{_times_text(found['away_ms'])}.")
        for agent, reason in found["skipped"].items():
            render.write(f"{render.styled('!', 'yellow')} {render.clean(agent)} was not: {reason}")


def _rebalance_json(strategy: str, plan: Any, report: Any | None) -> dict[str, Any]:
    return {
        "schema": f"{render.SCHEMA}/rebalance",
        "id": None if report is None else report.id,
        "strategy": strategy,
        "complete": plan.is_complete,
        "before": render.plain(dict(plan.before)),
        "after": render.plain(dict(plan.after)),
        "moves": _moves_json(plan.moves),
        "moved": [] if report is None else render.plain(report.moved),
        "skipped": {} if report is None else render.plain(report.skipped),
        "away_ms": None if report is None else _times(report.moved),
    }


@with_shared
def drain(
    shared: Shared,
    node: _Node,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait",
            metavar="DURATION",
            parser=values.duration,
            help="How long to wait until it is empty (--timeout, else 60s).",
        ),
    ] = None,
    plan: _Plan = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also stop agents that fit nowhere else; they wait then."),
    ] = False,
    reason: _Reason = "",
) -> None:
    """Move all agents away from a node, and keep new ones away, until `uncordon`.

    Agents keep their state and their unread signals. The node stays up: stop it once this has
    ended with 0. With 5 agents are left; they keep running, and leave as soon as they can.

    Example: foundation drain node-2 --reason "new disk"
    """
    if plan:
        _plan_drain(shared, node)
        return

    timeout = wait if wait is not None else shared.timeout or _DRAIN_S

    async def main() -> Any:
        async with connected(shared) as cluster:
            progress, on_progress = _progress(shared, f"drain {node}")
            try:
                return await _with_suggestion(
                    cluster,
                    node,
                    cluster.nodes.drain(
                        node, timeout=timeout, force=force, reason=reason, on_progress=on_progress
                    ),
                )
            finally:
                progress.clear()

    try:
        report = run(main)
    except Exception as error:
        left = getattr(error, "details", {}).get("reasons", {})
        if shared.format is Output.TABLE:
            for agent, why in list(left.items())[:_ROWS_SHOWN]:
                render.talk(f"{render.styled('!', 'yellow')} {render.clean(agent)}: {why}")
        raise
    found = {
        "schema": f"{render.SCHEMA}/drain",
        "node": node,
        "moved": render.plain(report.moved),
        "away_ms": _times(report.moved),
    }
    if not render.document(shared, found):
        count = _agents(len(report.moved))
        render.write(f"{node} is empty: {count} moved{_times_text(_times(report.moved))}.")


def _plan_drain(shared: Shared, node: str) -> None:
    async def main() -> Any:
        async with connected(shared) as cluster:
            return await _with_suggestion(cluster, node, cluster.nodes.plan_drain(node))

    plan = run(main)
    moves = _moves_json(plan.moves)
    stuck = {agent: dict(reasons) for agent, reasons in plan.stuck.items()}
    schema = f"{render.SCHEMA}/drain-plan"
    if render.document(shared, {"schema": schema, "node": node, "moves": moves, "stuck": stuck}):
        return
    _show_moves(moves)
    render.write(f"{_agents(len(moves))} would move.")
    for agent, reasons in list(stuck.items())[:_ROWS_SHOWN]:
        why = "; ".join(f"{name}: {text}" for name, text in reasons.items())
        render.write(
            f"{render.styled('!', 'yellow')} {render.clean(agent)} fits nowhere else: "
            f"{render.clean(why or 'there is no other node')}"
        )


@with_shared
def cordon(shared: Shared, node: _Node, reason: _Reason = "") -> None:
    """Give a node no new agents; those it has stay. Also after a restart of the node.

    Example: foundation cordon node-2
    """

    async def main() -> None:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, node, cluster.nodes.cordon(node, reason=reason))

    run(main)
    if not render.document(shared, {"node": node, "cordoned": True}):
        render.write(f"{node} gets no new agents.")


@with_shared
def uncordon(shared: Shared, node: _Node) -> None:
    """Let a cordoned or drained node get agents again.

    Example: foundation uncordon node-2
    """

    async def main() -> None:
        async with connected(shared) as cluster:
            await _with_suggestion(cluster, node, cluster.nodes.uncordon(node))

    run(main)
    if not render.document(shared, {"node": node, "cordoned": False}):
        render.write(f"{node} may get agents again; `foundation rebalance` brings it some.")


async def offer(cluster: Cluster, nodes: Sequence[NodeInfo]) -> str | None:
    """What to say to a person where a rebalance would pay."""
    count = await cluster.mover.offer(nodes)
    if not count:
        return None
    them = "it" if count == 1 else "them"
    return (
        f"The nodes are uneven: `foundation rebalance` would move {_agents(count)} "
        f"(--plan shows {them})."
    )


async def _with_suggestion(cluster: Cluster, node: str, change: Any) -> Any:
    from foundation_cli.status import did_you_mean
    from foundation_nats.errors import NodeNotFoundError

    try:
        return await change
    except NodeNotFoundError as error:
        names = [item.name for item in await cluster.nodes.list()]
        raise NodeNotFoundError(
            f"There is no node {node!r} in cluster {cluster.name!r}.",
            hint=did_you_mean(node, names) or "`foundation nodes` lists them.",
        ) from error


def register(app: typer.Typer) -> None:
    """Add the commands to *app*."""
    for command in (rebalance, drain, cordon, uncordon):
        app.command()(command)
