"""The books of a node: whatever is asked of them in whatever order, nothing is taken beyond the capacity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation_nats.cluster.ledger import (
    RESERVATIONS_MAX,
    Entry,
    admit,
    confirm,
    expire,
    find,
    live,
    next_expiry,
    opened,
    release,
    reserve,
    reserved,
    shortage,
    taken,
)
from foundation_schemas import LedgerRecord, ReservationRecord, ReservationState

NOW = 1000.0
_AMOUNTS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 7.0])
_NEEDS = st.dictionaries(st.sampled_from(["cpu", "gpu", "slots", "tpu"]), _AMOUNTS, max_size=3)
_CAPACITY = st.dictionaries(
    st.sampled_from(["cpu", "gpu", "slots"]), st.sampled_from([0.0, 0.3, 1.0, 2.5, 4.0]), max_size=3
)


def book(reservations: list[ReservationRecord] | None = None, **capacity: float) -> LedgerRecord:
    """Books of n1 without agents."""
    return LedgerRecord(
        node="n1", incarnation=1, capacity=capacity, reservations=reservations or []
    )


def wish(id: str = "r1", ends: float | None = NOW + 10, **needs: float) -> ReservationRecord:
    """A reservation that is asked for."""
    return ReservationRecord(id=id, needs=needs, expires_at=ends)


def made(ledger: LedgerRecord | str | None) -> LedgerRecord:
    """What must have worked."""
    assert isinstance(ledger, LedgerRecord), ledger
    return ledger


def assert_within(ledger: LedgerRecord, now: float) -> None:
    """Nothing is taken beyond the capacity."""
    for name, amount in taken(ledger, now).items():
        assert amount <= ledger.capacity[name] + 1e-9, (name, ledger)
    for name, amount in ledger.agents.items():
        assert amount >= 0, (name, ledger)


@dataclass
class Node:
    """A node's manager as a model: the shares that it gave, and the books; as `Admission` does it."""

    ledger: LedgerRecord
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    now: float = NOW
    count: int = 0

    def base(self) -> dict[str, float]:
        """What those that stay take."""
        total: dict[str, float] = {}
        for share in self.shares.values():
            for name, amount in share.items():
                total[name] = total.get(name, 0.0) + amount
        return total

    def start(self, agent: str, needs: dict[str, float], reservation: str | None) -> None:
        """Admit one agent; twice, as after a lost answer."""
        self.shares.pop(agent, None)
        entry = Entry(agent, needs, reservation)
        after, refused = admit(self.ledger, self.base(), [entry], self.now)
        again, refused_again = admit(after, self.base(), [entry], self.now)
        assert again.agents == after.agents
        assert set(refused_again) <= set(refused), "what was admitted stays so"
        assert agent in refused or again == after
        self.ledger = after
        if agent not in refused:
            self.shares[agent] = {
                name: amount for name, amount in needs.items() if name in after.capacity
            }

    def stop(self, agent: str) -> None:
        """Let an agent go."""
        self.shares.pop(agent, None)
        self.ledger, refused = admit(self.ledger, self.base(), [], self.now)
        assert not refused

    def reborn(self, capacity: dict[str, float]) -> None:
        """Begin a new life."""
        self.shares.clear()
        life = self.ledger.incarnation + 1
        self.ledger = opened(self.ledger, "n1", life, capacity, self.now)


_STEPS = st.one_of(
    st.tuples(st.just("reserve"), _NEEDS, st.sampled_from([None, 1.0, 5.0, 50.0])),
    st.tuples(st.just("confirm"), st.integers(0, 9), st.sampled_from([None, 5.0])),
    st.tuples(st.just("release"), st.integers(0, 9), st.none()),
    st.tuples(st.just("start"), _NEEDS, st.integers(0, 9)),
    st.tuples(st.just("stop"), st.integers(0, 4), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 20.0]), st.none()),
    st.tuples(st.just("reborn"), _CAPACITY, st.none()),
    st.tuples(st.just("rewind"), st.integers(0, 9), st.none()),
)


