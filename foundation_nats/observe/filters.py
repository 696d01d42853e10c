"""`parse`: a safe filter over JSON, for ``tap --where``.

Pure. ``data.amount > 10 and type == "order.placed"``: comparisons of a dotted
path with a JSON value (``== != > >= < <= contains``), joined by ``and``. No
code is evaluated; a path that is absent, or a value of another type, does not
match.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from foundation_nats.errors import ConfigError

_CLAUSE = re.compile(r"\s*([A-Za-z_][\w.\-]*)\s*(==|!=|>=|<=|>|<|contains)\s*(.+?)\s*\Z", re.S)
_AND = re.compile(r"\s+and\s+(?=(?:[^\"]*\"[^\"]*\")*[^\"]*\Z)")

Filter = Callable[[Mapping[str, Any]], bool]


def _contains(found: Any, wanted: Any) -> bool:
    return wanted in found


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "contains": _contains,
}
_ABSENT = object()


def _look_up(body: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(body, Mapping) and part in body:
            body = body[part]
        elif isinstance(body, list) and part.isdigit() and int(part) < len(body):
            body = body[int(part)]
        else:
            return _ABSENT
    return body


def parse(text: str) -> Filter:
    """The filter that *text* describes.

    Raises:
        ConfigError: it is not of the form ``path op value [and …]``.
    """
    clauses = []
    for part in _AND.split(text):
        match = _CLAUSE.match(part)
        if match is None:
            raise ConfigError(
                f"{part.strip()!r} is no filter: write PATH OP VALUE, "
                'such as data.amount > 10 or type == "order.placed"'
            )
        try:
            value = orjson.loads(match[3])
        except orjson.JSONDecodeError:
            value = match[3]
        clauses.append((match[1].split("."), _OPERATORS[match[2]], value))

    def matches(body: Mapping[str, Any]) -> bool:
        for path, compare, value in clauses:
            found = _look_up(body, path)
            if found is _ABSENT:
                return False
            try:
                if not compare(found, value):
                    return False
            except TypeError:
                return False
        return True

    return matches
