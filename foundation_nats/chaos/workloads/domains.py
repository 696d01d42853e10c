"""Proposers of a replicated domain: registers that are written and compared, and a list."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_linearizable
from foundation_nats.chaos.history import History, Operation, now_ns
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, in_parallel
from foundation_nats.consensus.domain import Domain, Proposal, ProposalStatus

_TIMEOUT_S = 3.0


class Write(BaseModel):
    """Set a cell."""

    kind: Literal["write"] = "write"
    key: str
    value: int | str


class Cas(BaseModel):
    """Set a cell that holds *expected*."""

    kind: Literal["cas"] = "cas"
    key: str
    expected: int | str | None
    value: int | str


class Append(BaseModel):
    """Add to the list."""

    kind: Literal["append"] = "append"
    item: str


class Cells(BaseModel):
    """The replicated state."""

    values: dict[str, int | str] = Field(default_factory=dict)
    items: list[str] = Field(default_factory=list)


class ChaosCells(Domain[Cells, Write | Cas | Append]):
    """Snapshots often, so that rounds see some."""

    name = "chaos-cells"
    snapshot_every = 50
    State = Cells
    Operation = Annotated[Write | Cas | Append, Field(discriminator="kind")]

    def validate(self, state: Cells, operation: Any) -> str | None:
        """A `Cas` must find what it expects."""
        match operation:
            case Cas(key=key, expected=expected) if state.values.get(key) != expected:
                return f"{key} is {state.values.get(key)!r}"
        return None

    def apply(self, state: Cells, operation: Any) -> Cells:
        """Write."""
        match operation:
            case Write(key=key, value=value) | Cas(key=key, value=value):
                state.values[key] = value
            case Append(item=item):
                state.items.append(item)
        return state


class Domains(Workload):
    """Clients with a replica each."""

    name = "domain"
    functions = ("read", "write", "cas", "append")
    needs_lab = True  # its log would stay
    cells = 3
    proposers = 4

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self._values = itertools.count(1)

    def manifest(self) -> list[dict[str, Any]]:
        """None: clients propose."""
        return []

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Propose until told to stop."""
        await in_parallel(
            [
                partial(self._propose, clients[n % len(clients)], history, stopping, n)
                for n in range(self.proposers)
            ]
        )

    async def _propose(
        self, client: Cluster, history: History, stopping: asyncio.Event, number: int
    ) -> None:
        process = f"{self.name}.{number}"
        seen: dict[str, int | str | None] = {}
        while not stopping.is_set():
            key = f"cell-{self.chance.randrange(self.cells)}"
            f = self.chance.choice(("read", "read", "write", "cas", "append"))
            value = next(self._values)
            given: Any = {
                "read": None,
                "write": value,
                "cas": (seen.get(key), value),
                "append": f"{process}.{value}",
            }[f]
            where = "items" if f == "append" else key
            with history.operation(process, f, where, given) as operation:
                if f == "read":
                    state = await client.consensus.read(ChaosCells, timeout=_TIMEOUT_S)
                    seen[key] = state.values.get(key)
                    operation.ok(seen[key])
                    continue
                proposed: Any = {
                    "write": Write(key=key, value=value),
                    "cas": Cas(key=key, expected=seen.get(key), value=value),
                    "append": Append(item=f"{process}.{value}"),
                }[f]
                _end(
                    operation,
                    await client.consensus.propose(ChaosCells, proposed, timeout=_TIMEOUT_S),
                )
            await asyncio.sleep(self.pause_s(0.05))

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """The list, with all that was accepted."""
        state = await eye.consensus.read(ChaosCells, barrier=True)
        return {"items": state.items}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Some order explains all; each accepted item is there once."""
        mine = self.mine(history)
        cells = check_linearizable([item for item in mine if item.f != "append"])
        cells.invariant = 13
        return [cells, check_items([item for item in mine if item.f == "append"], found["items"])]


def _end(operation: Operation, found: Proposal) -> None:
    match found.status:
        case ProposalStatus.ACCEPTED:
            operation.ok(True)
        case ProposalStatus.REJECTED if operation.f == "cas":
            operation.ok(False)
        case ProposalStatus.REJECTED:
            operation.completed_ns, operation.outcome = now_ns(), "fail"
        case _:
            operation.completed_ns = now_ns()


def check_items(operations: Iterable[Operation], items: Sequence[str]) -> Judgement:
    """Every accepted item once, in the order of a proposer; no refused one, none from nowhere."""
    judgement = Judgement("items", 13)
    found = Counter(items)
    place = {item: number for number, item in enumerate(items)}
    known: set[str] = set()
    last: dict[str, int] = {}
    for operation in operations:
        judgement.looked_at += 1
        item = operation.value
        known.add(item)
        if operation.outcome == "ok" and item not in found:
            judgement.violated(f"{item} was accepted and is not there", "lost")
        if operation.outcome == "fail" and item in found:
            judgement.violated(f"{item} was refused and is there", "ghost")
        if found[item] > 1:
            judgement.violated(f"{item} is there {found[item]} times", "repeated")
        if operation.outcome == "ok" and item in place:
            if place[item] < last.get(operation.process, -1):
                judgement.violated(f"{item} is before what {operation.process} appended first")
            last[operation.process] = place[item]
    for item in found.keys() - known:
        judgement.violated(f"{item} was proposed by nobody", "ghost")
    return judgement
