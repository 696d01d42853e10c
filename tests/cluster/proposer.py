"""A child process that proposes, reads and writes down what it saw, until it is killed.

``python -m tests.cluster.proposer URL NAME JOURNAL SEED``. Every operation is
written to JOURNAL when it begins and again when it ends, so that a kill leaves
it open. What a former life of the same name left open is proposed again first,
under its old id.
"""

from __future__ import annotations

import asyncio
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import orjson

from foundation_nats import Cluster
from foundation_nats.chaos.history import Operation, now_ns
from foundation_nats.chaos.workloads.domains import Append, Cas, Write
from foundation_nats.consensus.domain import Proposal, ProposalStatus
from foundation_nats.errors import FoundationError
from tests.cluster.children import connect
from tests.cluster.domains import Store

KEYS = ("a", "b", "c")


def load(journal: Path) -> list[Operation]:
    """The operations of a journal, each as it was last written; a torn last line is left out."""
    found: dict[tuple[str, int], Operation] = {}
    if journal.exists():
        for line in journal.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                operation = Operation(**orjson.loads(line))
                found[operation.process, operation.invoked_ns] = operation
    return list(found.values())


class Proposer:
    """One life."""

    def __init__(self, cluster: Cluster, name: str, file: TextIO, seed: int) -> None:
        self._cluster = cluster
        self._name = name
        self._file = file
        self._random = random.Random(seed)
        self._count = 0
        self._replica: Any = None

    async def open(self) -> None:
        """Open the domain, however long the server is away."""
        while self._replica is None:
            try:
                self._replica = await self._cluster.consensus.open(Store)
            except FoundationError:
                await asyncio.sleep(0.05)

    def _write(self, operation: Operation) -> None:
        self._file.write(orjson.dumps(asdict(operation)).decode() + "\n")
        self._file.flush()

    def _end(self, operation: Operation, found: Proposal) -> None:
        match found.status:
            case ProposalStatus.ACCEPTED:
                operation.ok(True)
            case ProposalStatus.REJECTED if operation.f == "cas":
                operation.ok(False)
            case ProposalStatus.REJECTED:
                operation.completed_ns, operation.outcome = now_ns(), "fail"
            case _:
                operation.completed_ns = now_ns()

    async def append(self, item: str) -> None:
        """Propose an item under an id that is the item."""
        operation = Operation(self._name, "append", "items", item, now_ns())
        self._write(operation)
        try:
            found = await self._cluster.consensus.propose(
                Store, Append(item=item), id=item, timeout=3
            )
            self._end(operation, found)
        except FoundationError as error:
            operation.ended(error)
        self._write(operation)

    async def step(self) -> None:
        """One operation on a register or the list."""
        self._count += 1
        consensus = self._cluster.consensus
        key = self._random.choice(KEYS)
        value = f"{self._name}.{self._count}.{now_ns()}"
        kind = self._random.choice(("read", "read", "write", "cas", "append"))
        if kind == "append":
            await self.append(value)
            return
        operation = Operation(self._name, kind, key, value, 0)
        if kind == "cas":
            # What it was when last seen: a wrong guess is a rejection.
            operation.value = [self._replica.view.values.get(key), value]
        elif kind == "read":
            operation.value = None
        operation.invoked_ns = now_ns()
        self._write(operation)
        try:
            if kind == "read":
                barrier = self._random.random() < 0.3
                state = await consensus.read(Store, timeout=3, barrier=barrier)
                operation.ok(state.values.get(key))
            elif kind == "cas":
                proposed = Cas(key=key, expected=operation.value[0], value=value)
                self._end(operation, await consensus.propose(Store, proposed, timeout=3))
            else:
                proposal = await consensus.propose(Store, Write(key=key, value=value), timeout=3)
                self._end(operation, proposal)
        except FoundationError as error:
            operation.ended(error)
        self._write(operation)


async def main(url: str, name: str, journal: str, seed: str) -> None:
    """Propose until killed."""
    path = Path(journal)
    before = load(path)
    with path.open("a") as file:
        cluster = await connect(url, name)
        try:
            proposer = Proposer(cluster, name, file, int(seed))
            await proposer.open()
            for operation in before:
                if operation.f == "append" and operation.outcome == "unknown":
                    await proposer.append(operation.value)
            print("ready", flush=True)
            while True:
                await proposer.step()
                await asyncio.sleep(proposer._random.uniform(0, 0.002))
        finally:
            await cluster.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
