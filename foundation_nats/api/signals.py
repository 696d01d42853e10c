"""`cluster.signals`: for later, to many at once, of many the answers, and what became of one."""

from __future__ import annotations

import asyncio
import builtins
import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson

from foundation_nats.agent.signal import Payload, typed
from foundation_nats.api.journal import JournalNode, read_journal
from foundation_nats.api.refs import AgentRef
from foundation_nats.api.supervised import OnError, Outcome, OutcomeState, Supervisor
from foundation_nats.api.tracking import SignalStatus, track
from foundation_nats.base.clock import monotonic, utc_now
from foundation_nats.bus.kv import EXPECTED
from foundation_nats.bus.streams import StoredMessage, StreamReader, append
from foundation_nats.errors import (
    AskTimeoutError,
    ConfigError,
    FoundationError,
    QuorumError,
    SignalNotFoundError,
    StaleRevisionError,
)
from foundation_nats.signaling.receivers import receivers
from foundation_nats.signaling.schedules import (
    SIGNALS,
    Timer,
    read_timer,
    timer_headers,
    timer_name,
    timer_of,
)
from foundation_nats.signaling.timekeeper import cancelled_below
from foundation_schemas import Receipt, Target, TargetKind
from foundation_schemas.base import WireModel, is_name

if TYPE_CHECKING:
    from foundation_nats.api.cluster import Cluster

_IN_FLIGHT = 256
_ASKED_AT_ONCE = 256
_PAGES_MAX = 1000
_BETWEEN_S = 1.5
"""A timer that repeats is not armed for as long as its firing takes."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One signal of `send_many`."""

    target: str | AgentRef | Target
    type: str
    data: Any = None
    id: str | None = None
    ttl: float | None = None
    attempts: int | None = None
    urgent: bool = False


@dataclass(slots=True)
class Answers:
    """What those that were asked have said by the deadline, or until enough had."""

    asked: list[str]
    results: dict[str, Any] = field(default_factory=dict)
    """Agent to its reply."""
    errors: dict[str, FoundationError] = field(default_factory=dict)
    """Agent to why it has none; who did not answer in time has an `AskTimeoutError`."""

    @property
    def missing(self) -> list[str]:
        """Those without a reply, by id."""
        return [agent for agent in self.asked if agent not in self.results]


class ScheduleInfo(WireModel):
    """A signal for later; the JSON of ``foundation schedules list -o json``."""

    name: str
    """What `cancel` wants: the signal's id, or ``AGENT/NAME`` for a timer of an agent."""
    id: str
    target: str
    type: str
    data: Any = None
    source: str
    due: str
    every_s: float | None = None
    cron: str | None = None
    zone: str | None = None
    ttl_s: float | None = None


