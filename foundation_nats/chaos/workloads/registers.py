"""Linearizable objects: agents asked to read, write, compare and set; and keys of a bucket, likewise."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from foundation_nats import Cluster
from foundation_nats.bus.kv import Bucket
from foundation_nats.chaos.checkers import Judgement, check_answers, check_linearizable
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, in_parallel, states
from foundation_nats.errors import AlreadyExistsError, FoundationError, StaleRevisionError

_ASK_TIMEOUT_S = 1.5


class _Clients(Workload):
    """Clients that read most of the time and write unique values now and then."""

    objects = 4
    clients_per_object = 4
    base_pause_s = 0.03
    invariant = 5

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
                    seen, by = await self.read(client, key)
                    operation.ok(seen, by)
            elif dice < 0.85:
                value = next(self._values)
                with history.operation(process, "write", key, value) as operation:
                    operation.ok(by=await self.write(client, key, value))
            else:
                value = next(self._values)
                with history.operation(process, "cas", key, (seen, value)) as operation:
                    operation.ok(*await self.cas(client, key, seen, value))
            await asyncio.sleep(self.pause_s(self.base_pause_s))

    async def read(self, client: Cluster, key: str) -> tuple[int | None, Any]:
        """The value, and who says so."""
        raise NotImplementedError

    async def write(self, client: Cluster, key: str, value: int) -> Any:
        """Replace the value; who did it."""
        raise NotImplementedError

    async def cas(
        self, client: Cluster, key: str, expected: int | None, new: int
    ) -> tuple[bool, Any]:
        """Replace the value if it is *expected*; whether it was, and who says so."""
        raise NotImplementedError

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Some order explains every answer."""
        judgement = check_linearizable(self.mine(history))
        judgement.invariant = self.invariant
        return [judgement]


class Registers(_Clients):
    """Agents that hold one value each."""

    name = "register"
    functions = ("read", "write", "cas")
    kind = "Register"
    """The class of its agents."""

    def manifest(self) -> list[dict[str, Any]]:
        """The registers."""
        return [
            {
                "name": self.name,
                "run": f"foundation_nats.chaos.agents:{self.kind}",
                "replicas": self.objects,
                "critical": True,
            }
        ]

    async def read(self, client: Cluster, key: str) -> tuple[int | None, Any]:
        """Ask."""
        by = await client.ask(key, "register.read", timeout=_ASK_TIMEOUT_S)
        return by.pop("value"), by

    async def write(self, client: Cluster, key: str, value: int) -> Any:
        """Ask."""
        by = await client.ask(key, "register.write", value, timeout=_ASK_TIMEOUT_S)
        del by["value"]
        return by

    async def cas(
        self, client: Cluster, key: str, expected: int | None, new: int
    ) -> tuple[bool, Any]:
        """Ask."""
        swap = {"expected": expected, "new": new}
        by = await client.ask(key, "register.cas", swap, timeout=_ASK_TIMEOUT_S)
        return bool(by.pop("value")), by

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Linearizable, and never two activations at once."""
        return [*super().judge(found, history, seen), check_answers(self.mine(history))]


class Drowsy(Registers):
    """Registers that nobody asks for long enough to fall asleep, again and again."""

    name = "drowsy"
    kind = "DrowsyRegister"
    clients_per_object = 2
    base_pause_s = 0.6

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """How often each woke up."""
        return {"states": await states(eye, [f"{self.name}-{n}" for n in range(self.objects)])}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """As registers; and if none of them ever slept, nothing was shown."""
        slept = Judgement("sleep", 5)
        slept.looked_at = sum(state.get("woken", 0) for state in found["states"].values())
        return [*super().judge(found, history, seen), slept]


class Keys(_Clients):
    """Keys of a bucket, as the registry uses them: reads from the leader, writes by revision."""

    name = "key"
    functions = ("read", "write", "cas")
    invariant = 13

    def manifest(self) -> list[dict[str, Any]]:
        """None: it speaks with the store alone."""
        return []

    def _bucket(self, client: Cluster) -> Bucket:
        return Bucket(client.bus, client.subjects, "coordination")

    async def read(self, client: Cluster, key: str) -> tuple[int | None, Any]:
        """From the leader."""
        entry = await self._bucket(client).read(key)
        found = None if entry is None or entry.value is None else int(orjson.loads(entry.value))
        return found, None

    async def write(self, client: Cluster, key: str, value: int) -> Any:
        """Whatever it holds."""
        await self._bucket(client).overwrite(key, orjson.dumps(value))

    async def cas(
        self, client: Cluster, key: str, expected: int | None, new: int
    ) -> tuple[bool, Any]:
        """Read, compare, and write by the revision that was read."""
        bucket = self._bucket(client)
        entry = await bucket.read(key)
        value = None if entry is None or entry.value is None else int(orjson.loads(entry.value))
        if value != expected:
            return False, None
        revision = 0 if entry is None else entry.revision
        try:
            await bucket.replace(key, orjson.dumps(new), expected=revision)
        except (StaleRevisionError, AlreadyExistsError) as error:
            # Lost to another; or our own earlier attempt was stored and repeated.
            again = await bucket.read(key)
            if again is not None and again.value == orjson.dumps(new):
                return True, None
            raise _RacedError("Another was faster.") from error
        return True, None


class _RacedError(FoundationError):
    """Compared and then overtaken: the swap did not happen, and the comparison says nothing."""

    code = "raced"
