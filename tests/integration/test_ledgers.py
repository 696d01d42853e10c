"""The books of nodes on a real server: lost answers, books that went back, other writers, and the leader's broom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus import assets
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.kv import Bucket
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.cluster import ledger as books
from foundation_nats.cluster.ledgers import BUCKET, PREFIX, Ledgers
from foundation_nats.config import Config
from foundation_nats.control.reclaimer import Reclaimer
from foundation_nats.node.admission import Admission
from foundation_nats.testing import TestServer, eventually
from foundation_nats.testing.links import Link
from foundation_schemas import LedgerRecord, NodeRecord, ReservationRecord

NAMES = Subjects("books")
LIFE = 7


class Desk:
    """A node's admission, and what it has said."""

    def __init__(self, bus: Bus, **capacity: float) -> None:
        self.admitted: list[str] = []
        self.refused: dict[str, str] = {}
        self.dropped: list[str] = []
        self.admission = Admission(
            bus,
            NAMES,
            node="n1",
            capacity=capacity,
            on_admitted=self.admitted.extend,
            on_refused=self.refused.update,
            on_dropped=self.dropped.extend,
            check_every_s=0.5,
        )

    def ask(self, *agents: str, reservation: str | None = None) -> None:
        """Agents that need a gpu each."""
        for agent in agents:
            assert not self.admission.may_start(agent, {"gpu": 1.0}, reservation)


@pytest.fixture
async def bus(server: TestServer) -> AsyncIterator[Bus]:
    """A connection to a server that has the streams."""
    config = Config.load(cluster="books", bus={"servers": (server.url,)})
    connected = await Bus.connect(config.bus, "test")
    await assets.ensure(connected, config)
    yield connected
    await connected.close()


@pytest.fixture
async def scope() -> AsyncIterator[TaskScope]:
    """Closed at the end."""
    opened = TaskScope("test")
    yield opened
    await opened.close()


async def record_of(ledgers: Ledgers) -> LedgerRecord:
    """The books of n1."""
    read = await ledgers.read("n1")
    assert read.record is not None
    return read.record


async def opened(ledgers: Ledgers, life: int = LIFE) -> None:
    """Wait until n1's books are of this life."""

    async def are_open() -> bool:
        read = await ledgers.read("n1")
        return read.record is not None and read.record.incarnation == life

    await eventually(are_open, message="the books are open")


async def put(ledgers: Ledgers, id: str, ttl_s: float | None, **needs: float) -> None:
    """Reserve on n1, as a client does."""
    now = await ledgers.clock.now()
    ends = None if ttl_s is None else now + ttl_s
    wanted = ReservationRecord(id=id, needs=needs, expires_at=ends, holder="me")

    def reserve(book: LedgerRecord, now: float) -> LedgerRecord:
        after = books.reserve(book, wanted, now)
        assert isinstance(after, LedgerRecord), after
        return after

    await ledgers.change("n1", reserve)


async def test_many_who_change_the_same_books_at_once_all_get_their_turn(bus: Bus) -> None:
    """Forty reservations, each confirmed and released by somebody else, at the same time."""
    ledgers = Ledgers(bus, NAMES)
    book = LedgerRecord(node="n1", incarnation=LIFE, capacity={"gpu": 100.0})
    await Bucket(bus, NAMES, BUCKET).create(PREFIX + "n1", encode(book))

    async def use(id: str) -> None:
        await put(ledgers, id, 60, gpu=1)
        await ledgers.change("n1", lambda book, now: books.confirm(book, id, now))
        await ledgers.change("n1", lambda book, now: books.release(book, id, now))

    await asyncio.gather(*(use(f"r{number}@n1") for number in range(40)))
    assert (await record_of(ledgers)).reservations == []


async def test_agents_are_admitted_once_although_the_answer_is_lost(
    server: TestServer, bus: Bus, scope: TaskScope
) -> None:
    """The books are written, the node doesn't hear it, is cut off and comes back: nothing counts twice."""
    ledgers = Ledgers(bus, NAMES)
    host, _, port = server.url.removeprefix("nats://").partition(":")
    async with await Link.open(host, int(port)) as link:
        config = Config.load(cluster="books", bus={"servers": (link.url,)})
        behind = await Bus.connect(config.bus, "n1")
        try:
            desk = Desk(behind, gpu=3)
            desk.admission.open(scope, LIFE)
            await opened(ledgers)
            await put(ledgers, "r@n1", None, gpu=2)
            desk.ask("first")
            await eventually(lambda: desk.admitted == ["first"])
            link.hold("down")
            desk.admission.leave("first")
            # What it knows is stale: the first try is refused by the server, unheard.
            desk.ask("a", "b", reservation="r@n1")
            await asyncio.sleep(0.2)
            link.cut()
            link.heal()
            await eventually(lambda: sorted(desk.admitted) == ["a", "b", "first"], timeout=15)
            book = await record_of(ledgers)
            assert (book.agents, book.reservations) == ({"gpu": 2.0}, [])
            assert not desk.refused
        finally:
            await scope.close()
            await behind.close()


