"""``make bench``: our figure, the floor and the ratio, medians of alternated runs.

Ratios are what counts: both sides run on the same machine, one after the other,
again and again. The floor is written by hand on nats-py (`benchmarks.floor`);
where it has no counterpart the figure stands alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import fleet, ours, patterns, streams
from benchmarks.floor import create, failover, memory
from foundation_nats.base.tasks import run
from foundation_nats.bus.floor import latency, mailbox
from foundation_nats.bus.floor.server import throw_away_server

Figures = dict[str, float]
RESULTS = Path(__file__).parent / "results" / "latest.json"


@dataclass(frozen=True, slots=True)
class Work:
    """One thing that both sides do."""

    name: str
    ours: Callable[[], Awaitable[Figures]]
    floor: Callable[[str], Awaitable[Figures]] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    work: str
    text: str
    key: str
    floor_key: str | None
    unit: str
    ratio_target: float | None = None
    """Ours divided by the floor: at least this (more is better) or at most (less is better)."""
    target: float | None = None
    more_is_better: bool = False


WORKS = [
    Work("signals", ours.mailbox, mailbox.run),
    Work("latency", ours.latency, latency.run),
    Work("deploy", ours.create, create.run),
    Work("deploy-many", ours.create_many, None),
    Work("failover", ours.failover, failover.run),
    Work("failover-leader", ours.failover_of_leader, None),
    Work("rebalance", ours.rebalance, None),
    Work("fleet", fleet.bench, None),
    Work("memory", ours.memory, memory.run),
    Work("hibernate", ours.hibernate, None),
    Work("idle", ours.idle, None),
    Work("launch", ours.launch, None),
    Work("fan-out", patterns.fan_out, None),
    Work("barrier", patterns.meeting, None),
    Work("vote", patterns.ballots, None),
    Work("pipeline", streams.through_stages, None),
    Work("map-reduce", streams.in_chunks, None),
]

# fmt: off
ROWS = [
    Row("signals", "durable signals, effects persisted", "signals_per_s", "signals_per_s", "/s", 0.8, None, True),
    Row("latency", "send to handler, p50", "live_p50_us", "live_p50_us", "µs", 1.3),
    Row("latency", "send to handler, p99", "live_p99_us", "live_p99_us", "µs"),
    Row("latency", "ask, p50", "ask_p50_us", "request_p50_us", "µs", 1.3),
    Row("latency", "ask, p99", "ask_p99_us", "request_p99_us", "µs"),
    Row("latency", "asks, 100 callers", "asks_per_s", "requests_per_s", "/s", 0.5, None, True),
    Row("deploy", "1,000 agents deployed and answering", "create_seconds", "create_seconds", "s", None, 0.5),
    Row("deploy-many", "10,000 agents deployed and answering", "create_seconds", None, "s", None, 4.0),
    Row("failover", "node killed: 1,000 agents answer elsewhere", "failover_seconds", "failover_seconds", "s", None, 0.8),
    Row("failover-leader", "the same, the node led", "failover_seconds", None, "s", None, 0.8),
    Row("rebalance", "an agent is moved under load: pause, p50", "pause_p50_ms", None, "ms", None, 100),
    Row("rebalance", "the same, p99", "pause_p99_ms", None, "ms"),
    Row("rebalance", "a node with 20 busy agents is drained", "drain_seconds", None, "s"),
    Row("fleet", "100,000 agents planned onto 100 nodes, processor time", "full_seconds", None, "s", None, fleet.TARGET_S),
    Row("fleet", "the same after a node was lost", "loss_seconds", None, "s", None, fleet.TARGET_S),
    Row("fleet", "agents that the loss of a node moves, of its 1,000", "loss_moved", None, ""),
    Row("fleet", "agents that a rebalance moves to a node that joined", "rebalance_moved", None, ""),
    Row("memory", "idle agent, of 1,000", "bytes_per_agent_1000", None, "B"),
    Row("memory", "idle agent, of 10,000", "bytes_per_agent_10000", None, "B", None, 5 * 1024),
    Row("hibernate", "an agent with 20 KB of state, awake", "awake_bytes", None, "B"),
    Row("hibernate", "the same, asleep", "asleep_bytes", None, "B"),
    Row("hibernate", "ask of one that sleeps, p50", "waking_p50_ms", None, "ms", None, 20.0),
    Row("hibernate", "ask of one that sleeps, p99", "waking_p99_ms", None, "ms"),
    Row("idle", "10,000 agents on 10 nodes of 2 workers, answering", "create_seconds", None, "s"),
    Row("idle", "the same, idle: cpu of all nodes, of one core", "cpu_percent", None, "%", None, 3.0),
    Row("idle", "the same: memory", "rss_mb", None, "MB"),
    Row("launch", "server, node, agent: first answer", "launch_seconds", None, "s", None, 0.5),
    Row("fan-out", "one signal to 1,000 agents: last effect stored", "fan_out_seconds", None, "s"),
    Row("barrier", "a generation of a barrier of 100", "generation_seconds", None, "s"),
    Row("vote", "a vote of 100 agents, all ballots, all told", "vote_seconds", None, "s"),
    Row("pipeline", "items through five stages, exactly once", "items_per_s", None, "/s", None, None, True),
    Row("map-reduce", "1,000,000 items mapped and counted once", "items_per_s", None, "/s", None, None, True),
    Row("map-reduce", "the same: peak memory of the driver", "driver_peak_mb", None, "MB"),
    Row("map-reduce", "the same: what the million adds to it", "driver_growth_mb", None, "MB", None, 32.0),
]
# fmt: on


async def measure(work: Work, runs: int, console: Console) -> tuple[list[Figures], list[Figures]]:
    """Alternate floor and ours."""
    mine: list[Figures] = []
    floor: list[Figures] = []
    for number in range(runs):
        console.print(f"[dim]{work.name}: run {number + 1} of {runs}[/dim]", highlight=False)
        if work.floor is not None:
            with throw_away_server() as url:
                floor.append(await work.floor(url))
        mine.append(await work.ours())
    return mine, floor


def shown(value: float, unit: str) -> str:
    """A figure with its unit."""
    return f"{value:,.3f} {unit}" if unit == "s" else f"{value:,.0f} {unit}"


def spread(figures: list[Figures], key: str) -> tuple[float, float, float]:
    """Median, least and greatest."""
    values = [figure[key] for figure in figures]
    return statistics.median(values), min(values), max(values)


def judge(row: Row, value: float, ratio: float | None) -> str:
    """Whether the target is met; empty where there is none."""
    if row.ratio_target is not None and ratio is not None:
        met = ratio >= row.ratio_target if row.more_is_better else ratio <= row.ratio_target
        sign = "≥" if row.more_is_better else "≤"
        return f"{sign} {row.ratio_target:g} × {'met' if met else 'missed'}"
    if row.target is not None:
        return f"≤ {shown(row.target, row.unit)} {'met' if value <= row.target else 'missed'}"
    return ""


def report(
    results: dict[str, tuple[list[Figures], list[Figures]]], runs: int
) -> tuple[Table, list[dict[str, Any]]]:
    """The table for people, and the same for programs."""
    table = Table(title=f"medians of {runs} alternated runs", title_justify="left")
    for heading in ("figure", "ours (least to greatest)", "floor", "ratio", "target"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    lines = []
    for row in ROWS:
        if row.work not in results:
            continue
        mine, floor = results[row.work]
        value, least, greatest = spread(mine, row.key)
        floor_value = None
        if floor and row.floor_key in floor[0]:
            floor_value = spread(floor, row.floor_key)[0]
        ratio = None if floor_value is None else value / floor_value
        verdict = judge(row, value, ratio)
        table.add_row(
            row.text,
            f"{shown(value, row.unit)} ({shown(least, '').strip()} to {shown(greatest, '').strip()})"
            if row.unit != "s"
            else f"{shown(value, 's')} ({least:.3f} to {greatest:.3f})",
            "-" if floor_value is None else shown(floor_value, row.unit),
            "-" if ratio is None else f"{ratio:.2f}",
            verdict,
        )
        lines.append(
            {
                "figure": row.text,
                "ours": value,
                "least": least,
                "greatest": greatest,
                "floor": floor_value,
                "ratio": ratio,
                "unit": row.unit,
                "target": verdict,
                "at": time.strftime("%Y-%m-%d", time.gmtime()),
                "runs": runs,
            }
        )
    return table, lines


def merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was measured now over what was measured earlier, in the order of the table.

    Figures that the table doesn't know any more go.
    """
    known = {line["figure"]: line for line in (*before, *now)}
    return [known[row.text] for row in ROWS if row.text in known]


