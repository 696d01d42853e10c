"""Counters that are told numbers in order, and tell a second row of counters: many signals, little state."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, Tally, check_tallies
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    Workload,
    in_parallel,
    send_until_receipted,
    states,
)


class Counters(Workload):
    """Senders that number their signals, and counters that see gaps and repetitions."""

    name = "counters"
    functions = ("send",)
    counters = 16
    senders_per_counter = 2
    base_pause_s = 0.05

    def names(self) -> list[str]:
        """The first row."""
        return [f"counter-{number}" for number in range(self.counters)]

    def receivers(self) -> dict[str, list[str]]:
        """The counter, and its mirror because of it."""
        return {name: [name, f"mirror-{name}"] for name in self.names()}

    def manifest(self) -> list[dict[str, Any]]:
        """Two rows."""
        run = "foundation_nats.chaos.agents:Tally"
        row = {"run": run, "replicas": self.counters, "critical": True}
        return [
            {"name": "counter", "config": {"mirror": "mirror-{}"}, **row},
            {"name": "mirror-counter", **row},
        ]

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """One number after the other, each until it has a receipt."""
        await in_parallel(
            [
                partial(
                    self._send,
                    clients[(number + sender) % len(clients)],
                    history,
                    stopping,
                    f"counters.{number}.{sender}",
                    target,
                )
                for number, target in enumerate(self.names())
                for sender in range(self.senders_per_counter)
            ]
        )

    async def _send(
        self,
        client: Cluster,
        history: History,
        stopping: asyncio.Event,
        process: str,
        target: str,
    ) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            done = await send_until_receipted(
                client,
                history,
                stopping,
                process,
                target,
                "tally.count",
                {"sender": process, "number": number},
                f"{process}.{number}",
                value=number,
            )
            if not done:
                return
            await asyncio.sleep(self.pause_s(self.base_pause_s))

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """Where every counter stands."""
        everybody = sorted({agent for group in self.receivers().values() for agent in group})
        return {"states": await states(eye, everybody)}

    @staticmethod
    def _tallies(found: Mapping[str, Any]) -> dict[str, Tally]:
        return {
            name: Tally(
                state.get("last", {}),
                state.get("applied", 0),
                state.get("repeated", 0),
                state.get("skipped", 0),
            )
            for name, state in found["states"].items()
        }

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Which counter has not reached what was receipted."""
        tallies, receivers = self._tallies(await self.collect(eye)), self.receivers()
        highest: dict[tuple[str, str], int] = {}
        for operation in self.mine(history):
            if operation.outcome == "ok":
                pair = operation.key, operation.process
                highest[pair] = max(highest.get(pair, 0), operation.value)
        for (target, sender), number in highest.items():
            for receiver in receivers[target]:
                last = tallies[receiver].last.get(sender, 0)
                if last < number:
                    return f"{receiver} stands at {last} of {number} from {sender}"
        return None

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every number once, in order."""
        return [check_tallies(self.mine(history), self._tallies(found), self.receivers())]
