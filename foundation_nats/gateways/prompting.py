"""`Prompter`: a prompt to an agent, waiting out what moves or recovers it; streamed, or stored.

Streamed: the answer comes piece by piece. At most once: the agent handles the prompt once or not
at all. While nobody has seen it (the agent is moved, recovered, started) it is tried again for
`patience_s`; an answer that breaks off is an error that says so.

Stored: the prompt is a durable signal under an id of the asker's, and the answer is durable too: handled
exactly once whatever dies meanwhile, the gateway included, and whoever asks again under the same id
gets the same answer. It comes as a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from foundation_nats.agent.prompts import PROMPT, Prompt, Reply, as_reply
from foundation_nats.api.cluster import Cluster
from foundation_nats.base.clock import monotonic, wall_ms
from foundation_nats.coordination.desk import Answer, Desk
from foundation_nats.errors import (
    AgentNotFoundError,
    AgentUnavailableError,
    AskTimeoutError,
    BusTimeoutError,
    BusUnavailableError,
    FoundationError,
    NoRespondersError,
    error_from_wire,
)
from foundation_schemas import AgentStatus, Target, TargetKind

_AGAIN_S = 0.05
_AGAIN_MAX_S = 0.5
_PROBE_S = 1.0
_NOTHING = b'{"sequences":[]}'
_LOOK_S = 1.0
"""Between two looks for an answer that nobody has announced."""
_STILL_S = 5.0
_HOPELESS = (AgentStatus.FAILED, AgentStatus.STOPPED)
"""What an agent does not come back from by itself, or not soon."""
_STORE_S = 15.0


@dataclass(frozen=True, slots=True)
class Prompter:
    """How prompts of one gateway are put."""

    cluster: Cluster
    patience_s: float = 30.0
    """For an agent that is not there just now."""
    answer_s: float = 300.0
    """For the first piece of an answer, and for each next one; of a stored prompt, for the whole."""

    async def stream(self, target: str, prompt: Prompt) -> AsyncGenerator[Reply, None]:
        """The answer, piece by piece; to `aclose` it ends the handler, and nothing of it is kept.

        Raises:
            AgentNotFoundError: there is no such agent.
            AgentUnavailableError, BusUnavailableError: it was not there for all of `patience_s`, or went
                away in the middle; nothing was kept.
            AskTimeoutError: no piece in time, or the agent is gone in the middle; it may be kept.
            HandlerError, PayloadInvalidError, UnhandledSignalError: the agent's answer.
        """
        patience = _Patience(self.patience_s)
        while True:
            is_begun = False
            try:
                agent = await self._present(target)
                answer = self.cluster.ask_stream(agent, prompt, timeout=self.answer_s)
                async with aclosing(answer) as items:
                    async for item in items:
                        is_begun = True
                        if (reply := as_reply(item)) is not None:
                            yield reply
                return
            except (AgentUnavailableError, BusUnavailableError) as error:
                if is_begun or patience.is_over(error):
                    raise
            await patience.wait()

    async def ask(self, target: str, type: str, data: Any) -> Any:
        """`Cluster.ask`, waiting out what moves or recovers the agent; raises as `stream`."""
        patience = _Patience(self.patience_s)
        while True:
            try:
                agent = await self._present(target)
                return await self.cluster.ask(agent, type, data, timeout=self.answer_s)
            except (AgentUnavailableError, BusUnavailableError) as error:
                if patience.is_over(error):
                    raise
            await patience.wait()

    async def _present(self, target: str) -> str:
        """One agent behind *target* whose worker lives: what is asked of a dead one may be lost unseen.

        Raises:
            AgentNotFoundError, AgentUnavailableError, BusUnavailableError
        """
        parsed = Target.parse(target)
        agent = parsed.name
        if parsed.kind is not TargetKind.AGENT:
            agent = await self.cluster._one_of(parsed)
        try:
            await self.cluster.bus.request(
                self.cluster.subjects.trace(agent), _NOTHING, timeout=_PROBE_S
            )
        except NoRespondersError:
            info = await self.cluster.agents.get(agent)
            raise self.cluster._unavailable(agent, info) from None
        except BusTimeoutError:
            raise AgentUnavailableError(f"Nobody answers for agent {agent}.", agent=agent) from None
        return agent

    async def ask_stored(
        self,
        agent: str,
        id: str,
        prompt: Prompt,
        *,
        box: str,
        since: float | None = None,
        still: Callable[[], Awaitable[bool]] | None = None,
        answer_s: float | None = None,
    ) -> list[Reply] | None:
        """The whole answer to a prompt that is handled once, however often it is asked under *id*.

        The answer stays in the *box* until `forget`. To cancel this leaves the prompt where it is.

        Args:
            since: when it may have been asked first, as seconds since the epoch; None: never yet.
            still: whether the answer is not recorded elsewhere already; asked now and then, and by
                `Desk.ask`. Once it is, None is returned.
            answer_s: instead of the prompter's own.

        Raises:
            AgentNotFoundError: there is no such agent.
            AskTimeoutError: no answer in time; it may still come.
            BusTimeoutError, BusUnavailableError, MailboxFullError, PayloadTooLargeError: it may not be stored.
            FoundationError: the agent's answer; it was tried again as any signal is.
        """
        now = wall_ms() / 1000
        wake = asyncio.Event()
        limit = self.answer_s if answer_s is None else answer_s
        ends = monotonic() + limit
        looked = monotonic()
        async with Desk(self.cluster, box, wake) as desk:
            await self.cluster.bus.flush()
            stored_by = min(ends, monotonic() + _STORE_S)
            if not await desk.exists(agent, stored_by):
                raise AgentNotFoundError(f"There is no agent {agent!r}.", id=agent)
            await desk.ask(
                agent,
                id,
                PROMPT,
                prompt,
                until=stored_by,
                since=now if since is None else since,
                now=now,
                still=still,
            )
            while True:
                wake.clear()
                found = (await desk.answers(ends)).get(id)
                if found is not None:
                    return _replies(found)
                if still is not None and monotonic() - looked >= _STILL_S:
                    looked = monotonic()
                    if not await still():
                        return None
                left = ends - monotonic()
                if left <= 0:
                    raise AskTimeoutError(
                        f"{agent} has not answered within {limit:g} s.",
                        hint="The prompt is stored: it will be handled once.",
                        agent=agent,
                    )
                try:
                    async with asyncio.timeout(min(left, _LOOK_S)):
                        await wake.wait()
                except TimeoutError:
                    continue  # an announcement may have been lost

    async def forget(self, box: str) -> None:
        """Remove the answers in *box*, once they are kept elsewhere or nobody wants them."""
        await Desk(self.cluster, box, asyncio.Event()).clear()


class _Patience:
    """How long one asker goes on with an agent that is not there: nothing was kept, so it is safe."""

    def __init__(self, seconds: float) -> None:
        self._ends = monotonic() + seconds
        self._pause = _AGAIN_S

    def is_over(self, error: FoundationError) -> bool:
        """Whether there is no time left, or no hope."""
        return error.details.get("status") in _HOPELESS or monotonic() + self._pause >= self._ends

    async def wait(self) -> None:
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, _AGAIN_MAX_S)


def _replies(answer: Answer) -> list[Reply]:
    if answer.is_error:
        raise error_from_wire(answer.code, answer.message, {})
    items = answer.ok if isinstance(answer.ok, list) else [answer.ok]
    return [reply for item in items if (reply := as_reply(item)) is not None]


__all__ = ["Prompter"]
