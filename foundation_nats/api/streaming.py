"""`Talk`: an answer of many items, on the asker's side: credit for more, and what became of the agent.

Items come as core messages, numbered: a lost one is noticed, never passed over. The agent gives a
sign of life every second; where none comes the registry is asked whether the activation
that has begun to answer still is the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import orjson

from foundation_nats.base.clock import monotonic
from foundation_nats.bus.rpc import read_reply
from foundation_nats.bus.wire import Message, Route
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BusError,
    DecodeError,
    FoundationError,
    NoRespondersError,
)

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

ALIVE_S = 2.0
"""Between two of our signs of life to the agent."""
_SILENT_S = 3.0
"""Without a word of the agent it is looked up, again and again."""


class Talk:
    """One question, and the items that answer it."""

    def __init__(
        self, cluster: Cluster, agent: str, id: str, payload: bytes, window: int, timeout: float
    ) -> None:
        self._cluster = cluster
        self._bus = cluster.bus
        self._agent = agent
        self._id = id
        self._payload = payload
        self._window = window
        self._timeout = timeout
        self._messages: deque[Message] = deque()
        self._news = asyncio.Event()
        self._heard_at = 0.0
        self._epoch: int | None = None
        held = None if cluster._registry is None else cluster._registry.get(agent)
        self._asked_of = None if held is None else held.record.epoch
        """The activation that is asked, where that is known: what is lost with it never begins."""
        self._taken = 0
        self._is_over = False
        self._route: Route | None = None
        self._alive: asyncio.Task[None] | None = None

    # ---- life -------------------------------------------------------------------

    async def begin(self, timeout: float) -> None:
        """Ask, and return once somebody has begun to answer.

        Raises:
            NoRespondersError: nobody was there.
            AgentUnavailableError: nobody has handled it.
            AskTimeoutError, FoundationError
        """
        reply = f"{self._bus.inbox}.stream.{token_hex(8)}"
        self._route = self._bus.subscribe(reply, self._on_message)
        self._bus.publish(self._cluster.subjects.ask(self._agent), self._payload, reply=reply)
        self._heard_at = monotonic()
        ends = self._heard_at + timeout
        while True:
            await self._wait_message(ends)
            message = self._messages[0]
            if message.status == 503:
                self._is_over = True
                raise NoRespondersError(f"Nobody answers for {self._agent}.")
            body = _read(message)
            if "error" not in body:
                self._epoch = body.get("begun")
                break
            if not await self._is_stale(message):
                self._is_over = True
                read_reply(message.data)
            self._messages.popleft()
        self._heard_at = monotonic()
        self._alive = asyncio.create_task(self._stay_alive(), name="ask_stream.alive")

    def close(self) -> None:
        """End it; a handler that is still at it is ended too. Idempotent."""
        if self._alive is not None:
            self._alive.cancel()
            self._alive = None
        if self._route is not None:
            self._bus.unsubscribe(self._route)
            self._route = None
        if not self._is_over:
            self._is_over = True
            self._tell(cancel=True)

    def _tell(self, *, cancel: bool = False) -> None:
        body = {"id": self._id, "upto": self._taken + self._window}
        if cancel:
            body["cancel"] = True
        # What is not said now is said again, or the agent finds out by our silence.
        with contextlib.suppress(BusError):
            self._bus.publish(self._cluster.subjects.flow(self._agent), orjson.dumps(body))

    async def _stay_alive(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(ALIVE_S)

    # ---- items ------------------------------------------------------------------

    async def items(self) -> AsyncGenerator[Any, None]:
        """Each item, as it comes; ends when the handler's effects are stored.

        Raises:
            AskTimeoutError: no item in time, items were lost, or the agent is gone; `details` has ``items``.
            FoundationError: the agent's answer.
        """
        told = 0
        while True:
            body = await self._next_body()
            if "item" in body:
                number = int(body.get("n", body.get("end", 0)))
                if number != self._taken + 1:
                    raise self._failed(f"{number - self._taken - 1} items were lost on their way")
            if "end" in body:
                self._is_over = True
            if "item" in body:
                self._taken += 1
                yield body["item"]
                if self._taken - told >= max(1, self._window // 2) and not self._is_over:
                    told = self._taken
                    self._tell()
            if "end" in body:
                if int(body["end"]) != self._taken:
                    raise self._failed("the last items were lost on their way")
                return

    async def _next_body(self) -> dict[str, Any]:
        ends = monotonic() + self._timeout
        while True:
            await self._wait_message(ends)
            message = self._messages.popleft()
            body = _read(message)
            if "error" in body:
                if await self._is_stale(message):
                    continue
                self._is_over = True
                read_reply(message.data)
            if "item" in body or "end" in body:
                return body

    async def _wait_message(self, ends: float) -> None:
        while not self._messages:
            left = ends - monotonic()
            if left <= 0:
                raise self._failed(f"nothing came for {self._timeout:g} s")
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, _SILENT_S)):
                    await self._news.wait()
            if (
                not self._messages
                and (self._epoch is not None or self._asked_of is not None)
                and monotonic() - self._heard_at >= _SILENT_S
            ):
                await self._look_up()

    async def _look_up(self) -> None:
        """It is silent: whether whoever was asked, or has begun to answer, still has the agent."""
        try:
            info = await self._cluster.agents.get(self._agent)
        except AgentNotFoundError:
            raise self._failed("the agent is gone") from None
        except BusError:
            return  # nobody knows; the time-out will end it
        if info.epoch != (self._asked_of if self._epoch is None else self._epoch):
            raise self._failed(f"it was recovered on {info.node} meanwhile")
        if not info.is_running and self._epoch is not None:
            raise self._failed(f"the agent is {info.status}")

    async def _is_stale(self, message: Message) -> bool:
        """Whether an error is only the refusal of an activation that was replaced."""
        try:
            read_reply(message.data)
        except AgentUnavailableError as error:
            epoch = error.details.get("refused")
            if epoch is None or error.details.get("sure"):
                return False
            if self._epoch is not None:
                return bool(epoch < self._epoch)
            try:
                return bool((await self._cluster.agents.get(self._agent)).epoch > epoch)
            except AgentNotFoundError:
                return False
        except FoundationError:
            return False
        return False

    def _failed(self, why: str) -> AskTimeoutError:
        begun = "in the middle of its answer" if self._epoch is not None else "before it began"
        return AskTimeoutError(
            f"{self._agent} did not bring its answer to an end: {why}, {begun}.",
            hint="What the handler did may be kept all the same: the end was not seen.",
            agent=self._agent,
            items=self._taken,
        )

    def _on_message(self, message: Message) -> None:
        self._heard_at = monotonic()
        if message.data.startswith(b'{"beat"'):
            return
        self._messages.append(message)
        self._news.set()


def _read(message: Message) -> dict[str, Any]:
    try:
        body = orjson.loads(message.data)
        if isinstance(body, dict):
            return body
    except orjson.JSONDecodeError:
        pass
    raise DecodeError("The reply is not one of this platform's.")
