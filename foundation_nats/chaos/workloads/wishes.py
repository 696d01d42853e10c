"""Operators who apply, scale and delete the same deployments: what they were told stands is what readers see.

A wish is a key of the registry's bucket ``desired``, so what is judged is a
linearizable object per key: an apply, scale or delete that was answered and then
lost, or one that was done twice, has no order that explains it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.chaos.checkers import Judgement, check_linearizable
from foundation_nats.chaos.checkers.linearizable import Model
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, in_parallel, manifest_text
from foundation_nats.errors import DeploymentNotFoundError
from foundation_schemas import Deployment

_NAMES = ("wish-a", "wish-b")
_MOST = 2
_STAMP = 1000.0
"""A wish's number is kept in its update policy, whose change restarts nobody."""


def _step(state: Any, f: str, value: Any, result: Any, is_known: bool) -> tuple[bool, Any]:
    match f:
        case "look":
            return not is_known or result == (None if state is None else list(state)), state
        case "apply":
            return True, tuple(value)
        case "scale":
            after = None if state is None else (state[0], value)
            return not is_known or result is (state is not None), after
        case "delete":
            return not is_known or result is (state is not None), None
        case _:
            raise ValueError(f"a wish has no {f!r}")


WISH = Model(None, _step)
"""look → None or [number, replicas]; apply([number, replicas]); scale(replicas) and delete() → whether
there was one."""


class Wishes(Workload):
    """Operators who don't know of each other."""

    name = "wishes"
    functions = ("apply", "scale", "delete", "look")
    operators = 3

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self._numbers = itertools.count(1)

    def manifest(self) -> list[dict[str, Any]]:
        """None at first."""
        return []

    @classmethod
    def deployments(cls) -> list[str]:
        """What it may leave behind."""
        return list(_NAMES)

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Wish until told to stop."""
        await in_parallel(
            [
                partial(self._operate, clients[n % len(clients)], history, stopping, n)
                for n in range(self.operators)
            ]
        )

    async def _operate(
        self, client: Cluster, history: History, stopping: asyncio.Event, number: int
    ) -> None:
        process = f"{self.name}.{number}"
        while not stopping.is_set():
            name = self.chance.choice(_NAMES)
            f = self.chance.choice(("apply", "apply", "scale", "scale", "delete", "look", "look"))
            stamp, replicas = next(self._numbers), self.chance.randint(0, _MOST)
            value: Any = {"apply": [stamp, replicas], "scale": replicas}.get(f)
            with history.operation(process, f, name, value) as operation:
                try:
                    if f == "apply":
                        await client.deployments.apply(_text(name, stamp, replicas))
                        operation.ok()
                    elif f == "scale":
                        await client.deployments.scale(name, replicas)
                        operation.ok(True)
                    elif f == "delete":
                        await client.deployments.delete(name)
                        operation.ok(True)
                    else:
                        operation.ok(await _look(client, name))
                except DeploymentNotFoundError:
                    operation.ok(False)
            await asyncio.sleep(self.pause_s(0.3))

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Some order explains what operators were told and what they saw."""
        judgement = check_linearizable(self.mine(history), WISH)
        judgement.invariant = 13
        return [judgement]


def _text(name: str, stamp: int, replicas: int) -> str:
    entry = {
        "name": name,
        "run": "foundation_nats.chaos.agents:Idler",
        "replicas": replicas,
        "update": {"progress_deadline_s": _STAMP + stamp},
    }
    return manifest_text([entry])


async def _look(client: Cluster, name: str) -> list[int] | None:
    entry = await Bucket(client.bus, client.subjects, "desired").read(name)
    if entry is None or entry.value is None:
        return None
    wish = decode(Deployment, entry.value)
    return [round(wish.update.progress_deadline_s - _STAMP), wish.replicas or 0]
