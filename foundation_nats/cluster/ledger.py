"""The books of one node as pure functions: what of its capacity is taken, and what may still be.

Pure. Each function takes a `LedgerRecord` and gives the one that should replace
it, by compare-and-set on what was read (`ledgers.py`); that alone keeps two
writers from taking the same. What holds after every function, if it held
before: no resource is taken beyond the capacity, by agents and reservations
that count together.

A reservation whose time is over doesn't count, whoever looks; the next writer
drops it. `now` is the NATS server's clock (`ledgers.ServerClock`), so that
nobody's own clock decides. A ``slots`` that the node doesn't declare is not
limited; any other resource that it doesn't declare is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from foundation_schemas import LedgerRecord, ReservationRecord, ReservationState

SLOTS = "slots"
RESERVATIONS_MAX = 1000
"""Of one node: the record is one message."""
_ROUNDING = 1e-9
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Entry:
    """An agent that asks for its share."""

    agent: str
    needs: Mapping[str, float]
    reservation: str | None = None
    """What becomes its share, if it still counts."""


def plus(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The sum, resource by resource, without those that come to nothing."""
    names = dict.fromkeys((*one, *other))
    sums = {name: round(one.get(name, 0.0) + other.get(name, 0.0), _DIGITS) for name in names}
    return {name: amount for name, amount in sums.items() if amount}


