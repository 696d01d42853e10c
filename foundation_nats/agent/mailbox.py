"""`Mailbox`: how far one agent has come in its mailbox, and what it holds of it in memory.

Pure. Live copies come in order, but not all of them come. One with a sequence at or
below what was taken in was seen; one whose ``Nats-Last-Sequence`` lies above that shows
a gap, and the stream is read instead. Only *greater than* is a gap, because trimming
lowers that number. `hear` decides which it is; the caller acts on it.

Two lanes lead out. The queue is worked off in order; an urgent signal is in `urgent`
as well, and `overtaker` names it before its turn comes. It is then in `ahead`, until
the cursor passes it. The stamp, when the server stored it, tells it from another that
gets its number if the stream goes back.

Where the stream itself has gone back, `follow` puts the place back too: `rewind.py`
has the rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from foundation_nats.agent.intake import AHEAD_MAX, is_urgent
from foundation_nats.agent.rewind import is_rewound, stamp
from foundation_nats.bus.streams import StoredMessage


@dataclass(slots=True)
class Stored:
    """A signal in hand's reach: its place in the mailbox, and the envelope's bytes."""

    sequence: int
    data: bytes
    stamp: str
    """When the server stored it, as `rewind.stamp`."""


@dataclass(slots=True)
class Ask:
    """A question that waits for its turn."""

    reply: str
    data: bytes


class Start:
    """The first item of every activation: `on_start`."""


class Sleep:
    """The item by which an activation that has nothing to do is put to sleep."""


class Rewind:
    """The item behind all that was taken in before the stream went back."""


Item = Stored | Ask | Start | Sleep | Rewind


class Live(Enum):
    """What a live copy is to the mailbox."""

    NEXT = auto()
    """The one that comes next: it was taken into the queue."""
    NOTHING = auto()
    """Seen already, or it will be read from the stream."""
    GAP = auto()
    """Something is missing before it, or there is no room: the stream must be read."""
    REWOUND = auto()
    """The stream has gone back."""


# Every signal passes here, and to look up a member of an enum costs as much as a comparison.
NEXT, NOTHING, GAP, REWOUND = Live.NEXT, Live.NOTHING, Live.GAP, Live.REWOUND


class Mailbox:
    """The place of one agent in its mailbox, and its queue."""

    __slots__ = (
        "ahead",
        "behind",
        "checked",
        "cursor",
        "fetched",
        "fetched_mark",
        "mark",
        "queue",
        "rewinding",
        "seen",
        "skip",
        "urgent",
    )

    def __init__(self, cursor: int, mark: str, *, skip: list[int], ahead: dict[int, str]) -> None:
        self.cursor = cursor
        """The last handled signal; what is committed may lie behind."""
        self.mark = mark
        """The latest time at which the server stored any of the handled ones."""
        self.skip = skip
        """Signals beyond the cursor that were given to another agent (`signaling/rerouter.py`)."""
        self.ahead = ahead
        """Urgent signals beyond the cursor that were handled: sequence to stamp."""
        self.fetched = cursor
        """The last signal taken into `queue`."""
        self.fetched_mark = mark
        """As `mark`, of those taken in."""
        self.seen = 0
        """The highest sequence heard of; catching up goes on until it is reached."""
        self.behind = False
        """Live copies are dropped, and the stream is read instead."""
        self.checked = not mark
        """Its place was compared with the stream since that could have gone back."""
        self.rewinding = False
        """The stream did go back: nothing is taken in until the cursor has followed."""
        self.queue: deque[Item] | None = None
        self.urgent: deque[Stored] | None = None
        """Those of the queue that overtake, in order; they stay in the queue, too."""

    # ---- in -----------------------------------------------------------------------

    def hear(self, sequence: int, last: int, stored_at: str, data: bytes, room: int) -> Live:
        """Take in a live copy, that was stored after *last*, if it is the next one.

        Args:
            room: how many items may wait.
        """
        if sequence <= self.fetched:
            if is_rewound(sequence, stored_at, cursor=self.fetched, mark=self.fetched_mark):
                return REWOUND
            return NOTHING
        if sequence > self.seen:
            self.seen = sequence
        if self.behind:
            return NOTHING
        queue = self.queue
        if not self.checked or last > self.fetched or (queue is not None and len(queue) >= room):
            return GAP
        self.take(sequence, data, stored_at)
        return NEXT

    def take(self, sequence: int, data: bytes, stored_at: str) -> None:
        """Queue the signal that comes next."""
        self.fetched = sequence
        if stored_at > self.fetched_mark:
            self.fetched_mark = stored_at
        item = Stored(sequence, data, stored_at)
        if stored_at and is_urgent(data) and self.ahead.get(sequence) != stored_at:
            if self.urgent is None:
                self.urgent = deque()
            self.urgent.append(item)
        if self.queue is None:
            self.queue = deque()
        self.queue.append(item)

    def take_page(self, messages: Sequence[StoredMessage], more: bool) -> bool:
        """Take what the stream holds beyond `fetched`; True when caught up."""
        for message in messages:
            if message.sequence > self.fetched:
                self.take(message.sequence, message.data, stamp(message.time))
        if not more and self.fetched >= self.seen:
            self.behind = False
            return True
        return False

    def put(self, item: Item) -> None:
        """Queue something."""
        if self.queue is None:
            self.queue = deque()
        self.queue.append(item)

    @property
    def backlog(self) -> int:
        """Signals and asks in memory."""
        return 0 if self.queue is None else len(self.queue)

    # ---- out ----------------------------------------------------------------------

    def overtaker(self, item: Item) -> Stored | None:
        """The urgent signal that comes before *item*, the next of the queue; None: nothing does."""
        assert self.urgent is not None
        while self.urgent:
            first = self.urgent[0]
            if first.sequence > self.cursor and first.sequence not in self.ahead:
                break
            self.urgent.popleft()
        if not self.urgent:
            self.urgent = None
            return None
        if not isinstance(item, Stored | Ask) or len(self.ahead) >= AHEAD_MAX:
            return None
        return None if self.urgent[0] is item else self.urgent[0]

    def is_over(self, sequence: int) -> bool:
        """Whether this signal needs no handling (any more)."""
        return sequence <= self.cursor or sequence in self.skip or sequence in self.ahead

    def pass_by(self, item: Stored) -> None:
        """The next one is done with."""
        self.cursor = item.sequence
        if item.stamp > self.mark:
            self.mark = item.stamp

    def drop_question(self, id: bytes) -> None:
        """A question, *id* as JSON, is not waited for any more: forget it if it has not begun."""
        if self.queue:
            rest = [item for item in self.queue if not (isinstance(item, Ask) and id in item.data)]
            if len(rest) < len(self.queue):
                self.queue.clear()
                self.queue.extend(rest)

    def drop_all(self) -> list[Ask]:
        """Forget what is in memory; returns the questions among it."""
        asks = [item for item in self.queue or () if isinstance(item, Ask)]
        self.queue = self.urgent = None
        return asks

    # ---- the stream goes back -----------------------------------------------------

    def uncheck(self) -> None:
        """The stream may have gone back: take nothing in before that is known."""
        self.checked = not self.fetched_mark

    def rewind(self) -> None:
        """The stream has gone back: follow it, after all that was taken in before."""
        self.rewinding = self.behind = True
        self.checked = False
        self.put(Rewind())

    def follow(self, place: int) -> None:
        """What was taken in is handled: go on with what comes after *place*, as if it were new."""
        self.cursor = self.fetched = place
        self.skip = []
        self.ahead = {}
        self.urgent = None


def place_of(raw: bytes) -> tuple[int, int, str]:
    """Sequence, last sequence and stamp of a live copy; every signal passes here."""
    start = raw.find(b"\r\nNats-Sequence: ")
    if start < 0:
        return 0, 0, ""
    sequence = int(raw[start + 17 : raw.find(b"\r\n", start + 17)])
    start = raw.find(b"\r\nNats-Last-Sequence: ")
    last = 0 if start < 0 else int(raw[start + 22 : raw.find(b"\r\n", start + 22)])
    start = raw.find(b"\r\nNats-Time-Stamp: ")
    if start < 0:
        return sequence, last, ""
    return sequence, last, stamp(raw[start + 19 : raw.find(b"\r\n", start + 19)].decode())