class Signals:
    """Signals for later, in bulk, to be asked of many, and to be looked up."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._supervisor = Supervisor(cluster)
        self._timers = StreamReader(cluster.bus, cluster.subjects.timers_stream)

    # ---- many -------------------------------------------------------------------

    async def send_many(
        self,
        signals: Iterable[Outgoing | tuple[Any, ...]] | AsyncIterable[Outgoing | tuple[Any, ...]],
        *,
        in_flight: int = _IN_FLIGHT,
        timeout: float = 10.0,
    ) -> list[Receipt | FoundationError]:
        """Send many signals without waiting for each; for each its receipt or why it has none.

        At most *in_flight* are under way at a time. They are stored in their order, unless one
        has to be repeated because of a disconnect. *signals* are `Outgoing`, or tuples
        ``(target, type, data)``; *timeout* is of each.

        Raises:
            ConfigError: *in_flight* is below 1.
        """
        found = self.send_each(signals, in_flight=in_flight, timeout=timeout)
        return [result async for result in found]

    async def send_each(
        self,
        signals: Iterable[Outgoing | tuple[Any, ...]] | AsyncIterable[Outgoing | tuple[Any, ...]],
        *,
        in_flight: int = _IN_FLIGHT,
        timeout: float = 10.0,
    ) -> AsyncGenerator[Receipt | FoundationError, None]:
        """`send_many` for input without end: ``async for result in …``, in the order of the signals.

        No more is taken of *signals* than *in_flight* beyond what was read of the results, so memory
        is bounded by it. To leave early, `aclose` the iterator (``contextlib.aclosing``): what was
        under way may be stored.

        Raises:
            ConfigError: *in_flight* is below 1.
        """
        if in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, not {in_flight}.")
        sent: asyncio.Queue[asyncio.Task[Receipt | FoundationError] | None]
        sent = asyncio.Queue()
        room = asyncio.Semaphore(in_flight)

        async def feed() -> None:
            try:
                async for number, item in _numbered(signals):
                    await room.acquire()
                    work = self._send_one(number, item, timeout)
                    sent.put_nowait(asyncio.ensure_future(work))
            finally:
                sent.put_nowait(None)

        feeding = asyncio.ensure_future(feed())
        try:
            while (task := await sent.get()) is not None:
                result = await task
                room.release()
                yield result
            await feeding  # it may have raised what *signals* raised
        finally:
            tasks = [feeding]
            while not sent.empty():
                tasks.append(sent.get_nowait())  # type: ignore[arg-type]
            for left in filter(None, tasks):
                left.cancel()
            await asyncio.gather(*filter(None, tasks), return_exceptions=True)

    async def _send_one(self, number: int, item: Any, timeout: float) -> Receipt | FoundationError:
        try:
            one = item if isinstance(item, Outgoing) else Outgoing(*item)
            return await self._cluster.send(
                one.target,
                one.type,
                one.data,
                id=one.id,
                ttl=one.ttl,
                timeout=timeout,
                attempts=one.attempts,
                urgent=one.urgent,
            )
        except FoundationError as error:
            return error
        except TypeError as error:
            return ConfigError(f"Signal {number} of send_many: {error}.")

    async def ask_all(
        self,
        target: str | Target,
        type: str,
        data: Any = None,
        *,
        quorum: int | float | None = None,
        timeout: float = 5.0,
        deadline: datetime | None = None,
    ) -> Answers:
        """Ask everybody behind *target* and gather the replies, each agent's or why it has none.

        Returns once all have answered or failed, at the latest after *timeout*; with a *quorum*
        (a number, or a share such as ``0.51``) as soon as so many have answered, or so many have failed
        that there can't be. Each handles the question at most once, and does not begin it after
        *timeout*, or *deadline* if that is earlier; who is left out may have handled it.

        Raises:
            QuorumError: too few have answered; `details` has ``results`` and ``errors``.
            ConfigError: *target* or *quorum* is wrong.
            BusUnavailableError, BusTimeoutError: who is behind *target* could not be read.
        """
        agents = await self._behind(target)
        needed = _needed(quorum, len(agents))
        answers = Answers(agents)
        enough = asyncio.Event()
        until = utc_now() + timedelta(seconds=timeout)
        if deadline is not None:
            if deadline.tzinfo is None:
                raise ConfigError(f"The deadline {deadline} has no time zone.")
            until = min(until, deadline)
            timeout = max(0.0, (until - utc_now()).total_seconds())
        room = asyncio.Semaphore(_ASKED_AT_ONCE)
        ends = monotonic() + timeout

        async def ask(agent: str) -> None:
            async with room:
                left = max(0.01, ends - monotonic())
                try:
                    answers.results[agent] = await self._cluster.ask(
                        f"agent:{agent}", type, data, timeout=left, deadline=until
                    )
                except FoundationError as error:
                    answers.errors[agent] = error
            done = len(answers.results) + len(answers.errors)
            if done >= len(agents) or is_decided():
                enough.set()

        def is_decided() -> bool:
            """Whether the quorum is there, or can't be any more."""
            possible = len(agents) - len(answers.errors)
            return quorum is not None and (len(answers.results) >= needed or possible < needed)

        if not agents or is_decided():
            enough.set()
        asked = [] if enough.is_set() else agents
        tasks = [asyncio.ensure_future(ask(agent)) for agent in asked]
        try:
            async with asyncio.timeout(timeout):
                await enough.wait()
        except TimeoutError:
            pass  # what is there by now is the answer
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        is_over = monotonic() >= ends
        for agent in answers.missing:
            when = f"by {until:%H:%M:%S}Z" if is_over else "when that was decided"
            answers.errors.setdefault(
                agent, AskTimeoutError(f"{agent} had not answered {when}.", agent=agent)
            )
        if quorum is not None and len(answers.results) < needed:
            raise QuorumError(
                f"{len(answers.results)} of {len(agents)} behind {target} have answered"
                + (f" within {timeout:g} s" if is_over else "")
                + f"; {needed} are needed.",
                hint="The details have each agent's answer or error.",
                results=dict(answers.results),
                errors={agent: str(error) for agent, error in answers.errors.items()},
            )
        return answers

    async def _behind(self, target: str | Target) -> list[str]:
        parsed = _parsed(target)
        if parsed.kind is TargetKind.AGENT:
            return [parsed.name]
        if parsed.kind is TargetKind.TOPIC:
            raise ConfigError("Who subscribes to a topic can't be asked; `publish` sends to them.")
        registry = await self._cluster._open_registry()
        return [held.record.id for held in receivers(registry, parsed.kind, parsed.name)]

    async def send_supervised(
        self,
        target: str | AgentRef | Target,
        type: str | Payload,
        data: Any = None,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        on_error: OnError = "log",
        id: str | None = None,
    ) -> Outcome:
        """Store a signal for one receiver, and return what became of it: handled, or why not.

        The signal is as durable as one of `send`, and handled once or not at all; the receiver tries a
        handler that raises *retries* times more. What is not begun within *timeout* is not
        begun any more. The outcome is stored with what it tells of, so a crash of the receiver or of
        the broker delays it at most.

        Cancellation: the signal stays; the outcome is not told.

        Args:
            target: an agent, also one that does not run now, or ``any:NAME``.
            on_error: what to do unless it was handled: ``log`` it, ``raise`` its error, ``ignore`` it, or call a
                function with the `Outcome`.
            id: a repeat with the same id takes effect once.

        Raises:
            ConfigError: an argument is wrong, or *data* is not JSON.
            FoundationError: with ``raise``, why it was not handled, as the class it was: `HandlerError`, …
                `ExpiredError` (too late), `MailboxFullError` and the like (not stored),
                `AskTimeoutError` (not known).
        """
        type, data = typed(type, data)
        return await self._supervisor.send(
            _parsed(target),
            _checked_type(type),
            data,
            id=id,
            timeout=timeout,
            retries=retries,
            on_error=on_error,
        )

    # ---- later ------------------------------------------------------------------

    async def schedule(
        self,
        target: str | AgentRef | Target,
        type: str,
        data: Any = None,
        *,
        at: datetime | str | None = None,
        after: float | timedelta | None = None,
        every: float | timedelta | None = None,
        cron: str | None = None,
        zone: str = "UTC",
        ttl: float | None = None,
        id: str | None = None,
        timeout: float = 5.0,
    ) -> Receipt:
        """Store a signal that is sent later, once or again and again.

        It survives the client, the nodes and the broker, and each firing takes effect once, at
        its moment or within some 0.3 s after it. What was due while everything was down is sent
        as soon as a node is up again; of several missed firings, one.

        Args:
            at, after, every, cron: when; one of them, or *every* with a first time. *cron* has five
                fields (or six, seconds first), meant in *zone*.
            ttl: so many seconds after each firing it may still be handled.
            id: of the signal (and the name to cancel it by); each firing of one that repeats adds
                its moment to it.

        Raises:
            ConfigError: an argument is wrong.
            BusTimeoutError: it may be stored: repeat it with the same id.
            BusUnavailableError, PayloadTooLargeError: nothing was stored.
        """
        parsed = _parsed(target)
        try:
            timer = timer_of(
                utc_now(), at=at, after=after, every=every, cron=cron, zone=zone, ttl=ttl
            )
            ended = 0
            if id is not None:
                subjects = self._cluster.subjects
                ended = await cancelled_below(self._timers, subjects, SIGNALS, timer_name(id))
            timer = replace(timer, generation=ended)
            return await self._cluster._publisher.send(
                parsed, _checked_type(type), data, id=id, timeout=timeout, timer=timer
            )
        except TypeError as error:
            raise ConfigError(f"The data of {type} can't be sent: {error}.") from error
        except ValueError as error:
            raise ConfigError(f"{type}: {error}.") from error

    async def schedules(self, agent: str | None = None) -> list[ScheduleInfo]:
        """What is to be sent later, the next one first; of one agent's timers alone, if given.

        One that is firing at this moment may be missing.
        """
        subjects = self._cluster.subjects
        subject = subjects.timers() if agent is None else subjects.timer(agent, "*")
        found: builtins.list[ScheduleInfo] = []
        start = 1
        for _ in range(_PAGES_MAX):
            messages, more = await self._timers.page(subject, start)
            found += [info for message in messages if (info := _info(message)) is not None]
            if not more or not messages:
                break
            start = messages[-1].sequence + 1
        return sorted(found, key=lambda info: info.due)

    async def cancel(self, name: str, *, timeout: float = 5.0) -> ScheduleInfo:
        """End what was to be sent later; returns what it was.

        A firing that is under way at this moment may still arrive.

        Raises:
            SignalNotFoundError: there is nothing of that name; it may have been sent.
            BusTimeoutError: outcome unknown; repeat it.
        """
        agent, slash, rest = name.rpartition("/")
        owner, timer = (agent, rest) if slash else (SIGNALS, timer_name(name))
        if not (is_name(timer) and (is_name(owner) or owner == SIGNALS)):
            raise ConfigError(f"{name!r} is no timer: write the signal's id, or AGENT/NAME.")
        subject = self._cluster.subjects.timer(owner, timer)
        deadline = monotonic() + timeout
        between = monotonic() + min(_BETWEEN_S, timeout)
        while True:
            armed = await self._timers.last_from_leader(subject)
            info = None if armed is None else _info(armed)
            if armed is not None and info is not None:
                try:
                    await self._replace(subject, armed)
                    return info
                except StaleRevisionError:
                    if monotonic() >= deadline:
                        raise
            elif monotonic() >= between:
                raise SignalNotFoundError(
                    f"Nothing called {name!r} is to be sent later.",
                    hint="`foundation schedules list` shows what is.",
                )
            await asyncio.sleep(0.1)

    async def _replace(self, subject: str, armed: StoredMessage) -> None:
        generation = read_timer(armed.headers).generation + 1
        end = Timer(utc_now(), generation=generation, is_cancel=True)
        headers = timer_headers(end, self._cluster.subjects.due())
        headers[EXPECTED] = str(armed.sequence)
        await append(self._cluster.bus, subject, armed.data, headers=headers)

    # ---- afterwards -------------------------------------------------------------

    async def journal(self, id: str) -> JournalNode:
        """Which signal caused which: the whole tree that the signal *id* belongs to, from its root on.

        Handled signals are known for `mailbox.trim_min_age_s`, dead letters until they are discarded;
        at most the newest 100,000 signals are looked at.

        Raises:
            SignalNotFoundError: nothing is known of it (any more).
        """
        found = await read_journal(self._cluster, id)
        if found is None:
            raise SignalNotFoundError(
                f"Nothing is known of signal {id!r} (any more).",
                hint="Handled signals are forgotten when their mailbox is trimmed.",
            )
        return found

    async def get(self, id: str, *, agent: str | None = None) -> SignalStatus:
        """What became of a signal, as far as it is still known.

        Known are: what waits, for ever; what was handled, while its mailbox keeps it (a
        minute, by default); its dead letters; how long it took, until the worker that handled it
        ends. The newest 100,000 signals are searched; with *agent* its mailbox alone, whole.

        Raises:
            SignalNotFoundError: nothing is known of it, or not any more.
            BusTimeoutError, BusUnavailableError
        """
        found = await track(self._cluster, id, agent)
        if found is None:
            raise SignalNotFoundError(
                f"Nothing is known of a signal {id!r}.",
                hint="Handled signals are kept for a minute or so; then only their effects are there.",
            )
        return found


