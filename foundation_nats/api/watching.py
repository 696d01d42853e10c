"""What `cluster.nodes.watch` tells: differences between what an observer believed and believes now.

`NodeChanges` is the shell over the client's observer membership; `differences` is pure.

A new life of a node always follows the end of its old one: whoever counts
`is_up` and `is_down` of a node sees them in turns (a return after mere silence aside). A node that has said good-bye
is `left`, whoever else ended is `down`. Not guaranteed: that two clients see the
same, or at the same time; that a state that lasted for less than a moment is
told at all. To act on a node's end there must be something that fences it: see
docs/guarantees.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from foundation_nats.base.clock import monotonic, utc_text
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.config import LivenessConfig
from foundation_nats.errors import DecodeError
from foundation_schemas import Heartbeat, NodeRecord, NodeStatus

_SETTLE_S = 0.1
"""How long a change waits: for the good-bye that explains an end, which comes on another route,
and for a node that begins anew, whose record, heartbeat and first answer come one by one."""
_GOODBYES_MAX = 1000
WAITING_MAX = 1000


class NodeChangeKind(StrEnum):
    """What has become of a node."""

    JOINED = "joined"
    """A process that was not there: it is up."""
    LEFT = "left"
    """It stopped in good order."""
    SUSPECT = "suspect"
    """It is not heard; it may live."""
    DOWN = "down"
    """It is given up by this client, for silence, or its end was written down by the cluster."""
    RETURNED = "returned"
    """It is heard again: after silence, or after it was given up while it lived, as one that was
    cut off. Under a new incarnation if the cluster had given it up, and started its agents elsewhere."""


@dataclass(frozen=True, slots=True)
class NodeChange:
    """One change of one node, with what the node says about itself."""

    kind: NodeChangeKind
    record: NodeRecord
    """What the node says about itself: labels, capabilities, capacity, workers, host, version …"""
    status: NodeStatus
    at: str
    """When this client learnt it, RFC 3339 in UTC."""

    @property
    def node(self) -> str:
        """The node's name."""
        return self.record.name

    @property
    def incarnation(self) -> int:
        """The life concerned."""
        return self.record.incarnation

    @property
    def is_up(self) -> bool:
        """Whether the node is there from now on."""
        return self.kind in (NodeChangeKind.JOINED, NodeChangeKind.RETURNED)

    @property
    def is_down(self) -> bool:
        """Whether the node is gone from now on."""
        return self.kind in (NodeChangeKind.DOWN, NodeChangeKind.LEFT)


Told = Mapping[str, NodeView]


def differences(
    told: Told, now: Mapping[str, NodeView], said_goodbye: Callable[[str, int], bool]
) -> tuple[list[tuple[NodeChangeKind, NodeView]], Told]:
    """What has happened since *told*, by node name, and what is told after that. Pure.

    A life that was only read about is not told until it was heard.
    """
    happened: list[tuple[NodeChangeKind, NodeView]] = []
    after: dict[str, NodeView] = {}
    for name in sorted({*told, *now}):
        old, new = told.get(name), now.get(name)
        was_alive = old is not None and old.is_alive
        goes_on = (
            old is not None
            and new is not None
            and new.is_alive
            and old.incarnation == new.incarnation
        )
        if old is not None and was_alive and not goes_on:
            is_left = new is None or said_goodbye(name, old.incarnation)
            old = NodeView(old.record, NodeStatus.DOWN)
            happened.append((NodeChangeKind.LEFT if is_left else NodeChangeKind.DOWN, old))
        if new is None:
            continue
        if not new.is_alive:
            after[name] = new
            continue
        is_heard = new.status is not NodeStatus.SUSPECT
        if was_alive and goes_on:
            assert old is not None
            was_heard = old.status is not NodeStatus.SUSPECT
            if is_heard != was_heard:
                kind = NodeChangeKind.RETURNED if is_heard else NodeChangeKind.SUSPECT
                happened.append((kind, new))
            after[name] = new
        elif is_heard:
            is_back = old is not None and _process(old) == _process(new)
            happened.append((NodeChangeKind.RETURNED if is_back else NodeChangeKind.JOINED, new))
            after[name] = new
        elif old is not None:
            after[name] = old
    return happened, after


def _process(view: NodeView) -> tuple[str, int, str]:
    record = view.record
    return record.host, record.pid, record.started_at


class Watcher:
    """What one reader has still to see; the oldest is dropped when it does not keep up."""

    def __init__(self) -> None:
        self._waiting: deque[NodeChange] = deque(maxlen=WAITING_MAX)
        self._some = asyncio.Event()
        self.missed = 0
        """Changes that were dropped."""

    def put(self, change: NodeChange) -> None:
        """Add one."""
        if len(self._waiting) == WAITING_MAX:
            self.missed += 1
        self._waiting.append(change)
        self._some.set()

    async def next(self) -> NodeChange:
        """The oldest that waits; waits for one."""
        while not self._waiting:
            self._some.clear()
            await self._some.wait()
        return self._waiting.popleft()


