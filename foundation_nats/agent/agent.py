"""`Agent`, `on` and `Signal`: what users write.

An agent is a class with a nested `State`, handlers marked with `on`, and
optional hooks. It never meets NATS: a handler changes `self.state`, calls
`self.emit` and returns the reply; the runtime stores all of it together, then
publishes. A handler that raises leaves no trace.

This module is independent of the cluster, so that agents run in plain tests.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import types
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from foundation_nats.agent.guards import Bulkhead, Guard, Guards, Limiter, retrying
from foundation_nats.agent.state import State
from foundation_nats.errors import ConfigError, PayloadInvalidError, UnhandledSignalError
from foundation_nats.signaling.schedules import (
    Timer,
    check_timer_name,
    deadline_text,
    read_time,
    timer_of,
)
from foundation_schemas import RecoveredFrom, Subscription, SubscriptionMode, Target
from foundation_schemas.base import is_name

if typing.TYPE_CHECKING:
    from foundation_nats.bus.connection import Bus
    from foundation_nats.bus.subjects import Subjects

T = TypeVar("T")
R = TypeVar("R")


class Signal(Generic[T]):
    """One signal as a handler sees it: the CloudEvents attributes, and `data` in the handler's type."""

    __slots__ = (
        "attempt",
        "cause",
        "data",
        "deadline",
        "id",
        "sequence",
        "source",
        "time",
        "traceparent",
        "type",
    )

    def __init__(
        self,
        *,
        id: str,
        source: str,
        type: str,
        data: T,
        time: str | None = None,
        cause: str | None = None,
        traceparent: str | None = None,
        sequence: int = 0,
        attempt: int = 1,
        deadline: str | None = None,
    ) -> None:
        self.id = id
        self.source = source
        """``agent:<id>`` or ``client:<name>``."""
        self.type = type
        self.data = data
        self.time = time
        self.cause = cause
        """The id of the signal whose handling emitted this one."""
        self.traceparent = traceparent
        self.sequence = sequence
        """Its place in the mailbox; 0 for an ask."""
        self.deadline = None if deadline is None else _read_deadline(deadline)
        """After it the signal is not handled; hand it on by ``emit(…, deadline=signal.deadline)``."""
        self.attempt = attempt
        """1 at the first try; grows when the handler raised."""

    def __repr__(self) -> str:
        return f"Signal(type={self.type!r}, id={self.id!r}, source={self.source!r})"


@dataclass(frozen=True, slots=True)
class Emission:
    """What a handler asked to be sent, once its effects are stored."""

    target: Target
    type: str
    data: Any
    deadline: str | None = None
    timer: Timer | None = None
    """For later; its `generation` is given when it is stored."""
    name: str = ""
    """Of the timer."""


