"""What a class declares becomes part of the wish for its agents, as far as the wish doesn't say otherwise.

Pure. A wish says what it was given (`model_fields_set`); what is there by default does not count.
"""

from __future__ import annotations

from foundation_schemas import AgentSpec, ClassInfo, Deployment, PlacementPolicy


def declared(item: Deployment, info: ClassInfo) -> Deployment:
    """*item* with what its class declares.

    Capabilities, labels, resources and subscriptions are joined; `durable = False` and
    `critical = True` of a class hold in any case; placement is joined key by key.
    """
    spec = item.spec
    said = spec.model_fields_set
    update: dict[str, object] = {
        "capabilities": sorted({*spec.capabilities, *info.capabilities}),
        "durable": spec.durable and info.durable,
        "critical": spec.critical or info.critical,
        "labels": {**info.labels, **spec.labels},
        "resources": {**info.resources, **spec.resources},
        "subscribe": [*info.subscribe, *(s for s in spec.subscribe if s not in info.subscribe)],
        "placement": _placement(spec, info),
    }
    for key in ("restart", "restart_limit", "rate", "on_node_loss"):
        found = getattr(info, key)
        if key not in said and found is not None:
            update[key] = found
    return item.model_copy(update={"spec": spec.model_copy(update=update)})


def _placement(spec: AgentSpec, info: ClassInfo) -> PlacementPolicy:
    if info.placement is None:
        return spec.placement
    given = spec.placement
    return info.placement.model_copy(
        update={key: getattr(given, key) for key in given.model_fields_set}
    )
