"""Capacity is given away once: the books stay within it, and nobody loses what was reserved before its time (invariant 9).

Two checks, because each sees what the other can't: the books of a node, revision by
revision, never name more than the node has; and what clients believe to hold, by their
own clocks, adds up to no more, is in the books for so long, and is not taken from them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from foundation_nats.chaos.checkers.judgement import Judgement

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class LedgerSeen:
    """One revision of a node's books; a deleted one has no capacity and nothing else."""

    node: str
    revision: int
    capacity: tuple[tuple[str, float], ...] = ()
    agents: tuple[tuple[str, float], ...] = ()
    reservations: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    """Id and needs. Whoever writes drops what has expired, so all of these counted."""
    at_ns: int = 0


@dataclass(slots=True)
class Claim:
    """A client that believes to hold a reservation, from the answer until it gives it back."""

    id: str
    node: str
    holder: str
    needs: tuple[tuple[str, float], ...]
    begin_ns: int
    end_ns: int
    """When it began to give it back, or shortly before the reservation expires."""
    lost_ns: int | None = None
    """When it was told that the reservation is gone."""


def check_ledgers(seen: Iterable[LedgerSeen]) -> Judgement:
    """Books of all nodes, each node's in order of revision."""
    judgement = Judgement("ledgers", 9)
    for now in seen:
        judgement.looked_at += 1
        taken = defaultdict(float, now.agents)
        for _, needs in now.reservations:
            for name, amount in needs:
                taken[name] += amount
        for name, limit in now.capacity:
            if taken[name] > limit + _ROUNDING:
                judgement.violated(
                    f"the books of {now.node} name {taken[name]:g} {name} of {limit:g} "
                    f"at revision {now.revision}"
                )
    return judgement


def check_reservations(
    claims: Iterable[Claim],
    seen: Iterable[LedgerSeen],
    capacity: Mapping[str, Mapping[str, float]],
) -> Judgement:
    """What clients believe, against the capacity and against the books.

    Args:
        claims: by clients of this machine that ran all the time, or were killed.
        seen: the books as a watch saw them, each node's in order of revision; it may skip some.
        capacity: node to resource to how much it has; what it doesn't name is unlimited.
    """
    judgement = Judgement("reservations", 9)
    claims = [claim for claim in claims if claim.end_ns > claim.begin_ns]
    judgement.looked_at = len(claims)
    _overlaps(judgement, claims, capacity)
    for claim in claims:
        if claim.lost_ns is not None and claim.lost_ns < claim.end_ns:
            left = (claim.end_ns - claim.lost_ns) / 1e9
            judgement.violated(
                f"{claim.id} of {claim.holder} was gone {left:.2f} s before its time", "lost"
            )
    _vanished(judgement, {claim.id: claim for claim in claims}, seen)
    return judgement


def _overlaps(
    judgement: Judgement, claims: Iterable[Claim], capacity: Mapping[str, Mapping[str, float]]
) -> None:
    steps: dict[tuple[str, str], list[tuple[int, float, Claim]]] = defaultdict(list)
    for claim in claims:
        for name, amount in claim.needs:
            steps[claim.node, name].append((claim.begin_ns, amount, claim))
            steps[claim.node, name].append((claim.end_ns, -amount, claim))
    for (node, name), items in sorted(steps.items()):
        limit = capacity.get(node, {}).get(name)
        if limit is None:
            continue
        held = 0.0
        # At one instant what ends goes first.
        for _, amount, claim in sorted(items, key=lambda item: item[:2]):
            held += amount
            if amount > 0 and held > limit + _ROUNDING:
                judgement.violated(
                    f"clients hold {held:g} {name} of {limit:g} on {node} with {claim.id} "
                    f"of {claim.holder}",
                    "over",
                )


def _vanished(
    judgement: Judgement, claims: Mapping[str, Claim], seen: Iterable[LedgerSeen]
) -> None:
    before: dict[str, frozenset[str]] = {}
    for now in seen:
        ids = frozenset(id for id, _ in now.reservations)
        for id in before.get(now.node, frozenset()) - ids:
            claim = claims.get(id)
            if claim is not None and now.at_ns < claim.end_ns:
                left = (claim.end_ns - now.at_ns) / 1e9
                judgement.violated(
                    f"{id} of {claim.holder} left the books of {now.node} at revision "
                    f"{now.revision}, {left:.2f} s before its time",
                    "vanished",
                )
        before[now.node] = ids