class Context:
    """What a handler may know and call besides its state."""

    __slots__ = (
        "_emissions",
        "_gauges",
        "_guards",
        "_keys",
        "_stop_reason",
        "agent_id",
        "bus",
        "config",
        "epoch",
        "node",
        "signal",
        "subjects",
    )
    bus: Bus
    """With `subjects`: for the patterns of `foundation_nats.coordination`, as in ``lock(self.ctx, …)``;
    effects of those are outside (P8). Not there in plain tests."""
    subjects: Subjects

    def __init__(
        self, agent_id: str, *, config: dict[str, Any] | None = None, node: str = "", epoch: int = 0
    ) -> None:
        self.agent_id = agent_id
        self.config = config or {}
        self.node = node
        self.epoch = epoch
        self.signal: Signal[Any] | None = None
        """The signal in hand."""
        self._emissions: list[Emission] = []
        self._keys = 0
        self._stop_reason: str | None = None
        self._gauges: dict[str, float] = {}
        self._guards: Guards | None = None

    @property
    def idempotency_key(self) -> str:
        """A key for an effect outside NATS, equal at every retry of the signal in hand.

        Each reading within one handler gives the next key: ``<agent>.<signal>.<n>``.
        Such effects are at least once (P8); a peer that honours the key makes them once.
        """
        self._keys += 1
        cause = self.signal.id if self.signal is not None else f"start-{self.epoch}"
        return f"{self.agent_id}.{cause}.{self._keys}"

    def now(self) -> datetime:
        """The wall clock, in UTC; differs between retries."""
        return datetime.now(UTC)

    @property
    def random(self) -> random.Random:
        """Randomness that repeats at every retry of the signal in hand."""
        cause = self.signal.id if self.signal is not None else f"start-{self.epoch}"
        return random.Random(f"{self.agent_id}.{cause}")

    async def run_blocking(self, function: Callable[..., R], *args: Any) -> R:
        """Run a blocking function in a thread, so that other agents go on."""
        return await asyncio.get_running_loop().run_in_executor(None, function, *args)

    def schedule(
        self,
        type: str,
        data: Any = None,
        *,
        to: str | Target | None = None,
        name: str | None = None,
        at: datetime | str | None = None,
        after: float | timedelta | None = None,
        every: float | timedelta | None = None,
        cron: str | None = None,
        zone: str = "UTC",
        ttl: float | None = None,
    ) -> str:
        """Send a signal later, once or again and again; stored together with the state.

        To this agent itself unless *to* says otherwise. It outlives this activation, and the
        agent. A later timer of the same *name* replaces this one. Returns the name.

        Args:
            at, after, every, cron: when; one of them, or *every* with a first time.
            zone: in which *cron* is meant.
            ttl: so many seconds after each firing it may still be handled.

        Raises:
            ValueError: an argument is wrong; says which.
            TypeError: *data* is not JSON.
        """
        timer = timer_of(self.now(), at=at, after=after, every=every, cron=cron, zone=zone, ttl=ttl)
        target = _as_target(f"agent:{self.agent_id}" if to is None else to)
        if name is None:
            seed = f"{self._cause}\n{len(self._emissions)}".encode()
            name = blake2b(seed, digest_size=8).hexdigest()
        name = check_timer_name(name)
        self._emissions.append(
            Emission(target, _checked_type(type), _freeze(data), timer=timer, name=name)
        )
        return name

    def cancel(self, name: str) -> None:
        """End the timer *name* of this agent, together with the state; one that is firing may still come."""
        timer = Timer(self.now(), is_cancel=True)
        target = _as_target(f"agent:{self.agent_id}")
        self._emissions.append(
            Emission(target, "cancel", None, timer=timer, name=check_timer_name(name))
        )

    @property
    def _cause(self) -> str:
        return self.signal.id if self.signal is not None else f"start-{self.epoch}"

    def breaker(
        self,
        name: str,
        *,
        failures: int = 5,
        window_s: float = 30.0,
        pause_s: float = 5.0,
        probes: int = 1,
    ) -> Guard:
        """A circuit breaker for calls to the outside: ``async with self.ctx.breaker("mail"): …``.

        After *failures* within *window_s* it raises `BreakerOpenError` at once for *pause_s*, then lets
        *probes* calls through. Shared by name in this worker; set where it is first used.

        Raises:
            ConfigError: a number is wrong.
        """
        return self._shared.breaker(
            name, failures=failures, window_s=window_s, pause_s=pause_s, probes=probes
        )

    def limiter(self, name: str, *, rate: float, burst: float | None = None) -> Limiter:
        """A limit of *rate* calls a second in this worker: ``await self.ctx.limiter(…).wait(timeout=1)``.

        Raises:
            ConfigError: a number is wrong.
        """
        return self._shared.limiter(name, rate=rate, burst=burst)

    def bulkhead(self, name: str, *, limit: int, wait_s: float = 5.0) -> Bulkhead:
        """At most *limit* at once in this worker: ``async with self.ctx.bulkhead("db", limit=4): …``.

        Raises:
            ConfigError: *limit* is below 1.
        """
        return self._shared.bulkhead(name, limit=limit, wait_s=wait_s)

    async def retrying(
        self,
        function: Callable[[], Awaitable[R]],
        *,
        attempts: int = 3,
        first_s: float = 0.1,
        most_s: float = 10.0,
        on: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> R:
        """Await *function* again while it raises *on*, with doubling pauses and jitter.

        The mailbox waits meanwhile. The error of the last attempt, or of an open breaker, is raised.
        """
        return await retrying(function, attempts=attempts, first_s=first_s, most_s=most_s, on=on)

    @property
    def _shared(self) -> Guards:
        if self._guards is None:
            self._guards = Guards()
        return self._guards

    def gauge(self, name: str, value: float) -> None:
        """Say how much of something there is now, such as work in hand; for autoscaling.

        Kept in memory until it is set again; not stored, and not undone with a handler.
        """
        self._gauges[name] = float(value)

    def stop(self, reason: str = "stopped by itself") -> None:
        """Stop this agent after the signal in hand; a permanent one is started again."""
        self._stop_reason = reason

    def _begin(self, signal: Signal[Any] | None) -> None:
        self.signal = signal
        self._emissions = []
        self._keys = 0


Handler = Callable[..., Any]


def on(type: str) -> Callable[[Handler], Handler]:
    """Mark a method as the handler of signals of *type*.

    The method takes one `Signal`; the type in ``Signal[T]`` is what the payload
    is validated against. It may be ``async`` or plain; a plain one must not block.
    """
    if not type or any(c.isspace() for c in type):
        raise ConfigError(f"{type!r} is not a signal type: use words joined by dots")

    def mark(function: Handler) -> Handler:
        types = [*getattr(function, "__foundation_on__", ()), type]
        function.__foundation_on__ = types  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True, slots=True)
