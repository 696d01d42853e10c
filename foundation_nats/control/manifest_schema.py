"""The JSON Schema of a manifest, for editors that complete and check while one types.

Pure. It is made from the models and from the keys that `manifest.parse` accepts, so it knows
every key and no other. What only `parse` can say (that two names collide, that a label's expression
reads) it does not say: what passes the schema may still be refused, what `parse` takes passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from foundation_nats.base.docs import schema_of
from foundation_nats.control import manifest
from foundation_nats.placement.strategies import STRATEGIES
from foundation_schemas import AgentSpec, Deployment, RestartLimit

MODELINE = "# yaml-language-server: $schema="
"""The first line of a manifest, before the path or URL of the schema, as editors read it."""
_RUN_PATTERN = r"^[^:\s]+:[^:\s]+$"
_OF_WISH = ("name", "replicas", "tier", *manifest.SECTIONS)


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a manifest."""
    wish, spec = schema_of(Deployment), schema_of(AgentSpec)
    parts: dict[str, Any] = {**wish["$defs"], **spec["$defs"]}
    properties = {**spec["properties"], **{key: wish["properties"][key] for key in _OF_WISH}}
    agent = _only({**spec, "properties": properties}, (*manifest.AGENT_KEYS, *manifest.SECTIONS))
    del agent["$defs"]
    agent["required"] = ["name", "run"]
    agent["description"] = "One agent, or with `replicas` several of one class."
    agent["properties"]["run"]["pattern"] = _RUN_PATTERN
    agent["properties"]["restart"]["enum"] = list(manifest.RESTART_WORDS)
    topics = agent["properties"]["subscribe"]
    topics["items"] = {"anyOf": [{"type": "string"}, topics["items"]]}
    parts["PlacementPolicy"] = _only(parts["PlacementPolicy"], manifest.PLACEMENT_KEYS)
    # Installed packages may bring strategies of their own, so these are only offered.
    parts["PlacementPolicy"]["properties"]["strategy"]["examples"] = list(STRATEGIES)
    parts["Spread"] = _only(parts["Spread"], manifest.SPREAD_KEYS)
    parts["Subscription"] = _only(parts["Subscription"], manifest.SUBSCRIBE_KEYS)
    closed: list[type[BaseModel]] = [*manifest.SECTIONS.values(), RestartLimit]
    for kind in closed:
        parts[kind.__name__] = _only(parts[kind.__name__], None)
    parts["Agent"] = agent
    whole = {
        "type": "object",
        "additionalProperties": False,
        "required": ["version", "agents"],
        "properties": {
            "version": {"const": manifest.VERSION, "description": "Of the format."},
            "name": {
                "anyOf": [{"type": "string"}, {"type": "null"}],
                "description": "What tells this manifest from others: see `deploy --prune`.",
            },
            "cluster": {
                "anyOf": [
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "min_nodes": {
                                "anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}],
                                "description": "A deploy waits until so many nodes are up.",
                            },
                        },
                    },
                    {"type": "null"},
                ],
                "description": "What a deploy waits for before it stores anything.",
            },
            "agents": {
                "anyOf": [
                    {"type": "array", "items": {"$ref": "#/$defs/Agent"}},
                    {"type": "null"},
                ],
                "description": "What shall run.",
            },
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Manifest of foundation_nats",
        **whole,
        "$defs": _reached(whole, parts),
    }


def _only(schema: dict[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    """An object of a model with no keys but these (None: but its own)."""
    properties = schema["properties"]
    wanted = properties if keys is None else keys
    return {
        **schema,
        "properties": {key: dict(properties[key]) for key in wanted},
        "additionalProperties": False,
    }


def _reached(schema: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """Those of *parts* that *schema* refers to, however far round."""
    found: dict[str, Any] = {}
    waiting = [schema]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            name = str(here.get("$ref", "")).removeprefix("#/$defs/")
            if name and name not in found:
                found[name] = parts[name]
                waiting.append(parts[name])
            waiting.extend(here.values())
        elif isinstance(here, list):
            waiting.extend(here)
    return dict(sorted(found.items()))
