"""Removes consumed signals from the mailboxes of this node's agents, lazily.

Only managers trim (F12): the right to purge is all or nothing per stream. A
consumed signal stays `trim_min_age_s` as evidence against late repeats (see
`agent/outbox.py`), unless its mailbox fills up. What a crash leaves untrimmed
is trimmed when the agent's cursor moves the next time. Of an agent that keeps a history (`mailbox.history`) workers report
as consumed only what lies behind it: see `agent/past.py`.

Numbers below a cursor are consumed only while the stream does not go back
(`agent/rewind.py`). So at a disconnect, and when the stream turns out to be another, be led
by another or end before a cursor, everything noted is forgotten; workers don't
report a cursor before they have compared it with the stream, and what they report then
waits its age again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint, planted
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.streams import StreamReader, identity
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import MailboxConfig
from foundation_nats.errors import BusError, NotFoundError

_MARKS_MAX = 64
_PAST = 10_000
"""So far beyond the cursor, and all the time, trims who has the planted bug."""


class Mark(NamedTuple):
    """How far a mailbox was consumed at a moment."""

    noticed_at: float
    cursor: int
    total: int
    """Signals consumed by the activation up to here."""


@dataclass(slots=True)
class Consumed:
    """How far one mailbox is consumed, and since when."""

    prompt: bool = False
    """Remove at once: the agent keeps no cursor, so what stays would be handled again."""
    trimmed: int = 0
    """Of the consumed signals, how many are removed."""
    marks: deque[Mark] = field(default_factory=deque)
    """Oldest first."""


def trim_to(
    consumed: Consumed, now: float, *, min_age_s: float, batch: int, pressure: int
) -> Mark | None:
    """The mark up to which to trim now; None: leave it.

    Pure. Signals noticed `min_age_s` ago go once there are *batch* of them; when
    *pressure* consumed ones lie in the mailbox, all go, young or not.
    """
    if not consumed.marks:
        return None
    newest = consumed.marks[-1]
    if consumed.prompt or newest.total - consumed.trimmed >= pressure:
        return newest
    old = None
    for mark in consumed.marks:
        if now - mark.noticed_at < min_age_s:
            break
        old = mark
    return old if old is not None and old.total - consumed.trimmed >= batch else None


class Trimmer:
    """Trims what workers report as consumed."""

    def __init__(self, signals: StreamReader, subjects: Subjects, config: MailboxConfig) -> None:
        self._signals = signals
        self._subjects = subjects
        self._config = config
        self._consumed: dict[str, Consumed] = {}
        self._stream_is: tuple[str, str] | None = None
        self._log = get_logger("trimmer")

    def note(
        self, consumed: Mapping[str, tuple[int, int]], *, prompt: Collection[str] = ()
    ) -> None:
        """These mailboxes are consumed up to (cursor, count); *prompt* ones keep no record."""
        now = monotonic()
        for agent, (cursor, count) in consumed.items():
            entry = self._consumed.setdefault(agent, Consumed())
            if entry.marks and entry.marks[-1].cursor == cursor:
                continue
            if entry.marks and entry.marks[-1].cursor > cursor:
                # The mailbox went back, or a report came late: forget, which is never too early.
                entry.marks.clear()
            if count < entry.trimmed:
                # Another activation counts anew.
                entry.trimmed = 0
                entry.marks.clear()
            entry.prompt = agent in prompt
            entry.marks.append(Mark(now, cursor, count))
            if len(entry.marks) > _MARKS_MAX:
                # Forget every second mark: coarser, never too early.
                entry.marks = deque(list(entry.marks)[1::2])

    def forget(self, agent: str) -> None:
        """The agent is hosted elsewhere now."""
        self._consumed.pop(agent, None)

    def distrust(self) -> None:
        """The stream may have gone back: what was noted of its numbers counts no more."""
        for entry in self._consumed.values():
            entry.marks.clear()

    async def _is_trusted(self) -> bool:
        """Whether the stream is still the one whose numbers were noted."""
        try:
            info = await self._signals.info()
        except (BusError, NotFoundError) as error:
            self._log.debug("trimming put off", error=str(error))
            return False
        before, now = self._stream_is, identity(info)
        self._stream_is = now
        last = int(info["state"]["last_seq"])
        cursors = (entry.marks[-1].cursor for entry in self._consumed.values() if entry.marks)
        if before not in (None, now) or max(cursors, default=0) > last:
            self.distrust()
            return False
        return True

    async def run(self) -> None:
        """Trim, for ever."""
        while True:
            await asyncio.sleep(self._config.trim_every_s)
            due = self._due()
            if due and await self._is_trusted():
                for agent, entry, mark in due:
                    if mark in entry.marks:
                        await self._trim(agent, entry, mark)

    def _due(self) -> list[tuple[str, Consumed, Mark]]:
        """What is to be trimmed now."""
        found = []
        is_eager = planted("trim_past_cursor")
        for agent, entry in self._consumed.items():
            mark = trim_to(
                entry,
                monotonic(),
                min_age_s=0.0 if is_eager else self._config.trim_min_age_s,
                batch=1 if is_eager else min(256, max(1, self._config.mailbox_max // 8)),
                pressure=max(1, self._config.mailbox_max // 2),
            )
            if mark is not None:
                found.append((agent, entry, mark))
        return found

    async def _trim(self, agent: str, entry: Consumed, mark: Mark) -> None:
        failpoint("trim.before")
        try:
            past = _PAST if planted("trim_past_cursor") else 0
            await self._signals.purge(self._subjects.mailbox(agent), below=mark.cursor + 1 + past)
        except BusError as error:
            self._log.debug("trimming put off", agent=agent, error=str(error))
            return
        except NotFoundError as error:
            self._log.debug("nothing to trim", agent=agent, error=str(error))
            return
        failpoint("trim.after")
        entry.trimmed = mark.total
        while entry.marks and entry.marks[0].cursor <= mark.cursor:
            entry.marks.popleft()
