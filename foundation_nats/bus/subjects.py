"""Every subject, stream, bucket and durable name the library uses, as functions of the cluster's name.

Pure. Names were checked at the schema (`foundation_schemas.base`); nothing is
escaped here. Above each function stands its result for the cluster ``C``.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from foundation_schemas.signal import Target, TargetKind

# Server-side placeholder for the first wildcard of a republish source.
_FIRST_WILDCARD = "{{wildcard(1)}}"


@dataclass(frozen=True, slots=True)
class Subjects:
    """The names of one cluster."""

    cluster: str

    # ---- signals ----------------------------------------------------------------

    # fnd.C.signal.agent.<agent>
    def mailbox(self, agent: str) -> str:
        """Where a signal for *agent* is published; stored in SIGNALS."""
        return f"fnd.{self.cluster}.signal.agent.{agent}"

    # fnd.C.signal.agent.*
    def mailboxes(self) -> str:
        """Every mailbox."""
        return f"fnd.{self.cluster}.signal.agent.*"

    # fnd.C.agent.{{wildcard(1)}}.live
    def republish_destination(self) -> str:
        """Where the server copies a stored signal to; nobody else publishes there (F11)."""
        return f"fnd.{self.cluster}.agent.{_FIRST_WILDCARD}.live"

    # fnd.C.agent.<agent>.*
    def agent(self, agent: str) -> str:
        """What the worker that hosts *agent* subscribes to: live copies and asks."""
        return f"fnd.{self.cluster}.agent.{agent}.*"

    # fnd.C.agent.<agent>.live
    def live(self, agent: str) -> str:
        """Live copies of *agent*'s signals."""
        return f"fnd.{self.cluster}.agent.{agent}.live"

    # fnd.C.agent.<agent>.ask
    def ask(self, agent: str) -> str:
        """Request and reply with *agent*."""
        return f"fnd.{self.cluster}.agent.{agent}.ask"

    # fnd.C.agent.<agent>.flow
    def flow(self, agent: str) -> str:
        """Credit for the items of an answer of *agent*, or the order to end it; see api/streaming.py."""
        return f"fnd.{self.cluster}.agent.{agent}.flow"

    # fnd.C.agent.<agent>.trace
    def trace(self, agent: str) -> str:
        """Ask the worker that hosts *agent* what became of some of its signals."""
        return f"fnd.{self.cluster}.agent.{agent}.trace"

    # fnd.C.route.capability.<name> | .any.<name> | .deployment.<name> | .topic.<words> | .label
    # | .everyone
    def route(self, target: Target) -> str:
        """Where a signal for many is published; stored in ROUTES until it is expanded."""
        if target.kind in (TargetKind.EVERYONE, TargetKind.LABEL):
            # A label's expression is no name: whoever expands it reads it in the signal.
            return f"fnd.{self.cluster}.route.{target.kind}"
        return f"fnd.{self.cluster}.route.{target.kind}.{target.name}"

    # fnd.C.route.>
    def routes(self) -> str:
        """Every route."""
        return f"fnd.{self.cluster}.route.>"

    # fnd.C.timer.<name>.<name>
    def timer(self, owner: str, name: str) -> str:
        """The timer *name* of an agent, or of clients (``~client``); stored in TIMERS until it is due."""
        return f"fnd.{self.cluster}.timer.{owner}.{name}"

    # fnd.C.timer.>
    def timers(self) -> str:
        """Every timer."""
        return f"fnd.{self.cluster}.timer.>"

    # fnd.C.cancelled.<owner>.<name>
    def cancelled(self, owner: str, name: str) -> str:
        """Where a timer's end is written down, in TIMERS."""
        return f"fnd.{self.cluster}.cancelled.{owner}.{name}"

    # fnd.C.due
    def due(self) -> str:
        """Where the server puts timers that are due, in TIMERS."""
        return f"fnd.{self.cluster}.due"

    # fnd.C.dead.agent.<agent>
    def dead(self, agent: str) -> str:
        """Where *agent*'s dead letters are kept."""
        return f"fnd.{self.cluster}.dead.agent.{agent}"

    # fnd.C.dead.agent.*
    def dead_all(self) -> str:
        """Every dead letter."""
        return f"fnd.{self.cluster}.dead.agent.*"

    # ---- cluster ----------------------------------------------------------------

    # fnd.C.heartbeat.node.<node>
    def heartbeat(self, node: str) -> str:
        """Heartbeats of *node*."""
        return f"fnd.{self.cluster}.heartbeat.node.{node}"

    # fnd.C.heartbeat.node.*
    def heartbeats(self) -> str:
        """Every heartbeat."""
        return f"fnd.{self.cluster}.heartbeat.node.*"

    # fnd.C.echo.node.<node>
    def echo(self, node: str) -> str:
        """The leader's echoes of *node*'s heartbeats, for its manager and its workers."""
        return f"fnd.{self.cluster}.echo.node.{node}"

    # fnd.C.control.node.<node>.<verb>
    def control_node(self, node: str, verb: str) -> str:
        """Ask *node*'s manager to do *verb*; ``*`` subscribes to all verbs."""
        return f"fnd.{self.cluster}.control.node.{node}.{verb}"

    # fnd.C.control.worker.<worker>.<verb>
    def control_worker(self, worker: str, verb: str) -> str:
        """Ask a worker process to do *verb*; ``*`` subscribes to all verbs."""
        return f"fnd.{self.cluster}.control.worker.{worker}.{verb}"

    # fnd.C.web.<port>.<digest of the path>
    def web(self, port: int, path: str) -> str:
        """Ask the worker whose agent has the HTTP endpoint *path* to answer a request."""
        digest = blake2b(path.encode(), digest_size=12).hexdigest()
        return f"fnd.{self.cluster}.web.{port}.{digest}"

    # fnd.C.gateway.<id>
    def gateway(self, gateway: str) -> str:
        """Ask whether a gateway process lives."""
        return f"fnd.{self.cluster}.gateway.{gateway}"

    # fnd.C.event.<topic>.<what>
    def event(self, topic: str, what: str) -> str:
        """Where an event is published; stored in EVENTS."""
        return f"fnd.{self.cluster}.event.{topic}.{what}"

    # fnd.C.event.>
    def events(self) -> str:
        """Every event."""
        return f"fnd.{self.cluster}.event.>"

    # ---- replicated domains -----------------------------------------------------

    # fnd.C.domain.<name>
    def domain(self, name: str) -> str:
        """The log of the domain *name*; stored in a stream of its own."""
        return f"fnd.{self.cluster}.domain.{name}"

    # fnd.C.domain.<name>.live
    def domain_live(self, name: str) -> str:
        """Where the server copies stored entries to: a hint that there is something to read."""
        return f"fnd.{self.cluster}.domain.{name}.live"

    # fnd.C.domain.<name>.snapshot
    def domain_snapshot(self, name: str) -> str:
        """The domain's newest snapshot, in the stream of its log."""
        return f"fnd.{self.cluster}.domain.{name}.snapshot"

    # fnd.C.domain.<name>.mark
    def domain_mark(self, name: str) -> str:
        """Where a read that must see everything leaves its mark, in the stream of the log."""
        return f"fnd.{self.cluster}.domain.{name}.mark"

    # fnd.C.domain.*
    def domains(self) -> str:
        """The log of every domain."""
        return f"fnd.{self.cluster}.domain.*"

    # ---- work queues ------------------------------------------------------------

    # fnd.C.barrier.<name>
    def barrier(self, name: str) -> str:
        """Where the parties of a crowded barrier say that they come; not stored."""
        return f"fnd.{self.cluster}.barrier.{name}"

    # fnd.C.queue.<name>.<part>
    def queue(self, name: str, part: str) -> str:
        """Items of the work queue *name*: ``p<n>`` are those with a key, ``free`` those without;
        ``dead.<sequence>`` are its dead letters. Stored in a stream of its own."""
        return f"fnd.{self.cluster}.queue.{name}.{part}"

    # fnd_C_QUEUE_<name>
    def queue_stream(self, name: str) -> str:
        """The stream of one work queue."""
        return f"fnd_{self.cluster}_QUEUE_{name}"

    # ---- streams and buckets ----------------------------------------------------

    # fnd_C_SIGNALS
    @property
    def signals_stream(self) -> str:
        """The stream of all mailboxes."""
        return f"fnd_{self.cluster}_SIGNALS"

    # fnd_C_ROUTES
    @property
    def routes_stream(self) -> str:
        """The stream of signals for many."""
        return f"fnd_{self.cluster}_ROUTES"

    # fnd_C_TIMERS
    @property
    def timers_stream(self) -> str:
        """The stream of signals for later."""
        return f"fnd_{self.cluster}_TIMERS"

    # fnd_C_EVENTS
    @property
    def events_stream(self) -> str:
        """The bounded log of events."""
        return f"fnd_{self.cluster}_EVENTS"

    # fnd_C_DEAD
    @property
    def dead_stream(self) -> str:
        """The stream of dead letters."""
        return f"fnd_{self.cluster}_DEAD"

    # fnd_C_DOMAIN_<name>
    def domain_stream(self, name: str) -> str:
        """The stream of one replicated domain."""
        return f"fnd_{self.cluster}_DOMAIN_{name}"

    # fnd_C_<kind>
    def bucket(self, kind: str) -> str:
        """The bucket for *kind*: nodes, agents, state, desired, leases, settings, coordination."""
        return f"fnd_{self.cluster}_{kind}"

    # KV_fnd_C_<kind>
    def bucket_stream(self, kind: str) -> str:
        """The stream behind a bucket."""
        return f"KV_{self.bucket(kind)}"

    # $KV.fnd_C_<kind>.<key>
    def bucket_key(self, kind: str, key: str) -> str:
        """The subject of one key."""
        return f"$KV.{self.bucket(kind)}.{key}"


# $JS.API.<verb>[.<name>]
def js_api(verb: str, name: str = "") -> str:
    """The subject of a JetStream API request."""
    return f"$JS.API.{verb}.{name}" if name else f"$JS.API.{verb}"


# $JS.API.DIRECT.GET.<stream>
def direct_get(stream: str) -> str:
    """The subject of Direct Get requests."""
    return f"$JS.API.DIRECT.GET.{stream}"


STREAM_LEADER_ELECTED = "$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.>"
"""The server's advisory that a replicated stream has a new leader."""
