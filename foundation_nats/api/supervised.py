"""`send_supervised`: a stored signal whose sender is told what became of it.

The signal names a box, the mailbox of no agent. What its handler returns is put there in the
commit of the handler's effects; why it was given up, together with the dead letter. So the word is as
durable as what it tells of, and neither the receiver's death nor the broker's loses it.

One box and one reader for each client, only while somebody waits. What was read is removed;
a word that comes when nobody waits any more is removed with the next ones, and one that comes
after its client has ended stays in the stream (some 300 bytes).

Not guaranteed: a word in time. When none has come shortly after the deadline, the mailbox and
the dead letters are asked instead, and what they don't know is `OutcomeState.UNKNOWN`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from foundation_nats.api.tracking import SignalState, track
from foundation_nats.base.clock import monotonic, utc_now
from foundation_nats.base.logs import get_logger
from foundation_nats.coordination.desk import Answer, Desk
from foundation_nats.errors import (
    AskTimeoutError,
    BusTimeoutError,
    ConfigError,
    ExpiredError,
    FoundationError,
    error_from_wire,
)
from foundation_nats.signaling.envelope import BOX, SENT
from foundation_nats.signaling.schedules import deadline_text
from foundation_schemas import Target, TargetKind
from foundation_schemas.signal import ATTEMPTS_MAX

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_GRACE_S = 1.0
"""How long after the deadline a word is waited for."""
_LOOK_S = 0.5
"""Between two looks into the box: the server's copy, which wakes us, may be lost."""


class OutcomeState(StrEnum):
    """What became of a supervised signal."""

    HANDLED = "handled"
    """Its effects are stored."""
    GIVEN_UP = "given_up"
    """It is a dead letter; `Outcome.error` says why."""
    TOO_LATE = "too_late"
    """It was not begun by its deadline, and is a dead letter with the code ``expired``."""
    NOT_STORED = "not_stored"
    """It was never accepted: no room, no broker, not allowed."""
    UNKNOWN = "unknown"
    """Nobody has said anything by the deadline. It may be in hand, or have been handled; it is not begun any more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a signal that was sent by `Signals.send_supervised`."""

    id: str
    target: str
    state: OutcomeState
    result: Any = None
    """What the handler returned; None also where only the mailbox says that it was handled."""
    error: FoundationError | None = None
    """Why it was not handled, as the class that it was; None: it was."""

    @property
    def is_handled(self) -> bool:
        """Whether its effects are stored."""
        return self.state is OutcomeState.HANDLED


OnError = Literal["log", "raise", "ignore"] | Callable[[Outcome], Any]
"""What to do about every outcome but `handled`; a function may be a coroutine function."""


