"""The rule by which an agent tells what is new in a stream that has gone back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from foundation_nats.agent.rewind import has_lost_its_clock, is_rewound, just_after, stamp

_START = datetime(2026, 1, 1, tzinfo=UTC)


def server_time(nanoseconds: int) -> str:
    """As the server writes it: zeros at the end are left out."""
    moment = _START + timedelta(seconds=nanoseconds // 10**9)
    fraction = f"{nanoseconds % 10**9:09}".rstrip("0")
    return f"{moment:%Y-%m-%dT%H:%M:%S}{'.' if fraction else ''}{fraction}Z"


def test_stamps_of_whole_and_broken_seconds_have_one_width() -> None:
    """Zeros come back; nothing stays nothing."""
    assert stamp("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00.000000000Z"
    assert stamp("2026-01-01T00:00:00.12Z") == "2026-01-01T00:00:00.120000000Z"
    assert stamp("") == ""
    assert just_after("2026-12-31T23:59:59.999999999Z") == "2027-01-01T00:00:00.000000000Z"


_TIMES = st.integers(0, 10**12)


@given(_TIMES, _TIMES)
def test_stamps_sort_as_times(first: int, second: int) -> None:
    """And the next nanosecond is the next stamp."""
    assert (stamp(server_time(first)) < stamp(server_time(second))) == (first < second)
    assert just_after(stamp(server_time(first))) == stamp(server_time(first + 1))


_MINE = st.booleans()


@given(
    history=st.lists(_MINE, min_size=1, max_size=20),
    handled=st.integers(1, 20),
    kept=st.integers(0, 20),
    after=st.lists(_MINE, max_size=40),
)
def test_all_that_came_after_the_cut_is_told_and_nothing_else(
    history: list[bool], handled: int, kept: int, after: list[bool]
) -> None:
    """One mailbox of several in a stream that loses its tail and grows again, past the cursor or not."""
    old = [(n, server_time(n * 70), mine) for n, mine in enumerate(history, 1)]
    seen = [item for item in old[:handled] if item[2]]
    if not seen:
        return
    cursor, mark = seen[-1][0], max(stamp(time) for _, time, _ in seen)
    first = min(kept, len(old))
    new = [(first + n, server_time(10**6 + n * 70), mine) for n, mine in enumerate(after, 1)]
    mailbox = [item for item in old[:first] + new if item[2]]
    hidden = [
        number for number, time, _ in mailbox if is_rewound(number, time, cursor=cursor, mark=mark)
    ]
    place = min(hidden) - 1 if hidden else cursor
    unread = {(number, time) for number, time, _ in mailbox if number > place}
    handled_before = {(number, time) for number, time, _ in seen}
    assert not unread & handled_before
    assert {(number, time) for number, time, mine in new if mine} <= unread


def test_without_a_mark_nothing_is_told() -> None:
    """An agent that has handled nothing has nothing to compare."""
    assert not is_rewound(1, server_time(5), cursor=3, mark="")


def test_a_clock_that_went_back_with_the_data_is_told_by_the_streams_end() -> None:
    """Only both together: a stream that ends early under a good clock is told by its next signal."""
    mark = stamp(server_time(1000))
    info = {"state": {"last_seq": 5}, "ts": server_time(999)}
    assert has_lost_its_clock(info, cursor=6, mark=mark)
    assert not has_lost_its_clock(info, cursor=5, mark=mark)
    assert not has_lost_its_clock({**info, "ts": server_time(1001)}, cursor=6, mark=mark)
