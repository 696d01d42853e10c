"""Plans as files, and plans cut down to the faults that a violation needs.

A file holds the faults of one round and what the round was made of, so that an
edited plan can be run again (`foundation chaos --plan-file`), and so that one that
once showed a bug can be kept beside the tests.

`minimise` is delta debugging (Zeller and Hildebrandt, *Simplifying and isolating
failure-inducing input*, 2002) over the faults. Processes are not deterministic:
a plan counts as failing if one of several repetitions fails, so what remains is
small and fails now and then; what was left out may matter to how often.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError

from foundation_nats.chaos.faults import KINDS, Fault
from foundation_nats.chaos.workloads import WORKLOADS
from foundation_nats.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """A round to be: its faults, and the lab and the work that they befall."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    faults: tuple[Fault, ...]
    seed: int = 0
    """Of the clients' choices."""
    seconds: float = 20.0
    nodes: int = 3
    brokers: int = 1
    workloads: tuple[str, ...] = field(default_factory=lambda: tuple(WORKLOADS))
    rate: float = 1.0
    why: str = ""
    """What it once showed, for people."""
    without: str = ""
    """The safeguards that were missing then (FOUNDATION_TEST_BUG); without any missing it was a bug."""

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what `save` wrote and a person may have edited.

        Raises:
            ConfigError: the file can't be read, or something in it is wrong; names it.
        """
        try:
            plan = TypeAdapter(Plan).validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"The plan {path} can't be read: {error}.") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ConfigError(f"The plan {path} is wrong at {where}: {first['msg']}.") from error
        for index, fault in enumerate(plan.faults):
            kind = KINDS.get(fault.kind)
            if kind is None:
                raise ConfigError(
                    f"The plan {path} is wrong at faults.{index}: there is no {fault.kind}.",
                    hint="`foundation chaos --list` has all.",
                )
            if kind.brokers > plan.brokers:
                raise ConfigError(
                    f"The plan {path} is wrong at faults.{index}: {fault.kind} needs "
                    f"{kind.brokers} brokers."
                )
        unknown = set(plan.workloads) - WORKLOADS.keys()
        if unknown:
            raise ConfigError(
                f"The plan {path} names workloads that do not exist: {', '.join(sorted(unknown))}.",
                hint=f"There are: {', '.join(WORKLOADS)}.",
            )
        return plan


async def ddmin(
    items: Sequence[T], fails: Callable[[Sequence[T]], Awaitable[bool]], *, runs_max: int = 200
) -> list[T]:
    """The smallest part of *items*, in order, that still *fails* and from which no single one can go.

    Every run that *fails* costs counts against *runs_max*; when they are used up, the smallest
    found so far is returned. That the whole fails is taken for granted.
    """
    left = list(items)
    parts, runs = 2, 0
    while left:
        size = max(1, len(left) // parts)
        chunks = [left[at : at + size] for at in range(0, len(left), size)]
        # Halves first, then complements: what is kept, then what is left out.
        candidates = [(chunk, 2) for chunk in chunks] if len(chunks) > 1 else [([], 2)]
        if len(chunks) > 2:
            candidates += [
                ([item for other, c in enumerate(chunks) if other != at for item in c], parts - 1)
                for at in range(len(chunks))
            ]
        for candidate, then in candidates:
            if runs >= runs_max:
                return left
            runs += 1
            if await fails(candidate):
                left, parts = list(candidate), max(2, then)
                break
        else:
            if size == 1:
                return left
            parts = min(len(left), parts * 2)
    return left


def signature(violations: Sequence[str], failure: str) -> str:
    """What kind of failure it was: the checker that found it, or ``failure``; empty: none."""
    if violations:
        return violations[0].partition(": ")[0]
    return "failure" if failure else ""


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values."""
    return asdict(plan)


__all__ = ["Plan", "as_json", "ddmin", "signature"]