def _parsed(target: str | AgentRef | Target) -> Target:
    if isinstance(target, Target):
        return target
    try:
        return Target.parse(str(target))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checked_type(type: str) -> str:
    if not type or len(type) > 256 or any(c.isspace() for c in type):
        raise ConfigError(f"{type!r} is not a signal type: use words joined by dots.")
    return type


def _needed(quorum: int | float | None, asked: int) -> int:
    if quorum is None:
        return asked
    if isinstance(quorum, float) and 0 < quorum <= 1:
        return max(1, math.ceil(quorum * asked - 1e-9))
    if isinstance(quorum, float) or quorum < 1:
        raise ConfigError(f"quorum must be a number from 1, or a share up to 1.0, not {quorum!r}.")
    return quorum


async def _numbered(
    items: Iterable[Any] | AsyncIterable[Any],
) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield number, item
            number += 1
    else:
        for item in items:
            yield number, item
            number += 1


def _info(message: StoredMessage) -> ScheduleInfo | None:
    """An armed timer; None for what ends one, and for what is none."""
    try:
        timer = read_timer(message.headers)
        body: Mapping[str, Any] = orjson.loads(message.data)
        if timer.is_cancel:
            return None
        owner, name = message.subject.split(".")[-2:]
        return ScheduleInfo(
            name=str(body["id"]) if owner == SIGNALS else f"{owner}/{name}",
            id=str(body["id"]),
            target=str(body["subject"]),
            type=str(body["type"]),
            data=body.get("data"),
            source=str(body["source"]),
            due=message.headers["Fnd-Due"],
            every_s=timer.every_s,
            cron=timer.cron,
            zone=timer.zone if timer.cron is not None else None,
            ttl_s=timer.ttl_s,
        )
    except (ValueError, KeyError, TypeError):
        return None


__all__ = [
    "Answers",
    "Outcome",
    "OutcomeState",
    "Outgoing",
    "ScheduleInfo",
    "SignalStatus",
    "Signals",
]
