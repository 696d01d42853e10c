"""Deployments that come, change, grow, shrink and go, with capacity in short supply; nodes that are emptied."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_assignments
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, manifest_text
from foundation_nats.errors import FoundationError, NodeNotFoundError

_NAMES = ("churn-a", "churn-b", "churn-c")
_MOST = 8
_PATIENCE_S = 8.0
"""For how long a drain or a rebalance is watched; what is left of it goes on."""


class Churn(Workload):
    """One operator who can't make up its mind."""

    name = "churn"
    functions = ("deploy", "scale", "undo", "delete")
    operations_min = 3

    def manifest(self) -> list[dict[str, Any]]:
        """None at first."""
        return []

    def _entry(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "run": "foundation_nats.chaos.agents:Idler",
            "replicas": self.chance.randint(1, _MOST),
            "critical": self.chance.random() < 0.5,
            "resources": {"gpu": 1},
            "config": {"version": self.chance.randint(1, 3)},
        }

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Deploy, scale, undo and delete until told to stop."""
        client = clients[0]
        known: set[str] = set()
        while not stopping.is_set():
            name = self.chance.choice(_NAMES)
            dice = self.chance.random()
            if name not in known or dice < 0.3:
                entry = self._entry(name)
                with history.operation("churn.0", "deploy", name, entry["replicas"]) as operation:
                    await client.deployments.apply(manifest_text([entry]))
                    operation.ok()
                    known.add(name)
            elif dice < 0.4:
                with history.operation("churn.0", "undo", name) as operation:
                    # Refused where there is nothing to go back to.
                    await client.deployments.undo(name)
                    operation.ok()
            elif dice < 0.8:
                count = self.chance.randint(0, _MOST)
                with history.operation("churn.0", "scale", name, count) as operation:
                    await client.deployments.scale(name, count)
                    operation.ok()
            else:
                with history.operation("churn.0", "delete", name) as operation:
                    await client.deployments.delete(name)
                    operation.ok()
                    known.discard(name)
            await asyncio.sleep(self.pause_s(0.4))

    @classmethod
    def deployments(cls) -> list[str]:
        """What it may leave behind."""
        return list(_NAMES)

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every epoch had one home. (Capacity and convergence are judged for the whole round.)"""
        return [check_assignments(seen.assignments)]


class Maintenance(Workload):
    """Another operator, who empties one node after the other and evens out what they hold.

    It moves whatever runs there, so it is for clusters of a lab alone.
    """

    name = "maintenance"
    functions = ("drain", "uncordon", "rebalance")
    operations_min = 1
    needs_lab = True

    def manifest(self) -> list[dict[str, Any]]:
        """None: it works with what the others deploy."""
        return []

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Drain, uncordon and rebalance until told to stop; no node stays cordoned."""
        client = clients[-1]
        cordoned: set[str] = set()
        while not stopping.is_set():
            await asyncio.sleep(self.pause_s(0.6))
            for name in sorted(cordoned):
                with history.operation("maintenance.0", "uncordon", name) as operation:
                    with suppress(NodeNotFoundError):  # it never was cordoned
                        await client.nodes.uncordon(name)
                    operation.ok()
                    cordoned.discard(name)
            if cordoned:
                continue  # never two: the others must have room
            if self.chance.random() < 0.5:
                with history.operation("maintenance.0", "rebalance", "all") as operation:
                    await client.rebalance(timeout=_PATIENCE_S)
                    operation.ok()
                continue
            names: list[str] = []
            with suppress(FoundationError):
                names = [node.name for node in await client.nodes.list() if node.status == "up"]
            if len(names) > 1:
                name = self.chance.choice(names)
                cordoned.add(name)  # whatever becomes of it: its outcome may be unknown
                with history.operation("maintenance.0", "drain", name) as operation:
                    await client.nodes.drain(name, timeout=_PATIENCE_S)
                    operation.ok()
        while cordoned:
            for name in sorted(cordoned):
                try:
                    await client.nodes.uncordon(name)
                except NodeNotFoundError:
                    cordoned.discard(name)  # it never was
                except FoundationError:
                    await asyncio.sleep(0.1)
                else:
                    cordoned.discard(name)

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every epoch had one home, however often agents were moved."""
        return [check_assignments(seen.assignments)]
