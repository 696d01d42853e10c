"""`foundation topology`: the nodes by zone, how far they are from each other, and who has parted.

Read only. `lines` draws what ``-o json`` prints, so that a picture can be drawn
again from a stored document. New fields may come, none goes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from foundation_cli import render
from foundation_cli.connection import Shared, connected, run, with_shared

_TIMEOUT_S = 2.0
_NAMED_WIDTH = 8
"""Columns of the matrix have names as long as these at most; else numbers."""
_PIPE_WIDTH = 120
_WORST = 5
_PAIRS_MAX = 20
_NAMES_MAX = 8


@with_shared
def topology(
    shared: Shared,
    zones: Annotated[
        str, typer.Option("--zones", metavar="LABEL", help="The node label that makes the zones.")
    ] = "zone",
    matrix: Annotated[
        bool | None,
        typer.Option(
            "--matrix/--no-matrix", help="Show all round trips, or none; a summary if it is wide."
        ),
    ] = None,
) -> None:
    """Draw the nodes by zone, their round trips, and who does not hear whom.

    Example: foundation topology
    """

    async def main() -> dict[str, Any]:
        async with connected(shared) as cluster:
            timeout = _TIMEOUT_S if shared.timeout is None else shared.timeout
            found = await cluster.topology(timeout=timeout, zone_label=zones)
            return {"schema": f"{render.SCHEMA}/topology", **render.plain(found)}

    found = run(main)
    if render.document(shared, found):
        return
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else _PIPE_WIDTH
    encoding = (sys.stdout.encoding or "").lower()
    for line in lines(found, width=width, matrix=matrix, is_unicode=encoding.startswith("utf")):
        render.write(line)
    if not found["nodes"]:
        render.talk("No nodes. Start one with `foundation node start`.")


def lines(
    found: Mapping[str, Any], *, width: int, matrix: bool | None = None, is_unicode: bool = True
) -> Iterator[str]:
    """The picture of one document of ``foundation topology -o json``, line by line.

    Args:
        width: of the terminal; a matrix that is wider becomes a summary.
        matrix: True: all of it all the same; False: nothing of it.
        is_unicode: whether the terminal shows lines and corners.
    """
    yield from _head(found)
    yield from _trouble(found)
    if found["nodes"]:
        yield ""
        yield from _zones(found, is_unicode)
    if matrix is not False and len(found["matrix"]) > 1:
        yield ""
        drawn = list(_matrix(found))
        if matrix or max(map(len, drawn)) <= width:
            yield "round trips in ms, from row to column; - for no answer in time"
            yield from drawn
        else:
            yield from _summary(found)


# ---- parts ------------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _names(names: list[str]) -> str:
    shown = ", ".join(render.clean(name) for name in names[:_NAMES_MAX])
    more = len(names) - _NAMES_MAX
    return f"{shown} and {more} more" if more > 0 else shown


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _head(found: Mapping[str, Any]) -> Iterator[str]:
    observer, leader, totals = found["observer"], found["leader"], found["totals"]
    server = render.clean(observer["server"])
    yield (
        f"cluster  {render.clean(found['cluster'])}, seen from {server} "
        f"({_ms(observer['rtt_ms'])} ms), revision {found['revision']}"
    )
    if leader is None:
        yield f"leader   {render.styled('none', 'red')}"
    else:
        doubt = "" if leader["confirmed"] else "  (last seen; the lease can't be read from here)"
        yield f"leader   {render.clean(leader['node'])}, term {leader['term']}{doubt}"
    counts = ", ".join(
        f"{totals[word]} {render.status_word(word)}"
        for word in ("up", "draining", "suspect", "down")
        if totals[word] or word == "up"
    )
    yield f"nodes    {counts}"
    yield (
        f"totals   {_plural(totals['agents'], 'agent')}, {_plural(totals['workers'], 'worker')}, "
        f"{_plural(totals['servers'], 'server')}, {_plural(totals['zones'], 'zone')}"
    )


def _trouble(found: Mapping[str, Any]) -> Iterator[str]:
    if found["partitioned"]:
        groups = found["groups"]
        yield ""
        yield render.styled(
            f"PARTITION  {len(groups)} groups of nodes do not hear each other", "red"
        )
        leader = found["leader"]["node"] if found["leader"] is not None else None
        for number, group in enumerate(groups, 1):
            notes = ["leads"] if leader in group["nodes"] else []
            if not group["is_known"]:
                notes.append("nothing comes from there")
            said = f"  ({', '.join(notes)})" if notes else ""
            yield f"  group {number}  {_names(group['nodes'])}{said}"
    if found["one_way"]:
        if not found["partitioned"]:
            yield ""
        deaf: dict[str, list[str]] = {}
        for link in found["one_way"]:
            deaf.setdefault(link["speaker"], []).append(link["listener"])
        for speaker, listeners in deaf.items():
            text = (
                f"ONE WAY    {render.clean(speaker)} is heard by {_names(listeners)} "
                "and does not hear them"
            )
            yield render.styled(text, "red")


def _zones(found: Mapping[str, Any], is_unicode: bool) -> Iterator[str]:
    nodes = {node["name"]: node for node in found["nodes"]}
    branch, last = ("├─ ", "└─ ") if is_unicode else ("|- ", "`- ")
    rows = {name: _row(node) for name, node in nodes.items()}
    widths = [max(len(row[index]) for row in rows.values()) for index in range(5)]
    for zone, members in found["zones"].items():
        count = _plural(len(members), "node")
        rest = "no zone" if len(found["zones"]) > 1 else "nodes"
        title = f"zone {render.clean(zone)}" if zone else rest
        yield render.styled(title, "bold") + (f"  {count}" if len(found["zones"]) > 1 else "")
        for name in members:
            corner = last if name == members[-1] else branch
            cells = [text.ljust(width) for text, width in zip(rows[name], widths, strict=True)]
            cells[3] = rows[name][3].rjust(widths[3])
            word = render.status_word(nodes[name]["status"])
            cells[1] = word + " " * (widths[1] - len(nodes[name]["status"]))
            yield (corner + "  ".join(cells)).rstrip()


def _row(node: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """Name, status, leader's mark, agents, and where it is connected."""
    if node["answered"]:
        link = f"{render.clean(node['server'])} {_ms(node['server_rtt_ms'])} ms"
    else:
        link = "" if node["status"] == "down" else "does not answer"
    mark = "leader" if node["leader"] else ""
    agents = "" if node["status"] == "down" else _plural(node["agents"], "agent")
    return render.clean(node["name"]), node["status"], mark, agents, link


