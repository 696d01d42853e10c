"""Telemetry: named events with measurements and metadata, told to whoever has attached to their name.

For metrics of a program's own. As Erlang's ``telemetry`` does it: `execute` calls the handlers of
that name at once, in the caller's task; with none attached it costs a look into a dictionary.
A handler must not block and must not wait. One that raises is detached, and that is logged: what
is measured must not suffer from who measures it.

Names are words joined by dots. The platform's own:

===============================================  ======================  =============================
name                                             measurements            metadata
===============================================  ======================  =============================
``foundation.clustering.node_connected``         ``nodes``               of the node
``foundation.clustering.node_disconnected``      ``nodes``               of the node
``foundation.clustering.failover_completed``     ``agents``, ``ms``      ``node``, ``to``, ``observer``
``foundation.registry.agent_registered``         ``agents``              of the agent
``foundation.registry.agent_unregistered``       ``agents``              of the agent, as last known
===============================================  ======================  =============================

Of a node: ``node``, ``incarnation``, ``labels``, ``capabilities``, and who noticed (``observer``); of an
agent: ``agent``, ``node``, ``deployment``, ``status``.

They are told where they are noticed, by each process for itself: in a program that runs a `Node`,
in a `foundation node start` that loads handlers by the setting ``telemetry.handlers``, and in a client
after `Cluster.telemetry`. What was there when it began to look is told of nodes, which
connect then, and not of agents.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from foundation_nats.base.logs import get_logger
from foundation_nats.errors import ConfigError

NODE_CONNECTED = "foundation.clustering.node_connected"
NODE_DISCONNECTED = "foundation.clustering.node_disconnected"
FAILOVER_COMPLETED = "foundation.clustering.failover_completed"
AGENT_REGISTERED = "foundation.registry.agent_registered"
AGENT_UNREGISTERED = "foundation.registry.agent_unregistered"
EVENTS = (
    NODE_CONNECTED,
    NODE_DISCONNECTED,
    FAILOVER_COMPLETED,
    AGENT_REGISTERED,
    AGENT_UNREGISTERED,
)
"""All of the platform's own."""

Handler = Callable[[str, Mapping[str, float], Mapping[str, Any]], object]
"""Called with the event's name, its measurements and its metadata."""

_handlers: dict[str, dict[str, Handler]] = {}
_loaded: Counter[str] = Counter()
"""How often a handler was loaded by its name and not taken back."""


def attach(id: str, events: str | Iterable[str], handler: Handler) -> None:
    """Call *handler* whenever one of *events* is executed in this process, until `detach`.

    Raises:
        ValueError: a handler of this id is attached already, or no event is named.
    """
    names = [events] if isinstance(events, str) else list(events)
    if not names or not all(names):
        raise ValueError("name at least one event to attach to")
    if any(id in found for found in _handlers.values()):
        raise ValueError(f"a handler {id!r} is attached already; detach it first")
    for name in names:
        _handlers[name] = {**_handlers.get(name, {}), id: handler}


def detach(id: str) -> bool:
    """Call that handler no more; whether there was one."""
    was_there = False
    for name, found in list(_handlers.items()):
        if id in found:
            was_there = True
            left = {key: handler for key, handler in found.items() if key != id}
            if left:
                _handlers[name] = left
            else:
                del _handlers[name]
    return was_there


def load(names: Iterable[str]) -> Callable[[], None]:
    """Attach functions, each named ``module:function``, to all of the platform's events.

    Returns what detaches them again. One that is loaded twice, by two nodes of one program, is called
    once for each event, until it was taken back twice.

    Raises:
        ConfigError: one is not there, can't be imported or can't be called; none was attached.
    """
    found = {name: _find(name) for name in names}
    for name, handler in found.items():
        if not _loaded[name]:
            attach(name, EVENTS, handler)
        _loaded[name] += 1

    def unload() -> None:
        while found:
            name, _ = found.popitem()
            _loaded[name] -= 1
            if not _loaded[name]:
                detach(name)

    return unload


def _find(name: str) -> Handler:
    where, colon, path = name.partition(":")
    if not (where and colon and path):
        raise ConfigError(
            f"The telemetry handler {name!r} is not of the form 'module:function'.",
            hint="It is said by the setting telemetry.handlers.",
        )
    try:
        found: Any = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever a user's module raises
        raise ConfigError(
            f"The telemetry handler {name} can't be imported: {error or type(error).__name__}.",
            hint="Modules are looked for in the working directory and on PYTHONPATH.",
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, dir(found), n=1)
            raise ConfigError(
                f"The telemetry handler {name} is not there: {where} has no {path}.",
                hint=f"Did you mean {near[0]!r}?" if near else "Name a function of the module.",
            )
        found = getattr(found, part)
    if not callable(found) or isinstance(found, type) or inspect.iscoroutinefunction(found):
        what = "waits (async)" if inspect.iscoroutinefunction(found) else "is no function"
        raise ConfigError(
            f"The telemetry handler {name} {what}.",
            hint="Write `def handler(event, measurements, metadata)`; it is called at once.",
        )
    handler: Handler = found
    return handler


def is_attached(event: str) -> bool:
    """Whether anybody wants to be told; for what would be costly to say."""
    return event in _handlers


def execute(
    event: str, measurements: Mapping[str, float], metadata: Mapping[str, Any] | None = None
) -> None:
    """Tell every handler of *event*; never raises."""
    for id, handler in _handlers.get(event, {}).items():
        try:
            handler(event, measurements, metadata or {})
        except Exception:  # whatever a user's handler raises
            get_logger("telemetry").exception("handler raised and was detached", handler=id)
            detach(id)
