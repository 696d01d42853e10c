"""Contention for locks: holders never overlap, and a guarded resource sees tokens that only grow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_exclusion, check_fencing
from foundation_nats.chaos.checkers.exclusion import Guarded, Holding
from foundation_nats.chaos.history import History, now_ns
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, in_parallel, plain, states
from foundation_nats.coordination import lock
from foundation_nats.errors import FoundationError

_TTL_S = 1.5


class Locks(Workload):
    """Contenders that hold a lock for a moment and write to what it guards."""

    name = "lock"
    functions = ("hold",)
    locks = 2
    contenders = 5

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self.holdings: list[Holding] = []

    def manifest(self) -> list[dict[str, Any]]:
        """What the locks guard."""
        return [
            {
                "name": "guarded",
                "run": "foundation_nats.chaos.agents:Guarded",
                "replicas": self.locks,
                "critical": True,
            }
        ]

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Contend until told to stop."""
        await in_parallel(
            [
                partial(
                    self._contend, clients[number % len(clients)], history, stopping, which, number
                )
                for which in range(self.locks)
                for number in range(self.contenders)
            ]
        )

    async def _contend(
        self,
        client: Cluster,
        history: History,
        stopping: asyncio.Event,
        which: int,
        number: int,
    ) -> None:
        name, me = f"chaos-{which}", f"lock.{which}.{number}"
        mine = lock(client, name, ttl_s=_TTL_S, owner=me)
        while not stopping.is_set():
            with history.operation(me, "hold", name) as operation:
                token = await mine.acquire(timeout=2.0)
                begin = now_ns()
                end = begin
                try:
                    await client.ask(f"guarded-{which}", "guarded.write", [me, token], timeout=0.5)
                    await asyncio.sleep(self.pause_s(0.02))
                except FoundationError:
                    pass  # the resource is away; the lock is what is tested
                finally:
                    # Held up to here if it still says so; if not, it ended before.
                    end = now_ns() if mine.is_valid() else begin
                    self.holdings.append(Holding(name, me, token, begin, end))
                    await mine.release()
                operation.ok(token)
            await asyncio.sleep(self.pause_s(0.01))

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """What was accepted, and what holders believed."""
        guarded = [f"guarded-{which}" for which in range(self.locks)]
        return {"states": await states(eye, guarded), "holdings": plain(self.holdings)}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Exclusion by time and by token."""
        accepted = [
            Guarded(agent, holder, token)
            for agent, state in found["states"].items()
            for holder, token in state.get("accepted", ())
        ]
        holdings = [Holding(**item) for item in found["holdings"]]
        return [check_exclusion(holdings), check_fencing(accepted)]
