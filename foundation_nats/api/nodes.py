"""`cluster.nodes`: who is there, by asking them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from foundation_nats.api.refs import NodeInfo
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
