"""`ref`: a result that is not there yet, as data: ``ref("charge").number`` is ``{"$ref": ["charge", "number"]}``.

Pure. ``ref("input")`` is what the plan was given. A reference to a step that was left out gives null, and
so does everything within it; one to a part that is not there is an error. An object that looks like a
reference and is none is written ``{"$value": …}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
from pydantic import BaseModel

from foundation_nats.bus.rpc import to_json
from foundation_nats.errors import ActionInvalidError, ConfigError

INPUT = "input"
REF, VALUE = "$ref", "$value"


class Ref:
    """A result of a step, or a part of it; made by `ref`."""

    __slots__ = ("_path",)

    def __init__(self, path: tuple[str | int, ...]) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Ref:
        if name.startswith("_"):
            raise AttributeError(name)
        return Ref((*self._path, name))

    def __getitem__(self, key: str | int) -> Ref:
        return Ref((*self._path, key))

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"{self!r} is no list yet")

    def __repr__(self) -> str:
        return f"ref({'.'.join(map(str, self._path))})"


def ref(step: str) -> Ref:
    """The result of *step*, or of what the plan was given (``input``); its parts by ``.name`` and ``[0]``."""
    return Ref((step,))


def as_data(value: Any) -> Any:
    """*value* as JSON gives it, with its references as data.

    Raises:
        ConfigError: it holds something JSON can't say.
    """
    try:
        return orjson.loads(to_json(_plain(value)))
    except TypeError as error:
        raise ConfigError(f"a plan is data, and can't hold this: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        return {REF: list(value._path)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def steps_in(value: Any) -> set[str]:
    """The steps that *value* refers to, ``input`` among them.

    Raises:
        ConfigError: a reference is malformed.
    """
    if isinstance(value, Mapping):
        path = _path_of(value)
        if path is not None:
            return {str(path[0])}
        if value.keys() == {VALUE}:
            return set()
        return {name for item in value.values() for name in steps_in(item)}
    if isinstance(value, list | tuple):
        return {name for item in value for name in steps_in(item)}
    return set()


def filled(value: Any, results: Mapping[str, Any]) -> Any:
    """*value* with what its references stand for.

    Raises:
        ActionInvalidError: a part is not there; names it.
    """
    if isinstance(value, Mapping):
        path = _path_of(value)
        if path is not None:
            return _looked_up(path, results)
        if value.keys() == {VALUE}:
            return value[VALUE]
        return {key: filled(item, results) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, results) for item in value]
    return value


def _path_of(value: Mapping[str, Any]) -> Sequence[str | int] | None:
    if value.keys() != {REF}:
        return None
    path = value[REF]
    if isinstance(path, str):
        path = path.split(".")
    is_path = isinstance(path, list | tuple) and path and isinstance(path[0], str)
    if not is_path or not all(isinstance(part, str | int) for part in path):
        raise ConfigError(f"{dict(value)!r} is no reference: use {{'$ref': ['step', 'part']}}")
    return path  # type: ignore[no-any-return]


def _looked_up(path: Sequence[str | int], results: Mapping[str, Any]) -> Any:
    found: Any = results[str(path[0])]
    if found is None and path[0] != INPUT:
        return None
    for part in path[1:]:
        try:
            if isinstance(found, list) and isinstance(part, str) and part.isdigit():
                part = int(part)
            found = found[part]
        except (KeyError, IndexError, TypeError):
            raise ActionInvalidError(
                f"There is no {'.'.join(map(str, path))}: no {part!r} in "
                f"{str(list(found) if isinstance(found, Mapping) else found)[:80]}."
            ) from None
    return found


__all__ = ["INPUT", "Ref", "as_data", "filled", "ref", "steps_in"]