class Supervisor:
    """The supervised signals of one client."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._name = f"{SENT.removeprefix(BOX)}{token_hex(8)}"
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._wake = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._log = get_logger("supervised")

    async def send(
        self,
        target: Target,
        type: str,
        data: Any,
        *,
        id: str | None,
        timeout: float,
        retries: int,
        on_error: OnError,
    ) -> Outcome:
        """As `Signals.send_supervised`."""
        if target.kind not in (TargetKind.AGENT, TargetKind.ANY):
            raise ConfigError(
                f"One receiver is supervised, not those of {target}: name an agent, or any:NAME.",
                hint="`ask_all` gathers the answers of many.",
            )
        if not 0 <= retries < ATTEMPTS_MAX:
            raise ConfigError(f"retries must be from 0 to {ATTEMPTS_MAX - 1}, not {retries}.")
        if timeout <= 0:
            raise ConfigError(f"A timeout of {timeout:g} s leaves no time.")
        if not callable(on_error) and on_error not in ("log", "raise", "ignore"):
            raise ConfigError(
                f"on_error must be log, raise, ignore or a function, not {on_error!r}."
            )
        id = id or uuid4().hex
        if id in self._waiting:
            raise ConfigError(f"What becomes of {id!r} is being waited for already.")
        outcome = await self._outcome(target, type, data, id, timeout, retries)
        if outcome.is_handled:
            return outcome
        if callable(on_error):
            done = on_error(outcome)
            if inspect.isawaitable(done):
                await done
        elif on_error == "raise":
            assert outcome.error is not None
            raise outcome.error
        elif on_error == "log":
            self._log.warning(
                "supervised signal not handled",
                id=id,
                target=str(target),
                state=str(outcome.state),
                error=str(outcome.error),
            )
        return outcome

    async def _outcome(
        self, target: Target, type: str, data: Any, id: str, timeout: float, retries: int
    ) -> Outcome:
        ends = monotonic() + timeout
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[id] = waiter
        name = str(target)
        try:
            await self._begin_reading()
            try:
                await self._cluster._publisher.send(
                    target,
                    type,
                    data,
                    id=id,
                    timeout=timeout,
                    deadline=deadline_text(utc_now(), ttl=timeout),
                    attempts=retries + 1,
                    replyto=f"{BOX}{self._name}",
                )
            except BusTimeoutError:
                pass  # it may be stored: then there will be a word
            except TypeError as error:
                raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
            except FoundationError as error:
                return Outcome(id, name, OutcomeState.NOT_STORED, error=error)
            with contextlib.suppress(TimeoutError):
                left = max(0.0, ends - monotonic()) + _GRACE_S
                answer = await asyncio.wait_for(waiter, left)
                return _told(id, name, answer)
        finally:
            del self._waiting[id]
            self._wake.set()
        return await self._found(id, target, timeout)

    # ---- the box ----------------------------------------------------------------

    async def _begin_reading(self) -> None:
        """Have a reader that hears of every word from now on."""
        if self._reader is not None and not self._reader.done():
            return
        desk = Desk(self._cluster, self._name, self._wake)
        await desk.__aenter__()
        scope = await self._cluster._open_scope()
        self._reader = scope.start(self._read(desk), "supervised")

    async def _read(self, desk: Desk) -> None:
        try:
            while self._waiting:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _LOOK_S)
                self._wake.clear()
                try:
                    answers = await desk.answers(monotonic() + _LOOK_S)
                except FoundationError as error:
                    self._log.debug("outcomes not readable yet", error=str(error))
                    continue
                if not answers:
                    continue
                for id, answer in answers.items():
                    waiter = self._waiting.get(id)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(answer)
                await desk.trim(lambda _id: True)
        finally:
            await desk.__aexit__(None, None, None)

    async def _found(self, id: str, target: Target, timeout: float) -> Outcome:
        """What mailbox and dead letters know, where nobody has said anything."""
        name = str(target)
        agent = target.name if target.kind is TargetKind.AGENT else None
        try:
            status = await track(self._cluster, id, agent)
        except FoundationError as error:
            self._log.debug("outcome not readable", id=id, error=str(error))
            status = None
        for delivery in [] if status is None else status.deliveries:
            if delivery.state is SignalState.HANDLED:
                return Outcome(id, name, OutcomeState.HANDLED)
            if delivery.state is SignalState.DEAD:
                code, reason = delivery.code or "foundation", delivery.reason or "given up"
                return _told(id, name, Answer(code=code, message=reason))
        silence = AskTimeoutError(
            f"Nothing is known of what became of {id} for {target} within {timeout:g} s.",
            hint=f"It is not begun any more; it may be in hand. See `foundation signal {id}`.",
            id=id,
        )
        return Outcome(id, name, OutcomeState.UNKNOWN, error=silence)


def _told(id: str, target: str, answer: Answer) -> Outcome:
    if not answer.is_error:
        return Outcome(id, target, OutcomeState.HANDLED, result=answer.ok)
    is_late = answer.code == ExpiredError.code
    return Outcome(
        id,
        target,
        OutcomeState.TOO_LATE if is_late else OutcomeState.GIVEN_UP,
        error=error_from_wire(answer.code, answer.message, {"id": id}),
    )


__all__ = ["OnError", "Outcome", "OutcomeState", "Supervisor"]
