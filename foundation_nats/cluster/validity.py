"""May activations of this node answer and start handlers now? Yes while its proof of life is fresh (F9).

The leader echoes each heartbeat on a core subject; the right to answer lasts
`fence_s` from the moment the echoed heartbeat was *sent*, on this machine's
own clock. A disconnect ends it at once, because the client re-subscribes by
itself before we know whether we were replaced. A process that was frozen finds
its deadline passed. No write is involved, so a stalled stream (F1) costs no
right.

A right that has lapsed, noticed or not, doesn't come back by an echo alone: the
leader who calls this incarnation up may be one who returns, and hasn't heard
yet that others gave its agents away. The next echo asks for a *review*; the
right counts again once the caller says by `confirm` that it has read what the
store holds *now* and has ended what is no longer this node's. It costs one read
per lapse, and asking `is_valid` costs what it did before.
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
        on_review: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            on_down: called whenever an echo says that this incarnation is over.
            on_restored: called when the right counts (again).
            on_review: called with the lapse's number when an echo arrives after a lapse;
                `confirm` must follow. None: nothing runs here that could have been replaced.
        """
        self._bus = bus
        self._incarnation = incarnation
        self._fence_s = fence_s
        self._until = 0.0
        self._proven_until = 0.0
        """As `_until`, whether reviewed or not."""
        self._lapse = 0
        self._in_review = False
        self._connected_since = 0.0
        self._on_down = on_down
        self._on_restored = on_restored
        self._on_review = on_review
        self.leader: str | None = None
        self._log = get_logger("validity").bind(node=node)
        self._route = bus.subscribe(subjects.echo(node), self._on_echo)
        bus.on_disconnect(self._end)

    def _end(self) -> None:
        self._until = self._proven_until = 0.0
        self._lapse += 1
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
        now = monotonic()
        has_lapsed = now >= self._proven_until
        self._proven_until = max(self._proven_until, echo.sent_at + self._fence_s)
        if not has_lapsed:
            if not self._in_review:
                self._until = self._proven_until
        elif now < self._proven_until:
            self._return()

    def _return(self) -> None:
        """The right had lapsed, whether anybody asked meanwhile or not."""
        self._until = 0.0
        self._lapse += 1
        self._in_review = True
        if self._on_review is None:
            self.confirm(self._lapse)
        else:
            self._on_review(self._lapse)

    def in_review(self, lapse: int) -> bool:
        """Whether `confirm` is still waited for; not if the right has lapsed anew."""
        return self._in_review and lapse == self._lapse

    def confirm(self, lapse: int) -> None:
        """Say that what runs here is this node's, as read after `on_review` was called."""
        if not self.in_review(lapse):
            return
        self._in_review = False
        self._until = self._proven_until
        if self._on_restored is not None:
            self._on_restored()

    def is_valid(self) -> bool:
        """Whether an answer given now can't come from a replaced activation."""
        return monotonic() < self._until or planted("answer_after_deadline")

    def remaining_s(self) -> float:
        """Seconds of right left; 0 or less: none."""
        return self._until - monotonic()

    def close(self) -> None:
        """Stop listening; the right ends."""
        self._end()
        self._bus.unsubscribe(self._route)
