"""Which method handles which signal: `on`, and the table of a class's handlers.

Pure.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from foundation_nats.errors import ConfigError, PayloadInvalidError, UnhandledSignalError

if typing.TYPE_CHECKING:
    from foundation_nats.agent.agent import Agent

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
