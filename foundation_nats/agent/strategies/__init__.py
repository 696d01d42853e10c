"""Strategies: how an agent decides what to do, besides its handlers. See docs/strategies.md."""

from foundation_nats.agent.strategies.chat import Call, ChatModel, Completion
from foundation_nats.agent.strategies.loop import Conversation, ToolLoop
from foundation_nats.agent.strategies.machine import (
    Go,
    StateMachine,
    entering,
    fsm_mermaid,
    leaving,
)
from foundation_nats.agent.strategies.tree import (
    Always,
    BehaviourTree,
    Do,
    Invert,
    Parallel,
    Repeat,
    Retry,
    Selector,
    Sequence,
    Status,
    Timeout,
    Wait,
)

__all__ = [
    "Always",
    "BehaviourTree",
    "Call",
    "ChatModel",
    "Completion",
    "Conversation",
    "Do",
    "Go",
    "Invert",
    "Parallel",
    "Repeat",
    "Retry",
    "Selector",
    "Sequence",
    "StateMachine",
    "Status",
    "Timeout",
    "ToolLoop",
    "Wait",
    "entering",
    "fsm_mermaid",
    "leaving",
]
