"""`State`: the typed state of an agent, and how it becomes bytes and comes back.

Pure. A state is a pydantic model; what does not fit it is an error, both when
a handler leaves such a state behind and when a stored one is read. Nothing is
dropped silently: unknown fields are refused, so that a changed class can't
forget what an older one stored.

A class that changes its fields raises its `version`, and says by `migrates` how what an earlier
version stored becomes its own. What a newer version stored is refused by an older class, so a
rollback of the code fails loudly instead of losing what it does not know.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from foundation_nats.errors import ConfigError, StateInvalidError

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound="State")

_LOOSE = {
    "gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern",
    "strict", "allow_inf_nan", "max_digits", "decimal_places",
}  # fmt: skip
"""Keys of a core schema that ask more of a value than its type, which serialising checks."""


def migrates(*, from_: int) -> Callable[[F], F]:
    """Mark a function of a `State` that turns the dict of version *from_* into that of the next.

    It takes the dict and returns it, changed or new; it must depend on nothing else, since it
    runs at each activation until the agent has stored something anew.

    Raises:
        ConfigError: *from_* is below 1.

    Example:
        >>> class State(State):
        ...     version = 2
        ...     total_cents: int = 0
        ...
        ...     @migrates(from_=1)
        ...     def _to_cents(old: dict) -> dict:
        ...         return {"total_cents": round(old.get("total", 0) * 100)}
    """
    if from_ < 1:
        raise ConfigError(f"migrates(from_={from_}): versions begin with 1")

    def mark(function: F) -> F:
        plain: Any = function.__func__ if isinstance(function, staticmethod) else function
        plain.__foundation_migrates__ = from_
        return function

    return mark


class State(BaseModel):
    """The base of an agent's state: every field needs a default.

    Fields that begin with an underscore (pydantic's private attributes) are not stored: they live
    as long as the activation does, and no roll-back touches them.
    """

    model_config = ConfigDict(extra="forbid", ignored_types=(staticmethod,))

    version: ClassVar[int] = 1
    """Raise it when the fields change; see `migrates`."""
    _migrations: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    _is_strict: ClassVar[bool] = False
    """Whether a value of the right type may still be refused."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        found = dict(cls._migrations)
        for member in vars(cls).values():
            plain = getattr(member, "__func__", member)
            start = getattr(plain, "__foundation_migrates__", None)
            if start is not None:
                found[start] = plain
        cls._migrations = found
        if not isinstance(cls.version, int) or cls.version < 1:
            raise ConfigError(f"{cls.__qualname__}.version must be a whole number from 1 on")
        late = [start for start in found if start >= cls.version]
        if late:
            raise ConfigError(
                f"{cls.__qualname__} is version {cls.version} and migrates from {max(late)}: "
                f"set `version = {max(late) + 1}`"
            )
        cls._is_strict = bool(cls.__pydantic_decorators__.field_validators) or any(
            _demands(schema) for schema in _parts(cls.__pydantic_core_schema__)
        )


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """All schemas within a core schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("type"), str):
            yield schema
        for key, value in schema.items():
            if key not in ("default", "metadata", "serialization"):
                yield from _parts(value)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from _parts(value)


def _demands(schema: dict[str, Any]) -> bool:
    kind = schema["type"]
    # A literal is not compared when it is written.
    return (
        kind == "literal"
        or kind.startswith("function-")
        or any(schema.get(key) is not None for key in _LOOSE)
    )


def dump_state(state: BaseModel) -> bytes:
    """The state as JSON, validated as it would be when it is read.

    Raises:
        StateInvalidError: a field holds something its type does not allow.
    """
    try:
        body = state.__pydantic_serializer__.to_json(state, warnings="error")
        if getattr(state, "_is_strict", True):
            type(state).__pydantic_validator__.validate_json(body)
        return body
    except PydanticSerializationError as error:
        raise StateInvalidError(
            f"The state does not fit {type(state).__qualname__}: {error}."
        ) from error
    except ValidationError as error:
        raise StateInvalidError(
            f"The state does not fit {type(state).__qualname__}: {_first(error)}."
        ) from error


def load_state(
    kind: type[State], stored: dict[str, Any] | bytes, *, version: int | None = None
) -> State:
    """A state from what was stored, by that *version* of its class; None: by this one.

    Raises:
        StateInvalidError: it does not fit the class; names the first field that doesn't.
    """
    try:
        if isinstance(stored, bytes):
            return kind.model_validate_json(stored)
        if version is not None and version != kind.version:
            stored = _migrated(kind, stored, version)
        return kind.model_validate(stored)
    except ValidationError as error:
        raise StateInvalidError(
            f"The stored state does not fit {kind.__qualname__}: {_first(error)}.",
            hint="Raise `version` and say by `migrates` what becomes of what was stored, give the "
            "field back its type, or stop the agent and change its record.",
        ) from error


def _migrated(kind: type[State], stored: dict[str, Any], version: int) -> dict[str, Any]:
    if version > kind.version:
        raise StateInvalidError(
            f"The stored state is version {version}, and {kind.__qualname__} is version "
            f"{kind.version}; nothing was overwritten.",
            hint="Run the code that wrote it, or a newer one.",
        )
    for start in range(version, kind.version):
        migrate = kind._migrations.get(start)
        if migrate is None:
            raise StateInvalidError(
                f"The stored state is version {start}, and {kind.__qualname__} does not say how "
                f"that becomes version {start + 1}; nothing was overwritten.",
                hint=f"Add a function marked `@migrates(from_={start})`.",
            )
        try:
            stored = migrate(stored)
        except Exception as error:
            raise StateInvalidError(
                f"{kind.__qualname__}: migrating from version {start} raised "
                f"{type(error).__name__}: {error}; nothing was overwritten."
            ) from error
        if not isinstance(stored, dict):
            raise StateInvalidError(
                f"{kind.__qualname__}: migrating from version {start} returned no dict; "
                "nothing was overwritten."
            )
    return stored


def restore_state(state: S, stored: bytes) -> S:
    """What was stored, with the private fields that *state* has now."""
    fresh = typing.cast("S", load_state(type(state), stored))
    if state.__pydantic_private__ is not None:
        fresh.__pydantic_private__ = state.__pydantic_private__
    return fresh


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def first_state(kind: type[State]) -> State:
    """The state of an agent that has none yet.

    Raises:
        StateInvalidError: a field has no default.
    """
    try:
        return kind()
    except ValidationError as error:
        names = ", ".join(str(item["loc"][0]) for item in error.errors() if item["loc"])
        raise StateInvalidError(
            f"{kind.__qualname__} can't begin empty: give a default to {names}."
        ) from error
