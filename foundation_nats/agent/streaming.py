"""`Replies`: an answer of many items, on the agent's side: credit, signs of life, and its end.

A handler that is an async generator answers `ask_stream` item by item. While it runs its agent
handles nothing else, and what it changes is kept in one step when it ends, as with any handler:
so items are provisional until the asker has seen the end, and a generator that raises, or is
ended by its asker, leaves no trace. All that was handled before is stored before the first item.

At most so many items are on their way as the asker has given credit for. The asker's credit is
a total and is repeated, so a lost one does no harm; an asker that is silent for `GONE_S` is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import AgentUnavailableError, FoundationError, HandlerError

WINDOW_MAX = 4096
BEAT_S = 1.0
"""Between two signs of life to the asker."""
GONE_S = 15.0
"""Without a word from the asker."""
COLLECTED_MAX = 10_000
"""Items of a generator that was asked by `ask`, which wants one answer."""

Observe = Callable[[Coroutine[Any, Any, int]], Coroutine[Any, Any, int]]


class Replies:
    """The items of one answer, on their way to the asker."""

    __slots__ = (
        "_allowed",
        "_end",
        "_epoch",
        "_heard_at",
        "_is_over",
        "_publish",
        "_room",
        "count",
        "id",
    )

    def __init__(self, id: str, window: int, epoch: int, publish: Callable[[bytes], None]) -> None:
        self.id = id
        self.count = 0
        """Items sent."""
        self._allowed = max(1, min(window, WINDOW_MAX))
        self._epoch = epoch
        self._publish = publish
        self._room = asyncio.Event()
        self._heard_at = monotonic()
        self._is_over: FoundationError | None = None
        self._end: asyncio.Event = asyncio.Event()

    def on_flow(self, data: bytes) -> None:
        """Take credit, or the order to end, off the wire."""
        flow = read_flow(data)
        if flow is None or flow[0] != self.id:
            return
        self._heard_at = monotonic()
        self._allowed = max(self._allowed, flow[1])
        self._room.set()
        if flow[2]:
            self.end(HandlerError("The asker has ended the answer; nothing of it was kept."))

    def end(self, why: FoundationError) -> None:
        """Make the generator end; its effects are not kept."""
        self._is_over = self._is_over or why
        self._end.set()

    async def send(
        self,
        generator: AsyncGenerator[Any, None],
        *,
        observed: Observe,
        may_go_on: Callable[[], FoundationError | None],
    ) -> int:
        """Send what *generator* yields; returns how many items that were.

        *may_go_on* is asked every now and then, and before each item: an error ends the answer.

        Raises:
            FoundationError: why it was ended before its end.
            Exception: what the generator raised.
        """
        self._publish(orjson.dumps({"begun": self._epoch}))
        # One task for all of it: an `asyncio.timeout` in a generator may span its yields.
        task = asyncio.create_task(observed(self._pump(generator, may_go_on)), name="replies")
        ended = asyncio.create_task(self._end.wait(), name="replies.end")
        try:
            while not task.done():
                await asyncio.wait(
                    {task, ended}, timeout=BEAT_S, return_when=asyncio.FIRST_COMPLETED
                )
                if task.done():
                    break
                if monotonic() - self._heard_at > GONE_S:
                    self.end(HandlerError(f"The asker was not heard of for {GONE_S:g} s."))
                elif (why := may_go_on()) is not None:
                    self.end(why)
                if self._is_over is not None:
                    break
                self._publish(b'{"beat":%d}' % self.count)
        finally:
            ended.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if self._is_over is not None:
            if not task.cancelled():
                task.exception()  # looked at: what it says does not matter any more
            raise self._is_over
        return task.result()

    async def _pump(
        self, generator: AsyncGenerator[Any, None], may_go_on: Callable[[], FoundationError | None]
    ) -> int:
        async with aclosing(generator):
            async for item in generator:
                body = to_json(item)
                while self.count >= self._allowed:
                    self._room.clear()
                    await self._room.wait()
                if (why := may_go_on()) is not None:
                    raise why
                self.count += 1
                self._publish(b'{"n":%d,"item":%b}' % (self.count, body))
        return self.count

    def last(self, result: Any) -> bytes:
        """What leaves once the effects are stored; of a handler that is no generator its only item."""
        if self.count or isinstance(result, Ended):
            return b'{"end":%d}' % self.count
        return b'{"end":1,"item":%b}' % to_json(result)


class Ended:
    """What a generator's handler returns to whoever has called it: it was sent already."""


def asked_for(body: dict[str, Any], epoch: int, publish: Callable[[bytes], None]) -> Replies | None:
    """The answer that a question wants item by item; None: it wants one reply."""
    window = body.get("replies")
    if not isinstance(window, int) or isinstance(window, bool):
        return None
    return Replies(body["id"], window, epoch, publish)


def read_flow(data: bytes) -> tuple[str, int, bool] | None:
    """Of an asker's message: which answer, up to which item, whether to end it; None: it is none."""
    try:
        body = orjson.loads(data)
        return str(body["id"]), int(body.get("upto", 0)), bool(body.get("cancel", False))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


async def collected(generator: AsyncGenerator[Any, None]) -> list[Any]:
    """All that *generator* yields: its answer to `ask`.

    Raises:
        HandlerError: more than `COLLECTED_MAX`.
    """
    found: list[Any] = []
    async with aclosing(generator):
        async for item in generator:
            if len(found) >= COLLECTED_MAX:
                raise HandlerError(
                    f"It has more than {COLLECTED_MAX:,} items to say.",
                    hint="Ask by `ask_stream`.",
                )
            found.append(item)
    return found


def ending(agent: str, why: str) -> AgentUnavailableError:
    """The error of an answer that the agent can't bring to its end here."""
    return AgentUnavailableError(
        f"{agent} can't bring its answer to an end: {why}. Nothing of it was kept.",
        hint="Ask again.",
        agent=agent,
    )
