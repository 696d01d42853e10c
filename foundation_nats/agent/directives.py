"""Directives: what a handler wants done, as data; the agent returns them or hands them to `direct`.

A directive says the same as a call of ``emit``, ``ctx.schedule`` or ``ctx.stop``, and can be made, tested
and passed on by code that has no agent, such as an action's. What leaves because of it leaves after the
commit of the handler that gave it, and not at all if that raises.

A directive of your own subclasses `Custom` and has `execute`. It is stored as a signal of the agent to
itself, so it is carried out by a handler: after the commit, in order, tried again if it raises, a dead
letter in the end. Outside effects are at least once; use ``ctx.once`` in `execute`.

`apply` is a table: the runtime knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from foundation_nats.agent.context import Emission, freeze
from foundation_nats.agent.owner import AnyAgent
from foundation_nats.agent.signal import Payload
from foundation_nats.errors import ConfigError, StateInvalidError
from foundation_schemas import Target, TargetKind

DIRECTIVE = "foundation.directive"
"""The type of the signal that carries a custom directive."""
_LEVELS = ("warning", "error")


class Directive:
    """The base of all of them."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Emit(Directive):
    """Send a signal; as `Agent.emit`."""

    type: str | Payload
    data: Any = None
    to: str | Target = ""
    ttl: float | None = None
    attempts: int | None = None
    on_error: str = ""


@dataclass(frozen=True, slots=True)
class Reply(Directive):
    """Answer the signal in hand: what an ask returns, and a signal sent by an agent gets as *type*."""

    data: Any = None
    type: str | None = None
    """Of the signal to the agent that sent the one in hand; None: only asks are answered."""


@dataclass(frozen=True, slots=True)
class Schedule(Directive):
    """Send a signal later; as `Context.schedule`."""

    type: str
    data: Any = None
    to: str | Target | None = None
    name: str | None = None
    at: datetime | str | None = None
    after: float | timedelta | None = None
    every: float | timedelta | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Cron(Directive):
    """Send a signal again and again by a cron expression, under a name that a later one replaces."""

    type: str
    cron: str
    name: str
    data: Any = None
    to: str | Target | None = None
    zone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Cancel(Directive):
    """End a timer of this agent."""

    name: str


@dataclass(frozen=True, slots=True)
class Stop(Directive):
    """Stop this agent after the signal in hand."""

    reason: str = "stopped by itself"


@dataclass(frozen=True, slots=True)
class Error(Directive):
    """Report that something is wrong, as the event ``agent.error`` (or ``agent.warning``)."""

    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: str = "error"


@dataclass(frozen=True, slots=True)
class SetState(Directive):
    """Change the state: what is given replaces what is there, objects are merged."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunInstruction(Directive):
    """Run one of the agent's actions after the commit; what it returns comes back as a signal."""

    action: str
    params: Mapping[str, Any] = field(default_factory=dict)
    result_type: str | None = None
    """Of the signal to the agent itself that carries the result; None: it is dropped."""


@dataclass(frozen=True, slots=True)
class SpawnChild(Directive):
    """Start a child; as `Context.spawn`, with the same arguments."""

    run: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StopChild(Directive):
    """Stop a child; as `Context.stop_child`."""

    tag: str


