"""`Tap`: a read-only, bounded look at live traffic, and at what is stored of the past.

A tap can't hurt: it uses core subscriptions and a bounded queue that drops the
oldest (`dropped` counts them). It sees signals as the stream delivered them,
asks as they were put, events and dead letters. With *replay_s* it begins with
what the streams still hold of that time, then goes on live without repeating.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import orjson

from foundation_nats.base.clock import utc_now, utc_text
from foundation_nats.bus.connection import Bus
from foundation_nats.bus.streams import StoredMessage, StreamReader
from foundation_nats.bus.subjects import Subjects
from foundation_nats.bus.wire import Message, Route
from foundation_nats.observe.filters import Filter
from foundation_nats.observe.filters import parse as parse_filter

QUEUE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class TapItem:
    """One thing that passed."""

    at: str
    kind: str
    """``signal``, ``ask``, ``event`` or ``dead``."""
    subject: str
    agent: str | None
    sequence: int
    body: dict[str, Any]
    """The envelope, the event or the dead letter."""

    @property
    def type(self) -> str:
        """The signal's type, or ``topic.what`` of an event."""
        if self.kind == "event":
            return f"{self.body.get('topic')}.{self.body.get('what')}"
        signal = self.body.get("signal") if self.kind == "dead" else self.body
        return str((signal or {}).get("type", ""))


def _matches(pattern: str, text: str) -> bool:
    """Whether a dotted *text* fits a pattern with ``*`` (one token) and ``>`` (the rest)."""
    wanted, tokens = pattern.split("."), text.split(".")
    for index, part in enumerate(wanted):
        if part == ">":
            return len(tokens) > index
        if index >= len(tokens) or part not in ("*", tokens[index]):
            return False
    return len(wanted) == len(tokens)


def _mark(item: TapItem) -> int:
    return hash((item.subject, orjson.dumps(item.body)))


class Tap:
    """An open tap; iterate it, and close it by leaving its ``async with``."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        *,
        pattern: str | None = None,
        type: str | None = None,
        agent: str | None = None,
        on_node: Callable[[str], bool] | None = None,
        where: str | None = None,
        replay_s: float | None = None,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._pattern = pattern
        self._type = type
        self._agent = agent
        self._on_node = on_node
        self._where: Filter | None = parse_filter(where) if where else None
        self._replay_s = replay_s
        self._items: deque[TapItem] = deque(maxlen=QUEUE_MAX)
        self._some = asyncio.Event()
        self._routes: list[Route] = []
        self._replayed_to = 0
        """The last signal that the replay has shown."""
        self._replayed: set[int] = set()
        """Hashes of the events and dead letters that the replay has shown."""
        self.dropped = 0

    async def __aenter__(self) -> Self:
        names = self._subjects
        for subject in (names.agent("*"), names.routes(), names.events(), names.dead_all()):
            self._routes.append(self._bus.subscribe(subject, self._on_message))
        await self._bus.flush()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for route in self._routes:
            self._bus.unsubscribe(route)

    async def __aiter__(self) -> AsyncIterator[TapItem]:
        if self._replay_s is not None:
            async for item in self._replay(self._replay_s):
                yield item
        while True:
            while self._items:
                item = self._items.popleft()
                if not self._was_replayed(item):
                    yield item
            self._some.clear()
            await self._some.wait()

    def _was_replayed(self, item: TapItem) -> bool:
        if item.kind == "signal":
            return 0 < item.sequence <= self._replayed_to
        # A live event carries no sequence, so an overlap is told by its content.
        mark = _mark(item)
        if mark in self._replayed:
            self._replayed.discard(mark)
            return True
        return False

    # ---- live -------------------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        tokens = message.subject.split(".")
        kind, agent = self._kind(tokens)
        if kind is None:
            return
        sequence = int(message.header(b"Nats-Sequence") or b"0")
        subject = message.subject
        if kind == "signal" and tokens[2] == "agent":
            subject = self._subjects.mailbox(tokens[3])
        item = self._item(kind, subject, agent, sequence, message.data, utc_text())
        if item is None:
            return
        if len(self._items) == QUEUE_MAX:
            self.dropped += 1
        self._items.append(item)
        self._some.set()

    def _kind(self, tokens: list[str]) -> tuple[str | None, str | None]:
        match tokens[2:]:
            case ["agent", agent, "live"] | ["signal", "agent", agent]:
                return "signal", agent
            case ["agent", agent, "ask"]:
                return "ask", agent
            case ["route", *_]:
                return "signal", None
            case ["event", *_]:
                return "event", None
            case ["dead", "agent", agent]:
                return "dead", agent
        return None, None

    def _item(
        self, kind: str, subject: str, agent: str | None, sequence: int, data: bytes, at: str
    ) -> TapItem | None:
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError:
            body = {"raw": data[:2000].decode("utf-8", "replace")}
        if not isinstance(body, dict):
            body = {"raw": body}
        item = TapItem(at, kind, subject, agent, sequence, body)
        return item if self._wanted(item) else None

    def _wanted(self, item: TapItem) -> bool:
        agent = item.agent
        if agent is None and item.kind == "event":
            agent = item.body.get("data", {}).get("agent")
        if self._pattern is not None and not (
            _matches(self._pattern, item.subject) or _matches(self._pattern, item.type)
        ):
            return False
        if self._type is not None and not _matches(self._type, item.type):
            return False
        if self._agent is not None and agent != self._agent:
            return False
        if self._on_node is not None and not (agent is not None and self._on_node(agent)):
            return False
        return self._where is None or self._where(item.body)

    # ---- past -------------------------------------------------------------------

    async def _replay(self, seconds: float) -> AsyncIterator[TapItem]:
        names = self._subjects
        start = (utc_now() - timedelta(seconds=seconds)).isoformat()
        past: list[TapItem] = []
        for stream in (names.signals_stream, names.events_stream, names.dead_stream):
            reader = StreamReader(self._bus, stream)
            messages, more = await reader.page(None, 1, start_time=start)
            while messages:
                past.extend(filter(None, (self._past(message) for message in messages)))
                if not more or len(past) >= QUEUE_MAX:
                    break
                messages, more = await reader.page(None, messages[-1].sequence + 1)
        for item in sorted(past, key=lambda item: item.at):
            if item.kind == "signal":
                self._replayed_to = max(self._replayed_to, item.sequence)
            else:
                self._replayed.add(_mark(item))
            yield item

    def _past(self, message: StoredMessage) -> TapItem | None:
        kind, agent = self._kind(message.subject.split("."))
        if kind is None:
            return None
        return self._item(
            kind, message.subject, agent, message.sequence, message.data, message.time
        )


__all__ = ["Tap", "TapItem"]
