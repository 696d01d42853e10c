"""Which nodes there are and which of them live; for a member, also being one of them.

Reads and writes the bucket ``nodes``; publishes and hears
``fnd.C.heartbeat.node.*``; serves ``fnd.C.control.node.<self>.ping`` and
``.probe``; on the leader echoes heartbeats on ``fnd.C.echo.node.<node>``.

This is the shell around `Roster`, which knows the nodes and whose `LivenessDetector`
decides; the parts beside it each do one thing for it: `OwnRecord` writes, `Beats` and
`Prober` speak, `Senses` judges ourselves, `Announcer` tells. A record in the
bucket says what a node is, never that it lives: its TTL is garbage collection
(F2), and a node that was only read about counts as suspect until it was heard.
The leader probes every node, because its verdict moves agents; everybody else
probes only the leader's node, once the leader's own probes stay away, so that its
death is noticed by all at once.

A verdict of *down* is final for everybody once it is sealed in the node's
record, and for the leader who gave it. Anybody else's is an opinion: nobody told
the node, and the leader, who hears it, goes on confirming its right to answer.
So it is void when the node is heard after all, when we may have missed hearing
it, and when we begin to lead (but for the leader we take over from).

Two modes: a *member* (`join`) has a record, sends heartbeats and asks others
for a second opinion; an *observer* (`observe`: clients, the CLI) only watches
and judges by silence.

Not guaranteed: that two processes have the same view. What is decided on a
view is protected by compare-and-set, not by its being right.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Any

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import decode, serve
from foundation_nats.bus.subjects import STREAM_LEADER_ELECTED, Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.cluster.announcing import Announcer
from foundation_nats.cluster.beats import EARLY_BEAT, Beats
from foundation_nats.cluster.events import Events
from foundation_nats.cluster.judging import Judge
from foundation_nats.cluster.liveness import BusDisturbed, Deaf, ForceFailover, OwnLag, Tick
from foundation_nats.cluster.probing import Prober, answer_ping, give_opinion
from foundation_nats.cluster.records import (
    LEADERLESS_S,
    RECORD_EVERY_S,
    SILENT_S,
    OwnRecord,
    write_end,
)
from foundation_nats.cluster.roster import IDLE, Roster
from foundation_nats.cluster.senses import Senses
from foundation_nats.cluster.ticker import Ticker
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.config import LivenessConfig
from foundation_nats.errors import BusError, BusUnavailableError, DecodeError, FoundationError
from foundation_schemas import Heartbeat, Load, NodeRecord, NodeStatus, ProbeReply, ProbeRequest

_TICK_S = 0.25
"""We look at the clock at least this often. How long we stood still is known but for this much,
which is little beside `suspect_after_s`."""
_TICK_MIN_S = 0.005
_LATE_PROBE = 1.25
"""Of the interval: after the leader's next probe, which is as good as an answer to ours."""
_SLOW_WRITE_S = 1.0
_SETTLE_S = 0.3


