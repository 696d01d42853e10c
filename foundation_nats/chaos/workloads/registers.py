"""Linearizable objects: agents asked to read, write, compare and set; and keys of a bucket, likewise."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.chaos.checkers import Judgement, check_linearizable
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Observer
from foundation_nats.chaos.workloads.base import Workload, in_parallel
from foundation_nats.errors import AlreadyExistsError, FoundationError, StaleRevisionError

_ASK_TIMEOUT_S = 1.5


class _Clients(Workload):
    """Clients that read most of the time and write unique values now and then."""

    objects = 4
    clients_per_object = 4
    base_pause_s = 0.03

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self._values = itertools.count(1)

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Call until told to stop."""
        await in_parallel(
            [
                partial(
                    self._client,
                    clients[number % len(clients)],
                    history,
                    stopping,
                    f"{self.name}.{key}.{number}",
                    f"{self.name}-{key}",
                )
                for key in range(self.objects)
                for number in range(self.clients_per_object)
            ]
        )

    async def _client(
        self,
        client: Cluster,
        history: History,
        stopping: asyncio.Event,
        process: str,
        key: str,
    ) -> None:
        seen: int | None = None
        while not stopping.is_set():
            dice = self.chance.random()
            if dice < 0.7:
                with history.operation(process, "read", key) as operation:
                    seen = await self.read(client, key)
                    operation.ok(seen)
            elif dice < 0.85:
                value = next(self._values)
                with history.operation(process, "write", key, value) as operation:
                    await self.write(client, key, value)
                    operation.ok()
            else:
                value = next(self._values)
                with history.operation(process, "cas", key, (seen, value)) as operation:
                    operation.ok(await self.cas(client, key, seen, value))
            await asyncio.sleep(self.pause_s(self.base_pause_s))

    async def read(self, client: Cluster, key: str) -> int | None:
        """The value."""
        raise NotImplementedError

    async def write(self, client: Cluster, key: str, value: int) -> None:
        """Replace the value."""
        raise NotImplementedError

    async def cas(self, client: Cluster, key: str, expected: int | None, new: int) -> bool:
        """Replace the value if it is *expected*; whether it was."""
        raise NotImplementedError

    async def judge(self, eye: Cluster, history: History, observer: Observer) -> list[Judgement]:
        """Some order explains every answer."""
        prefix = f"{self.name}."
        mine = [item for item in history.operations if item.process.startswith(prefix)]
        judgement = check_linearizable(mine)
        judgement.invariant = 5 if self.name == "register" else 13
        return [judgement]


class Registers(_Clients):
    """Agents that hold one value each."""

    name = "register"
    functions = ("read", "write", "cas")

    def manifest(self) -> list[dict[str, Any]]:
        """The registers."""
        return [
            {
                "name": "register",
                "run": "foundation_nats.chaos.agents:Register",
                "replicas": self.objects,
                "critical": True,
            }
        ]

    async def read(self, client: Cluster, key: str) -> int | None:
        """Ask."""
        found: int | None = await client.ask(key, "register.read", timeout=_ASK_TIMEOUT_S)
        return found

    async def write(self, client: Cluster, key: str, value: int) -> None:
        """Ask."""
        await client.ask(key, "register.write", value, timeout=_ASK_TIMEOUT_S)

    async def cas(self, client: Cluster, key: str, expected: int | None, new: int) -> bool:
        """Ask."""
        swap = {"expected": expected, "new": new}
        return bool(await client.ask(key, "register.cas", swap, timeout=_ASK_TIMEOUT_S))


class Keys(_Clients):
    """Keys of a bucket, as the registry uses them: reads from the leader, writes by revision."""

    name = "key"
    functions = ("read", "write", "cas")

    def manifest(self) -> list[dict[str, Any]]:
        """None: it speaks with the store alone."""
        return []

    def _bucket(self, client: Cluster) -> Bucket:
        return Bucket(client.bus, client.subjects, "coordination")

    async def read(self, client: Cluster, key: str) -> int | None:
        """From the leader."""
        entry = await self._bucket(client).read(key)
        return None if entry is None or entry.value is None else int(orjson.loads(entry.value))

    async def write(self, client: Cluster, key: str, value: int) -> None:
        """Whatever it holds."""
        await self._bucket(client).overwrite(key, orjson.dumps(value))

    async def cas(self, client: Cluster, key: str, expected: int | None, new: int) -> bool:
        """Read, compare, and write by the revision that was read."""
        bucket = self._bucket(client)
        entry = await bucket.read(key)
        value = None if entry is None or entry.value is None else int(orjson.loads(entry.value))
        if value != expected:
            return False
        revision = 0 if entry is None else entry.revision
        try:
            await bucket.replace(key, orjson.dumps(new), expected=revision)
        except (StaleRevisionError, AlreadyExistsError) as error:
            # Lost to another; or our own earlier attempt was stored and repeated.
            again = await bucket.read(key)
            if again is not None and again.value == orjson.dumps(new):
                return True
            raise _RacedError("Another was faster.") from error
        return True


class _RacedError(FoundationError):
    """Compared and then overtaken: the swap did not happen, and the comparison says nothing."""

    code = "raced"
