"""What crosses the wire, for programs and people of other languages: JSON Schemas and `asyncapi.yaml`.

`documents` are the files below ``schemas/``; a test compares what lies there with what this says.
Subjects come from `bus/subjects.py` and payloads from the models, so the description can't say
anything else than the code does. It describes: nothing at run time depends on it.

The AsyncAPI document is written from the side of the cluster, as its rules ask: what it
``receive``\\ s, others send.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, TypeAdapter
from ruamel.yaml import YAML

import foundation_schemas
from foundation_nats.agent.agent import Agent, provided, subscribed
from foundation_nats.agent.handling import handlings
from foundation_nats.api.refs import AgentInfo, NodeInfo
from foundation_nats.base.docs import schema_of
from foundation_nats.bus.subjects import Subjects
from foundation_nats.control.manifest_schema import manifest_schema
from foundation_schemas import (
    BusiestReply,
    BusiestRequest,
    ClusterEvent,
    DeadLetter,
    DomainEntry,
    Echo,
    Envelope,
    ErrorBody,
    Heartbeat,
    InspectReply,
    Pong,
    QueueItem,
    StartRequest,
    StopRequest,
    Target,
    TargetKind,
    ValidateReply,
    ValidateRequest,
)
from foundation_schemas.base import WireModel

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_URN = "urn:foundation-nats:v1:"
_OF_COMMANDS: tuple[type[WireModel], ...] = (AgentInfo, NodeInfo)
"""What commands print with ``-o json`` besides models of the wire."""
_PARAMETERS = {
    "cluster": "Name of the cluster, `default` unless said otherwise.",
    "agent": "Id of the agent.",
    "node": "Name of the node.",
    "worker": "Id of the worker process.",
    "gateway": "Id of the gateway process.",
    "name": "Name of what is addressed.",
    "kind": "`capability`, `any`, `deployment` or `topic`; `label` and `everyone` have no name.",
    "owner": "Agent that owns the timer, or `~client`.",
    "verb": "What is asked.",
    "topic": "What the event is about: node, agent, leader, deployment, worker, cluster …",
    "what": "What happened, in the past tense.",
    "part": "`p<n>` for items with a key, `free` for those without, `dead.<sequence>`.",
    "port": "Port of the HTTP endpoint.",
    "digest": "Digest of its path.",
}
_ANY: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Channel:
    """One subject, what is on it and who puts it there."""

    name: str
    address: str
    summary: str
    payload: type[BaseModel] | dict[str, Any]
    message: str
    received: bool | None = True
    """True: others send it to the cluster; False: it tells others; None: it speaks with itself."""
    reply: type[BaseModel] | dict[str, Any] | None = None
    stream: str = ""
    """Where it is stored; empty: it is not."""
    headers: tuple[str, ...] = field(default=())


def channels() -> list[Channel]:
    """Every subject of a cluster."""
    s = Subjects("{cluster}")
    routed = s.route(Target.model_construct(kind=TargetKind.CAPABILITY, name="{name}")).replace(
        ".capability.", ".{kind}."
    )
    answer = {
        "type": "object",
        "description": "What the handler returned, or why there is no answer.",
        "oneOf": [
            {"required": ["ok"], "properties": {"ok": {}}},
            {
                "required": ["error"],
                "properties": {"error": {"$ref": "#/components/schemas/ErrorBody"}},
            },
        ],
    }
    ack = {
        "type": "object",
        "description": "JetStream's acknowledgement: the receipt.",
        "properties": {
            "stream": {"type": "string"},
            "seq": {"type": "integer"},
            "duplicate": {"type": "boolean"},
            "error": {"type": "object"},
        },
    }
    flow = {
        "type": "object",
        "required": ["id"],
        "properties": {
            "id": {"type": "string", "description": "Of the question."},
            "upto": {"type": "integer", "description": "So many items may be sent in all."},
            "cancel": {"type": "boolean", "description": "End the answer."},
        },
    }
    traced = {
        "type": "object",
        "required": ["sequences"],
        "properties": {"sequences": {"type": "array", "items": {"type": "integer"}}},
    }
    return [
        Channel(
            "mailbox",
            s.mailbox("{agent}"),
            "The mailbox of an agent: send a signal here, as a request, and hold its receipt.",
            Envelope,
            "signal",
            reply=ack,
            stream=s.signals_stream,
            headers=("Nats-Msg-Id", "traceparent"),
        ),
        Channel(
            "live",
            s.live("{agent}"),
            "The server's copy of each stored signal. Nobody else may publish here.",
            Envelope,
            "liveSignal",
            received=None,
            headers=("Nats-Sequence", "Nats-Last-Sequence", "Nats-Time-Stamp"),
        ),
        Channel(
            "ask",
            s.ask("{agent}"),
            "Ask an agent that runs; the reply subject must begin with `_INBOX.`.",
            Envelope,
            "signal",
            reply=answer,
        ),
        Channel(
            "flow",
            s.flow("{agent}"),
            "Credit for the items of an answer that comes item by item, or its end.",
            flow,
            "flow",
        ),
        Channel(
            "trace",
            s.trace("{agent}"),
            "Ask the worker of an agent what it remembers of signals.",
            traced,
            "traceQuestion",
            reply=answer,
        ),
        Channel(
            "route",
            routed,
            "A signal for many, stored until it has been expanded to mailboxes.",
            Envelope,
            "signal",
            reply=ack,
            stream=s.routes_stream,
            headers=("Nats-Msg-Id",),
        ),
        Channel(
            "timer",
            s.timer("{owner}", "{name}"),
            "A signal for later, as a schedule of the server.",
            Envelope,
            "timedSignal",
            reply=ack,
            stream=s.timers_stream,
            headers=("Nats-Schedule", "Nats-Schedule-Target"),
        ),
        Channel(
            "cancelled",
            s.cancelled("{owner}", "{name}"),
            "That a timer was cancelled.",
            _ANY,
            "cancelled",
            received=None,
            stream=s.timers_stream,
        ),
        Channel(
            "due",
            s.due(),
            "Timers that are due.",
            Envelope,
            "signal",
            received=None,
            stream=s.timers_stream,
        ),
        Channel(
            "dead",
            s.dead("{agent}"),
            "Signals that were given up; of `route`: those that found nobody.",
            DeadLetter,
            "deadLetter",
            received=False,
            stream=s.dead_stream,
        ),
        Channel(
            "event",
            s.event("{topic}", "{what}"),
            "What happened in the cluster.",
            ClusterEvent,
            "event",
            received=False,
            stream=s.events_stream,
        ),
        Channel(
            "heartbeat",
            s.heartbeat("{node}"),
            "Proof of life of a node, with its load.",
            Heartbeat,
            "heartbeat",
            received=False,
        ),
        Channel(
            "echo",
            s.echo("{node}"),
            "The leader's echoes of heartbeats.",
            Echo,
            "echo",
            received=None,
        ),
        Channel(
            "nodePing",
            s.control_node("{node}", "ping"),
            "Who lives there?",
            _ANY,
            "nothing",
            reply=Pong,
        ),
        Channel(
            "nodeInspect",
            s.control_node("{node}", "inspect"),
            "What runs on the node?",
            _ANY,
            "nothing",
            reply=InspectReply,
        ),
        Channel(
            "nodeHeartbeat",
            s.control_node("{node}", "heartbeat"),
            "How busy is the node?",
            _ANY,
            "nothing",
            reply=Heartbeat,
        ),
        Channel(
            "nodeBusiest",
            s.control_node("{node}", "busiest"),
            "Which agents of the node have most to do?",
            BusiestRequest,
            "busiest",
            reply=BusiestReply,
        ),
        Channel(
            "nodeValidate",
            s.control_node("{node}", "validate"),
            "Can the node import these classes?",
            ValidateRequest,
            "validate",
            reply=ValidateReply,
        ),
        Channel(
            "workerStart",
            s.control_worker("{worker}", "start"),
            "Start these agents.",
            StartRequest,
            "start",
            received=None,
            reply=_ANY,
        ),
        Channel(
            "workerStop",
            s.control_worker("{worker}", "stop"),
            "Stop these agents.",
            StopRequest,
            "stop",
            received=None,
            reply=_ANY,
        ),
        Channel(
            "web",
            s.web(0, "").rpartition(".")[0].replace(".0", ".{port}") + ".{digest}",
            "An HTTP request, passed on to the worker whose agent has the path.",
            _ANY,
            "httpRequest",
            received=None,
            reply=_ANY,
        ),
        Channel(
            "gateway",
            s.gateway("{id}"),
            "Whether an A2A gateway process lives.",
            _ANY,
            "nothing",
            reply=_ANY,
        ),
        Channel(
            "domain",
            s.domain("{name}"),
            "The log of a replicated domain.",
            DomainEntry,
            "domainEntry",
            received=None,
            stream=s.domain_stream("{name}"),
        ),
        Channel(
            "barrier",
            s.barrier("{name}"),
            "A party of a crowded barrier says that it comes.",
            _ANY,
            "party",
            received=None,
        ),
        Channel(
            "gateway",
            s.gateway("{gateway}"),
            "Whether a process of the A2A gateway lives.",
            _ANY,
            "nothing",
            received=None,
            reply=_ANY,
        ),
        Channel(
            "queue",
            s.queue("{name}", "{part}"),
            "Items of a work queue.",
            QueueItem,
            "queueItem",
            received=None,
            stream=s.queue_stream("{name}"),
        ),
    ]


# ---- JSON Schemas -------------------------------------------------------------------------


def wire_models() -> dict[str, type[WireModel]]:
    """Every model of the wire, by name."""
    found = {
        name: kind
        for name in foundation_schemas.__all__
        if isinstance(kind := getattr(foundation_schemas, name), type)
        and issubclass(kind, WireModel)
        and kind is not WireModel
    }
    return dict(sorted({**found, **{kind.__name__: kind for kind in _OF_COMMANDS}}.items()))


def wire_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema (draft 2020-12) of every model of the wire, by the model's name."""
    return {
        name: {"$schema": _DIALECT, "$id": f"{_URN}{name}", **schema_of(kind)}
        for name, kind in wire_models().items()
    }