class Handling:
    """How one type of signal is handled."""

    type: str
    function: Handler
    is_async: bool
    adapter: TypeAdapter[Any] | None
    """Validates the payload; None: it is passed as it came."""


class Agent:
    """A named object with typed state, a durable mailbox and handlers.

    Subclass it. While it runs, one activation at a time handles one signal at
    a time; between signals its state is stored. `self.state` is what the last
    handler left; `self.id` is its name.
    """

    State: ClassVar[type[State]] = State
    durable: ClassVar[bool] = True
    """False: state lives in memory only, signals are at least once."""
    capabilities: ClassVar[typing.Collection[str]] = ()
    """What it provides: targets of ``capability:NAME`` and ``any:NAME``."""
    labels: ClassVar[typing.Mapping[str, str]] = {}
    """Of its own: targets of ``label:EXPRESSION``."""
    subscriptions: ClassVar[typing.Sequence[str | Subscription]] = ()
    """Topics whose signals it is sent; see `subscribe`."""
    critical: ClassVar[bool] = False
    """Whether it is restarted elsewhere at once when its node is lost."""

    state: Any
    ctx: Context

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        seen: dict[str, str] = {}
        for name, member in vars(cls).items():
            for type_ in getattr(member, "__foundation_on__", ()):
                if type_ in seen:
                    raise ConfigError(
                        f"{cls.__qualname__}: both {seen[type_]} and {name} handle {type_!r}"
                    )
                seen[type_] = name
        if not (isinstance(cls.State, type) and issubclass(cls.State, State)):
            raise ConfigError(
                f"{cls.__qualname__}.State must be a subclass of foundation_nats.State"
            )

    def __init__(self) -> None:
        """Take no arguments: configuration is in `self.config`, state in `self.state`."""

    @property
    def id(self) -> str:
        """The agent's name."""
        return self.ctx.agent_id

    @property
    def config(self) -> dict[str, Any]:
        """The ``config`` of the manifest entry, or of `agents.start`."""
        return self.ctx.config

    def emit(
        self,
        type: str,
        data: Any = None,
        *,
        to: str | Target,
        ttl: float | None = None,
        deadline: datetime | None = None,
    ) -> None:
        """Send a signal because of the one in hand, once its effects are stored.

        It reaches the receiver's state exactly once, and not at all if this
        handler raises. *data* is taken as it is now. After *ttl* seconds, or after
        *deadline*, it is not handled any more; ``deadline=signal.deadline`` hands on that of
        the signal in hand.

        Raises:
            ValueError: *to* is no target, or *ttl* is not positive.
            TypeError: *data* is not JSON.
        """
        until = deadline_text(self.ctx.now(), ttl=ttl, deadline=deadline)
        self.ctx._emissions.append(
            Emission(_as_target(to), _checked_type(type), _freeze(data), until)
        )

    async def on_start(self, recovered_from: RecoveredFrom | None) -> None:
        """Called before the first signal of every activation.

        *recovered_from* names the earlier activation (node, epoch, reason) whose
        state this one continues; None at the very first. A parameter named
        ``recovered`` is given the same value.
        """

    async def ready(self) -> bool:
        """Whether it may be counted as running; asked after `on_start` until it says so.

        A health gate: a rollout goes on when those that were restarted are ready, and is
        rolled back when they don't get ready. To raise means that it never will. Until
        then nothing is handled; after `worker.ready_timeout_s` the start has failed.
        """
        return True

    async def on_stop(self, reason: str) -> None:
        """Called when the agent is stopped in good order; not when its process dies."""

    async def handle_cluster_signal(self, signal: Signal[Any]) -> Any:
        """Called for signals of type ``cluster.*`` that have no handler of their own."""


def _as_target(to: str | Target) -> Target:
    return to if isinstance(to, Target) else Target.parse(to)


def _checked_type(type: str) -> str:
    if not type or any(c.isspace() for c in type):
        raise ValueError(f"{type!r} is not a signal type")
    return type


def _read_deadline(text: str) -> datetime | None:
    try:
        return read_time(text)
    except (ValueError, TypeError):
        return None


def _freeze(data: Any) -> Any:
    import orjson

    from foundation_nats.bus.rpc import to_json

    return orjson.Fragment(to_json(data))


def handlings(cls: type[Agent]) -> dict[str, Handling]:
    """The handlers of *cls* and its bases by signal type.

    Raises:
        ConfigError: a handler's payload type can't be resolved; names it.
    """
    found: dict[str, Handling] | None = cls.__dict__.get("_foundation_handlings")
    if found is not None:
        return found
    found = {}
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            for type_ in getattr(member, "__foundation_on__", ()):
                function = getattr(cls, name)  # a subclass may override it without the mark
                found[type_] = Handling(
                    type_,
                    function,
                    inspect.iscoroutinefunction(function),
                    _adapter(cls, name, member),
                )
    cls._foundation_handlings = found  # type: ignore[attr-defined]
    return found


