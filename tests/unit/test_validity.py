"""When a node's right to answer ends, and what it takes until it counts again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from foundation_nats.bus.connection import Bus
from foundation_nats.bus.rpc import encode
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message
from foundation_nats.cluster import validity
from foundation_nats.cluster.validity import Validity
from foundation_schemas import Echo, NodeStatus

FENCE_S = 4.0


@dataclass
class Line:
    """What the right needs of a connection."""

    on_message: Callable[[Message], None] | None = None
    drop: Callable[[], None] = lambda: None

    def subscribe(self, _subject: str, callback: Callable[[Message], None]) -> object:
        self.on_message = callback
        return callback

    def unsubscribe(self, _route: object) -> None:
        self.on_message = None

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        self.drop = callback


@dataclass
class Node:
    """A process with agents: its clock, its line, and what its right told it."""

    now: float = 100.0
    line: Line = field(default_factory=Line)
    reviews: list[int] = field(default_factory=list)
    restored: int = 0
    downs: int = 0
    validity: Validity = field(init=False)

    def __post_init__(self) -> None:
        self.validity = Validity(
            cast(Bus, self.line),
            Subjects("t"),
            node="n",
            incarnation=7,
            fence_s=FENCE_S,
            on_down=self._down,
            on_restored=self._restored,
            on_review=self.reviews.append,
        )

    def _down(self) -> None:
        self.downs += 1

    def _restored(self) -> None:
        self.restored += 1

    def echo(self, sent_at: float, verdict: NodeStatus = NodeStatus.UP) -> None:
        """An echo of a heartbeat that was sent then."""
        assert self.line.on_message is not None
        echo = Echo(
            node="n", incarnation=7, beat=1, sent_at=sent_at, verdict=verdict, leader="l", term=1
        )
        self.line.on_message(Message("", "", encode(echo), None))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node that has the right, from a heartbeat sent at 100."""
    made = Node()
    monkeypatch.setattr(validity, "monotonic", lambda: made.now)
    made.echo(100.0)
    made.validity.confirm(made.reviews.pop())
    assert made.validity.is_valid()
    made.restored = 0
    return made


def test_echoes_that_come_in_time_extend_the_right_and_ask_for_nothing(node: Node) -> None:
    """The usual case costs no read."""
    for at in (101.0, 104.5, 108.4):
        node.now = at
        node.echo(at)
    node.now = 112.3
    assert node.validity.is_valid()
    assert node.reviews == []
    assert node.restored == 0


def test_a_lapse_that_nobody_asked_about_is_noticed_by_the_echo_after_it(node: Node) -> None:
    """No question fell into the time without a right, and still it comes back by a review only."""
    node.now = 104.1
    node.echo(104.0)
    assert not node.validity.is_valid()
    (lapse,) = node.reviews
    node.validity.confirm(lapse)
    assert node.validity.is_valid()
    assert node.restored == 1
    assert node.validity.remaining_s() == pytest.approx(3.9)


def test_a_dropped_connection_ends_the_right_and_old_heartbeats_do_not_restore_it(
    node: Node,
) -> None:
    """What was sent before the drop proves nothing about what came after."""
    node.now = 101.0
    node.line.drop()
    assert not node.validity.is_valid()
    node.echo(100.9)
    assert node.reviews == []
    node.now = 101.2
    node.echo(101.1)
    assert len(node.reviews) == 1
    assert not node.validity.is_valid()


def test_echoes_during_a_review_extend_what_will_count_and_start_no_second_one(node: Node) -> None:
    """The review may take longer than heartbeats are apart."""
    node.now = 105.0
    node.echo(105.0)
    for at in (106.0, 108.0, 110.0):
        node.now = at
        node.echo(at)
        assert not node.validity.is_valid()
    (lapse,) = node.reviews
    node.validity.confirm(lapse)
    assert node.validity.remaining_s() == pytest.approx(4.0)


@pytest.mark.parametrize("how", ["drop", "time", "down"])
def test_a_review_of_an_earlier_lapse_restores_nothing(node: Node, how: str) -> None:
    """What was read may have been given away since: the right has lapsed again."""
    node.now = 105.0
    node.echo(105.0)
    match how:
        case "drop":
            node.line.drop()
        case "time":
            node.now = 109.5
        case _:
            node.echo(105.0, NodeStatus.DOWN)
            assert node.downs == 1
    node.now += 0.1
    node.echo(node.now)
    first, second = node.reviews
    assert not node.validity.in_review(first)
    node.validity.confirm(first)
    assert not node.validity.is_valid()
    assert node.restored == 0
    node.validity.confirm(second)
    assert node.validity.is_valid()


def test_a_review_that_took_too_long_leaves_no_right(node: Node) -> None:
    """Confirmed after the proof of life ran out: the next echo asks anew."""
    node.now = 105.0
    node.echo(105.0)
    node.now = 109.5
    node.validity.confirm(node.reviews.pop())
    assert not node.validity.is_valid()
    node.echo(109.4)
    assert len(node.reviews) == 1


def test_an_echo_that_arrives_too_late_restores_nothing(node: Node) -> None:
    """As after a freeze: what was waiting to be read is old."""
    node.now = 120.0
    node.echo(115.9)
    assert node.reviews == []
    assert not node.validity.is_valid()


def test_where_nothing_runs_nothing_is_reviewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager has no agents: an echo is enough."""
    monkeypatch.setattr(validity, "monotonic", lambda: 100.0)
    line = Line()
    right = Validity(cast(Bus, line), Subjects("t"), node="n", incarnation=7, fence_s=FENCE_S)
    echo = Echo(
        node="n",
        incarnation=7,
        beat=1,
        sent_at=99.0,
        verdict=NodeStatus.UP,
        leader="l",
        term=1,
    )
    assert line.on_message is not None
    line.on_message(Message("", "", encode(echo), None))
    assert right.is_valid()
