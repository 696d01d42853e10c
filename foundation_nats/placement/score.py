"""How hard one more agent would press on a node: the documented score of `load_balanced`, and what keeps it calm.

Pure. The score, lower is better::

    pressure = (agents + 1) / workers          records on the node, this pass included
             × (1 + fullest)                   the fullest declared resource, 0 to 1
             × (1 + 2 × max(0, load − 0.5))    load = the larger of cpu and memory share
             × (1 + lag)                       lag = loop lag / 250 ms, at most 1, from 0.2 on
             × (1 + backlog)                   unhandled signals per worker / 1,000, at most 1, from 0.2 on
             ÷ 2 ^ preferred                   per preferred capability that the node offers

The number of agents leads, because heartbeats are half a second old and a
burst of placements is shorter than that: ten thousand agents onto equal nodes
are spread evenly to the agent. Load below one half doesn't count: such a
machine is not slower for it.

What heartbeats say is noisy, and two equal nodes must not take turns at being
the better one. So load counts in steps of 0.1 (`counted`), and a step, once
taken, is kept until what is reported is more than 0.1 away from it, which is
twice as far as rounding alone would let it be: noise of up to 0.05 around any
load changes no step that was taken without it. A node is overloaded from 95 %
of memory on, and until it is below 90 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foundation_nats.cluster.view import NodeView
from foundation_nats.placement.constraints import Usage
from foundation_schemas import AgentSpec

STEP = 0.1
BAND = 0.1
"""How far what is reported may be from the step that counts."""
OVERLOADED = 0.95
"""A node whose memory is used to this share comes last, whatever the strategy.

The processor's share only ranks: it swings between two heartbeats, and a
threshold on it would send a whole deployment to one node.
"""
RELIEVED = 0.90

_LAG_FULL_MS = 250.0
_BACKLOG_FULL = 1000.0
"""Unhandled signals per worker."""
_FROM = 0.2
"""Less lag or backlog than this share doesn't count."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class LoadSteps:
    """A node's load as it counts: each a share in steps of `STEP`."""

    cpu: float = 0.0
    memory: float = 0.0
    lag: float = 0.0
    backlog: float = 0.0
    overloaded: bool = False

    @property
    def busy(self) -> float:
        """The factor that load, lag and backlog make together; 1: none of them counts."""
        factor = 1.0 + 2.0 * max(0.0, max(self.cpu, self.memory) - 0.5)
        for share in (self.lag, self.backlog):
            if share >= _FROM - _ROUNDING:
                factor *= 1.0 + share
        return factor


def _step(share: float, before: float | None) -> float:
    if before is not None and abs(share - before) <= BAND + _ROUNDING:
        return before
    return round(share / STEP) * STEP


def counted(node: NodeView, before: LoadSteps | None = None) -> LoadSteps:
    """The load of *node* as it counts, given how it counted *before*; None: it is new."""
    load = node.load
    workers = max(1, len(node.record.workers))
    lag = min(1.0, load.lag_ms / _LAG_FULL_MS)
    backlog = min(1.0, load.backlog / (_BACKLOG_FULL * workers))
    bound = RELIEVED if before is not None and before.overloaded else OVERLOADED
    return LoadSteps(
        _step(load.cpu, None if before is None else before.cpu),
        _step(load.memory, None if before is None else before.memory),
        _step(lag, None if before is None else before.lag),
        _step(backlog, None if before is None else before.backlog),
        load.memory >= bound,
    )


def remember(
    nodes: Mapping[str, NodeView], before: Mapping[str, tuple[int, LoadSteps]]
) -> dict[str, tuple[int, LoadSteps]]:
    """How the load of each of *nodes* counts now, by incarnation; a new life begins anew."""
    after: dict[str, tuple[int, LoadSteps]] = {}
    for name, node in nodes.items():
        incarnation, steps = before.get(name, (-1, None))
        known = steps if incarnation == node.incarnation else None
        after[name] = (node.incarnation, counted(node, known))
    return after


def base_pressure(spec: AgentSpec, node: NodeView, steps: LoadSteps) -> float:
    """The factors of `pressure` that hold for a whole pass."""
    preferred = sum(1 for name in spec.placement.prefer if name in node.record.capabilities)
    workers = max(1, len(node.record.workers))
    return float(steps.busy / (workers * 2**preferred))


def pressure(base: float, node: NodeView, usage: Usage) -> float:
    """How hard one more agent would press on *node*; see the module's text."""
    fullest = 0.0
    resources = usage.resources
    for name, offered in node.record.capacity.items():
        if offered > 0:
            share = resources.get(name, 0.0) / offered
            if share > fullest:
                fullest = share
    return (usage.agents + 1) * base * (1.0 + fullest)
