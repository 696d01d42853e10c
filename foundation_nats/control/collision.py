"""Two deployments that claim the id of one agent.

Pure. ``X`` with replicas stands for ``X-0``, ``X-1`` …, so a single agent named
``X-1`` collides with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from foundation_schemas import Deployment


def find_collision(deployments: Iterable[Deployment]) -> tuple[str, str, str] | None:
    """(agent id, first deployment, second deployment) where two claim one id; None if none do."""
    by_name: dict[str, Deployment] = {}
    for deployment in deployments:
        if deployment.name in by_name:
            return deployment.name, deployment.name, deployment.name
        by_name[deployment.name] = deployment
    for deployment in by_name.values():
        if deployment.replicas is not None:
            continue
        # Only `X-<number>` can be a replica's id: no need to list a million of them.
        match = re.fullmatch(r"(.+)-(0|[1-9]\d*)", deployment.name)
        if match is None:
            continue
        other = by_name.get(match[1])
        if other is not None and other.replicas is not None and int(match[2]) < other.replicas:
            return deployment.name, other.name, deployment.name
    return None
