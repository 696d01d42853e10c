"""`cluster.leases`: locks, elections, semaphores and counters, and who holds what."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Literal

from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode
from foundation_nats.coordination import counter, election, lock, semaphore
from foundation_nats.coordination.counter import Counter
from foundation_nats.coordination.election import Election
from foundation_nats.coordination.lock import Lock
from foundation_nats.coordination.semaphore import Semaphore
from foundation_nats.errors import DecodeError
from foundation_schemas import ElectionRecord, LeaseRecord, LockRecord, SemaphoreRecord
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

LeaseKind = Literal["leader", "lock", "election", "semaphore"]


class LeaseInfo(WireModel):
    """A right that somebody holds, or that is free."""

    kind: LeaseKind
    name: str
    holder: str | None = None
    """None: nobody. It may have died since; then others take over `ttl_s` after `renewed`."""
    token: int = 0
    """The fencing token: of the present holding, else of the last one."""
    ttl_s: float = 0.0
    since: str = ""
    renewed: str = ""
    """When the key was last written, by the server's clock."""
    permits: int | None = None
    """Of a semaphore."""


class Leases:
    """What one of many may do at a time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def lock(self, name: str, *, ttl_s: float = 10.0, owner: str | None = None) -> Lock:
        """A contender for the lock *name*; see `foundation_nats.coordination.lock`.

        Raises:
            ConfigError: the name or `ttl_s` is not allowed.
        """
        return lock(self._cluster, name, ttl_s=ttl_s, owner=self._owner(owner))

    def election(
        self, name: str, *, candidate: str | None = None, ttl_s: float = 15.0, value: str = ""
    ) -> Election:
        """A campaigner or observer; see `foundation_nats.coordination.election`.

        Raises:
            ConfigError: a name or `ttl_s` is not allowed.
        """
        return election(self._cluster, name, candidate=candidate, ttl_s=ttl_s, value=value)

    def semaphore(
        self, name: str, permits: int, *, ttl_s: float = 10.0, owner: str | None = None
    ) -> Semaphore:
        """A contender for one of the permits; see `foundation_nats.coordination.semaphore`.

        Raises:
            ConfigError: the name, `permits` or `ttl_s` is not allowed.
        """
        return semaphore(self._cluster, name, permits, ttl_s=ttl_s, owner=self._owner(owner))

    def counter(self, name: str, *, writer: str | None = None) -> Counter:
        """A writer's handle; see `foundation_nats.coordination.counter`.

        *writer* is this connection's name unless given; each leaves a key for ever, so
        give ``Cluster.connect(name=…)`` or *writer* a name that comes again.

        Raises:
            ConfigError: a name is not allowed.
        """
        return counter(self._cluster, name, writer=self._owner(writer))

    def _owner(self, owner: str | None) -> str:
        return self._cluster.bus.name if owner is None else owner

    async def list(self) -> builtins.list[LeaseInfo]:
        """Every lock, election and semaphore that was ever used, and who leads the cluster.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        cluster = self._cluster
        found: builtins.list[LeaseInfo] = []
        for kind in ("leases", "coordination"):
            entries = await Bucket(cluster.bus, cluster.subjects, kind).read_all()
            for key, entry in sorted(entries.items()):
                try:
                    found += _infos(kind, key, entry)
                except DecodeError:
                    continue  # another's key; the buckets are shared
        return found


def _infos(bucket: str, key: str, entry: Entry) -> list[LeaseInfo]:
    assert entry.value is not None
    kind, _, name = key.partition("_")
    if bucket == "leases":
        lease = decode(LeaseRecord, entry.value)
        return [
            LeaseInfo(
                kind="leader",
                name=key,
                holder=lease.holder,
                token=lease.term,
                ttl_s=lease.ttl_s,
                renewed=entry.time,
            )
        ]
    match kind:
        case "lock":
            held = decode(LockRecord, entry.value)
            holder = None if held.holder is None else held.owner or held.holder
            return [
                LeaseInfo(
                    kind="lock",
                    name=name,
                    holder=holder,
                    token=held.token,
                    ttl_s=held.ttl_s,
                    since=held.since,
                    renewed=entry.time,
                )
            ]
        case "election":
            led = decode(ElectionRecord, entry.value)
            return [
                LeaseInfo(
                    kind="election",
                    name=name,
                    holder=led.leader,
                    token=led.term,
                    ttl_s=led.ttl_s,
                    since=led.since,
                    renewed=entry.time,
                )
            ]
        case "semaphore":
            shared = decode(SemaphoreRecord, entry.value)
            free = LeaseInfo(
                kind="semaphore",
                name=name,
                token=shared.token,
                renewed=entry.time,
                permits=shared.permits,
            )
            return [
                free.model_copy(
                    update={
                        "holder": permit.owner or permit.holder,
                        "token": permit.token,
                        "ttl_s": permit.ttl_s,
                        "since": permit.since,
                    }
                )
                for permit in shared.holders
            ] or [free]
        case _:
            return []
