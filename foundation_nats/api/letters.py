"""`cluster.dead` and `cluster.events`: what was given up, and what has happened."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING

import orjson
from pydantic import ValidationError

from foundation_nats.base.clock import utc_now
from foundation_nats.bus import rpc
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.errors import ConfigError, DeadLetterNotFoundError, DecodeError
from foundation_nats.observe.taps import Tap
from foundation_nats.observe.why import Numbered
from foundation_nats.signaling.envelope import message_id
from foundation_schemas import ClusterEvent, DeadLetter, Receipt, Target
from foundation_schemas.base import WireModel

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_PAGES_MAX = 1000


class DeadEntry(WireModel):
    """A dead letter and the number by which it is shown, replayed and discarded."""

    number: int
    letter: DeadLetter


class DeadLetters:
    """The signals that were given up."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._reader = StreamReader(cluster.bus, cluster.subjects.dead_stream)

    async def list(self, agent: str | None = None, *, limit: int = 100) -> builtins.list[DeadEntry]:
        """The newest *limit* dead letters, oldest first."""
        subjects = self._cluster.subjects
        subject = subjects.dead_all() if agent is None else subjects.dead(agent)
        found: builtins.list[DeadEntry] = []
        start = 1
        for _ in range(_PAGES_MAX):
            messages, more = await self._reader.page(subject, start)
            found = [*found, *(self._entry(message) for message in messages)][-limit:]
            if not more or not messages:
                break
            start = messages[-1].sequence + 1
        return found

    def _entry(self, message: StoredMessage) -> DeadEntry:
        return DeadEntry(number=message.sequence, letter=rpc.decode(DeadLetter, message.data))

    async def show(self, number: int) -> DeadEntry:
        """One dead letter.

        Raises:
            DeadLetterNotFoundError: there is none with this number.
        """
        message = await self._reader.at_sequence(number) if number > 0 else None
        if message is None:
            raise DeadLetterNotFoundError(
                f"There is no dead letter {number}.", hint="`foundation dead list` shows them."
            )
        return self._entry(message)

    async def replay(self, number: int) -> Receipt:
        """Send the signal to its agent again, then drop the dead letter.

        Replaying the same number twice takes effect once.

        Raises:
            DeadLetterNotFoundError: there is none with this number.
            ConfigError: its bytes were no signal: there is nothing to send.
            MailboxFullError, BusTimeoutError: not sent, or not known; the letter is kept.
        """
        letter = (await self.show(number)).letter
        if letter.signal is None:
            raise ConfigError(
                f"Dead letter {number} holds no signal that could be sent again.",
                hint="Discard it.",
            )
        target = (
            str(letter.signal.get("subject") or "everyone")
            if letter.agent == "route"
            else f"agent:{letter.agent}"
        )
        # A new id: the mailbox has already consumed the old one.
        signal = {**letter.signal, "id": f"{letter.signal['id']}.replay{number}"}
        signal.pop("deadline", None)  # it may have been given up for that
        publisher = self._cluster._publisher
        parsed = Target.parse(target)
        ack = await publisher.store(
            publisher.subject(parsed),
            orjson.dumps(signal),
            message_id(target, "replay", f"{number}"),
            timeout=10.0,
        )
        await self._reader.delete(number)
        return Receipt(
            id=signal["id"],
            target=target,
            stream=ack.stream,
            sequence=ack.sequence,
            duplicate=ack.duplicate,
        )

    async def discard(self, number: int) -> None:
        """Drop a dead letter for good.

        Raises:
            DeadLetterNotFoundError: there is none with this number.
        """
        await self.show(number)
        await self._reader.delete(number)


class Events:
    """The bounded log of what has happened."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._reader = StreamReader(cluster.bus, cluster.subjects.events_stream)

    async def list(
        self, *, since_s: float | None = None, topic: str | None = None, limit: int = 200
    ) -> builtins.list[ClusterEvent]:
        """The newest *limit* events, oldest first; those of the last *since_s* seconds."""
        subject = self._cluster.subjects.event(topic, ">") if topic else None
        start_time = None
        if since_s is not None:
            start_time = (utc_now() - timedelta(seconds=since_s)).isoformat()
        state = (await self._reader.info())["state"]
        start = max(1, int(state["first_seq"]))
        if topic is None and since_s is None:
            start = max(start, int(state["last_seq"]) - limit + 1)
        found: builtins.list[ClusterEvent] = []
        for _ in range(_PAGES_MAX):
            messages, more = await self._reader.page(subject, start, start_time=start_time)
            found = [*found, *filter(None, map(_event, messages))][-limit:]
            if not more or not messages:
                break
            start, start_time = messages[-1].sequence + 1, None
        return found

    async def numbered(self, *, limit: int) -> tuple[builtins.list[Numbered], bool]:
        """The newest *limit* events with their numbers, and whether there were older ones."""
        state = (await self._reader.info())["state"]
        first = int(state["first_seq"])
        start = max(1, first, int(state["last_seq"]) - limit + 1)
        is_cut = start > 1
        found: builtins.list[Numbered] = []
        for _ in range(_PAGES_MAX):
            messages, more = await self._reader.page(None, start)
            for message in messages:
                event = _event(message)
                if event is not None:
                    found.append(Numbered(message.sequence, event))
            if not more or not messages:
                break
            start = messages[-1].sequence + 1
        return found, is_cut

    async def follow(self) -> AsyncIterator[ClusterEvent]:
        """Every event from now on."""
        tap = Tap(
            self._cluster.bus, self._cluster.subjects, pattern=self._cluster.subjects.events()
        )
        async with tap:
            async for item in tap:
                try:
                    yield ClusterEvent.model_validate(item.body)
                except ValidationError:
                    continue


def _event(message: StoredMessage) -> ClusterEvent | None:
    try:
        return rpc.decode(ClusterEvent, message.data)
    except DecodeError:
        return None
