"""`Outbox`: what one agent has emitted and no stream has acknowledged yet, in a line per receiver.

Pure. What is in it is part of every commit, and leaves only after the commit that holds
its cause: `line_up` gets what a stored commit held. The signals for one receiver are
published one after the other, so that their order survives a retry; only the *head* of a
line is on its way.

What an earlier activation left in the record is *recovered*: until the streams were
asked which of it they hold already (`outbox.py`), nothing leaves; what is lined up
meanwhile is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from foundation_nats.agent.record import OutboxItem


class Outbox:
    """The emitted signals of one agent."""

    __slots__ = (
        "_lines",
        "choked",
        "committed",
        "held",
        "items",
        "recovered_at",
        "recovering",
        "size",
    )

    def __init__(self, recovered: Sequence[OutboxItem]) -> None:
        self.items: dict[str, OutboxItem] = {item.msg_id: item for item in recovered}
        """Emitted and not yet acknowledged by the stream, in order."""
        self.size = sum(len(item.body) for item in recovered)
        """In bytes."""
        self.committed = len(recovered)
        """How many of them the stored record holds."""
        self.held: list[OutboxItem] | None = list(recovered) if recovered else None
        """What is stored and waits until the recovered ones were compared with the streams."""
        self.recovering = bool(recovered)
        """Some of the recovered ones are not published yet."""
        self.recovered_at = ""
        """The server's time of the record that they were recovered from."""
        self.choked = False
        """Receivers must take some of it before more is handled."""
        self._lines: dict[str, deque[OutboxItem]] | None = None

    def __bool__(self) -> bool:
        return bool(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, item: OutboxItem) -> None:
        """It was emitted: the next commit holds it."""
        self.items[item.msg_id] = item
        self.size += len(item.body)

    def drop(self, msg_id: str) -> None:
        """A stream holds it; nothing if that was known."""
        item = self.items.pop(msg_id, None)
        if item is not None:
            self.size -= len(item.body)

    def look_if_choked(self, count_max: int, size_max: int) -> bool:
        """Whether receivers must take some of it before more is handled.

        Every commit carries the whole outbox, so it is not filled up again one by one:
        once full, handling goes on when half of it has left, or a receiver is full itself.
        """
        share = 2 if self.choked else 1
        self.choked = len(self.items) * share >= count_max or self.size * share >= size_max
        return self.choked

    # ---- lines --------------------------------------------------------------------

    def line_up(self, items: Sequence[OutboxItem]) -> list[str]:
        """These are stored: returns the receivers to whose line they are the first.

        Every commit brings all that was not acknowledged when it left; so most may be known.
        """
        if self.held is not None:
            self.held = list(items)
            return []
        if self._lines is None:
            self._lines = {}
        fresh = []
        for item in items:
            if item.in_line or item.msg_id not in self.items:
                continue
            item.in_line = True
            line = self._lines.get(item.subject)
            if line is None:
                self._lines[item.subject] = deque((item,))
                fresh.append(item.subject)
            else:
                line.append(item)
        return fresh

    def release(self) -> list[OutboxItem]:
        """The recovered ones were compared with the streams: what was held for that."""
        held, self.held = self.held, None
        return held or []

    def head(self, subject: str) -> OutboxItem | None:
        """The first in *subject*'s line; None: there is no line."""
        line = None if self._lines is None else self._lines.get(subject)
        return line[0] if line else None

    def acknowledged(self, subject: str, item: OutboxItem) -> OutboxItem | None:
        """A stream holds the head of the line: the next head; None: that was the last."""
        self.drop(item.msg_id)
        return self._move_up(subject)

    def give_up(self, subject: str) -> tuple[OutboxItem, OutboxItem | None]:
        """Take the head out of its line, unpublished; returns it and the next head."""
        given_up = self.head(subject)
        assert given_up is not None
        self.drop(given_up.msg_id)
        following = self._move_up(subject)
        if following is not None:
            # The receiver is as full for the next one: it has waited long enough too.
            following.refused_since = given_up.refused_since
        return given_up, following

    def _move_up(self, subject: str) -> OutboxItem | None:
        assert self._lines is not None
        line = self._lines[subject]
        line.popleft()
        if line:
            return line[0]
        del self._lines[subject]
        return None

    def is_all_out(self) -> bool:
        """Whether no line is left; then that of the recovered ones is over, too."""
        if self._lines:
            return False
        self._lines = None
        self.recovering = False
        return True