@settings(max_examples=100, deadline=None)
@given(_CAPACITY, st.lists(_STEPS, max_size=40))
def test_nothing_is_taken_beyond_the_capacity_whatever_is_asked(
    capacity: dict[str, float], steps: list[tuple[str, Any, Any]]
) -> None:
    """Reservations, agents, expiries, new lives, and a store that goes back to older books."""
    node = Node(opened(None, "n1", 1, capacity, NOW))
    history = [node.ledger]
    for step, first, second in steps:
        known = [item.id for item in node.ledger.reservations]
        match step:
            case "reserve":
                node.count += 1
                ends = None if second is None else node.now + second
                wanted = wish(f"r{node.count}", ends, **first)
                after = reserve(node.ledger, wanted, node.now)
                if isinstance(after, str):
                    assert shortage(node.ledger, wanted.needs, node.now) is not None
                else:
                    assert reserve(after, wanted, node.now) == after, "again changes nothing"
                    node.ledger = after
            case "confirm" if first < len(known):
                ends = None if second is None else node.now + second
                lasting = confirm(node.ledger, known[first], node.now, expires_at=ends)
                assert (lasting is None) == (find(node.ledger, known[first], node.now) is None)
                node.ledger = lasting or node.ledger
            case "release" if first < len(known):
                node.ledger = release(node.ledger, known[first], node.now)
                assert find(node.ledger, known[first], node.now) is None
            case "start":
                bound = known[second] if second < len(known) else None
                node.start(f"a{second % 5}", first, bound)
            case "stop":
                node.stop(f"a{first}")
            case "wait":
                node.now += first
            case "reborn":
                node.reborn(first)
            case "rewind":
                # An older revision of this life's books is back; the manager puts it right.
                same = [item for item in history if item.incarnation == node.ledger.incarnation]
                node.ledger = (same or [node.ledger])[first % max(1, len(same))]
                node.stop("nobody")
        history.append(node.ledger)
        assert_within(node.ledger, node.now)
        assert node.ledger.agents == pytest.approx(
            {name: amount for name, amount in node.base().items() if amount}
        )


def test_what_is_held_ends_by_itself_and_what_is_confirmed_lasts() -> None:
    """From its moment on it doesn't count, dropped or not; it can't be confirmed any more."""
    ledger = made(reserve(book(gpu=1), wish(gpu=1), NOW))
    assert "too little gpu" in str(reserve(ledger, wish("r2", gpu=1), NOW + 9.99))
    assert next_expiry(ledger) == NOW + 10
    assert taken(ledger, NOW + 10) == {}
    assert confirm(ledger, "r1", NOW + 10) is None
    assert not expire(ledger, NOW + 10).reservations
    assert expire(ledger, NOW + 9) is ledger
    assert [
        item.id for item in made(reserve(ledger, wish("r2", gpu=1), NOW + 10)).reservations
    ] == ["r2"]
    lasting = made(confirm(ledger, "r1", NOW + 9))
    assert lasting.reservations[0].state is ReservationState.CONFIRMED
    assert next_expiry(lasting) is None
    assert taken(lasting, NOW + 1e9) == {"gpu": 1}
    assert made(confirm(lasting, "r1", NOW + 9)) == lasting
    leased = made(confirm(ledger, "r1", NOW + 9, expires_at=NOW + 20))
    assert taken(leased, NOW + 15) == {"gpu": 1}
    assert made(confirm(leased, "r1", NOW + 15, expires_at=NOW + 30)).reservations[
        0
    ].expires_at == (NOW + 30)
    assert confirm(leased, "r1", NOW + 20) is None


def test_a_release_is_idempotent_and_takes_only_its_own() -> None:
    """The second one changes nothing."""
    ledger = made(reserve(book(gpu=2), wish(gpu=1), NOW))
    ledger = made(reserve(ledger, wish("r2", gpu=1), NOW))
    after = release(ledger, "r1", NOW)
    assert [item.id for item in after.reservations] == ["r2"]
    assert release(after, "r1", NOW) is after


