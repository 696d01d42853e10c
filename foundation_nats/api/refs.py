"""`AgentRef`: a name one can send to and ask, wherever the agent runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from foundation_nats.agent.signal import Payload
from foundation_schemas import AgentRecord, Receipt
from foundation_schemas.agent import AgentStatus, RecoveredFrom
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.api.supervised import OnError, Outcome


class AgentRef:
    """The name of one agent, tied to a cluster; safe to keep: it never goes stale."""

    def __init__(self, cluster: Cluster, id: str) -> None:
        self._cluster = cluster
        self.id = id

    async def send(
        self, type: str | Payload, data: Any = None, *, id: str | None = None, timeout: float = 5.0
    ) -> Receipt:
        """`Cluster.send` to this agent."""
        return await self._cluster.send(self, type, data, id=id, timeout=timeout)

    async def ask(self, type: str | Payload, data: Any = None, *, timeout: float = 5.0) -> Any:
        """`Cluster.ask` of this agent."""
        return await self._cluster.ask(self, type, data, timeout=timeout)

    async def send_supervised(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        on_error: OnError = "log",
        id: str | None = None,
    ) -> Outcome:
        """`Signals.send_supervised` to this agent."""
        return await self._cluster.signals.send_supervised(
            self, type, data, timeout=timeout, retries=retries, on_error=on_error, id=id
        )

    def ask_stream(
        self,
        type: str | Payload,
        data: Any = None,
        *,
        timeout: float = 30.0,
        window: int = 64,
        deadline: datetime | None = None,
    ) -> AsyncGenerator[Any, None]:
        """`Cluster.ask_stream` of this agent."""
        return self._cluster.ask_stream(
            self, type, data, timeout=timeout, window=window, deadline=deadline
        )

    def __str__(self) -> str:
        return f"agent:{self.id}"

    def __repr__(self) -> str:
        return f"AgentRef({self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AgentRef) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class AgentInfo(WireModel):
    """Where an agent is and how it does; the JSON of ``foundation agents -o json``."""

    id: str
    node: str | None
    status: AgentStatus
    epoch: int
    deployment: str | None
    capabilities: list[str]
    critical: bool
    durable: bool
    run: str
    reason: str | None = None
    recovered_from: RecoveredFrom | None = None
    failures: int = 0
    since: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether a node holds it, awake or asleep."""
        return self.status in (AgentStatus.RUNNING, AgentStatus.HIBERNATED)

    @classmethod
    def of(cls, record: AgentRecord) -> AgentInfo:
        """The public side of a registry record."""
        return cls(
            id=record.id,
            node=record.node,
            status=AgentStatus.HIBERNATED if record.hibernates else record.status,
            epoch=record.epoch,
            deployment=record.deployment,
            capabilities=list(record.spec.capabilities),
            critical=record.spec.critical,
            durable=record.spec.durable,
            run=record.spec.run,
            reason=record.reason,
            recovered_from=record.recovered_from,
            failures=record.failures,
            since=record.since,
        )


class NodeInfo(WireModel):
    """A node and how busy it is; the JSON of ``foundation nodes -o json``."""

    name: str
    status: str
    incarnation: int
    agents: int
    load: dict[str, float]
    capacity: dict[str, float]
    labels: dict[str, str]
    capabilities: list[str]
    workers: list[str]
    host: str
    pid: int
    leader: bool
    started_at: str = ""
    cordoned: bool = False
    """It gets no new agents."""
    cordon_reason: str = ""
    short_lives: int = 0
    """How many of its lives in a row ended soon after they had begun."""
    distrusted: bool = False
    """It flaps: it gets agents only if no other node can take them, until it has lived for a while."""


__all__ = ["AgentInfo", "AgentRef", "NodeInfo"]
