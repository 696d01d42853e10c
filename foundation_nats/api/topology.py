"""Takes the picture that `Cluster.topology` returns: asks every node at once, and listens.

IO: requests to ``fnd.C.control.node.*.rtt``, the lease, and the heartbeats that
this client hears. What is made of it: `foundation_nats.cluster.topology`.

Each node gets most of the time for its measurements and the rest is for the
answer's way back. A node that can't answer may still be heard, and then says in
its heartbeats whom it hears.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.bus import rpc
from foundation_nats.cluster.rtt import server_rtt
from foundation_nats.cluster.topology import Observer, Topology, topology
from foundation_nats.errors import BusError, FoundationError, NoRespondersError
from foundation_schemas import LeaseRecord, Pong, RttReply, RttRequest

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_MEASURE_SHARE = 0.7


async def take_topology(cluster: Cluster, *, timeout: float, zone_label: str) -> Topology:
    """See `Cluster.topology`."""
    changes = await cluster._open_changes()
    began = monotonic()
    measured: dict[str, RttReply] = {}
    absent: set[str] = set()
    view = changes.view()
    peers = [node.name for node in view.nodes.values() if node.is_alive]
    # A server that stands alone knows that nobody listens; one of several may have lost the
    # server that the node is at, which is a partition and no death.
    is_clustered = bool(cluster.bus.server_facts.get("cluster"))

    async def pings(name: str) -> bool:
        """A node of an earlier version doesn't know the question, and is there all the same."""
        subject = cluster.subjects.control_node(name, "ping")
        try:
            await rpc.call(cluster.bus, subject, None, Pong, timeout=timeout)
        except NoRespondersError:
            return False
        except FoundationError:
            pass
        return True

    async def ask(name: str) -> None:
        request = RttRequest(
            peers=[peer for peer in peers if peer != name], timeout_s=timeout * _MEASURE_SHARE
        )
        subject = cluster.subjects.control_node(name, "rtt")
        try:
            measured[name] = await rpc.call(
                cluster.bus, subject, request, RttReply, timeout=timeout
            )
        except NoRespondersError:
            if not is_clustered and not await pings(name):
                absent.add(name)
        except FoundationError:
            pass  # it did not answer, which the picture says

    async def own() -> float | None:
        return await server_rtt(cluster.bus, timeout=timeout * _MEASURE_SHARE)

    async def lease() -> LeaseRecord | None:
        return await cluster.nodes.leader()

    asking = [asyncio.create_task(ask(name)) for name in view.nodes]
    distance = asyncio.create_task(own())
    leading = asyncio.create_task(lease())
    tasks: list[asyncio.Task[None] | asyncio.Task[float | None] | asyncio.Task[LeaseRecord | None]]
    tasks = [*asking, distance, leading]
    try:
        await asyncio.wait(tasks, timeout=max(0.0, timeout - (monotonic() - began)))
    finally:
        for task in tasks:
            task.cancel()
        # Cancelled tasks end at once; those that failed are looked at below.
        await asyncio.gather(*tasks, return_exceptions=True)
    is_confirmed = not leading.cancelled() and leading.exception() is None
    if not is_confirmed and not leading.cancelled():
        error = leading.exception()
        if error is not None and not isinstance(error, BusError):
            raise error
    return topology(
        changes.view(),
        cluster=cluster.name,
        at=utc_text(),
        observer=Observer(
            server=str(cluster.bus.server_facts.get("server_name") or ""),
            rtt_ms=None if distance.cancelled() else distance.result(),
            hears=tuple(sorted(changes.hears())),
        ),
        leader=leading.result() if is_confirmed else _last_seen(measured.values()),
        is_leader_confirmed=is_confirmed,
        measured=measured,
        absent=absent,
        zone_label=zone_label,
    )


def _last_seen(answers: Iterable[RttReply]) -> LeaseRecord | None:
    """Who leads in the newest term that any node knows of."""
    leases = [answer.leader for answer in answers if answer.leader is not None]
    return max(leases, key=lambda lease: lease.term, default=None)


__all__ = ["take_topology"]
