"""Draws the census: progress, result table, failover timeline and proof.

Builds renderables of rich and decides nothing else; only `main`, the preview,
reads and prints. Columns that do not fit are left out, the least important
first. Colours follow ``NO_COLOR`` and whether the output is a terminal; signs
fall back to ASCII where the output cannot encode them. Nothing is said by
colour alone.

Preview: ``python -m examples.census.show --direct [--path DIRECTORY]``
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from examples.census.census import (
    Census,
    FileReport,
    Function,
    PackageTotals,
    census_directly,
    find_files,
    standard_library,
)

PACKAGES_SHOWN = 12
WIDTH_MAX = 118
BAR_CELLS = 12
EIGHTHS = "▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True)
class Proof:
    """The same census twice: in one process, and by agents that lost a node."""

    direct_digest: str
    distributed_digest: str
    files: int
    """How many files there are to count."""
    lost: int
    """Files without a report."""
    twice: int
    """Files counted more than once."""

    @property
    def is_given(self) -> bool:
        """Nothing differs, nothing is missing, nothing is doubled."""
        return self.direct_digest == self.distributed_digest and not self.lost and not self.twice


@dataclass(frozen=True, slots=True)
class Signs:
    """The characters to draw with: what the output can encode."""

    yes: str = "✓"
    no: str = "✗"
    dot: str = "●"
    line: str = "│"
    full: str = "█"
    rest: str = "…"
    dash: str = "—"

    @classmethod
    def of(cls, console: Console) -> Signs:
        """Unicode signs if `console` can write them, else ASCII."""
        signs = cls()
        try:
            "".join((signs.yes, signs.no, signs.dot, signs.line, signs.full)).encode(
                console.encoding
            )
        except (UnicodeEncodeError, LookupError):
            return cls("ok", "NO", "*", "|", "#", "..", "-")
        return signs


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of the result table are shown, and how much of a name."""

    bar: bool = False
    code: bool = False
    classes: bool = False
    imports: bool = False
    files: bool = False
    functions: bool = True
    longest_cells: int = 0


# From the richest to the least; the first that fits is taken.
LAYOUTS = (
    Layout(bar=True, code=True, classes=True, imports=True, files=True, longest_cells=36),
    Layout(bar=True, code=True, classes=True, imports=True, files=True, longest_cells=28),
    Layout(code=True, classes=True, imports=True, files=True, longest_cells=28),
    Layout(classes=True, imports=True, files=True, longest_cells=24),
    Layout(classes=True, files=True, longest_cells=28),
    Layout(files=True, longest_cells=24),
    Layout(classes=True, imports=True, files=True),
    Layout(classes=True, files=True),
    Layout(),
    Layout(functions=False),
)


def result_table(
    census: Census,
    console: Console,
    *,
    title: str = "Census",
    packages_max: int = PACKAGES_SHOWN,
) -> Table:
    """The largest packages by lines, the rest in one row, and the totals."""
    width = min(console.width, WIDTH_MAX)
    unlimited = console.options.update(width=10 * WIDTH_MAX)
    for layout in LAYOUTS:
        table = _table(census, Signs.of(console), layout, packages_max)
        if console.measure(table, options=unlimited).maximum <= width:
            break
    table.title = title
    unparsed = census.totals().unparsed
    if unparsed:
        table.caption = (
            f"{_number(unparsed)} of {_number(census.totals().files)} files do not parse; "
            "they are counted with their lines"
        )
    return table


