"""Watches a cluster from a connection that is never disturbed: assignments, records, leases, books, deaths."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter

from foundation_nats import Cluster
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.wire import Message
from foundation_nats.chaos.checkers.leadership import DownSeen, LeaseSeen
from foundation_nats.chaos.checkers.records import AssignmentSeen, RecordSeen
from foundation_nats.chaos.checkers.reservations import LedgerSeen
from foundation_nats.chaos.history import now_ns
from foundation_nats.cluster.ledgers import BUCKET, PREFIX

_HEAD = re.compile(
    rb'"epoch":(\d+).*?"commit":(\d+).*?"writer":(\{[^}]*\}).*?"cursor":(\d+)', re.DOTALL
)
_HEAD_MAX = 1024


@dataclass(slots=True)
class Seen:
    """What was seen, in order: plain values, which a file can keep."""

    watch_state: bool = True
    """State records are large: a busy round leaves them out."""
    assignments: list[AssignmentSeen] = field(default_factory=list)
    records: list[RecordSeen] = field(default_factory=list)
    leases: list[LeaseSeen] = field(default_factory=list)
    downs: list[DownSeen] = field(default_factory=list)
    ledgers: list[LedgerSeen] = field(default_factory=list)
    capacity: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON lines: which list, and the next item of it."""
        with path.open("wb") as file:
            for item in fields(Seen):
                value = getattr(self, item.name)
                for one in value if isinstance(value, list) else [value]:
                    file.write(orjson.dumps({"what": item.name, "value": one}) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Read what `save` wrote."""
        found: dict[str, Any] = {}
        lists = {item.name for item in fields(Seen) if item.default_factory is list}
        with path.open("rb") as file:
            for line in file:
                item = orjson.loads(line)
                if item["what"] in lists:
                    found.setdefault(item["what"], []).append(item["value"])
                else:
                    found[item["what"]] = item["value"]
        return TypeAdapter(Seen).validate_python(found)


class Observer(Seen):
    """Watches from `open` on."""

    def __init__(self, cluster: Cluster, *, watch_state: bool = True) -> None:
        super().__init__(watch_state)
        self.cluster = cluster
        self.homes: dict[str, AssignmentSeen] = {}
        """Agent to its newest record."""
        self.running: dict[str, list[tuple[int, int]]] = {}
        """Agent to (when it was seen running, epoch), in order."""

    async def open(self, scope: TaskScope, timeout: float = 10.0) -> None:
        """Begin to watch, until *scope* closes."""
        bus, subjects = self.cluster.bus, self.cluster.subjects
        bus.subscribe(subjects.event("node", "down"), self._on_down)
        watches = [
            Bucket(bus, subjects, "agents").watch(scope, self._on_agent),
            Bucket(bus, subjects, "leases").watch(scope, self._on_lease),
            Bucket(bus, subjects, "nodes").watch(scope, self._on_node),
            Bucket(bus, subjects, BUCKET).watch(scope, self._on_ledger, PREFIX + "*"),
        ]
        if self.watch_state:
            watches.append(Bucket(bus, subjects, "state").watch(scope, self._on_state, "*"))
        for watch in watches:
            await watch.wait_ready(timeout)

    def _on_agent(self, entry: Entry) -> None:
        if entry.value is None:
            gone = AssignmentSeen(entry.key, entry.revision, 0, None, 0, "deleted")
            self.assignments.append(gone)
            self.homes.pop(entry.key, None)
            return
        record = orjson.loads(entry.value)
        seen = AssignmentSeen(
            entry.key,
            entry.revision,
            record["epoch"],
            record.get("node"),
            record.get("incarnation", 0),
            record["status"],
            tuple(sorted(record["spec"].get("resources", {}).items())),
            now_ns(),
        )
        self.assignments.append(seen)
        self.homes[entry.key] = seen
        if seen.status == "running":
            self.running.setdefault(entry.key, []).append((seen.at_ns, seen.epoch))

    def _on_state(self, entry: Entry) -> None:
        if entry.value is None:
            return
        found = _HEAD.search(entry.value[:_HEAD_MAX])
        if found is None:
            return
        writer = orjson.loads(found[3])
        self.records.append(
            RecordSeen(
                entry.key,
                entry.revision,
                int(found[1]),
                int(found[2]),
                int(found[4]),
                f"{writer.get('worker')}/{writer.get('incarnation')}",
            )
        )

    def _on_lease(self, entry: Entry) -> None:
        if entry.value is None or entry.key != "leader":
            return
        lease = orjson.loads(entry.value)
        self.leases.append(
            LeaseSeen(entry.revision, lease["holder"], lease["incarnation"], lease["term"])
        )

    def _on_node(self, entry: Entry) -> None:
        if entry.value is not None:
            self.capacity[entry.key] = orjson.loads(entry.value).get("capacity", {})

    def _on_ledger(self, entry: Entry) -> None:
        node, at = entry.key.removeprefix(PREFIX), now_ns()
        if entry.value is None:
            self.ledgers.append(LedgerSeen(node, entry.revision, at_ns=at))
            return
        book = orjson.loads(entry.value)
        self.ledgers.append(
            LedgerSeen(
                node,
                entry.revision,
                tuple(book.get("capacity", {}).items()),
                tuple(book.get("agents", {}).items()),
                tuple(
                    (item["id"], tuple(item["needs"].items()))
                    for item in book.get("reservations", ())
                ),
                at,
            )
        )

    def _on_down(self, message: Message) -> None:
        event = orjson.loads(message.data)
        node = event.get("data", {}).get("node", "")
        self.downs.append(DownSeen(node, monotonic(), event.get("message", "")))

    def hosted_by(self, node: str) -> dict[str, int]:
        """Agent to epoch of what the node holds now."""
        return {
            agent: seen.epoch
            for agent, seen in self.homes.items()
            if seen.node == node and seen.status in ("running", "starting")
        }

    def back_after(self, agent: str, epoch: int, since_ns: int) -> int | None:
        """When the agent was first seen running under a later epoch; None: never."""
        for at, seen in self.running.get(agent, ()):
            if at >= since_ns and seen > epoch:
                return at
        return None
