"""What every client did and saw: operations with their times and outcomes, as JSON lines.

An operation ends ``ok``, ``fail`` (it did not happen) or ``unknown`` (it may
have happened, or may yet). One that never ended is unknown. Times are
nanoseconds on this machine's monotonic clock: comparable between the clients of
one machine, and between no two machines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.errors import FoundationError

Outcome = Literal["ok", "fail", "unknown"]


def now_ns() -> int:
    """Nanoseconds on the clock of histories."""
    return int(monotonic() * 1e9)


@dataclass(slots=True)
class Operation:
    """One call of one client."""

    process: str
    f: str
    """What was called: send, read, write, cas, …"""
    key: str
    value: Any = None
    invoked_ns: int = 0
    completed_ns: int | None = None
    outcome: Outcome = "unknown"
    result: Any = None
    error: str | None = None
    by: Any = None
    """Who answered, and when, where the answer tells."""

    def ok(self, result: Any = None, by: Any = None) -> None:
        """It happened, with this result."""
        self.completed_ns, self.outcome, self.result, self.by = now_ns(), "ok", result, by

    def ended(self, error: FoundationError) -> None:
        """It raised; the error knows whether it may have happened."""
        self.completed_ns, self.error = now_ns(), error.code
        self.outcome = "fail" if error.outcome == "not_applied" else "unknown"

    @property
    def took_ms(self) -> float:
        """Milliseconds from invocation to completion; infinite while open."""
        if self.completed_ns is None:
            return float("inf")
        return (self.completed_ns - self.invoked_ns) / 1e6


class History:
    """The operations of a round, in the order of their invocations."""

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        self.operations = list(operations)

    def invoke(self, process: str, f: str, key: str, value: Any = None) -> Operation:
        """Write down that an operation begins now."""
        operation = Operation(process, f, key, value, now_ns())
        self.operations.append(operation)
        return operation

    @contextlib.contextmanager
    def operation(self, process: str, f: str, key: str, value: Any = None) -> Iterator[Operation]:
        """`invoke`; a library error in the body ends it by its outcome and is swallowed.

        A body that leaves by anything else leaves the operation open, hence unknown.
        """
        begun = self.invoke(process, f, key, value)
        try:
            yield begun
        except FoundationError as error:
            begun.ended(error)

    def of(self, *functions: str) -> list[Operation]:
        """The operations of these kinds."""
        return [operation for operation in self.operations if operation.f in functions]

    def __len__(self) -> int:
        return len(self.operations)

    def save(self, path: Path) -> None:
        """Write as JSON lines, for a later look or another checker."""
        with path.open("wb") as file:
            for operation in self.operations:
                file.write(orjson.dumps(asdict(operation)) + b"\n")

    @classmethod
    def load(cls, path: Path) -> History:
        """Read what `save` wrote."""
        with path.open("rb") as file:
            return cls(Operation(**orjson.loads(line)) for line in file)