def read_figures(path: Path) -> list[dict[str, Any]]:
    """The figures of an earlier run; none where there was none, or it can't be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    figures = found.get("figures", [])
    # Those of before each figure had a date have that of their run.
    machine = found.get("machine", {})
    dates = {key: machine[key] for key in ("at", "runs") if key in machine}
    return [{**dates, **line} for line in figures]


def missed(lines: list[dict[str, Any]]) -> list[str]:
    """The figures that miss their target."""
    return [line["figure"] for line in lines if line["target"].endswith("missed")]


def main() -> int:
    """Measure, print, and merge into ``benchmarks/results/latest.json``; with --check 1 if a target is missed."""
    if sys.argv[1:2] == ["fleet"]:
        return fleet.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", choices=[work.name for work in WORKS])
    parser.add_argument("--check", action="store_true", help="end with 1 if a target is missed")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    console = Console()
    chosen = [work for work in WORKS if not arguments.only or work.name in arguments.only]

    async def all_of_it() -> dict[str, tuple[list[Figures], list[Figures]]]:
        return {work.name: await measure(work, arguments.runs, console) for work in chosen}

    results = run(all_of_it)
    table, lines = report(results, arguments.runs)
    console.print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
        "runs": arguments.runs,
    }
    figures = merged(read_figures(RESULTS), lines)
    RESULTS.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    late = missed(lines)
    if arguments.check and late:
        console.print(f"missed: {'; '.join(late)}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
