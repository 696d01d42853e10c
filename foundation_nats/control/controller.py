"""Composes election and reconciler: whoever is elected makes the wishes true and answers for the nodes.

Every member runs one; all but the leader's wait. Nothing here must be carried
from one leader to the next: wishes, records and the lease are in buckets.
"""

from __future__ import annotations

from collections.abc import Callable

from foundation_nats.base.clock import monotonic
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster.ledgers import Ledgers
from foundation_nats.cluster.membership import Membership
from foundation_nats.cluster.registry import Registry
from foundation_nats.config import Config
from foundation_nats.consensus.election import Election
from foundation_nats.control.autoscaler import Autoscaler
from foundation_nats.control.desired import Desired
from foundation_nats.control.herald import Herald
from foundation_nats.control.kin_keeper import KinKeeper
from foundation_nats.control.mover import Mover
from foundation_nats.control.reclaimer import Reclaimer
from foundation_nats.control.reconciler import Reconciler
from foundation_nats.control.upkeep import Upkeep
from foundation_schemas import LeaseRecord

_ECHO_SHARE = 0.8
_ECHO_MARGIN_S = 1.0


class Controller:
    """The control plane of one node; `membership` has joined and `registry` is open before."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        config: Config,
        membership: Membership,
        registry: Registry,
        *,
        eligible: bool = True,
        on_leading: Callable[[int | None], None] | None = None,
    ) -> None:
        """
        Args:
            eligible: whether this node may lead.
            on_leading: called with the term when this node begins to lead, with None when it ends.
        """
        self._membership = membership
        self._eligible = eligible
        self._on_leading = on_leading
        self.desired = Desired(bus, subjects)
        self.upkeep = Upkeep(bus, subjects)
        self.ledgers = Ledgers(bus, subjects)
        self.reclaimer = Reclaimer(self.ledgers, membership.nodes, membership.emit)
        self.reconciler = Reconciler(
            config, membership, registry, self.desired, self.upkeep, self.ledgers
        )
        self.mover = Mover(
            config.control,
            membership,
            registry,
            self.desired,
            self.upkeep,
            self.reconciler.nodes,
            self.ledgers,
        )
        self.autoscaler = Autoscaler(
            bus, subjects, membership, self.desired, config.control.autoscale_every_s
        )
        self.kin = KinKeeper(bus, subjects, registry, self.desired, membership.node)
        self.herald = Herald(bus, subjects, membership, registry, self.upkeep)
        self.election = Election(
            bus,
            subjects,
            config.lease,
            membership,
            on_elected=self._elected,
            on_lost=self._lost,
        )
        # An echo gives a right of `fence_s`, and nobody may have one from us when the next
        # leader, who takes over after the lease's TTL, declares that node down.
        self._echo_for_s = min(
            config.lease.stop_after_s * _ECHO_SHARE,
            config.lease.ttl_s - config.liveness.fence_s - _ECHO_MARGIN_S,
        )

    # ---- reading ----------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this node believes to lead."""
        return self.election.is_leader

    @property
    def term(self) -> int | None:
        """The term this node leads in; None while it doesn't."""
        return self.election.term

    @property
    def leader(self) -> LeaseRecord | None:
        """Who holds the lease, as last seen."""
        return self.election.leader

    # ---- life -------------------------------------------------------------------

    async def open(self, scope: TaskScope, *, timeout: float = 10.0) -> None:
        """Begin; this node may lead from now on.

        Raises:
            BusTimeoutError, BusUnavailableError: the buckets could not be read.
        """
        await self.desired.open(scope, timeout=timeout)
        await self.upkeep.open(scope, timeout=timeout)
        await self.ledgers.open(scope, timeout=timeout)
        self.reconciler.open(scope)
        self.mover.open(scope)
        self.kin.open(scope)
        self.herald.open(scope)
        scope.start(self.autoscaler.run(), "autoscaler")
        scope.start(self.reclaimer.run(), "reclaimer")
        if self._eligible:
            await self.election.open(scope, timeout=timeout)

    async def close(self) -> None:
        """Give the lease back, so that another node leads at once. Idempotent."""
        if self._eligible:
            await self.election.close()

    def wake(self) -> None:
        """Reconcile soon."""
        self.reconciler.wake()

    # ---- leading ----------------------------------------------------------------

    def _elected(self, term: int) -> None:
        self._membership.set_leading(term, self._may_echo)
        self.reconciler.lead(term)
        self.mover.lead(term)
        self.autoscaler.lead(term)
        self.reclaimer.lead(term)
        self.kin.lead(term)
        self.herald.lead(term)
        if self._on_leading is not None:
            self._on_leading(term)

    def _lost(self, _reason: str) -> None:
        self._membership.set_leading(None)
        self.reconciler.lead(None)
        self.mover.lead(None)
        self.autoscaler.lead(None)
        self.reclaimer.lead(None)
        self.kin.lead(None)
        self.herald.lead(None)
        if self._on_leading is not None:
            self._on_leading(None)

    def _may_echo(self) -> bool:
        renewed_at = self.election.last_renewed_at
        if monotonic() - renewed_at >= self._echo_for_s:
            return False
        # Others may have replaced a leader that stood still or was cut off; only a renewal
        # proves otherwise, and those who wait for an echo should not wait for the next one.
        lagged_at = self._membership.lagged_at
        if lagged_at is None or renewed_at > lagged_at:
            return True
        self.election.doubt()
        return False
