"""Carries out what `rollouts.decide` says of every rolling deployment, while this node leads.

IO: writes wishes, by compare-and-set. Since when a rollout has not moved is remembered
here, on this process's clock: a new leader gives it the whole deadline anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foundation_nats.base.logs import get_logger
from foundation_nats.cluster.registry import Held, Registry
from foundation_nats.control.desired import Desired
from foundation_nats.control.rollouts import (
    Finish,
    GiveUp,
    RollBack,
    Rollout,
    decide,
    rollout_of,
)
from foundation_nats.control.status import records_of
from foundation_nats.errors import ConflictError, DeploymentNotFoundError
from foundation_schemas import Deployment

_LOOK_AGAIN_S = 0.5


@dataclass(slots=True)
class _Seen:
    """A rollout as it was when it last moved."""

    revision: int
    updated: int
    at: float


class RolloutKeeper:
    """Finishes rollouts, and takes failed ones back."""

    def __init__(self, desired: Desired, registry: Registry, emit: Callable[..., None]) -> None:
        self._desired = desired
        self._registry = registry
        self._emit = emit
        self._seen: dict[str, _Seen] = {}
        self._log = get_logger("rollouts")

    def forget(self) -> None:
        """Somebody else leads, or led meanwhile."""
        self._seen.clear()

    async def look(self, now: float) -> float | None:
        """Decide about everything that rolls; in how many seconds to look again, None: never.

        Raises:
            BusTimeoutError, BusUnavailableError: a wish could not be written.
        """
        rolling = [item for item in self._desired.all().values() if item.rolling]
        for name in self._seen.keys() - {item.name for item in rolling}:
            del self._seen[name]
        for deployment in rolling:
            await self._look_at(deployment, now)
        return _LOOK_AGAIN_S if rolling else None

    async def _look_at(self, deployment: Deployment, now: float) -> None:
        records = records_of(deployment, self._held(deployment))
        rollout = rollout_of(deployment, records)
        seen = self._seen.get(deployment.name)
        moved = (
            seen is None
            or seen.revision != deployment.spec_revision
            or seen.updated != rollout.updated
            or deployment.paused
        )
        if moved or seen is None:
            seen = _Seen(deployment.spec_revision, rollout.updated, now)
            self._seen[deployment.name] = seen
        decision = decide(deployment, rollout, records, idle_s=now - seen.at)
        try:
            match decision:
                case Finish():
                    await self._finish(deployment)
                case RollBack():
                    await self._roll_back(deployment, decision)
                case GiveUp():
                    await self._give_up(deployment, rollout, decision.reason)
                case None:
                    pass
        except (ConflictError, DeploymentNotFoundError):
            pass  # the wish is another one by now: the next pass looks at that

    def _held(self, deployment: Deployment) -> list[Held]:
        if deployment.standalone:
            held = self._registry.get(deployment.name)
            return [] if held is None else [held]
        return self._registry.of_deployment(deployment.name)

    async def _finish(self, deployment: Deployment) -> None:
        revision = deployment.spec_revision

        def finished(current: Deployment) -> Deployment:
            if current.spec_revision != revision:
                return current
            return current.model_copy(update={"rolling": False, "stuck": None})

        await self._desired.change(deployment.name, finished)
        self._emit(
            "deployment",
            "rolled_out",
            f"All agents of {deployment.name} run the spec of revision {revision}.",
            name=deployment.name,
            revision=revision,
        )

    async def _roll_back(self, deployment: Deployment, decision: RollBack) -> None:
        revision = deployment.spec_revision

        def rolled_back(current: Deployment) -> Deployment:
            if current.spec_revision != revision or not current.rolling:
                return current
            return current.model_copy(update={"spec": decision.to.spec})

        reason = f"revision {revision}: {decision.reason}"
        await self._desired.change(deployment.name, rolled_back, failed=reason)
        self._emit(
            "deployment",
            "rolled_back",
            f"{deployment.name} goes back to the spec of revision {decision.to.revision}: "
            f"{decision.reason}.",
            name=deployment.name,
            revision=revision,
            to=decision.to.revision,
            reason=decision.reason,
        )
        self._log.warning("rolled back", deployment=deployment.name, reason=decision.reason)

    async def _give_up(self, deployment: Deployment, rollout: Rollout, reason: str) -> None:
        revision = deployment.spec_revision

        def stuck(current: Deployment) -> Deployment:
            if current.spec_revision != revision or not current.rolling:
                return current
            return current.model_copy(update={"stuck": reason})

        await self._desired.change(deployment.name, stuck)
        self._emit(
            "deployment",
            "stuck",
            f"{deployment.name} does not get to its spec of revision "
            f"{deployment.spec_revision}: {reason}.",
            name=deployment.name,
            revision=deployment.spec_revision,
            reason=reason,
            updated=rollout.updated,
            desired=rollout.desired,
        )
