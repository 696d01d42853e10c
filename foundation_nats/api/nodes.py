"""`cluster.nodes`: who is there, by asking them; who comes and goes, by watching."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from foundation_nats.api.refs import NodeInfo
from foundation_nats.api.watching import NodeChange, Watcher
from foundation_nats.base.logs import get_logger
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.errors import BusTimeoutError, NodeNotFoundError, NoRespondersError
from foundation_schemas import Heartbeat, LeaseRecord, NodeRecord, NodeStatus

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_ASK_S = 0.6
LEADER_KEY = "leader"


class Nodes:
    """The nodes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def list(self) -> list[NodeInfo]:
        """Every node that has joined and was not forgotten, by name.

        The status is what the node answers now: ``up`` or ``draining``;
        ``suspect`` if it does not answer in time, ``down`` if nobody listens.
        """
        bus, subjects = self._cluster.bus, self._cluster.subjects
        entries = await Bucket(bus, subjects, "nodes").read_all()
        leader = await self.leader()
        records = [
            rpc.decode(NodeRecord, entry.value)
            for _, entry in sorted(entries.items())
            if entry.value is not None
        ]
        return list(await asyncio.gather(*(self._info(record, leader) for record in records)))

    async def _info(self, record: NodeRecord, leader: LeaseRecord | None) -> NodeInfo:
        bus, subjects = self._cluster.bus, self._cluster.subjects
        beat: Heartbeat | None = None
        try:
            subject = subjects.control_node(record.name, "heartbeat")
            beat = await rpc.call(bus, subject, None, Heartbeat, timeout=_ASK_S)
            status = NodeStatus.DRAINING if beat.draining else NodeStatus.UP
        except NoRespondersError:
            status = NodeStatus.DOWN
        except BusTimeoutError:
            status = NodeStatus.SUSPECT
        load = beat.load.model_dump() if beat is not None else {}
        return NodeInfo(
            name=record.name,
            status=status,
            incarnation=beat.incarnation if beat is not None else record.incarnation,
            agents=int(load.pop("agents", 0)),
            load=load,
            capacity=record.capacity,
            labels=record.labels,
            capabilities=record.capabilities,
            workers=record.workers,
            host=record.host,
            pid=record.pid,
            leader=leader is not None and leader.holder == record.name,
            started_at=record.started_at,
        )

    async def get(self, name: str) -> NodeInfo:
        """One node.

        Raises:
            NodeNotFoundError: none of that name has joined.
        """
        for node in await self.list():
            if node.name == name:
                return node
        raise NodeNotFoundError(
            f"There is no node {name!r}.", hint="`foundation nodes` lists them."
        )

    async def leader(self) -> LeaseRecord | None:
        """Who leads, by the lease; None while nobody does."""
        bucket = Bucket(self._cluster.bus, self._cluster.subjects, "leases")
        entry = await bucket.read(LEADER_KEY)
        if entry is None or entry.value is None:
            return None
        return rpc.decode(LeaseRecord, entry.value)

    # ---- coming and going --------------------------------------------------------

    async def watch(self, *, present: bool = False) -> AsyncGenerator[NodeChange, None]:
        """Every change from now on: joined, left, suspect, down, returned; with the node's record.

        With *present* the nodes that are up come first, as ``joined``. It is this
        client's own judgement, by what it hears: see `foundation_nats.api.watching`.
        A reader that is 1000 changes behind loses the oldest.

        Example:
            >>> async for change in cluster.nodes.watch():
            ...     print(change.kind, change.node, change.record.labels)

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()
        watcher = Watcher()
        end = changes.listen(watcher.put)
        missed = 0
        try:
            for change in changes.present() if present else ():
                yield change
            while True:
                change = await watcher.next()
                if watcher.missed > missed:
                    get_logger("nodes").warning(
                        "a reader of node changes does not keep up", missed=watcher.missed
                    )
                    missed = watcher.missed
                yield change
        finally:
            end()

    async def on_up(self, callback: Callable[[NodeChange], object]) -> Callable[[], None]:
        """Call *callback* whenever a node joins or returns; returns what ends that.

        It is called in the event loop and must not block; what it raises is logged.
        Nodes that are up already are not told: `list` them, or `watch(present=True)`.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()

        def listener(change: NodeChange) -> None:
            if change.is_up:
                callback(change)

        return changes.listen(listener)

    async def on_down(self, callback: Callable[[NodeChange], object]) -> Callable[[], None]:
        """Call *callback* whenever a node leaves or is judged to be down; see `on_up`.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        changes = await self._cluster._open_changes()

        def listener(change: NodeChange) -> None:
            if change.is_down:
                callback(change)

        return changes.listen(listener)
