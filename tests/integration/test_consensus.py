"""Replicated domains on one server: propose, reject, repeat, read, skip, compact, restore."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

from foundation_nats import Cluster
from foundation_nats.bus.streams import api, append
from foundation_nats.consensus.domain import Domain, ProposalStatus
from foundation_nats.consensus.log import Log
from foundation_nats.consensus.replica import Replica
from foundation_nats.errors import (
    ConfigError,
    DomainError,
    DomainFullError,
    DomainNotFoundError,
    PayloadInvalidError,
    ProposalRejectedError,
    StaleRevisionError,
)
from foundation_nats.testing import TestServer, eventually


class Add(BaseModel):
    """Add an amount."""

    amount: int


class Total(BaseModel):
    """A sum, and how it came about."""

    total: int = 0
    history: list[int] = Field(default_factory=list)


class Sum(Domain[Total, Add]):
    """Adds up to at most 100."""

    name = "sum"
    State = Total
    Operation = Add

    def validate(self, state: Total, operation: Add) -> str | None:
        """At most 100."""
        if operation.amount == 13:
            raise LookupError("unlucky")
        return None if state.total + operation.amount <= 100 else "more than 100"

    def apply(self, state: Total, operation: Add) -> Total:
        """Add."""
        state.total += operation.amount
        state.history.append(operation.amount)
        if operation.amount == 66:
            raise ArithmeticError("66 can't be added")
        return state


class Often(Sum):
    """Compacts every ten entries and remembers few ids."""

    name = "often"
    snapshot_every = 10
    ids_kept = 20


@pytest.fixture
async def cluster(server: TestServer) -> AsyncIterator[Cluster]:
    """A client."""
    async with Cluster.connect(server.url, name="one") as client:
        yield client


@pytest.fixture
async def other(server: TestServer) -> AsyncIterator[Cluster]:
    """Another client, with replicas of its own."""
    async with Cluster.connect(server.url, name="two") as client:
        yield client


async def _revision(cluster: Cluster, domain: Any, revision: int) -> Any:
    return await (await cluster.consensus.open(domain)).wait(revision)


async def test_what_one_proposes_the_other_sees_and_rejections_say_why(
    cluster: Cluster, other: Cluster
) -> None:
    """Accepted with a revision; rejected by the newest state, wherever it was changed."""
    consensus = cluster.consensus
    assert (await other.consensus.read(Sum)).total == 0
    found = await consensus.propose(Sum, Add(amount=60))
    assert found.status == "accepted"
    assert found.accepted
    assert found.check() == found.revision == 1
    assert (await consensus.view(Sum)).total == 60
    assert (await other.consensus.read(Sum)).total == 60
    assert (await other.consensus.propose(Sum, {"amount": 40})).revision == 2
    refused = await consensus.propose(Sum, Add(amount=1))
    assert (refused.status, refused.reason, refused.revision) == ("rejected", "more than 100", 2)
    with pytest.raises(ProposalRejectedError, match="more than 100"):
        refused.check()
    assert await consensus.status(refused.id) == refused
    assert (await other.consensus.status(found.id, Sum)).revision == 1
    missing = await other.consensus.status("never-proposed", Sum)
    assert (missing.status, missing.revision, missing.final) == ("not_found", 2, False)


async def test_a_follower_hears_of_entries_without_asking(cluster: Cluster, other: Cluster) -> None:
    """By live copies, in order, long before the sweep."""
    replica = await other.consensus.open(Sum)
    seen: list[tuple[int, int]] = []
    replica.on_applied(lambda applied, state: seen.append((applied.revision, state.total)))
    for _ in range(20):
        await cluster.consensus.propose(Sum, Add(amount=1))
    await eventually(lambda: replica.revision == 20, timeout=2)
    assert seen == [(n, n) for n in range(1, 21)]


async def test_an_id_takes_effect_once_whoever_repeats_it(cluster: Cluster, other: Cluster) -> None:
    """The id is in the log, hence known to every replica."""
    first = await cluster.consensus.propose(Sum, Add(amount=5), id="order:17")
    again = await cluster.consensus.propose(Sum, Add(amount=5), id="order:17")
    theirs = await other.consensus.propose(Sum, Add(amount=5), id="order:17")
    assert first == again == theirs
    assert (await other.consensus.read(Sum)).total == 5
    with pytest.raises(ConfigError, match="can't be a proposal's id"):
        await cluster.consensus.propose(Sum, Add(amount=5), id="no spaces")


async def test_an_id_is_known_later_than_the_servers_window(
    cluster: Cluster, other: Cluster
) -> None:
    """The server has forgotten it; the log has not, nor has a snapshot."""
    log = (await cluster.consensus.open(Sum))._log
    config = (await log.reader.info())["config"]
    config["duplicate_window"] = 100_000_000
    await api(cluster.bus, "STREAM.UPDATE", log.reader.stream, config)
    first = await cluster.consensus.propose(Sum, Add(amount=5), id="order:17")

    async def forgotten() -> bool:
        probe = {"Nats-Msg-Id": "order:17", "Nats-Expected-Last-Sequence": "999"}
        try:
            await append(cluster.bus, log.subject, b"", headers=probe)
        except StaleRevisionError:
            return True  # it came as far as the comparison
        return False

    await asyncio.sleep(0.2)
    await eventually(forgotten)
    assert await other.consensus.propose(Sum, Add(amount=5), id="order:17") == first
    await (await other.consensus.open(Sum)).snapshot()
    async with Cluster.connect(cluster.url, name="late") as late:
        assert await late.consensus.propose(Sum, Add(amount=5), id="order:17") == first
        assert (await late.consensus.read(Sum)).total == 5


async def test_many_at_once_are_one_order_for_all(cluster: Cluster, other: Cluster) -> None:
    """Contention costs retries, never an operation."""
    clients = (cluster, other)
    found = await asyncio.gather(
        *(
            clients[n % 2].consensus.propose(Often, Add(amount=n % 2), id=f"p{n}", timeout=20)
            for n in range(60)
        )
    )
    assert all(proposal.accepted for proposal in found)
    one, two = [await client.consensus.read(Often) for client in clients]
    assert one == two
    assert (one.total, len(one.history)) == (30, 60)


async def test_bad_operations_and_validators_that_raise(cluster: Cluster) -> None:
    """Nothing of it gets into the log."""
    with pytest.raises(PayloadInvalidError, match="amount"):
        await cluster.consensus.propose(Sum, {"amount": "much"})
    unlucky = await cluster.consensus.propose(Sum, Add(amount=13))
    assert unlucky.reason == "validate raised LookupError: unlucky"
    poison = await cluster.consensus.propose(Sum, Add(amount=66))
    assert poison.reason == "apply raised ArithmeticError: 66 can't be added"
    assert await cluster.consensus.read(Sum) == Total()
    assert (await cluster.consensus.log("sum")) == []


class Bulky(Sum):
    """Its state grows beyond what one message may hold."""

    name = "bulky"
    snapshot_every = 5
    log_max = 12

    def apply(self, state: Total, operation: Add) -> Total:
        """Grow."""
        state.history.extend([10**9] * 20_000)
        return state


async def test_a_state_that_is_too_large_is_an_error_before_the_log_is_endless(
    cluster: Cluster,
) -> None:
    """It can't be compacted; that is announced, and from `log_max` on nothing is accepted."""
    for _ in range(12):
        assert (await cluster.consensus.propose(Bulky, Add(amount=1))).accepted
    with pytest.raises(DomainFullError, match="has 12 entries since its last snapshot"):
        await cluster.consensus.propose(Bulky, Add(amount=1))

    async def announced() -> bool:
        return "not_compacted" in {e.what for e in await cluster.events.list(topic="domain")}

    await eventually(announced)


