"""``python -m benchmarks fleet``: how long the pure planners take for a large fleet, and how much they move.

No process, no broker: records are made up, plans are applied to them as if every
command succeeded at once. Per strategy: a full pass that places everyone, a pass
that has nothing to do, one after a node was lost and one after a node joined, and
the moves that `rebalance` proposes then. Figures are processor time of one core,
so that a busy machine doesn't show in them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from foundation_nats.cluster.registry import Held
from foundation_nats.cluster.view import NodeView
from foundation_nats.config import ControlConfig
from foundation_nats.control.commands import Assign, MarkPending
from foundation_nats.control.planner import History, plan
from foundation_nats.control.rebalance import Balance, Move, rebalance
from foundation_nats.placement.strategies import STRATEGIES
from foundation_schemas import (
    AgentSpec,
    AgentStatus,
    Deployment,
    Load,
    NodeRecord,
    NodeStatus,
    PlacementPolicy,
    Spread,
)

TARGET_S = 2.0
"""Of a full pass with 100 nodes and 100,000 agents."""
ZONES = ("a", "b", "c")
LEADER = "n000"

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What *work* returns, and the processor's seconds that it took."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def node(index: int, slots: int) -> NodeView:
    """A node of the fleet."""
    name = f"n{index:03d}"
    record = NodeRecord(
        name=name,
        incarnation=1,
        workers=[f"{name}-0", f"{name}-1"],
        capabilities=["gpu"] if index % 4 == 0 else [],
        labels={"zone": ZONES[index % len(ZONES)], "cores": str(8 << index % 3)},
        capacity={"slots": slots},
    )
    return NodeView(record, NodeStatus.UP, Load())


@dataclass(slots=True)
class Fleet:
    """Nodes, wishes and records, and the passes over them."""

    desired: Mapping[str, Deployment]
    nodes: dict[str, NodeView]
    held: dict[str, Held] = field(default_factory=dict)
    history: History = field(default_factory=History)
    now: float = 1000.0

    @classmethod
    def build(cls, nodes: int, agents: int, policy: PlacementPolicy) -> Fleet:
        """*agents* in a hundred deployments on *nodes* that could hold half as many again."""
        slots = max(1, agents * 3 // (2 * nodes))
        if policy.strategy == "leader_only":
            slots = agents
        spec = AgentSpec(run="fleet:Agent", critical=True, placement=policy)
        kinds = min(100, agents)
        sizes = [agents // kinds + (1 if k < agents % kinds else 0) for k in range(kinds)]
        return cls(
            {
                f"d{k:02d}": Deployment(name=f"d{k:02d}", replicas=n, spec=spec)
                for k, n in enumerate(sizes)
            },
            {view.name: view for view in (node(i, slots) for i in range(nodes))},
        )

    def replan(self) -> tuple[int, int, float]:
        """One full pass, carried out: agents placed, agents left pending, seconds."""
        found, seconds = timed(
            lambda: plan(
                self.desired,
                self.held,
                self.nodes,
                self.now,
                ControlConfig(),
                LEADER,
                random.Random(1),
                history=self.history,
                commands_max=None,
            )
        )
        placed = pending = 0
        for command in found.commands:
            if isinstance(command, Assign):
                running = command.record.model_copy(update={"status": AgentStatus.RUNNING})
                self.held[command.agent] = Held(running, command.expected + 1)
                placed += 1
            elif isinstance(command, MarkPending):
                self.held[command.agent] = Held(command.record, command.expected + 1)
                pending += 1
        self.now += 1.0
        return placed, pending, seconds

    def lose(self, name: str) -> int:
        """A node dies; returns how many agents it held."""
        view = self.nodes[name]
        self.nodes[name] = NodeView(view.record, NodeStatus.DOWN, view.load)
        return sum(1 for item in self.held.values() if item.record.node == name)

    def join(self, view: NodeView) -> None:
        """A node comes."""
        self.nodes[view.name] = view

    def even_out(self, strategy: Balance) -> tuple[tuple[Move, ...], float]:
        """The moves that `rebalance` proposes, made; seconds."""
        found, seconds = timed(
            lambda: rebalance(
                self.desired,
                self.held,
                self.nodes,
                strategy=strategy,
                budget=len(self.held),
                history=self.history,
            )
        )
        for move in found.moves:
            item = self.held[move.agent]
            record = item.record.model_copy(update={"node": move.target})
            self.held[move.agent] = Held(record, item.revision + 1)
        return found.moves, seconds

    def counts(self) -> dict[str, int]:
        """Agents per node that is up."""
        held = dict.fromkeys((n for n, v in self.nodes.items() if v.status is NodeStatus.UP), 0)
        for item in self.held.values():
            if item.record.node in held:
                held[item.record.node] += 1
        return held


@dataclass(frozen=True, slots=True)
class Line:
    """What one strategy did."""

    strategy: str
    full_s: float
    placed: int
    pending: int
    fewest: int
    most: int
    idle_s: float
    idle_commands: int
    loss_s: float
    lost: int
    loss_moved: int
    join_s: float
    join_moved: int
    rebalance_s: float
    rebalance_moved: int
    again_moved: int
    """By a second `rebalance`, right after the first."""


def policies() -> dict[str, PlacementPolicy]:
    """What is measured: every strategy, and the rules that cost most."""
    found = {name: PlacementPolicy(strategy=name) for name in STRATEGIES}
    found["spread over zones"] = PlacementPolicy(spread="zone")
    found["zones, max_skew 1"] = PlacementPolicy(spread=Spread(label="zone"))
    found["max_per_node, expressions"] = PlacementPolicy(
        max_per_node=1_000_000, expressions=["cores >= 16", "zone in (a, b, c)", "!spot"]
    )
    return found


def simulate(name: str, policy: PlacementPolicy, nodes: int, agents: int) -> Line:
    """Place all, look again, lose a node, get one, even out."""
    fleet = Fleet.build(nodes, agents, policy)
    placed, pending, full_s = fleet.replan()
    counts = fleet.counts()
    idle_placed, idle_pending, idle_s = fleet.replan()
    lost = fleet.lose(f"n{nodes // 2:03d}")
    loss_moved, _, loss_s = fleet.replan()
    slots = int(next(iter(fleet.nodes.values())).record.capacity["slots"])
    fleet.join(node(nodes, slots))
    join_moved, _, join_s = fleet.replan()
    moves, rebalance_s = fleet.even_out(Balance.EVEN_DISTRIBUTION)
    again, _ = fleet.even_out(Balance.EVEN_DISTRIBUTION)
    return Line(
        name, full_s, placed, pending, min(counts.values()), max(counts.values()),
        idle_s, idle_placed + idle_pending, loss_s, lost, loss_moved, join_s, join_moved,
        rebalance_s, len(moves), len(again),
    )  # fmt: skip


async def bench() -> dict[str, float]:
    """For ``make bench``: the strategy that is the default, at full size."""
    began = time.perf_counter()
    line = simulate("load_balanced", policies()["load_balanced"], 100, 100_000)
    return {
        "full_seconds": line.full_s,
        "loss_seconds": line.loss_s,
        "loss_moved": float(line.loss_moved),
        "join_moved": float(line.join_moved),
        "rebalance_moved": float(line.rebalance_moved),
        "wall_seconds": time.perf_counter() - began,
    }


def shown(lines: list[Line], nodes: int, agents: int) -> Table:
    """The table for people."""
    table = Table(
        title=f"{agents:,} agents on {nodes} nodes, one node lost, one joined; "
        f"a full pass in at most {TARGET_S:g} s",
        title_justify="left",
    )
    table.add_column("strategy")
    for heading in (
        "full pass", "per node", "nothing to do", "loss", "moved by loss",
        "moved by join", "rebalance", "moved by it", "and again",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for line in lines:
        met = "" if line.full_s <= TARGET_S else " missed"
        table.add_row(
            line.strategy,
            f"{line.full_s:.2f} s{met}",
            f"{line.fewest:,} to {line.most:,}",
            f"{line.idle_s:.2f} s",
            f"{line.loss_s:.2f} s",
            f"{line.loss_moved:,} of {line.lost:,}",
            f"{line.join_moved:,}",
            f"{line.rebalance_s:.2f} s",
            f"{line.rebalance_moved:,}",
            f"{line.again_moved:,}",
        )
    return table


def main(arguments: list[str]) -> int:
    """Simulate, and print a table or JSON; 1 if a full pass took too long."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fleet", description=__doc__)
    known = policies()
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--agents", type=int, default=100_000)
    parser.add_argument("--only", action="append", choices=list(known))
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    chosen = parser.parse_args(arguments)
    if not 3 <= chosen.nodes <= 10_000 or chosen.agents < 1:
        parser.error("at least 3 and at most 10,000 nodes, and at least 1 agent")
    lines = [
        simulate(name, policy, chosen.nodes, chosen.agents)
        for name, policy in known.items()
        if not chosen.only or name in chosen.only
    ]
    if chosen.output == "json":
        result: dict[str, Any] = {"nodes": chosen.nodes, "agents": chosen.agents}
        print(json.dumps({**result, "strategies": [asdict(line) for line in lines]}, indent=2))
    else:
        Console().print(shown(lines, chosen.nodes, chosen.agents))
    return 1 if any(line.full_s > TARGET_S for line in lines) else 0
