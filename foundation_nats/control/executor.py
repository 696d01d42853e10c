"""Carries out a plan: its commands as bulk compare-and-set writes to the registry.

A refused write means that the decision was based on an old record; a write
without an answer may have been applied. Neither is retried here: the next
plan is made from what the registry then holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.cluster.registry import Change, Registry
from foundation_nats.control.commands import Command, Plan
from foundation_nats.errors import FoundationError, StaleRevisionError

CHUNK = 1_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a plan."""

    applied: tuple[Command, ...]
    stale: int = 0
    """Refused: the record had changed."""
    unknown: int = 0
    """Unanswered: it may have been applied."""
    failed: int = 0
    """Not applied for another reason, such as no connection."""
    slowest_s: float = 0.0
    """The longest wait for a chunk's acknowledgements."""

    @property
    def is_complete(self) -> bool:
        """Whether every command was applied."""
        return not (self.stale or self.unknown or self.failed)


async def execute(
    registry: Registry, plan: Plan, *, may_go_on: Callable[[], bool] = lambda: True
) -> Outcome:
    """Carry out *plan*, asking *may_go_on* between chunks.

    Cancellation-safe: what was sent may be applied, and arrives by the watch.
    """
    applied: list[Command] = []
    stale = unknown = failed = 0
    slowest = 0.0
    for start in range(0, len(plan.commands), CHUNK):
        if not may_go_on():
            failed += len(plan.commands) - start
            break
        if start:
            failpoint("plan.mid_execute")
        chunk = plan.commands[start : start + CHUNK]
        began = monotonic()
        results = await registry.write_many(
            [
                Change(
                    command.agent,
                    command.record,
                    command.expected or registry.tombstone(command.agent),
                )
                for command in chunk
            ]
        )
        slowest = max(slowest, monotonic() - began)
        for command, result in zip(chunk, results, strict=True):
            if isinstance(result, int):
                applied.append(command)
            elif isinstance(result, StaleRevisionError):
                stale += 1
            elif isinstance(result, FoundationError) and result.outcome == "unknown":
                unknown += 1
            else:
                failed += 1
    if stale or unknown or failed:
        get_logger("executor").info(
            "plan not carried out in full",
            applied=len(applied),
            stale=stale,
            unknown=unknown,
            failed=failed,
        )
    failpoint("start.sent")
    return Outcome(tuple(applied), stale, unknown, failed, slowest)
