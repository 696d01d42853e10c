"""May activations of this node answer and start handlers now? Yes while its proof of life is fresh (F9).

The leader echoes each heartbeat on a core subject; the right to answer lasts
`fence_s` from the moment the echoed heartbeat was *sent*, on this machine's
own clock. A disconnect ends it at once, because the client re-subscribes by
itself before we know whether we were replaced; the next echo that calls this
incarnation up restores it. A process that was frozen finds its deadline
passed. No write is involved, so a stalled stream (F1) costs no right.
"""

from __future__ import annotations

from collections.abc import Callable

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import planted
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import decode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.errors import DecodeError
from foundation_schemas import Echo, NodeStatus


class Validity:
    """The right of one node's incarnation to answer, as one of its processes knows it."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        node: str,
        incarnation: int,
        fence_s: float,
        on_down: Callable[[], None] | None = None,
        on_restored: Callable[[], None] | None = None,
    ) -> None:
        self._bus = bus
        self._incarnation = incarnation
        self._fence_s = fence_s
        self._until = 0.0
        self._connected_since = 0.0
        self._was_valid = False
        self._on_down = on_down
        self._on_restored = on_restored
        self.leader: str | None = None
        self._log = get_logger("validity").bind(node=node)
        self._route = bus.subscribe(subjects.echo(node), self._on_echo)
        bus.on_disconnect(self._end)

    def _end(self) -> None:
        self._until = 0.0
        self._was_valid = False
        self._connected_since = monotonic()

    def _on_echo(self, message: Message) -> None:
        try:
            echo = decode(Echo, message.data)
        except DecodeError as error:
            self._log.warning("echo not understood", error=str(error))
            return
        if echo.incarnation != self._incarnation:
            return
        self.leader = echo.leader
        if echo.verdict is NodeStatus.DOWN:
            self._end()
            if self._on_down is not None:
                self._on_down()
            return
        # A heartbeat sent before a disconnect proves nothing about what came after.
        if echo.sent_at < self._connected_since:
            return
        self._until = max(self._until, echo.sent_at + self._fence_s)
        if not self._was_valid and self.is_valid():
            self._was_valid = True
            if self._on_restored is not None:
                self._on_restored()

    def is_valid(self) -> bool:
        """Whether an answer given now can't come from a replaced activation."""
        valid = monotonic() < self._until or planted("answer_after_deadline")
        if not valid:
            self._was_valid = False
        return valid

    def remaining_s(self) -> float:
        """Seconds of right left; 0 or less: none."""
        return self._until - monotonic()

    def close(self) -> None:
        """Stop listening; the right ends."""
        self._end()
        self._bus.unsubscribe(self._route)
