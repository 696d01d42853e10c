"""`foundation bench`: a few figures of this machine or of one's own cluster, beside the same work by hand."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, connected, run, with_shared
from foundation_cli.render import Column, Progress


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_COLUMNS = (
    Column("figure", lambda f: f["name"]),
    Column("unit", lambda f: f["unit"]),
    Column("ours", lambda f: _number(f["ours"]), right=True),
    Column("floor", lambda f: _number(f["floor"]), right=True),
    Column("ratio", lambda f: "-" if f["ratio"] is None else f"{f['ratio']:.2f}", right=True),
    Column("better", lambda f: f["better"]),
)


@with_shared
def bench(
    shared: Shared,
    attach: Annotated[
        bool,
        typer.Option("--attach", help="Measure the cluster that --server and --cluster name."),
    ] = False,
    nodes: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="Nodes of the cluster that is started.")
    ] = 1,
    agents: Annotated[
        int, typer.Option(metavar="N", min=100, max=1000, help="How many agents.")
    ] = 1000,
    signals: Annotated[
        int, typer.Option(metavar="N", min=1000, max=1_000_000, help="How many signals.")
    ] = 50_000,
) -> None:
    """Measure signals, questions and a deployment, as ratios to raw nats-py in the same run.

    Starts a server and nodes of its own; with --attach it puts its load on your cluster, and
    clears it away. Some 30 seconds.

    Example: foundation bench --agents 100 --signals 5000
    """
    progress = Progress(shared)

    async def main() -> dict[str, Any]:
        from foundation_nats.bench.measure import measure

        def step(text: str) -> None:
            progress.show([f"…  {text}"])

        if attach:
            async with connected(shared) as cluster:
                found = await measure(
                    cluster, agents=agents, signals=signals, embedded=False, on_step=step
                )
        else:
            from foundation_nats.testing import TestCluster

            step(f"starting a server and {nodes} node{'s' if nodes > 1 else ''}")
            async with TestCluster(nodes=nodes, workers=1, cluster="bench") as started:
                found = await measure(
                    started.client, agents=agents, signals=signals, embedded=True, on_step=step
                )
        return {"schema": f"{render.SCHEMA}/bench", **render.plain(found)}

    try:
        found = run(main)
    finally:
        progress.end()
    if render.document(shared, found):
        return
    render.table(_COLUMNS, found["figures"])
    where = "a server of its own" if found["embedded"] else found["server"]
    render.talk(
        f"{found['agents']} agents, {found['signals']:,} signals, nodes up: {found['nodes']}, "
        f"{found['cores']} cores, {where}. The floor is the same work by hand on nats-py, without "
        "placement, supervision, fencing or retries."
    )


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(bench)
