"""Tells what membership has seen: in the log, as cluster events, and to telemetry.

Nothing is decided here. Only the leader speaks about others (`leads`), or each fact
would be told by every node; everybody speaks about itself, and logs what it sees.

Telemetry hears which lives of other nodes have come and gone. Silence is neither: a
node that is suspect counts as it did before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foundation_nats.base import telemetry
from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import Logger
from foundation_nats.base.telemetry import NODE_CONNECTED, NODE_DISCONNECTED
from foundation_nats.cluster.events import Events, about_node
from foundation_nats.cluster.liveness import StormBegan, Verdict
from foundation_nats.cluster.roster import Turned
from foundation_nats.cluster.topology import Healed, Parted
from foundation_nats.cluster.view import NodeView
from foundation_schemas import NodeRecord, NodeStatus


class Announcer:
    """What one process tells of the nodes.

    Args:
        own: this process's node; empty for an observer.
        observer: who has seen it, for telemetry.
    """

    def __init__(self, events: Events, log: Logger, *, own: str, observer: str) -> None:
        self._events = events
        self._log = log
        self._own = own
        self._observer = observer
        self._connected: dict[str, NodeView] = {}
        """The other nodes that telemetry takes to be connected."""
        self.leads = False

    # ---- this node ------------------------------------------------------------------

    def own(self, what: str, message: str, record: NodeRecord, **more: Any) -> None:
        """Something happened to this node."""
        self._events.emit(
            "node",
            what,
            message,
            node=record.name,
            incarnation=record.incarnation,
            **more,
            **about_node(record),
        )

    # ---- the others -----------------------------------------------------------------

    def turned(self, turned: Turned) -> None:
        """A verdict has changed."""
        change = turned.change
        node, incarnation, cause = change.node, change.incarnation, change.cause
        log = self._log.bind(peer=node, incarnation=incarnation, cause=cause)
        what, message = "", ""
        match change.new:
            case Verdict.UP if change.old is None:
                log.info("node seen")
                if turned.was_down:
                    what, message = "returned", f"Node {node} is back."
            case Verdict.UP:
                log.info("node is well again")
                what, message = "returned", f"Node {node} is heard again."
            case Verdict.SUSPECT:
                log.warning("node is suspect")
                what, message = "suspect", f"Node {node} is not heard."
            case Verdict.DOWN if cause != "left":
                log.warning("node is down")
                self.down(node, incarnation, cause, turned.record)
            case Verdict.DOWN:
                log.info("node left")
        if what:
            self._tell(what, message, node, incarnation, cause, turned.record)

    def down(self, node: str, incarnation: int, cause: str, record: NodeRecord | None) -> None:
        """This life of a node was declared over."""
        self._tell("down", f"Node {node} is down ({cause}).", node, incarnation, cause, record)

    def _tell(
        self,
        what: str,
        message: str,
        node: str,
        incarnation: int,
        cause: str,
        record: NodeRecord | None,
    ) -> None:
        if self.leads:
            # Of another of its lives we know, but that may have had other labels.
            is_same = record is not None and record.incarnation == incarnation
            about = about_node(record) if record is not None and is_same else {}
            self._events.emit(
                "node", what, message, node=node, incarnation=incarnation, cause=cause, **about
            )

    # ---- the cluster ----------------------------------------------------------------

    def storm_began(self, storm: StormBegan) -> None:
        """Verdicts are held."""
        hold = storm.until - monotonic()
        self._log.error("many nodes seem down at once; waiting", nodes=storm.nodes, hold_s=hold)
        if self.leads:
            self._events.emit(
                "cluster",
                "storm",
                f"{', '.join(storm.nodes)} and others seem down at once; failover waits "
                f"{hold:.0f} s.",
                nodes=list(storm.nodes),
                hold_s=hold,
            )

    def storm_ended(self) -> None:
        """Verdicts are given again."""
        self._log.warning("verdicts are given again")
        if self.leads:
            self._events.emit("cluster", "storm_ended", "Failover goes on.")

    def partition(self, change: Parted | Healed) -> None:
        """Groups of nodes don't hear each other, or do again."""
        match change:
            case Parted(groups):
                shown = " | ".join(", ".join(group) for group in groups)
                self._log.error("nodes have parted", groups=shown)
                self._events.emit(
                    "cluster",
                    "partition",
                    f"Nodes don't hear each other: {shown}.",
                    groups=[list(group) for group in groups],
                )
            case Healed(groups, gone):
                shown = f" {', '.join(gone)} never came back." if gone else ""
                self._log.warning("nodes hear each other again", gone=list(gone))
                self._events.emit(
                    "cluster",
                    "partition_healed",
                    f"The nodes hear each other again.{shown}",
                    groups=[list(group) for group in groups],
                    gone=list(gone),
                )

    # ---- telemetry ------------------------------------------------------------------

    def connections(self, views: Mapping[str, NodeView]) -> None:
        """Tell telemetry which lives of other nodes have come and gone."""
        now = {
            name: view
            for name, view in views.items()
            if name != self._own
            and view.is_alive
            and (view.status is not NodeStatus.SUSPECT or name in self._connected)
        }
        before, self._connected = self._connected, now
        if not (telemetry.is_attached(NODE_CONNECTED) or telemetry.is_attached(NODE_DISCONNECTED)):
            return
        for name, view in before.items():
            if name not in now or now[name].incarnation != view.incarnation:
                self._measure(NODE_DISCONNECTED, view.record, len(now))
        for name, view in now.items():
            if name not in before or before[name].incarnation != view.incarnation:
                self._measure(NODE_CONNECTED, view.record, len(now))

    def _measure(self, event: str, record: NodeRecord, nodes: int) -> None:
        telemetry.execute(
            event,
            {"nodes": nodes},
            {
                "node": record.name,
                "incarnation": record.incarnation,
                "labels": dict(record.labels),
                "capabilities": list(record.capabilities),
                "observer": self._observer,
            },
        )
