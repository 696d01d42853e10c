"""`foundation top`: how busy the cluster is, again and again.

On a terminal a screen that repaints until Ctrl-C; into a pipe the same as text, tick after tick; with
``-o json`` one document a line. It only looks on.
"""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation_cli import render, values
from foundation_cli.connection import Output, Shared, connected, run, with_shared
from foundation_cli.render import Column
from foundation_cli.status import AGENT_STATUSES, first_reason

if TYPE_CHECKING:
    from rich.console import RenderableType

    from foundation_nats.api.pulse import Pulse

_FIRST_S = 0.5
"""Between the two looks that the first tick needs for its rates."""
_EVERY_S = 2.0
_EVERY_MIN_S = 0.2
_BARS = " ▁▂▃▄▅▆▇█"
_PAST = 40
_HEAD = 5
_TABLE_HEAD = 2


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}".removesuffix(".0")


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.0f}%"


NODES = (
    Column("node", lambda n: n["name"]),
    Column("status", lambda n: n["status"]),
    Column("leader", lambda n: "yes" if n["leader"] else ""),
    Column("agents", lambda n: n["agents"], right=True),
    Column("cpu", lambda n: _share(n["load"].get("cpu")), right=True),
    Column("memory", lambda n: _share(n["load"].get("memory")), right=True),
    Column("backlog", lambda n: int(n["load"].get("backlog", 0)), right=True),
    Column("lag ms", lambda n: f"{n['load'].get('lag_ms', 0):.1f}", right=True),
    Column("workers", lambda n: len(n["workers"]), right=True),
)
AGENTS = (
    Column("agent", lambda a: a["id"]),
    Column("node", lambda a: a["node"]),
    Column("status", lambda a: a["status"]),
    Column("backlog", lambda a: f"{a['backlog']}{'+' if a['behind'] else ''}", right=True),
    Column("handled/s", lambda a: _rate(a["handled_s"]), right=True),
    Column("asked/s", lambda a: _rate(a["asked_s"]), right=True),
)
DEPLOYMENTS = (
    Column("deployment", lambda d: d["name"]),
    Column("running", lambda d: f"{d['running']}/{d['desired']}", right=True),
    Column("pending", lambda d: d["pending"], right=True),
    Column("failed", lambda d: d["failed"], right=True),
    Column("settled", lambda d: d["settled"]),
    Column("reason", first_reason, free=True),
)


def as_document(pulse: Pulse) -> dict[str, Any]:
    """The object `top -o json` prints each time."""
    return {"schema": f"{render.SCHEMA}/top", **render.plain(pulse)}


def bars(past: Sequence[float]) -> str:
    """The past as a line of bars, the highest as high as it goes."""
    most = max(past, default=0.0)
    if most <= 0:
        return ""
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in past)


def shares(height: int, wanted: Sequence[int]) -> list[int]:
    """How many rows each table gets of *height*: what it wants, or a fair part of what is there."""
    given = [0] * len(wanted)
    left = max(height, 0)
    while left and any(have < want for have, want in zip(given, wanted, strict=True)):
        for index, want in enumerate(wanted):
            if left and given[index] < want:
                given[index] += 1
                left -= 1
    return given


def head(found: dict[str, Any], past: Sequence[float]) -> list[str]:
    """The lines above the tables."""
    rates, kept = found["rates"], found["kept"]
    agents = ", ".join(
        f"{found['agents'][word]} {word}"
        for word in AGENT_STATUSES
        if found["agents"].get(word) or word == "running"
    )
    moment = found["at"].replace("T", " ")[:19]
    return [
        f"{render.clean(found['cluster'])} at {render.clean(found['server'])}   {moment} UTC   "
        f"leader {render.clean(found['leader'] or 'none')}",
        f"agents    {agents}",
        f"a second  {_rate(rates['stored'])} stored, {_rate(rates['handled'])} handled, "
        f"{_rate(rates['asked'])} asked, {_rate(rates['commits'])} commits, "
        f"{_rate(rates['dead'])} dead   {bars(past)}".rstrip(),
        f"kept      {kept.get('signals', 0):,} signals, {kept.get('dead', 0):,} dead letters",
    ]


def _tables(
    found: dict[str, Any],
) -> list[tuple[Sequence[Column], list[dict[str, Any]], str]]:
    return [
        (NODES, found["nodes"], "No nodes: start one with `foundation node start`."),
        (AGENTS, found["busiest"], "No agent has anything to do."),
        (DEPLOYMENTS, found["deployments"], ""),
    ]


def _print(found: dict[str, Any], past: Sequence[float]) -> None:
    """One tick as plain text."""
    for line in head(found, past):
        render.write(line)
    for columns, rows, empty in _tables(found):
        render.write("")
        if rows:
            render.table(columns, rows)
        elif empty:
            render.write(empty)
    render.write("")