class NodeChanges:
    """One observer for all who watch."""

    def __init__(self, bus: Bus, subjects: Subjects, config: LivenessConfig) -> None:
        self._bus = bus
        self._subjects = subjects
        self._membership = Membership(bus, subjects, config)
        self._told: Told = {}
        self._goodbyes: dict[tuple[str, int], None] = {}
        self._beats: dict[str, tuple[Heartbeat, float]] = {}
        self._patience_s = config.suspect_after_s
        self._listeners: list[Callable[[NodeChange], None]] = []
        self._later: asyncio.TimerHandle | None = None
        self._again: asyncio.TimerHandle | None = None
        self._route: Route | None = None
        self._log = get_logger("nodes")

    async def open(self, scope: TaskScope, *, timeout: float) -> None:
        """Begin to observe; what is there now is taken as told.

        Raises:
            BusTimeoutError, BusUnavailableError: the ``nodes`` bucket could not be read.
        """
        self._route = self._bus.subscribe(self._subjects.heartbeats(), self._on_heartbeat)
        await self._membership.observe(scope, timeout=timeout)
        self._told = dict(self._membership.nodes())
        self._membership.subscribe(self._on_change)

    def close(self) -> None:
        """Stop; tasks end with their scope. Idempotent."""
        for timer in (self._later, self._again):
            if timer is not None:
                timer.cancel()
        if self._route is not None:
            self._bus.unsubscribe(self._route)
        self._membership.close()

    def view(self) -> ClusterView:
        """The nodes as this client knows them now."""
        return ClusterView(MappingProxyType(self._corrected()), self._membership.view().revision)

    def hears(self) -> frozenset[str]:
        """The nodes whose heartbeats reach this client."""
        return self._membership.hears()

    def present(self) -> list[NodeChange]:
        """The nodes that are up now, as changes."""
        return [
            NodeChange(NodeChangeKind.JOINED, view.record, view.status, utc_text())
            for _, view in sorted(self._told.items())
            if view.is_alive and view.status is not NodeStatus.SUSPECT
        ]

    def listen(self, listener: Callable[[NodeChange], None]) -> Callable[[], None]:
        """Call *listener* with every change; returns what ends that."""
        self._listeners.append(listener)

        def end() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return end

    def _on_heartbeat(self, message: Message) -> None:
        try:
            beat = rpc.decode(Heartbeat, message.data)
        except DecodeError:
            return  # the membership says so
        self._beats[beat.node] = beat, monotonic()
        if beat.left:
            self._goodbyes[beat.node, beat.incarnation] = None
            if len(self._goodbyes) > _GOODBYES_MAX:
                self._goodbyes.pop(next(iter(self._goodbyes)))
        told = self._told.get(beat.node)
        if told is not None and not told.is_alive:
            self._on_change()

    def _on_change(self) -> None:
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(_SETTLE_S, self._tell)

    def _tell(self) -> None:
        self._later = None
        now = self._corrected()
        self._beats = {name: self._beats[name] for name in now if name in self._beats}
        happened, self._told = differences(self._told, now, self._said_goodbye)
        for kind, view in happened:
            change = NodeChange(kind, view.record, view.status, utc_text())
            for listener in list(self._listeners):
                try:
                    listener(change)
                except Exception:  # a callback of the user's must not stop the others
                    self._log.exception("node callback failed", node=change.node, kind=kind)

    def _corrected(self) -> dict[str, NodeView]:
        """The observer's view, without verdicts of its own that it has been shown to be wrong in.

        An observer's verdict is by silence alone, and it keeps it. A node that is heard all
        the same lives, unless its end is written down, or it has said good-bye.
        """
        now = dict(self._membership.nodes())
        limit = monotonic() - self._patience_s
        is_corrected = False
        for name, view in now.items():
            beat, at = self._beats.get(name, (None, 0.0))
            if (
                view.status is NodeStatus.DOWN
                and not view.record.ended
                and beat is not None
                and beat.incarnation == view.incarnation
                and at > limit
                and not self._said_goodbye(name, view.incarnation)
            ):
                status = NodeStatus.DRAINING if beat.draining else NodeStatus.UP
                now[name] = NodeView(view.record, status, beat.load, hears=view.hears)
                is_corrected = True
        if is_corrected:
            # The observer has nothing more to say about it: whether it is silent again is for us.
            if self._again is not None:
                self._again.cancel()
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(self._patience_s, self._on_change)
        return now

    def _said_goodbye(self, node: str, incarnation: int) -> bool:
        return (node, incarnation) in self._goodbyes


__all__ = ["NodeChange", "NodeChangeKind", "NodeChanges", "Watcher", "differences"]
