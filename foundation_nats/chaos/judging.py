"""Judges a round from what was kept of it: its history, what was seen, and what its workloads collected.

`judge` is pure. A round that is judged while its lab still stands, and one that
is read from files years later (`Kept.load`), are judged by the same code on the
same plain values, so that a new checker can look at old histories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from foundation_nats.chaos.checkers import (
    ExitSeen,
    Judgement,
    Series,
    check_assignments,
    check_capacity,
    check_drift,
    check_exits,
    check_false_downs,
    check_leadership,
    check_records,
)
from foundation_nats.chaos.checkers.leadership import Disturbance
from foundation_nats.chaos.gauges import ALLOWED
from foundation_nats.chaos.history import History, now_ns
from foundation_nats.chaos.nemesis import Done
from foundation_nats.chaos.observer import Seen
from foundation_nats.chaos.workloads import WORKLOADS, Workload
from foundation_nats.errors import ConfigError

SLACK_S = 20.0
"""How long after a disturbance a node may be declared down because of it: time to be
silent, to be confirmed, and the grace after a disturbed bus."""

_AFTERWARDS_NS = 1_000_000_000
"""An operation so soon after a fault still felt it."""


@dataclass(slots=True)
class Kept:
    """All that is needed to judge a round."""

    seed: int
    workloads: list[str]
    rate: float = 1.0
    operations_min: int = 0
    """Fewer operations that ended well, and the round is void."""
    faults: list[Done] = field(default_factory=list)
    exits: list[ExitSeen] = field(default_factory=list)
    """Nodes that ended by themselves, and were started again."""
    collected: dict[str, Any] = field(default_factory=dict)
    """Workload to what it collected."""
    series: list[Series] | None = None
    """Of a soak."""
    failure: str = ""
    """What went wrong outside the checkers."""
    settled_s: float = 0.0

    def save(self, directory: Path, history: History, seen: Seen) -> None:
        """Write ``round.json``, ``history.jsonl`` and ``seen.jsonl`` into *directory*."""
        history.save(directory / "history.jsonl")
        seen.save(directory / "seen.jsonl")
        (directory / "round.json").write_bytes(orjson.dumps(asdict(self)) + b"\n")

    @classmethod
    def load(cls, directory: Path) -> tuple[Kept, History, Seen]:
        """Read what `save` wrote.

        Raises:
            ConfigError: the directory holds no kept round, or one that can't be read.
        """
        try:
            kept = TypeAdapter(Kept).validate_json((directory / "round.json").read_bytes())
            history = History.load(directory / "history.jsonl")
            return kept, history, Seen.load(directory / "seen.jsonl")
        except OSError as error:
            raise ConfigError(
                f"{directory} holds no kept round: {error}.",
                hint="Name a folder seed-N that `foundation chaos --keep DIR` wrote.",
            ) from error
        except (ValueError, TypeError, ValidationError) as error:
            raise ConfigError(
                f"The round kept in {directory} can't be read: {error}.",
                hint="Judge it with the version that kept it.",
            ) from error

    def works(self) -> list[Workload]:
        """Its workloads, for judging.

        Raises:
            ConfigError: this version does not have one of them.
        """
        unknown = set(self.workloads) - WORKLOADS.keys()
        if unknown:
            raise ConfigError(
                f"This version has no workload {', '.join(sorted(unknown))}.",
                hint="Judge the round with the version that kept it.",
            )
        return [WORKLOADS[name](self.seed, rate=self.rate) for name in self.workloads]


def judge(
    kept: Kept, workloads: Sequence[Workload], history: History, seen: Seen
) -> list[Judgement]:
    """What every checker says."""
    found: list[Judgement] = []
    for workload in workloads:
        for judgement in workload.judge(kept.collected[workload.name], history, seen):
            judgement.checker = f"{workload.name}/{judgement.checker}"
            found.append(judgement)
    disturbances = [
        Disturbance(node, item.begin_ns / 1e9, item.end_ns / 1e9)
        for item in kept.faults
        for node in item.touches
    ]
    disturbances += [Disturbance(item.node, item.begin_s, item.end_s) for item in kept.exits]
    if seen.watch_state:
        found.append(check_records(seen.records))
    found += [
        check_assignments(seen.assignments),
        check_leadership(seen.leases),
        check_capacity(seen.assignments, seen.capacity),
        check_false_downs(seen.downs, disturbances, slack_s=SLACK_S),
        check_exits(kept.exits),
    ]
    if kept.series is not None:
        found.append(check_drift(kept.series, ALLOWED))
    return found


def why_void(
    kept: Kept,
    workloads: Sequence[Workload],
    history: History,
    judgements: Sequence[Judgement],
) -> str:
    """Why the round proves nothing; empty: it does.

    It is void if too little was done, in all or by any one workload, if no fault did
    anything or no operation overlapped one, and if a judge was shown nothing.
    """
    ended = sum(item.outcome == "ok" for item in history.operations)
    done = [item for item in kept.faults if not item.skipped]
    why = []
    if ended < kept.operations_min:
        why.append(f"only {ended} operations ended well")
    for workload in workloads:
        count = sum(
            item.outcome == "ok" and item.f in workload.functions for item in workload.mine(history)
        )
        if count < workload.operations_min:
            why.append(f"only {count} operations of {workload.name} ended well")
    if not done:
        why.append("no fault did anything")
    elif not any(_overlaps(item, history) for item in done):
        why.append("no operation overlapped a fault")
    why += [
        f"{item.checker} was shown nothing"
        for item in judgements
        if not item.looked_at and not item.may_be_idle
    ]
    return "; ".join(why)


def _overlaps(fault: Done, history: History) -> bool:
    now = now_ns()
    return any(
        operation.invoked_ns <= fault.end_ns + _AFTERWARDS_NS
        and (operation.completed_ns or now) >= fault.begin_ns
        for operation in history.operations
    )


def plain(collected: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be read from a file."""
    found: dict[str, Any] = orjson.loads(orjson.dumps(collected))
    return found


__all__ = ["SLACK_S", "Kept", "judge", "plain", "why_void"]
