"""Clients that reserve, confirm and release parts of nodes in short supply, or forget to."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from foundation_nats import Cluster
from foundation_nats.api.resources import Reservation
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import decode
from foundation_nats.chaos.checkers import Judgement, check_ledgers, check_reservations
from foundation_nats.chaos.checkers.reservations import Claim
from foundation_nats.chaos.history import History, Operation, now_ns
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import Workload, in_parallel, plain
from foundation_nats.errors import FoundationError, ReservationLostError
from foundation_nats.placement.constraints import needs
from foundation_schemas import AgentRecord, AgentStatus

SCARCE = "gpu"
_HELD = (AgentStatus.STARTING, AgentStatus.RUNNING, AgentStatus.MOVING)
_PLENTY = "cpu"
"""What every node has, where none has the other."""
_TTL_S = (1.5, 2.5)
_FORGETS = 0.03
_PATIENCE_S = 10.0
"""For what a node's books say and what its agents need to become the same."""
_MARGIN_S = 0.5
"""A claim ends so long before its reservation: the server's time is known to half a round trip."""


class Booker:
    """One client, and what it believes to hold. Its times are comparable within one machine only."""

    def __init__(
        self, cluster: Cluster, name: str, chance: random.Random, say: Callable[[Claim], None]
    ) -> None:
        """*say* is told of every claim, and again whenever it changes."""
        self._cluster = cluster
        self._name = name
        self._chance = chance
        self._say = say

    async def book(
        self, needs: dict[str, float], pause_s: Callable[[float], float], operation: Operation
    ) -> None:
        """Reserve, perhaps confirm once or twice, then release or forget.

        Raises:
            FoundationError: it ended early; the claim stands until it expires.
        """
        resources, chance = self._cluster.resources, self._chance
        mine = await resources.reserve(
            needs, ttl=chance.uniform(*_TTL_S), timeout=2.0, holder=self._name
        )
        claim = Claim(
            mine.id, mine.node, self._name, tuple(sorted(needs.items())), now_ns(), _end_ns(mine)
        )
        self._say(claim)
        operation.ok(mine.id)
        await asyncio.sleep(pause_s(0.02))
        for _ in range(chance.choice((0, 1, 1, 2))):
            if not await self._confirm(claim):
                return
            await asyncio.sleep(pause_s(0.02))
        if chance.random() < _FORGETS:
            return  # as if it had crashed
        claim.end_ns = min(claim.end_ns, now_ns())
        self._say(claim)
        await resources.release(mine)

    async def _confirm(self, claim: Claim) -> bool:
        """Whether it is still ours."""
        ttl = self._chance.uniform(*_TTL_S)
        # Shorter is believed at once, longer only when it is known.
        claim.end_ns = min(claim.end_ns, now_ns() + int((ttl - _MARGIN_S) * 1e9))
        self._say(claim)
        try:
            after = await self._cluster.resources.confirm(claim.id, ttl=ttl)
        except ReservationLostError as error:
            if "left" in error.details:  # it is promised for as long as its node stays
                claim.end_ns = min(claim.end_ns, now_ns())
            else:
                claim.lost_ns = now_ns()
            self._say(claim)
            return False
        else:
            claim.end_ns = _end_ns(after)
        self._say(claim)
        return True


def _end_ns(reservation: Reservation) -> int:
    assert reservation.expires_at is not None
    return now_ns() + int((reservation.expires_at - time.time() - _MARGIN_S) * 1e9)


class Reservations(Workload):
    """Clients that want more than there is."""

    name = "reservations"
    functions = ("reserve",)
    operations_min = 2
    bookers = 6

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self.claims: dict[str, Claim] = {}

    def manifest(self) -> list[dict[str, Any]]:
        """None: agents that compete come with `churn`."""
        return []

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Reserve until told to stop."""
        await in_parallel(
            [
                partial(self._book, clients[number % len(clients)], history, stopping, number)
                for number in range(self.bookers)
            ]
        )

    async def _book(
        self, client: Cluster, history: History, stopping: asyncio.Event, number: int
    ) -> None:
        me = f"{self.name}.{number}"
        booker = Booker(client, me, self.chance, self._note)
        scarce = None
        while not stopping.is_set():
            amount = float(self.chance.randint(1, 2))
            with history.operation(me, "reserve", scarce or SCARCE, amount) as operation:
                if scarce is None:
                    total = (await client.resources.report()).total
                    scarce = SCARCE if SCARCE in total else _PLENTY
                await booker.book({scarce: amount}, self.pause_s, operation)
            await asyncio.sleep(self.pause_s(0.02))

    def _note(self, claim: Claim) -> None:
        self.claims[claim.id] = claim

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Ours must have ended, and the books must say what runs."""
        ours = [
            item for item in await eye.resources.list() if item.holder.startswith(f"{self.name}.")
        ]
        if ours:
            return f"{len(ours)} reservations have not ended, such as {ours[0].id}"
        return await books_differ(eye)

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """What clients believed, and whether the books say what runs."""
        found: dict[str, Any] = {"claims": plain(self.claims.values()), "wrong": None, "unread": ""}
        try:
            # Agents may still be changing places: only what stays different is wrong.
            until = time.monotonic() + _PATIENCE_S
            while (wrong := await books_differ(eye)) is not None and time.monotonic() < until:
                await asyncio.sleep(0.2)
            found["wrong"] = wrong
        except FoundationError as error:
            found["unread"] = str(error)
        return found

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """The books by revision, and what clients believed."""
        ledgers = check_ledgers(seen.ledgers)
        if found["unread"]:
            ledgers.undecided.append(f"the books could not be read: {found['unread']}")
        if found["wrong"] is not None:
            ledgers.violated(found["wrong"], "books")
        claims = TypeAdapter(list[Claim]).validate_python(found["claims"])
        return [ledgers, check_reservations(claims, seen.ledgers, seen.capacity)]


async def books_differ(eye: Cluster) -> str | None:
    """Where a node's books say something else than what its agents need; None: nowhere."""
    report = await eye.resources.report()
    needed: defaultdict[tuple[str, str], float] = defaultdict(float)
    for entry in (await Bucket(eye.bus, eye.subjects, "agents").read_all()).values():
        assert entry.value is not None
        record = decode(AgentRecord, entry.value)
        if record.node is None or record.status not in _HELD:
            continue
        for resource, needs_of_it in needs(record.spec).items():
            needed[record.node, resource] += needs_of_it
    for node in report.nodes:
        if not node.available:
            continue
        for name, amount in node.resources.items():
            if abs(amount.used - needed[node.node, name]) > 1e-6:
                return (
                    f"the books of {node.node} say {amount.used:g} {name} of agents, "
                    f"which need {needed[node.node, name]:g}"
                )
    return None
