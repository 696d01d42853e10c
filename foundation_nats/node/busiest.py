"""`Looks`: which agents of a worker have most to do, worked out only while somebody looks.

Pure. A rate is the difference between two looks, so the first one has none; who looks again keeps
what it counted from; a look a minute old is no measure any more. Several who look share it:
each sees the rate since the look before, whoever that was.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import NamedTuple

from foundation_schemas import AgentLoad, BusiestReply

_STALE_S = 60.0
_WINDOW_MIN_S = 0.05
"""Two looks closer together than this would make rates of noise."""


class Counted(NamedTuple):
    """What one activation has done so far, and has to do."""

    id: str
    handled: int
    asked: int
    backlog: int
    behind: bool


class Looks:
    """What was counted at the last look."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._before: dict[str, tuple[int, int]] = {}
        self._last: BusiestReply | None = None

    def look(self, now: float, agents: Collection[Counted], limit: int) -> BusiestReply:
        """The *limit* agents with the longest backlog and, beside them, those that handle most."""
        since = None if self._at is None or now - self._at > _STALE_S else now - self._at
        if since is not None and since < _WINDOW_MIN_S and self._last is not None:
            return self._last
        loads = [self._load(item, since) for item in agents]
        self._at = now
        self._before = {item.id: (item.handled, item.asked) for item in agents}
        self._last = BusiestReply(
            agents=busiest(loads, limit),
            handled_s=None if since is None else _sum(item.handled_s for item in loads),
            asked_s=None if since is None else _sum(item.asked_s for item in loads),
        )
        return self._last

    def _load(self, item: Counted, since: float | None) -> AgentLoad:
        rates: tuple[float | None, float | None] = (None, None)
        if since is not None:
            handled, asked = self._before.get(item.id, (0, 0))
            if item.handled < handled or item.asked < asked:
                handled = asked = 0  # another activation, which counts anew
            rates = (item.handled - handled) / since, (item.asked - asked) / since
        # As it stands: these are many, and made of what is known to be right.
        return AgentLoad.model_construct(
            id=item.id,
            backlog=item.backlog,
            behind=item.behind,
            handled_s=rates[0],
            asked_s=rates[1],
        )


def busiest(loads: Collection[AgentLoad], limit: int) -> list[AgentLoad]:
    """The *limit* with the longest backlog and the *limit* that handle most; the fullest first."""
    chosen = {
        item.id: item
        for rank in (_by_backlog, _by_rate)
        for item in heapq.nlargest(limit, loads, key=rank)
        if rank(item) > 0
    }
    return sorted(chosen.values(), key=lambda a: (-_by_backlog(a), -_by_rate(a), a.id))


def together(replies: Collection[BusiestReply], limit: int) -> BusiestReply:
    """What several workers, or nodes, have said; rates are of those that know theirs."""
    known = [reply for reply in replies if reply.handled_s is not None]
    return BusiestReply(
        agents=busiest([item for reply in replies for item in reply.agents], limit),
        handled_s=_sum(reply.handled_s for reply in known) if known else None,
        asked_s=_sum(reply.asked_s for reply in known) if known else None,
    )


def _sum(rates: Iterable[float | None]) -> float:
    return sum(rate or 0.0 for rate in rates)


def _by_backlog(item: AgentLoad) -> float:
    return item.backlog + item.behind


def _by_rate(item: AgentLoad) -> float:
    return (item.handled_s or 0.0) + (item.asked_s or 0.0)