def minus(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The difference, resource by resource, without those that come to nothing."""
    return plus(one, {name: -amount for name, amount in other.items()})


def limited(needs: Mapping[str, float], capacity: Mapping[str, float]) -> dict[str, float]:
    """The part of *needs* that a node of this capacity keeps books on."""
    return {name: amount for name, amount in needs.items() if amount > 0 and name in capacity}


def is_live(reservation: ReservationRecord, now: float) -> bool:
    """Whether it counts."""
    return reservation.expires_at is None or now < reservation.expires_at


def live(ledger: LedgerRecord, now: float) -> list[ReservationRecord]:
    """The reservations that count, oldest first."""
    return [item for item in ledger.reservations if is_live(item, now)]


def find(ledger: LedgerRecord, id: str, now: float) -> ReservationRecord | None:
    """The reservation of this id, if it counts."""
    return next(
        (item for item in ledger.reservations if item.id == id and is_live(item, now)), None
    )


def reserved(reservations: Iterable[ReservationRecord]) -> dict[str, float]:
    """What these take together."""
    total: dict[str, float] = {}
    for item in reservations:
        total = plus(total, item.needs)
    return total


def taken(ledger: LedgerRecord, now: float) -> dict[str, float]:
    """What agents and reservations take together, of the resources that have a limit."""
    return limited(plus(ledger.agents, reserved(live(ledger, now))), ledger.capacity)


def lacking(needs: Mapping[str, float], capacity: Mapping[str, float]) -> str | None:
    """Why a node of this capacity can't take *needs*, however empty it is; None if it can."""
    for name, amount in needs.items():
        if amount <= 0:
            continue
        offered = capacity.get(name)
        if offered is None:
            if name != SLOTS:
                return f"does not offer {name} (needs {amount:g})"
        elif amount > offered + _ROUNDING:
            return f"offers {offered:g} {name} in all (needs {amount:g})"
    return None


def _full(
    needs: Mapping[str, float], capacity: Mapping[str, float], used: Mapping[str, float]
) -> str | None:
    for name, amount in limited(needs, capacity).items():
        if used.get(name, 0.0) + amount > capacity[name] + _ROUNDING:
            return f"has too little {name} left of {capacity[name]:g} (needs {amount:g})"
    return None


def shortage(ledger: LedgerRecord, needs: Mapping[str, float], now: float) -> str | None:
    """Why the node can't take *needs* now; None if it can."""
    return lacking(needs, ledger.capacity) or _full(needs, ledger.capacity, taken(ledger, now))


# ---- reservations -----------------------------------------------------------------


def expire(ledger: LedgerRecord, now: float) -> LedgerRecord:
    """Without the reservations that don't count; the same object if all do."""
    left = live(ledger, now)
    if len(left) == len(ledger.reservations):
        return ledger
    return ledger.model_copy(update={"reservations": left})


def next_expiry(ledger: LedgerRecord) -> float | None:
    """When the next reservation ends by itself; None: none does."""
    return min(
        (r.expires_at for r in ledger.reservations if r.expires_at is not None), default=None
    )


def reserve(ledger: LedgerRecord, wanted: ReservationRecord, now: float) -> LedgerRecord | str:
    """With one reservation more, or why not; the same reservation again changes nothing."""
    ledger = expire(ledger, now)
    if any(item.id == wanted.id for item in ledger.reservations):
        return ledger
    if len(ledger.reservations) >= RESERVATIONS_MAX:
        return f"has {RESERVATIONS_MAX} reservations already"
    why = shortage(ledger, wanted.needs, now)
    if why is not None:
        return why
    return ledger.model_copy(update={"reservations": [*ledger.reservations, wanted]})


def confirm(
    ledger: LedgerRecord, id: str, now: float, *, expires_at: float | None = None
) -> LedgerRecord | None:
    """With the reservation confirmed until *expires_at* (None: for good); None: it is lost."""
    if find(ledger, id, now) is None:
        return None
    update = {"state": ReservationState.CONFIRMED, "expires_at": expires_at}
    found = [
        item.model_copy(update=update) if item.id == id else item for item in live(ledger, now)
    ]
    return ledger.model_copy(update={"reservations": found})


def release(ledger: LedgerRecord, id: str, now: float) -> LedgerRecord:
    """Without the reservation; without change if it isn't there."""
    ledger = expire(ledger, now)
    left = [item for item in ledger.reservations if item.id != id]
    if len(left) == len(ledger.reservations):
        return ledger
    return ledger.model_copy(update={"reservations": left})


# ---- agents -----------------------------------------------------------------------


def opened(
    ledger: LedgerRecord | None,
    node: str,
    incarnation: int,
    capacity: Mapping[str, float],
    now: float,
) -> LedgerRecord:
    """The books of a life of the node: no agents yet, and the reservations that (still) fit.

    If the node came back smaller, the newest go first, and the confirmed stay longest.
    """
    if ledger is not None and ledger.incarnation == incarnation and ledger.capacity == capacity:
        return expire(ledger, now)
    kept = [] if ledger is None else _fitting(live(ledger, now), capacity, {})
    return LedgerRecord(
        node=node, incarnation=incarnation, capacity=dict(capacity), reservations=kept
    )


def _fitting(
    items: Sequence[ReservationRecord], capacity: Mapping[str, float], used: Mapping[str, float]
) -> list[ReservationRecord]:
    """Those that fit beside *used*, in their order; the confirmed and the older ones first."""
    kept: set[str] = set()
    for item in sorted(items, key=lambda item: item.state is not ReservationState.CONFIRMED):
        if (lacking(item.needs, capacity) or _full(item.needs, capacity, used)) is None:
            used = plus(used, limited(item.needs, capacity))
            kept.add(item.id)
    return [item for item in items if item.id in kept]


def admit(
    ledger: LedgerRecord, base: Mapping[str, float], wanted: Sequence[Entry], now: float
) -> tuple[LedgerRecord, dict[str, str]]:
    """With those of *wanted* that fit, in order; and why the others don't.

    Args:
        base: what the agents take that stay; who left is not in it. All of `agents` is
            replaced, so that doing it again after a lost answer counts nothing twice. They run:
            where a store that went back names reservations beside which they don't fit, those go.
    """
    capacity = ledger.capacity
    agents = limited(base, capacity)
    reservations = _fitting(live(ledger, now), capacity, agents)
    used = plus(agents, limited(reserved(reservations), capacity))
    consumed: set[str] = set()
    refused: dict[str, str] = {}
    for entry in wanted:
        bound = None
        if entry.reservation is not None and entry.reservation not in consumed:
            bound = next((r for r in reservations if r.id == entry.reservation), None)
        room = used if bound is None else minus(used, limited(bound.needs, capacity))
        why = lacking(entry.needs, capacity) or _full(entry.needs, capacity, room)
        if why is not None:
            refused[entry.agent] = why
            continue
        share = limited(entry.needs, capacity)
        used = plus(room, share)
        agents = plus(agents, share)
        if bound is not None:
            consumed.add(bound.id)
    left = [item for item in reservations if item.id not in consumed]
    if agents == ledger.agents and len(left) == len(ledger.reservations):
        return ledger, refused
    return ledger.model_copy(update={"agents": agents, "reservations": left}), refused
