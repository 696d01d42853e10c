"""Workload and checker for fault tests: senders that keep receipts, and the verdict on what arrived.

An operation ends with a receipt or stays unknown. The verdict: every receipted
key is applied exactly once by its ledger and exactly once by the ledger's
mirror (the emitted signal), in the order sent by one sender; no unknown key is
applied twice; epochs never go back. A run with too few operations is void.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from foundation_nats import Cluster, FoundationError
from foundation_nats.testing import TestCluster, eventually

LEDGERS = 12


@dataclass
class History:
    """What was sent and what was receipted, per ledger, in order."""

    sent: dict[str, list[str]] = field(default_factory=dict)
    receipted: dict[str, list[str]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)


class Load:
    """Senders, one per ledger, that send one signal after the other until told to stop."""

    def __init__(self, cluster: Cluster, *, pause_s: float = 0.02) -> None:
        self._cluster = cluster
        self._pause_s = pause_s
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.history = History()

    def start(self) -> None:
        """Begin to send."""
        for number in range(LEDGERS):
            self._tasks.append(asyncio.create_task(self._send(f"ledger-{number}")))

    async def _send(self, ledger: str) -> None:
        sent = self.history.sent.setdefault(ledger, [])
        receipted = self.history.receipted.setdefault(ledger, [])
        number = 0
        while not self._stopping:
            number += 1
            key = f"{ledger}.{number}"
            sent.append(key)
            while True:
                try:
                    # The same id until there is a receipt: it may take effect once.
                    await self._cluster.send(
                        ledger, "ledger.append", {"key": key}, id=key, timeout=5
                    )
                except FoundationError as error:
                    self.history.errors[error.code] += 1
                    if self._stopping:
                        return
                    await asyncio.sleep(0.05)
                else:
                    receipted.append(key)
                    break
            await asyncio.sleep(self._pause_s)

    async def stop(self) -> History:
        """Stop, and return what was sent."""
        self._stopping = True
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)
        return self.history

    @property
    def receipts(self) -> int:
        """Receipts so far."""
        return sum(len(keys) for keys in self.history.receipted.values())


async def deploy(nodes: TestCluster) -> None:
    """Ledgers and their mirrors, all critical."""
    text = f"""
version: 1
agents:
  - name: ledger
    run: fleet:Ledger
    replicas: {LEDGERS}
    critical: true
    config: {{mirror: "mirror-{{}}"}}
  - name: mirror-ledger
    run: fleet:Mirror
    replicas: {LEDGERS}
    critical: true
"""
    await nodes.client.deployments.apply(text)
    await nodes.client.deployments.wait_settled(["ledger", "mirror-ledger"], timeout=60)


async def verdict(nodes: TestCluster, history: History, *, minimum: int = 100) -> None:
    """Raise AssertionError unless everything receipted took effect exactly once, in order."""
    cluster = nodes.client
    receipts = sum(len(keys) for keys in history.receipted.values())
    assert receipts >= minimum, f"void: only {receipts} receipts"

    async def quiet() -> bool:
        for ledger, keys in history.receipted.items():
            for agent in (ledger, f"mirror-{ledger}"):
                stored = await cluster.agents.state(agent)
                assert stored is not None
                applied = stored["state"]["applied"]
                missing = set(keys) - set(applied)
                assert not missing, f"{agent} lacks {sorted(missing)[:5]} ({len(missing)} in all)"
        return True

    await eventually(quiet, timeout=40, every=0.1, message="every receipted signal is applied")
    for ledger, sent in history.sent.items():
        for agent in (ledger, f"mirror-{ledger}"):
            stored = await cluster.agents.state(agent)
            assert stored is not None
            applied = stored["state"]["applied"]
            twice = [key for key, count in Counter(applied).items() if count > 1]
            assert not twice, f"{agent} applied {twice[:5]} more than once"
            assert applied == [key for key in sent if key in set(applied)], f"{agent}: order"
    assert not await cluster.dead.list(), "dead letters without a reason"


async def everyone_runs_once(nodes: TestCluster, *, timeout: float = 30) -> None:
    """Every deployed agent runs, in exactly one worker, under the epoch of its record."""
    cluster = nodes.client

    async def settled() -> bool:
        infos = await cluster.agents.list()
        assert all(info.status == "running" for info in infos), [
            (info.id, info.status, info.reason) for info in infos if info.status != "running"
        ][:5]
        hosted: Counter[tuple[str, int]] = Counter()
        for node in await cluster.nodes.list():
            if node.status != "down":
                hosted.update((await inspect(cluster, node.name)).items())
        expected = Counter({(info.id, info.epoch): 1 for info in infos})
        assert hosted == expected, f"{hosted - expected} {expected - hosted}"
        return True

    await eventually(settled, timeout=timeout, every=0.1, message="every agent runs once")


async def inspect(cluster: Cluster, node: str) -> dict[str, int]:
    """Agent to epoch, as the node's workers really have them in memory."""
    from foundation_nats.bus import rpc
    from foundation_schemas import InspectReply

    reply = await rpc.call(
        cluster.bus, cluster.subjects.control_node(node, "inspect"), None, InspectReply, timeout=5
    )
    return reply.agents


class EpochWatch:
    """Follows the registry and fails if an epoch ever goes back."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}
        self.backwards: list[str] = []

    async def open(self, cluster: Cluster) -> None:
        """Begin to watch."""
        registry = await cluster._open_registry()
        registry.subscribe(self._on_change)

    def _on_change(self, agent: str, held: object) -> None:
        record = getattr(held, "record", None)
        if record is None:
            return
        if record.epoch < self.epochs.get(agent, 0):
            self.backwards.append(f"{agent}: {self.epochs[agent]} -> {record.epoch}")
        self.epochs[agent] = max(record.epoch, self.epochs.get(agent, 0))

    def check(self) -> None:
        """Raise AssertionError if one went back."""
        assert not self.backwards, self.backwards