def _table(census: Census, signs: Signs, layout: Layout, packages_max: int) -> Table:
    everything, largest = census.totals(), census.largest()
    shown, hidden = largest[:packages_max], largest[packages_max:]
    rest = PackageTotals(package=f"{signs.rest} {_number(len(hidden))} more")
    for totals in hidden:
        rest.merge(totals)

    table = Table(
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_footer=True,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold cyan",
        footer_style="bold",
    )
    scale = max((totals.lines for totals in shown), default=0)
    rows: list[list[RenderableType]] = [
        [Text(_shorten(totals.package, 20, signs))] for totals in shown
    ]
    if hidden:
        rows.append([Text(rest.package)])
    table.add_column("package", f"{_number(len(largest))} in total", no_wrap=True)
    if layout.bar:
        table.add_column("", no_wrap=True, style="cyan")
        for row, totals in zip(rows, [*shown, rest], strict=False):
            row.append("" if totals is rest else _bar(totals.lines, scale, signs))
    for name, is_shown in (
        ("files", layout.files),
        ("lines", True),
        ("code_lines", layout.code),
        ("functions", layout.functions),
        ("classes", layout.classes),
        ("imports", layout.imports),
    ):
        if is_shown:
            total = _number(getattr(everything, name))
            table.add_column(name.removesuffix("_lines"), total, justify="right", no_wrap=True)
            for row, totals in zip(rows, [*shown, rest], strict=False):
                row.append(_number(getattr(totals, name)))
    if layout.longest_cells:
        cells = layout.longest_cells
        total_longest = _function(everything.longest_function, cells, signs)
        table.add_column("longest function", total_longest, no_wrap=True)
        for row, totals in zip(rows, [*shown, rest], strict=False):
            row.append(_function(totals.longest_function, cells, signs))
    for row, totals in zip(rows, [*shown, rest], strict=False):
        table.add_row(*row, style="dim" if totals is rest else None)
    return table


def proof_panel(proof: Proof, console: Console) -> Panel:
    """Whether the distributed census equals the direct one, and by what one can tell."""
    signs = Signs.of(console)
    equal = proof.direct_digest == proof.distributed_digest
    counted_once = proof.files - proof.lost - proof.twice
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row(
        _mark(equal, signs),
        "equal to the digit" if equal else "different",
        Text(
            f"sha256 {proof.direct_digest[:12]} direct, "
            f"{proof.distributed_digest[:12]} by the cluster",
            style="dim",
        ),
    )
    rows.add_row(
        _mark(not proof.lost, signs),
        f"{_number(proof.lost)} lost",
        Text(f"of {_number(proof.files)} files", style="dim"),
    )
    rows.add_row(
        _mark(not proof.twice, signs),
        f"{_number(proof.twice)} counted twice",
        Text(f"{_number(counted_once)} counted exactly once", style="dim"),
    )
    return Panel(
        rows,
        title="proof: one process and the cluster agree"
        if proof.is_given
        else "NO proof: one process and the cluster disagree",
        title_align="left",
        border_style="green" if proof.is_given else "red",
        width=min(console.width, WIDTH_MAX),
    )


def timeline_panel(
    events: Sequence[tuple[float, str]],
    console: Console,
    *,
    failover_s: float | None = None,
) -> Panel:
    """What happened when: seconds since the start, and the time since the event before."""
    signs = Signs.of(console)
    rows = Table.grid(padding=(0, 1))
    rows.add_column(justify="right", no_wrap=True, style="cyan")
    rows.add_column(no_wrap=True, style="dim")
    rows.add_column(overflow="fold")
    rows.add_column(justify="right", no_wrap=True, style="dim")
    before: float | None = None
    for moment, text in events:
        step = "" if before is None else _duration(moment - before, sign="+")
        rows.add_row(f"{moment:.3f} s", signs.dot, Text(text), step)
        before = moment
    title = "failover"
    if failover_s is not None:
        title = f"failover in {_duration(failover_s)}"
    return Panel(
        rows if events else Text("nothing happened", style="dim"),
        title=title,
        title_align="left",
        border_style="yellow",
        width=min(console.width, WIDTH_MAX),
    )


