"""`schema_of`: the JSON Schema of a model, with what the source says of each field.

Models say what a field means in the string below it, where people read it. Programs see that
string only in the source, so it is read from there, at the one moment that somebody wants a
schema; classes whose source is not at hand get a schema without.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of *model* and its bases, as one line."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (issubclass(base, BaseModel) and base is not BaseModel):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = getattr(tree.body[0], "body", [])
        for before, here in pairwise(body):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(here, ast.Expr)
                and isinstance(here.value, ast.Constant)
                and isinstance(here.value.value, str)
            ):
                found[before.target.id] = " ".join(here.value.value.split())
    return found


def schema_of(
    model: type[BaseModel], *, ref_template: str = "#/$defs/{model}", mode: Any = "validation"
) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of *model*, descriptions of fields included."""
    schema = model.model_json_schema(ref_template=ref_template, mode=mode)
    known = {kind.__name__: kind for kind in _within(model)}
    _describe(schema, model)
    for name, part in schema.get("$defs", {}).items():
        if name in known:
            _describe(part, known[name])
    return schema


def _within(model: type[BaseModel]) -> set[type[BaseModel]]:
    """*model* and every model that its fields lead to."""
    found: set[type[BaseModel]] = set()
    waiting: list[Any] = [model]
    while waiting:
        here = waiting.pop()
        if isinstance(here, type) and issubclass(here, BaseModel) and here not in found:
            found.add(here)
            waiting.extend(field.annotation for field in here.model_fields.values())
        waiting.extend(getattr(here, "__args__", ()))
    return found


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    if schema.get("description"):
        schema["description"] = _first_paragraph(schema["description"])
    for name, text in field_docs(model).items():
        field = schema.get("properties", {}).get(name)
        if field is not None:
            field.setdefault("description", re.sub("``", "`", text))


def _first_paragraph(text: str) -> str:
    return re.sub("``", "`", " ".join(text.split("\n\n")[0].split()))