def agent_classes(modules: Sequence[Any]) -> dict[str, type[Agent]]:
    """The agent classes that these modules define, by ``module:Class``."""
    return {
        f"{module.__name__}:{name}": kind
        for module in modules
        for name, kind in sorted(vars(module).items())
        if isinstance(kind, type)
        and issubclass(kind, Agent)
        and kind is not Agent
        and kind.__module__ == module.__name__
    }


def agent_schema(run: str, cls: type[Agent]) -> dict[str, Any]:
    """What one class of agents takes and keeps: the payload of each signal that it handles, and its state.

    Raises:
        ConfigError: a handler's payload type can't be resolved; names it.
    """
    signals: dict[str, Any] = {}
    for handling in handlings(cls).handlings:
        if handling.type.startswith("foundation.") or handling.type in signals:
            continue
        signals[handling.type] = {
            "handler": handling.name,
            "description": _line(handling.function.__doc__),
            "payload": _payload(handling.adapter),
        }
    return {
        "run": run,
        "description": _line(cls.__doc__),
        "capabilities": provided(cls),
        "topics": [item.topic for item in subscribed(cls)],
        "signals": dict(sorted(signals.items())),
        "state": schema_of(cls.State),
    }


def _payload(adapter: TypeAdapter[Any] | None) -> dict[str, Any]:
    return {} if adapter is None else adapter.json_schema()


