"""`Mailbox` and `Outbox`: what is taken in, in which order, and what is on its way, without a bus."""

from __future__ import annotations

from foundation_nats.agent.mailbox import Ask, Live, Mailbox, Rewind, Stored
from foundation_nats.agent.outgoing import Outbox
from foundation_nats.agent.record import OutboxItem
from foundation_nats.bus.streams import StoredMessage

_PLAIN = b'{"type":"a"}'
_URGENT = b'{"type":"a","urgent":true}'


def stamp_of(sequence: int, era: int = 0) -> str:
    """When the server stored this signal; in a later *era* after it had lost some."""
    return f"2026-01-01T00:{era:02}:{sequence:02}.000000000Z"


def mailbox(cursor: int = 0) -> Mailbox:
    """One whose place has been compared with the stream."""
    found = Mailbox(cursor, stamp_of(cursor) if cursor else "", skip=[], ahead={})
    found.checked = True
    return found


def hear(box: Mailbox, sequence: int, last: int, data: bytes = _PLAIN, *, room: int = 9) -> Live:
    """A live copy comes."""
    return box.hear(sequence, last, stamp_of(sequence), data, room)


def queued(box: Mailbox) -> list[int]:
    """The signals in memory."""
    return [item.sequence for item in box.queue or () if isinstance(item, Stored)]


def test_copies_in_order_are_taken_and_seen_ones_are_not() -> None:
    """A lower last sequence is no gap: what was consumed is trimmed."""
    box = mailbox()
    assert hear(box, 3, 0) is Live.NEXT
    assert hear(box, 3, 0) is Live.NOTHING
    assert hear(box, 7, 3) is Live.NEXT
    assert hear(box, 8, 0) is Live.NEXT
    assert queued(box) == [3, 7, 8]


def test_a_gap_is_read_from_the_stream_until_all_that_was_heard_of_is_there() -> None:
    """Meanwhile live copies are not taken."""
    box = mailbox()
    assert hear(box, 1, 0) is Live.NEXT
    assert hear(box, 5, 3) is Live.GAP
    box.behind = True
    assert hear(box, 6, 5) is Live.NOTHING
    page = [StoredMessage("s", n, _PLAIN, {}, stamp_of(n)) for n in (1, 3, 5)]
    assert not box.take_page(page, more=False)
    assert not box.take_page([StoredMessage("s", 6, _PLAIN, {}, stamp_of(6))], more=True)
    assert box.take_page([], more=False)
    assert queued(box) == [1, 3, 5, 6]
    assert not box.behind


def test_there_is_room_for_so_many_only_and_none_while_the_place_is_in_doubt() -> None:
    """What finds no room is read from the stream later."""
    box = mailbox()
    assert hear(box, 1, 0, room=1) is Live.NEXT
    assert hear(box, 2, 1, room=1) is Live.GAP
    box.uncheck()
    assert hear(box, 2, 1) is Live.GAP


def test_an_urgent_signal_overtakes_once_and_is_passed_later() -> None:
    """It stays in the queue, where the cursor passes it."""
    box = mailbox()
    hear(box, 1, 0)
    hear(box, 2, 1)
    hear(box, 3, 2, _URGENT)
    assert box.queue is not None
    first = box.overtaker(box.queue[0])
    assert first is not None
    assert first.sequence == 3
    box.ahead[first.sequence] = first.stamp
    assert box.overtaker(box.queue[0]) is None
    assert queued(box) == [1, 2, 3]
    assert box.is_over(3)
    assert not box.is_over(2)


def test_a_stream_that_went_back_is_followed_behind_what_was_taken_in() -> None:
    """Numbers come again, and are new."""
    box = mailbox(5)
    assert box.hear(5, 4, stamp_of(5), _PLAIN, 9) is Live.NOTHING
    assert box.hear(4, 3, stamp_of(4, era=1), _PLAIN, 9) is Live.REWOUND
    box.rewind()
    assert box.queue is not None
    assert isinstance(box.queue[-1], Rewind)
    assert box.behind
    assert not box.checked
    box.follow(3)
    assert (box.cursor, box.fetched) == (3, 3)
    assert not box.is_over(4)


def test_a_question_that_nobody_waits_for_is_dropped_and_no_other() -> None:
    """By the id that stands in it."""
    box = mailbox()
    box.put(Ask("r1", b'{"id":"q1"}'))
    box.put(Ask("r2", b'{"id":"q2"}'))
    box.drop_question(b'"q1"')
    assert [ask.reply for ask in box.drop_all()] == ["r2"]
    assert box.backlog == 0


def item(subject: str, msg_id: str, size: int = 1) -> OutboxItem:
    """An emitted signal."""
    return OutboxItem(subject, msg_id, b"x" * size)


def test_one_signal_per_receiver_is_on_its_way() -> None:
    """And a commit that names it once more sends nothing."""
    box = Outbox([])
    items = [item("a", "1"), item("a", "2"), item("b", "3")]
    for one in items:
        box.add(one)
    assert box.line_up(items) == ["a", "b"]
    assert box.line_up(items) == []
    assert box.acknowledged("a", items[0]) is items[1]
    assert box.acknowledged("b", items[2]) is None
    assert not box.is_all_out()
    assert box.acknowledged("a", items[1]) is None
    assert box.is_all_out()
    assert not box
    assert box.size == 0


def test_nothing_leaves_before_the_recovered_were_compared_with_the_streams() -> None:
    """Those that a stream holds are not sent again."""
    old = [item("a", "1"), item("a", "2")]
    box = Outbox(old)
    new = item("a", "3")
    box.add(new)
    assert box.line_up([*old, new]) == []
    box.drop("1")
    assert box.line_up(box.release()) == ["a"]
    assert box.head("a") is old[1]
    assert box.recovering


def test_who_waits_behind_one_that_is_given_up_has_waited_as_long() -> None:
    """The receiver is as full for the next."""
    box = Outbox([])
    items = [item("a", "1"), item("a", "2")]
    for one in items:
        box.add(one)
    box.line_up(items)
    items[0].refused_since = 4.0
    assert box.give_up("a") == (items[0], items[1])
    assert items[1].refused_since == 4.0
    assert list(box.items) == ["2"]


def test_a_full_outbox_is_choked_until_half_of_it_has_left() -> None:
    """Not one by one: every commit carries all of it."""
    box = Outbox([])
    items = [item("a", str(n)) for n in range(4)]
    for one in items:
        assert not box.look_if_choked(4, 100)
        box.add(one)
    assert box.look_if_choked(4, 100)
    box.drop("0")
    box.drop("1")
    assert box.look_if_choked(4, 100)
    box.drop("2")
    assert not box.look_if_choked(4, 100)
    box.add(item("b", "big", 100))
    assert box.look_if_choked(4, 100)
