"""Effects outside: two steps of one handler, written to a file that forgets nothing.

The second step is only called when the first is known to be done. So when the
file shows the second, a later line of the first under the same or a later epoch
is a step that was repeated although its ``done`` was stored. (A process that was
frozen inside a step may still write under an epoch that is over; no record can
hold it back, and its line is not held against the platform.)
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_effects
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    Workload,
    dead_keys,
    in_parallel,
    send_until_receipted,
    states,
)


class Steps(Workload):
    """Payers that pay and then mail, both outside NATS."""

    name = "steps"
    functions = ("send",)
    payers = 4
    needs_lab = True  # the file is on this machine

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self._sink = Path(tempfile.gettempdir()) / f"foundation-steps-{os.getpid()}-{seed}.jsonl"

    def names(self) -> list[str]:
        """The payers."""
        return [f"payer-{number}" for number in range(self.payers)]

    def manifest(self) -> list[dict[str, Any]]:
        """The payers, and where they write."""
        return [
            {
                "name": "payer",
                "run": "foundation_nats.chaos.agents:Payer",
                "replicas": self.payers,
                "critical": True,
                "config": {"sink": str(self._sink)},
            }
        ]

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """One order after the other, each until it has a receipt."""
        await in_parallel(
            [
                partial(self._order, clients[n % len(clients)], history, stopping, n, payer)
                for n, payer in enumerate(self.names())
            ]
        )

    async def _order(
        self, client: Cluster, history: History, stopping: asyncio.Event, number: int, payer: str
    ) -> None:
        process, count = f"{self.name}.{number}", 0
        while not stopping.is_set():
            count += 1
            key = f"{process}.{count}"
            if not await send_until_receipted(
                client, history, stopping, process, payer, "steps.order", {"key": key}, key
            ):
                return
            await asyncio.sleep(self.pause_s(0.1))

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Which order has not been carried out."""
        found, dead = await states(eye, self.names()), await dead_keys(eye)
        for operation in self.mine(history):
            done = {key for key, _ in found[operation.key].get("applied", ())}
            done |= set(dead.get(operation.key, ()))
            if operation.outcome == "ok" and operation.value not in done:
                return f"{operation.key} has not carried out {operation.value}"
        return None

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """What the payers believe, and what the world outside has seen."""
        lines = self._sink.read_bytes().splitlines() if self._sink.exists() else []
        self._sink.unlink(missing_ok=True)
        return {
            "states": await states(eye, self.names()),
            "dead": await dead_keys(eye),
            "sink": [orjson.loads(line) for line in lines],
        }

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every order once inside, and no step again that was known to be done."""
        believed = {agent: state.get("applied", []) for agent, state in found["states"].items()}
        applied = {agent: [key for key, _ in items] for agent, items in believed.items()}
        receivers = {name: [name] for name in self.names()}
        results = [tuple(item) for items in believed.values() for item in items]
        return [
            check_effects(self.mine(history), applied, receivers, dead=found["dead"]),
            check_steps(found["sink"], results),
        ]


def check_steps(sink: Iterable[Mapping[str, Any]], results: Iterable[tuple[str, str]]) -> Judgement:
    """Read the world outside in its order.

    Args:
        sink: lines of ``key``, ``step`` (``pay``, then ``mail``), ``token`` (another for each
            call) and ``epoch``.
        results: (key, token that the handler was given for ``pay``).
    """
    judgement = Judgement("steps", 8)
    mailed: dict[str, int] = {}
    paid: dict[str, list[tuple[str, int]]] = {}
    for line in sink:
        judgement.looked_at += 1
        key, epoch = line["key"], line["epoch"]
        if line["step"] == "mail":
            if key not in paid:
                judgement.violated(f"{key} was mailed and never paid", "ghost")
            mailed.setdefault(key, epoch)
        else:
            if key in mailed and epoch >= mailed[key]:
                judgement.violated(
                    f"{key} was paid again under epoch {epoch}, after the step was known to be "
                    f"done under {mailed[key]}",
                    "repeated",
                )
            paid.setdefault(key, []).append((line["token"], epoch))
    for key, token in results:
        tokens = [known for known, _ in paid.get(key, ())]
        if token not in tokens:
            judgement.violated(f"{key} believes in payment {token}, which nobody made", "ghost")
        if key not in mailed:
            judgement.violated(f"{key} is done and was never mailed", "lost")
    return judgement
