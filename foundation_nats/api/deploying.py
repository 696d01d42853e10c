"""`Deployments.deploy`: apply wishes and see them through, phase after phase.

IO. The phases: *cluster* (nodes are up, as many as are asked for, one of them leads), *services*
(streams are as declared, the registry can be read, the router is served; wishes of the tier
``core`` run), *agents* (every wished agent runs as wished), *health* (every node that has some
answers, and its workers hold as many as the registry says). The wish is stored as soon as it
could be checked, or can't be for lack of nodes; a phase that fails takes nothing back, and whoever
leads goes on. Two things wait, and are stored only in their turn: everything, where a number of
nodes is asked for, and what is not core, where something is.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from foundation_nats.base.clock import monotonic
from foundation_nats.bus import assets, rpc
from foundation_nats.bus.streams import api
from foundation_nats.cluster.registry import Held
from foundation_nats.control.diff import ChangeKind, DeploymentChange
from foundation_nats.control.rollouts import rollout_of
from foundation_nats.control.status import deployment_status
from foundation_nats.errors import BusError, FoundationError, NotSettledError
from foundation_schemas import (
    AgentStatus,
    Deployment,
    DeploymentStatus,
    MeasureReply,
    MeasureRequest,
    NodeStatus,
    Tier,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.control.manifest import Manifest

_POLL_S = 0.05
_UNCHECKED_AFTER_S = 2.0
"""A wish waits so long for a node that can check it."""
_LEAST_S = 1.0
"""What a phase gets at least, even if those before took all the time."""
_ASK_S = 2.0
_NODES_NAMED_MAX = 8


class PhaseName(StrEnum):
    """What a deploy goes through, in this order."""

    CLUSTER = "cluster"
    SERVICES = "services"
    AGENTS = "agents"
    HEALTH = "health"


class PhaseState(StrEnum):
    """How far a phase is."""

    AHEAD = "ahead"
    UNDER_WAY = "under_way"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(slots=True)
class Phase:
    """One phase of one deploy."""

    name: PhaseName
    state: PhaseState = PhaseState.AHEAD
    text: str = ""
    """For people: what is there, or what is missing."""
    ms: float | None = None
    """How long it took."""


@dataclass(slots=True)
class DeployReport:
    """How a deploy goes, and went."""

    phases: list[Phase] = field(default_factory=lambda: [Phase(name) for name in PhaseName])
    changes: list[DeploymentChange] = field(default_factory=list)
    """What the wishes changed; empty until they are stored."""
    statuses: list[DeploymentStatus] = field(default_factory=list)

    def phase(self, name: PhaseName) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.phases if phase.name is name)


Watcher = Callable[[DeployReport], None]
Check = Callable[[], Awaitable[tuple[bool, str]]]


class Deploying:
    """One deploy."""

    def __init__(
        self,
        cluster: Cluster,
        timeout: float,
        watcher: Watcher | None,
        *,
        prune: bool = False,
        min_nodes: int = 0,
    ) -> None:
        self._cluster = cluster
        self._prune = prune
        self._min_nodes = min_nodes
        self._core: list[str] = []
        """What is stored and awaited before the rest; empty if there is no rest."""
        self._found = ""
        """What was there of the platform itself, once all of it was."""
        self._timeout = timeout
        self._deadline = monotonic() + timeout
        self._watcher = watcher
        self._names: list[str] = []
        self.report = DeployReport()

    async def run(self, found: Manifest) -> DeployReport:
        """Go through all phases.

        Raises:
            ManifestError, ConfigError: wrong; nothing was stored.
            NotSettledError: a phase did not pass in time; ``details["phases"]`` tells of all.
            RolloutFailedError: a changed spec was rolled back, or is stuck.
            BusUnavailableError, BusTimeoutError
        """
        try:
            return await self._run(found)
        except FoundationError as error:
            for phase in self.report.phases:
                if phase.state is PhaseState.UNDER_WAY:
                    phase.state = PhaseState.FAILED
            self._tell()
            error.details.setdefault(
                "phases",
                [
                    {"name": str(item.name), "state": str(item.state), "text": item.text}
                    for item in self.report.phases
                ],
            )
            raise

    async def _run(self, found: Manifest) -> DeployReport:
        cluster, report, wished = self._cluster, self.report, found.deployments
        self._names = [item.name for item in wished]
        core = [item.name for item in wished if item.tier is Tier.CORE]
        self._core = core if len(core) < len(wished) or self._prune else []
        if self._min_nodes and not await self._until(PhaseName.CLUSTER, self._formed):
            raise self._late(PhaseName.CLUSTER, "The cluster is not formed", stored="nothing")
        began = monotonic()
        is_formed = bool(self._min_nodes) or await self._until(
            PhaseName.CLUSTER, self._formed, min(self._deadline, began + _UNCHECKED_AFTER_S)
        )
        stored = "the core" if self._core else "all"
        if self._core:
            report.changes = await cluster.deployments.apply(found, only=self._core)
        else:
            report.changes = await cluster.deployments.apply(found, prune=self._prune)
        if not is_formed and not await self._until(PhaseName.CLUSTER, self._formed, began=began):
            raise self._late(PhaseName.CLUSTER, "The cluster is not formed", stored=stored)
        if not await self._until(PhaseName.SERVICES, self._services):
            raise self._late(PhaseName.SERVICES, "The core services are not ready", stored=stored)
        if self._core:
            changes = await cluster.deployments.apply(found, prune=self._prune)
            report.changes += [
                item
                for item in changes
                if item.name not in self._core or item.kind is not ChangeKind.SAME
            ]
        self._names += [item.name for item in report.changes if item.kind is ChangeKind.REMOVED]
        await self._agents()
        if not await self._until(PhaseName.HEALTH, self._health):
            raise self._late(PhaseName.HEALTH, "Not every agent was found healthy")
        return report

    # ---- phases -----------------------------------------------------------------

    async def _formed(self) -> tuple[bool, str]:
        nodes = await self._cluster.nodes.list()
        leader = await self._cluster.leader()
        up = [node for node in nodes if node.status == NodeStatus.UP]
        text = f"{_count(len(up), 'node')} up"
        if len(up) < self._min_nodes:
            text += f" of the {self._min_nodes} that are asked for"
        others = Counter(str(node.status) for node in nodes if node.status != NodeStatus.UP)
        text += "".join(f", {count} {word}" for word, count in sorted(others.items()))
        text += f", {leader.holder} leads" if leader is not None else ", nobody leads yet"
        return len(up) >= max(1, self._min_nodes) and leader is not None, text

    async def _services(self) -> tuple[bool, str]:
        if not self._found:  # looked at once: what is waited for longer is the core
            is_there, text = await self._platform()
            if not is_there or not self._core:
                return is_there, text
            self._found = text
        is_there, text = await self._core_runs()
        return is_there, f"{self._found}, core: {text}"

    async def _platform(self) -> tuple[bool, str]:
        cluster = self._cluster
        missing = [
            item.stream
            for item in await assets.drift(cluster.bus, cluster.config)
            if item.setting == "exists"
        ]
        if missing:
            return False, f"missing: {', '.join(missing)}"
        registry = await cluster._open_registry()
        name = f"{cluster.subjects.routes_stream}.{assets.EXPANDER}"
        router = await api(cluster.bus, "CONSUMER.INFO", name)
        if not (router.get("num_waiting") or router.get("num_ack_pending")):
            return False, "no node serves the router yet"
        return True, f"streams there, registry read ({len(registry.all())} agents), router served"

    async def _core_runs(self) -> tuple[bool, str]:
        cluster = self._cluster
        wishes = (await cluster._open_desired()).all()
        restarting = [item.name for item in self.report.changes if item.restarts]
        statuses = []
        for name, held in (await self._held(wishes)).items():
            if name in self._core:
                statuses.append(deployment_status(wishes[name], held))
                if name in restarting:
                    cluster.deployments._check_rollout(rollout_of(wishes[name], ()))
        if statuses != self.report.statuses:
            self.report.statuses = statuses
            self._tell()
        is_core_there = len(statuses) == len(self._core) and all(item.settled for item in statuses)
        return is_core_there, _running(statuses)

    async def _agents(self) -> None:
        phase = self._begin(PhaseName.AGENTS)
        began = monotonic()
        restarting = [change.name for change in self.report.changes if change.restarts]

        def on_progress(statuses: list[DeploymentStatus]) -> None:
            self.report.statuses = statuses
            phase.text = _running(statuses)
            self._tell()

        self.report.statuses = await self._cluster.deployments.wait_settled(
            self._names,
            timeout=max(_LEAST_S, self._deadline - began),
            on_progress=on_progress,
            changed=restarting,
        )
        held = await self._held(await self._cluster.deployments.wishes())
        nodes = Counter(
            item.record.node
            for items in held.values()
            for item in items
            if item.record.node and item.record.status in _RUNNING
        )
        shown = [f"{node} {count}" for node, count in sorted(nodes.items())[:_NODES_NAMED_MAX]]
        more = len(nodes) - len(shown)
        phase.text = _running(self.report.statuses)
        if shown:
            phase.text += f": {', '.join(shown)}{f' and {more} nodes more' if more > 0 else ''}"
        self._pass(phase, began)

    async def _health(self) -> tuple[bool, str]:
        """Whether the workers hold what the registry says, asked of the nodes themselves."""
        wishes = await self._cluster.deployments.wishes()
        by_name = await self._held(wishes)
        self.report.statuses = [deployment_status(wishes[name], by_name[name]) for name in by_name]
        if not all(status.settled for status in self.report.statuses):
            # A node has died since; a record that says so may come late, its answer doesn't.
            return False, _running(self.report.statuses)
        names = list(by_name)
        wanted = Counter(
            (item.record.node, name)
            for name, items in by_name.items()
            for item in items
            if item.record.status is AgentStatus.RUNNING and item.record.node is not None
        )
        nodes = sorted({node for node, _ in wanted})
        replies = await asyncio.gather(*(self._measure(node, names) for node in nodes))
        held = 0
        for node, reply in zip(nodes, replies, strict=True):
            if reply is None:
                return False, f"{node} does not answer"
            for (where, name), count in wanted.items():
                found = reply.deployments.get(name)
                if where == node and (found is None or found.agents < count):
                    has = 0 if found is None else found.agents
                    return False, f"{node} holds {has} of {count} agents of {name}"
                held += count if where == node else 0
        return True, f"{_count(held, 'agent')} ready, as {_count(len(nodes), 'node')} confirmed"

    async def _measure(self, node: str, names: list[str]) -> MeasureReply | None:
        cluster = self._cluster
        subject = cluster.subjects.control_node(node, "measure")
        try:
            return await rpc.call(
                cluster.bus,
                subject,
                MeasureRequest(deployments=names),
                MeasureReply,
                timeout=_ASK_S,
            )
        except FoundationError:
            return None

    async def _held(self, wishes: Mapping[str, Deployment]) -> dict[str, list[Held]]:
        """The records of what was deployed and is still wished for, by deployment."""
        registry = await self._cluster._open_registry()
        found: dict[str, list[Held]] = {name: [] for name in self._names if name in wishes}
        for item in registry.all().values():
            owner = item.record.deployment or item.record.id
            if owner in found:
                found[owner].append(item)
        return found

    # ---- going on ---------------------------------------------------------------

    async def _until(
        self,
        name: PhaseName,
        check: Check,
        deadline: float | None = None,
        *,
        began: float | None = None,
    ) -> bool:
        phase = self._begin(name)
        began = monotonic() if began is None else began
        limit = max(self._deadline, began + _LEAST_S) if deadline is None else deadline
        while True:
            try:
                is_passed, text = await check()
            except BusError as error:
                if monotonic() >= limit:
                    raise
                is_passed, text = False, error.message
            if text != phase.text:
                phase.text = text
                self._tell()
            if is_passed:
                self._pass(phase, began)
                return True
            if monotonic() >= limit:
                return False
            await asyncio.sleep(_POLL_S)

    def _begin(self, name: PhaseName) -> Phase:
        phase = self.report.phase(name)
        phase.state = PhaseState.UNDER_WAY
        self._tell()
        return phase

    def _pass(self, phase: Phase, began: float) -> None:
        phase.state, phase.ms = PhaseState.PASSED, round((monotonic() - began) * 1000, 1)
        self._tell()

    def _tell(self) -> None:
        if self._watcher is not None:
            self._watcher(self.report)

    def _late(self, name: PhaseName, what: str, *, stored: str = "all") -> NotSettledError:
        hints = {
            PhaseName.CLUSTER: "Start a node with `foundation node start`, and see `foundation nodes`.",
            PhaseName.SERVICES: "`foundation doctor` tells more.",
        }
        stands = {
            "nothing": "Nothing was stored: deploy again once the nodes are there. ",
            "the core": "The wish for the core stands, and the cluster goes on trying; of the rest "
            "nothing was stored: deploy again. ",
        }
        reasons = {
            agent: why
            for status in self.report.statuses
            for agent, why in status.reasons.items()
            if not status.settled
        }
        return NotSettledError(
            f"{what} after {self._timeout:g} s: {self.report.phase(name).text}.",
            hint=stands.get(stored, "The wish stands, and the cluster goes on trying. ")
            + hints.get(name, "`foundation status` shows it."),
            reasons=reasons,
        )


_RUNNING = (AgentStatus.RUNNING, AgentStatus.MOVING)


def _running(statuses: Sequence[DeploymentStatus]) -> str:
    done = sum(status.running for status in statuses)
    return f"{done} of {sum(status.desired for status in statuses)} running"


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


__all__ = ["DeployReport", "Deploying", "Phase", "PhaseName", "PhaseState"]