def _matrix(found: Mapping[str, Any]) -> Iterator[str]:
    matrix = found["matrix"]
    names = list(matrix)
    cells = {
        here: ["·" if here == there else _ms(matrix[here].get(there)) for there in names]
        for here in names
    }
    longest = max(len(name) for name in names)
    numbers = {name: str(number) for number, name in enumerate(names, 1)}
    if longest <= _NAMED_WIDTH:
        titles, labels = names, {name: name for name in names}
    else:
        titles = [numbers[name] for name in names]
        digits = len(str(len(names)))
        labels = {name: f"{numbers[name].rjust(digits)} {name}" for name in names}
    left = max(len(label) for label in labels.values())
    widths = [
        max(len(title), *(len(cells[name][index]) for name in names))
        for index, title in enumerate(titles)
    ]
    yield " " * left + "".join(
        f"  {title.rjust(width)}" for title, width in zip(titles, widths, strict=True)
    )
    for name in names:
        row = zip(cells[name], widths, strict=True)
        yield labels[name].ljust(left) + "".join(f"  {cell.rjust(width)}" for cell, width in row)


def _summary(found: Mapping[str, Any]) -> Iterator[str]:
    """Of a matrix that is too wide: the spread, the slowest, and where no answer came from."""
    pairs = [
        (here, there, ms) for here, row in found["matrix"].items() for there, ms in row.items()
    ]
    heard = sorted(((ms, here, there) for here, there, ms in pairs if ms is not None), reverse=True)
    yield f"round trips between nodes: {len(heard):,} of {len(pairs):,} answered"
    if heard:
        median = heard[len(heard) // 2][0]
        late = heard[len(heard) // 100][0]
        yield f"  median {_ms(median)} ms, 99 of 100 within {_ms(late)} ms; the slowest:"
        for ms, here, there in heard[:_WORST]:
            yield f"  {render.clean(here)} to {render.clean(there)}  {_ms(ms)} ms"
    answered = {node["name"] for node in found["nodes"] if node["answered"]}
    lost: dict[str, list[str]] = {}
    for here, there, value in pairs:
        if value is None and here in answered:
            lost.setdefault(there, []).append(here)
    for there, asked_by in list(lost.items())[:_PAIRS_MAX]:
        yield f"  no answer from {render.clean(there)} to {_names(asked_by)}"
    if len(lost) > _PAIRS_MAX:
        yield f"  and none from {len(lost) - _PAIRS_MAX} more: see `-o json`"
    yield "  all of them: --matrix"


def register(app: typer.Typer) -> None:
    """Add the command to *app*."""
    app.command()(topology)
