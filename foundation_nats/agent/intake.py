"""`Intake`: how fast an agent begins what it is sent, all together and by sender; and what overtakes.

Pure: the time is an argument. A stored signal waits until it may begin, and all behind it wait too,
so that order is kept; a question is refused, because who asks would rather know. What is begun
is counted once, however often it is tried.

In memory of one activation: after a restart or a move the first burst is free. Buckets of senders
are kept for `SENDERS_MAX` of them, the one heard of longest ago goes first; who takes ever new names
as a sender gets past the limit of one, and not past that of all together.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import orjson

from foundation_nats.base.resilience import TokenBucket
from foundation_schemas import RateLimit

SENDERS_MAX = 1000
AHEAD_MAX = 256
"""Urgent signals that may be handled before one that is not: each costs room in the record."""
_MARK = b'"urgent"'


class Intake:
    """The buckets of one agent."""

    def __init__(self, rate: RateLimit) -> None:
        self._rate = rate
        self._all = None if rate.per_s is None else TokenBucket(rate.per_s, rate.burst)
        self._senders: OrderedDict[str, TokenBucket] = OrderedDict()

    def wait_s(self, source: str, now: float) -> float:
        """Seconds until something of *source* may begin; 0: now, and it is counted."""
        buckets = [] if self._all is None else [self._all]
        if self._rate.per_sender is not None:
            buckets.append(self._of(source, self._rate.per_sender))
        wait = max(bucket.wait_s(now) for bucket in buckets)
        if wait == 0:
            for bucket in buckets:
                bucket.take(now)
        return wait

    def _of(self, source: str, per_s: float) -> TokenBucket:
        found = self._senders.get(source)
        if found is None:
            found = self._senders[source] = TokenBucket(per_s)
            if len(self._senders) > SENDERS_MAX:
                self._senders.popitem(last=False)
        self._senders.move_to_end(source)
        return found


def source_of(data: bytes) -> str:
    """Who has sent it; "" where that can't be read."""
    try:
        return str(orjson.loads(data)["source"])
    except (ValueError, KeyError, TypeError):
        return ""


def is_urgent(data: bytes) -> bool:
    """Whether a signal says that it overtakes others."""
    if _MARK not in data:
        return False
    try:
        body: Any = orjson.loads(data)
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("urgent") is True