class Membership:
    """The nodes as one process knows them."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        config: LivenessConfig,
        *,
        record: NodeRecord | None = None,
        load: Callable[[], Load] | None = None,
        on_replaced: Callable[[], None] | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            record: what this node is; its incarnation is chosen by `join`. None: an observer.
            load: asked for each heartbeat.
            on_replaced: called once if another process took this node's name; the node must stop.
            on_ended: called if this life was declared over; the node must `rejoin`.
        """
        self._bus = bus
        self._subjects = subjects
        self._config = config
        self._load = load
        self._on_replaced = on_replaced
        self._on_ended = on_ended
        self._bucket = Bucket(bus, subjects, "nodes")
        self._log = get_logger("membership").bind(
            node="observer" if record is None else record.name
        )
        self._own: OwnRecord | None = None
        if record is not None:
            self._own = OwnRecord(
                bus,
                subjects,
                self._bucket,
                record,
                log=self._log,
                on_written=self._written,
                on_replaced=self._replaced,
                on_ended=self._ended,
            )
        name = self.node
        self._roster = Roster(name, config)
        self._revisions: dict[str, int] = {}
        """Node to the revision of its record that was read last."""
        self._events = Events(bus, subjects, name or bus.name)
        self._announcer = Announcer(self._events, self._log, own=name, observer=name or bus.name)
        self._judge = Judge(
            bus, subjects, config, self._roster, self._announcer, own=name, log=self._log
        )
        self._senses = Senses(beat_every_s=config.heartbeat_interval_s, now=monotonic())
        self._beats = Beats(bus, subjects, every_s=config.heartbeat_interval_s, log=self._log)
        self._prober = Prober(
            bus, subjects, name, probed=self._judge.step, greeted=self._on_greeted
        )
        self._ticker = Ticker(self._do_due)
        self._routes: list[Route] = []
        self._probed_at = 0.0
        self._watched_at = 0.0
        self._pinged_at: float | None = None
        """When the holder of the lease last probed us: it lives, and we needn't probe it."""
        self._draining = False
        self._is_member = False
        self._is_over = False
        self._may_echo: Callable[[], bool] = lambda: True
        self.disturbed_at: float | None = None
        """When the bus was last known to be unwell, on `monotonic`; None: never."""
        self.lagged_at: float | None = None
        """When this process last learned that others may have given it up: it stood still for
        longer than `suspect_after_s`, its connection changed, or it didn't hear itself."""

    # ---- reading ----------------------------------------------------------------

    @property
    def record(self) -> NodeRecord | None:
        """This node's record; None for an observer."""
        return None if self._own is None else self._own.now

    @property
    def node(self) -> str:
        """This node's name; empty for an observer."""
        return "" if self._own is None else self._own.now.name

    @property
    def incarnation(self) -> int:
        """This node's present life; 0 before `join` and for an observer."""
        return 0 if self._own is None else self._own.now.incarnation

    def nodes(self) -> Mapping[str, NodeView]:
        """Every known node by name, this one included; live: it changes across awaits."""
        return self._roster.views

    def view(self) -> ClusterView:
        """The nodes as of now."""
        return self._roster.snapshot()

    def is_down(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* is known to be over: declared down, left, or replaced."""
        return self._roster.is_down(node, incarnation)

    def has_left(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* was heard to say good-bye."""
        return self._roster.has_left(node, incarnation)

    def hears(self) -> frozenset[str]:
        """The other nodes whose heartbeats have come within `suspect_after_s`."""
        return self._roster.hearing.names(monotonic())

    def hears_itself(self, for_s: float) -> bool:
        """Whether what this node sends has come back to it for so long: it may judge silence."""
        return self._senses.hears_itself(for_s, monotonic())

    def held_back(self) -> tuple[tuple[str, ...], float] | None:
        """The nodes whose verdict a storm holds back, and for how many seconds; None: no storm."""
        storm = self._roster.storm()
        return None if storm is None else (storm[0], max(0.0, storm[1] - monotonic()))

    @property
    def is_in_storm(self) -> bool:
        """Whether verdicts are being held because too many nodes seem dead at once."""
        return self._judge.is_in_storm

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call *callback* after every change of a node's status or record (not of its load)."""
        self._judge.subscribe(callback)

    # ---- life -------------------------------------------------------------------

    async def join(self, scope: TaskScope, *, timeout: float = 10.0) -> NodeRecord:
        """Become a member; returns the record with the incarnation that was chosen.

        Raises:
            NodeNameTakenError: a node of this name lives.
            BusTimeoutError, BusUnavailableError: the ``nodes`` bucket could not be used.
        """
        if self._own is None:
            raise ValueError("an observer has no record to join with")
        async with asyncio.timeout(timeout + LEADERLESS_S + SILENT_S):
            await self._own.begin()
        self._is_member = True
        self._see_self()
        ping = self._subjects.control_node(self.node, "ping")
        self._routes.append(self._bus.subscribe(ping, self._on_ping))
        probe = self._subjects.control_node(self.node, "probe")
        self._routes.append(serve(self._bus, scope, probe, self._on_probe))
        await self._open(scope, timeout)
        self._announcer.own("joined", f"Node {self.node} joined.", self._own.now)
        self._log.info("joined", incarnation=self.incarnation)
        return self._own.now

    async def observe(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Watch without being a member.

        Raises:
            BusTimeoutError, BusUnavailableError: the ``nodes`` bucket could not be read.
        """
        await self._open(scope, timeout)

    async def rejoin(self) -> NodeRecord:
        """Begin a new life under the same name: for a node that was declared down and isn't.

        The caller has stopped every activation of the old life.

        Raises:
            NodeNameTakenError: another process has the name by now.
            BusTimeoutError, BusUnavailableError: not (surely) written; call again.
        """
        assert self._own is not None
        if not self.is_down(self.node, self.incarnation):
            # From here on, however long the write takes, we neither lead nor confirm ourselves.
            self._roster.end(self.node, self.incarnation)
            self._judge.notify()
        await self._own.begin_again()
        self._judge.judge_anew(self.incarnation)
        self._send_heartbeat()
        self._log.info("joined again", incarnation=self.incarnation)
        return self._own.now

    async def seal(self, node: str, incarnation: int, *, was_short: bool = False) -> None:
        """Write down that this life is over, before its agents are given to others.

        Later leaders, and the node itself should it live, learn of it: none may confirm the
        old activations' right to answer again.

        Our own record is written first. Where the brokers have parted, and this node with them,
        nothing can be stored, but what was tried may be once they are together again: the end of
        somebody who was only as cut off as we are.

        Args:
            was_short: this life ended soon after it had begun.

        Raises:
            BusTimeoutError, BusUnavailableError: not known to be written, or nothing can be
                stored now, or the verdict was taken back meanwhile; don't go on.
        """
        if not self._roster.is_sealed(node, incarnation):
            await self.update()
            if not self.is_down(node, incarnation):
                raise BusUnavailableError(f"Node {node!r} has been heard again.")
        while not self._roster.is_sealed(node, incarnation):
            if await write_end(self._bucket, node, incarnation, was_short=was_short):
                break
        self._roster.seal(node, incarnation)

    async def update(self, **changes: Any) -> NodeRecord:
        """Rewrite fields of this node's record, such as ``workers=[…]``.

        Raises:
            BusTimeoutError, BusUnavailableError: not (surely) written; it is at the next refresh.
        """
        assert self._own is not None
        self._own.change(**changes)
        self._see_self()
        await self._own.store()
        return self._own.now

    def set_draining(self, draining: bool = True) -> None:
        """Say in every heartbeat from now on whether this node takes new agents."""
        if draining and not self._draining and self._own is not None:
            self._announcer.own(
                "draining", f"Node {self.node} hands over its agents.", self._own.now
            )
        self._draining = draining
        self._see_self()
        self._send_heartbeat()
        self._judge.notify()

    def beat_now(self) -> None:
        """Send a heartbeat out of turn: whoever waits for its echo gets it at once."""
        self._send_heartbeat()

    async def leave(self, *, timeout: float = 2.0) -> None:
        """Say good-bye and delete the record; what fails is left to time-outs. Idempotent."""
        if self._is_member and not self._is_over and self._own is not None:
            self._is_over = True
            self._send_heartbeat(left=True)
            self._announcer.own("left", f"Node {self.node} left.", self._own.now, cause="left")
            try:
                async with asyncio.timeout(timeout):
                    await self._own.delete()
                    await self._bus.flush(timeout)
            except (FoundationError, TimeoutError) as error:
                self._log.info("left without deleting the record", error=str(error))
        self.close()

    def close(self) -> None:
        """Stop hearing and answering; tasks end with their scope. Idempotent."""
        self._is_over = True
        for route in self._routes:
            self._bus.unsubscribe(route)
        self._routes.clear()

    async def _open(self, scope: TaskScope, timeout: float) -> None:
        self._judge.begin(scope, is_member=self._is_member)
        self._senses.heard_itself(monotonic())
        bus, subjects = self._bus, self._subjects
        self._routes.append(bus.subscribe(subjects.heartbeats(), self._on_heartbeat))
        self._routes.append(bus.subscribe(STREAM_LEADER_ELECTED, self._on_advisory))
        bus.on_disconnect(self._on_bus_change)
        bus.on_reconnect(self._on_bus_change)
        watch = self._bucket.watch(scope, self._on_entry)
        # The record is out: others expect to hear us, however long the bucket takes to read.
        self._send_heartbeat()
        scope.start(self._run(), "beat")
        await watch.wait_ready(timeout)
        if self._is_member:
            scope.start(self._keep_record(), "record")
        else:
            await self._settle()

    async def _settle(self) -> None:
        """Give the nodes that were read about a moment to answer their first ping."""
        until = monotonic() + _SETTLE_S
        while self._prober.is_waiting and monotonic() < until:
            await asyncio.sleep(0.005)

    # ---- own record ---------------------------------------------------------------

    def _written(self) -> None:
        self._roster.end(self.node, self.incarnation - 1)
        self._see_self()
        self._judge.notify()

    async def _keep_record(self) -> None:
        assert self._own is not None
        while not self._is_over:
            await asyncio.sleep(RECORD_EVERY_S * random.uniform(0.9, 1.0))
            if self._is_over or not self._bus.is_connected:
                continue
            began = monotonic()
            try:
                await self._own.store()
            except BusError as error:
                self._log.warning("node record not refreshed", error=str(error))
            if monotonic() - began > _SLOW_WRITE_S:
                self.note_write_stall()

    def _ended(self, incarnation: int) -> None:
        """Somebody has written down that our life *incarnation* is over."""
        if incarnation == self.incarnation and not self._is_over and self._on_ended is not None:
            self._on_ended()

    def _replaced(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._log.error("another process has taken this node's name; this node must stop")
        if self._on_replaced is not None:
            self._on_replaced()

    def _see_self(self) -> None:
        if not self._is_member or self._own is None:
            return
        load = IDLE if self._load is None else self._load()
        status = NodeStatus.DRAINING if self._draining else NodeStatus.UP
        self._roster.see_self(NodeView(self._own.now, status, load, hears=self.hears()))

    # ---- hearing and answering ------------------------------------------------------

    def _on_ping(self, message: Message) -> None:
        is_holder = self._judge.holder is not None and message.data == self._judge.holder.encode()
        if is_holder:
            self._pinged_at = monotonic()
        answer_ping(self._bus, message, self.node, self.incarnation, self._log)
        if is_holder:
            self._ticker.tick()

    async def _on_probe(self, data: bytes) -> ProbeReply:
        return await give_opinion(
            self._bus,
            self._subjects,
            decode(ProbeRequest, data),
            patience_s=self._config.confirm_timeout_s,
        )

    def _on_heartbeat(self, message: Message) -> None:
        try:
            beat = decode(Heartbeat, message.data)
        except DecodeError as error:
            self._log.warning("heartbeat not understood", error=str(error))
            return
        if self._is_over:
            return
        name = beat.node
        now = monotonic()
        # First: what a cut had held back may be read before the next tick.
        self._note_deafness(now)
        if name == self.node:
            if beat.incarnation == self.incarnation:
                self._senses.heard_itself(now)
                self._see_self()
            self._echo(beat)
            return
        if beat.left:
            self._judge.act(self._roster.hear_farewell(name, beat.incarnation, now))
            self._judge.notify()
            return
        if self._judge.term is None:
            self._judge.take_back(name, beat.incarnation)
        self._judge.learn(self._roster.hear(beat, now))
        self._echo(beat)
        if (
            self._judge.term is None
            and name == self._judge.holder
            and self._beats.may_come_early(now)
        ):
            self._send_heartbeat()

    def _echo(self, beat: Heartbeat) -> None:
        if self._judge.term is not None and self._may_echo():
            self._beats.echo(
                beat,
                is_over=self.is_down(beat.node, beat.incarnation),
                leader=self.node,
                term=self._judge.term,
            )

    def _on_greeted(self, name: str, incarnation: int) -> None:
        if self._is_over:
            return
        outcomes = self._roster.hear_pong(name, incarnation, monotonic())
        if outcomes is not None:
            self._judge.act(outcomes)
            self._judge.notify()

    def _on_entry(self, entry: Entry) -> None:
        name = entry.key
        if entry.revision <= self._revisions.get(name, 0):
            return
        self._revisions[name] = entry.revision
        if entry.value is None:
            learned = self._roster.lose(name, monotonic())
        else:
            try:
                record = decode(NodeRecord, entry.value)
            except DecodeError as error:
                self._log.error("node record not understood", name=name, error=str(error))
                return
            if name == self.node and self._is_member and self._own is not None:
                if not self._own.has_been(record.incarnation):
                    self._replaced()
                elif record.ended:
                    self._ended(record.incarnation)
                return
            learned = self._roster.read(record, monotonic())
            if learned.must_greet:
                self._prober.greet(record)
        self._judge.learn(learned)

    def _on_advisory(self, message: Message) -> None:
        stream = message.subject.rpartition(".")[2]
        if stream.removeprefix("KV_").startswith(f"fnd_{self._subjects.cluster}_"):
            self._disturb()

    def _on_bus_change(self) -> None:
        if not self._is_over:
            self._note_gap(monotonic())
            self._disturb()
            self._send_heartbeat()

    def _disturb(self) -> None:
        self.disturbed_at = monotonic()
        self._judge.step(BusDisturbed())

    def note_write_stall(self) -> None:
        """Say that a write took more than a second: silence proves little for a while."""
        self._disturb()

    # ---- verdicts -------------------------------------------------------------------

    def force_failover(self) -> None:
        """Let the verdicts that a storm holds back take effect: a person says it is real."""
        self._judge.step(ForceFailover())

    # ---- leading --------------------------------------------------------------------

    def set_leading(self, term: int | None, may_echo: Callable[[], bool] = lambda: True) -> None:
        """Begin (or with None, end) the leader's duties: echoes while *may_echo*, and probes of all."""
        self._may_echo = may_echo
        self._judge.lead(term)
        if term is not None:
            self._send_heartbeat()

    def watch_holder(self, node: str | None, wrote: int | None = None) -> None:
        """Probe *node* while this node doesn't lead: it holds the lease.

        *wrote* is its incarnation if it has just written the lease. That is a sign of life like
        a heartbeat: who renews leads, and confirms rights to answer, whether *we* hear it or not.
        """
        self._judge.follow(node, wrote)

    def emit(self, topic: str, what: str, message: str, **data: Any) -> None:
        """Publish a cluster event in this node's name; never raises and never waits."""
        self._events.emit(topic, what, message, **data)

    # ---- time -----------------------------------------------------------------------

    def _send_heartbeat(self, *, left: bool = False) -> None:
        if not self._is_member or self._own is None or (self._is_over and not left):
            return
        now = monotonic()
        self._beats.send(
            self._own.now,
            load=IDLE if self._load is None else self._load(),
            hears=self._roster.hearing.to_say(now, self._roster.others_alive()),
            now=now,
            is_led=self._judge.term is None and self._judge.holder not in (None, self.node),
            draining=self._draining,
            left=left,
        )

    def _probe_due(self) -> float:
        """When to probe next; a node that the leader probes needn't probe the leader."""
        due = self._probed_at + self._config.probe_interval_s
        if self._judge.term is None and self._pinged_at is not None:
            return max(due, self._pinged_at + self._config.probe_interval_s * _LATE_PROBE)
        return due

    async def _run(self) -> None:
        """Do what is due until this life is over."""
        now = monotonic()
        self._beats.next_at = now
        self._probed_at = now - self._config.probe_interval_s
        await self._ticker.run(now)

    def _do_due(self, now: float, lag: float) -> float | None:
        if self._is_over:
            return None
        self._note_lag(lag, now)
        self._note_deafness(now)
        if now >= self._beats.next_at:
            self._send_heartbeat()
            self._beats.was_due(now)
        if now - self._watched_at >= self._config.heartbeat_interval_s * EARLY_BEAT:
            hears_itself = self._senses.hears_itself(self._config.suspect_after_s, now)
            self._judge.watch_partitions(now, hears_itself=hears_itself)
            self._watched_at = now
        if self._is_member and now >= self._probe_due():
            for record in self._judge.to_probe():
                if not self._prober.is_asking(record.name):
                    self._prober.probe(record)
            self._probed_at = now
        due = self._roster.deadline()
        if due is not None and now >= due:
            self._judge.step(Tick())
            due = self._roster.deadline()
        wake = min(now + _TICK_S, self._beats.next_at, now + _TICK_S if due is None else due)
        if self._is_member:
            wake = min(wake, self._probe_due())
        return max(wake - now, _TICK_MIN_S)

    # ---- ourselves ------------------------------------------------------------------

    def _note_gap(self, now: float) -> None:
        """For a while we may have heard nobody, and others not us."""
        self.lagged_at = now
        self._judge.take_back_all()

    def _note_deafness(self, now: float) -> None:
        """While our own heartbeats don't come back, nobody's silence counts."""
        if not self._is_member:
            return
        is_deaf = self._senses.is_deaf(now)
        if is_deaf:
            self._note_gap(now)
            self._judge.step(Deaf())
        if self._senses.has_turned(is_deaf):
            if is_deaf:
                self._log.warning("own heartbeats are not heard: nobody's silence counts")
            else:
                self._log.info("own heartbeats are heard again")

    def _note_lag(self, lag: float, now: float) -> None:
        if lag >= self._config.suspect_after_s:
            self._note_gap(now)
            self._log.warning("this process stood still", seconds=round(lag, 1))
            self._judge.act(self._roster.stood_still(lag, now))
        own_lag = self._senses.lag(lag, now)
        if own_lag is not None:
            self._judge.step(OwnLag(own_lag))
