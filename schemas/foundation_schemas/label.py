"""Label expressions: ``zone in (a, b)``, ``disk != hdd``, ``gpu``, ``!spot``, ``cores > 8``; read, and asked of labels.

Pure. An expression is read once, when a policy is validated, so that a
mistake is told to whoever wrote it and not to the leader later. A label that
is absent fails everything but ``!name``, ``!=`` and ``not in``, as in
Kubernetes' selectors, after which the grammar is modelled::

    expression = name | "!" name | name operator value | name ["not"] "in" "(" value {"," value} ")"
    operator   = "=" | "==" | "!=" | ">" | ">=" | "<" | "<="
    name       = letters, digits, and . _ / - inside
    value      = the same, or anything in single or double quotes

``notin`` is another way to write ``not in``. Values of ``>`` and its kin are numbers.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

LENGTH_MAX = 512
OPERATORS = ("=", "==", "!=", ">", ">=", "<", "<=", "in", "not in")

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<word>[+-]?[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?)
      | "(?P<double>[^"]*)" | '(?P<single>[^']*)'
      | (?P<sign>==|!=|>=|<=|[=<>!(),])
    )""",
    re.VERBOSE,
)
_COMPARED = (">", ">=", "<", "<=")


@dataclass(frozen=True, slots=True)
class LabelExpression:
    """One expression, read."""

    text: str
    label: str
    operator: str
    """One of ``exists``, ``absent``, ``=``, ``!=``, ``in``, ``not in``, ``>``, ``>=``, ``<``, ``<=``."""
    values: tuple[str, ...] = ()

    def why_not(self, labels: Mapping[str, str]) -> str | None:
        """Why *labels* don't satisfy it, to be read after a node's name; None if they do."""
        found = labels.get(self.label)
        if self.operator in ("absent", "!=", "not in"):
            if found is None or (self.operator != "absent" and found not in self.values):
                return None
        elif found is None:
            return f"has no label {self.label} (needs {self.text})"
        elif self.operator == "exists":
            return None
        elif self.operator in _COMPARED:
            number = _number(found)
            if number is None:
                return f"has {self.label}={found}, which is not a number (needs {self.text})"
            if _compares(number, self.operator, float(self.values[0])):
                return None
        elif found in self.values:
            return None
        return f"has {self.label}={found} (needs {self.text})"

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether *labels* satisfy it."""
        return self.why_not(labels) is None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _compares(left: float, operator: str, right: float) -> bool:
    match operator:
        case ">":
            return left > right
        case ">=":
            return left >= right
        case "<":
            return left < right
        case _:
            return left <= right


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    kind: str
    """``word``, ``quoted`` or ``sign``."""


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = self._split()
        self._next = 0

    def _fail(self, why: str) -> ValueError:
        return ValueError(f"label expression {self._text!r}: {why}")

    def _split(self) -> list[_Token]:
        tokens: list[_Token] = []
        position, end = 0, len(self._text.rstrip())
        while position < end:
            found = _TOKEN.match(self._text, position)
            if found is None:
                rest = self._text[position:].strip()
                if rest[0] in "\"'":
                    raise self._fail(f"the quote that begins at {rest[:20]!r} does not end")
                raise self._fail(
                    f"{rest.split()[0][:20]!r} is not understood; "
                    f"the operators are {', '.join(OPERATORS)}"
                )
            position = found.end()
            kind = found.lastgroup or ""
            tokens.append(_Token(found[kind], kind if kind in ("word", "sign") else "quoted"))
        return tokens

    def _take(self) -> _Token | None:
        if self._next == len(self._tokens):
            return None
        self._next += 1
        return self._tokens[self._next - 1]

    def _name(self) -> str:
        token = self._take()
        if token is None or token.kind != "word":
            shown = "nothing" if token is None else repr(token.text)
            raise self._fail(f"a label's name is expected, not {shown}")
        return token.text

    def _value(self, after: str) -> str:
        token = self._take()
        if token is None or token.kind == "sign":
            shown = "nothing" if token is None else repr(token.text)
            raise self._fail(f"a value is expected after {after!r}, not {shown}")
        return token.text

    def _list(self, after: str) -> tuple[str, ...]:
        token = self._take()
        if token != _Token("(", "sign"):
            raise self._fail(f"a list such as (a, b) is expected after {after!r}")
        values = [self._value("(")]
        while (token := self._take()) == _Token(",", "sign"):
            values.append(self._value(","))
        if token != _Token(")", "sign"):
            shown = "nothing" if token is None else repr(token.text)
            raise self._fail(f"',' or ')' is expected after {values[-1]!r}, not {shown}")
        return tuple(values)

    def read(self) -> LabelExpression:
        if not self._tokens:
            raise self._fail("it is empty")
        found = self._expression()
        rest = self._take()
        if rest is not None:
            raise self._fail(f"{rest.text!r} is too much; write one expression per item")
        return found

    def _expression(self) -> LabelExpression:
        text = " ".join(self._text.split())
        if self._tokens[0] == _Token("!", "sign"):
            self._next = 1
            return LabelExpression(text, self._name(), "absent")
        label = self._name()
        token = self._take()
        if token is None:
            return LabelExpression(text, label, "exists")
        operator = token.text
        if token.kind == "word":
            if operator == "not":
                following = self._take()
                if following is None or following.text != "in":
                    raise self._fail("'in' is expected after 'not'")
                operator = "notin"
            if operator in ("in", "notin"):
                name = "in" if operator == "in" else "not in"
                return LabelExpression(text, label, name, self._list(name))
        elif token.kind == "sign" and operator in OPERATORS:
            value = self._value(operator)
            if operator in _COMPARED and _number(value) is None:
                raise self._fail(f"{value!r} is not a number, which {operator!r} compares with")
            return LabelExpression(text, label, "=" if operator == "==" else operator, (value,))
        near = difflib.get_close_matches(operator, (*OPERATORS, "notin"), n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(OPERATORS)}"
        raise self._fail(f"{operator!r} is not an operator; {remedy}")


@lru_cache(maxsize=4096)
def parse_expression(text: str) -> LabelExpression:
    """Read one expression.

    Raises:
        ValueError: it is not one; says what was expected where.
    """
    if len(text) > LENGTH_MAX:
        raise ValueError(f"label expression {text[:40] + '…'!r}: longer than {LENGTH_MAX}")
    return _Reader(text).read()
