"""`calculate`: an expression as people write it, evaluated by its syntax tree; nothing else can be said in it.

Numbers, ``+ - * / // % **``, comparisons, ``and or not``, ``a if b else c``, names that are given, and a
few functions. Powers and sizes are bounded, so that no expression takes long.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from foundation_nats.agent.actions.action import action
from foundation_nats.errors import ActionError

LENGTH_MAX = 1_000
DEPTH_MAX = 50
_BITS_MAX = 4_096
Number = int | float | bool

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLED: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "cos": math.cos,
    "exp": math.exp,
    "floor": math.floor,
    "log": math.log,
    "max": max,
    "min": min,
    "round": lambda value, digits=0: round(value, max(-100, min(100, digits))),
    "sin": math.sin,
    "sqrt": math.sqrt,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


@action
async def calculate(
    expression: Annotated[str, Field(max_length=LENGTH_MAX)],
    names: dict[str, float] | None = None,
) -> bool | int | float:
    """Evaluate an arithmetic expression, such as ``(a + 2) * sqrt(b)``, with the values of its names."""
    return evaluate(expression, names or {})


def evaluate(expression: str, names: Mapping[str, Number]) -> Number:
    """The value of *expression*.

    Raises:
        ActionError: it is none, or has no finite value; says why.
    """
    try:
        root = ast.parse(expression.strip(), mode="eval").body
        found: Number = _value(root, {**_CONSTANTS, **names}, 0)
    except ActionError:
        raise
    except SyntaxError as error:
        raise ActionError(f"{expression!r} is no expression: {error.msg}.") from error
    except (ArithmeticError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ActionError(f"{expression!r} has no value: {error}.") from error
    if isinstance(found, float) and not math.isfinite(found):
        raise ActionError(f"{expression!r} has no finite value.")
    return found


def _value(node: ast.expr, names: Mapping[str, Number], depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise ActionError("The expression is nested too deeply.")

    def of(inner: ast.expr) -> Any:
        return _value(inner, names, depth + 1)

    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return _bounded(value)
        case ast.Name(id=name):
            if name not in names:
                raise ActionError(f"There is no name {name!r}; given are: {', '.join(names)}.")
            return names[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(of(left), of(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](of(left), of(right)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](of(operand))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(of(item) for item in values)
        case ast.BoolOp(values=values):
            return any(of(item) for item in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return of(body) if of(test) else of(orelse)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(
            type(op) in _COMPARED for op in ops
        ):
            values = [of(left), *(of(item) for item in rest)]
            return all(
                _COMPARED[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False)
            )
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLED:
            return _bounded(_CALLED[name](*(of(item) for item in args)))
    raise ActionError(f"{ast.unparse(node)!r} is not allowed in an expression.")


def _power(base: Any, exponent: Any) -> Any:
    are_whole = isinstance(base, int) and isinstance(exponent, int)
    if are_whole and exponent > 0 and base.bit_length() * exponent > _BITS_MAX:
        raise ActionError("The number would be too large.")
    found = base**exponent
    if isinstance(found, complex):
        raise ActionError("The value is no real number.")
    return found


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _BITS_MAX:
        raise ActionError("The number would be too large.")
    return value


__all__ = ["calculate", "evaluate"]
