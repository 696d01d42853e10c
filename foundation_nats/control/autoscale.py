"""How many replicas a deployment should have by what it has to do.

Pure. For each thing to go by, the number that brings it to its target, as the Kubernetes
Horizontal Pod Autoscaler computes it (``ceil(replicas × value ÷ target)``, nothing within
a tolerance of 10 %); the largest of them counts, within the limits. More replicas are
wanted at once; fewer only when fewer have been enough for the whole cool-down
(its *stabilization window*): the most that was recommended in it stands.

A thing that can't be measured now recommends nothing; if nothing can be measured,
the number stays as it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from foundation_schemas import Autoscale

TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured of a deployment."""

    replicas: int
    """Those that were measured: they run."""
    backlog: float = 0.0
    """Unhandled signals of all of them."""
    cpu: float | None = None
    """Mean share of the cpu of the nodes that host them."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Name to the mean over the replicas that set it."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A number, and what for."""

    replicas: int
    why: str


def recommend(policy: Autoscale, sample: Sample, current: int) -> Recommendation | None:
    """How many replicas bring every measure to its target; None: nothing could be measured."""
    found: list[Recommendation] = []
    running = max(1, sample.replicas)
    if policy.backlog is not None:
        mean = sample.backlog / running
        found.append(
            _by_ratio(current, running, mean / policy.backlog, f"backlog {sample.backlog:g}")
        )
    if policy.cpu is not None and sample.cpu is not None:
        found.append(_by_ratio(current, running, sample.cpu / policy.cpu, f"cpu {sample.cpu:.0%}"))
    if policy.metric is not None and policy.target is not None:
        value = sample.gauges.get(policy.metric)
        if value is not None:
            found.append(
                _by_ratio(current, running, value / policy.target, f"{policy.metric} {value:g}")
            )
    if not found:
        return None
    most = max(found, key=lambda item: item.replicas)
    return Recommendation(min(policy.max, max(policy.min, most.replicas)), most.why)


def _by_ratio(current: int, running: int, ratio: float, why: str) -> Recommendation:
    if abs(ratio - 1) <= TOLERANCE:
        return Recommendation(current, why)
    # A hair above a whole number is rounding, not another replica.
    return Recommendation(math.ceil(running * ratio - 1e-9), why)


class Stabilizer:
    """The recommendations of the cool-down of one deployment."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, Recommendation]] = deque()
        self._since: float | None = None

    def settle(
        self, now: float, found: Recommendation, current: int, cooldown_s: float
    ) -> Recommendation | None:
        """What to scale to now; None: leave it."""
        if self._since is None:
            self._since = now
        self._recent.append((now, found))
        while self._recent and self._recent[0][0] < now - cooldown_s:
            self._recent.popleft()
        if found.replicas > current:
            return found
        most = max((item for _, item in self._recent), key=lambda item: item.replicas)
        if most.replicas >= current or now - self._since < cooldown_s:
            return None
        return most
