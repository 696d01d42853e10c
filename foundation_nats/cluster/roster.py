"""What one process knows of each node: its record, its last heartbeat, which of its lives are over.

Pure; ``now`` is this process's monotonic time. Everything that is learned of a node
comes in by a method here, goes through the `LivenessDetector`, and is shown in `views`.
What the caller (`membership.py`) has to do about it is returned, in order.

A life that is over is *sealed* (written down in the node's record), replaced by a
newer one, or over by our own verdict alone. The last is an *opinion*: `take_back`
makes it void, and `judge_anew` all of them.

Not guaranteed: that the lives of nodes which are long gone are remembered. The
number of those is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from foundation_nats.cluster.hearing import Hearing
from foundation_nats.cluster.liveness import (
    Confirm,
    Event,
    Forgot,
    Heard,
    Left,
    LivenessDetector,
    StormBegan,
    StormEnded,
    Verdict,
    VerdictChanged,
)
from foundation_nats.cluster.topology import Group, groups_of
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.config import LivenessConfig
from foundation_schemas import Heartbeat, Load, NodeRecord, NodeStatus

IDLE = Load()
_LIVES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Turned:
    """A verdict has changed, and the roster with it."""

    change: VerdictChanged
    record: NodeRecord | None
    """What is known of the node, perhaps of another life; of one that is down, what was."""
    was_down: bool
    """Whether the node was shown as down until now."""


Outcome = Turned | Confirm | StormBegan | StormEnded


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of something that was learned of a node."""

    outcomes: list[Outcome]
    is_news: bool
    """Whether the listeners should know, whatever the outcomes."""
    must_greet: bool = False
    """It was only read about: it should be asked whether it lives."""


