"""Which method handles which signal: `on`, and `Routes`, the table of a class's handlers.

Pure.
"""

from __future__ import annotations

import builtins
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from foundation_nats.agent.signal import Payload, Signal
from foundation_nats.errors import ConfigError, PayloadInvalidError, UnhandledSignalError

Handler = Callable[..., Any]


ANY_WORD, ANY_WORDS = "*", "**"
NOTICES = ("cluster.", "foundation.")
"""Types that the cluster itself sends: who has no handler for them ignores them."""
_WORD = r"[^.]+"
_REMEMBERED_MAX = 1024


def on(
    type: str | builtins.type[Payload],
    *,
    priority: int = 0,
    when: Callable[[Signal[Any]], bool] | None = None,
    timeout: float | None = None,
) -> Callable[[Handler], Handler]:
    """Mark a method as the handler of signals of *type*.

    The method takes one `Signal`; the type in ``Signal[T]`` is what the payload
    is validated against. It may be ``async`` or plain; a plain one must not block.

    One handler handles a signal: the first that fits by *priority*, then by how exactly its
    type says what came, then a subclass's before its base's.

    Args:
        type: words joined by dots, or a `Payload` class; ``*`` stands for one word, ``**`` for any
            number of them.
        priority: the highest is asked first.
        when: whether it wants this signal, whose `data` is as it came; must be quick, and say
            the same again when it is asked again. Who raises has refused.
        timeout: seconds that handling may take; None: `worker.handler_timeout_s`. Not for plain
            methods, which can't be interrupted.

    Raises:
        ConfigError: *type* is none.
    """
    pattern = type if isinstance(type, str) else type.signal_type
    if not pattern or any(c.isspace() for c in pattern):
        raise ConfigError(f"{type!r} is not a signal type: use words joined by dots")
    if timeout is not None and timeout <= 0:
        raise ConfigError(f"on({pattern!r}): a timeout of {timeout:g} s leaves no time")

    def mark(function: Handler) -> Handler:
        marks = [
            *getattr(function, "__foundation_on__", ()),
            Mark(pattern, priority, when, timeout),
        ]
        function.__foundation_on__ = marks  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True, slots=True)
class Mark:
    """What `on` says about a method."""

    type: str
    priority: int = 0
    when: Callable[[Signal[Any]], bool] | None = None
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Handling:
    """How signals of one type, or of a pattern of types, are handled."""

    type: str
    function: Handler
    is_async: bool
    adapter: TypeAdapter[Any] | None
    """Validates the payload; None: it is passed as it came."""
    priority: int = 0
    when: Callable[[Signal[Any]], bool] | None = None
    timeout: float | None = None
    name: str = ""
    """Of the method."""

    @property
    def is_pattern(self) -> bool:
        """Whether its type has wildcards."""
        return ANY_WORD in self.type


class Routes:
    """The handlers of one class, in the order in which they are asked."""

    __slots__ = ("_matches", "_sure", "handlings")

    def __init__(self, handlings: Iterable[Handling]) -> None:
        """*handlings*: of several that are equal in all, the first counts."""
        self.handlings = tuple(sorted(handlings, key=_rank))
        self._matches = {
            item.type: _compiled(item.type) for item in self.handlings if item.is_pattern
        }
        self._sure: dict[str, Handling | None] = {}

    def find(self, type: str, body: Mapping[str, Any]) -> Handling | None:
        """Who handles the signal whose envelope is *body*; None: nobody."""
        try:
            return self._sure[type]
        except KeyError:
            pass
        fitting = self.of(type)
        first = fitting[0] if fitting else None
        if first is None or first.when is None:
            if len(self._sure) >= _REMEMBERED_MAX:
                self._sure.clear()
            self._sure[type] = first
            return first
        signal = Signal(
            id=body["id"],
            source=body["source"],
            type=type,
            data=body.get("data"),
            time=body.get("time"),
            cause=body.get("cause"),
        )
        return next((item for item in fitting if item.when is None or item.when(signal)), None)

    def of(self, type: str) -> list[Handling]:
        """Those whose type fits, in order."""
        return [
            item
            for item in self.handlings
            if item.type == type
            or (item.is_pattern and self._matches[item.type].fullmatch(type) is not None)
        ]

    def types(self) -> list[str]:
        """The types and patterns that are handled, by name; not those of the platform itself."""
        return sorted(
            {item.type for item in self.handlings if not item.type.startswith("foundation.")}
        )


def _rank(item: Handling) -> tuple[int, int, int, int]:
    words = item.type.split(".")
    exact = sum(word not in (ANY_WORD, ANY_WORDS) for word in words)
    return (-item.priority, item.is_pattern, -exact, words.count(ANY_WORDS))


def _compiled(pattern: str) -> re.Pattern[str]:
    text = dot = ""
    for word in pattern.split("."):
        if word == ANY_WORDS:
            # Zero words too: the dot belongs to what may be missing.
            text += rf"(?:{dot}{_WORD})*" if dot else rf"(?:{_WORD}(?:\.|$))*"
        else:
            text += dot + (_WORD if word == ANY_WORD else re.escape(word))
            dot = r"\."
    return re.compile(text)


def is_notice(type: str) -> bool:
    """Whether a signal of this type is no mistake where nobody handles it."""
    return type.startswith(NOTICES)


def marked(cls: builtins.type[Any]) -> Iterator[tuple[str, Any, Mark]]:
    """Name, member and mark of each handler of *cls*; those of a subclass before its bases'."""
    for base in cls.__mro__:
        for name, member in vars(base).items():
            for mark in getattr(member, "__foundation_on__", ()):
                yield name, member, mark


def handling_of(cls: builtins.type[Any], name: str, member: Any, mark: Mark) -> Handling:
    """One handler of *cls*.

    Raises:
        ConfigError: its payload type can't be resolved; names it.
    """
    function = getattr(cls, name)  # a subclass may override it without the mark
    return Handling(
        mark.type,
        function,
        inspect.iscoroutinefunction(function),
        _adapter(cls, name, member),
        mark.priority,
        mark.when,
        mark.timeout,
        name,
    )


def handlings(cls: builtins.type[Any]) -> Routes:
    """The handlers of *cls*, its bases and its skills.

    Raises:
        ConfigError: a handler's payload type can't be resolved; names it.
    """
    found: Routes | None = cls.__dict__.get("_foundation_handlings")
    if found is None:
        found = Routes(
            [
                *(handling_of(cls, *mine) for mine in marked(cls)),
                *getattr(cls, "_foundation_more", list)(),
            ]
        )
        cls._foundation_handlings = found
    return found


def _adapter(cls: builtins.type[Any], name: str, function: Handler) -> TypeAdapter[Any] | None:
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


def unhandled(cls: builtins.type[Any], id: str, signal_type: str) -> UnhandledSignalError:
    """The error for a signal that *cls* has no handler for; lists those that it has."""
    known = ", ".join(handlings(cls).types()) or "none"
    return UnhandledSignalError(
        f"{cls.__qualname__} ({id}) has no handler for {signal_type!r}; it handles: {known}.",
        agent=id,
        type=signal_type,
    )
