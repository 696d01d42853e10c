"""Transfers between accounts by emitted signals: money is conserved at every cut, and exact at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from foundation_nats import Cluster
from foundation_nats.chaos.checkers import Judgement, check_conserved, check_cut, check_effects
from foundation_nats.chaos.checkers.money import Account, Cut
from foundation_nats.chaos.history import History
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads.base import (
    Workload,
    in_parallel,
    plain,
    send_until_receipted,
    states,
)
from foundation_nats.errors import FoundationError

OPENING = 1000
_AUDIT_EVERY_S = 1.0


class Bank(Workload):
    """Accounts, tellers that order transfers, and an auditor that takes cuts meanwhile."""

    name = "bank"
    functions = ("send",)
    accounts = 12
    tellers = 6

    def names(self) -> list[str]:
        """The accounts."""
        return [f"account-{number}" for number in range(self.accounts)]

    def manifest(self) -> list[dict[str, Any]]:
        """The accounts."""
        return [
            {
                "name": "account",
                "run": "foundation_nats.chaos.agents:Account",
                "replicas": self.accounts,
                "critical": True,
                "config": {"opening": OPENING},
            }
        ]

    def __init__(self, seed: int, *, rate: float = 1.0) -> None:
        super().__init__(seed, rate=rate)
        self.cuts: list[Cut] = []

    async def run(
        self, clients: Sequence[Cluster], history: History, stopping: asyncio.Event
    ) -> None:
        """Order transfers until told to stop, and audit."""
        loops = [
            partial(self._teller, clients[number % len(clients)], history, stopping, number)
            for number in range(self.tellers)
        ]
        await in_parallel([*loops, partial(self._audit, clients[0], stopping)])

    async def _teller(
        self, client: Cluster, history: History, stopping: asyncio.Event, number: int
    ) -> None:
        process, count = f"bank.{number}", 0
        while not stopping.is_set():
            count += 1
            key = f"{process}.{count}"
            giver, taker = self.chance.sample(self.names(), 2)
            order = {"key": key, "to": taker, "amount": self.chance.randint(1, 50)}
            done = await send_until_receipted(
                client, history, stopping, process, giver, "bank.transfer", order, key
            )
            if not done:
                return
            await asyncio.sleep(self.pause_s(0.02))

    async def _audit(self, client: Cluster, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                first = await self._read(client)
                self.cuts.append(Cut(first, await self._read(client)))
            except FoundationError:
                pass  # the auditor's connection is broken, too, now and then
            await asyncio.sleep(_AUDIT_EVERY_S)

    async def _read(self, client: Cluster) -> dict[str, Account]:
        return _accounts(await states(client, self.names()))

    async def missing(self, eye: Cluster, history: History) -> str | None:
        """Which order is not executed, or whose money has not arrived."""
        found = await states(eye, self.names())
        done = {key for state in found.values() for key in state.get("applied", ())}
        for operation in history.operations:
            if (
                operation.process.startswith("bank.")
                and operation.outcome == "ok"
                and operation.value not in done
            ):
                return f"transfer {operation.value} is not executed"
        for account in _accounts(found).values():
            for peer, amount in account.sent.items():
                arrived = found[peer].get("received", {}).get(account.name, 0)
                if arrived < amount:
                    return f"{peer} lacks {amount - arrived} from {account.name}"
        return None

    async def collect(self, eye: Cluster) -> dict[str, Any]:
        """The accounts, and what the auditor saw."""
        return {"states": await states(eye, self.names()), "cuts": plain(self.cuts)}

    def judge(self, found: Mapping[str, Any], history: History, seen: Seen) -> list[Judgement]:
        """Every order executed once, every cut sound, the end exact."""
        applied = {name: state.get("applied", []) for name, state in found["states"].items()}
        cuts = [Cut(_read_accounts(c["first"]), _read_accounts(c["second"])) for c in found["cuts"]]
        return [
            check_effects(self.mine(history), applied, {name: [name] for name in self.names()}),
            check_cut(cuts),
            check_conserved(_accounts(found["states"])),
        ]


def _read_accounts(found: Mapping[str, Any]) -> dict[str, Account]:
    return {name: Account(**fields) for name, fields in found.items()}


def _accounts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Account]:
    return {
        name: Account(
            name,
            state.get("opening", 0),
            state.get("balance", 0),
            state.get("sent", {}),
            state.get("received", {}),
        )
        for name, state in found.items()
    }