class Custom(BaseModel, Directive):
    """A directive of your own: its fields, and `execute`. Its class must be imported where the agent runs.

    Example:
        >>> class Page(Custom, name="page"):
        ...     number: str
        ...
        ...     async def execute(self, agent: AnyAgent) -> None:
        ...         await agent.ctx.once("page", call, self.number)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    directive_name: ClassVar[str] = ""

    def __init_subclass__(cls, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.directive_name = name or cls.__qualname__
        known = _CUSTOM.get(cls.directive_name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ConfigError(
                f"both {known.__module__}.{known.__qualname__} and {cls.__module__}."
                f"{cls.__qualname__} are the directive {cls.directive_name!r}: name one of them"
            )
        _CUSTOM[cls.directive_name] = cls

    async def execute(self, agent: AnyAgent) -> None:
        """Carry it out, as a handler of *agent*."""
        executor = _EXECUTORS.get(self.directive_name)
        if executor is None:
            raise ConfigError(
                f"Nobody carries out the directive {self.directive_name!r}: give its class "
                "`execute`, or register a function by `executes`."
            )
        await executor(self, agent)


_CUSTOM: dict[str, type[Custom]] = {}
_EXECUTORS: dict[str, Callable[[Any, Any], Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def executes(kind: type[Custom]) -> Callable[[F], F]:
    """Register ``async def function(directive, agent)`` as what carries out *kind*."""

    def register(function: F) -> F:
        _EXECUTORS[kind.directive_name] = function
        return function

    return register


async def execute(agent: AnyAgent, stored: Mapping[str, Any]) -> None:
    """Carry out a custom directive that came as a signal.

    Raises:
        ConfigError: no class of that name is imported here, or its fields don't fit.
    """
    name = str(stored.get("name"))
    kind = _CUSTOM.get(name)
    if kind is None:
        raise ConfigError(
            f"There is no directive {name!r} here: import the module that defines it."
        )
    try:
        directive = kind.model_validate(stored.get("values", {}))
    except ValidationError as error:
        raise ConfigError(f"Directive {name!r}: {error}") from error
    await directive.execute(agent)


# ---- how each is carried out ----------------------------------------------------------


def _emit(agent: AnyAgent, item: Emit) -> None:
    agent.emit(
        item.type,
        item.data,
        to=item.to,
        ttl=item.ttl,
        attempts=item.attempts,
        on_error=item.on_error,
    )


def _reply(agent: AnyAgent, item: Reply) -> None:
    signal = agent.ctx.signal
    if item.type is not None and signal is not None and signal.source.startswith("agent:"):
        agent.emit(item.type, item.data, to=signal.source)


def _schedule(agent: AnyAgent, item: Schedule) -> None:
    agent.ctx.schedule(
        item.type,
        item.data,
        to=item.to,
        name=item.name,
        at=item.at,
        after=item.after,
        every=item.every,
        ttl=item.ttl,
    )


def _cron(agent: AnyAgent, item: Cron) -> None:
    agent.ctx.schedule(
        item.type, item.data, to=item.to, name=item.name, cron=item.cron, zone=item.zone
    )


def _error(agent: AnyAgent, item: Error) -> None:
    if item.level not in _LEVELS:
        raise ValueError(f"level={item.level!r}: use one of {', '.join(_LEVELS)}")
    agent.ctx.report(item.level, item.message, item.data)


def _set_state(agent: AnyAgent, item: SetState) -> None:
    kind = type(agent.state)
    try:
        fresh = kind.model_validate(_merged(agent.state.model_dump(), item.values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StateInvalidError(
            f"SetState does not fit {kind.__qualname__}: {where}: {first['msg']}."
        ) from error
    fresh.__pydantic_private__ = agent.state.__pydantic_private__
    agent.state = fresh


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(known, value) if both else value  # type: ignore[arg-type]
    return merged


def _to_self(agent: AnyAgent, type: str, data: Any) -> None:
    target = Target(kind=TargetKind.AGENT, name=agent.id)
    agent.ctx._emissions.append(Emission(target, type, freeze(data)))


def _run_instruction(agent: AnyAgent, item: RunInstruction) -> None:
    _to_self(
        agent,
        "foundation.instruction",
        {"action": item.action, "params": item.params, "result_type": item.result_type},
    )


def _custom(agent: AnyAgent, item: Custom) -> None:
    _to_self(
        agent, DIRECTIVE, {"name": item.directive_name, "values": item.model_dump(mode="json")}
    )


_APPLY: dict[type[Any], Callable[[Any, Any], None]] = {
    Emit: _emit,
    Reply: _reply,
    Schedule: _schedule,
    Cron: _cron,
    Cancel: lambda agent, item: agent.ctx.cancel(item.name),
    Stop: lambda agent, item: agent.ctx.stop(item.reason),
    Error: _error,
    SetState: _set_state,
    RunInstruction: _run_instruction,
    SpawnChild: lambda agent, item: agent.ctx.spawn(item.run, **item.arguments),
    StopChild: lambda agent, item: agent.ctx.stop_child(item.tag),
}


def apply(agent: AnyAgent, directive: Directive) -> None:
    """Note what *directive* asks for, to be stored with the handler's other effects.

    Raises:
        ConfigError: it is no directive.
        ValueError, TypeError, StateInvalidError: what it says can't be done.
    """
    for kind in type(directive).__mro__:
        carry_out = _APPLY.get(kind)
        if carry_out is not None:
            carry_out(agent, directive)
            return
    if isinstance(directive, Custom):
        _custom(agent, directive)
        return
    raise ConfigError(f"{directive!r} is no directive: subclass `Custom`")


def are_directives(result: Any) -> TypeGuard[Directive | list[Directive]]:
    """Whether a handler has returned directives rather than a reply."""
    if isinstance(result, Directive):
        return True
    return (
        isinstance(result, list) and bool(result) and all(isinstance(x, Directive) for x in result)
    )


def apply_result(agent: AnyAgent, result: Directive | list[Directive]) -> Any:
    """Apply what a handler returned; returns the reply among it, if any."""
    items = result if isinstance(result, list) else [result]
    for item in items:
        apply(agent, item)
    return next((item.data for item in items if isinstance(item, Reply)), None)
