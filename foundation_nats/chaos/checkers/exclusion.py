"""Locks and leases exclude: no two hold one at an instant, and a resource that looks at tokens never goes back.

Two checks, because no lock can promise the first to a holder that was frozen
(Kleppmann, *How to do distributed locking*, 2016): the holders of a history
whose clients ran all the time never overlap; and whatever the clients went
through, the guarded resource accepts tokens that only grow, each from one holder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from foundation_nats.chaos.checkers.judgement import Judgement


@dataclass(frozen=True, slots=True)
class Holding:
    """Somebody believed to hold a lock, from its acquisition until it knew better."""

    lock: str
    holder: str
    token: int
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Guarded:
    """One write that a guarded resource accepted."""

    resource: str
    holder: str
    token: int


def check_exclusion(holdings: Iterable[Holding]) -> Judgement:
    """Holdings of one lock do not overlap, and later ones have higher tokens."""
    judgement = Judgement("exclusion", 9)
    by_lock: dict[str, list[Holding]] = {}
    for item in holdings:
        judgement.looked_at += 1
        by_lock.setdefault(item.lock, []).append(item)
    for lock, items in sorted(by_lock.items()):
        items.sort(key=lambda item: item.begin_ns)
        for before, after in itertools.pairwise(items):
            if after.begin_ns < before.end_ns:
                judgement.violated(
                    f"{lock}: {before.holder} (token {before.token}) and {after.holder} "
                    f"(token {after.token}) held it together for "
                    f"{(min(before.end_ns, after.end_ns) - after.begin_ns) / 1e6:.1f} ms"
                )
            if after.token <= before.token:
                judgement.violated(f"{lock}: token {before.token} was followed by {after.token}")
    return judgement


def check_fencing(accepted: Iterable[Guarded]) -> Judgement:
    """What guarded resources accepted, each resource's in order."""
    judgement = Judgement("fencing", 9)
    last: dict[str, int] = {}
    holders: dict[tuple[str, int], str] = {}
    for item in accepted:
        judgement.looked_at += 1
        if item.token < last.get(item.resource, 0):
            judgement.violated(
                f"{item.resource} accepted token {item.token} of {item.holder} "
                f"after {last[item.resource]}"
            )
        last[item.resource] = max(item.token, last.get(item.resource, 0))
        holder = holders.setdefault((item.resource, item.token), item.holder)
        if holder != item.holder:
            judgement.violated(
                f"{item.resource}: {holder} and {item.holder} share token {item.token}"
            )
    return judgement
