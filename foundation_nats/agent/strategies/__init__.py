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

__all__ = [
    "Call",
    "ChatModel",
    "Completion",
    "Conversation",
    "Go",
    "StateMachine",
    "ToolLoop",
    "entering",
    "fsm_mermaid",
    "leaving",
]