def _line(doc: str | None) -> str:
    return " ".join((doc or "").strip().split("\n\n")[0].split())


# ---- AsyncAPI -----------------------------------------------------------------------------


def asyncapi(agents: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """The AsyncAPI 3 document of a cluster; *agents* are `agent_schema`s, whose signals it names too."""
    schemas: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    found: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    _schema(ErrorBody, schemas)
    for channel in channels():
        _message(channel.message, channel.payload, channel.headers, schemas, messages)
        here: dict[str, Any] = {
            "address": channel.address,
            "description": channel.summary
            + (f" Stored in the stream `{channel.stream}`." if channel.stream else ""),
            "parameters": {
                name: {"description": text}
                for name, text in _PARAMETERS.items()
                if f"{{{name}}}" in channel.address
            },
            "messages": {
                channel.message: {"$ref": f"#/components/messages/{channel.message}"},
            },
        }
        found[channel.name] = here
        if channel.received is None:
            continue
        operation: dict[str, Any] = {
            "action": "receive" if channel.received else "send",
            "channel": {"$ref": f"#/channels/{channel.name}"},
            "summary": channel.summary,
            "messages": [{"$ref": f"#/channels/{channel.name}/messages/{channel.message}"}],
        }
        if channel.reply is not None:
            reply = f"{channel.name}Reply"
            _message(reply, channel.reply, (), schemas, messages)
            found[reply] = {
                "address": None,
                "description": f"The reply to `{channel.name}`, on the subject that was named.",
                "messages": {reply: {"$ref": f"#/components/messages/{reply}"}},
            }
            operation["reply"] = {
                "address": {"location": "$message.header#/reply"},
                "channel": {"$ref": f"#/channels/{reply}"},
                "messages": [{"$ref": f"#/channels/{reply}/messages/{reply}"}],
            }
        operations[channel.name] = operation
    for run, said in (agents or {}).items():
        _add_agent(run, said, schemas, messages, found)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "A foundation_nats cluster",
            "version": _version(),
            "description": "Clusters of stateful agents over NATS. Signals are CloudEvents 1.0 in "
            "structured JSON. See docs/subjects.md.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "embedded": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "What `foundation up` starts.",
            }
        },
        "channels": found,
        "operations": operations,
        "components": {
            "messages": dict(sorted(messages.items())),
            "schemas": dict(sorted(schemas.items())),
        },
    }


