"""Who receives a signal for many: the registry's records that a route stands for, and one of several.

Pure. Everybody who shall run counts, running or not, also while it is stopped to be moved or
changed: mail waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b

from foundation_nats.cluster.registry import Held, Registry
from foundation_schemas import (
    AgentRecord,
    AgentStatus,
    SubscriptionMode,
    TargetKind,
    matches_topic,
)
from foundation_schemas.label import parse_expression

_RANK = {AgentStatus.RUNNING: 0, AgentStatus.STARTING: 1, AgentStatus.MOVING: 1}

_GIVEN_HALF_S = 5.0
_GIVEN_MAX = 10_000

LoadOf = Callable[[AgentRecord], float]
"""How much an agent has to do; lower is better."""


class Given:
    """How much was given to each agent lately, by whoever keeps this: what it has not shown yet."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float]] = {}

    def add(self, agent: str, now: float) -> None:
        """One more."""
        if len(self._known) >= _GIVEN_MAX:
            self._known.clear()
        self._known[agent] = now, self.lately(agent, now) + 1.0

    def lately(self, agent: str, now: float) -> float:
        """How many; of those of five seconds ago, half."""
        at, count = self._known.get(agent, (now, 0.0))
        return float(count * 0.5 ** ((now - at) / _GIVEN_HALF_S))


def receivers(registry: Registry, kind: str, name: str) -> list[Held]:
    """The records that a route stands for now, by id; topics have `subscribers`."""
    if kind == TargetKind.EVERYONE:
        found = sorted(registry.all().values(), key=lambda held: held.record.id)
    elif kind == TargetKind.DEPLOYMENT:
        found = registry.of_deployment(name)
    elif kind in (TargetKind.CAPABILITY, TargetKind.ANY):
        found = registry.providing(name)
    elif kind == TargetKind.LABEL:
        found = selected(registry.all(), name)
    else:
        found = []
    return [held for held in found if held.record.is_wanted]


def selected(records: Mapping[str, Held], expressions: str) -> list[Held]:
    """Those whose labels satisfy every one of *expressions*, which ``;`` separates; by id.

    Nobody satisfies what is no expression: a route may hold anything.
    """
    try:
        wanted = [parse_expression(text) for text in expressions.split(";")]
    except ValueError:
        return []
    found = [
        held
        for held in records.values()
        if all(expression.matches(held.record.spec.labels) for expression in wanted)
    ]
    return sorted(found, key=lambda held: held.record.id)


def subscribers(
    records: Iterable[Held], topic: str
) -> tuple[dict[str, Held], dict[str, list[Held]]]:
    """Who gets a signal on *topic*: each of the first by id, and one of each group of the second."""
    each: dict[str, Held] = {}
    groups: dict[str, list[Held]] = {}
    for held in records:
        record = held.record
        if not record.is_wanted:
            continue
        joined: set[str] = set()
        for subscription in record.spec.subscribe:
            if not matches_topic(subscription.topic, topic):
                continue
            if subscription.mode is SubscriptionMode.ALL:
                each[record.id] = held
            else:
                joined.add(subscription.group or record.deployment or record.id)
        for group in joined:
            groups.setdefault(group, []).append(held)
    return each, groups


def pick(candidates: list[Held], key: str, load_of: LoadOf = lambda record: 0.0) -> str:
    """One of *candidates* for *key*: a running one if there is, the least loaded of them.

    Equals are told apart by highest random weight, so that two who pick agree.
    """

    def weight(held: Held) -> tuple[int, float, bytes]:
        record = held.record
        rank = _RANK.get(record.status, 2)
        digest = blake2b(f"{key}\n{record.id}".encode(), digest_size=8).digest()
        return rank, load_of(record), digest

    return min(candidates, key=weight).record.id
