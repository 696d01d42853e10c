"""Clusters of stateful agents over nothing but NATS: the public names, and nothing else.

The names are loaded when they are first used, so that importing the package
is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foundation_nats.agent.actions import Action, ActionContext, Plan, action, ref
    from foundation_nats.agent.agent import Agent, subscribe
    from foundation_nats.agent.context import Context
    from foundation_nats.agent.handling import on
    from foundation_nats.agent.prompts import Attachment, Prompt, Reply, on_prompt
    from foundation_nats.agent.signal import Payload, Signal
    from foundation_nats.agent.state import State, migrates
    from foundation_nats.api.cluster import Cluster
    from foundation_nats.api.node import Node, NodeOptions
    from foundation_nats.api.refs import AgentInfo, AgentRef, NodeInfo
    from foundation_nats.config import Config
    from foundation_nats.consensus.domain import Domain, Proposal
    from foundation_nats.errors import FoundationError
    from foundation_schemas import GivenUp, Receipt, RecoveredFrom, Target

__version__ = "0.1.0"

_HOMES = {
    "Action": "foundation_nats.agent.actions",
    "ActionContext": "foundation_nats.agent.actions",
    "Agent": "foundation_nats.agent.agent",
    "AgentInfo": "foundation_nats.api.refs",
    "AgentRef": "foundation_nats.api.refs",
    "Attachment": "foundation_nats.agent.prompts",
    "Cluster": "foundation_nats.api.cluster",
    "Config": "foundation_nats.config",
    "Context": "foundation_nats.agent.context",
    "Domain": "foundation_nats.consensus.domain",
    "FoundationError": "foundation_nats.errors",
    "GivenUp": "foundation_schemas",
    "Node": "foundation_nats.api.node",
    "NodeInfo": "foundation_nats.api.refs",
    "NodeOptions": "foundation_nats.api.node",
    "Payload": "foundation_nats.agent.signal",
    "Prompt": "foundation_nats.agent.prompts",
    "Plan": "foundation_nats.agent.actions",
    "Proposal": "foundation_nats.consensus.domain",
    "Receipt": "foundation_schemas",
    "RecoveredFrom": "foundation_schemas",
    "Reply": "foundation_nats.agent.prompts",
    "Signal": "foundation_nats.agent.signal",
    "State": "foundation_nats.agent.state",
    "Target": "foundation_schemas",
    "action": "foundation_nats.agent.actions",
    "migrates": "foundation_nats.agent.state",
    "on": "foundation_nats.agent.handling",
    "on_prompt": "foundation_nats.agent.prompts",
    "ref": "foundation_nats.agent.actions",
    "subscribe": "foundation_nats.agent.agent",
}

__all__ = [
    "Action",
    "ActionContext",
    "Agent",
    "AgentInfo",
    "AgentRef",
    "Attachment",
    "Cluster",
    "Config",
    "Context",
    "Domain",
    "FoundationError",
    "GivenUp",
    "Node",
    "NodeInfo",
    "NodeOptions",
    "Payload",
    "Plan",
    "Prompt",
    "Proposal",
    "Receipt",
    "RecoveredFrom",
    "Reply",
    "Signal",
    "State",
    "Target",
    "action",
    "migrates",
    "on",
    "on_prompt",
    "ref",
    "subscribe",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