def _adapter(cls: type[Agent], name: str, function: Handler) -> TypeAdapter[Any] | None:
    parameters = list(inspect.signature(function).parameters.values())
    where = f"{cls.__module__}.{cls.__qualname__}.{name}"
    if len(parameters) != 2:
        raise ConfigError(f"{where} must take one argument besides self: the signal")
    annotation = parameters[1].annotation
    if annotation is inspect.Parameter.empty:
        return None
    if isinstance(annotation, str):
        try:
            # Only this parameter: a return type may be imported for type checkers alone.
            only = types.SimpleNamespace(__annotations__={"signal": annotation})
            annotation = typing.get_type_hints(
                only, globalns=function.__globals__, localns=dict(vars(cls))
            )["signal"]
        except NameError as error:
            raise ConfigError(
                f"{where}: the type {parameters[1].annotation!r} can't be resolved ({error}); "
                "define it at the top of its module"
            ) from error
    arguments = typing.get_args(annotation)
    if not arguments or arguments[0] is Any:
        return None
    try:
        return TypeAdapter(arguments[0])
    except PydanticUserError as error:
        raise ConfigError(f"{where}: the payload type can't be validated: {error}") from error


def start_arguments(cls: type[Agent], recovered: RecoveredFrom | None) -> dict[str, Any]:
    """The keyword arguments that this class's `on_start` takes."""
    names = inspect.signature(cls.on_start).parameters
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    offered = {"recovered_from": recovered, "recovered": recovered}
    return {
        name: value
        for name, value in offered.items()
        if name in names or (accepts_all and name == "recovered_from")
    }


def provided(cls: type[Agent]) -> list[str]:
    """The capabilities the class declares.

    Raises:
        ConfigError: one of them is no valid name.
    """
    names = cls.capabilities
    names = [names] if isinstance(names, str) else sorted(names)
    for name in names:
        if not is_name(name):
            raise ConfigError(f"{cls.__qualname__}: {name!r} is not a valid capability name")
    return names


A = TypeVar("A", bound=type[Agent])


def subscribe(
    topic: str, *, mode: str = SubscriptionMode.ALL, group: str | None = None
) -> Callable[[A], A]:
    """Have every agent of a class sent what is published on *topic*, as durably as any signal.

    Args:
        topic: a pattern: ``orders.*`` is one more word, ``orders.>`` one or more.
        mode: ``all``: every agent that subscribes gets it; ``one-of-group``: one of each group.
        group: its name; without it those of one deployment are a group.

    Raises:
        ConfigError: an argument is wrong.

    Example:
        >>> @subscribe("orders.*", mode="one-of-group")
        ... class Billing(Agent): ...
    """
    try:
        wanted = Subscription(topic=topic, mode=SubscriptionMode(mode), group=group)
    except ValueError as error:
        raise ConfigError(f"subscribe({topic!r}, {mode!r}): {error}") from error

    def mark(cls: A) -> A:
        cls.subscriptions = (*cls.subscriptions, wanted)
        return cls

    return mark


def subscribed(cls: type[Agent]) -> list[Subscription]:
    """The topics the class subscribes to.

    Raises:
        ConfigError: one of them is no topic.
    """
    found = [cls.subscriptions] if isinstance(cls.subscriptions, str) else cls.subscriptions
    try:
        return [
            item if isinstance(item, Subscription) else Subscription(topic=item) for item in found
        ]
    except ValueError as error:
        raise ConfigError(f"{cls.__qualname__}: {error}") from error


def validated(handling: Handling | None, signal_type: str, data: Any) -> Any:
    """The payload as the handler's type; as it came if the handler wants it so.

    Raises:
        PayloadInvalidError: it does not fit; says where.
    """
    if handling is None or handling.adapter is None:
        return data
    try:
        return handling.adapter.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PayloadInvalidError(
            f"The payload of {signal_type} is not valid: {where + ': ' if where else ''}"
            f"{first['msg']}.",
            type=signal_type,
            errors=[
                {"loc": list(item["loc"]), "msg": item["msg"], "type": item["type"]}
                for item in error.errors(include_url=False, include_input=False)
            ][:20],
        ) from error


def unhandled(cls: type[Agent], id: str, signal_type: str) -> UnhandledSignalError:
    """The error for a signal that *cls* has no handler for; lists those that it has."""
    known = ", ".join(sorted(handlings(cls))) or "none"
    return UnhandledSignalError(
        f"{cls.__qualname__} ({id}) has no handler for {signal_type!r}; it handles: {known}.",
        agent=id,
        type=signal_type,
    )
