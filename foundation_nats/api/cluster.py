"""`Cluster`: the handle of a client: signals, agents, nodes, deployments, taps."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import lru_cache
from secrets import token_hex
from types import TracebackType
from typing import Any
from uuid import uuid4

from foundation_nats.agent.guards import Guards
from foundation_nats.agent.signal import Payload, typed
from foundation_nats.api.agents import Agents
from foundation_nats.api.breakers import (
    BreakerInfo,
    BreakerRule,
    Breakers,
    ReportedBreaker,
    reported,
    rule_of,
)
from foundation_nats.api.consensus import Consensus
from foundation_nats.api.deployments import Deployments
from foundation_nats.api.leases import Leases
from foundation_nats.api.letters import DeadLetters, Events
from foundation_nats.api.moves import Mover, RebalanceReport
from foundation_nats.api.nodes import Nodes
from foundation_nats.api.refs import AgentInfo, AgentRef
from foundation_nats.api.resources import Resources
from foundation_nats.api.signals import Signals
from foundation_nats.api.streaming import Talk
from foundation_nats.api.taps import Taps
from foundation_nats.api.topology import take_topology
from foundation_nats.api.watching import NodeChanges
from foundation_nats.api.why import explain
from foundation_nats.base import telemetry
from foundation_nats.base.clock import monotonic, utc_now
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets, rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import read_reply, to_json
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.cluster.events import Events as ClusterEvents
from foundation_nats.cluster.registry import Registry
from foundation_nats.cluster.topology import Topology
from foundation_nats.config import Config
from foundation_nats.control.desired import Desired
from foundation_nats.control.rebalance import Rebalance
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BusError,
    BusTimeoutError,
    ConfigError,
    DecodeError,
    FoundationError,
    NoRespondersError,
)
from foundation_nats.observe.why import Story
from foundation_nats.signaling.envelope import encode_envelope
from foundation_nats.signaling.publisher import Publisher
from foundation_nats.signaling.receivers import Given, pick, receivers
from foundation_nats.signaling.schedules import deadline_text
from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    ClusterEvent,
    LeaseRecord,
    Receipt,
    Target,
    TargetKind,
)
from foundation_schemas.signal import check_attempts

_ASK_AGAIN_S = 0.05
_MOVING_S = 0.01
_READY_TIMEOUT_S = 10.0
_ARRIVED = (AgentStatus.RUNNING, AgentStatus.HIBERNATED)


class Cluster:
    """A connection to a cluster, for programs that are not agents.

    Guarantees of `send`: docs/guarantees.md P1 to P3. The connection restores
    itself; what can't be done meanwhile raises, with the outcome in the error.

    Example:
        >>> async with Cluster.connect("nats://127.0.0.1:4222") as cluster:
        ...     await cluster.send("visits", "counter.add", {"amount": 3})
    """

    def __init__(self, bus: Bus, config: Config, name: str) -> None:
        self.bus = bus
        self.config = config
        self.subjects = Subjects(config.cluster)
        self._publisher = Publisher(bus, self.subjects, f"client:{name}")
        self._scope: TaskScope | None = None
        self._registry: Registry | None = None
        self._desired_state: Desired | None = None
        self._changes: NodeChanges | None = None
        self._failovers: Route | None = None
        self._load_wanted: asyncio.Task[None] | None = None
        self._given = Given()
        self._events = ClusterEvents(bus, self.subjects, f"client:{name}")
        self.client_name = name
        self._opening = asyncio.Lock()
        self.agents = Agents(self)
        self.nodes = Nodes(self)
        self.deployments = Deployments(self)
        self.dead = DeadLetters(self)
        self.events = Events(self)
        self.taps = Taps(self)
        self.consensus = Consensus(self)
        self.leases = Leases(self)
        self.mover = Mover(self)
        self.resources = Resources(self)
        self.signals = Signals(self)
        self._breakers = Breakers(self._emit)
        self.guards = Guards(self._emit)
        """Limits and breakers for calls of this client's own, as handlers have them in `ctx`."""

    @classmethod
    def connect(
        cls,
        url: str | Sequence[str] | None = None,
        *,
        cluster: str | None = None,
        creds: str | None = None,
        name: str | None = None,
        config: Config | None = None,
        timeout: float = 5.0,
        missing: assets.Missing = "refuse",
    ) -> _Connecting:
        """Connect: use as ``async with``, or await it and call `close`.

        Without *url* the servers come from ``FOUNDATION_SERVER``, else
        ``nats://127.0.0.1:4222``. A *url* may be a locator, such as
        ``dns+srv://_nats._tcp.example.org``, or ``context://NAME`` for all that a context of the
        NATS command line says: see docs/discovery.md. *name* is this client's name as a source of
        signals and in the server's list of connections.

        An account without this cluster gets its streams. Streams that an existing
        cluster has lost are not made anew, unless *missing* is ``make`` (``leave``
        connects without them).

        Raises (when entered or awaited):
            BusUnavailableError: no server answers within *timeout*.
            ServerError: the server is too old, has no JetStream, or has lost streams of
                the cluster (`details["missing"]`).
            ConfigError: an argument is wrong.
        """
        return _Connecting(cls, url, cluster, creds, name, config, timeout, missing)

    async def close(self) -> None:
        """End the connection. Idempotent."""
        if self._changes is not None:
            self._changes.close()
        if self._failovers is not None:
            self.bus.unsubscribe(self._failovers)
            self._failovers = None
        await self.consensus.close()
        if self._scope is not None:
            await self._scope.close()
        await self.bus.close()

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.config.cluster

    @property
    def url(self) -> str:
        """The server in use."""
        return self.bus.url

    async def leader(self) -> LeaseRecord | None:
        """Who leads, by the lease; None while nobody does."""
        return await self.nodes.leader()

    async def topology(self, *, timeout: float = 2.0, zone_label: str = "zone") -> Topology:
        """One picture of the cluster: nodes, zones, distances, who hears whom, partitions.

        All nodes are asked at once, and each measures its distance to its server and to the
        other nodes. Who does not answer within *timeout* is in the picture, with what is known
        of it. The first call begins to listen to heartbeats, which costs some 0.3 s more.

        Args:
            zone_label: the nodes' label that makes the zones.

        Raises:
            BusTimeoutError, BusUnavailableError: the nodes could not be read.
        """
        return await take_topology(self, timeout=timeout, zone_label=zone_label)

    # ---- signals ----------------------------------------------------------------

    async def send(
        self,
        target: str | AgentRef | Target,
        type: str | Payload,
        data: Any = None,
        *,
        id: str | None = None,
        timeout: float = 5.0,
        ttl: float | None = None,
        deadline: datetime | None = None,
        attempts: int | None = None,
        urgent: bool = False,
    ) -> Receipt:
        """Store a signal; it is durable once this returns.

        *type* may be a `Payload`, which is type and data in one. It needs no running agent: the
        signal waits for its receiver. A repeat with the same *id* takes effect once. What is not
        handled within *ttl* seconds, or by *deadline*, is not handled any more but a dead letter
        with the code ``expired``. *attempts* (1 to 100) is how often its handling is tried, else it is
        as the node is set. What is *urgent* overtakes what waits and is not. For later and again and
        again: `signals.schedule`; to be told what became of it: `signals.send_supervised`.

        Raises:
            ConfigError: *target* or *type* is wrong, or *data* is not JSON.
            MailboxFullError: the receiver does not keep up; nothing was stored.
            PayloadTooLargeError: nothing was sent.
            BusUnavailableError: nothing was stored within *timeout*.
            BusTimeoutError: it may be stored: send it again with the same id.
        """
        parsed = _target(target)
        type, data = typed(type, data)
        _check_type(type)
        try:
            until = deadline_text(utc_now(), ttl=ttl, deadline=deadline)
            return await self._publisher.send(
                parsed,
                type,
                data,
                id=id,
                timeout=timeout,
                deadline=until,
                attempts=check_attempts(attempts),
                urgent=urgent,
            )
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"{type}: {error}.") from error

    async def publish(
        self,
        topic: str,
        type: str,
        data: Any = None,
        *,
        id: str | None = None,
        timeout: float = 5.0,
        ttl: float | None = None,
    ) -> Receipt:
        """Send a signal to whoever subscribes to *topic*, such as ``orders.new``; errors as `send`.

        Durable for those that subscribe by then, running or not; without any it ends there.
        """
        return await self.send(f"topic:{topic}", type, data, id=id, timeout=timeout, ttl=ttl)

    async def ask(
        self,
        target: str | AgentRef | Target,
        type: str | Payload,
        data: Any = None,
        *,
        timeout: float = 5.0,
        deadline: datetime | None = None,
        breaker: bool | BreakerRule | None = None,
    ) -> Any:
        """Ask one agent and return its handler's result, as plain JSON values.

        At most once: the agent handles the question once or not at all, and
        what it changed is stored before the answer. ``any:`` and
        ``capability:`` ask one running agent that provides it, on the least loaded node as
        far as heartbeats have said, and which this client has asked least lately. After *deadline* it is not
        begun, by the clock of the agent's machine; without one it may still be handled
        when nobody waits any more. `signals.ask_all` asks many, `ask_stream` gets many items.

        Args:
            breaker: after so many questions of this client without an answer (True: 5 within 30 s) *target*
                is not asked for a while; see `breakers`.

        Raises:
            BreakerOpenError: it was not asked, because of *breaker*.
            AgentNotFoundError: there is no such agent.
            AgentUnavailableError: it is not running now; nothing was handled.
            AskTimeoutError: no answer in time; it may have been handled.
            HandlerError, PayloadInvalidError, UnhandledSignalError: the agent's answer.
            ConfigError: *target* or *type* is wrong, or *data* is not JSON.
        """
        ends = monotonic() + timeout
        parsed, _, payload = self._question(target, type, data, deadline)
        rule = rule_of(breaker)
        if rule is None:
            return await self._ask(parsed, payload, ends, timeout)
        with self._breakers.around(str(parsed), rule):
            return await self._ask(parsed, payload, ends, timeout)

    async def _ask(self, parsed: Target, payload: bytes, ends: float, timeout: float) -> Any:
        agent = parsed.name if parsed.kind is TargetKind.AGENT else await self._one_of(parsed)
        subject = self.subjects.ask(agent)
        arrived = False
        while True:
            left = ends - monotonic()
            if left <= 0:
                raise AskTimeoutError(f"{agent} did not answer within {timeout:g} s.", agent=agent)
            try:
                return await self._answer(agent, subject, payload, left)
            except NoRespondersError:
                why, moves = await self._why_nobody(agent)
                if not moves or arrived or monotonic() + _ASK_AGAIN_S >= ends:
                    raise why from None
                # On its way to another node, or just there: nobody has seen the question.
                arrived = why.details.get("status") in _ARRIVED
                await asyncio.sleep(_MOVING_S)
            except AgentUnavailableError as error:
                # Refused before anybody has handled it: asking again is safe.
                if "refused" not in error.details or monotonic() + _ASK_AGAIN_S >= ends:
                    raise
                await asyncio.sleep(_ASK_AGAIN_S)
            except BusTimeoutError as error:
                raise AskTimeoutError(
                    f"{agent} did not answer within {timeout:g} s.",
                    hint="It may have handled the question all the same.",
                    agent=agent,
                ) from error

    def breakers(self) -> list[BreakerInfo]:
        """The circuit breakers of this client: those of targets that were asked with one."""
        return self._breakers.list()

    async def reported_breakers(self) -> list[ReportedBreaker]:
        """The breakers of all clients and workers that have ever opened, as their events tell.

        The newest word of each; a process that has ended says nothing more.

        Raises:
            BusTimeoutError, BusUnavailableError
        """
        return await reported(self)

    async def ask_stream(
        self,
        target: str | AgentRef | Target,
        type: str | Payload,
        data: Any = None,
        *,
        timeout: float = 30.0,
        window: int = 64,
        deadline: datetime | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Ask one agent whose handler yields its answer item by item: ``async for item in …``.

        The handler is an async generator; it is run no further than *window* items ahead of
        whoever iterates. To leave early, `aclose` the iterator (``contextlib.aclosing``): the
        handler is ended, and nothing of what it did is kept. Items are provisional until the
        iteration has ended by itself: then the handler's effects are stored. While it answers, the
        agent handles nothing else. A handler that is no generator gives one item.

        Args:
            timeout: for the first item, and for each next one from when it is asked for.
            window: how many items may be on their way.
            deadline: after it the question is not begun.

        Raises:
            AgentNotFoundError, AgentUnavailableError: as `ask`; in the middle: nothing was kept.
            AskTimeoutError: no item in time, or the agent is gone in the middle; what it did may be kept.
            HandlerError, PayloadInvalidError, UnhandledSignalError: the agent's answer; nothing was kept.
            ConfigError: an argument is wrong.
        """
        if window < 1:
            raise ConfigError(f"ask_stream: window must be at least 1, not {window}.")
        ends = monotonic() + timeout
        parsed, id, payload = self._question(target, type, data, deadline)
        payload = b"%b,%b}" % (payload[:-1], to_json({"replies": window})[1:-1])
        agent = parsed.name if parsed.kind is TargetKind.AGENT else await self._one_of(parsed)
        arrived = False
        while True:
            talk = Talk(self, agent, id, payload, window, timeout)
            try:
                try:
                    await talk.begin(ends - monotonic())
                except NoRespondersError:
                    why, moves = await self._why_nobody(agent)
                    if not moves or arrived or monotonic() + _ASK_AGAIN_S >= ends:
                        raise why from None
                    arrived = why.details.get("status") in _ARRIVED
                    await asyncio.sleep(_MOVING_S)
                    continue
                except AgentUnavailableError as error:
                    if "refused" not in error.details or monotonic() + _ASK_AGAIN_S >= ends:
                        raise
                    await asyncio.sleep(_ASK_AGAIN_S)
                    continue
                async with aclosing(talk.items()) as items:
                    async for item in items:
                        yield item
                return
            finally:
                talk.close()

    def _question(
        self,
        target: str | AgentRef | Target,
        type: str | Payload,
        data: Any,
        deadline: datetime | None,
    ) -> tuple[Target, str, bytes]:
        """Whom a question is for, its id, and its bytes.

        Raises:
            ConfigError: something is wrong with it.
        """
        parsed = _target(target)
        type, data = typed(type, data)
        _check_type(type)
        id = uuid4().hex
        try:
            payload = encode_envelope(
                id=id,
                source=self._publisher.source,
                type=type,
                target=str(parsed),
                data=data,
                deadline=deadline_text(utc_now(), deadline=deadline),
            )
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"{type}: {error}.") from error
        return parsed, id, payload

    async def _answer(self, agent: str, subject: str, payload: bytes, timeout: float) -> Any:
        """Ask once; returns the answer of whoever has the agent.

        A frozen or cut off activation that is back hears questions, too, and refuses them, while
        its successor handles them. So a refusal counts only if it comes from one that was sure of
        its right, or if the registry knows no later one; otherwise the next reply is awaited.

        Raises:
            NoRespondersError: nobody was there.
            AgentUnavailableError: nobody has handled it.
            BusTimeoutError, FoundationError
        """
        replies: deque[Message | BusError] = deque()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Message | BusError) -> None:
            replies.append(reply)
            if not waiter.done():
                waiter.set_result(None)

        token = self.bus.request_nowait(subject, payload, on_reply, timeout=timeout, many=True)
        try:
            while True:
                if not replies:
                    waiter = asyncio.get_running_loop().create_future()
                    await waiter
                reply = replies.popleft()
                if isinstance(reply, BusError):
                    raise reply
                try:
                    return read_reply(reply.data)
                except AgentUnavailableError as error:
                    epoch = error.details.get("refused")
                    if epoch is None or error.details.get("sure"):
                        raise
                    try:
                        known = (await self.agents.get(agent)).epoch
                    except AgentNotFoundError:
                        raise error from None
                    if known <= epoch:
                        raise
        finally:
            self.bus.forget(token)

    async def _why_nobody(
        self, agent: str
    ) -> tuple[AgentNotFoundError | AgentUnavailableError, bool]:
        """The error for an asker, and whether the agent is being moved just now."""
        try:
            info = await self.agents.get(agent)
        except AgentNotFoundError as error:
            return error, False
        origin = info.recovered_from
        moved = origin is not None and origin.reason in ("moved", "reloaded")
        moved &= info.status is AgentStatus.STARTING or info.is_running
        return self._unavailable(agent, info), moved or info.status is AgentStatus.MOVING

    def _unavailable(self, agent: str, info: AgentInfo) -> AgentUnavailableError:
        if info.is_running:
            return AgentUnavailableError(
                f"Nobody answers for agent {agent}, which is registered on node {info.node}.",
                hint="The node may just have died: the agent will be recovered. Ask again.",
                agent=agent,
                status=str(info.status),
            )
        return AgentUnavailableError(
            f"Agent {agent} is {info.status}" + (f": {info.reason}." if info.reason else "."),
            hint="Signals sent with `send` wait for it.",
            agent=agent,
            status=str(info.status),
        )

    async def _one_of(self, target: Target) -> str:
        if target.kind in (TargetKind.EVERYONE, TargetKind.LABEL, TargetKind.TOPIC):
            raise ConfigError(
                "Only one agent can be asked: name it, or use any:CAPABILITY.",
                hint="`cluster.signals.ask_all` asks many.",
            )
        registry = await self._open_registry()
        if self._changes is None and self._load_wanted is None:
            # Heartbeats say how busy nodes are; the first questions don't wait for them.
            scope = await self._open_scope()
            self._load_wanted = scope.start(self._hear_of_load(), "load")
        running = [
            held
            for held in receivers(registry, target.kind, target.name)
            if held.record.status is AgentStatus.RUNNING
        ]
        if not running:
            raise AgentUnavailableError(f"No running agent is behind {target}.")
        agent = pick(running, token_hex(8), self._place_load)
        self._given.add(agent, monotonic())
        return agent

    async def _hear_of_load(self) -> None:
        try:
            await self._open_changes()
        except FoundationError:
            self._load_wanted = None  # the next question tries again

    def _place_load(self, record: AgentRecord) -> float:
        """Signals that wait on an agent's node, per agent there, and what this client gave it lately."""
        node = None
        if self._changes is not None and record.node is not None:
            node = self._changes.view().nodes.get(record.node)
        load = None if node is None else node.load
        place = 0.0 if load is None else load.backlog / max(1, load.agents)
        return round(place + self._given.lately(record.id, monotonic()), 2)

    # ---- where agents run ---------------------------------------------------------

    async def rebalance(
        self,
        strategy: str = "even_distribution",
        *,
        max_moves: int | None = None,
        wait: bool = True,
        timeout: float = 300.0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RebalanceReport:
        """Move running agents until the nodes are even: a few at a time, with state and signals.

        Planned here and now, carried out by whoever leads. Idempotent: once it is done,
        the next one has nothing to do. `plan_rebalance` shows the moves and makes none.

        Args:
            strategy: ``even_distribution`` (agents per worker), ``load_based`` (pressure) or
                ``capability_based`` (how well agents and nodes match).
            max_moves: at most so many (1,000); the most useful ones.
            wait: until all were made; else it returns at once, and the report has no moves made.

        Raises:
            ConfigError: there is no such strategy.
            ConflictError: another rebalance is under way.
            NotSettledError: not done in time; it goes on.
        """
        return await self.mover.rebalance(
            strategy, max_moves=max_moves, wait=wait, timeout=timeout, on_progress=on_progress
        )

    async def plan_rebalance(
        self, strategy: str = "even_distribution", *, max_moves: int | None = None
    ) -> Rebalance:
        """What `rebalance` would do now.

        Raises:
            ConfigError: there is no such strategy.
        """
        return await self.mover.plan_rebalance(strategy, max_moves)

    async def why(self, name: str) -> Story:
        """Why an agent, a deployment or a node is as it is: what led there, and what would change it.

        *name* is looked for among agents, then deployments, then nodes; ``agent:NAME``,
        ``deployment:NAME`` and ``node:NAME`` say which. What is gone has a story as long
        as there are events of it.

        Raises:
            NotFoundError: nobody of that name is there, or was.
            BusUnavailableError, BusTimeoutError
        """
        return await explain(self, name)

    # ---- for the handles --------------------------------------------------------

    def _emit(self, topic: str, what: str, message: str, **data: Any) -> None:
        self._events.emit(topic, what, message, **data)

    async def telemetry(self) -> None:
        """Have this client tell `foundation_nats.base.telemetry` what happens to the cluster.

        From now on and until it is closed it listens to nodes, to the registry and to failovers,
        and executes the platform's telemetry events in this process: attach before. Nodes that
        are there now connect, agents that are there are not told. Calling it again does nothing.
        A program that runs a `Node` itself is told by that, and would be told twice.

        Example:
            >>> telemetry.attach("metrics", telemetry.EVENTS, count)
            >>> await cluster.telemetry()

        Raises:
            BusTimeoutError, BusUnavailableError: nodes or registry could not be read.
        """
        if self._failovers is None:
            subject = self.subjects.event("agent", "failed_over")
            self._failovers = self.bus.subscribe(subject, self._on_failed_over)
        await self._open_changes()
        await self._open_registry()

    def _on_failed_over(self, message: Message) -> None:
        try:
            data = rpc.decode(ClusterEvent, message.data).data
        except DecodeError:
            return
        took = data.get("ms")
        telemetry.execute(
            telemetry.FAILOVER_COMPLETED,
            {"agents": data.get("count", 0), **({} if took is None else {"ms": took})},
            {"node": data.get("node"), "to": data.get("to", {}), "observer": self.client_name},
        )

    async def _open_scope(self) -> TaskScope:
        if self._scope is None:
            self._scope = TaskScope("client")
        return self._scope

    async def _open_registry(self) -> Registry:
        async with self._opening:
            if self._registry is None:
                registry = Registry(self.bus, self.subjects)
                await registry.open(await self._open_scope(), timeout=_READY_TIMEOUT_S)
                self._registry = registry
            return self._registry

    async def _open_desired(self) -> Desired:
        async with self._opening:
            if self._desired_state is None:
                desired = Desired(self.bus, self.subjects)
                await desired.open(await self._open_scope(), timeout=_READY_TIMEOUT_S)
                self._desired_state = desired
            return self._desired_state

    async def _open_changes(self) -> NodeChanges:
        async with self._opening:
            if self._changes is None:
                changes = NodeChanges(self.bus, self.subjects, self.config.liveness)
                try:
                    await changes.open(await self._open_scope(), timeout=_READY_TIMEOUT_S)
                except BaseException:
                    changes.close()
                    raise
                self._changes = changes
            return self._changes


class _Connecting:
    """What `Cluster.connect` returns: await it, or enter it."""

    def __init__(
        self,
        kind: type[Cluster],
        url: str | Sequence[str] | None,
        cluster: str | None,
        creds: str | None,
        name: str | None,
        config: Config | None,
        timeout: float,
        missing: assets.Missing,
    ) -> None:
        self._kind = kind
        self._url = url
        self._cluster_name = cluster
        self._creds = creds
        self._name = name
        self._config = config
        self._timeout = timeout
        self._missing = missing
        self._cluster: Cluster | None = None

    async def _open(self) -> Cluster:
        bus_settings: dict[str, Any] = {"connect_timeout_s": self._timeout}
        if self._url is not None:
            urls = (self._url,) if isinstance(self._url, str) else tuple(self._url)
            bus_settings["servers"] = urls
        if self._creds is not None:
            bus_settings["creds"] = self._creds
        if self._config is None:
            config = Config.load(cluster=self._cluster_name, bus=bus_settings)
        else:
            base = self._config
            if self._creds is not None:  # who connects is said whole, not added to
                bus_settings |= dict.fromkeys(("user", "password", "token", "nkey", "user_jwt"))
            config = base.model_copy(
                update={
                    "cluster": self._cluster_name or base.cluster,
                    "bus": base.bus.model_copy(update=bus_settings),
                }
            )
        name = self._name or f"client-{token_hex(4)}"
        bus = await Bus.connect(config.bus, name)
        try:
            await assets.ensure(bus, config, missing=self._missing)
        except BaseException:
            await bus.close()
            raise
        return self._kind(bus, config, name)

    def __await__(self) -> Generator[Any, None, Cluster]:
        return self._open().__await__()

    async def __aenter__(self) -> Cluster:
        self._cluster = await self._open()
        return self._cluster

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cluster is not None:
            await self._cluster.close()


def _target(target: str | AgentRef | Target) -> Target:
    return target if isinstance(target, Target) else _parsed(str(target))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Target:
    try:
        return Target.parse(text)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@lru_cache(maxsize=4096)
def _check_type(type: str) -> None:
    if not type or len(type) > 256 or any(c.isspace() for c in type):
        raise ConfigError(f"{type!r} is not a signal type: use words joined by dots.")
