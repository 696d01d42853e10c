"""No node's declared capacity is exceeded by what it runs, at any revision of the registry (invariant 9).

An agent that is only ``starting`` is assigned, not yet admitted: of two leaders each may assign
what there is room for once, and the node refuses what is too much (`node.host`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from foundation_nats.chaos.checkers.judgement import Judgement
from foundation_nats.chaos.checkers.records import AssignmentSeen

_HOLDING = frozenset({"running", "moving"})
_ROUNDING = 1e-9


def check_capacity(
    seen: Iterable[AssignmentSeen], capacity: Mapping[str, Mapping[str, float]]
) -> Judgement:
    """Add up what the records name, revision by revision.

    Args:
        seen: registry records in the order of revisions.
        capacity: node to resource to how much it declares; what it doesn't name is unlimited.
    """
    judgement = Judgement("capacity", 9)
    held: dict[str, AssignmentSeen] = {}
    used: defaultdict[tuple[str, int, str], float] = defaultdict(float)
    for now in seen:
        judgement.looked_at += 1
        before = held.pop(now.agent, None)
        if before is not None and before.node is not None:
            for name, amount in before.resources:
                used[before.node, before.incarnation, name] -= amount
        if now.node is None or now.status not in _HOLDING:
            continue
        held[now.agent] = now
        for name, amount in now.resources:
            used[now.node, now.incarnation, name] += amount
            limit = capacity.get(now.node, {}).get(name)
            total = used[now.node, now.incarnation, name]
            if limit is not None and total > limit + _ROUNDING:
                judgement.violated(
                    f"{now.node} holds {total:g} {name} of {limit:g} "
                    f"at revision {now.revision}, with {now.agent}"
                )
    return judgement
