"""Removes consumed signals from the mailboxes of this node's agents, lazily.

Only managers trim (F12): the right to purge is all or nothing per stream. A
consumed signal stays `trim_min_age_s` as evidence against late repeats (see
`agent/outbox.py`), unless its mailbox fills up. What a crash leaves untrimmed
is trimmed when the agent's cursor moves the next time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import get_logger
from foundation_nats.bus.streams import StreamReader
from foundation_nats.bus.subjects import Subjects
from foundation_nats.config import MailboxConfig
from foundation_nats.errors import BusError

_MARKS_MAX = 64


@dataclass(slots=True)
class Consumed:
    """How far one mailbox is consumed, and since when."""

    trimmed: int = 0
    prompt: bool = False
    """Remove at once: the agent keeps no cursor, so what stays would be handled again."""
    marks: deque[tuple[float, int]] = field(default_factory=deque)
    """(noticed at, cursor), oldest first."""


def trim_to(
    consumed: Consumed, now: float, *, min_age_s: float, batch: int, pressure: int
) -> int | None:
    """The cursor up to which to trim now; None: leave it.

    Pure. Signals noticed `min_age_s` ago go once there are *batch* of them (the
    sequence span bounds their number); at *pressure* unremoved ones all go.
    """
    if not consumed.marks:
        return None
    newest = consumed.marks[-1][1]
    if consumed.prompt or newest - consumed.trimmed >= pressure:
        return newest
    old = [cursor for noticed, cursor in consumed.marks if now - noticed >= min_age_s]
    if old and old[-1] - consumed.trimmed >= batch:
        return old[-1]
    return None


class Trimmer:
    """Trims what workers report as consumed."""

    def __init__(self, signals: StreamReader, subjects: Subjects, config: MailboxConfig) -> None:
        self._signals = signals
        self._subjects = subjects
        self._config = config
        self._consumed: dict[str, Consumed] = {}
        self._log = get_logger("trimmer")

    def note(self, cursors: dict[str, int], *, prompt: Collection[str] = ()) -> None:
        """These mailboxes are consumed up to these sequences; *prompt* ones keep no record."""
        now = monotonic()
        for agent, cursor in cursors.items():
            entry = self._consumed.setdefault(agent, Consumed())
            if entry.marks and entry.marks[-1][1] >= cursor:
                continue
            entry.prompt = agent in prompt
            entry.marks.append((now, cursor))
            if len(entry.marks) > _MARKS_MAX:
                # Forget every second mark: coarser, never too early.
                entry.marks = deque(list(entry.marks)[1::2])

    def forget(self, agent: str) -> None:
        """The agent is hosted elsewhere now."""
        self._consumed.pop(agent, None)

    async def run(self) -> None:
        """Trim, for ever."""
        while True:
            await asyncio.sleep(self._config.trim_every_s)
            for agent, entry in list(self._consumed.items()):
                cursor = trim_to(
                    entry,
                    monotonic(),
                    min_age_s=self._config.trim_min_age_s,
                    batch=min(256, max(1, self._config.mailbox_max // 8)),
                    pressure=max(1, self._config.mailbox_max // 4),
                )
                if cursor is not None:
                    await self._trim(agent, entry, cursor)

    async def _trim(self, agent: str, entry: Consumed, cursor: int) -> None:
        failpoint("trim.before")
        try:
            await self._signals.purge(self._subjects.mailbox(agent), below=cursor + 1)
        except BusError as error:
            self._log.debug("trimming put off", agent=agent, error=str(error))
            return
        failpoint("trim.after")
        entry.trimmed = cursor
        while entry.marks and entry.marks[0][1] <= cursor:
            entry.marks.popleft()
