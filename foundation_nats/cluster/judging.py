"""Acts on what is learned of the nodes: who is told, who is asked, what a new leader takes back.

The shell around `Roster`. Everything that `membership.py` learns passes by `learn`,
`act` or `step`; what comes of it is told by `Announcer`, doubted by a second opinion
where the detector asks for one, and made known to the listeners.

Who leads matters here: a leader's verdict moves agents and is final for it. Anybody
else's is an opinion, void when we begin to lead. But that the leader we take over from
is down is what made us lead: it stays, and is told then, for nobody else has told it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import Logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.announcing import Announcer
from foundation_nats.cluster.liveness import (
    Confirm,
    Confirmed,
    Event,
    StormBegan,
    StormEnded,
    Verdict,
)
from foundation_nats.cluster.probing import second_opinion
from foundation_nats.cluster.roster import Learned, Outcome, Roster, Turned
from foundation_nats.cluster.topology import PartitionWatch
from foundation_nats.config import LivenessConfig
from foundation_schemas import NodeRecord, NodeStatus


class Judge:
    """What one process makes of what it knows of the nodes.

    Args:
        own: this process's node; empty for an observer.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        config: LivenessConfig,
        roster: Roster,
        announcer: Announcer,
        *,
        own: str,
        log: Logger,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._config = config
        self._roster = roster
        self._announcer = announcer
        self._own = own
        self._log = log
        self._partitions = PartitionWatch(config.suspect_after_s)
        self._listeners: list[Callable[[], None]] = []
        self._asking: TaskScope | None = None
        self._can_ask = False
        self._died_leading: tuple[str, int, str] | None = None
        self.term: int | None = None
        """The term in which this node leads; None: it doesn't."""
        self.holder: str | None = None
        """The node that holds the lease, as far as it is known."""
        self.is_in_storm = False
        """Whether verdicts are being held because too many nodes seem dead at once."""

    def begin(self, scope: TaskScope, *, is_member: bool) -> None:
        """Ask for second opinions from now on, in tasks of *scope*; only a member may."""
        self._asking, self._can_ask = scope, is_member

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call *callback* at every `notify`."""
        self._listeners.append(callback)

    # ---- acting -----------------------------------------------------------------------

    def step(self, event: Event) -> None:
        """Something happened that the detector should know."""
        self.act(self._roster.step(event, monotonic()))

    def learn(self, learned: Learned) -> None:
        """Something was learned of a node."""
        self.act(learned.outcomes)
        if learned.is_news:
            self.notify()

    def act(self, outcomes: list[Outcome]) -> None:
        """Do what has come of something that was learned."""
        if not outcomes:
            return
        for outcome in outcomes:
            match outcome:
                case Turned(change):
                    is_lost = change.new is Verdict.DOWN and change.cause != "left"
                    if is_lost and self.term is None and change.node == self.holder:
                        self._died_leading = (change.node, change.incarnation, change.cause)
                    self._announcer.turned(outcome)
                case Confirm(node, incarnation):
                    if self._asking is not None:
                        self._asking.start(self._confirm(node, incarnation), "confirm")
                case StormBegan():
                    self.is_in_storm = True
                    self._announcer.storm_began(outcome)
                case StormEnded():
                    self.is_in_storm = False
                    self._announcer.storm_ended()
        self.notify()

    def notify(self) -> None:
        """The status or the record of a node has changed."""
        self._roster.revision += 1
        self._announcer.connections(self._roster.views)
        for listener in self._listeners:
            listener()

    async def _confirm(self, node: str, incarnation: int) -> None:
        reachable: bool | None = None
        others = [
            view.name
            for view in self._roster.views.values()
            if view.status is NodeStatus.UP and view.name not in (node, self._own)
        ]
        if others and self._can_ask:
            reachable = await second_opinion(
                self._bus,
                self._subjects,
                random.choice(others),
                node=node,
                incarnation=incarnation,
                patience_s=self._config.confirm_timeout_s,
                log=self._log,
            )
        self.step(Confirmed(node, incarnation, reachable))

    # ---- taking back ------------------------------------------------------------------

    def take_back(self, node: str, incarnation: int) -> None:
        """Judge this life anew, if nothing but our own verdict says that it is over."""
        outcomes = self._roster.take_back(node, incarnation, monotonic())
        if outcomes is None:
            return
        self._log.info("verdict taken back", peer=node, incarnation=incarnation)
        if self._died_leading is not None and self._died_leading[0] == node:
            self._died_leading = None
        self.act(outcomes)
        self.notify()

    def take_back_all(self, *, but: str | None = None) -> None:
        """Judge all anew that are over by our own verdict alone."""
        for node, incarnation in self._roster.opinions():
            if node != but:
                self.take_back(node, incarnation)

    def judge_anew(self, incarnation: int) -> None:
        """The others had given us up: all verdicts are void, and *incarnation* is our new life."""
        self._died_leading = None
        self.act(self._roster.judge_anew(incarnation, monotonic()))
        self.notify()

    # ---- leading ----------------------------------------------------------------------

    def lead(self, term: int | None) -> None:
        """We begin to lead in *term*; None: we don't lead (any more)."""
        self.term = term
        self._announcer.leads = term is not None
        died, self._died_leading = self._died_leading, None
        if term is None:
            return
        if died is not None:
            view = self._roster.views.get(died[0])
            self._announcer.down(*died, None if view is None else view.record)
        self.take_back_all(but=None if died is None else died[0])

    def follow(self, node: str | None, wrote: int | None) -> None:
        """*node* holds the lease; *wrote*: its life, if it has just written it."""
        self.holder = node
        if node is not None and wrote is not None and self.term is None and node != self._own:
            self._died_leading = None
            self.take_back(node, wrote)
            self.act(self._roster.hear_of(node, wrote, monotonic()))

    def to_probe(self) -> list[NodeRecord]:
        """Whom to probe: the leader everybody, and everybody else the leader."""
        views = self._roster.views
        if self.term is not None:
            names = [name for name in views if name != self._own]
        elif self.holder is not None and self.holder != self._own:
            names = [self.holder]
        else:
            names = []
        return [views[name].record for name in names if name in views and views[name].is_alive]

    def watch_partitions(self, now: float, *, hears_itself: bool) -> None:
        """The leader tells of groups of nodes that don't hear each other."""
        if self.term is None:
            self._partitions.reset()
        elif not hears_itself:
            self._partitions.pause()  # it is we who don't hear
        else:
            groups = self._roster.groups(now)
            change = self._partitions.step(groups, self._roster.views.keys(), now)
            if change is not None:
                self._announcer.partition(change)
