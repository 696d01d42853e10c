"""`cluster.deployments`: what shall run, and whether it does."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from foundation_nats.api.moves import RebalanceReport
from foundation_nats.base.clock import monotonic
from foundation_nats.bus import rpc
from foundation_nats.bus.kv import Bucket
from foundation_nats.cluster.registry import Held
from foundation_nats.control.declaring import declared
from foundation_nats.control.desired import Desired
from foundation_nats.control.diff import DeploymentChange, Preview, dropped, preview
from foundation_nats.control.rollouts import Phase, Rollout, rollout_of, target_of
from foundation_nats.control.status import deployment_status, records_of
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    ConfigError,
    DeploymentNotFoundError,
    NoRespondersError,
    NotSettledError,
    RolloutFailedError,
)
from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    ClassInfo,
    Deployment,
    DeploymentStatus,
    NodeStatus,
    Revision,
    ValidateReply,
    ValidateRequest,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.api.deploying import DeployReport
    from foundation_nats.control.manifest import Manifest

    Wished = Sequence[Deployment] | Path | str | Manifest

_DESCRIBE_TIMEOUT_S = 25.0
_DESCRIBE_RETRY_S = 0.05

Progress = Callable[[list[DeploymentStatus]], None]


class Deployments:
    """The wishes of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._agents = Bucket(cluster.bus, cluster.subjects, "agents")
        self._bucket = Bucket(cluster.bus, cluster.subjects, "desired")

    def read(self, wished: Wished) -> list[Deployment]:
        """Deployments as they are, or from a manifest's path or text.

        Raises:
            ManifestError: the manifest is wrong; says what and where.
        """
        return self.manifest(wished).deployments

    def manifest(self, wished: Wished) -> Manifest:
        """The same, with what a manifest says of the cluster.

        Raises:
            ManifestError: the manifest is wrong; says what and where.
        """
        # The YAML parser is needed for this alone.
        from foundation_nats.control import manifest

        if isinstance(wished, manifest.Manifest):
            return wished
        if isinstance(wished, Path):
            return manifest.load_manifest(wished)
        if isinstance(wished, str):
            return manifest.parse_manifest(wished)
        return manifest.Manifest(list(wished))

    async def wishes(self) -> dict[str, Deployment]:
        """What is wished for now, by name."""
        entries = await self._bucket.read_all()
        return {
            name: rpc.decode(Deployment, entry.value)
            for name, entry in entries.items()
            if entry.value is not None
        }

    async def apply(
        self,
        wished: Wished,
        *,
        validate: bool = True,
        prune: bool = False,
        only: Collection[str] | None = None,
    ) -> list[DeploymentChange]:
        """Store wishes; the cluster makes them true. Idempotent.

        It waits for nothing: neither for ``min_nodes`` nor for what is ``tier: core``.

        With *validate* a node imports each class first, and what the class
        declares (capabilities, durable, critical) becomes part of the wish. If
        no node is up, the wish is stored unchecked.

        With *prune* what the same manifest had applied and doesn't name any more is deleted, as by
        `delete`. A manifest's name tells it from others; deployments of a program and of texts
        without a name count as one. Single agents that were started by themselves
        (`agents.start`, `ctx.spawn`) stay.

        Args:
            only: store no others than these, and delete nothing; all of *wished* is checked.

        Raises:
            ManifestError, ConfigError: wrong; nothing was stored.
            BusUnavailableError, BusTimeoutError
        """
        found = self.manifest(wished)
        deployments = found.deployments
        if validate:
            deployments = await self._validated(deployments)
        desired = await self._desired()
        return await desired.apply(deployments, prune=found.owners if prune else (), only=only)

    async def deploy(
        self,
        wished: Wished,
        *,
        timeout: float = 30.0,
        prune: bool = False,
        min_nodes: int | None = None,
        on_progress: Callable[[DeployReport], None] | None = None,
    ) -> DeployReport:
        """`apply`, and wait until every phase has passed: cluster, services, agents, health.

        What is ``tier: core`` is stored first; the rest, and what *prune* deletes, once that runs.

        Args:
            min_nodes: wait until so many nodes are up before anything is stored; None: as many as
                the manifest says.
            prune: delete what the same manifest had applied and doesn't name any more, see `apply`,
                and wait until its agents have ended, too.
            on_progress: called with the report whenever something has changed in it.

        Raises:
            ManifestError, ConfigError: wrong; nothing was stored.
            NotSettledError: a phase did not pass in time; ``details["phases"]`` tells of all.
            RolloutFailedError: a changed spec was rolled back, or is stuck.
            BusUnavailableError, BusTimeoutError
        """
        from foundation_nats.api.deploying import Deploying

        found = self.manifest(wished)
        wanted = found.min_nodes if min_nodes is None else min_nodes
        deploying = Deploying(self._cluster, timeout, on_progress, prune=prune, min_nodes=wanted)
        return await deploying.run(found)

    async def _desired(self) -> Desired:
        return await self._cluster._open_desired()

    async def _validated(self, deployments: list[Deployment]) -> list[Deployment]:
        runs = sorted({item.spec.run for item in deployments})
        infos = await self.describe(runs)
        if infos is None:
            return deployments
        wrong = [info.error or f"{info.run} can't run" for info in infos.values() if not info.ok]
        if wrong:
            raise ConfigError("; ".join(wrong))
        return [declared(item, infos[item.spec.run]) for item in deployments]

    async def describe(self, runs: builtins.list[str]) -> dict[str, ClassInfo] | None:
        """What is behind each ``module:Class``, by the first node that answers; None if none does."""
        deadline = monotonic() + _DESCRIBE_TIMEOUT_S
        while True:
            nodes = [n.name for n in await self._cluster.nodes.list() if n.status == NodeStatus.UP]
            busy = False
            for node in nodes:
                try:
                    reply = await rpc.call(
                        self._cluster.bus,
                        self._cluster.subjects.control_node(node, "validate"),
                        ValidateRequest(runs=runs),
                        ValidateReply,
                        timeout=max(1.0, deadline - monotonic()),
                    )
                except (NoRespondersError, BusTimeoutError):
                    continue
                except BusUnavailableError:  # its workers are being started (again)
                    busy = True
                    continue
                return {info.run: info for info in reply.classes}
            if not busy or monotonic() >= deadline:
                return None
            await asyncio.sleep(_DESCRIBE_RETRY_S)

    async def plan(self, wished: Wished, *, prune: bool = False) -> Preview:
        """What `apply` would change, and on which node each agent would start, restart or leave."""
        found = self.manifest(wished)
        deployments = await self._validated(found.deployments)
        nodes = await self._cluster.nodes.views()
        leader = await self._cluster.nodes.leader()
        wishes = await self.wishes()
        seen = preview(
            wishes,
            deployments,
            await self._held(),
            nodes,
            self._cluster.config.control,
            prune=found.owners if prune else (),
            min_nodes=found.min_nodes,
            leader=None if leader is None else leader.holder,
            reservations=await self._cluster.resources.reservations(nodes),
        )
        if prune:
            return seen
        return replace(seen, dropped=tuple(dropped(wishes, deployments, found.owners)))

    async def _held(self) -> Mapping[str, Held]:
        entries = await self._agents.read_all()
        return {
            agent: Held(rpc.decode(AgentRecord, entry.value), entry.revision)
            for agent, entry in entries.items()
            if entry.value is not None
        }

    async def scale(self, name: str, replicas: int) -> Deployment:
        """Want *replicas* agents; the highest ordinals leave first and keep their state.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            ConfigError: the deployment scales itself (``autoscale``), and not as far as that.
            ConflictError: it is a single agent, or is being changed by others.
        """
        return await (await self._desired()).scale(name, replicas)

    async def delete(self, name: str) -> None:
        """Want none of it any more; the agents stop in good order, their state is kept.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        await (await self._desired()).delete(name)

    async def purge(self, name: str) -> builtins.list[str]:
        """Delete state and mailboxes of agents that it had and doesn't want any more; their ids.

        After `scale` to fewer, or `delete`, once the agents have ended (`wait_settled`).

        Raises:
            NotSettledError: a node may still run some of them; nothing was deleted.
            BusUnavailableError, BusTimeoutError: some may have been deleted; purge again.
        """
        from foundation_nats.api.purging import purge

        return await purge(self._cluster, name)

    async def rollout(self, name: str) -> Rollout:
        """How far the deployment's agents have come to its present spec.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        wish = (await self.wishes()).get(name)
        if wish is None:
            raise self._unknown(name)
        return rollout_of(wish, records_of(wish, (await self._held()).values()))

    async def history(self, name: str) -> builtins.list[Revision]:
        """The earlier specs that are remembered, the last one last.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        wish = (await self.wishes()).get(name)
        if wish is None:
            raise self._unknown(name)
        return builtins.list(wish.history)

    async def rebalance(
        self, strategy: str = "even_distribution", *, max_moves: int | None = None
    ) -> RebalanceReport:
        """`Cluster.rebalance`."""
        return await self._cluster.rebalance(strategy, max_moves=max_moves)

    async def pause(self, name: str) -> Deployment:
        """Restart no further agent for a changed spec, until `resume`.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        return await self._set_paused(name, True)

    async def resume(self, name: str) -> Deployment:
        """Go on with a paused rollout.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        return await self._set_paused(name, False)

    async def _set_paused(self, name: str, paused: bool) -> Deployment:
        desired = await self._desired()
        return await desired.change(name, lambda wish: wish.model_copy(update={"paused": paused}))

    async def undo(self, name: str, *, to: int | None = None) -> Deployment:
        """Wish for an earlier spec again: that of revision *to*, or the newest that had not failed.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            ConfigError: there is no such revision, or nothing to go back to.
        """
        desired = await self._desired()

        def undone(wish: Deployment) -> Deployment:
            target = target_of(wish, to)
            if target is None:
                known = ", ".join(str(item.revision) for item in wish.history) or "none"
                raise ConfigError(
                    f"{name} has no earlier spec to go back to."
                    if to is None
                    else f"{name} remembers no revision {to}.",
                    hint=f"Remembered: {known}.",
                )
            return wish.model_copy(update={"spec": target.spec})

        return await desired.change(name, undone)

    async def wait_rollout(self, name: str, *, timeout: float) -> Rollout:
        """Wait until every agent runs the present spec.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
            RolloutFailedError: it is stuck, or was rolled back meanwhile or before.
            NotSettledError: not in time; it goes on.
        """
        deadline = monotonic() + timeout
        while True:
            found = await self.rollout(name)
            self._check_rollout(found)
            if found.phase is Phase.COMPLETE:
                return found
            if monotonic() >= deadline:
                raise NotSettledError(
                    f"{found.updated} of {found.desired} agents of {name} run the spec of "
                    f"revision {found.revision} after {timeout:g} s.",
                    hint=f"It goes on: `foundation rollout status {name}` shows it.",
                    reasons=found.failing,
                )
            await asyncio.sleep(0.1)

    def _check_rollout(self, found: Rollout) -> None:
        if found.rolled_back is not None:
            raise RolloutFailedError(
                f"{found.name} was rolled back: {found.rolled_back}.",
                hint=f"`foundation rollout history {found.name}` shows the spec that failed.",
                rolled_back=True,
            )
        if found.stuck is not None:
            raise RolloutFailedError(
                f"{found.name} is stuck: {found.stuck}.",
                hint="Apply a spec that works, or `foundation rollout undo` to an earlier one.",
                rolled_back=False,
            )

    def _unknown(self, name: str) -> DeploymentNotFoundError:
        return DeploymentNotFoundError(
            f"There is no deployment {name!r}.", hint="`foundation deployments` lists them."
        )

    async def list(self) -> builtins.list[DeploymentStatus]:
        """Wish and fact of every deployment, by name; single agents included."""
        wishes = await self.wishes()
        held = (await self._held()).values()
        by_name: dict[str, builtins.list[Held]] = {}
        for item in held:
            by_name.setdefault(item.record.deployment or item.record.id, []).append(item)
        return [deployment_status(wishes[name], by_name.get(name, [])) for name in sorted(wishes)]

    async def status(self, name: str) -> DeploymentStatus:
        """Wish and fact of one deployment.

        Raises:
            DeploymentNotFoundError: there is no such deployment.
        """
        for status in await self.list():
            if status.name == name:
                return status
        raise self._unknown(name)

    async def wait_settled(
        self,
        names: Sequence[str],
        *,
        timeout: float,
        on_progress: Progress | None = None,
        changed: Collection[str] = (),
    ) -> builtins.list[DeploymentStatus]:
        """Wait until every wished agent of *names* runs, and none is left over.

        A name that is no longer wished for is settled when its agents are gone.

        Args:
            changed: those of *names* whose spec was just changed: to be rolled back is an error.

        Raises:
            RolloutFailedError: one of *changed* was rolled back, or is stuck.
            NotSettledError: not in time; `details["reasons"]` says why, per agent.
        """
        registry = await self._cluster._open_registry()
        deadline = monotonic() + timeout
        shown: builtins.list[DeploymentStatus] | None = None
        while True:
            wishes = (await self._desired()).all()
            statuses = []
            left = 0
            by_name: dict[str, builtins.list[Held]] = {name: [] for name in names}
            for held in registry.all().values():
                owner = held.record.deployment or held.record.id
                if owner in by_name:
                    by_name[owner].append(held)
            for name in names:
                wish = wishes.get(name)
                if wish is not None:
                    statuses.append(deployment_status(wish, by_name[name]))
                else:
                    left += sum(
                        held.record.status is not AgentStatus.STOPPED for held in by_name[name]
                    )
            if on_progress is not None and statuses != shown:
                on_progress(statuses)
                shown = statuses
            for name in changed:
                if (wish := wishes.get(name)) is not None:
                    self._check_rollout(rollout_of(wish, ()))
            if left == 0 and all(status.settled for status in statuses):
                return statuses
            if monotonic() >= deadline:
                raise self._late(statuses, left, timeout)
            await asyncio.sleep(0.02)

    def _late(
        self, statuses: builtins.list[DeploymentStatus], left: int, timeout: float
    ) -> NotSettledError:
        reasons = {agent: why for status in statuses for agent, why in status.reasons.items()}
        open_count = sum(status.desired - status.running for status in statuses) + left
        first = "; ".join(f"{agent}: {why}" for agent, why in list(reasons.items())[:5])
        return NotSettledError(
            f"{open_count} agents are not as wished after {round(timeout, 1):g} s."
            + (f" {first}." if first else ""),
            hint="The wish stands, and the cluster goes on trying: `foundation status` shows it.",
            reasons=reasons,
        )
