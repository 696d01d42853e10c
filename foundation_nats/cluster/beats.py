"""Sends this node's heartbeats, and as the leader the echoes of everybody's.

Publishes ``fnd.C.heartbeat.node.<self>`` and ``fnd.C.echo.node.<node>``, without
waiting: what can't be sent now is not sent, because the next one follows.

Everybody reads everybody's: those that come together are read in one go, and to be
woken costs more than to read. So whoever follows a leader sends when the leader has
sent, and by itself only if the leader stays away.
"""

from __future__ import annotations

import random

from foundation_nats.base.logs import Logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import BusError
from foundation_schemas import Echo, Heartbeat, Load, NodeRecord, NodeStatus

EARLY_BEAT = 0.6
_EARLY, _LATE = 0.9, 1.1
_LATE_BEAT = 1.15, 1.3
"""Of the interval: after the leader's next one, which we answer with our own."""


class Beats:
    """The heartbeats of one member."""

    def __init__(self, bus: Bus, subjects: Subjects, *, every_s: float, log: Logger) -> None:
        self._bus = bus
        self._subjects = subjects
        self._every_s = every_s
        self._log = log
        self._beat = 0
        self._sent_at = 0.0
        self.next_at = 0.0
        """When the next one is due."""

    def may_come_early(self, now: float) -> bool:
        """Whether the last one is old enough for the next to be sent along with the leader's."""
        return now - self._sent_at >= self._every_s * EARLY_BEAT

    def send(
        self,
        record: NodeRecord,
        *,
        load: Load,
        hears: list[str] | None,
        now: float,
        is_led: bool,
        draining: bool = False,
        left: bool = False,
    ) -> None:
        """Send one; never raises and never waits.

        Args:
            hears: the other nodes that this one hears; None: as it said before.
            is_led: another node's heartbeats set the pace.
        """
        self._beat += 1
        self._sent_at = now
        share = random.uniform(*_LATE_BEAT) if is_led else random.uniform(_EARLY, _LATE)
        self.next_at = now + self._every_s * share
        beat = Heartbeat(
            node=record.name,
            incarnation=record.incarnation,
            beat=self._beat,
            sent_at=now,
            draining=draining,
            left=left,
            load=load,
            hears=hears,
        )
        try:
            self._bus.publish(self._subjects.heartbeat(record.name), encode(beat))
        except BusError as error:
            self._log.debug("heartbeat not sent", error=str(error))

    def was_due(self, now: float) -> None:
        """One was due, sent or not: the next is in half an interval at the soonest."""
        self.next_at = max(self.next_at, now + self._every_s / 2)

    def echo(self, beat: Heartbeat, *, is_over: bool, leader: str, term: int) -> None:
        """Say, as the leader of *term*, that *beat* was heard and whether its sender's life is over."""
        echo = Echo(
            node=beat.node,
            incarnation=beat.incarnation,
            beat=beat.beat,
            sent_at=beat.sent_at,
            verdict=NodeStatus.DOWN if is_over else NodeStatus.UP,
            leader=leader,
            term=term,
        )
        try:
            self._bus.publish(self._subjects.echo(beat.node), encode(echo))
        except BusError as error:
            self._log.debug("echo not sent", error=str(error))
