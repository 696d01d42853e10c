"""Which nodes there are and which of them live; for a member, also being one of them.

Reads and writes the bucket ``nodes``; publishes and hears
``fnd.C.heartbeat.node.*``; serves ``fnd.C.control.node.<self>.ping`` and
``.probe``; on the leader echoes heartbeats on ``fnd.C.echo.node.<node>``.

The decisions are `LivenessDetector`'s; this is its shell. A record in the
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
from types import MappingProxyType
from typing import Any

import orjson

from foundation_nats.base import telemetry
from foundation_nats.base.clock import monotonic, utc_text, wall_ms
from foundation_nats.base.logs import get_logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.base.telemetry import NODE_CONNECTED, NODE_DISCONNECTED
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket, Entry
from foundation_nats.bus.rpc import REPLY_PREFIX, call, decode, encode, read_reply, serve
from foundation_nats.bus.subjects import STREAM_LEADER_ELECTED, Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.cluster.events import Events, about_node
from foundation_nats.cluster.hearing import Hearing
from foundation_nats.cluster.liveness import (
    BusDisturbed,
    Confirm,
    Confirmed,
    Deaf,
    Effect,
    Event,
    ForceFailover,
    Forgot,
    Heard,
    Left,
    LivenessDetector,
    OwnLag,
    ProbeAnswered,
    ProbeMissed,
    StormBegan,
    StormEnded,
    Tick,
    Verdict,
    VerdictChanged,
)
from foundation_nats.cluster.topology import Healed, Parted, PartitionWatch, groups_of
from foundation_nats.cluster.view import ClusterView, NodeView
from foundation_nats.config import LivenessConfig
from foundation_nats.errors import (
    BusError,
    BusTimeoutError,
    BusUnavailableError,
    DecodeError,
    FoundationError,
    NodeNameTakenError,
    NoRespondersError,
    StaleRevisionError,
)
from foundation_schemas import (
    Echo,
    Heartbeat,
    Load,
    NodeRecord,
    NodeStatus,
    Pong,
    ProbeReply,
    ProbeRequest,
)

RECORD_TTL_S = 60.0
RECORD_EVERY_S = 20.0
SEALED_TTL_S = 3600.0
"""How long it is written down that a life is over: longer than anything stays frozen."""
_DEAF_BEATS = 2.5
_TICK_S = 0.25
"""We look at the clock at least this often. How long we stood still is known but for this much,
which is little beside `suspect_after_s`."""
_TICK_MIN_S = 0.005
_EARLY_BEAT = 0.6
_LATE_BEAT = 1.15, 1.3
"""Of the interval: after the leader's next one, which we answer with our own."""
_LATE_PROBE = 1.25
"""Of the interval: after the leader's next probe, which is as good as an answer to ours."""
_LAG_MIN_S = 0.05
_LAG_MEMORY_S = 5.0
_JOIN_PINGS = 3
_JOIN_PAUSE_S = 0.2
_LEADERLESS_S = 6.0
"""How long a node that joins waits for the stream of `nodes` to have a leader."""
_JOIN_PING_TIMEOUT_S = 1.0
_PROBE_TIMEOUT_S = 1.0
_SETTLE_S = 0.3
_IDLE = Load()


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
        self._record = None if record is None else record.model_copy(update={"incarnation": 0})
        self._load = load
        self._on_replaced = on_replaced
        self._on_ended = on_ended
        self._bucket = Bucket(bus, subjects, "nodes")
        self._events = Events(bus, subjects, record.name if record is not None else bus.name)
        self._log = get_logger("membership").bind(node=self.node or "observer")
        self._detector = self._new_detector()
        self._records: dict[str, NodeRecord] = {}
        self._record_revisions: dict[str, int] = {}
        self._heard: dict[str, Heartbeat | None] = {}
        """The last heartbeat of each node's newest incarnation; None: it only answered a ping."""
        self._down: dict[str, int] = {}
        """Node to the highest incarnation that is over; outlives the node's record."""
        self._left: dict[str, int] = {}
        """Node to the highest incarnation that has said good-bye; no more nodes than in `_down`."""
        self._opinions: dict[str, int] = {}
        """Node to the incarnation that is over (in `_down`) by our own verdict alone."""
        self._views: dict[str, NodeView] = {}
        self._connected: dict[str, NodeView] = {}
        """The other nodes that telemetry takes to be connected."""
        self._hearing = Hearing(config.suspect_after_s)
        self._partitions = PartitionWatch(config.suspect_after_s)
        self._revision = 0
        self._listeners: list[Callable[[], None]] = []
        self._scope: TaskScope | None = None
        self._routes: list[Route] = []
        self._own_revision = 0
        self._own_incarnations: set[int] = set()
        self._beat = 0
        self._beat_at = 0.0
        self._next_beat = 0.0
        self._probed_at = 0.0
        self._watched_at = 0.0
        self._expected = 0.0
        """When we meant to look at the clock next: what it is later by, we stood still."""
        self._ticking: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pinged_at: float | None = None
        """When the holder of the lease last probed us: it lives, and we needn't probe it."""
        self._draining = False
        self._is_member = False
        self._is_over = False
        self._term: int | None = None
        self._may_echo: Callable[[], bool] = lambda: True
        self._holder: str | None = None
        self._died_leading: tuple[str, int, str] | None = None
        self._probing: set[str] = set()
        self._lag_s = 0.0
        self._lag_at = 0.0
        self._own_heard_at = monotonic()
        self._is_deaf = False
        self._deaf_at: float | None = None
        self._sealed: dict[str, int] = {}
        """Node to the highest incarnation that is written down as over."""
        self.disturbed_at: float | None = None
        """When the bus was last known to be unwell, on `monotonic`; None: never."""
        self.lagged_at: float | None = None
        """When this process last learned that others may have given it up: it stood still for
        longer than `suspect_after_s`, its connection changed, or it didn't hear itself."""
        self.is_in_storm = False
        """Whether verdicts are being held because too many nodes seem dead at once."""

    def _new_detector(self) -> LivenessDetector:
        config = self._config
        return LivenessDetector(
            suspect_after_s=config.suspect_after_s,
            down_after_s=config.down_after_s,
            bus_grace_s=config.bus_grace_s,
            storm_fraction=config.storm_fraction,
            storm_hold_s=config.storm_hold_s,
        )

    # ---- reading ----------------------------------------------------------------

    @property
    def record(self) -> NodeRecord | None:
        """This node's record; None for an observer."""
        return self._record

    @property
    def node(self) -> str:
        """This node's name; empty for an observer."""
        return "" if self._record is None else self._record.name

    @property
    def incarnation(self) -> int:
        """This node's present life; 0 before `join` and for an observer."""
        return 0 if self._record is None else self._record.incarnation

    def nodes(self) -> Mapping[str, NodeView]:
        """Every known node by name, this one included; live: it changes across awaits."""
        return MappingProxyType(self._views)

    def view(self) -> ClusterView:
        """The nodes as of now."""
        return ClusterView(MappingProxyType(dict(self._views)), self._revision)

    def is_down(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* is known to be over: declared down, left, or replaced."""
        return self._down.get(node, -1) >= incarnation

    def has_left(self, node: str, incarnation: int) -> bool:
        """Whether this life of *node* was heard to say good-bye."""
        return self._left.get(node) == incarnation

    def hears(self) -> frozenset[str]:
        """The other nodes whose heartbeats have come within `suspect_after_s`."""
        return self._hearing.names(monotonic())

    def hears_itself(self, for_s: float) -> bool:
        """Whether what this node sends has come back to it for so long: it may judge silence."""
        now = monotonic()
        if now - self._own_heard_at > self._config.heartbeat_interval_s * _DEAF_BEATS:
            return False
        return self._deaf_at is None or now - self._deaf_at > for_s

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call *callback* after every change of a node's status or record (not of its load)."""
        self._listeners.append(callback)

    # ---- life -------------------------------------------------------------------

    async def join(self, scope: TaskScope, *, timeout: float = 10.0) -> NodeRecord:
        """Become a member; returns the record with the incarnation that was chosen.

        Raises:
            NodeNameTakenError: a node of this name lives.
            BusTimeoutError, BusUnavailableError: the ``nodes`` bucket could not be used.
        """
        if self._record is None:
            raise ValueError("an observer has no record to join with")
        name = self._record.name
        until = monotonic() + _LEADERLESS_S
        async with asyncio.timeout(timeout + _LEADERLESS_S):
            attempts = 0
            while True:
                entry = await self._bucket.read(name)
                previous = 0
                if entry is not None and entry.value is not None:
                    previous = _incarnation_of(entry)
                    self._remember_short_lives(entry)
                await self._refuse_duplicate(name, has_record=previous > 0)
                try:
                    await self._write_own(
                        max(previous + 1, wall_ms()), 0 if entry is None else entry.revision
                    )
                    break
                except StaleRevisionError:
                    attempts += 1
                    if attempts == 5:
                        raise NodeNameTakenError(
                            f"Another process is joining as node {name!r} right now.",
                            hint="Give this node another name with --name.",
                            node=name,
                        ) from None
                except BusUnavailableError:
                    # Copies that were just made, or have lost a server, elect their leader first.
                    if monotonic() >= until:
                        raise
                    await asyncio.sleep(_JOIN_PAUSE_S)
        self._is_member = True
        self._see_self()
        self._serve(scope)
        await self._open(scope, timeout)
        self._events.emit(
            "node",
            "joined",
            f"Node {name} joined.",
            node=name,
            incarnation=self.incarnation,
            **about_node(self._record),
        )
        self._log.info("joined", incarnation=self.incarnation)
        return self._record

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
        assert self._record is not None
        if not self.is_down(self.node, self.incarnation):
            # From here on, however long the write takes, we neither lead nor confirm ourselves.
            self._end(self.node, self.incarnation)
            self._notify()
        incarnation = max(self._record.incarnation + 1, wall_ms())
        try:
            await self._write_own(incarnation, self._own_revision)
        except StaleRevisionError:
            entry = await self._bucket.read(self.node)
            if (
                entry is not None
                and entry.value is not None
                and _incarnation_of(entry) not in self._own_incarnations
            ):
                self._replaced()
                raise NodeNameTakenError(
                    f"Another process runs as node {self.node!r} now.",
                    hint="Stop one of them, or give this node another name.",
                    node=self.node,
                ) from None
            if entry is not None and entry.value is not None:
                self._remember_short_lives(entry)
            await self._write_own(incarnation, 0 if entry is None else entry.revision)
        self._forget_verdicts()
        self._send_heartbeat()
        self._log.info("joined again", incarnation=incarnation)
        return self._record

    def _remember_short_lives(self, entry: Entry) -> None:
        """What the record of the life before says of those before it goes on with this one."""
        assert self._record is not None
        assert entry.value is not None
        try:
            short = decode(NodeRecord, entry.value).short_lives
        except DecodeError:
            return
        self._record = self._record.model_copy(update={"short_lives": short})

    def _forget_verdicts(self) -> None:
        """Judge everybody anew: what we thought of the others while they had given us up is void.

        What is over for certain is sealed in its record.
        """
        self._detector = self._new_detector()
        self._died_leading = None
        self._opinions.clear()
        self._down = {self.node: self.incarnation - 1, **self._sealed}
        for name, record in list(self._records.items()):
            if not self.is_down(name, record.incarnation):
                self._step(Heard(name, record.incarnation))
            self._show(name)
        self._notify()

    def _take_back(self, node: str, incarnation: int) -> None:
        """Judge this life anew, if nothing but our own verdict says that it is over."""
        if self._opinions.get(node) != incarnation:
            return
        del self._opinions[node]
        if self._detector.incarnation(node) not in (None, incarnation):
            return  # it lives anew: that this life is over is a fact by now
        self._log.info("verdict taken back", peer=node, incarnation=incarnation)
        self._down[node] = incarnation - 1
        self._step(Forgot(node))
        self._heard.pop(node, None)
        if self._died_leading is not None and self._died_leading[0] == node:
            self._died_leading = None
        if node in self._records:
            self._step(Heard(node, incarnation))  # suspect until it is really heard
            self._show(node)
        else:
            self._views.pop(node, None)
        self._notify()

    def _take_back_all(self, *, but: str | None = None) -> None:
        for node, incarnation in list(self._opinions.items()):
            if node != but:
                self._take_back(node, incarnation)

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
        if self._sealed.get(node, -1) < incarnation:
            await self.update()
            if not self.is_down(node, incarnation):
                raise BusUnavailableError(f"Node {node!r} has been heard again.")
        while self._sealed.get(node, -1) < incarnation:
            entry = await self._bucket.read(node)
            record = NodeRecord(name=node, incarnation=incarnation)
            if entry is not None and entry.value is not None:
                record = decode(NodeRecord, entry.value)
            if record.incarnation < incarnation:
                record = record.model_copy(update={"incarnation": incarnation})
            if record.incarnation == incarnation and not record.ended:
                try:
                    await self._bucket.replace(
                        node,
                        encode(
                            record.model_copy(
                                update={
                                    "ended": True,
                                    "short_lives": record.short_lives + 1 if was_short else 0,
                                }
                            )
                        ),
                        expected=0 if entry is None else entry.revision,
                        ttl_s=SEALED_TTL_S,
                    )
                except StaleRevisionError:
                    continue
            self._sealed[node] = incarnation
        self._opinions.pop(node, None)

    async def update(self, **changes: Any) -> NodeRecord:
        """Rewrite fields of this node's record, such as ``workers=[…]``.

        Raises:
            BusTimeoutError, BusUnavailableError: not (surely) written; it is at the next refresh.
        """
        assert self._record is not None
        self._record = NodeRecord.model_validate({**self._record.model_dump(), **changes})
        self._see_self()
        try:
            await self._write_own(self._record.incarnation, self._own_revision)
        except StaleRevisionError:
            await self._reclaim()
        return self._record

    def set_draining(self, draining: bool = True) -> None:
        """Say in every heartbeat from now on whether this node takes new agents."""
        if draining and not self._draining:
            self._events.emit(
                "node",
                "draining",
                f"Node {self.node} hands over its agents.",
                node=self.node,
                incarnation=self.incarnation,
                **({} if self._record is None else about_node(self._record)),
            )
        self._draining = draining
        self._see_self()
        self._send_heartbeat()
        self._notify()

    def beat_now(self) -> None:
        """Send a heartbeat out of turn: whoever waits for its echo gets it at once."""
        self._send_heartbeat()

    async def leave(self, *, timeout: float = 2.0) -> None:
        """Say good-bye and delete the record; what fails is left to time-outs. Idempotent."""
        if self._is_member and not self._is_over and self._record is not None:
            self._is_over = True
            self._send_heartbeat(left=True)
            self._events.emit(
                "node",
                "left",
                f"Node {self.node} left.",
                node=self.node,
                incarnation=self.incarnation,
                cause="left",
                **about_node(self._record),
            )
            try:
                async with asyncio.timeout(timeout):
                    await self._bucket.delete(self.node, expected=self._own_revision)
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

    async def _refuse_duplicate(self, name: str, *, has_record: bool) -> None:
        subject = self._subjects.control_node(name, "ping")
        for attempt in range(_JOIN_PINGS if has_record else 1):
            if attempt:
                await asyncio.sleep(_JOIN_PAUSE_S)
            try:
                pong = await call(self._bus, subject, None, Pong, timeout=_JOIN_PING_TIMEOUT_S)
            except NoRespondersError:
                continue
            except BusTimeoutError as error:
                raise NodeNameTakenError(
                    f"A node named {name!r} is connected but does not answer; it may be frozen.",
                    hint="End that process, or give this node another name with --name.",
                    node=name,
                ) from error
            raise NodeNameTakenError(
                f"A node named {name!r} is running (incarnation {pong.incarnation}).",
                hint="Give this node another name with --name, or stop the other one.",
                node=name,
            )

    async def _open(self, scope: TaskScope, timeout: float) -> None:
        self._scope = scope
        self._own_heard_at = monotonic()
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
        while self._probing and monotonic() < until:
            await asyncio.sleep(0.005)

    # ---- own record ---------------------------------------------------------------

    async def _write_own(self, incarnation: int, expected: int) -> None:
        assert self._record is not None
        record = self._record.model_copy(
            update={"incarnation": incarnation, "started_at": self._record.started_at or utc_text()}
        )
        # Before the write: its echo by the watch must not look like a stranger's.
        self._own_incarnations.add(incarnation)
        self._own_revision = await self._bucket.replace(
            self.node, encode(record), expected=expected, ttl_s=RECORD_TTL_S
        )
        # The fields may have been changed by `update` meanwhile; the life only goes forward.
        self._record = self._record.model_copy(
            update={
                "incarnation": max(self._record.incarnation, incarnation),
                "started_at": record.started_at,
            }
        )
        self._end(record.name, incarnation - 1)
        self._see_self()
        self._notify()

    async def _keep_record(self) -> None:
        while not self._is_over:
            await asyncio.sleep(RECORD_EVERY_S * random.uniform(0.9, 1.0))
            if self._is_over or not self._bus.is_connected:
                continue
            began = monotonic()
            try:
                await self._write_own(self.incarnation, self._own_revision)
            except StaleRevisionError:
                await self._reclaim()
            except BusError as error:
                self._log.warning("node record not refreshed", error=str(error))
            if monotonic() - began > 1.0:
                self.note_write_stall()

    async def _reclaim(self) -> None:
        """Our record is not as we left it: expired, written by us unawares, or by another."""
        try:
            entry = await self._bucket.read(self.node)
            if entry is None or entry.value is None:
                await self._write_own(self.incarnation, 0 if entry is None else entry.revision)
            elif decode(NodeRecord, entry.value).ended:
                self._ended(_incarnation_of(entry))
            elif _incarnation_of(entry) in self._own_incarnations:
                await self._write_own(self.incarnation, entry.revision)
            else:
                self._replaced()
        except (StaleRevisionError, BusError) as error:
            self._log.warning("node record not reclaimed", error=str(error))

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
        if not self._is_member or self._record is None:
            return
        load = _IDLE if self._load is None else self._load()
        status = NodeStatus.DRAINING if self._draining else NodeStatus.UP
        self._views[self.node] = NodeView(self._record, status, load, hears=self.hears())

    # ---- answering ------------------------------------------------------------------

    def _serve(self, scope: TaskScope) -> None:
        ping = self._subjects.control_node(self.node, "ping")
        self._routes.append(self._bus.subscribe(ping, self._on_ping))
        probe = self._subjects.control_node(self.node, "probe")
        self._routes.append(serve(self._bus, scope, probe, self._on_probe))

    def _on_ping(self, message: Message) -> None:
        # Not through `serve`: the leader asks this five times a second of every node.
        is_holder = self._holder is not None and message.data == self._holder.encode()
        if is_holder:
            self._pinged_at = monotonic()
        if message.reply.startswith(REPLY_PREFIX):
            pong = encode(Pong(name=self.node, incarnation=self.incarnation))
            try:
                self._bus.publish(message.reply, b'{"ok":%b}' % pong)
            except BusError as error:
                self._log.debug("pong not sent", error=str(error))
        if is_holder and self._ticking is not None:
            self._tick()

    async def _on_probe(self, data: bytes) -> ProbeReply:
        request = decode(ProbeRequest, data)
        try:
            pong = await call(
                self._bus,
                self._subjects.control_node(request.node, "ping"),
                None,
                Pong,
                timeout=self._config.confirm_timeout_s,
            )
        except BusError:
            return ProbeReply(reachable=False)
        return ProbeReply(reachable=pong.incarnation == request.incarnation)

    # ---- hearing --------------------------------------------------------------------

    def _on_heartbeat(self, message: Message) -> None:
        try:
            beat = decode(Heartbeat, message.data)
        except DecodeError as error:
            self._log.warning("heartbeat not understood", error=str(error))
            return
        if self._is_over:
            return
        name = beat.node
        # First: what a cut had held back may be read before the next tick.
        self._note_deafness(monotonic())
        if name == self.node:
            if beat.incarnation == self.incarnation:
                self._own_heard_at = monotonic()
                self._see_self()
            self._echo(beat)
            return
        if beat.left:
            self._opinions.pop(name, None)
            self._end(name, beat.incarnation)
            self._left[name] = beat.incarnation
            self._step(Left(name, beat.incarnation))
            self._heard.pop(name, None)
            self._hearing.forget(name)
            self._show(name)
            self._notify()
            return
        if self._term is None:
            self._take_back(name, beat.incarnation)
        if not self.is_down(name, beat.incarnation):
            before = self._heard.get(name)
            is_first = before is None or before.incarnation != beat.incarnation
            self._heard[name] = beat
            if self._hearing.heard(name, beat.incarnation, beat.hears, monotonic()):
                self._revision += 1  # nobody acts on it: the listeners needn't know
            self._step(Heard(name, beat.incarnation))
            self._show(name)
            if is_first or (before is not None and before.draining != beat.draining):
                self._notify()
        self._echo(beat)
        if self._term is None and name == self._holder:
            self._beat_along()

    def _echo(self, beat: Heartbeat) -> None:
        if self._term is None or not self._may_echo():
            return
        over = self.is_down(beat.node, beat.incarnation)
        echo = Echo(
            node=beat.node,
            incarnation=beat.incarnation,
            beat=beat.beat,
            sent_at=beat.sent_at,
            verdict=NodeStatus.DOWN if over else NodeStatus.UP,
            leader=self.node,
            term=self._term,
        )
        try:
            self._bus.publish(self._subjects.echo(beat.node), encode(echo))
        except BusError as error:
            self._log.debug("echo not sent", error=str(error))

    def _on_entry(self, entry: Entry) -> None:
        name = entry.key
        if entry.revision <= self._record_revisions.get(name, 0):
            return
        self._record_revisions[name] = entry.revision
        if entry.value is None:
            self._records.pop(name, None)
            if name != self.node and self._detector.verdict(name) in (None, Verdict.DOWN):
                self._step(Forgot(name))
                self._heard.pop(name, None)
                self._hearing.forget(name)
                self._views.pop(name, None)
                self._notify()
            # A TTL that ran out during a stall says nothing about a node that is heard (F2).
            return
        try:
            record = decode(NodeRecord, entry.value)
        except DecodeError as error:
            self._log.error("node record not understood", name=name, error=str(error))
            return
        if name == self.node and self._is_member:
            if record.incarnation not in self._own_incarnations:
                self._replaced()
            elif record.ended:
                self._ended(record.incarnation)
            return
        if record.ended:
            self._sealed[name] = max(record.incarnation, self._sealed.get(name, -1))
            self._opinions.pop(name, None)
            if not self.is_down(name, record.incarnation):
                self._end(name, record.incarnation)
                self._step(Left(name, record.incarnation))
                self._heard.pop(name, None)
        before = self._records.get(name)
        self._records[name] = record
        is_new = before is None or before.incarnation != record.incarnation
        if is_new and not self.is_down(name, record.incarnation):
            self._step(Heard(name, record.incarnation))
            beat = self._heard.get(name)
            if beat is None or beat.incarnation != record.incarnation:
                self._heard.pop(name, None)
                self._greet(record)
        self._show(name)
        if before != record:
            self._notify()

    def _on_advisory(self, message: Message) -> None:
        stream = message.subject.rpartition(".")[2]
        if stream.removeprefix("KV_").startswith(f"fnd_{self._subjects.cluster}_"):
            self._disturb()

    def _on_bus_change(self) -> None:
        if not self._is_over:
            self._note_gap(monotonic())
            self._disturb()
            self._send_heartbeat()

    def _note_gap(self, now: float) -> None:
        """For a while we may have heard nobody, and others not us."""
        self.lagged_at = now
        self._take_back_all()

    def _disturb(self) -> None:
        self.disturbed_at = monotonic()
        self._step(BusDisturbed())

    def note_write_stall(self) -> None:
        """Say that a write took more than a second: silence proves little for a while."""
        self._disturb()

    def held_back(self) -> tuple[tuple[str, ...], float] | None:
        """The nodes whose verdict a storm holds back, and for how many seconds; None: no storm."""
        until = self._detector.statistics().storm_until
        if until is None:
            return None
        return self._detector.held(), max(0.0, until - monotonic())

    def force_failover(self) -> None:
        """Let the verdicts that a storm holds back take effect: a person says it is real."""
        self._step(ForceFailover())

    # ---- the detector -----------------------------------------------------------------

    def _step(self, event: Event) -> None:
        effects = self._detector.step(event, monotonic())
        if effects:
            for effect in effects:
                self._perform(effect)
            self._notify()

    def _perform(self, effect: Effect) -> None:
        match effect:
            case VerdictChanged(node, incarnation, old, new, cause):
                self._on_verdict(node, incarnation, old, new, cause)
            case Confirm(node, incarnation):
                if self._scope is not None:
                    self._scope.start(self._confirm(node, incarnation), "confirm")
            case StormBegan(nodes, until):
                self.is_in_storm = True
                hold = until - monotonic()
                self._log.error("many nodes seem down at once; waiting", nodes=nodes, hold_s=hold)
                if self._term is not None:
                    self._events.emit(
                        "cluster",
                        "storm",
                        f"{', '.join(nodes)} and others seem down at once; failover waits "
                        f"{hold:.0f} s.",
                        nodes=list(nodes),
                        hold_s=hold,
                    )
            case StormEnded():
                self.is_in_storm = False
                self._log.warning("verdicts are given again")
                if self._term is not None:
                    self._events.emit("cluster", "storm_ended", "Failover goes on.")

    def _on_verdict(
        self, node: str, incarnation: int, old: Verdict | None, new: Verdict, cause: str
    ) -> None:
        before = self._views.get(node)
        if new is Verdict.DOWN:
            if cause != "left" and not self.is_down(node, incarnation):
                self._opinions[node] = incarnation
            self._end(node, incarnation)
        elif old is None:
            self._end(node, incarnation - 1)
        self._show(node)
        log = self._log.bind(peer=node, incarnation=incarnation, cause=cause)
        match new:
            case Verdict.UP if old is None:
                log.info("node seen")
                if before is not None and before.status is NodeStatus.DOWN:
                    self._tell("returned", f"Node {node} is back.", node, incarnation, cause)
            case Verdict.UP:
                log.info("node is well again")
                self._tell("returned", f"Node {node} is heard again.", node, incarnation, cause)
            case Verdict.SUSPECT:
                log.warning("node is suspect")
                self._tell("suspect", f"Node {node} is not heard.", node, incarnation, cause)
            case Verdict.DOWN if cause != "left":
                log.warning("node is down")
                if self._term is None and node == self._holder:
                    self._died_leading = (node, incarnation, cause)
                text = f"Node {node} is down ({cause})."
                self._tell("down", text, node, incarnation, cause, before)
            case Verdict.DOWN:
                log.info("node left")

    def _tell(
        self,
        what: str,
        message: str,
        node: str,
        incarnation: int,
        cause: str,
        before: NodeView | None = None,
    ) -> None:
        """Only the leader speaks about others, or each fact would be told by every node."""
        if self._term is None:
            return
        view = self._views.get(node, before)
        # Of another of its lives we know, but that may have had other labels.
        is_same = view is not None and view.incarnation == incarnation
        about = about_node(view.record) if view is not None and is_same else {}
        self._events.emit(
            "node", what, message, node=node, incarnation=incarnation, cause=cause, **about
        )

    def _end(self, node: str, incarnation: int) -> None:
        self._down[node] = max(self._down.get(node, -1), incarnation)
        if len(self._down) > 10_000:
            oldest = next(iter(self._down))
            del self._down[oldest]
            self._left.pop(oldest, None)

    def _show(self, name: str) -> None:
        """Rebuild the view of one node."""
        known, beat = self._records.get(name), self._heard.get(name)
        if known is None:
            shown = self._views.get(name)
            known = shown.record if shown is not None else None
        if known is None or name == self.node:
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
        load = beat.load if beat is not None else _IDLE
        said = self._hearing.report(name)
        self._views[name] = NodeView(known, status, load, is_heard, hears=said)

    def _notify(self) -> None:
        self._revision += 1
        self._note_connections()
        for listener in self._listeners:
            listener()

    def _note_connections(self) -> None:
        """Tell telemetry which lives of other nodes have come and gone; silence is neither."""
        now = {
            name: view
            for name, view in self._views.items()
            if name != self.node
            and view.is_alive
            and (view.status is not NodeStatus.SUSPECT or name in self._connected)
        }
        before, self._connected = self._connected, now
        if not (telemetry.is_attached(NODE_CONNECTED) or telemetry.is_attached(NODE_DISCONNECTED)):
            return
        for name, view in before.items():
            if name not in now or now[name].incarnation != view.incarnation:
                self._measure(NODE_DISCONNECTED, view, len(now))
        for name, view in now.items():
            if name not in before or before[name].incarnation != view.incarnation:
                self._measure(NODE_CONNECTED, view, len(now))

    def _measure(self, event: str, view: NodeView, nodes: int) -> None:
        record = view.record
        telemetry.execute(
            event,
            {"nodes": nodes},
            {
                "node": record.name,
                "incarnation": record.incarnation,
                "labels": dict(record.labels),
                "capabilities": list(record.capabilities),
                "observer": self.node or self._bus.name,
            },
        )

    # ---- asking ---------------------------------------------------------------------

    async def _confirm(self, node: str, incarnation: int) -> None:
        reachable: bool | None = None
        others = [
            view.name
            for view in self._views.values()
            if view.status is NodeStatus.UP and view.name not in (node, self.node)
        ]
        if others and self._is_member:
            subject = self._subjects.control_node(random.choice(others), "probe")
            try:
                reply = await call(
                    self._bus,
                    subject,
                    ProbeRequest(node=node, incarnation=incarnation),
                    ProbeReply,
                    # The one asked waits `confirm_timeout_s` itself.
                    timeout=2 * self._config.confirm_timeout_s,
                )
                reachable = reply.reachable
            except FoundationError as error:
                self._log.info("no second opinion", peer=node, error=str(error))
        self._step(Confirmed(node, incarnation, reachable))

    def set_leading(self, term: int | None, may_echo: Callable[[], bool] = lambda: True) -> None:
        """Begin (or with None, end) the leader's duties: echoes while *may_echo*, and probes of all."""
        self._term = term
        self._may_echo = may_echo
        if term is not None and self._died_leading is not None:
            node, incarnation, cause = self._died_leading
            self._tell("down", f"Node {node} is down ({cause}).", node, incarnation, cause)
        if term is not None:
            self._take_back_all(but=None if self._died_leading is None else self._died_leading[0])
            self._send_heartbeat()
        self._died_leading = None

    def watch_holder(self, node: str | None, wrote: int | None = None) -> None:
        """Probe *node* while this node doesn't lead: it holds the lease.

        *wrote* is its incarnation if it has just written the lease. That is a sign of life like
        a heartbeat: who renews leads, and confirms rights to answer, whether *we* hear it or not.
        """
        self._holder = node
        if node is not None and wrote is not None and self._term is None and node != self.node:
            self._died_leading = None
            self._take_back(node, wrote)
            if not self.is_down(node, wrote):
                self._step(Heard(node, wrote))

    def emit(self, topic: str, what: str, message: str, **data: Any) -> None:
        """Publish a cluster event in this node's name; never raises and never waits."""
        self._events.emit(topic, what, message, **data)

    def _greet(self, record: NodeRecord) -> None:
        """Ask a node that was only read about whether it lives."""
        name, incarnation = record.name, record.incarnation

        def on_reply(reply: Message | BusError) -> None:
            self._probing.discard(name)
            if isinstance(reply, BusError) or self._is_over:
                return
            try:
                pong = Pong.model_validate(read_reply(reply.data))
            except (FoundationError, ValueError):
                return
            if pong.incarnation == incarnation and not self.is_down(name, incarnation):
                self._heard.setdefault(name, None)
                self._step(Heard(name, incarnation))
                self._show(name)
                self._notify()

        self._request(name, self._subjects.control_node(name, "ping"), on_reply)

    def _request(
        self, name: str, subject: str, on_reply: Callable[[Message | BusError], None]
    ) -> None:
        try:
            self._bus.request_nowait(
                subject, self.node.encode(), on_reply, timeout=_PROBE_TIMEOUT_S
            )
            self._probing.add(name)
        except BusError:
            self._probing.discard(name)

    def _probe_all(self) -> None:
        if self._term is not None:
            targets = [name for name in self._views if name != self.node]
        elif self._holder is not None and self._holder != self.node:
            targets = [self._holder]
        else:
            return
        for name in targets:
            view = self._views.get(name)
            if view is not None and view.is_alive and name not in self._probing:
                self._probe(view.record)

    def _probe(self, record: NodeRecord) -> None:
        name, incarnation = record.name, record.incarnation
        left = len(record.workers)

        def on_manager(reply: Message | BusError) -> None:
            self._probing.discard(name)
            if not isinstance(reply, NoRespondersError):
                answered(reply)
            elif not record.workers:
                self._step(ProbeMissed(name, incarnation))
            else:
                # A dead manager says nothing about its workers, which may live on and answer (F3).
                for worker in record.workers:
                    self._request(name, self._subjects.control_worker(worker, "ping"), on_worker)

        def on_worker(reply: Message | BusError) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._probing.discard(name)
            if not isinstance(reply, NoRespondersError):
                left = -1  # one answer decides
                answered(reply)
            elif left == 0:
                self._step(ProbeMissed(name, incarnation))

        def answered(reply: Message | BusError) -> None:
            # A time-out means that somebody listens, unless the connection is what failed.
            if not isinstance(reply, BusError) or self._bus.is_connected:
                self._probing.discard(name)
                self._step(ProbeAnswered(name, incarnation))

        self._request(name, self._subjects.control_node(name, "ping"), on_manager)

    # ---- time -----------------------------------------------------------------------

    def _send_heartbeat(self, *, left: bool = False) -> None:
        if not self._is_member or self._record is None or (self._is_over and not left):
            return
        self._beat += 1
        self._beat_at = now = monotonic()
        self._next_beat = now + self._config.heartbeat_interval_s * self._beat_share()
        others = {view.name for view in self._views.values() if view.is_alive} - {self.node}
        beat = Heartbeat(
            node=self.node,
            incarnation=self.incarnation,
            beat=self._beat,
            sent_at=now,
            draining=self._draining,
            left=left,
            load=_IDLE if self._load is None else self._load(),
            hears=self._hearing.to_say(now, others),
        )
        try:
            self._bus.publish(self._subjects.heartbeat(self.node), encode(beat))
        except BusError as error:
            self._log.debug("heartbeat not sent", error=str(error))

    def _beat_share(self) -> float:
        """Of the interval, when the next heartbeat is due, if nothing makes us send one before."""
        if self._term is None and self._holder not in (None, self.node):
            return random.uniform(*_LATE_BEAT)
        return random.uniform(0.9, 1.1)

    def _beat_along(self) -> None:
        """Send our heartbeat when the leader has sent its own.

        Everybody reads everybody's: those that come together are read in one go, and to be
        woken costs more than to read.
        """
        if monotonic() - self._beat_at >= self._config.heartbeat_interval_s * _EARLY_BEAT:
            self._send_heartbeat()

    def _probe_due(self) -> float:
        """When to probe next; a node that the leader probes needn't probe the leader."""
        due = self._probed_at + self._config.probe_interval_s
        if self._term is None and self._pinged_at is not None:
            return max(due, self._pinged_at + self._config.probe_interval_s * _LATE_PROBE)
        return due

    async def _run(self) -> None:
        """Tick until this life is over."""
        self._ticking = asyncio.get_running_loop().create_future()
        self._expected = self._next_beat = monotonic()
        self._probed_at = self._expected - self._config.probe_interval_s
        try:
            self._tick()
            await self._ticking
        finally:
            self._ticking.cancel()
            if self._timer is not None:
                self._timer.cancel()

    def _tick(self) -> None:
        """Do what is due, and be called again when something else is.

        No loop that sleeps: who is woken by a probe anyway needs no timer of its own.
        """
        assert self._ticking is not None
        if self._timer is not None:
            self._timer.cancel()
        if self._ticking.done():
            return
        if self._is_over:
            self._ticking.set_result(None)
            return
        try:
            pause = self._do_due()
        except Exception as error:  # `_run` raises it, as its own
            self._ticking.set_exception(error)
            return
        self._expected = monotonic() + pause
        self._timer = asyncio.get_running_loop().call_later(pause, self._tick)

    def _do_due(self) -> float:
        now = monotonic()
        self._note_lag(now - self._expected, now)
        self._note_deafness(now)
        if now >= self._next_beat:
            self._send_heartbeat()
            self._next_beat = max(self._next_beat, now + self._config.heartbeat_interval_s / 2)
        if now - self._watched_at >= self._config.heartbeat_interval_s * _EARLY_BEAT:
            self._watch_partitions(now)
            self._watched_at = now
        if self._is_member and now >= self._probe_due():
            self._probe_all()
            self._probed_at = now
        due = self._detector.deadline()
        if due is not None and now >= due:
            self._step(Tick())
            due = self._detector.deadline()
        wake = min(now + _TICK_S, self._next_beat, now + _TICK_S if due is None else due)
        if self._is_member:
            wake = min(wake, self._probe_due())
        return max(wake - now, _TICK_MIN_S)

    def _watch_partitions(self, now: float) -> None:
        """The leader tells of groups of nodes that don't hear each other."""
        if self._term is None:
            self._partitions.reset()
            return
        if not self.hears_itself(self._config.suspect_after_s):
            self._partitions.pause()  # it is we who don't hear
            return
        heard = self._hearing.names(now)
        alive = {view.name for view in self._views.values() if view.is_alive and view.heard}
        said = {name: self._hearing.report(name) for name in alive}
        fresh = {name: hears for name, hears in said.items() if hears is not None and name in heard}
        stale = {name: hears for name, hears in said.items() if hears is not None}
        fresh[self.node] = heard
        match self._partitions.step(groups_of(alive, fresh, stale), self._views.keys(), now):
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

    def _note_deafness(self, now: float) -> None:
        """Heartbeats come back to their sender; while ours don't, silence is our own."""
        if not self._is_member:
            return
        is_deaf = now - self._own_heard_at > self._config.heartbeat_interval_s * _DEAF_BEATS
        if is_deaf:
            self._deaf_at = now
            self._note_gap(now)
            self._step(Deaf())
        if is_deaf != self._is_deaf:
            self._is_deaf = is_deaf
            if is_deaf:
                self._log.warning("own heartbeats are not heard: nobody's silence counts")
            else:
                self._log.info("own heartbeats are heard again")

    def _note_lag(self, lag: float, now: float) -> None:
        if lag >= self._config.suspect_after_s:
            # We stood still: what others said meanwhile is still unread. It is not silence.
            self._note_gap(now)
            self._hearing.excuse(lag)
            self._log.warning("this process stood still", seconds=round(lag, 1))
            for name, (incarnation, verdict) in self._detector.snapshot().items():
                if verdict is Verdict.UP:
                    self._step(Heard(name, incarnation))
        if lag >= max(_LAG_MIN_S, self._lag_s):
            self._lag_s, self._lag_at = lag, now
            self._step(OwnLag(lag))
        elif self._lag_s and now - self._lag_at > _LAG_MEMORY_S:
            self._lag_s = 0.0
            self._step(OwnLag(0.0))


def _incarnation_of(entry: Entry) -> int:
    """The incarnation a stored record names; 1 where it can't be read, so that it counts."""
    try:
        return max(1, int(orjson.loads(entry.value or b"{}").get("incarnation", 1)))
    except (ValueError, AttributeError, TypeError):
        return 1