class Lenient(Sum):
    """An earlier version of the code, which could apply 66."""

    def apply(self, state: Total, operation: Add) -> Total:
        """Add."""
        state.total += operation.amount
        return state


async def test_poison_in_the_log_is_skipped_by_all_and_announced(
    cluster: Cluster, other: Cluster
) -> None:
    """An entry that can't be applied, one that is no operation, and bytes that are no entry."""
    await cluster.consensus.propose(Sum, Add(amount=1))
    lenient = Replica(other.bus, other.subjects, Lenient())
    await lenient.open()
    assert (await lenient.propose(Add(amount=66), id="poison")).accepted
    await lenient.close()
    subject = cluster.subjects.domain("sum")
    await append(cluster.bus, subject, b"not an entry")
    await append(
        cluster.bus, subject, b'{"id":"x","after":3,"after_id":"?3","operation":{"amount":"many"}}'
    )
    await append(cluster.bus, subject, b'{"id":"y","after":1,"operation":{"amount":1}}')
    found = await cluster.consensus.propose(Sum, Add(amount=2), id="good")
    assert found.revision == 6
    for client in (cluster, other):
        assert await client.consensus.read(Sum) == Total(total=3, history=[1, 2])
        replica = await client.consensus.open(Sum)
        assert replica.revision == 6
        poison = await replica.status("poison")
        assert (poison.status, poison.revision) == (ProposalStatus.REJECTED, 2)
        assert "66" in poison.reason

    async def announced() -> bool:
        events = await cluster.events.list(topic="domain")
        return {e.data["revision"] for e in events if e.what == "entry_skipped"} == {2, 3, 4, 5}

    await eventually(announced)


