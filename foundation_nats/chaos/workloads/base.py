"""What a workload is: agents to deploy, clients that call them, and judges of what came of it."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import orjson

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement
from foundation_nats.chaos.history import History, Operation
from foundation_nats.chaos.observer import Seen
from foundation_nats.errors import FoundationError

_AGAIN_S = 0.05
SEND_TIMEOUT_S = 4.0


class Workload(ABC):
    """One kind of work.

    `run` returns when *stopping* is set and its clients have ended. `missing` says
    what has not arrived yet, until nothing is; then `collect` reads what there is
    to judge, and `judge` decides. The first three may be called while the cluster
    is in any condition; the last is pure, so that a kept history can be judged again.
    """

    name: ClassVar[str]
    functions: ClassVar[tuple[str, ...]]
    """The `f` of its operations."""
    operations_min: ClassVar[int] = 10
    """With fewer operations that ended well it has shown nothing, and the round is void."""
    needs_lab: ClassVar[bool] = False
    """Whether it can't be put beside what runs in somebody's cluster."""

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        self.chance = random.Random(f"{self.name}-{seed}")
        self.rate = rate
        """How busy it is: multiplies the number of calls per second."""

    @abstractmethod
    def manifest(self) -> list[dict[str, Any]]:
        """The agents it needs, as entries of a manifest."""

    @abstractmethod
    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Work until told to stop."""

    @classmethod
    def deployments(cls) -> list[str]:
        """What it may leave behind, beside the agents of its manifest."""
        return []

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """What must still happen before judging; None: nothing."""
        return None

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """What `judge` needs beside the history, as plain values: stored states, and what clients noted."""
        return {}

    @abstractmethod
    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Decide. *found* is what `collect` returned, perhaps written and read as JSON meanwhile."""

    def mine(self, history: History) -> list[Operation]:
        """Its operations: its clients are named after it."""
        prefix = f"{self.name}."
        return [item for item in history.operations if item.process.startswith(prefix)]

    def pause_s(self, base: float) -> float:
        """A pause around *base* seconds at rate 1."""
        return base / self.rate * self.chance.uniform(0.5, 1.5)


def manifest_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A manifest of these agents (JSON is YAML)."""
    return orjson.dumps({"version": 1, "agents": list(entries)}).decode()


async def send_until_receipted(
    cluster: Cluster,
    history: History,
    stopping: asyncio.Event,
    process: str,
    target: str,
    type: str,
    data: Any,
    key: str,
    *,
    value: Any = None,
) -> bool:
    """Send one signal under one id until there is a receipt; False: stopped before.

    Args:
        value: of the operation in the history; None: the key.
    """
    operation = history.invoke(process, "send", target, key if value is None else value)
    while True:
        try:
            await cluster.send(target, type, data, id=key, timeout=SEND_TIMEOUT_S)
        except FoundationError as error:
            # Unknown it stays, even if the last try was refused: an earlier one may have worked.
            if operation.error is None or error.outcome == "unknown":
                operation.ended(error)
            if stopping.is_set():
                return False
            await asyncio.sleep(_AGAIN_S)
        else:
            operation.ok()
            return True


async def states(eye: Cluster, agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The stored states of these agents; one that has none is empty."""
    found: dict[str, dict[str, Any]] = {}
    for agent in agents:
        stored = await eye.agents.state(agent)
        found[agent] = {} if stored is None else (stored.get("state") or {})
    return found


async def dead_keys(eye: Cluster) -> dict[str, list[str]]:
    """Agent to the keys of signals in its dead letters."""
    found: dict[str, set[str]] = {}
    for entry in await eye.dead.list(limit=100_000):
        data = (entry.letter.signal or {}).get("data")
        if isinstance(data, Mapping) and "key" in data:
            found.setdefault(entry.letter.agent, set()).add(str(data["key"]))
    return {agent: sorted(keys) for agent, keys in found.items()}


def plain(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Dataclasses as plain values, for `Workload.collect`."""
    return [asdict(item) for item in items]


async def in_parallel(loops: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run these side by side until all have ended."""
    async with asyncio.TaskGroup() as group:
        for loop in loops:
            group.create_task(_run(loop))


async def _run(loop: Callable[[], Awaitable[None]]) -> None:
    await loop()
