"""Publishes cluster events: facts for observers, which nothing in the platform depends on.

Sends on ``fnd.C.event.<topic>.<what>`` without waiting. The stream EVENTS
keeps what reaches it; an event that happens while there is no connection is
logged and lost, because holding up a failover for its announcement would be
the wrong way round.
"""

from __future__ import annotations

from typing import Any

from foundation_nats.base.clock import utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import BusError
from foundation_schemas import ClusterEvent, NodeRecord


class Events:
    """The events of one source."""

    def __init__(self, bus: Bus, subjects: Subjects, source: str) -> None:
        self._bus = bus
        self._subjects = subjects
        self._source = source
        self._log = get_logger("events")

    def emit(
        self, topic: str, what: str, message: str, *, at: str | None = None, **data: Any
    ) -> None:
        """Say that something happened (at the time *at*, or now); never raises and never waits."""
        event = ClusterEvent(
            topic=topic,
            what=what,
            at=at or utc_text(),
            source=self._source,
            message=message,
            data=data,
        )
        self._log.debug("event", topic=topic, what=what, message=message)
        try:
            self._bus.publish(self._subjects.event(topic, what), encode(event))
        except BusError as error:
            self._log.info("event not sent", topic=topic, what=what, error=str(error))


def about_node(record: NodeRecord) -> dict[str, Any]:
    """What events say of a node besides its name and its life: what it said of itself."""
    return {
        "host": record.host,
        "version": record.version,
        "workers": len(record.workers),
        "capabilities": list(record.capabilities),
        "labels": dict(record.labels),
        "capacity": dict(record.capacity),
    }
