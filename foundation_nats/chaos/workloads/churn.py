"""Deployments that come, change, grow, shrink and go, with capacity in short supply."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_assignments
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, manifest_text

_NAMES = ("churn-a", "churn-b", "churn-c")
_MOST = 8


class Churn(Workload):
    """One operator who can't make up its mind."""

    name = "churn"
    functions = ("deploy", "scale", "delete")
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
        """Deploy, scale and delete until told to stop."""
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
