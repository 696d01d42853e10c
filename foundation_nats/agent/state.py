"""`State`: the typed state of an agent, and how it becomes bytes and comes back.

Pure. A state is a pydantic model; what does not fit it is an error, both when
a handler leaves such a state behind and when a stored one is read. Nothing is
dropped silently: unknown fields are refused, so that a changed class can't
forget what an older one stored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError

from foundation_nats.errors import StateInvalidError


class State(BaseModel):
    """The base of an agent's state: every field needs a default."""

    model_config = ConfigDict(extra="forbid")


def dump_state(state: BaseModel) -> bytes:
    """The state as JSON.

    Raises:
        StateInvalidError: a field holds something its type does not allow.
    """
    try:
        return state.__pydantic_serializer__.to_json(state, warnings="error")
    except PydanticSerializationError as error:
        raise StateInvalidError(
            f"The state does not fit {type(state).__qualname__}: {error}."
        ) from error


def load_state(kind: type[State], stored: dict[str, Any] | bytes) -> State:
    """A state from what was stored.

    Raises:
        StateInvalidError: it does not fit the class; names the first field that doesn't.
    """
    try:
        if isinstance(stored, bytes):
            return kind.model_validate_json(stored)
        return kind.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StateInvalidError(
            f"The stored state does not fit {kind.__qualname__}: {where}: {first['msg']}.",
            hint="Give the field back its type, or stop the agent and migrate its record.",
        ) from error


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