def test_a_node_that_comes_back_smaller_keeps_the_confirmed_and_then_the_oldest() -> None:
    """And one that lost a resource drops what needs it; no agent of the old life counts."""
    ledger = book([wish("r1", gpu=1), wish("r2", gpu=1), wish("r3", gpu=1)], gpu=4)
    ledger = made(confirm(ledger, "r3", NOW)).model_copy(update={"agents": {"gpu": 1.0}})
    after = opened(ledger, "n1", 2, {"gpu": 2}, NOW)
    assert [item.id for item in after.reservations] == ["r1", "r3"]
    assert after.agents == {}
    assert after.incarnation == 2
    assert not opened(ledger, "n1", 2, {"cpu": 9}, NOW).reservations
    assert opened(after, "n1", 2, {"gpu": 2}, NOW) is after
    assert not opened(after, "n1", 3, {"gpu": 2}, NOW + 10).reservations[1:], (
        "expired ones are not kept"
    )


def test_a_reservation_becomes_an_agents_share_once() -> None:
    """The first that names it gets it, in full; the second is one like any other."""
    ledger = made(reserve(book(gpu=2), wish(gpu=2), NOW))
    after, refused = admit(ledger, {}, [Entry("other", {"gpu": 1}, None)], NOW)
    assert after == ledger
    assert "gpu" in refused["other"]
    wanted = [Entry("a", {"gpu": 2}, "r1"), Entry("b", {"gpu": 2}, "r1")]
    after, refused = admit(ledger, {}, wanted, NOW)
    assert list(refused) == ["b"]
    assert after.agents == {"gpu": 2}
    assert not after.reservations
    # An agent that needs less gives the rest back; one that needs more may take what is free.
    after, refused = admit(ledger, {}, [Entry("a", {"gpu": 1}, "r1")], NOW)
    assert (after.agents, live(after, NOW), refused) == ({"gpu": 1}, [], {})
    half = made(reserve(book(gpu=2), wish(gpu=1), NOW))
    after, refused = admit(half, {}, [Entry("a", {"gpu": 2}, "r1")], NOW)
    assert (after.agents, refused) == ({"gpu": 2}, {})
    # What is over is no reservation any more.
    late, refused = admit(ledger, {}, [Entry("a", {"gpu": 2}, "r1")], NOW + 10)
    assert (late.agents, late.reservations, refused) == ({"gpu": 2}, [], {})


def test_agents_that_run_win_against_reservations_that_a_lost_store_brings_back() -> None:
    """The newest that is only held goes first."""
    ledger = book([wish("r1", gpu=1), wish("r2", gpu=1)], gpu=3)
    after, _ = admit(ledger, {"gpu": 2.0}, [], NOW)
    assert [item.id for item in after.reservations] == ["r1"]
    assert_within(after, NOW)


def test_small_parts_add_up_without_a_rounding_error() -> None:
    """Ten tenths are one, and there is no eleventh."""
    ledger = book(cpu=1)
    for number in range(10):
        ledger = made(reserve(ledger, wish(f"r{number}", cpu=0.1), NOW))
    assert "cpu" in str(reserve(ledger, wish("one more", cpu=0.1), NOW))
    assert reserved(ledger.reservations) == {"cpu": 1.0}
    for number in range(10):
        ledger = release(ledger, f"r{number}", NOW)
    assert taken(ledger, NOW) == {}


def test_why_it_does_not_fit_is_told() -> None:
    """Never, not now, not one more; a slot is not limited where none is declared."""
    assert shortage(book(cpu=2), {"gpu": 1}, NOW) == "does not offer gpu (needs 1)"
    assert shortage(book(cpu=2), {"cpu": 3}, NOW) == "offers 2 cpu in all (needs 3)"
    full = made(reserve(book(cpu=2), wish(cpu=1.5), NOW))
    assert shortage(full, {"cpu": 1}, NOW) == "has too little cpu left of 2 (needs 1)"
    assert shortage(full, {"slots": 9, "cpu": 0.5}, NOW) is None
    many = book([wish(f"r{number}", None) for number in range(RESERVATIONS_MAX)], cpu=2)
    assert "1000 reservations" in str(reserve(many, wish("x", cpu=1), NOW))
