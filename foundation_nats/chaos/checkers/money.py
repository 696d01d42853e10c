"""A bank's money is conserved: at the end to the cent, and at every cut that reads receivers before senders.

What account A has sent to B only grows, and so does what B has received from A.
Hence, reading B before A, B can't have received more than A has sent; and each
account's balance follows from its own record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from foundation_nats.chaos.checkers.judgement import Judgement


@dataclass(frozen=True, slots=True)
class Account:
    """One account as its record tells."""

    name: str
    opening: int
    balance: int
    sent: Mapping[str, int] = field(default_factory=dict)
    """Peer to the sum sent to it."""
    received: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """Two readings of all accounts, one wholly after the other."""

    first: Mapping[str, Account]
    second: Mapping[str, Account]


def check_cut(cuts: Iterable[Cut]) -> Judgement:
    """Nobody has received what was not sent, and every balance adds up."""
    judgement = Judgement("money in flight", 2)
    for cut in cuts:
        judgement.looked_at += 1
        for account in (*cut.first.values(), *cut.second.values()):
            _adds_up(account, judgement)
        for receiver in cut.first.values():
            for peer, amount in receiver.received.items():
                sent = cut.second[peer].sent.get(receiver.name, 0) if peer in cut.second else 0
                if amount > sent:
                    judgement.violated(
                        f"{receiver.name} had received {amount} from {peer}, which had sent {sent}"
                    )
    return judgement


def check_conserved(accounts: Mapping[str, Account]) -> Judgement:
    """At rest: what was sent was received, pair by pair, and the total is the opening total."""
    judgement = Judgement("money", 2)
    for account in accounts.values():
        judgement.looked_at += 1
        _adds_up(account, judgement)
        for peer, amount in account.sent.items():
            received = accounts[peer].received.get(account.name, 0) if peer in accounts else 0
            if received != amount:
                judgement.violated(
                    f"{account.name} sent {amount} to {peer}, which received {received}"
                )
    total = sum(account.balance for account in accounts.values())
    opening = sum(account.opening for account in accounts.values())
    if total != opening:
        judgement.violated(f"{opening} became {total}")
    return judgement


def _adds_up(account: Account, judgement: Judgement) -> None:
    expected = account.opening - sum(account.sent.values()) + sum(account.received.values())
    if account.balance != expected:
        judgement.violated(f"{account.name} holds {account.balance} and should hold {expected}")
