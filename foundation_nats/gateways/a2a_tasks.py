"""`TaskBook`: A2A tasks in the cluster's ``coordination`` bucket, so that they outlive the gateway.

One key for each task, ``a2a.<task>``; every write is a compare-and-set. A task that is over is kept for a while and
then forgotten by the server. Every gateway follows all of them, but keeps in memory only what it needs to list
them and to see which are open, and whose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import orjson
from a2a.types import Task, TaskState
from google.protobuf.json_format import MessageToDict, ParseDict  # type: ignore[import-untyped]

from foundation_nats.api.cluster import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.errors import (
    AlreadyExistsError,
    BusTimeoutError,
    BusUnavailableError,
    StaleRevisionError,
)

PREFIX = "a2a."
OVER = frozenset(
    {
        TaskState.TASK_STATE_COMPLETED,
        TaskState.TASK_STATE_FAILED,
        TaskState.TASK_STATE_CANCELED,
        TaskState.TASK_STATE_REJECTED,
    }
)
STORED, STREAMED = "stored", "streamed"
_RETRY_S = 0.1
_PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """One task as it is stored."""

    agent: str
    mode: str
    by: str
    """The gateway process that is at it."""
    asked: float
    """When it was begun, in seconds since the epoch."""
    task: Task
    revision: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.task.status.state in OVER

    def encoded(self) -> bytes:
        """As it is stored."""
        return orjson.dumps(
            {
                "agent": self.agent,
                "mode": self.mode,
                "by": self.by,
                "asked": self.asked,
                "task": MessageToDict(self.task),
            }
        )


def decoded(entry: Entry) -> Recorded | None:
    """A stored task; None: it is gone, or not understood."""
    if entry.value is None:
        return None
    try:
        body: dict[str, Any] = orjson.loads(entry.value)
        task = ParseDict(body["task"], Task(), ignore_unknown_fields=True)
        return Recorded(
            str(body["agent"]),
            str(body["mode"]),
            str(body["by"]),
            float(body["asked"]),
            task,
            entry.revision,
        )
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Line:
    """What is kept in memory of a task."""

    id: str
    agent: str
    context: str
    state: int
    mode: str
    by: str
    changed: float
    """In seconds since the epoch."""


class TaskBook:
    """The tasks of all A2A gateways of a cluster."""

    def __init__(self, cluster: Cluster, *, keep_s: float) -> None:
        """*keep_s*: how long a task that is over is kept."""
        self._bucket = Bucket(cluster.bus, cluster.subjects, "coordination")
        self._keep_s = keep_s
        self.lines: dict[str, Line] = {}
        """All there are, as far as is known here."""
        self._listeners: list[Callable[[Line], None]] = []

    async def open(self, scope: TaskScope) -> None:
        """Follow them until *scope* ends.

        Raises:
            BusTimeoutError: they could not be read.
        """
        watch = self._bucket.watch(scope, self._on_entry, f"{PREFIX}*")
        await watch.wait_ready(10.0)

    def subscribe(self, listener: Callable[[Line], None]) -> None:
        """Call *listener* after every change of a task."""
        self._listeners.append(listener)

    def _on_entry(self, entry: Entry) -> None:
        found = decoded(entry)
        id = entry.key.removeprefix(PREFIX)
        if found is None:
            self.lines.pop(id, None)
            return
        task = found.task
        line = Line(
            id,
            found.agent,
            task.context_id,
            task.status.state,
            found.mode,
            found.by,
            task.status.timestamp.ToNanoseconds() / 1e9,
        )
        self.lines[id] = line
        for listener in self._listeners:
            listener(line)

    async def get(self, id: str) -> Recorded | None:
        """One task, as the leader knows it.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        entry = await self._bucket.read(PREFIX + id)
        return None if entry is None else decoded(entry)

    async def begin(self, record: Recorded) -> tuple[Recorded, bool]:
        """Write down a new task; if there is one of this id, that one and False.

        Raises:
            BusTimeoutError, BusUnavailableError: it may be there or not.
        """
        id = record.task.id
        try:
            revision = await self._bucket.create(PREFIX + id, record.encoded())
        except AlreadyExistsError:
            known = await self.get(id)
            if known is not None:
                return known, False
            raise
        except BusTimeoutError:
            known = await self.get(id)
            if known is None or known.by != record.by:
                raise
            return known, True
        return replace(record, revision=revision), True

    async def change(self, id: str, step: Callable[[Recorded], Recorded | None]) -> Recorded | None:
        """Apply *step* to what is stored, again and again until that holds; returns what is stored then.

        *step* returns None where there is nothing to change (any more). None: there is no such task.

        Raises:
            BusTimeoutError, BusUnavailableError: it may have been applied.
        """
        ends = monotonic() + _PATIENCE_S
        while True:
            try:
                known = await self.get(id)
                after = None if known is None else step(known)
                if known is None or after is None:
                    return known
                ttl = self._keep_s if after.is_over else None
                revision = await self._bucket.replace(
                    PREFIX + id, after.encoded(), expected=known.revision, ttl_s=ttl
                )
                return replace(after, revision=revision)
            except StaleRevisionError:
                pass
            except (BusTimeoutError, BusUnavailableError):
                if monotonic() + _RETRY_S >= ends:
                    raise
                await asyncio.sleep(_RETRY_S)


__all__ = ["OVER", "STORED", "STREAMED", "Line", "Recorded", "TaskBook"]
