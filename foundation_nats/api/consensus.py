"""`cluster.consensus`: replicated domains: propose, read, and look into their logs."""

from __future__ import annotations

import asyncio
import builtins
from typing import TYPE_CHECKING, Any

from foundation_nats.bus.rpc import call, decode
from foundation_nats.bus.streams import StoredMessage, api
from foundation_nats.consensus.log import PAGE, Log
from foundation_nats.consensus.replicas import Replicas
from foundation_nats.errors import (
    DecodeError,
    DomainNotFoundError,
    FoundationError,
    NotFoundError,
)
from foundation_schemas import DomainEntry, InspectReply
from foundation_schemas.base import WireModel, is_name

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_INSPECT_S = 3.0


class LogEntry(WireModel):
    """One entry of a domain's log."""

    revision: int
    id: str = ""
    operation: Any = None
    by: str = ""
    at: str = ""
    error: str = ""
    """Why it is no entry: every replica skips it."""


class DomainInfo(WireModel):
    """A replicated domain, as its stream shows it."""

    name: str
    revision: int
    """Of the last entry."""
    entries: int
    """How many there have been."""
    stored: int
    """How many of them are still in the log."""
    bytes: int
    snapshot_revision: int = 0
    """0: there is none yet."""
    snapshot_at: str = ""
    replicas: int = 1
    state: dict[str, Any] | None = None
    """At `snapshot_revision`; None: there is no snapshot yet."""
    last: LogEntry | None = None


class Consensus(Replicas):
    """The replicated domains of a cluster.

    A domain is opened when it is first used, and followed until the cluster is closed.

    Example:
        >>> found = await cluster.consensus.propose(Seats, Book(seat="12A", by="ann"))
        >>> found.status, found.revision
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.bus, cluster.subjects, cluster.config.replicas)
        self._cluster = cluster

    # ---- for people ---------------------------------------------------------------

    async def list(self) -> builtins.list[DomainInfo]:
        """Every domain there is, by name."""
        cluster = self._cluster
        found: builtins.list[str] = []
        while True:
            body = {"subject": cluster.subjects.domains(), "offset": len(found)}
            reply = await api(cluster.bus, "STREAM.NAMES", body=body)
            names = reply.get("streams") or []
            found += names
            if not names or len(found) >= reply.get("total", 0):
                break
        prefix = cluster.subjects.domain_stream("")
        domains = sorted(n.removeprefix(prefix) for n in found if n.startswith(prefix))
        return [await self.show(name) for name in domains]

    async def show(self, name: str) -> DomainInfo:
        """One domain, with the state of its newest snapshot.

        Raises:
            DomainNotFoundError: there is none of this name.
        """
        missing = DomainNotFoundError(
            f"There is no domain {name}.", hint="`foundation consensus list` shows them."
        )
        if not is_name(name):
            raise missing
        log = Log(self._cluster.bus, self._cluster.subjects, name)
        try:
            info = await api(
                self._cluster.bus,
                "STREAM.INFO",
                log.reader.stream,
                {"subjects_filter": log.subject},
            )
        except NotFoundError:
            raise missing from None
        snapshot, _ = await log.snapshot()
        last = await log.last()
        revision = last.sequence if last is not None else 0
        stored = int((info["state"].get("subjects") or {}).get(log.subject, 0))
        entries = stored
        if snapshot is not None:
            entries = snapshot.entries
            if revision > snapshot.revision:
                _, more = await log.reader.page(log.subject, snapshot.revision + 1, batch=1)
                entries += more + 1
        return DomainInfo(
            name=name,
            revision=revision,
            entries=entries,
            stored=stored,
            bytes=int(info["state"]["bytes"]),
            snapshot_revision=snapshot.revision if snapshot is not None else 0,
            snapshot_at=snapshot.at if snapshot is not None else "",
            replicas=int(info["config"].get("num_replicas", 1)),
            state=snapshot.state if snapshot is not None else None,
            last=_log_entry(last) if last is not None else None,
        )

    async def hosts(self, name: str) -> dict[str, int]:
        """Node to the revision up to which it has applied the domain *name*.

        Nodes that follow it: those started with ``--domain``, and those on which an agent has
        used it. Each is asked; one that does not answer is missing.
        """
        nodes = [node.name for node in await self._cluster.nodes.list() if node.status != "down"]
        replies = await asyncio.gather(*map(self._inspect, nodes))
        found: dict[str, int] = {}
        for node, reply in zip(nodes, replies, strict=True):
            for details in reply.values():
                domains = details.get("domains", {}) if isinstance(details, dict) else {}
                if name in domains:
                    found[node] = max(found.get(node, 0), int(domains[name]))
        return found

    async def _inspect(self, node: str) -> dict[str, Any]:
        cluster = self._cluster
        subject = cluster.subjects.control_node(node, "inspect")
        try:
            return (
                await call(cluster.bus, subject, None, InspectReply, timeout=_INSPECT_S)
            ).details
        except FoundationError:
            return {}

    async def log(self, name: str, *, limit: int = 100) -> builtins.list[LogEntry]:
        """The newest *limit* entries that are still in the log, oldest first.

        Raises:
            DomainNotFoundError: there is none of this name.
        """
        info = await self.show(name)
        log = Log(self._cluster.bus, self._cluster.subjects, name)
        found: builtins.list[LogEntry] = []
        start = 1
        while True:
            messages = await log.page(start, batch=PAGE)
            found = [*found, *map(_log_entry, messages)][-limit:]
            if not messages or messages[-1].sequence >= info.revision:
                return found
            start = messages[-1].sequence + 1


def _log_entry(message: StoredMessage) -> LogEntry:
    try:
        entry = decode(DomainEntry, message.data)
    except DecodeError as error:
        return LogEntry(revision=message.sequence, at=message.time, error=str(error))
    return LogEntry(
        revision=message.sequence,
        id=entry.id,
        operation=entry.operation,
        by=entry.by,
        at=entry.at,
    )