class Roster:
    """The nodes as one process knows them.

    Args:
        own: the name of this process's node; empty for an observer.
    """

    def __init__(self, own: str, config: LivenessConfig) -> None:
        self._own = own
        self._config = config
        self._detector = self._new_detector()
        self._records: dict[str, NodeRecord] = {}
        self._heard: dict[str, Heartbeat | None] = {}
        """The last heartbeat of each node's newest incarnation; None: it only answered a ping."""
        self._down: dict[str, int] = {}
        """Node to the highest incarnation that is over; outlives the node's record."""
        self._left: dict[str, int] = {}
        """Node to the highest incarnation that has said good-bye; no more nodes than in `_down`."""
        self._opinions: dict[str, int] = {}
        """Node to the incarnation that is over (in `_down`) by our own verdict alone."""
        self._sealed: dict[str, int] = {}
        """Node to the highest incarnation that is written down as over."""
        self._views: dict[str, NodeView] = {}
        self.views: Mapping[str, NodeView] = MappingProxyType(self._views)
        """Every known node by name, this one included; live."""
        self.hearing = Hearing(config.suspect_after_s)
        self.revision = 0
        """Grows with every change that a view can show."""

    def _new_detector(self) -> LivenessDetector:
        config = self._config
        return LivenessDetector(
            suspect_after_s=config.suspect_after_s,
            down_after_s=config.down_after_s,
            bus_grace_s=config.bus_grace_s,
            storm_fraction=config.storm_fraction,
            storm_hold_s=config.storm_hold_s,
        )

    # ---- asking -------------------------------------------------------------------

    def snapshot(self) -> ClusterView:
        """The nodes as of now."""
        return ClusterView(MappingProxyType(dict(self._views)), self.revision)

    def is_down(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* is known to be over."""
        return self._down.get(node, -1) >= incarnation

    def has_left(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* was heard to say good-bye."""
        return self._left.get(node) == incarnation

    def is_sealed(self, node: str, incarnation: int) -> bool:
        """Whether it is written down that this life of *node* is over."""
        return self._sealed.get(node, -1) >= incarnation

    def opinions(self) -> list[tuple[str, int]]:
        """The lives that are over by our own verdict alone."""
        return list(self._opinions.items())

    def others_alive(self) -> set[str]:
        """The other nodes that are not down."""
        return {view.name for view in self._views.values() if view.is_alive} - {self._own}

    def deadline(self) -> float | None:
        """When `step` must be called next, if nothing is learned before."""
        return self._detector.deadline()

    def storm(self) -> tuple[tuple[str, ...], float] | None:
        """The nodes whose verdict a storm holds back, and until when; None: no storm."""
        until = self._detector.statistics().storm_until
        return None if until is None else (self._detector.held(), until)

    def groups(self, now: float) -> tuple[Group, ...]:
        """The living nodes, by who hears whom; for a member."""
        heard = self.hearing.names(now)
        alive = {view.name for view in self._views.values() if view.is_alive and view.heard}
        said = {name: self.hearing.report(name) for name in alive}
        fresh = {name: hears for name, hears in said.items() if hears is not None and name in heard}
        stale = {name: hears for name, hears in said.items() if hears is not None}
        fresh[self._own] = heard
        return groups_of(alive, fresh, stale)

    # ---- learning -----------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Outcome]:
        """Pass *event* to the detector; what has come of it is shown already."""
        return [
            self._turn(effect) if isinstance(effect, VerdictChanged) else effect
            for effect in self._detector.step(event, now)
        ]

    def see_self(self, view: NodeView) -> None:
        """Show this node."""
        self._views[self._own] = view

    def hear(self, beat: Heartbeat, now: float) -> Learned:
        """A heartbeat of another node came, that is not a farewell."""
        name = beat.node
        if self.is_down(name, beat.incarnation):
            return Learned([], is_news=False)
        before = self._heard.get(name)
        is_first = before is None or before.incarnation != beat.incarnation
        self._heard[name] = beat
        if self.hearing.heard(name, beat.incarnation, beat.hears, now):
            self.revision += 1  # nobody acts on it: the listeners needn't know
        outcomes = self.step(Heard(name, beat.incarnation), now)
        self._show(name)
        is_news = is_first or (before is not None and before.draining != beat.draining)
        return Learned(outcomes, is_news)

    def hear_farewell(self, node: str, incarnation: int, now: float) -> list[Outcome]:
        """The node has said that it leaves."""
        self._opinions.pop(node, None)
        self.end(node, incarnation)
        self._left[node] = incarnation
        outcomes = self.step(Left(node, incarnation), now)
        self._heard.pop(node, None)
        self.hearing.forget(node)
        self._show(node)
        return outcomes

    def hear_pong(self, node: str, incarnation: int, now: float) -> list[Outcome] | None:
        """A node that was only read about has answered; None: with a life that is over."""
        if self.is_down(node, incarnation):
            return None
        self._heard.setdefault(node, None)
        outcomes = self.step(Heard(node, incarnation), now)
        self._show(node)
        return outcomes

    def hear_of(self, node: str, incarnation: int, now: float) -> list[Outcome]:
        """A sign of life has come by way of somebody else."""
        if self.is_down(node, incarnation):
            return []
        return self.step(Heard(node, incarnation), now)

    def read(self, record: NodeRecord, now: float) -> Learned:
        """The record of another node was written."""
        name, incarnation = record.name, record.incarnation
        outcomes: list[Outcome] = []
        if record.ended:
            self.seal(name, incarnation)
            if not self.is_down(name, incarnation):
                self.end(name, incarnation)
                outcomes += self.step(Left(name, incarnation), now)
                self._heard.pop(name, None)
        before = self._records.get(name)
        self._records[name] = record
        is_new = before is None or before.incarnation != incarnation
        must_greet = False
        if is_new and not self.is_down(name, incarnation):
            outcomes += self.step(Heard(name, incarnation), now)
            beat = self._heard.get(name)
            if beat is None or beat.incarnation != incarnation:
                self._heard.pop(name, None)
                must_greet = True
        self._show(name)
        return Learned(outcomes, before != record, must_greet)

    def lose(self, name: str, now: float) -> Learned:
        """The record of a node is gone.

        A TTL that ran out during a stall says nothing about a node that is heard (F2).
        """
        self._records.pop(name, None)
        if name == self._own or self._detector.verdict(name) not in (None, Verdict.DOWN):
            return Learned([], is_news=False)
        outcomes = self.step(Forgot(name), now)
        self._heard.pop(name, None)
        self.hearing.forget(name)
        self._views.pop(name, None)
        return Learned(outcomes, is_news=True)

    def stood_still(self, seconds: float, now: float) -> list[Outcome]:
        """This process did: what others said meanwhile is still unread. It is not silence."""
        self.hearing.excuse(seconds)
        outcomes: list[Outcome] = []
        for name, (incarnation, verdict) in self._detector.snapshot().items():
            if verdict is Verdict.UP:
                outcomes += self.step(Heard(name, incarnation), now)
        return outcomes

    # ---- lives --------------------------------------------------------------------

    def end(self, node: str, incarnation: int) -> None:
        """This life of *node*, and those before it, are over."""
        self._down[node] = max(self._down.get(node, -1), incarnation)
        if len(self._down) > _LIVES_MAX:
            oldest = next(iter(self._down))
            del self._down[oldest]
            self._left.pop(oldest, None)

    def seal(self, node: str, incarnation: int) -> None:
        """It is written down that this life is over: no opinion any more."""
        self._sealed[node] = max(incarnation, self._sealed.get(node, -1))
        self._opinions.pop(node, None)

    def take_back(self, node: str, incarnation: int, now: float) -> list[Outcome] | None:
        """Judge this life anew, if nothing but our own verdict says that it is over; else None."""
        if self._opinions.get(node) != incarnation:
            return None
        del self._opinions[node]
        if self._detector.incarnation(node) not in (None, incarnation):
            return None  # it lives anew: that this life is over is a fact by now
        self._down[node] = incarnation - 1
        outcomes = self.step(Forgot(node), now)
        self._heard.pop(node, None)
        if node in self._records:
            outcomes += self.step(Heard(node, incarnation), now)  # suspect until really heard
            self._show(node)
        else:
            self._views.pop(node, None)
        return outcomes

    def judge_anew(self, incarnation: int, now: float) -> list[Outcome]:
        """Judge everybody anew: what we thought of the others while they had given us up is void.

        What is over for certain is sealed in its record. *incarnation* is our new life.
        """
        self._detector = self._new_detector()
        self._opinions.clear()
        self._down = {self._own: incarnation - 1, **self._sealed}
        outcomes: list[Outcome] = []
        for name, record in list(self._records.items()):
            if not self.is_down(name, record.incarnation):
                outcomes += self.step(Heard(name, record.incarnation), now)
            self._show(name)
        return outcomes

    def _turn(self, change: VerdictChanged) -> Turned:
        node, incarnation = change.node, change.incarnation
        shown = self._views.get(node)
        if change.new is Verdict.DOWN:
            if change.cause != "left" and not self.is_down(node, incarnation):
                self._opinions[node] = incarnation
            self.end(node, incarnation)
        elif change.old is None:
            self.end(node, incarnation - 1)
        self._show(node)
        view = self._views.get(node, shown if change.new is Verdict.DOWN else None)
        return Turned(
            change,
            record=None if view is None else view.record,
            was_down=shown is not None and shown.status is NodeStatus.DOWN,
        )

    def _show(self, name: str) -> None:
        """Rebuild the view of one node."""
        known, beat = self._records.get(name), self._heard.get(name)
        if known is None:
            shown = self._views.get(name)
            known = shown.record if shown is not None else None
        if known is None or name == self._own:
            return
        is_heard = name in self._heard
        newest = self._detector.incarnation(name)
        if newest is not None and newest > known.incarnation and not self.is_down(name, newest):
            status = NodeStatus.SUSPECT  # it lives anew, and the record that says so is on its way
        elif self.is_down(name, known.incarnation):
            if name not in self._records:
                self._views.pop(name, None)  # it left, or its record has expired
                return
            status, is_heard = NodeStatus.DOWN, False
        elif not is_heard or self._detector.verdict(name) is not Verdict.UP:
            status = NodeStatus.SUSPECT
        else:
            status = NodeStatus.DRAINING if beat is not None and beat.draining else NodeStatus.UP
        load = beat.load if beat is not None else IDLE
        said = self.hearing.report(name)
        self._views[name] = NodeView(known, status, load, is_heard, hears=said)
