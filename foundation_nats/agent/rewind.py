"""Which signals are new when the stream of mailboxes has gone back: the rule, and the server's times as keys.

A power cut under ``sync_interval``, a restored backup, or a stream deleted and made anew
take the stream's last messages away, but not the records that say they were handled.
The numbers of the lost ones are given out again, so a cursor alone can't tell what is new.

**The rule.** A record holds, besides the cursor, the *mark*: the latest time at which the
server stored any signal that the agent has handled. A stored signal is unread if its number
lies above the cursor **or** its time above the mark. Number at or below the cursor and time
above the mark is possible only where the stream went back: everything that was handled was
stored at or before the mark. The first such signal is where the stream goes on; the agent
finishes what it holds in memory, commits the cursor just before it by compare-and-set
under its epoch (which keeps older activations out, as with every commit) together with a new
salt, so that numbers seen before don't give known ids to what is emitted from now on.

It needs nobody to have watched: it holds however far the stream has grown since, also
beyond the old cursor, and is decided anew from the record by each activation.

When it is applied: at every claim, after every disconnect, new stream leader, or change of the
stream's creation; until then nothing is taken from live copies. And at each live copy.

Guaranteed: no signal takes effect twice by this rule, whatever the clocks say (the mark
never goes back, and equal times count as handled). What is receipted after the cut takes
effect, if the server's clock has by then passed the mark.

Not guaranteed: if the clock goes back with the data (no battery, no NTP yet), the stream's
last number below the cursor tells it, and the cursor is set there; signals stored before that
was noticed may be skipped. A hidden signal can also be missed if both the advisory of a new leader *and* its own
live copy are lost, and a later signal beyond the old cursor comes before the next sweep.
A sender or outbox that repeats an id whose message was lost with the tail is not
recognised as a repeat by the stream: where the effect survived, it happens twice.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

_FULL = len("2026-01-01T00:00:00.000000000Z")


def stamp(time: str) -> str:
    """A server's time (RFC 3339, UTC, zeros at the end left out) as text that sorts."""
    if len(time) == _FULL or not time:
        return time
    head, _, fraction = time.removesuffix("Z").partition(".")
    return f"{head}.{fraction:0<9}Z"


def just_after(mark: str) -> str:
    """The next nanosecond after *mark*."""
    head, _, fraction = mark.removesuffix("Z").partition(".")
    nanoseconds = int(fraction) + 1
    if nanoseconds == 1_000_000_000:
        moment = datetime.fromisoformat(head).replace(tzinfo=UTC) + timedelta(seconds=1)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.000000000Z"
    return f"{head}.{nanoseconds:09}Z"


def is_rewound(sequence: int, stored_at: str, *, cursor: int, mark: str) -> bool:
    """Whether a stored signal shows that the stream went back: a number seen before, a time not."""
    return sequence <= cursor and bool(mark) and stamp(stored_at) > mark


def has_lost_its_clock(info: Mapping[str, Any], *, cursor: int, mark: str) -> bool:
    """Whether the stream ends before *cursor*, and the server's clock is behind what it once gave."""
    return int(info["state"]["last_seq"]) < cursor and stamp(info.get("ts", "")) <= mark
