"""`Post`: of all agents of a worker: emitted signals on their way to streams, and again where that failed.

A signal is tried for as long as it takes, but for a full receiver, which is waited for only
so long. While the stream remembers an id, to publish again does no harm; later it is searched
for the signal first (`outbox.py`). The same goes for what an earlier activation has left.
"""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta

from foundation_nats.agent.activation import Activation
from foundation_nats.agent.commits import Commits
from foundation_nats.agent.committing import give_up_publishing
from foundation_nats.agent.outbox import (
    drop_published,
    find_stored,
    is_repeat_remembered,
    parse_time,
)
from foundation_nats.agent.publishing import publish_head, publish_late, publish_recovered
from foundation_nats.agent.record import OutboxItem
from foundation_nats.base.clock import monotonic
from foundation_nats.base.failpoint import failpoint
from foundation_nats.base.logs import Logger
from foundation_nats.base.tasks import TaskScope
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import OnAck, StreamReader, append_nowait
from foundation_nats.bus.subjects import Subjects
from foundation_nats.errors import (
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    MailboxFullError,
    NotFoundError,
)


class Post:
    """The emitted signals of one worker's agents.

    Args:
        signals: the stream of signals, whose clock is asked, too.
        window_s: how long a stream remembers an id.
        full_patience_s: how long a full receiver is waited for.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        signals: StreamReader,
        scope: TaskScope,
        commits: Commits,
        *,
        window_s: float,
        full_patience_s: float,
        log: Logger,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._signals = signals
        self._dead = StreamReader(bus, subjects.dead_stream)
        self._scope = scope
        self._commits = commits
        self._window_s = window_s
        self._full_patience_s = full_patience_s
        self._log = log

    def recover(self, activation: Activation) -> None:
        """Publish what the earlier activation had stored and perhaps not published."""
        if activation.outbox:
            self._scope.start(self._recover(activation), "recover-outbox")

    def append(self, subject: str, item: OutboxItem, on_ack: OnAck) -> None:
        """Publish one emitted signal; errors come by *on_ack* too."""
        if item.tried_since is None:
            item.tried_since = monotonic()
        try:
            headers = {"Nats-Msg-Id": item.msg_id, **(item.headers or {})}
            append_nowait(self._bus, subject, item.body, on_ack, headers=headers)
        except FoundationError as error:
            on_ack(error)

    def publish_later(
        self, activation: Activation, subject: str, item: OutboxItem, error: FoundationError
    ) -> None:
        """Try again after a while, for as long as it takes; but a full receiver is waited for
        only so long, because two agents that fill each other's mailboxes would wait for ever."""
        delay = 0.1
        if isinstance(error, MailboxFullError):
            now = monotonic()
            item.refused_since = item.refused_since or now
            if now - item.refused_since >= self._full_patience_s:
                give_up_publishing(activation, subject, error)
                return
            # It may be waiting for itself.
            activation.unchoke()
            delay = 0.5
        elif not isinstance(error, BusTimeoutError | BusUnavailableError):
            self._log.error(
                "emitted signal refused; it will be retried",
                agent=activation.id,
                subject=subject,
                error=str(error),
            )
            delay = 5.0
        if not is_repeat_remembered(monotonic() - (item.tried_since or 0.0), self._window_s):
            self._scope.start(self._publish_late(activation, subject, item), "publish-late")
            return
        self.publish_again_after(delay, activation, subject)

    def publish_again_after(self, delay_s: float, activation: Activation, subject: str) -> None:
        """Try the head of *subject*'s line again in about *delay_s*."""
        asyncio.get_running_loop().call_later(
            delay_s * random.uniform(0.8, 1.2), publish_head, activation, subject
        )

    async def _publish_late(self, activation: Activation, subject: str, item: OutboxItem) -> None:
        """An earlier try may have been stored so long ago that its id is forgotten: look first."""
        while activation.failure is None:
            await asyncio.sleep(0.5 * random.uniform(0.8, 1.2))
            try:
                info = await self._signals.info()
                age = timedelta(seconds=monotonic() - (item.tried_since or 0.0))
                since = parse_time(info["ts"]) - age
                found = await find_stored(self._reader_of, [item], since)
            except (BusTimeoutError, BusUnavailableError, NotFoundError):
                continue
            publish_late(activation, subject, item, item.msg_id in found)
            return

    async def _recover(self, activation: Activation) -> None:
        """Publish what the earlier activation had stored and perhaps not published."""
        while activation.failure is None:
            try:
                await drop_published(
                    self._reader_of, self._signals, activation.outbox, window_s=self._window_s
                )
                break
            except (BusTimeoutError, BusUnavailableError, NotFoundError):
                await asyncio.sleep(0.3)
        failpoint("claim.after_outbox")
        publish_recovered(activation)
        if not activation.outbox:
            activation.outbox.recovering = False
        if not activation.outbox and activation.outbox.committed:
            self._commits.clear_later(activation)

    def _reader_of(self, subject: str) -> StreamReader | None:
        if subject.startswith(self._subjects.mailbox("")):
            return self._signals
        if subject.startswith(self._subjects.dead("")):
            return self._dead
        return None
