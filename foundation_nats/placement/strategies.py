"""Which of the nodes that qualify is best: one ranking per strategy, lower is better.

Pure. The rank of a node only gets worse while a pass places agents on it
(except for `pack` and `consistent_hash`), which is what lets `place` keep
nodes in a heap and re-rank only the one on top.

`load_balanced`, the default, ranks by *pressure*::

    pressure = (agents + 1) / workers          records on the node, this pass included
             × (1 + fullest)                   the fullest declared resource, 0 to 1
             × (1 + 2 × max(0, load − 0.5))    load = the larger of cpu and memory share
             × (1 + min(1, lag_ms / 250))      only from 50 ms on: a loop that lags is busy
             ÷ 2 ^ preferred                   per preferred capability that the node offers

The number of agents leads, because heartbeats are half a second old and a
burst of placements is shorter than that: ten thousand agents onto equal nodes
are spread evenly to the agent. Load below one half doesn't count: such a
machine is not slower for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from enum import StrEnum

from foundation_nats.cluster.view import NodeView
from foundation_nats.placement.constraints import Usage
from foundation_schemas import AgentSpec

_LAG_MIN_MS = 50.0
_LAG_FULL_MS = 250.0
_POINTS = 64


class Strategy(StrEnum):
    """How to choose among the nodes that qualify."""

    LOAD_BALANCED = "load_balanced"
    """The least pressure."""
    CAPABILITY_MATCHED = "capability_matched"
    """The most preferred capabilities, then the fewest others, then the least pressure."""
    LEADER_ONLY = "leader_only"
    """The leader's node at the time of placing, or none."""
    RANDOM = "random"
    """Any, each as likely."""
    LOCAL_PREFERRED = "local_preferred"
    """Where it ran last, else the leader's node, else the least pressure."""
    SPREAD = "spread"
    """The fewest agents of its deployment, then the least pressure."""
    PACK = "pack"
    """The fullest node that has room."""
    CONSISTENT_HASH = "consistent_hash"
    """By the agent's id on a ring of nodes: it moves only when its own node comes or goes."""


STRATEGIES = tuple(strategy.value for strategy in Strategy)


def base_pressure(spec: AgentSpec, node: NodeView) -> float:
    """The factors of `pressure` that hold for a whole pass."""
    load = node.load
    busy = 1.0 + 2.0 * max(0.0, max(load.cpu, load.memory) - 0.5)
    if load.lag_ms >= _LAG_MIN_MS:
        busy *= 1.0 + min(1.0, load.lag_ms / _LAG_FULL_MS)
    preferred = sum(1 for name in spec.placement.prefer if name in node.record.capabilities)
    workers = max(1, len(node.record.workers))
    return float(busy / (workers * 2**preferred))


def pressure(base: float, node: NodeView, usage: Usage) -> float:
    """How hard one more agent would press on *node*; see the module's text."""
    fullest = 0.0
    for name, offered in node.record.capacity.items():
        if offered > 0:
            fullest = max(fullest, usage.resources.get(name, 0.0) / offered)
    return (usage.agents + 1) * base * (1.0 + fullest)


def match_rank(spec: AgentSpec, node: NodeView) -> tuple[int, int]:
    """For `capability_matched`: a closer match is lower, and a specialist is kept free."""
    offered = set(node.record.capabilities)
    wanted = {*spec.placement.require, *spec.placement.prefer}
    return (-len(offered.intersection(spec.placement.prefer)), len(offered - wanted))


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Ring:
    """A consistent-hash ring of node names."""

    def __init__(self, nodes: Mapping[str, NodeView]) -> None:
        self._points = sorted(
            (_point(f"{name}#{i}"), name) for name in nodes for i in range(_POINTS)
        )
        self._size = len(nodes)

    def walk(self, agent: str) -> Iterator[str]:
        """The nodes in the order in which *agent* prefers them, each once."""
        if not self._points:
            return
        points = self._points
        low, high, wanted = 0, len(points), _point(agent)
        while low < high:
            middle = (low + high) // 2
            if points[middle][0] < wanted:
                low = middle + 1
            else:
                high = middle
        seen: set[str] = set()
        for offset in range(len(points)):
            name = points[(low + offset) % len(points)][1]
            if name not in seen:
                seen.add(name)
                yield name
                if len(seen) == self._size:
                    return