def screen(
    found: dict[str, Any], past: Sequence[float], trouble: str, size: tuple[int, int]
) -> RenderableType:
    """One tick for a terminal of *size* (columns, lines); nothing is wrapped, what has no room is left out."""
    from rich.console import Group
    from rich.text import Text

    top, *lines = head(found, past)
    parts: list[RenderableType] = [Text(top, style="bold", no_wrap=True, overflow="crop")]
    parts += [Text(line, no_wrap=True, overflow="crop") for line in lines]
    if trouble:
        parts.append(Text(trouble, style="bold red", no_wrap=True, overflow="crop"))
    tables = [item for item in _tables(found) if item[1] or item[2]]
    room = size[1] - _HEAD - len(tables) * _TABLE_HEAD - bool(trouble)
    wanted = [max(len(rows), 1) for _, rows, _ in tables]
    for (columns, rows, empty), given in zip(tables, shares(room, wanted), strict=True):
        parts.append(Text(""))
        if not rows:
            parts.append(Text(empty, style="dim", no_wrap=True, overflow="crop"))
        elif given:
            parts.append(_table(columns, rows, given, size[0]))
    return Group(*parts)


def _cells(column: Column, rows: Sequence[dict[str, Any]]) -> list[str]:
    return [render.clean(column.value(row)) for row in rows]


def fitting(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], width: int
) -> Sequence[Column]:
    """The first of *columns* that fit side by side; the last of them may be cut if it is prose."""
    used = 0
    for index, column in enumerate(columns):
        needed = max(len(text) for text in [column.title, *_cells(column, rows)])
        least = len(column.title) if column.free else needed
        if index and used + least > width:
            return columns[:index]
        used += needed + 2
    return columns


def _table(
    columns: Sequence[Column], rows: list[dict[str, Any]], given: int, width: int
) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False, header_style="bold cyan")
    shown = rows if len(rows) <= given else rows[: max(given - 1, 1)]
    columns = fitting(columns, shown, width)
    for column in columns:
        view.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=True, overflow="crop"
        )
    for row in shown:
        cells = [render.clean(column.value(row)) for column in columns]
        view.add_row(*(Text(text, style=render.style_of(text)) for text in cells))
    if len(shown) < len(rows) and given > 1:
        view.add_row(Text(f"… {len(rows) - len(shown)} more", style="dim"))
    return view


@with_shared
def top(
    shared: Shared,
    every: Annotated[
        float | None,
        typer.Option(
            "--every", metavar="DURATION", parser=values.duration, help="Between two looks (2s)."
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="So many looks, then end.")
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="How many of the busiest agents.")
    ] = 20,
) -> None:
    """Watch how busy the cluster is: nodes, the busiest agents, deployments, rates.

    On a terminal the screen is repainted until Ctrl-C. With -o json each line is a document.

    Example: foundation top --every 1s
    """
    pause = _EVERY_S if every is None else every
    if pause < _EVERY_MIN_S:
        raise typer.BadParameter(
            f"Look every {_EVERY_MIN_S:g} s or less often.", param_hint="--every"
        )
    is_live = shared.format is Output.TABLE and sys.stdout.isatty() and render.is_fancy(sys.stdout)
    run(lambda: _watch(shared, pause, count, limit, is_live=is_live))


async def _watch(
    shared: Shared, every: float, count: int | None, limit: int, *, is_live: bool
) -> None:
    import asyncio
    from contextlib import nullcontext

    from foundation_nats.api.pulse import Pulses
    from foundation_nats.base.clock import monotonic
    from foundation_nats.errors import BusError

    past: deque[float] = deque(maxlen=_PAST)
    async with connected(shared) as cluster:
        pulses = Pulses(cluster, limit=limit)
        await pulses.next()
        await asyncio.sleep(min(_FIRST_S, every))
        found: dict[str, Any] = {}
        with _live() if is_live else nullcontext() as live:
            due = monotonic()
            done = 0
            while True:
                trouble = ""
                try:
                    found = as_document(await pulses.next())
                    past.append(found["rates"]["handled"] or 0.0)
                except BusError as error:
                    if live is None or not found:
                        raise
                    trouble = f"No answer, as it was at {found['at']}: {error}"
                if live is not None:
                    size = shutil.get_terminal_size()
                    live.update(
                        screen(found, past, trouble, (size.columns, size.lines)), refresh=True
                    )
                else:
                    _tell(shared, found, past)
                done += 1
                if done == count:
                    return
                due = max(due + every, monotonic())
                await asyncio.sleep(due - monotonic())


def _tell(shared: Shared, found: dict[str, Any], past: Sequence[float]) -> None:
    match shared.format:
        case Output.JSON:
            render.print_line(found)
        case Output.YAML:
            render.write("---")
            render.print_yaml(found)
        case Output.TABLE:
            _print(found, past)


def _live() -> Any:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    return Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(top)
