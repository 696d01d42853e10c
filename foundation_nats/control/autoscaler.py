"""Scales deployments that wish it, while this node leads: measures, recommends, writes the wish.

IO: asks every node that is up what its agents have to do (`measure`), and changes
`replicas` by compare-and-set. A new leader begins its cool-downs anew. While some node
does not answer, nothing is scaled down: its part of the work is not known.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

from foundation_nats.base.clock import monotonic
from foundation_nats.base.logs import get_logger
from foundation_nats.bus import rpc
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.membership import Membership
from foundation_nats.control.autoscale import Sample, Stabilizer, recommend
from foundation_nats.control.desired import Desired
from foundation_nats.errors import FoundationError
from foundation_schemas import Deployment, MeasureReply, MeasureRequest, NodeStatus

_ASK_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Sum:
    agents: int = 0
    backlog: int = 0
    cpu: list[float] = field(default_factory=list)
    gauges: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def sample(self) -> Sample:
        return Sample(
            replicas=self.agents,
            backlog=float(self.backlog),
            cpu=sum(self.cpu) / len(self.cpu) if self.cpu else None,
            gauges={name: sum(found) / len(found) for name, found in self.gauges.items()},
        )


class Autoscaler:
    """The leader's second loop."""

    def __init__(
        self, bus: Bus, subjects: Subjects, membership: Membership, desired: Desired, every_s: float
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._membership = membership
        self._desired = desired
        self._every_s = every_s
        self._term: int | None = None
        self._stabilizers: dict[str, Stabilizer] = {}
        self._log = get_logger("autoscaler")

    def lead(self, term: int | None) -> None:
        """Work in this term; None: stop."""
        self._term = term
        self._stabilizers.clear()

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            wishes = [
                wish
                for wish in self._desired.all().values()
                if wish.autoscale is not None and not wish.rolling
            ]
            if self._term is None or not wishes:
                continue
            try:
                await self._look(wishes)
            except FoundationError as error:
                self._log.warning("scaling put off", error=str(error))

    async def _look(self, wishes: list[Deployment]) -> None:
        term = self._term
        sums, is_complete = await self._measure([wish.name for wish in wishes])
        now = monotonic()
        for wish in wishes:
            assert wish.autoscale is not None
            assert wish.replicas is not None
            current = wish.replicas
            found = recommend(wish.autoscale, sums[wish.name].sample(), current)
            if found is None or self._term != term:
                continue
            stabilizer = self._stabilizers.setdefault(wish.name, Stabilizer())
            to = stabilizer.settle(now, found, current, wish.autoscale.cooldown_s)
            if to is None or to.replicas == current:
                continue
            if to.replicas < current and not is_complete:
                continue
            await self._desired.scale(wish.name, to.replicas, why=f"autoscale: {to.why}")
            self._log.info(
                "scaled", deployment=wish.name, before=current, after=to.replicas, why=to.why
            )

    async def _measure(self, deployments: list[str]) -> tuple[dict[str, _Sum], bool]:
        """What every deployment has to do, and whether every node has answered."""
        names = [
            name
            for name, view in self._membership.nodes().items()
            if view.status is not NodeStatus.DOWN
        ]
        request = MeasureRequest(deployments=deployments)
        replies = await asyncio.gather(*(self._ask(name, request) for name in names))
        sums: dict[str, _Sum] = defaultdict(_Sum)
        for reply in replies:
            if reply is None:
                continue
            for name, part in reply.deployments.items():
                total = sums[name]
                total.agents += part.agents
                total.backlog += part.backlog
                # A node counts as often as it hosts.
                total.cpu += [reply.cpu] * part.agents
                for gauge, values in part.gauges.items():
                    total.gauges[gauge] += values
        return sums, None not in replies

    async def _ask(self, node: str, request: MeasureRequest) -> MeasureReply | None:
        subject = self._subjects.control_node(node, "measure")
        try:
            return await rpc.call(self._bus, subject, request, MeasureReply, timeout=_ASK_TIMEOUT_S)
        except FoundationError:
            return None
