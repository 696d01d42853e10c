"""How far a deployment's wish is true, for people and for `--wait`.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from foundation_nats.cluster.registry import Held
from foundation_schemas import AgentRecord, AgentStatus, Deployment, DeploymentStatus

REASONS_MAX = 20


def records_of(deployment: Deployment, held: Iterable[Held]) -> list[AgentRecord]:
    """The records that belong to *deployment*, leftovers of an earlier size included."""
    if deployment.standalone:
        return [item.record for item in held if item.record.id == deployment.name]
    return [item.record for item in held if item.record.deployment == deployment.name]


def deployment_status(deployment: Deployment, held: Iterable[Held]) -> DeploymentStatus:
    """Wish and fact side by side; *held* may be the whole registry."""
    wanted = dict.fromkeys(deployment.agent_ids(), False)
    digest = deployment.spec.digest()
    running = pending = failed = other = updated = 0
    is_settled = True
    reasons: dict[str, str] = {}
    for record in records_of(deployment, held):
        if record.id not in wanted:
            is_settled = False
            other += 1
            continue
        wanted[record.id] = True
        finished = record.status is AgentStatus.STOPPED and deployment.spec.restart != "permanent"
        match record.status:
            case AgentStatus.RUNNING:
                running += 1
            case AgentStatus.PENDING | AgentStatus.STARTING:
                pending += 1
            case AgentStatus.FAILED:
                failed += 1
            case _:
                other += 1
        if record.status is AgentStatus.RUNNING and record.digest == digest:
            updated += record.desired == "run"
        at_rest = record.status in (AgentStatus.RUNNING, AgentStatus.HIBERNATED) or finished
        if not at_rest or record.digest != digest or record.desired != "run":
            is_settled = False
        if not at_rest and len(reasons) < REASONS_MAX:
            reasons[record.id] = record.reason or f"is {record.status}"
    for agent, is_known in wanted.items():
        if not is_known:
            is_settled = False
            pending += 1
            if len(reasons) < REASONS_MAX:
                reasons[agent] = "not placed yet"
    return DeploymentStatus(
        name=deployment.name,
        run=deployment.spec.run,
        desired=deployment.size(),
        running=running,
        pending=pending,
        failed=failed,
        other=other,
        revision=deployment.revision,
        critical=deployment.spec.critical,
        settled=is_settled,
        reasons=reasons,
        updated=updated,
        rolling=deployment.rolling,
        paused=deployment.paused,
        stuck=deployment.stuck,
        rolled_back=deployment.rolled_back,
        autoscale=deployment.autoscale,
        manifest=deployment.manifest,
    )
