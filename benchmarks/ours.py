"""The platform's side of each figure: real servers, nodes and clients, through the public API.

Every function starts a cluster of its own and ends it. Clients that produce
load run in processes of their own (`benchmarks.drive`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path

import orjson

from benchmarks.drive import AGENTS, CLUSTER, MOVERS, SIGNALS, percentile
from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.testing import NodeProcess, TestCluster, eventually

ROOT = str(Path(__file__).parents[1])
DRIVE_TIMEOUT_S = 120.0
MANY = 10_000
IDLE_AFTER_S = 8.0
"""After the last answer, until everybody has said what it had to say."""
IDLE_FOR_S = 15.0


def deployment(count: int, *, label: str = "") -> str:
    """A manifest of *count* critical counters."""
    place = f"placement: {{labels: {{bench: {label}}}}}" if label else ""
    return f"""
version: 1
agents:
  - name: c
    run: benchmarks.agents:Counter
    replicas: {count}
    critical: true
    {place}
"""


async def drive(nodes: TestCluster, what: str) -> dict[str, float]:
    """Run a driver to its end; what it measured."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.drive", what, nodes.server.url, stdout=PIPE, cwd=ROOT
    )
    async with asyncio.timeout(DRIVE_TIMEOUT_S):
        output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"driver {what} failed with {process.returncode}")
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


class Waiter:
    """A driver that is connected, and waits to be told to ask all agents until each has answered."""

    async def open(self, nodes: TestCluster, expected: int, count: int = AGENTS) -> Waiter:
        """Start it for *count* agents; returns when it is ready."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.drive", "answer", nodes.server.url, str(expected),
            str(count), stdin=PIPE, stdout=PIPE, cwd=ROOT,
        )  # fmt: skip
        assert self._process.stdout is not None
        async with asyncio.timeout(DRIVE_TIMEOUT_S):
            await self._process.stdout.readline()
        return self

    async def go(self) -> float:
        """The moment at which all had answered, on the machine's monotonic clock."""
        async with asyncio.timeout(DRIVE_TIMEOUT_S):
            output, _ = await self._process.communicate(b"go\n")
        moment: float = json.loads(output.splitlines()[-1])["answered_at"]
        return moment


async def settled_nodes(nodes: TestCluster) -> None:
    """Wait until every worker answers, so that no start-up is measured."""

    async def ready() -> bool:
        infos = await nodes.client.nodes.list()
        for info in infos:
            for worker in info.workers:
                subject = nodes.client.subjects.control_worker(worker, "ping")
                await nodes.client.bus.request(subject, b"", timeout=1)
        return True

    await eventually(ready, timeout=20)
    await asyncio.sleep(0.5)


async def mailbox() -> dict[str, float]:
    """Durable signals with persisted exactly-once effects, signals/s; verified."""
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        await nodes.client.deployments.apply(deployment(AGENTS))
        await nodes.client.deployments.wait_settled(["c"], timeout=30)
        await settled_nodes(nodes)
        produced = await drive(nodes, "produce")
        bucket = Bucket(nodes.client.bus, nodes.client.subjects, "state")
        names = [f"c-{index}" for index in range(AGENTS)]
        while True:
            entries = await bucket.read_many(names)
            ended_at = time.monotonic()
            values = [orjson.loads(entry.value or b"{}") for entry in entries.values()]
            total = sum(value["state"]["counter"] for value in values)
            if total == SIGNALS:
                break
            if total > SIGNALS:
                raise RuntimeError(f"{total} effects of {SIGNALS} signals")
        return {
            "signals_per_s": SIGNALS / (ended_at - produced["started_at"]),
            "producer_seconds": produced["producer_seconds"],
            "commits": float(sum(value["commit"] for value in values)),
        }


async def latency() -> dict[str, float]:
    """Send to handler, ask, and asks/s from 100 callers to 100 agents in one worker."""
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        await nodes.client.deployments.apply(deployment(100))
        await nodes.client.agents.start("benchmarks.agents:Stamp", id="stamp")
        await nodes.client.deployments.wait_settled(["c"], timeout=30)
        await settled_nodes(nodes)
        return await drive(nodes, "latency")


