"""The work that a campaign's cluster does while it is broken."""

from foundation_nats.chaos.workloads.appends import Appends, Fanout, Pipeline, Rings
from foundation_nats.chaos.workloads.bank import Bank
from foundation_nats.chaos.workloads.base import Workload
from foundation_nats.chaos.workloads.churn import Churn, Maintenance
from foundation_nats.chaos.workloads.counters import Counters
from foundation_nats.chaos.workloads.domains import Domains
from foundation_nats.chaos.workloads.families import Families
from foundation_nats.chaos.workloads.locks import Locks
from foundation_nats.chaos.workloads.registers import Drowsy, Keys, Registers
from foundation_nats.chaos.workloads.reservations import Reservations
from foundation_nats.chaos.workloads.steps import Steps
from foundation_nats.chaos.workloads.timers import Timers
from foundation_nats.chaos.workloads.wishes import Wishes

WORKLOADS: dict[str, type[Workload]] = {
    kind.name: kind
    for kind in (
        Appends,
        Counters,
        Bank,
        Pipeline,
        Fanout,
        Registers,
        Keys,
        Locks,
        Churn,
        Maintenance,
        Reservations,
        Timers,
        Steps,
        Domains,
        Wishes,
        Drowsy,
        Rings,
        Families,
    )
}
"""By name."""

__all__ = ["WORKLOADS", "Workload"]
