"""Asks nodes whether they live, and answers who asks.

Requests ``fnd.C.control.node.<node>.ping`` and ``.probe``, and the ``ping`` of
workers. A *ping* is answered with the name and the life of who has the subject. A
*probe* asks another node for its own opinion of a third.

That nobody listens is the fast sign of death; that nobody answers is none, for
somebody listens. A dead manager says nothing about its workers, which may live on
and answer (F3): only when nobody listens on any of their subjects either, the node
was missed.
"""

from __future__ import annotations

from collections.abc import Callable

from foundation_nats.base.logs import Logger
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import REPLY_PREFIX, call, encode, read_reply
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.cluster.liveness import Event, ProbeAnswered, ProbeMissed
from foundation_nats.errors import BusError, FoundationError, NoRespondersError
from foundation_schemas import NodeRecord, Pong, ProbeReply, ProbeRequest

_PROBE_TIMEOUT_S = 1.0


class Prober:
    """The questions of one process; none is asked twice at a time of one node.

    Args:
        own: this process's node, named to those that are asked; empty for an observer.
        probed: gets the outcome of every `probe`.
        greeted: gets name and incarnation of who has answered a `greet` with the life asked for.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        own: str,
        *,
        probed: Callable[[Event], None],
        greeted: Callable[[str, int], None],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._own = own.encode()
        self._probed = probed
        self._greeted = greeted
        self._asked: set[str] = set()

    @property
    def is_waiting(self) -> bool:
        """Whether anybody that was asked has not answered yet."""
        return bool(self._asked)

    def is_asking(self, node: str) -> bool:
        """Whether *node* was asked and has not answered yet."""
        return node in self._asked

    def greet(self, record: NodeRecord) -> None:
        """Ask a node that was only read about whether it lives."""
        name, incarnation = record.name, record.incarnation

        def on_reply(reply: Message | BusError) -> None:
            self._asked.discard(name)
            if isinstance(reply, BusError):
                return
            try:
                pong = Pong.model_validate(read_reply(reply.data))
            except (FoundationError, ValueError):
                return
            if pong.incarnation == incarnation:
                self._greeted(name, incarnation)

        self._request(name, self._subjects.control_node(name, "ping"), on_reply)

    def probe(self, record: NodeRecord) -> None:
        """Ask a node, and if nobody listens each of its workers, for a sign of life."""
        name, incarnation = record.name, record.incarnation
        left = len(record.workers)

        def on_manager(reply: Message | BusError) -> None:
            self._asked.discard(name)
            if not isinstance(reply, NoRespondersError):
                answered(reply)
            elif not record.workers:
                self._probed(ProbeMissed(name, incarnation))
            else:
                for worker in record.workers:
                    self._request(name, self._subjects.control_worker(worker, "ping"), on_worker)

        def on_worker(reply: Message | BusError) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._asked.discard(name)
            if not isinstance(reply, NoRespondersError):
                left = -1  # one answer decides
                answered(reply)
            elif left == 0:
                self._probed(ProbeMissed(name, incarnation))

        def answered(reply: Message | BusError) -> None:
            # A time-out means that somebody listens, unless the connection is what failed.
            if not isinstance(reply, BusError) or self._bus.is_connected:
                self._asked.discard(name)
                self._probed(ProbeAnswered(name, incarnation))

        self._request(name, self._subjects.control_node(name, "ping"), on_manager)

    def _request(
        self, name: str, subject: str, on_reply: Callable[[Message | BusError], None]
    ) -> None:
        try:
            self._bus.request_nowait(subject, self._own, on_reply, timeout=_PROBE_TIMEOUT_S)
            self._asked.add(name)
        except BusError:
            self._asked.discard(name)


async def second_opinion(
    bus: Bus,
    subjects: Subjects,
    asked: str,
    *,
    node: str,
    incarnation: int,
    patience_s: float,
    log: Logger,
) -> bool | None:
    """Whether the node *asked* reaches this life of *node*; None: it can't be known."""
    try:
        reply = await call(
            bus,
            subjects.control_node(asked, "probe"),
            ProbeRequest(node=node, incarnation=incarnation),
            ProbeReply,
            # The one asked waits so long itself.
            timeout=2 * patience_s,
        )
    except FoundationError as error:
        log.info("no second opinion", peer=node, error=str(error))
        return None
    return reply.reachable


async def give_opinion(
    bus: Bus, subjects: Subjects, request: ProbeRequest, *, patience_s: float
) -> ProbeReply:
    """Answer somebody's `second_opinion`."""
    try:
        pong = await call(
            bus, subjects.control_node(request.node, "ping"), None, Pong, timeout=patience_s
        )
    except BusError:
        return ProbeReply(reachable=False)
    return ProbeReply(reachable=pong.incarnation == request.incarnation)


def answer_ping(bus: Bus, message: Message, name: str, incarnation: int, log: Logger) -> None:
    """Say who has this name; not through `serve`: the leader asks every node five times a second."""
    if message.reply.startswith(REPLY_PREFIX):
        pong = encode(Pong(name=name, incarnation=incarnation))
        try:
            bus.publish(message.reply, b'{"ok":%b}' % pong)
        except BusError as error:
            log.debug("pong not sent", error=str(error))