async def create(count: int = AGENTS) -> dict[str, float]:
    """Deploy 1,000 agents onto two nodes until each has answered."""
    async with TestCluster(nodes=2, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        await settled_nodes(nodes)
        waiter = await Waiter().open(nodes, 0, count)
        began = time.monotonic()
        asking = asyncio.create_task(waiter.go())
        await nodes.client.deployments.apply(deployment(count))
        return {"create_seconds": await asking - began}


async def create_many() -> dict[str, float]:
    """The same with 10,000."""
    return await create(MANY)


async def failover(*, of_leader: bool = False) -> dict[str, float]:
    """SIGKILL a node with 1,000 critical agents until all answer elsewhere, state intact."""
    async with TestCluster(nodes=2, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        await settled_nodes(nodes)
        leader = await nodes.leader()
        victim = next(n for n in nodes.nodes.values() if (n is leader) == of_leader)
        await _fill(nodes, victim)
        waiter = await Waiter().open(nodes, 7)
        await asyncio.sleep(1.0)
        killed_at = time.monotonic()
        victim.kill_all()
        return {"failover_seconds": await waiter.go() - killed_at}


async def _fill(nodes: TestCluster, victim: NodeProcess) -> None:
    """1,000 agents with state, all on *victim*: the other node is away while they are placed."""
    other = next(node for node in nodes.nodes.values() if node is not victim)
    cluster = nodes.client
    name = other.name
    other.terminate()
    await other.wait()
    await eventually(nodes.leader, timeout=20)
    await cluster.deployments.apply(deployment(AGENTS))
    await cluster.deployments.wait_settled(["c"], timeout=30)
    await asyncio.gather(*(cluster.ask(f"c-{i}", "add", {"amount": 7}) for i in range(AGENTS)))
    nodes.start_node(name)
    await nodes.wait_up([name])
    await settled_nodes(nodes)


async def rebalance() -> dict[str, float]:
    """Drain a node of three and fill it again, while 60 agents get 50 signals/s each; verified.

    A pause is the time from an agent's `on_stop` to the first signal that its next activation
    handles; the signals are 20 ms apart, so that it is overstated by up to that.
    """
    async with TestCluster(nodes=3, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        cluster = nodes.client
        await settled_nodes(nodes)
        text = deployment(MOVERS).replace("Counter", "Moved")
        await cluster.deployments.apply(text)
        await cluster.deployments.wait_settled(["c"], timeout=30)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.drive", "beat", nodes.server.url,
            stdin=PIPE, stdout=PIPE, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        async with asyncio.timeout(DRIVE_TIMEOUT_S):
            await process.stdout.readline()
            await asyncio.sleep(1.0)
            began = time.monotonic()
            drained = await cluster.nodes.drain("n2")
            drain_s = time.monotonic() - began
            await cluster.nodes.uncordon("n2")
            await asyncio.sleep(0.5)
            began = time.monotonic()
            rebalanced = await cluster.rebalance()
            rebalance_s = time.monotonic() - began
            await asyncio.sleep(0.5)
            output, _ = await process.communicate(b"stop\n")
        sent = json.loads(output.splitlines()[-1])["sent"]
        bucket = Bucket(cluster.bus, cluster.subjects, "state")
        while True:
            entries = await bucket.read_many([f"c-{index}" for index in range(MOVERS)])
            states = [orjson.loads(entry.value or b"{}")["state"] for entry in entries.values()]
            total = sum(state["counter"] for state in states)
            if total == sent:
                break
            if total > sent:
                raise RuntimeError(f"{total} effects of {sent} signals")
            await asyncio.sleep(0.05)
        pauses = [pause * 1000 for state in states for pause in state["pauses"]]
        moves = len(drained.moved) + len(rebalanced.moved)
        if len(pauses) != moves:
            raise RuntimeError(f"{len(pauses)} pauses of {moves} moves")
        return {
            "pause_p50_ms": percentile(pauses, 0.5),
            "pause_p99_ms": percentile(pauses, 0.99),
            "moves": float(moves),
            "drain_seconds": drain_s,
            "rebalance_seconds": rebalance_s,
        }


async def failover_of_leader() -> dict[str, float]:
    """The same when the killed node leads (it does: the other one has just come)."""
    return await failover(of_leader=True)


async def memory() -> dict[str, float]:
    """Resident bytes of a worker per idle agent, at 1,000 and at 10,000."""
    found: dict[str, float] = {}
    for count in (AGENTS, MANY):
        async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
            await nodes.client.agents.start("benchmarks.agents:Counter", id="first")
            (worker,) = nodes.nodes["n1"].workers()
            before = worker.memory_info().rss
            await nodes.client.deployments.apply(deployment(count))
            await nodes.client.deployments.wait_settled(["c"], timeout=60)
            await asyncio.sleep(1.0)
            found[f"bytes_per_agent_{count}"] = (worker.memory_info().rss - before) / count
    return found


async def launch() -> dict[str, float]:
    """Server, one node and an agent, from the first process to the first answer."""
    began = time.monotonic()
    async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
        await nodes.client.agents.start("benchmarks.agents:Counter", id="first")
        await nodes.client.ask("first", "get")
        return {"launch_seconds": time.monotonic() - began}


async def idle() -> dict[str, float]:
    """10 nodes of two workers hold 10,000 agents that have nothing to do: what does it cost?

    The processor time is that of all nodes and workers, without the server's, over some
    seconds; as a share of one core.
    """
    async with TestCluster(nodes=10, workers=2, path=[ROOT], cluster=CLUSTER) as nodes:
        await settled_nodes(nodes)
        waiter = await Waiter().open(nodes, 0, MANY)
        began = time.monotonic()
        asking = asyncio.create_task(waiter.go())
        await nodes.client.deployments.apply(deployment(MANY))
        seconds = await asking - began
        await asyncio.sleep(IDLE_AFTER_S)
        family = [process for node in nodes.nodes.values() for process in node.family()]

        def used() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in family)

        before, at = used(), time.monotonic()
        await asyncio.sleep(IDLE_FOR_S)
        share = (used() - before) / (time.monotonic() - at)
        return {
            "create_seconds": seconds,
            "cpu_percent": share * 100,
            "rss_mb": sum(process.memory_info().rss for process in family) / 1e6,
        }


async def hibernate() -> dict[str, float]:
    """Agents with 20 KB of state, awake and asleep: memory of each, and how long waking takes."""
    found: dict[str, float] = {}
    batches, each = 8, 250
    for kind in ("Heavy", "Sleepy"):
        async with TestCluster(nodes=1, workers=1, path=[ROOT], cluster=CLUSTER) as nodes:
            client = nodes.client
            await client.agents.start("benchmarks.agents:Heavy", id="first")
            (worker,) = nodes.nodes["n1"].workers()
            before = worker.memory_info().rss
            for batch in range(batches):
                name = f"b{batch}"
                await client.deployments.apply(
                    "version: 1\nagents:\n"
                    + "".join(
                        f"  - {{name: b{b}, run: 'benchmarks.agents:{kind}', replicas: {each}}}\n"
                        for b in range(batch + 1)
                    )
                )
                await client.deployments.wait_settled([name], timeout=60)
                if kind == "Sleepy":

                    async def asleep(name: str = name, client: Cluster = client) -> bool:
                        infos = await client.agents.list(deployment=name)
                        return all(info.status == "hibernated" for info in infos)

                    await eventually(asleep, timeout=60, message="they sleep")
            size = (worker.memory_info().rss - before) / (batches * each)
            found["awake_bytes" if kind == "Heavy" else "asleep_bytes"] = size
            times = []
            for number in range(0, batches * each, 10):
                began = time.perf_counter()
                await client.ask(f"b{number % batches}-{number // batches}", "add", {"amount": 1})
                times.append((time.perf_counter() - began) * 1000)
            label = "awake" if kind == "Heavy" else "waking"
            found[f"{label}_p50_ms"] = percentile(times, 0.5)
            found[f"{label}_p99_ms"] = percentile(times, 0.99)
    return found
