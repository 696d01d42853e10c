"""Whether an agent may be restarted once more: so many restarts within so long, as a supervisor of OTP has it.

Pure. Times are UTC texts in the agent's record, so that a new leader goes on counting; they are
compared as times of different machines, whose clocks must be in step to about a second. What is
restarted because its node was lost, because it is moved, or because its spec has changed doesn't count.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from foundation_schemas import AgentRecord, RestartLimit


def counted(times: Sequence[str], limit: RestartLimit | None, at: str | None) -> list[str] | None:
    """The restarts that still count, with one more *at* that time; None: that is too many."""
    if limit is None or at is None:
        return []
    since = datetime.fromisoformat(at) - timedelta(seconds=limit.within_s)
    recent = [time for time in times if datetime.fromisoformat(time) > since]
    if len(recent) >= limit.max_restarts:
        return None
    return [*recent, at]


def restarted(record: AgentRecord, at: str | None) -> list[str] | None:
    """As `counted`, of an agent by its own limit."""
    return counted(record.restarts, record.spec.restart_limit, at)


def too_many(limit: RestartLimit | None) -> str:
    """Why it is given up, for people."""
    if limit is None:
        return "too many restarts"
    return f"more than {limit.max_restarts} restarts within {limit.within_s:g} s"
