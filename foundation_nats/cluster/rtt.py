"""Measures how far the server and other nodes are from here, within a given time.

IO: pings of the connection, and requests to ``fnd.C.control.node.<node>.ping``.
Of a few tries the quickest counts, since the others waited for something here.
It never takes longer than *timeout*, and never has more than a few requests
under way; a peer that doesn't answer can't keep those that do from being asked,
if they come first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from foundation_nats.base.clock import monotonic
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import BusError

AT_ONCE = 16
PEERS_MAX = 256
_SERVER_TRIES = 3
_PEER_TRIES = 2
_SHARE = 0.5
"""Of the time, that one answer may take."""


async def server_rtt(bus: Bus, *, timeout: float) -> float | None:
    """Milliseconds to the server that *bus* is connected to; None: it did not answer in time."""
    best: float | None = None
    deadline = monotonic() + timeout
    for _ in range(_SERVER_TRIES):
        began = monotonic()
        if not bus.is_connected or began >= deadline:
            break
        try:
            await bus.flush(deadline - began)
        except BusError:
            break
        best = _quicker(best, began)
    return best


async def peer_rtts(
    bus: Bus, subjects: Subjects, peers: Sequence[str], *, timeout: float
) -> dict[str, float | None]:
    """Milliseconds until each of *peers* (at most `PEERS_MAX`) answered; None: not in time."""
    found: dict[str, float | None] = dict.fromkeys(peers[:PEERS_MAX])
    gate = asyncio.Semaphore(AT_ONCE)

    async def measure(peer: str) -> None:
        async with gate:
            for _ in range(_PEER_TRIES):
                began = monotonic()
                try:
                    async with asyncio.timeout(timeout * _SHARE):
                        await bus.request(subjects.control_node(peer, "ping"), b"", timeout=timeout)
                except (BusError, TimeoutError):
                    return
                found[peer] = _quicker(found[peer], began)

    try:
        async with asyncio.timeout(timeout), asyncio.TaskGroup() as group:
            for peer in found:
                group.create_task(measure(peer))
    except TimeoutError:
        pass  # what has come so far is what there is
    return found


def _quicker(best: float | None, began: float) -> float:
    ms = round((monotonic() - began) * 1000, 3)
    return ms if best is None else min(best, ms)