def _version() -> str:
    return ".".join(version("foundation-nats").split(".")[:2])


def _schema(kind: type[BaseModel], schemas: dict[str, Any]) -> dict[str, str]:
    """A reference to the schema of *kind*, which is added to *schemas* with all it needs."""
    if kind.__name__ not in schemas:
        whole = schema_of(kind, ref_template="#/components/schemas/{model}")
        schemas.update(whole.pop("$defs", {}))
        schemas[kind.__name__] = whole
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _message(
    name: str,
    payload: type[BaseModel] | dict[str, Any],
    headers: Sequence[str],
    schemas: dict[str, Any],
    messages: dict[str, Any],
) -> None:
    known = messages.setdefault(
        name,
        {
            "name": name,
            "contentType": "application/json",
            "payload": _schema(payload, schemas) if isinstance(payload, type) else payload,
        },
    )
    if headers:
        told = known.setdefault("headers", {"type": "object", "properties": {}})
        told["properties"].update({header: {"type": "string"} for header in headers})


def _add_agent(
    run: str,
    said: dict[str, Any],
    schemas: dict[str, Any],
    messages: dict[str, Any],
    found: dict[str, Any],
) -> None:
    """The signals that one class handles, on the mailbox and as questions."""
    _schema(Envelope, schemas)
    for type_, handled in said["signals"].items():
        data = _moved(handled["payload"], schemas, run)
        name = "".join(c if c.isalnum() else "_" for c in f"{run}.{type_}")
        messages[name] = {
            "name": type_,
            "title": f"{run} {handled['handler']}",
            "summary": handled["description"],
            "contentType": "application/json",
            "payload": {
                "allOf": [
                    {"$ref": "#/components/schemas/Envelope"},
                    {"properties": {"type": _type_schema(type_), "data": data}},
                ]
            },
        }
        for channel in ("mailbox", "ask"):
            found[channel]["messages"][name] = {"$ref": f"#/components/messages/{name}"}


def _type_schema(type_: str) -> dict[str, Any]:
    return {"description": f"Matches `{type_}`."} if "*" in type_ else {"const": type_}


def _moved(payload: dict[str, Any], schemas: dict[str, Any], run: str) -> dict[str, Any]:
    """*payload* with its definitions among *schemas*, under names that no other class has."""
    prefix = "".join(c if c.isalnum() else "_" for c in run)
    text = json.dumps(payload).replace("#/$defs/", f"#/components/schemas/{prefix}_")
    whole: dict[str, Any] = json.loads(text)
    for name, part in whole.pop("$defs", {}).items():
        schemas[f"{prefix}_{name}"] = part
    return whole


# ---- files --------------------------------------------------------------------------------


def documents(classes: dict[str, type[Agent]] | None = None) -> dict[str, str]:
    """The files that describe the wire: their paths, and what is in them.

    Args:
        classes: agents to describe too, by ``module:Class``.

    Raises:
        ConfigError: a handler's payload type can't be resolved; names it.
    """
    agents = {run: agent_schema(run, cls) for run, cls in (classes or {}).items()}
    found = {f"json/{name}.schema.json": _json(schema) for name, schema in wire_schemas().items()}
    found["manifest.schema.json"] = _json(manifest_schema())
    found["asyncapi.yaml"] = _yaml(asyncapi(agents))
    for run, said in agents.items():
        found[f"agents/{run.replace(':', '.')}.json"] = _json(said)
    return dict(sorted(found.items()))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _yaml(value: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 100
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda *_: True
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


__all__ = [
    "agent_classes",
    "agent_schema",
    "asyncapi",
    "channels",
    "documents",
    "wire_models",
    "wire_schemas",
]
