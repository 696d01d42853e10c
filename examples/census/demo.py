"""The demo: a census of a real source tree by agents that lose a node half-way.

Starts an embedded server and two nodes, deploys the census, kills one node
with SIGKILL when half of the files are counted, shows the failover, and proves
the result: the same census, computed directly in this process, is equal to the
digit. Run it with ``make demo`` or ``python -m examples.census.demo --path DIR``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.text import Text

from examples.census.agents import Split
from examples.census.census import Census, census_directly, find_files, standard_library
from examples.census.show import (
    Proof,
    describe,
    progress_bar,
    proof_panel,
    result_table,
    timeline_panel,
)
from foundation_nats import Cluster, FoundationError
from foundation_nats.base.tasks import run
from foundation_nats.testing import NodeProcess, TestCluster, eventually

MANIFEST = Path(__file__).with_name("manifest.yaml")
ANALYSERS = 16
TIMEOUT_S = 600.0


@dataclass(slots=True)
class Story:
    """What happened when, in seconds since the start of the count."""

    started_at: float = field(default_factory=time.perf_counter)
    events: list[tuple[float, str]] = field(default_factory=list)

    def note(self, text: str) -> float:
        """Write down that it happened now; returns when that is."""
        moment = time.perf_counter() - self.started_at
        self.events.append((moment, text))
        return moment


async def counted(cluster: Cluster) -> int | None:
    """How many reports the aggregator has; None while it can't be asked."""
    try:
        return int(await cluster.ask("aggregator", "census.progress", timeout=1.0))
    except FoundationError:
        return None


async def follow(cluster: Cluster, story: Story) -> None:
    """Add what the cluster says about the failover to the story."""
    interesting = {"node.down", "leader.elected", "agent.failed_over"}
    async for event in cluster.events.follow():
        if f"{event.topic}.{event.what}" in interesting:
            story.note(event.message)


async def kill_half_way(nodes: TestCluster, victim: NodeProcess, story: Story, done: int) -> float:
    """SIGKILL a node; returns the seconds until all its agents answer elsewhere."""
    cluster = nodes.client
    lost = [info.id for info in await cluster.agents.list(node=victim.name)]
    killed_at = story.note(
        f"{victim.name} killed with SIGKILL: {len(lost)} agents, the aggregator among them, "
        f"{done} files counted"
    )
    victim.kill_all()

    async def all_elsewhere() -> bool:
        homes = {i.id: i for i in await cluster.agents.list()}
        moved = all(homes[id].node != victim.name and homes[id].status == "running" for id in lost)
        return moved and await counted(cluster) is not None

    await eventually(all_elsewhere, timeout=60, every=0.01, message="all agents run elsewhere")
    return story.note("all agents run again, their mailboxes go on where they stopped") - killed_at


async def take_census(
    nodes: TestCluster, root: str, total: int, progress: Progress, task: TaskID, story: Story
) -> tuple[float, dict[str, Any]]:
    """Count, kill half-way, count on; returns the failover time and the aggregator's state."""
    cluster = nodes.client
    await cluster.send("splitter", Split(root=root, analysers=ANALYSERS))
    following = asyncio.create_task(follow(cluster, story))
    failover_s: float | None = None
    try:
        while True:
            done = await counted(cluster)
            if done is not None:
                progress.update(task, completed=done)
            if failover_s is None and done is not None and done >= total // 2:
                home = (await cluster.agents.get("aggregator")).node
                assert home is not None
                progress.update(task, description="counting, one node is gone")
                failover_s = await kill_half_way(nodes, nodes.nodes[home], story, done)
            if done is not None and done >= total:
                break
            await asyncio.sleep(0.05)
    finally:
        following.cancel()
    story.note(f"{total} files counted")
    stored = await cluster.agents.state("aggregator")
    assert stored is not None
    assert failover_s is not None
    return failover_s, stored["state"]


async def demo(root: str, console: Console) -> bool:
    """The whole demo; True if the proof is given."""
    files = find_files(root)
    if not files:
        console.print(Text(f"There are no Python files under {root}.", style="red"))
        return False
    started_at = time.perf_counter()
    repository = str(Path(__file__).parents[2])
    async with TestCluster(nodes=2, workers=1, path=[repository], cluster="census") as nodes:
        up_s = time.perf_counter() - started_at
        console.print(
            Text(f"embedded server and two nodes up in {up_s:.2f} s on {nodes.server.url}")
        )
        cluster = nodes.client
        deployed_at = time.perf_counter()
        await cluster.deployments.apply(MANIFEST)
        names = ["splitter", "analyser", "aggregator"]
        await cluster.deployments.wait_settled(names, timeout=30)
        homes = [info.node for info in await cluster.agents.list()]
        spread = ", ".join(f"{homes.count(name)} on {name}" for name in sorted(nodes.nodes))
        console.print(
            Text(
                f"{len(homes)} agents deployed in "
                f"{time.perf_counter() - deployed_at:.2f} s: {spread}"
            )
        )
        story = Story()
        with progress_bar(console) as progress:
            task = progress.add_task("counting", total=len(files))
            failover_s, state = await take_census(nodes, root, len(files), progress, task, story)
        distributed_s = time.perf_counter() - story.started_at
        dead = await cluster.dead.list()
    census = Census.model_validate(state["census"])
    console.print(timeline_panel(story.events, console, failover_s=failover_s))
    console.print(result_table(census, console, title=describe(root)))
    with progress_bar(console) as progress:
        task = progress.add_task("the same in one process", total=len(files))
        direct_at = time.perf_counter()
        direct = census_directly(root, lambda _report: progress.advance(task))
        direct_s = time.perf_counter() - direct_at
    reports: dict[str, int] = state["reports"]
    proof = Proof(
        direct_digest=direct.digest(),
        distributed_digest=census.digest(),
        files=len(files),
        lost=sum(path not in reports for path in files),
        twice=sum(count > 1 for count in reports.values()),
    )
    console.print(proof_panel(proof, console))
    console.print(
        Text(
            f"by agents, with a node killed: {distributed_s:.1f} s · directly: {direct_s:.1f} s · "
            f"failover of the node's agents: {failover_s * 1000:.0f} ms · "
            f"dead letters: {len(dead)}",
            style="bold",
        )
    )
    return proof.is_given and not dead


def main() -> int:
    """Parse the arguments and run the demo; exit code 0 if the proof is given."""
    parser = argparse.ArgumentParser(prog="python -m examples.census.demo", description=__doc__)
    parser.add_argument("--path", default=standard_library(), help="the source tree to count")
    arguments = parser.parse_args()
    root = str(Path(arguments.path).expanduser().resolve())
    console = Console()

    async def bounded() -> bool:
        async with asyncio.timeout(TIMEOUT_S):
            return await demo(root, console)

    try:
        return 0 if run(bounded) else 1
    except (FoundationError, AssertionError, TimeoutError) as error:
        console.print(Text(f"The demo failed: {error}", style="red"))
        return 1


if __name__ == "__main__":
    sys.exit(main())
