"""`Cluster`: the handle of a client: signals, agents, nodes, deployments, taps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator, Sequence
from functools import lru_cache
from secrets import token_hex
from types import TracebackType
from typing import Any
from uuid import uuid4

from foundation_nats.api.agents import Agents
from foundation_nats.api.consensus import Consensus
from foundation_nats.api.deployments import Deployments
from foundation_nats.api.leases import Leases
from foundation_nats.api.letters import DeadLetters, Events
from foundation_nats.api.nodes import Nodes
from foundation_nats.api.refs import AgentRef
from foundation_nats.api.taps import Taps
from foundation_nats.api.watching import NodeChanges
from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import read_reply
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.registry import Registry
from foundation_nats.config import Config
from foundation_nats.control.desired import Desired
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BusTimeoutError,
    ConfigError,
    NoRespondersError,
)
from foundation_nats.signaling.envelope import encode_envelope
from foundation_nats.signaling.publisher import Publisher
from foundation_schemas import AgentStatus, LeaseRecord, Receipt, Target, TargetKind

_ASK_AGAIN_S = 0.05
_READY_TIMEOUT_S = 10.0


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
        self._opening = asyncio.Lock()
        self.agents = Agents(self)
        self.nodes = Nodes(self)
        self.deployments = Deployments(self)
        self.dead = DeadLetters(self)
        self.events = Events(self)
        self.taps = Taps(self)
        self.consensus = Consensus(self)
        self.leases = Leases(self)

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
        ``dns+srv://_nats._tcp.example.org``: see docs/discovery.md. *name* is this client's name as a source of
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

    # ---- signals ----------------------------------------------------------------

    async def send(
        self,
        target: str | AgentRef | Target,
        type: str,
        data: Any = None,
        *,
        id: str | None = None,
        timeout: float = 5.0,
    ) -> Receipt:
        """Store a signal; it is durable once this returns.

        It needs no running agent: the signal waits for its receiver. A repeat
        with the same *id* takes effect once.

        Raises:
            ConfigError: *target* or *type* is wrong, or *data* is not JSON.
            MailboxFullError: the receiver does not keep up; nothing was stored.
            PayloadTooLargeError: nothing was sent.
            BusUnavailableError: nothing was stored within *timeout*.
            BusTimeoutError: it may be stored: send it again with the same id.
        """
        parsed = _target(target)
        _check_type(type)
        try:
            return await self._publisher.send(parsed, type, data, id=id, timeout=timeout)
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error

    async def ask(
        self,
        target: str | AgentRef | Target,
        type: str,
        data: Any = None,
        *,
        timeout: float = 5.0,
    ) -> Any:
        """Ask one agent and return its handler's result, as plain JSON values.

        At most once: the agent handles the question once or not at all, and
        what it changed is stored before the answer. ``any:`` and
        ``capability:`` ask one running agent that provides it.

        Raises:
            AgentNotFoundError: there is no such agent.
            AgentUnavailableError: it is not running now; nothing was handled.
            AskTimeoutError: no answer in time; it may have been handled.
            HandlerError, PayloadInvalidError, UnhandledSignalError: the agent's answer.
            ConfigError: *target* or *type* is wrong, or *data* is not JSON.
        """
        parsed = _target(target)
        _check_type(type)
        id = uuid4().hex
        deadline = monotonic() + timeout
        try:
            payload = encode_envelope(
                id=id, source=self._publisher.source, type=type, target=str(parsed), data=data
            )
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
        agent = parsed.name if parsed.kind is TargetKind.AGENT else await self._one_of(parsed)
        subject = self.subjects.ask(agent)
        while True:
            left = deadline - monotonic()
            if left <= 0:
                raise AskTimeoutError(f"{agent} did not answer within {timeout:g} s.", agent=agent)
            try:
                reply = await self.bus.request(subject, payload, timeout=left)
                return read_reply(reply.data)
            except NoRespondersError:
                raise await self._why_nobody(agent) from None
            except AgentUnavailableError:
                # Refused before it was handled: asking again is safe.
                if monotonic() + _ASK_AGAIN_S >= deadline:
                    raise
                await asyncio.sleep(_ASK_AGAIN_S)
            except BusTimeoutError as error:
                raise AskTimeoutError(
                    f"{agent} did not answer within {timeout:g} s.",
                    hint="It may have handled the question all the same.",
                    agent=agent,
                ) from error

    async def _why_nobody(self, agent: str) -> AgentNotFoundError | AgentUnavailableError:
        try:
            info = await self.agents.get(agent)
        except AgentNotFoundError as error:
            return error
        if info.status is AgentStatus.RUNNING:
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
        if target.kind is TargetKind.EVERYONE:
            raise ConfigError("Only one agent can be asked: name it, or use any:CAPABILITY.")
        if target.kind is TargetKind.DEPLOYMENT:
            found = await self.agents.list(deployment=target.name)
        else:
            found = await self.agents.find(target.name)
        running = [info.id for info in found if info.status is AgentStatus.RUNNING]
        if not running:
            raise AgentUnavailableError(f"No running agent is behind {target}.")
        return random.choice(running)

    # ---- for the handles --------------------------------------------------------

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