async def test_snapshots_compact_the_log_and_latecomers_start_from_them(
    cluster: Cluster, server: TestServer
) -> None:
    """The log stays short; who comes late, or falls behind, restores and goes on."""
    early = await cluster.consensus.open(Often)
    async with Cluster.connect(server.url, name="sleeper") as sleeper:
        behind = Replica(sleeper.bus, sleeper.subjects, Often())
        await behind.open()
        await cluster.consensus.propose(Often, Add(amount=1))
        await behind.wait(1)
        # Deaf: neither hints nor sweeps reach it.
        assert behind._scope is not None
        await behind._scope.close()
        for n in range(80):
            await cluster.consensus.propose(Often, Add(amount=1), id=f"n{n}")

        async def short() -> bool:
            return (await cluster.consensus.show("often")).stored <= 25

        await eventually(short)
        info = await cluster.consensus.show("often")
        assert info.snapshot_revision >= 60
        assert info.entries == 81
        assert behind.revision == 1
        state = await behind.read()
        assert state.total == 81
        assert behind.revision == early.revision == info.revision
        await behind.close()
    async with Cluster.connect(server.url, name="late") as late:
        assert (await late.consensus.read(Often)).total == 81
        # An id from before the snapshot, and one that is forgotten there but not by the server.
        again = await late.consensus.propose(Often, Add(amount=1), id="n79")
        assert again.accepted
        assert again.revision < early.revision + 1
        older = await late.consensus.propose(Often, Add(amount=1), id="n30")
        assert older.accepted
        assert (await late.consensus.read(Often)).total == 81


async def test_a_read_with_a_barrier_sees_all(cluster: Cluster, other: Cluster) -> None:
    """The mark lies in the stream, and is no entry."""
    for n in range(5):
        await cluster.consensus.propose(Sum, Add(amount=1))
        state = await other.consensus.read(Sum, barrier=True)
        assert state.total == n + 1
    assert [entry.operation for entry in await cluster.consensus.log("sum")] == [{"amount": 1}] * 5
    (info,) = await cluster.consensus.list()
    assert (info.name, info.entries, info.stored) == ("sum", 5, 5)
    with pytest.raises(DomainNotFoundError, match="no domain none"):
        await cluster.consensus.log("none")


async def test_what_a_reader_does_to_its_copy_changes_nothing(cluster: Cluster) -> None:
    """Nor what a proposer does to the operation afterwards."""
    operation = Add(amount=3)
    await cluster.consensus.propose(Sum, operation)
    operation.amount = 50
    (await cluster.consensus.view(Sum)).history.clear()
    assert await cluster.consensus.view(Sum) == Total(total=3, history=[3])


class Newer(Sum):
    """A version of the code that others don't have yet."""

    version = 2


async def test_code_that_is_too_old_stops_instead_of_diverging(
    cluster: Cluster, other: Cluster
) -> None:
    """By an entry, and by a snapshot."""
    old = await other.consensus.open(Sum)
    newer = await cluster.consensus.open(Newer)
    assert (await newer.propose(Add(amount=1))).accepted

    async def stopped() -> bool:
        try:
            old.view  # noqa: B018
        except DomainError as error:
            return "knows version 1" in str(error)
        return False

    await eventually(stopped)
    await newer.snapshot()
    with pytest.raises(DomainError, match="snapshot of version 2"):
        await Replica(other.bus, other.subjects, Sum()).open()


class Nameless(Domain[Total, Add]):
    """Has no name."""

    State = Total
    Operation = Add


class Needy(BaseModel):
    """A state that can't begin by itself."""

    must: int


class Unstartable(Domain[Needy, Add]):
    """Its state has no default."""

    name = "unstartable"
    State = Needy
    Operation = Add


class Stranger(Domain[Total, Add]):
    """Claims the name of another."""

    name = "sum"
    State = Total
    Operation = Add


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Nameless, "name"), (Unstartable, "no default for must"), (Stranger, "name sum is that of")],
)
async def test_wrong_declarations_are_named(cluster: Cluster, kind: Any, said: str) -> None:
    """Before anything is written."""
    await cluster.consensus.open(Sum)
    with pytest.raises(ConfigError, match=said):
        await cluster.consensus.open(kind)
    assert [info.name for info in await cluster.consensus.list()] == ["sum"]


async def test_a_log_that_was_purged_by_hand_is_noticed(cluster: Cluster, other: Cluster) -> None:
    """Without a snapshot there is no way to know the state."""
    for _ in range(3):
        await cluster.consensus.propose(Sum, Add(amount=1))
    log = Log(cluster.bus, cluster.subjects, "sum")
    await log.reader.purge(log.subject, below=3)
    with pytest.raises(DomainError, match="lost revision 2"):
        await other.consensus.open(Sum)
    assert (await cluster.consensus.propose(Sum, Add(amount=1))).revision == 4
