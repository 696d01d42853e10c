"""`Workload` and `HostContext`: all that a node knows about agents.

A worker process hosts one workload. The composition root (`api`) chooses it;
the node floor imports nothing of the agent floor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.validity import Validity
from foundation_nats.config import Config
from foundation_nats.node.blackbox import BlackBox
from foundation_schemas import (
    AgentRecord,
    AgentReport,
    BusiestReply,
    ClassInfo,
    DeploymentMeasure,
)


@dataclass(frozen=True, slots=True)
class HostContext:
    """What a worker lends its workload."""

    bus: Bus
    subjects: Subjects
    config: Config
    node: str
    incarnation: int
    worker: str
    validity: Validity
    scope: TaskScope
    blackbox: BlackBox
    domains: Sequence[str]
    """``module:Class`` of replicated domains that this worker follows from its start on."""
    report: Callable[[AgentReport], None]
    """Tell the manager what became of an agent; repeated until it is acknowledged."""


class Workload(Protocol):
    """The agents of one worker process."""

    async def start(self, records: Sequence[AgentRecord]) -> None:
        """Activate these agents; what becomes of each is reported, not raised."""

    async def stop(
        self, agents: dict[str, int], reason: str, targets: Mapping[str, str] | None = None
    ) -> None:
        """Stop these agents (id to epoch) in good order; returns when they have ended.

        *targets* are the nodes to which they are moved, where that is known.
        """

    async def review(self) -> None:
        """End, at once, every activation that the registry as it is now gives to another.

        Raises:
            BusError: it could not be read; nothing was ended.
        """

    def resume(self) -> None:
        """The right to answer, or the connection, is back."""

    def running(self) -> dict[str, int]:
        """Id to epoch of every activation in memory."""

    def fingerprint(self) -> int:
        """`mark` of every activation in memory, by exclusive or."""

    def domains(self) -> dict[str, int]:
        """Replicated domain to the revision up to which it is applied in this process."""

    def backlog(self) -> int:
        """Signals received and not yet handled."""

    def doing(self, agent: str) -> str:
        """The type of the signal that *agent* has in hand, or ""; called from any thread."""

    def measure(self, deployments: Collection[str]) -> dict[str, DeploymentMeasure]:
        """What the replicas of these deployments have to do, of those in memory."""

    def busiest(self, limit: int) -> BusiestReply:
        """Which agents have most to do, and how much all do a second since the last call."""

    def consumed(self) -> dict[str, tuple[int, int]]:
        """Agent to (cursor, signals consumed) where they moved since the last call, for trimming."""

    def counters(self) -> dict[str, int]:
        """What it has done since it began, by name; for metrics."""

    def breakers(self) -> dict[str, str]:
        """The circuit breakers that have ever opened, to their states; for metrics."""

    def describe(self, runs: Sequence[str]) -> list[ClassInfo]:
        """What is behind ``module:Class`` in this process."""


def mark(agent: str, epoch: int) -> int:
    """An activation's part of a worker's fingerprint."""
    return crc32(f"{agent}:{epoch}".encode())


WorkloadFactory = Callable[[HostContext], Workload]
