"""`cluster.consensus`: replicated domains: propose, read, and look into their logs."""

from __future__ import annotations

import asyncio
import builtins
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from foundation_nats.bus.rpc import decode
from foundation_nats.bus.streams import StoredMessage, api
from foundation_nats.consensus.domain import Domain, Proposal, ProposalStatus, check_id
from foundation_nats.consensus.log import PAGE, Log
from foundation_nats.consensus.replica import Replica
from foundation_nats.errors import (
    ConfigError,
    DecodeError,
    DomainNotFoundError,
    NotFoundError,
)
from foundation_schemas import DomainEntry
from foundation_schemas.base import WireModel, is_name

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

S = TypeVar("S", bound=BaseModel)
O = TypeVar("O")  # noqa: E741  state and operation, see consensus/domain.py

_IDS_MAX = 1024


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


class Consensus:
    """The replicated domains of a cluster.

    A domain is opened when it is first used, and followed until the cluster is closed.

    Example:
        >>> found = await cluster.consensus.propose(Seats, Book(seat="12A", by="ann"))
        >>> found.status, found.revision
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._replicas: dict[str, tuple[type, Replica[Any, Any]]] = {}
        self._opening = asyncio.Lock()
        self._homes: OrderedDict[str, str] = OrderedDict()
        """In which domain a proposal of ours is, by its id."""

    async def open(
        self, domain: Domain[S, O] | type[Domain[S, O]], *, timeout: float = 10.0
    ) -> Replica[S, O]:
        """This process's replica of *domain*, up to date when this returns.

        Raises:
            ConfigError: the declaration is wrong, or another one has its name.
            DomainError: the log is damaged, or of a newer version than this code.
            BusTimeoutError, BusUnavailableError: not read within *timeout*.
        """
        declared = domain() if isinstance(domain, type) else domain
        async with self._opening:
            found = self._replicas.get(declared.name)
            if found is not None:
                if found[0] is not type(declared):
                    raise ConfigError(
                        f"The domain name {declared.name} is that of {found[0].__qualname__} "
                        f"already, and {type(declared).__qualname__} declares it too."
                    )
                return found[1]
            cluster = self._cluster
            replica = Replica(
                cluster.bus, cluster.subjects, declared, replicas=cluster.config.replicas
            )
            await replica.open(timeout=timeout)
            self._replicas[declared.name] = (type(declared), replica)
            return replica

    async def propose(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        operation: Any,
        *,
        id: str | None = None,
        timeout: float = 5.0,
    ) -> Proposal:
        """Have *operation* accepted by the domain, or refused by its validator.

        *operation* is one of the domain's models, or a dict that fits one. The result
        is accepted with its revision, rejected with the reason, or unknown: ask
        `status` with its id, or propose it again with the same *id*, which takes
        effect once.

        Raises:
            PayloadInvalidError: *operation* fits none of the domain's models.
            BusUnavailableError, DomainBusyError: not accepted within *timeout*, for certain.
            DomainFullError, PayloadTooLargeError, PermissionDeniedError: not accepted.
            ConfigError, DomainError: as in `open`.
        """
        replica = await self.open(domain, timeout=timeout)
        found = await replica.propose(operation, id=id, timeout=timeout)
        self._homes[found.id] = replica.name
        while len(self._homes) > _IDS_MAX:
            self._homes.popitem(last=False)
        return found

    async def status(
        self,
        id: str,
        domain: Domain[S, O] | type[Domain[S, O]] | None = None,
        *,
        timeout: float = 5.0,
    ) -> Proposal:
        """What became of a proposal: accepted, rejected, or not found as of a revision.

        *domain* may be left out for a proposal of this client, and is then looked for
        in the domains that it has open.

        Raises:
            ConfigError: *id* is no id, or no domain is named or open.
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
        """
        check_id(id)
        if domain is not None:
            return await (await self.open(domain)).status(id, timeout=timeout)
        home = self._homes.get(id)
        asked = [replica for name, (_, replica) in self._replicas.items() if home in (None, name)]
        if not asked:
            raise ConfigError(f"Say which domain proposal {id} is of: none is open here.")
        for replica in asked:
            found = await replica.status(id, timeout=timeout)
            if found.status is not ProposalStatus.NOT_FOUND:
                return found
        return found

    async def read(
        self,
        domain: Domain[S, O] | type[Domain[S, O]],
        *,
        timeout: float = 5.0,
        barrier: bool = False,
    ) -> S:
        """The state, with everything accepted before this call; see `Replica.read`.

        Raises:
            BusTimeoutError, BusUnavailableError: not certain within *timeout*.
            ConfigError, DomainError: as in `open`.
        """
        replica = await self.open(domain, timeout=timeout)
        return await replica.read(timeout=timeout, barrier=barrier)

    async def view(self, domain: Domain[S, O] | type[Domain[S, O]]) -> S:
        """The state as this process knows it: at least with its own accepted proposals.

        Raises:
            ConfigError, DomainError: as in `open`.
        """
        return (await self.open(domain)).view

    async def close(self) -> None:
        """Follow no domain any more. Idempotent."""
        replicas, self._replicas = self._replicas, {}
        for _, replica in replicas.values():
            await replica.close()

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