async def test_nobody_is_refused_for_room_that_others_have_given_back(
    bus: Bus, scope: TaskScope
) -> None:
    """What is known from the last write may be old; and what is really taken is refused."""
    ledgers = Ledgers(bus, NAMES)
    desk = Desk(bus, gpu=2)
    desk.admission.open(scope, LIFE)
    await opened(ledgers)
    await put(ledgers, "r@n1", None, gpu=1)
    desk.ask("a")
    await eventually(lambda: desk.admitted == ["a"])
    await ledgers.change("n1", lambda book, now: books.release(book, "r@n1", now))
    desk.ask("b")
    await eventually(lambda: desk.admitted == ["a", "b"])
    assert not desk.refused
    desk.ask("c")
    await eventually(lambda: "c" in desk.refused)
    assert "gpu" in desk.refused["c"]
    assert desk.admission.may_start("a", {"gpu": 1.0}, None), "who has a share keeps it"
    desk.admission.leave("a")
    desk.ask("c")
    await eventually(lambda: desk.admitted == ["a", "b", "c"])
    assert (await record_of(ledgers)).agents == {"gpu": 2.0}


async def test_books_that_went_back_are_put_right_and_reservations_without_room_dropped(
    bus: Bus, scope: TaskScope
) -> None:
    """An older record is there again: agents that run keep their shares."""
    ledgers = Ledgers(bus, NAMES)
    desk = Desk(bus, gpu=2)
    desk.admission.open(scope, LIFE)
    await opened(ledgers)
    await put(ledgers, "old@n1", None, gpu=1)
    older = await record_of(ledgers)
    await ledgers.change("n1", lambda book, now: books.release(book, "old@n1", now))
    desk.ask("a", "b")
    await eventually(lambda: len(desk.admitted) == 2)
    await Bucket(bus, NAMES, BUCKET).overwrite(PREFIX + "n1", encode(older))

    async def right() -> bool:
        book = await record_of(ledgers)
        return book.agents == {"gpu": 2.0} and not book.reservations

    await eventually(right, timeout=10, message="the books say what runs")
    assert desk.dropped == ["old@n1"]


async def test_a_node_that_another_life_has_replaced_admits_nobody(
    bus: Bus, scope: TaskScope
) -> None:
    """Unless the node's record says that this life is the present one."""
    ledgers = Ledgers(bus, NAMES)
    nodes = Bucket(bus, NAMES, "nodes")
    later = LedgerRecord(node="n1", incarnation=LIFE + 1, capacity={"gpu": 1.0})
    await Bucket(bus, NAMES, BUCKET).create(PREFIX + "n1", encode(later))
    revision = await nodes.create("n1", encode(NodeRecord(name="n1", incarnation=LIFE + 1)))
    desk = Desk(bus, gpu=1)
    desk.admission.open(scope, LIFE)
    desk.ask("a")
    with pytest.raises(AssertionError, match="not within"):
        await eventually(lambda: desk.admitted or desk.refused, timeout=0.5)
    assert await record_of(ledgers) == later
    await nodes.replace("n1", encode(NodeRecord(name="n1", incarnation=LIFE)), expected=revision)
    await eventually(lambda: desk.admitted == ["a"], timeout=10)
    assert (await record_of(ledgers)).incarnation == LIFE


async def test_the_leader_reclaims_what_expired_and_the_books_of_nodes_that_are_gone(
    bus: Bus, scope: TaskScope
) -> None:
    """It tells of what expired, whoever dropped it; who doesn't lead does nothing."""
    ledgers = Ledgers(bus, NAMES)
    await ledgers.open(scope)
    known = {"n1"}
    told: list[dict[str, Any]] = []

    def emit(topic: str, what: str, message: str, **data: Any) -> None:
        told.append({"what": f"{topic}.{what}", "message": message, **data})

    broom = Reclaimer(ledgers, lambda: known, emit, forget_after_s=0.3)
    scope.start(broom.run(), "broom")
    book = LedgerRecord(node="n1", incarnation=LIFE, capacity={"gpu": 3.0})
    await Bucket(bus, NAMES, BUCKET).create(PREFIX + "n1", encode(book))
    await put(ledgers, "short@n1", 0.3, gpu=1)
    await put(ledgers, "long@n1", 300, gpu=1)

    async def is_over() -> bool:
        return books.find(await record_of(ledgers), "short@n1", await ledgers.clock.now()) is None

    await eventually(is_over)
    assert len((await record_of(ledgers)).reservations) == 2, "nobody leads: nobody sweeps"
    broom.lead(1)
    await eventually(lambda: told, timeout=5)
    assert [item.id for item in (await record_of(ledgers)).reservations] == ["long@n1"]
    assert told == [
        {
            "what": "resources.reclaimed",
            "message": "1 reservation(s) on n1 expired and were reclaimed.",
            "node": "n1",
            "reservations": ["short@n1"],
            "holders": ["me"],
        }
    ]
    await ledgers.change("n1", lambda found, now: books.release(found, "long@n1", now))
    await eventually(lambda: not ledgers.seen()["n1"].reservations)
    assert len(told) == 1, "what is released is no news"
    known.clear()
    await eventually(lambda: "n1" not in ledgers.seen(), timeout=5, message="its books are gone")
    read = await ledgers.read("n1")
    assert read.record is None
