"""One leader per term, terms only grow, and no healthy node is declared down (invariants 4 and 10)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foundation_nats.chaos.checkers.judgement import Judgement


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """One revision of the leader's lease."""

    revision: int
    holder: str
    incarnation: int
    term: int


@dataclass(frozen=True, slots=True)
class DownSeen:
    """A node was declared down."""

    node: str
    at_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Disturbance:
    """From when to when a node (None: every node) was not healthy."""

    node: str | None
    begin_s: float
    end_s: float


def check_leadership(seen: Iterable[LeaseSeen]) -> Judgement:
    """Leases in order of revision."""
    judgement = Judgement("leadership", 4)
    leaders: dict[int, tuple[str, int]] = {}
    term = 0
    for now in seen:
        judgement.looked_at += 1
        if now.term < term:
            judgement.violated(f"term {term} was followed by {now.term}")
        term = max(term, now.term)
        leader = leaders.setdefault(now.term, (now.holder, now.incarnation))
        if leader != (now.holder, now.incarnation):
            judgement.violated(
                f"term {now.term} has two leaders: {leader} and {(now.holder, now.incarnation)}"
            )
    return judgement


def check_false_downs(
    downs: Iterable[DownSeen], disturbances: Iterable[Disturbance], *, slack_s: float
) -> Judgement:
    """A node declared down was disturbed at most *slack_s* before; the harness knows what it broke."""
    judgement = Judgement("false downs", 10, may_be_idle=True)
    known = list(disturbances)
    for down in downs:
        judgement.looked_at += 1
        if not any(
            item.node in (None, down.node) and item.begin_s <= down.at_s <= item.end_s + slack_s
            for item in known
        ):
            judgement.violated(f"{down.node} was healthy and declared down ({down.reason})")
    return judgement
