"""Tells the agents that want to know what happens to the cluster: ``cluster.*`` signals on topics.

IO: the leader publishes ``cluster.node_up``, ``node_down``, ``leader_changed`` and ``rebalanced`` as
signals for the topic of that name, if any agent subscribes to it (a class that handles such a signal
does by itself). From there on they are signals like any other: stored, copied into each subscriber's
mailbox, running or not, handled once each.

What changed shortly before a leader died is published by its successor under the same id, so it is
neither lost nor repeated. Not promised: an order among them, and what changed while no member of
the cluster could see it. Every member watches; nobody but the leader speaks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import append
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.events import about_node
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Registry
from foundation_nats.control.upkeep import Upkeep
from foundation_nats.errors import FoundationError
from foundation_nats.signaling.envelope import encode_envelope
from foundation_nats.signaling.receivers import subscribers
from foundation_schemas import NodeRecord, NodeStatus, Target, TargetKind

_RECENT_S = 30.0
"""What a new leader tells again, in case that its predecessor did not; below the duplicate window."""
_WAITING_MAX = 1_000
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class News:
    """One thing that happened."""

    what: str
    key: str
    """What tells it from others of its kind: equal wherever it is seen."""
    data: dict[str, Any]
    at: float

    @property
    def id(self) -> str:
        """The id of its signal."""
        return blake2b(f"cluster.{self.what}\n{self.key}".encode(), digest_size=16).hexdigest()


class Herald:
    """What one member has seen of the cluster, and, while it leads, tells."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        membership: Membership,
        registry: Registry,
        upkeep: Upkeep,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._membership = membership
        self._registry = registry
        self._upkeep = upkeep
        self._leads = False
        self._seen: dict[str, tuple[NodeRecord, bool]] = {}
        """Node to what it said of itself and whether it lives."""
        self._rebalanced: str | None = None
        self._recent: list[News] = []
        self._waiting: list[News] = []
        self._wake = asyncio.Event()
        self._log = get_logger("herald")

    def open(self, scope: TaskScope) -> None:
        """Watch until *scope* closes; what is so by now is no news."""
        self._look_at_nodes()
        self._look_at_rebalance()
        self._recent.clear()
        self._membership.subscribe(self._look_at_nodes)
        self._upkeep.subscribe(self._look_at_rebalance)
        scope.start(self._run(), "herald")

    def lead(self, term: int | None) -> None:
        """Speak in this term; None: be silent."""
        self._leads = term is not None
        self._waiting.clear()
        if term is not None:
            now = monotonic()
            self._waiting = [item for item in self._recent if now - item.at < _RECENT_S]
            self._say("leader_changed", str(term), leader=self._membership.node, term=term)

    def _say(self, what: str, key: str, **data: Any) -> None:
        now = monotonic()
        news = News(what, key, data, now)
        self._recent = [item for item in self._recent if now - item.at < _RECENT_S][-_WAITING_MAX:]
        self._recent.append(news)
        if self._leads and len(self._waiting) < _WAITING_MAX:
            self._waiting.append(news)
            self._wake.set()

    def _look_at_nodes(self) -> None:
        nodes = self._membership.nodes()
        for name, view in nodes.items():
            lives = view.status is not NodeStatus.DOWN
            before = self._seen.get(name)
            self._seen[name] = view.record, lives
            if before is not None:
                record, lived = before
                if record.incarnation > view.incarnation:
                    self._seen[name] = before
                    continue
                if (record.incarnation, lived) == (view.incarnation, lives):
                    continue
            if lives:
                self._say_node("node_up", view.record)
            elif before is not None:
                has_left = self._membership.has_left(name, view.incarnation)
                self._say_node("node_down", view.record, cause="left" if has_left else "lost")
        for name, (record, lived) in list(self._seen.items()):
            if name not in nodes:
                del self._seen[name]
                if lived:
                    self._say_node("node_down", record, cause="left")

    def _say_node(self, what: str, record: NodeRecord, **data: Any) -> None:
        name, incarnation = record.name, record.incarnation
        about = about_node(record)
        self._say(
            what, f"{name} {incarnation}", node=name, incarnation=incarnation, **data, **about
        )

    def _look_at_rebalance(self) -> None:
        found = self._upkeep.rebalance
        if found is None or found.finished_at is None or found.id == self._rebalanced:
            return
        self._rebalanced = found.id
        self._say("rebalanced", found.id, strategy=found.strategy, moved=found.moved)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._leads and self._waiting:
                news = self._waiting[0]
                try:
                    await self._tell(news)
                except FoundationError as error:
                    self._log.info("not told yet", what=news.what, error=str(error))
                    await asyncio.sleep(_RETRY_S)
                    continue
                if self._waiting and self._waiting[0] is news:
                    del self._waiting[0]

    async def _tell(self, news: News) -> None:
        topic = f"cluster.{news.what}"
        wanting = (held for held in self._registry.all().values() if held.record.spec.subscribe)
        each, groups = subscribers(wanting, topic)
        if not each and not groups:
            return
        target = Target(kind=TargetKind.TOPIC, name=topic)
        body = encode_envelope(
            id=news.id, source="cluster", type=topic, target=str(target), data=news.data
        )
        headers = {"Nats-Msg-Id": news.id}
        await append(self._bus, self._subjects.route(target), body, headers=headers)