class RateColumn(ProgressColumn):
    """Files per second, as long as something moves."""

    def render(self, task: Task) -> Text:
        """The current rate, blank before it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} files/s", style="dim")


def progress_bar(console: Console) -> Progress:
    """A progress display; on anything but a terminal it prints nothing until it ends."""
    ascii_only = Signs.of(console).yes != Signs().yes
    columns: list[ProgressColumn] = [
        SpinnerColumn("line" if ascii_only else "dots"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30 if console.width >= 80 else 10),
        MofNCompleteColumn(),
    ]
    if console.width >= 60:
        columns.append(RateColumn())
    if console.width >= 80:
        columns.append(TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def summary(
    census: Census,
    proof: Proof,
    events: Sequence[tuple[float, str]],
    failover_s: float,
    console: Console,
    *,
    title: str = "Census",
) -> Group:
    """The last screen: the table, the failover, the proof."""
    return Group(
        result_table(census, console, title=title),
        "",
        timeline_panel(events, console, failover_s=failover_s),
        proof_panel(proof, console),
    )


def describe(root: str) -> str:
    """What is counted, for a title."""
    if root == standard_library():
        return f"Census of the standard library of Python {platform.python_version()}"
    return f"Census of {root}"


def _number(value: int) -> str:
    return f"{value:,}"


def _duration(seconds: float, *, sign: str = "") -> str:
    if seconds < 1:
        return f"{sign}{seconds * 1000:.0f} ms"
    return f"{sign}{seconds:.2f} s"


def _function(function: Function | None, cells: int, signs: Signs) -> Text:
    if function is None:
        return Text(f"{signs.dash:>5}", style="dim")
    name = _shorten(function.name, cells - 7, signs)
    return Text.assemble((f"{function.lines:>5,}", "bold"), f"  {name}")


def _shorten(name: str, cells: int, signs: Signs) -> str:
    if len(name) <= cells:
        return name
    return name[: cells - len(signs.rest)] + signs.rest


def _bar(value: int, scale: int, signs: Signs) -> str:
    """A bar with a resolution of an eighth of a cell; what is there is seen."""
    if not scale:
        return ""
    if signs.full not in EIGHTHS:
        return signs.full * max(1, round(BAR_CELLS * value / scale))
    whole, part = divmod(max(1, round(8 * BAR_CELLS * value / scale)), 8)
    return signs.full * whole + (EIGHTHS[part - 1] if part else "")


def _mark(is_good: bool, signs: Signs) -> Text:
    return Text(signs.yes, style="bold green") if is_good else Text(signs.no, style="bold red")


def main() -> int:
    """The preview: the direct census, and with ``--sample`` the panels with invented times."""
    parser = argparse.ArgumentParser(prog="python -m examples.census.show")
    parser.add_argument("--direct", action="store_true", help="count in this process and show it")
    parser.add_argument("--sample", action="store_true", help="show the panels, invented figures")
    parser.add_argument("--path", default=standard_library(), help="the source tree")
    arguments = parser.parse_args()
    if not (arguments.direct or arguments.sample):
        parser.error("say --direct, --sample or both")
    console = Console()
    digest, files = "0" * 64, 0
    if arguments.direct:
        try:
            files = len(find_files(arguments.path))
            started_at = time.perf_counter()
            with progress_bar(console) as progress:
                task = progress.add_task("counting", total=files)

                def on_report(report: FileReport) -> None:
                    progress.advance(task)

                census = census_directly(arguments.path, on_report)
        except (OSError, ValueError) as error:
            console.print(Text(f"error: {error}", style="red"))
            return 2
        elapsed_s = time.perf_counter() - started_at
        console.print(result_table(census, console, title=describe(arguments.path)))
        digest = census.digest()
        console.print(
            Text(f"in one process in {_duration(elapsed_s)}, sha256 {digest[:12]}", style="dim")
        )
    if arguments.sample:
        events = [
            (1.204, "node-1 killed with SIGKILL (27 agents, 912 files to go)"),
            (1.391, "node-1 is down: nobody answers for it"),
            (1.402, "27 agents claimed by node-2 under the next epoch"),
            (1.438, "all agents answer again; their mailboxes go on where they stopped"),
        ]
        console.print(timeline_panel(events, console, failover_s=0.234))
        console.print(proof_panel(Proof(digest, digest, files, 0, 0), console))
    return 0


if __name__ == "__main__":
    sys.exit(main())
